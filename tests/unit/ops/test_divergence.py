"""Claim: chunked divergences, their gradients and their top-k forms are those of materialised fp64 logits."""

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mull.ops import cross_entropy
from mull.ops.cross_entropy import weighted_cross_entropy
from mull.ops.divergence import Kind, Predictor, TopK, divergence, top_k

N, D, E, V = 40, 12, 8, 60
KINDS = get_args(Kind)
BETA = 0.3


@pytest.fixture(params=[(2**22, 256), (7 * V, 1), (V - 1, 1)], ids=["one-chunk", "7-rows", "1-row"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """N is no multiple of 7: the last chunk is short."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", request.param[0])
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", request.param[1])


def student(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype) * 0.7 * scale
    return hidden.requires_grad_(), weight.requires_grad_()


def teacher(dtype: torch.dtype = torch.float64, scale: float = 1.0, width: int = V) -> Predictor:
    """Of another width than the student."""
    return Predictor(torch.randn(N, E, dtype=dtype), torch.randn(width, E, dtype=dtype) * scale)


def terms_of(p: Tensor, q: Tensor, kind: Kind) -> Tensor:
    """The formulas, by autograd, from probabilities ``[N, ...]``."""
    m = BETA * p + (1 - BETA) * q
    if kind == "jsd":
        return BETA * (p * (p / m).log()).sum(-1) + (1 - BETA) * (q * (q / m).log()).sum(-1)
    first, second = (p, q) if kind == "forward" else (q, p)
    return (first * (first / second).log()).sum(-1)


def probabilities(hidden: Tensor, weight: Tensor, temperature: float, n_tokens: int = V) -> Tensor:
    return (hidden.double() @ weight.double().T[:, :n_tokens] / temperature).softmax(-1)


def expected(
    hidden: Tensor, weight: Tensor, given: Predictor, kind: Kind, temperature: float, n_tokens: int = V
) -> list[Tensor]:
    """Sum, terms, and gradients of hidden states and weight in fp64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    p = probabilities(given.hidden, given.weight, temperature, n_tokens)
    terms = temperature**2 * terms_of(p, probabilities(hidden, weight, temperature, n_tokens), kind)
    return [terms.sum().detach(), terms.detach(), *torch.autograd.grad(terms.sum(), (hidden, weight))]


def relative_error(actual: Tensor, reference: Tensor) -> float:
    return float((actual.double() - reference).norm() / reference.norm())


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-13),
        (torch.float32, False, 2e-6),
        (torch.float32, True, 2e-2),
        (torch.bfloat16, False, 2e-2),
    ],
    ids=["fp64", "fp32", "bf16-autocast", "bf16"],
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_fp64_logits(
    kind: Kind, dtype: torch.dtype, autocast: bool, tolerance: float, temperature: float
) -> None:
    (hidden, weight), given = student(dtype), teacher(dtype)
    reference = expected(hidden, weight, given, kind, temperature)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        total, terms = divergence(hidden, weight, given, kind=kind, temperature=temperature, mixture=BETA)
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert total.dtype == terms.dtype == torch.promote_types(dtype, torch.float32)
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    for actual, wanted in zip([total.detach(), terms, *gradients], reference, strict=True):
        assert relative_error(actual, wanted) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_either_vocabulary_is_no_token(kind: Kind) -> None:
    """Columns after the tokens change neither values nor gradients, and get none."""
    (hidden, weight), given = student(), teacher(width=V + 9)
    reference = expected(hidden, weight, given, kind, 2.0, n_tokens=50)
    total, terms = divergence(hidden, weight, given, kind=kind, temperature=2.0, mixture=BETA, n_tokens=50)
    gradients = torch.autograd.grad(total, (hidden, weight))
    for actual, wanted in zip([total.detach(), terms, *gradients], reference, strict=True):
        assert relative_error(actual, wanted) < 1e-13
    assert not gradients[1][50:].any()


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_is_its_teacher_has_exactly_no_loss_and_no_gradient(kind: Kind, dtype: torch.dtype) -> None:
    hidden, weight = student(dtype, scale=20.0)
    same = Predictor(hidden.detach().clone(), weight.detach().clone())
    for given in (same, top_k(same, 5, temperature=3.0)):
        total, terms = divergence(hidden, weight, given, kind=kind, temperature=3.0, mixture=BETA)
        assert not terms.any()
        assert all(not gradient.any() for gradient in torch.autograd.grad(total, (hidden, weight)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("record", [False, True], ids=["full", "top-k"])
def test_models_that_exclude_each_others_tokens_have_finite_losses(kind: Kind, record: bool) -> None:
    """Probabilities of 1e-300 and less, in fp32; the divergence of ``jsd`` is bounded by the entropy of its mixture."""
    (hidden, weight), given = student(torch.float32, scale=300.0), teacher(torch.float32, scale=300.0)
    seen: Predictor | TopK = top_k(given, 3) if record else given
    total, terms = divergence(hidden, weight, seen, kind=kind, mixture=BETA)
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert all(tensor.isfinite().all() for tensor in (terms, *gradients))
    assert (terms >= 0).all()
    if kind == "jsd":
        assert terms.max() <= -(BETA * torch.tensor(BETA).log() + (1 - BETA) * torch.tensor(1 - BETA).log()) + 1e-6


def test_the_size_of_the_gradient_does_not_follow_the_temperature() -> None:
    """At small logits; without the factor T² it falls to a sixteenth at T = 4."""
    (hidden, weight), given = student(scale=0.01), teacher(scale=0.01)
    for kind in KINDS:
        norms = []
        for temperature in (1.0, 2.0, 4.0):
            total, _ = divergence(hidden, weight, given, kind=kind, temperature=temperature)
            norms.append(float(torch.autograd.grad(total, hidden)[0].norm()))
        assert norms[1:] == pytest.approx(norms[:1] * 2, rel=0.02)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_what_is_frozen_gets_no_gradient_and_the_teacher_none(frozen: str) -> None:
    (hidden, weight), given = student(), teacher()
    given = Predictor(given.hidden.requires_grad_(), given.weight.requires_grad_())
    reference = expected(hidden, weight, given, "forward", 1.0)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        total, terms = divergence(hidden, weight, given)
    torch.testing.assert_close(terms, reference[1])
    assert not terms.requires_grad
    assert total.requires_grad == (frozen in ("hidden", "weight"))
    if total.requires_grad:
        (total * -3).backward()
    for tensor, gradient in ((hidden, reference[2]), (weight, reference[3])):
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, -3 * gradient)
    assert given.hidden.grad is None
    assert given.weight.grad is None


def in_buckets(p: Tensor, tokens: Tensor) -> Tensor:
    kept = p.gather(-1, tokens.long())
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_compares_its_tokens_and_the_rest(kind: Kind) -> None:
    (hidden, weight), given = student(), teacher()
    record = top_k(given, 6, temperature=2.0, n_tokens=55)
    assert (record.log_p[:, :-1].diff(dim=-1) <= 0).all()
    torch.testing.assert_close(record.log_p.exp().sum(-1), torch.ones(N, dtype=torch.float64))
    total, terms = divergence(hidden, weight, record, kind=kind, temperature=2.0, mixture=BETA, n_tokens=55)
    actual = [total.detach(), terms, *torch.autograd.grad(total, (hidden, weight))]

    p, q = (in_buckets(probabilities(*x, 2.0, 55), record.tokens) for x in (given, (hidden, weight)))
    wanted = 4 * terms_of(p, q, kind)
    reference = [wanted.sum().detach(), wanted.detach(), *torch.autograd.grad(wanted.sum(), (hidden, weight))]
    for one, other in zip(actual, reference, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_never_exceeds_the_full_divergence_and_a_longer_one_is_closer(kind: Kind) -> None:
    (hidden, weight), given = student(), teacher()
    sizes = (1, 4, 16, V - 1)
    found = [divergence(hidden, weight, top_k(given, k), kind=kind, mixture=BETA)[1] for k in sizes]
    found.append(divergence(hidden, weight, given, kind=kind, mixture=BETA)[1])
    assert all((shorter <= longer + 1e-12).all() for shorter, longer in itertools.pairwise(found))
    torch.testing.assert_close(found[-2], found[-1])  # a bucket of one token hides nothing
    assert (found[0] < found[-1] - 1e-3).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("record", [False, True], ids=["full", "top-k"])
def test_arguments_are_only_read(kind: Kind, record: bool) -> None:
    (hidden, weight), given = student(), teacher()
    seen: Predictor | TopK = top_k(given, 6) if record else given
    arguments = [hidden, weight, *seen]
    before = [argument.clone() for argument in arguments]
    divergence(hidden, weight, seen, kind=kind)[0].backward()
    assert all(torch.equal(argument, copy) for argument, copy in zip(arguments, before, strict=True))


@pytest.mark.parametrize("k", [0, V])
def test_a_record_needs_a_token_and_a_rest(k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k={k} must be at least 1 and less than the {V} tokens"):
        top_k(teacher(), k)


class Largest(TorchDispatchMode):
    """Rows of the largest matrix over the vocabulary that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == V:
                self.rows = max(self.rows, tensor.shape[0])
        return out


@pytest.mark.parametrize("record", [False, True], ids=["full", "top-k"])
def test_no_matrix_of_all_logits_exists(record: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks have more rows than the unembedding has columns, which is a matrix over the vocabulary, too."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", (D + 1) * V)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", 1)
    (hidden, weight), given = student(), teacher()
    for kind in KINDS:
        with Largest() as seen:
            total, _ = divergence(hidden, weight, top_k(given, 4) if record else given, kind=kind)
            total.backward()
        assert seen.rows == D + 1


def test_no_rows_have_no_divergence() -> None:
    (hidden, weight), given = student(), teacher()
    total, terms = divergence(hidden[:0], weight, Predictor(given.hidden[:0], given.weight))
    total.backward()
    assert float(total.detach()) == len(terms) == 0
    assert not weight.grad.any()


def test_a_taught_distribution_is_reached_and_cross_entropy_agrees() -> None:
    """Forward KL differs from cross-entropy with sampled targets by the teacher's entropy, in expectation: over all targets."""
    (hidden, weight), given = student(), teacher()
    row = hidden[:1].expand(V, -1)
    p = probabilities(given.hidden[:1], given.weight, 1.0)[0]
    soft, _ = weighted_cross_entropy(row, weight, torch.arange(V), p)
    hard, _ = divergence(hidden[:1], weight, Predictor(given.hidden[:1], given.weight))
    torch.testing.assert_close(hard, soft + (p * p.log()).sum())
