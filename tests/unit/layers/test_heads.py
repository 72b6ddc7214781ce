"""Claim: the head-by-head loss and all its gradients are those of one graph that holds the logits of every head."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mull.layers.heads import HeadTask, MTPHeads, NativeHeads, RunBlock, head_losses, shifted
from mull.model.configs import MTPConfig
from mull.ops import cross_entropy

B, T, D, V = 3, 11, 8, 37
HEADS = {
    "transformer": MTPConfig(num_predict_tokens=3, mtp_head_type="transformer"),
    "mlp": MTPConfig(num_predict_tokens=3, mtp_head_type="mlp"),
    "shared_lm_head": MTPConfig(num_predict_tokens=3, mtp_head_type="shared_lm_head"),
    "sequential": MTPConfig(num_predict_tokens=3, mtp_head_type="sequential"),
    "sequential-shared": MTPConfig(num_predict_tokens=3, mtp_head_type="sequential", share_weights_across_steps=True),
    "native": MTPConfig(num_predict_tokens=3, mtp_head_type="native"),
}


@pytest.fixture(params=HEADS)
def config(request: pytest.FixtureRequest) -> MTPConfig:
    return HEADS[request.param]


class Block(nn.Module):
    """A causal layer: each position reads the mean of those up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(D, D)
        self.down_proj = nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        count = torch.arange(1, h.shape[1] + 1)[:, None]
        h = h + self.o_proj(h.cumsum(1) / count)
        return h + self.down_proj(h.tanh())


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, h: Tensor) -> Tensor:
        return h * h.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.weight


def run(block: nn.Module, h: Tensor, _k: int) -> Tensor:
    return block(h)


class RunWithMemory:
    """Runs the steps of a recursive head, each of which also reads what the steps before entered its block with."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []

    def __call__(self, block: nn.Module, h: Tensor, k: int) -> Tensor:
        if k == 1:
            self.before = []
        self.before.append(h)
        return block(h + sum(state.tanh() for state in self.before) / k)


def runner(heads: MTPHeads) -> RunBlock:
    return RunWithMemory() if heads.recursive else run


def heads_of(config: MTPConfig) -> MTPHeads:
    kind = config.mtp_head_type
    make = NativeHeads if kind == "native" else MTPHeads
    return make(kind, config.num_predict_tokens, D, Block, Norm, config.recursive)


class Toy(nn.Module):
    """A trunk with heads, whose embedding and unembedding may be one matrix."""

    def __init__(self, config: MTPConfig, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.trunk = nn.Linear(D, D)
        self.unembedding = nn.Linear(D, V, bias=False)
        if tied:
            self.unembedding.weight = self.embedding.weight
        self.heads = heads_of(config)
        self.double()

    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.embedding(tokens)
        return F.normalize(self.trunk(embedded).cumsum(1), dim=-1) * 3, embedded


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    return x * factor + x.detach() * (1 - factor)


def all_states(heads: MTPHeads, hidden: Tensor, embedded: Tensor, run_block: RunBlock, factor: float = 1.0) -> Tensor:
    """``[B, T, H, D]`` in one graph."""
    states = [hidden]
    trunk, embedded = scaled_gradient(hidden, factor), scaled_gradient(embedded, factor)
    for k in range(1, 1 + heads.n_heads):
        read = states[-1] if heads.sequential and k > 1 else trunk
        states.append(heads(k, read, shifted(embedded, k), run_block))
    return torch.stack(states, 2)


def naive(toy: Toy, tokens: Tensor, targets: Tensor, coefficients: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    logits = toy.unembedding(all_states(toy.heads, *toy.states(tokens), runner(toy.heads), factor))  # (B, T, H, V)
    losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none", ignore_index=-100)
    losses = losses.view_as(coefficients)
    return (losses * coefficients).sum(), losses.detach() * (coefficients != 0)


def head_by_head(
    toy: Toy, tokens: Tensor, targets: Tensor, coefficients: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    hidden, embedded = toy.states(tokens)
    task = HeadTask(toy.heads, targets, coefficients, runner(toy.heads), factor)
    return head_losses(hidden, embedded if toy.heads.sequential else None, toy.unembedding.weight, task)


def problem(n_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the targets are ignored or have no weight, in patterns that differ between heads."""
    tokens, targets = torch.randint(V, (B, T)), torch.randint(V, (B, T, n_heads))
    coefficients = torch.randn(B, T, n_heads, dtype=torch.float64)
    coefficients[torch.rand(B, T, n_heads) < 0.3] = 0
    targets[torch.rand(B, T, n_heads) < 0.2] = -100
    return tokens, targets, coefficients


def gradients(toy: Toy, loss: Tensor) -> dict[str, Tensor]:
    toy.zero_grad()
    if loss.requires_grad:
        loss.backward()
    return {name: parameter.grad for name, parameter in toy.named_parameters() if parameter.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-12, rtol=1e-10, msg=f"gradient of {name}")


def assert_equals_naive(
    toy: Toy, tokens: Tensor, targets: Tensor, coefficients: Tensor, factor: float = 1.0, scale: float = 1.0
) -> None:
    expected, expected_losses = naive(toy, tokens, targets, coefficients, factor)
    expected_gradients = gradients(toy, expected * scale)
    actual, losses = head_by_head(toy, tokens, targets, coefficients, factor)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(losses, expected_losses, atol=1e-12, rtol=1e-12)
    assert actual.requires_grad == expected.requires_grad
    assert not losses.requires_grad
    assert_same(gradients(toy, actual * scale), expected_gradients)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_equals_the_graph_with_all_logits(
    config: MTPConfig, tied: bool, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk_rows * V)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", 1)
    assert_equals_naive(Toy(config, tied), *problem(), scale=-3.0)


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_the_heads_gradient_into_the_trunk_is_scaled_and_no_other(config: MTPConfig, factor: float) -> None:
    assert_equals_naive(Toy(config, tied=False), *problem(), factor=factor)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_heads_may_read_something_else_than_the_main_one(config: MTPConfig, factor: float) -> None:
    """What they read has a gradient of its own, and the heads none into what the main head reads."""
    toy = Toy(config, tied=False)
    tokens, targets, coefficients = problem()
    hidden, embedded = toy.states(tokens)
    read = hidden.tanh() * toy.trunk.bias
    states = all_states(toy.heads, read, embedded, runner(toy.heads), factor)
    logits = toy.unembedding(torch.cat([hidden[:, :, None], states[:, :, 1:]], 2))
    losses = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none", ignore_index=-100)
    expected = (losses.view_as(coefficients) * coefficients).sum()
    expected_gradients = gradients(toy, expected)
    hidden, embedded = toy.states(tokens)
    task = HeadTask(toy.heads, targets, coefficients, runner(toy.heads), factor)
    actual, _ = head_losses(hidden, embedded, toy.unembedding.weight, task, hidden.tanh() * toy.trunk.bias)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    assert_same(gradients(toy, actual), expected_gradients)


def test_detached_heads_leave_the_trunk_the_gradient_of_the_main_head(config: MTPConfig) -> None:
    toy = Toy(config, tied=False)
    tokens, targets, coefficients = problem()
    alone = gradients(toy, head_by_head(toy, tokens, targets[..., :1], coefficients[..., :1], 1.0)[0])
    detached = gradients(toy, head_by_head(toy, tokens, targets, coefficients, 0.0)[0])
    for name in ("embedding.weight", "trunk.weight", "trunk.bias"):
        torch.testing.assert_close(detached[name], alone[name], atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    "trained", ["heads", "trunk", "unembedding", "embedding", "trunk unembedding", "heads unembedding", "nothing"]
)
def test_any_part_may_be_frozen(config: MTPConfig, trained: str) -> None:
    toy = Toy(config, tied=False)
    for name, parameter in toy.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in trained.split())
    assert_equals_naive(toy, *problem())


def test_one_frozen_head_gets_no_gradient(config: MTPConfig) -> None:
    toy = Toy(config, tied=False)
    toy.heads.heads[0].requires_grad_(False)
    assert_equals_naive(toy, *problem())


@pytest.mark.parametrize("n_heads", [1, 2, 3])
def test_targets_of_fewer_heads_leave_the_further_ones_out(config: MTPConfig, n_heads: int) -> None:
    toy = Toy(config, tied=False)
    tokens, targets, coefficients = problem(n_heads)
    calls = []
    for number, head in enumerate(toy.heads.heads):
        head.register_forward_hook(lambda *_, number=number: calls.append(number))
    _, losses = head_by_head(toy, tokens, targets, coefficients, 1.0)
    assert losses.shape == (B, T, n_heads)
    assert calls == ([0] * (n_heads - 1) if config.recursive else list(range(n_heads - 1)))
    padded = [F.pad(tensor, (0, 4 - n_heads)) for tensor in (targets, coefficients)]
    expected = gradients(toy, naive(toy, tokens, *padded, 1.0)[0])
    actual = gradients(toy, head_by_head(toy, tokens, targets, coefficients, 1.0)[0])
    assert_same(actual, {name: expected[name] for name in actual})
    assert all(not expected[name].any() for name in expected.keys() - actual.keys())


def test_without_any_target_the_loss_is_zero(config: MTPConfig) -> None:
    toy = Toy(config, tied=False)
    tokens, targets, coefficients = problem()
    for nothing in ((torch.full_like(targets, -100), coefficients), (targets, torch.zeros_like(coefficients))):
        total, losses = head_by_head(toy, tokens, *nothing, 1.0)
        assert total == 0
        assert not losses.any()
        assert not any(gradient.any() for gradient in gradients(toy, total).values())


def test_without_gradient_nothing_is_kept(config: MTPConfig) -> None:
    toy = Toy(config, tied=False)
    arguments = problem()
    with torch.no_grad():
        total, losses = head_by_head(toy, *arguments, 1.0)
    expected, expected_losses = naive(toy, *arguments, 1.0)
    assert not total.requires_grad
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(losses, expected_losses)


def test_a_second_backward_pass_is_refused(config: MTPConfig) -> None:
    toy = Toy(config, tied=False)
    total, _ = head_by_head(toy, *problem(), 1.0)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="is used up: compute the loss again"):
        total.backward()


def test_two_losses_of_one_trunk_add_up(config: MTPConfig) -> None:
    """Gradients are summed by autograd, not written over each other."""
    toy = Toy(config, tied=True)
    first, second = problem(), problem()
    expected = gradients(toy, naive(toy, *first, 1.0)[0] + 2 * naive(toy, *second, 1.0)[0])
    assert_same(gradients(toy, head_by_head(toy, *first, 1.0)[0] + 2 * head_by_head(toy, *second, 1.0)[0]), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "bf16-autocast"])
def test_half_precision_is_close_to_fp64(config: MTPConfig, autocast: bool) -> None:
    toy = Toy(config, tied=True)
    arguments = problem()
    expected, _ = naive(toy, *arguments, 1.0)
    expected_gradients = gradients(toy, expected)
    toy.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual, losses = head_by_head(toy, *arguments, 1.0)
    assert actual.dtype == losses.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=2e-2)
    for name, gradient in gradients(toy, actual).items():
        error = (gradient.double() - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error < 4e-2, name  # 8 significant bits, through three heads in turn


class Watch(TorchDispatchMode):
    """Rows that reach products with the vocabulary, and the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        if "mm" in func.overloadpacket.__name__ and out.shape[-1] == V:
            self.rows.append(out.shape[0])
        return out


def test_logits_of_one_chunk_exist_at_a_time(config: MTPConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 2 * V)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", 1)
    toy = Toy(config, tied=False)
    arguments = problem()
    with Watch() as watched:
        head_by_head(toy, *arguments, 1.0)[0].backward()
    # The unembedding's gradient, or what sequential heads concatenate; the logits of a single head would be 1221.
    assert watched.largest == (B * T * 2 * D if toy.heads.sequential else V * D)
    with Watch() as watched:
        naive(toy, *arguments, 1.0)
    assert watched.largest == B * T * 4 * V, "the watch sees the logits of all heads"


def test_targets_without_weight_reach_no_product(config: MTPConfig) -> None:
    toy = Toy(config, tied=False)
    tokens, targets, coefficients = problem()
    with Watch() as watched:
        head_by_head(toy, tokens, targets, coefficients, 1.0)
    kept = ((targets >= 0) & (coefficients != 0)).sum((0, 1)).tolist()
    assert sorted(watched.rows) == sorted(kept)
    assert sum(kept) < 0.7 * targets.numel()


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("name", ["transformer", "mlp", "shared_lm_head"])
def test_parallel_heads_hold_the_activations_of_one_head(name: str) -> None:
    toy = Toy(HEADS[name], tied=False)
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    before, behind = [], []
    for head in toy.heads.heads:
        head.register_forward_pre_hook(lambda *_: before.append(len(alive)))
        head.register_forward_hook(lambda *_: behind.append(len(alive)))

    def keep(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    tokens, targets, coefficients = problem()
    hidden, _ = toy.states(tokens)
    task = HeadTask(toy.heads, targets, coefficients, run)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        head_losses(hidden, None, toy.unembedding.weight, task)
    assert before == [before[0]] * 3
    assert behind == [behind[0]] * 3
    assert behind[0] > before[0]


@pytest.mark.parametrize("name", HEADS)
def test_heads_start_as_the_trunk(name: str) -> None:
    """Pointwise heads exactly; the others up to the scale of single tokens, which their own norm takes away."""
    toy = Toy(HEADS[name], tied=False)
    trunk_norm = Norm().double()
    with torch.no_grad():
        trunk_norm.weight.uniform_(2, 6)
        toy.heads.start_as_identity(trunk_norm)
        hidden = trunk_norm(torch.randn(B, 200, D, dtype=torch.float64))
        states = all_states(toy.heads, hidden, torch.randn_like(hidden), run)[..., 1:, :]
    for k in range(3):
        if toy.heads.pointwise:
            assert torch.equal(states[..., k, :], hidden)
        torch.testing.assert_close(F.normalize(states[..., k, :], dim=-1), F.normalize(hidden, dim=-1))
        assert states[..., k, :].square().mean() == pytest.approx(hidden.square().mean().item(), rel=0.05)


def test_every_head_learns_from_its_start(config: MTPConfig) -> None:
    """No map starts where its gradient vanishes for good: two steps move every parameter."""
    toy = Toy(config, tied=False)
    toy.heads.start_as_identity(Norm().double())
    before = {name: parameter.detach().clone() for name, parameter in toy.heads.named_parameters()}
    optimizer = torch.optim.SGD(toy.parameters(), 0.1)
    for _ in range(3):
        gradients(toy, head_by_head(toy, *problem(), 1.0)[0])
        optimizer.step()
    for name, parameter in toy.heads.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_shared_weights_are_one_module(config: MTPConfig) -> None:
    heads = heads_of(config)
    assert len(heads.heads) == (1 if config.recursive else 3)
    assert len(heads.blocks) == (0 if heads.pointwise else len(heads.heads))


def test_heads_have_no_parameters_besides_their_own() -> None:
    """Sizes: D² for the pointwise maps; a block and a norm; a projection of 2D, a block and three norms."""
    block, square = 2 * (D * D + D), D * D
    expected = {
        "transformer": 3 * (block + D),
        "mlp": 3 * square,
        "shared_lm_head": 3 * square,
        "sequential": 3 * (2 * square + block + 3 * D),
        "sequential-shared": 2 * square + block + 3 * D,
        "native": 2 * square + block + 3 * D,
    }
    counts: dict[str, int] = {}
    for name, config in HEADS.items():
        counts[name] = sum(p.numel() for p in heads_of(config).parameters())
    assert counts == expected


def test_positions_are_shifted_and_zero_beyond_the_row() -> None:
    x = torch.arange(1.0, 5).view(1, 4, 1)
    assert shifted(x, 1).flatten().tolist() == [2, 3, 4, 0]
    assert shifted(x, 9).flatten().tolist() == [0, 0, 0, 0]
