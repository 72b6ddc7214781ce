"""Heads that predict further tokens: aligned, without leaks, exact in packed and padded batches, and saved with the model."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import EXACT, FAMILIES, SPLIT, VOCAB, tiny
from recursive_heads import decoded_states
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments

import mull
from mull import MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.model.executor import run_layer
from mull.ops.targets import targets_of

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]
KINDS = {
    "transformer": MTPConfig(num_predict_tokens=3, mtp_head_type="transformer"),
    "mlp": MTPConfig(num_predict_tokens=3, mtp_head_type="mlp"),
    "shared_lm_head": MTPConfig(num_predict_tokens=3, mtp_head_type="shared_lm_head"),
    "sequential": MTPConfig(num_predict_tokens=3, mtp_head_type="sequential"),
    "sequential-shared": MTPConfig(num_predict_tokens=3, mtp_head_type="sequential", share_weights_across_steps=True),
    "native": MTPConfig(num_predict_tokens=3, mtp_head_type="native"),
    "native-stream": MTPConfig(num_predict_tokens=3, mtp_head_type="native", native_hidden_state="stream"),
}
EACH_FAMILY = [(family, kind) for family in FAMILIES for kind in ("transformer", "sequential", "native")] + [
    (family, kind)
    for family in ("qwen3-tied", "qwen3_5")
    for kind in ("mlp", "shared_lm_head", "sequential-shared", "native-stream")
]
"""Heads with layers of their own in every family; the others, which read states only, in one of each sort."""

LENGTHS = [[5, 1, 2, 8], [16], [7, 9]]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def with_heads(base: PreTrainedModel, kind: str) -> MullForCausalLM:
    """Heads with random weights: as they start, they ignore most of what they read."""
    model = wrap_transformer_with_etd(base, SPLIT, KINDS[kind])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.mtp_heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def document_logits(model: MullForCausalLM, tokens: Tensor) -> Tensor:
    """``[T, H, V]`` of one document alone, in one graph."""
    tokens = tokens[None]
    hidden = model.hidden_states(tokens, think_iterations=2)
    embedded = F.pad(model.model.embed_tokens(tokens), (0, 0, 0, 3))
    if model.mtp_config.recursive:
        return model.lm_head(torch.cat([hidden[:, :, None], decoded_states(model, hidden, embedded)], 2))[0]
    inputs = model.model.layer_inputs(hidden)
    states = [hidden]
    for k in range(1, 4):
        read = states[-1] if model.mtp_heads.sequential else hidden
        ahead = embedded[:, k : k + tokens.shape[1]]
        states.append(
            model.mtp_heads(k, read, ahead, lambda block, h, _k: run_layer(block, "full_attention", h, inputs, None))
        )
    return model.lm_head(torch.stack(states, 2))[0]


def naive_loss(model: MullForCausalLM, documents: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[float]]:
    """Weighted loss of the heads and the mean of each, from all logits of each document ``(tokens, labels)``, in loops."""
    losses: list[list[Tensor]] = [[], [], []]
    for tokens, labels in documents:
        log_p = document_logits(model, tokens).log_softmax(-1)
        for i in range(len(tokens)):
            for k in (1, 2, 3):
                if i + 1 + k < len(tokens) and labels[i + 1 + k] != -100:
                    losses[k - 1].append(-log_p[i, k, labels[i + 1 + k]])
    means = [torch.stack(values).mean() if values else torch.zeros(()) for values in losses]
    weights = [0.3 * 4 / 7, 0.3 * 2 / 7, 0.3 * 1 / 7]  # decay 0.5, normalised
    return sum(weight * mean for weight, mean in zip(weights, means, strict=True)), [mean.item() for mean in means]


def gradients(model: MullForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """A parameter that only the main loss needs, as the last head's targets end before it, may have zeros or nothing."""
    for name in actual.keys() | expected.keys():
        wanted = expected.get(name, torch.zeros_like(actual.get(name, torch.zeros(()))))
        # transformers computes decay and norms in fp32 whatever the model's precision.
        tolerance = max(5e-6 * wanted.abs().max().item(), 1e-8)
        got = actual.get(name, torch.zeros_like(wanted))
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0, msg=f"gradient of {name}")


def labelled(ids: Ids, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which a quarter is ignored."""
    tokens = ids(rows, length)
    ignored = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.25
    return tokens, tokens.masked_fill(ignored, -100)


@pytest.mark.parametrize(("family_name", "kind"), EACH_FAMILY)
@pytest.mark.latin(6, "family_name", "kind")
def test_packed_documents_are_separate_ones_aligned_by_hand(
    family_name: str, kind: str, exact: Exact, ids: Ids
) -> None:
    """Documents of 1 and 2 tokens have no target for any head; one of 5 has none for the last at most positions."""
    model = with_heads(exact(family_name), kind)
    tokens, labels = labelled(ids, 3, 16)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    parts = [
        (tokens[row, start : start + length], labels[row, start : start + length])
        for row, lengths in enumerate(LENGTHS)
        for start, length in zip([sum(lengths[:n]) for n in range(len(lengths))], lengths, strict=True)
    ]
    expected, means = naive_loss(model, iter(parts))
    expected_gradients = gradients(model, expected)
    out = model(tokens, position_ids=positions, labels=labels, think_iterations=2)
    torch.testing.assert_close(out.mtp_loss, expected.detach(), atol=EXACT, rtol=0, check_dtype=False)
    assert [loss.item() for loss in out.mtp_step_losses.values()] == pytest.approx(means, abs=EXACT)
    assert list(out.mtp_step_losses) == ["mtp_1", "mtp_2", "mtp_3"]
    assert not any(loss.requires_grad for loss in out.mtp_step_losses.values())
    assert_same(gradients(model, out.mtp_loss), expected_gradients)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family_name", ["qwen3-tied", "olmo3", "qwen3_5"])
@pytest.mark.parametrize("kind", ["transformer", "mlp", "sequential", "sequential-shared", "native", "native-stream"])
@pytest.mark.latin(8, "side", "kind", "family_name")
def test_padded_rows_are_unpadded_ones(family_name: str, kind: str, side: str, exact: Exact, ids: Ids) -> None:
    model = with_heads(exact(family_name), kind)
    tokens, labels = labelled(ids, 2, 12)
    n_padding = [5, 0]
    rows, mask = [], torch.ones(2, 12, dtype=torch.int64)
    for row, n in enumerate(n_padding):
        padding, real = (slice(0, n), slice(n, 12)) if side == "left" else (slice(12 - n, 12), slice(0, 12 - n))
        mask[row, padding] = 0
        rows.append((tokens[row, real], labels[row, real]))
    expected, means = naive_loss(model, iter(rows))
    expected_gradients = gradients(model, expected)
    # Labels at padding are no targets even where someone forgot to ignore them.
    out = model(tokens, attention_mask=mask, labels=torch.where(mask == 1, labels, 5), think_iterations=2)
    assert [loss.item() for loss in out.mtp_step_losses.values()] == pytest.approx(means, abs=EXACT)
    torch.testing.assert_close(out.mtp_loss, expected.detach(), atol=EXACT, rtol=0)
    assert_same(gradients(model, out.mtp_loss), expected_gradients)


@torch.no_grad()
@pytest.mark.parametrize(("family_name", "kind"), EACH_FAMILY)
@pytest.mark.latin(4, "family_name", "kind")
def test_no_head_sees_what_it_predicts(family_name: str, kind: str, exact: Exact, ids: Ids) -> None:
    """Head k at i reads tokens up to i, and up to i + k where it is sequential. Row j + 1 of the batch has another token at j."""
    model = with_heads(exact(family_name), kind)
    length = 9
    tokens = ids(1, length).expand(length + 1, -1).clone()
    for j in range(length):
        tokens[j + 1, j] = (tokens[j + 1, j] - 3 + 11) % (VOCAB - 3) + 3
    targets = torch.randint(VOCAB, (1, length, 4)).expand(length + 1, -1, -1)
    hidden = model.hidden_states(tokens, think_iterations=2)
    _, losses = model.head_losses(hidden, tokens, targets, torch.ones(targets.shape, dtype=torch.float64))
    changed = (losses[1:] - losses[0]).abs() > EXACT  # (j, i, k)
    reach = torch.arange(4) if model.mtp_heads.sequential else torch.zeros(4, dtype=torch.int64)
    last_read = torch.arange(length)[:, None] + reach  # (i, k)
    assert not changed[torch.arange(length)[:, None, None] > last_read].any(), "a head sees further than it may"
    for i, k in torch.cartesian_prod(torch.arange(length), torch.arange(4)):
        if last_read[i, k] < length:
            assert changed[last_read[i, k], i, k], "a head does not read the last token that it may"


def test_the_loss_without_the_heads_is_the_next_token_loss(family: str, exact: Exact, ids: Ids) -> None:
    base = exact(family)
    tokens, labels = labelled(ids, 2, 12)
    expected = base(tokens, labels=labels).loss
    out = with_heads(base, "transformer")(tokens, labels=labels, think_iterations=1)
    assert expected.dtype == torch.float32, "transformers' loss is fp32 whatever the model"
    torch.testing.assert_close((out.loss - out.mtp_loss).float(), expected, atol=0, rtol=1e-7)
    assert out.mtp_loss > 0


def test_the_divisor_of_a_whole_step_divides_every_head(ids: Ids) -> None:
    """As transformers' Trainer passes it: then the gradient of a step is the sum over its micro-batches."""
    model = with_heads(tiny("qwen3", dtype=torch.float64), "mlp")
    tokens, labels = labelled(ids, 4, 12)
    whole = model(tokens, labels=labels, num_items_in_batch=30)
    parts = [model(tokens[rows], labels=labels[rows], num_items_in_batch=torch.tensor(30)) for rows in ([0], [1, 2, 3])]
    assert sum(part.mtp_loss.item() for part in parts) == pytest.approx(whole.mtp_loss.item(), abs=1e-12)
    counts = [sum(int((row[1 + k :] != -100).sum()) for row in labels) for k in (1, 2, 3)]
    sums = [count * loss.item() / 30 for count, loss in zip(counts, whole.mtp_step_losses.values(), strict=True)]
    expected = sum(0.3 * weight / 7 * value for weight, value in zip((4, 2, 1), sums, strict=True))
    assert whole.mtp_loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.latin(4)
def test_rows_that_are_too_short_for_a_head_give_it_no_loss(length: int, kind: str, ids: Ids) -> None:
    model = with_heads(tiny("qwen3"), kind)
    tokens = ids(2, length)
    out = model(tokens, labels=tokens, num_items_in_batch=7)
    for k, loss in enumerate(out.mtp_step_losses.values(), start=1):
        assert bool(loss > 0) == (length >= k + 2)
    out.loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_row_without_any_label_changes_nothing(kind: str, exact: Exact, ids: Ids) -> None:
    model = with_heads(exact("qwen3"), kind)
    tokens, labels = labelled(ids, 2, 12)
    expected = model(tokens[:1], labels=labels[:1])
    labels[1] = -100
    out = model(tokens, labels=labels)
    torch.testing.assert_close(out.mtp_loss, expected.mtp_loss, atol=EXACT, rtol=0)
    torch.testing.assert_close(out.loss, expected.loss, atol=EXACT, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("family_name", "kind"), EACH_FAMILY)
@pytest.mark.latin(4, "family_name", "kind")
def test_fresh_heads_change_no_logit_and_predict_what_the_trunk_predicts(family_name: str, kind: str, ids: Ids) -> None:
    base = tiny(family_name)
    for parameter in base.model.norm.parameters():
        parameter.uniform_(2, 6)  # far from the 1 that norms are initialised with, as in released models
    tokens = ids(2, 12)
    expected = base(tokens, use_cache=False).logits
    model = wrap_transformer_with_etd(base, SPLIT, KINDS[kind])
    assert torch.equal(model(tokens, think_iterations=1, use_cache=False).logits, expected)
    targets = torch.randint(VOCAB, (2, 12, 1)).expand(-1, -1, 4)
    hidden = model.hidden_states(tokens, think_iterations=1)
    _, losses = model.head_losses(hidden, tokens, targets, torch.ones(targets.shape))
    if model.mtp_heads.pointwise:
        assert torch.equal(losses, losses[..., :1].expand_as(losses))
    elif kind == "native-stream":  # whose norm repeats the trunk's, in every step
        torch.testing.assert_close(losses[..., 1], losses[..., 0], atol=1e-3, rtol=1e-3)
    else:
        # The scale of a state varies from token to token by a few percent, which its norm takes away; logits are large here.
        difference = losses[..., 1:] - losses[..., :1]
        assert difference.abs().mean() < 0.25 * losses.std()
    for block in model.mtp_heads.blocks:
        inputs = model.model.layer_inputs(hidden)
        assert torch.equal(run_layer(block, "full_attention", hidden, inputs, None), hidden)
    assert len(model.mtp_heads.blocks) == (0 if model.mtp_heads.pointwise else len(model.mtp_heads.heads))


@pytest.mark.parametrize("kind_name", ["transformer", "sequential", "native"])
@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.latin(3, "family_name", "kind_name")
def test_no_gradient_of_a_fresh_head_dwarfs_the_others(family_name: str, kind_name: str, ids: Ids) -> None:
    """A zero map in front of a norm would have a gradient of 1 / sqrt(eps): clipping then stops the rest of the model."""
    model = wrap_transformer_with_etd(tiny(family_name), SPLIT, KINDS[kind_name])
    norms = {
        name: gradient.norm() for name, gradient in gradients(model, model(ids(2, 12), labels=ids(2, 12)).loss).items()
    }
    largest = {part: max(norm for name, norm in norms.items() if ("mtp" in name) == part) for part in (False, True)}
    assert 0 < largest[True] < largest[False]


EACH_KIND_AND_FAMILY = [("qwen3-tied", kind) for kind in KINDS] + [
    (name, kind)
    for name in ("llama", "olmo3", "qwen3_next-moe", "qwen3_5", "olmo_hybrid")
    for kind in ("sequential", "native")
]


@pytest.mark.parametrize(("family_name", "kind"), EACH_KIND_AND_FAMILY)
@pytest.mark.latin(4, "family_name", "kind")
def test_heads_are_saved_and_loaded_with_the_model(family_name: str, kind: str, tmp_path: Path, ids: Ids) -> None:
    model = with_heads(tiny(family_name), kind)
    tokens = ids(2, 12)
    model.save_pretrained(tmp_path)
    for loaded in (mull.from_pretrained(str(tmp_path)), MullForCausalLM.from_pretrained(tmp_path)):
        assert loaded.mtp_config == KINDS[kind]
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        with torch.no_grad():
            assert torch.equal(loaded(tokens, labels=tokens).loss, model(tokens, labels=tokens).loss)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family_name", "kind", "source"),
    # A base checkpoint without native heads is refused: see test_native.py.
    [(*each, "base") for each in EACH_KIND_AND_FAMILY if "native" not in each[1]]
    + [(*each, "mull") for each in EACH_KIND_AND_FAMILY],
)
@pytest.mark.latin(4, "kind", "source")
def test_heads_that_a_checkpoint_lacks_start_as_the_trunk(
    family_name: str, kind: str, source: str, tmp_path: Path, ids: Ids
) -> None:
    base = tiny(family_name)
    base.model.norm.weight.uniform_(2, 6)
    expected = wrap_transformer_with_etd(base, SPLIT, KINDS[kind])
    (base if source == "base" else wrap_transformer_with_etd(base, SPLIT)).save_pretrained(tmp_path)
    loaded = mull.from_pretrained(str(tmp_path), etd=SPLIT, mtp=KINDS[kind])
    tokens = ids(2, 12)
    actual, wanted = loaded(tokens, labels=tokens), expected(tokens, labels=tokens)
    assert loaded.mtp_heads.state_dict().keys() == expected.mtp_heads.state_dict().keys()
    # Random in both, but without effect: what the silent block is made of.
    torch.testing.assert_close(actual.loss, wanted.loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(actual.mtp_loss, wanted.mtp_loss, atol=1e-6, rtol=0)


@torch.no_grad()
def test_trained_heads_stay_where_more_are_asked_for(kind: str, tmp_path: Path) -> None:
    model = with_heads(tiny("qwen3"), kind)
    model.save_pretrained(tmp_path)
    more = KINDS[kind].model_copy(update={"num_predict_tokens": 5})
    loaded = mull.from_pretrained(str(tmp_path), mtp=more)
    stored = model.mtp_heads.state_dict()
    assert loaded.mtp_config == more
    for name, value in loaded.mtp_heads.state_dict().items():
        assert name not in stored or torch.equal(value, stored[name]), name
        assert value.isfinite().all()


def test_heads_of_another_type_are_no_start(tmp_path: Path) -> None:
    """The maps of mlp and shared_lm_head have one name and shape, and mean different things."""
    with_heads(tiny("qwen3"), "mlp").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has heads of type mlp, which cannot be loaded as type shared_lm_head"):
        mull.from_pretrained(str(tmp_path), mtp=KINDS["shared_lm_head"])


@torch.no_grad()
def test_a_copy_has_heads_of_its_own(kind: str, ids: Ids) -> None:
    model = with_heads(tiny("qwen3"), kind)
    tokens = ids(2, 12)
    before = model(tokens, labels=tokens).mtp_loss
    other = copy.deepcopy(model)
    assert torch.equal(other(tokens, labels=tokens).mtp_loss, before)
    for parameter in other.mtp_heads.parameters():
        parameter.mul_(3)
    assert torch.equal(model(tokens, labels=tokens).mtp_loss, before)
    assert not torch.equal(other(tokens, labels=tokens).mtp_loss, before)


@torch.no_grad()
@pytest.mark.parametrize("family_name", ["qwen3", "qwen3_5"])
@pytest.mark.latin(3)
def test_generation_is_that_of_the_trunk(family_name: str, kind: str, ids: Ids) -> None:
    base = tiny(family_name)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = base.generate(ids(2, 8), **options)
    assert torch.equal(with_heads(base, kind).generate(ids(2, 8), think_iterations=1, **options), expected)


def test_labels_cannot_continue_from_a_cache(ids: Ids) -> None:
    model = with_heads(tiny("qwen3"), "transformer")
    cache = model(ids(1, 5)).past_key_values
    with pytest.raises(ValueError, match="their loss cannot continue from a cache"):
        model(ids(1, 5), past_key_values=cache, labels=ids(1, 5))


def test_sequential_heads_need_tokens_and_the_others_do_not(kind: str, ids: Ids) -> None:
    model = with_heads(tiny("qwen3"), kind)
    tokens = ids(2, 12)
    embeds = model.model.embed_tokens(tokens)
    if model.mtp_heads.sequential:
        with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
            model(inputs_embeds=embeds, labels=tokens)
    else:
        assert torch.equal(model(inputs_embeds=embeds, labels=tokens).mtp_loss, model(tokens, labels=tokens).mtp_loss)


def test_targets_for_heads_that_are_not_there_are_refused(ids: Ids) -> None:
    model = with_heads(tiny("qwen3"), "mlp")
    tokens = ids(2, 12)
    targets = targets_of(tokens, None, 5)
    hidden = model.hidden_states(tokens)
    with pytest.raises(ValueError, match=r"targets for 5 heads, .* the model has 4: .*num_predict_tokens=4"):
        model.head_losses(hidden, tokens, targets, torch.ones(targets.shape))


@pytest.mark.parametrize(("family_name", "use_reentrant"), [("qwen3", True), ("qwen3", False), ("qwen3_5", False)])
@pytest.mark.latin(4, "family_name", "use_reentrant", "kind")
def test_checkpointing_changes_no_gradient_of_the_heads(
    family_name: str, use_reentrant: bool, kind: str, exact: Exact, ids: Ids
) -> None:
    model = with_heads(exact(family_name), kind).train()
    tokens = ids(2, 12)
    options = {"labels": tokens, "think_iterations": 2, "use_cache": False}
    expected = gradients(model, model(tokens, **options).loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = []
    for block in model.mtp_heads.blocks:
        block.mlp.register_forward_pre_hook(lambda *_: recomputed.append(1))
    actual = gradients(model, model(tokens, **options).loss)
    assert len(recomputed) == (0 if model.mtp_heads.pointwise else 6), "three heads, each computed once more"
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.latin(3)
def test_half_precision_models_train(dtype: torch.dtype, kind: str, ids: Ids) -> None:
    model = with_heads(tiny("qwen3"), kind)
    tokens = ids(2, 12)
    expected = model(tokens, labels=tokens)
    out = model.to(dtype)(tokens, labels=tokens)
    assert out.loss.dtype == out.mtp_loss.dtype == torch.float32
    assert out.mtp_loss.item() == pytest.approx(expected.mtp_loss.item(), rel=3e-2)
    for name, gradient in gradients(model, out.loss).items():
        assert gradient.dtype == dtype
        assert gradient.isfinite().all(), name


def test_autocast_gradients_are_close(kind: str, ids: Ids) -> None:
    model = with_heads(tiny("qwen3", hidden_size=64), kind)
    tokens = ids(2, 12)
    expected = gradients(model, model(tokens, labels=tokens).mtp_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens).mtp_loss
    for name, gradient in gradients(model, loss).items():
        assert gradient.dtype == torch.float32
        if "mtp" in name or "lm_head" in name:
            cosine = F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
            assert cosine > 0.99, name


def test_a_pass_without_gradient_under_the_same_autocast_leaves_the_heads_trainable(kind: str, ids: Ids) -> None:
    """Autocast caches its copies of the weights, and one that was made without gradient must not serve the training step."""
    model = with_heads(tiny("qwen3"), kind)
    tokens = ids(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            model(tokens, labels=tokens)
        found = gradients(model, model(tokens, labels=tokens).loss)
    assert all(found[name].any() for name, _ in model.named_parameters() if "mtp" in name)


def test_a_frozen_trunk_trains_heads_only(kind: str, ids: Ids) -> None:
    model = with_heads(tiny("qwen3-tied"), kind).requires_grad_(False).train()
    model.mtp_heads.requires_grad_(True)
    heads = {name for name, _ in model.named_parameters() if name.startswith("mtp")}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == heads
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    tokens = ids(2, 12)
    for _ in range(3):
        found = gradients(model, model(tokens, labels=tokens).loss)
        assert found.keys() == heads
        assert all(gradient.any() for gradient in found.values())
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("mtp"), name


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["transformer", "mlp", "sequential-shared"])
@pytest.mark.latin(3)
def test_trainer_of_transformers_accumulates_exactly_with_heads(kind: str, tmp_path: Path, ids: Ids) -> None:
    """Two steps of two micro-batches are two steps of whole batches, and evaluation reports a loss."""
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids(4, 13)]
    for row, n_targets in zip(rows, (12, 3, 7, 1), strict=True):
        row["labels"][: 13 - n_targets] = -100
    trained = []
    for size, accumulate in ((4, 1), (2, 2)):
        model = with_heads(tiny("qwen3"), kind)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=size,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=accumulate,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        trained.append({name: value.clone() for name, value in model.state_dict().items()})
    start = with_heads(tiny("qwen3"), kind).state_dict()
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, atol=1e-5, rtol=0, msg=name)
    assert not torch.equal(trained[0]["mtp_heads.heads.0" + _first(kind)], start["mtp_heads.heads.0" + _first(kind)])


def _first(kind: str) -> str:
    return ".block.mlp.down_proj.weight" if kind == "transformer" else ".proj.weight"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["transformer", "mlp", "sequential-shared", "native"])
@pytest.mark.parametrize("train_heads", [False, True], ids=["frozen-heads", "trained-heads"])
@pytest.mark.latin(4, "kind", "train_heads")
def test_lora_of_peft_adapts_the_backbone_beside_heads(train_heads: bool, kind: str, tmp_path: Path, ids: Ids) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra eval")
    tokens = ids(2, 12)
    attribute = "mtp" if kind == "native" else "mtp_heads"
    config = peft.LoraConfig(
        r=4,
        target_modules=r"model\.layers\.\d+\.self_attn\.[qv]_proj",
        task_type="CAUSAL_LM",
        modules_to_save=[attribute] if train_heads else None,
    )
    adapted = peft.get_peft_model(with_heads(tiny("qwen3"), kind), config).train()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("mtp" in name for name in trained) == train_heads
    assert all("lora_" in name or f"{attribute}.modules_to_save" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        out = adapted(input_ids=tokens, labels=tokens)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((out.loss.item(), out.mtp_loss.item()))
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(with_heads(tiny("qwen3"), kind), tmp_path).eval()
    with torch.no_grad():
        expected = adapted(input_ids=tokens, labels=tokens)
        actual = loaded(input_ids=tokens, labels=tokens)
        assert torch.equal(actual.loss, expected.loss)
        assert torch.equal(actual.mtp_loss, expected.mtp_loss)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(tokens, labels=tokens).mtp_loss, expected.mtp_loss, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer"])
def test_a_model_with_heads_compiles_into_one_graph(kind: str, ids: Ids) -> None:
    model = with_heads(tiny("qwen3"), kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids(2, 12), think_iterations=2, use_cache=False).logits
        actual = compiled(ids(2, 12), think_iterations=2, use_cache=False).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
