"""Claim: token skipping takes the same decisions, and the model computes the same, however the tokens are divided into calls.

For each method, in use: decisions look at nothing but the token and what came before it. In training: they are hard, everything
learns, and the ranks of Mixture-of-Depths are those of each sequence. All in fp64.
"""

import copy
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EXACT, FAMILIES, SPLIT, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import mull
from mull import (
    ETDConfig,
    HaltingConfig,
    MTPConfig,
    MullForCausalLM,
    TokenSkipConfig,
    wrap_transformer_with_etd,
)
from mull.layers.skipping import highest, quantile
from mull.model.executor import run
from mull.model.path import Visit
from mull.model.policy import GivenTokens
from mull.model.token_skip import NO_THRESHOLD, Calibrated, TokenSkips
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.step import Stage

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]

ROWS, TOKENS, ITERATIONS = 3, 12, 2
METHODS = ["mod", "gate-skip", "a-mod"]
LEARNED = ["mod", "gate-skip"]
STOPS = ["last_kv", "own_state", "active_only"]


def eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """That of transformers, which computes its softmax in fp32, where a masked row of fp64 becomes NaN."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), weights


@pytest.fixture(autouse=True)
def _eager_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    for model_type in dict.fromkeys(model_type for model_type, _ in FAMILIES.values()):
        folder = model_type.removesuffix("_text")
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        monkeypatch.setattr(modeling, "eager_attention_forward", eager_attention)


def parts_of(model: MullForCausalLM) -> TokenSkips:
    assert model.etd is not None
    assert model.etd.token_skip is not None
    return model.etd.token_skip


def randomise(model: MullForCausalLM, scale: float = 1.0) -> MullForCausalLM:
    """Decisions at random, as of a trained model."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in parts_of(model).named_parameters():
        if name.startswith("predictors") and name.endswith("out.bias"):
            nn.init.zeros_(parameter)
        elif name.startswith("predictors") and "inner" in name:
            continue
        else:
            nn.init.normal_(parameter, std=scale, generator=generator)
    parts = parts_of(model)
    if isinstance(parts, Calibrated):
        parts.thresholds.fill_(0.999)
    return model


def skipping(
    base: PreTrainedModel,
    method: Any = "mod",
    mtp: MTPConfig | None = None,
    *,
    adaptive: bool = False,
    scale: float = 1.0,
    warmup: int = 0,
    **fields: Any,
) -> MullForCausalLM:
    changes: dict[str, Any] = {
        "token_skip": TokenSkipConfig(**{"method": method, "hidden_size": 8} | fields),
        "max_think_iterations": ITERATIONS,
    }
    if adaptive:
        changes["halting"] = HaltingConfig(rule="state", threshold=0.9, stop=fields.get("stop") or "active_only")
    if method == "a-mod":
        base.set_attn_implementation("eager")
    model = wrap_transformer_with_etd(base, ETDConfig(**SPLIT.model_dump() | changes), mtp).eval()
    parts_of(model).warmup_steps = warmup
    return randomise(model, scale)


def executed(out: Any) -> Tensor:
    """``[decisions, B, T]``."""
    return torch.stack(out.metrics["token_skip_executed"])


def mixed(runs: Tensor) -> bool:
    return 0.1 < float(runs.double().mean()) < 0.9


def in_calls(model: MullForCausalLM, tokens: Tensor, lengths: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    cache, start, logits, runs = model.new_cache(), 0, [], []
    for length in lengths:
        out = model(tokens[:, start : start + length], past_key_values=cache, use_cache=True, **options)
        logits.append(out.logits)
        runs.append(executed(out))
        start += length
    return torch.cat(logits, 1), torch.cat(runs, 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["think", "all"])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.latin(48, "family", "method", "scope", "stop", "adaptive")
@torch.no_grad()
def test_tokens_skip_the_same_in_one_call_and_in_many(
    family: str, method: str, scope: Any, stop: Any, adaptive: bool, exact: Exact, ids: Ids
) -> None:
    model = skipping(exact(family), method, scope=scope, stop=stop, adaptive=adaptive)
    tokens = ids(ROWS, TOKENS)
    whole = model(tokens, use_cache=False, adaptive=adaptive)
    assert mixed(executed(whole))
    for lengths in ([1] * TOKENS, [5, 1, 6], [TOKENS]):
        logits, runs = in_calls(model, tokens, lengths, adaptive=adaptive)
        assert torch.equal(runs, executed(whole))
        torch.testing.assert_close(logits, whole.logits, atol=EXACT, rtol=0)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 97
    again = model(changed, use_cache=False, adaptive=adaptive)
    assert torch.equal(executed(again)[..., :7], executed(whole)[..., :7]), "later tokens decide nothing"
    torch.testing.assert_close(again.logits[:, :7], whole.logits[:, :7], atol=EXACT, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "packed"])
@pytest.mark.latin(27, "family", "method", "training", "side")
@torch.no_grad()
def test_padding_other_rows_and_other_documents_decide_nothing(
    family: str, method: str, training: bool, side: str, exact: Exact, ids: Ids
) -> None:
    model, tokens, padding = skipping(exact(family), method).train(training), ids(ROWS, TOKENS), 5
    filling = ids(ROWS, padding, seed=7)
    real = slice(0, TOKENS) if side == "right" else slice(padding, None)
    padded = torch.cat([tokens, filling] if side == "right" else [filling, tokens], 1)
    options: dict[str, Any] = {}
    if side == "packed":
        options["position_ids"] = torch.cat([torch.arange(padding), torch.arange(TOKENS)]).expand(ROWS, -1)
    else:
        options["attention_mask"] = torch.zeros_like(padded)
        options["attention_mask"][:, real] = 1
        options["position_ids"] = (options["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out = model(padded, use_cache=False, **options)
    for row in range(ROWS):
        alone = model(tokens[row : row + 1], use_cache=False)
        assert torch.equal(executed(out)[:, row, real], executed(alone)[:, 0])
        torch.testing.assert_close(out.logits[row, real], alone.logits[0], atol=EXACT, rtol=0)
    if side != "packed":
        padding_runs = executed(out).clone()
        padding_runs[..., real] = False
        assert not padding_runs.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("draft_length", [None, 0, 2])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.latin(41, "family", "method", "draft_length", "adaptive")
@torch.no_grad()
def test_both_generators_write_the_same_text_with_and_without_drafts(
    family: str, method: str, draft_length: int | None, adaptive: bool, exact: Exact, ids: Ids
) -> None:
    mtp = MTPConfig(num_predict_tokens=2, mtp_head_type="sequential")
    model = skipping(exact(family), method, mtp, adaptive=adaptive)
    tokens, options = ids(2, 6), {"max_new_tokens": 8, "eos_token_id": ()}
    expected = model.generate(tokens, do_sample=False, max_new_tokens=8, eos_token_id=None, adaptive=adaptive)
    draft = None if draft_length is None else "mtp"
    found = mull.generate(model, tokens, draft=draft, draft_length=draft_length, adaptive=adaptive, **options)
    assert torch.equal(found.sequences, expected)
    assert not torch.equal(found.sequences, mull.generate(model, tokens, path=SPLIT.path(1), **options).sequences)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family_name", ["qwen3", "qwen3_5"])
@pytest.mark.latin(2)
@torch.no_grad()
def test_decisions_stay_with_their_rows(family_name: str, method: str, exact: Exact, ids: Ids) -> None:
    model, tokens = skipping(exact(family_name), method), ids(ROWS, TOKENS)
    cache = model.new_cache()
    cache.activate_past_recording()
    model(tokens[:, :8], past_key_values=cache)
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    model(tokens[order, 8:11], past_key_values=cache)
    cache.crop(-2)
    cache.batch_select_indices(torch.tensor([0, 1]))
    out = model(tokens[order[:2], 9:], past_key_values=cache)
    expected = model(tokens, use_cache=False)
    torch.testing.assert_close(out.logits, expected.logits[order[:2], 9:], atol=EXACT, rtol=0)


class Given(GivenTokens):
    """The masks, and the gates of each layer written out."""

    def __init__(self, masks: dict[Visit, Tensor | bool], gates: Any) -> None:
        super().__init__(masks, "active_only")
        self._gates = gates

    def weigh(self, visit: Visit, before: Tensor, after: Tensor) -> Tensor:
        if self._gates is None or str(visit.layer) not in self._gates:
            return after
        linear = self._gates[str(visit.layer)].map
        return before.lerp(after, 2 * linear(before / (before.square().mean(-1, keepdim=True)).sqrt()).sigmoid())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.latin(16, "family", "method", "training")
@torch.no_grad()
def test_tokens_that_are_chosen_run_the_layer(family: str, method: str, training: bool, exact: Exact, ids: Ids) -> None:
    """What the executor makes of the same masks: bit for bit where there are no gates."""
    model, tokens = skipping(exact(family), method).train(training), ids(ROWS, TOKENS)
    out = model(tokens, use_cache=False)
    path = model.path()
    routed = [visit for visit in path if visit.layer in parts_of(model).numbers]
    masks: dict[Visit, Tensor | bool] = dict(zip(routed, executed(out), strict=True))
    h = model.model.embed_tokens(tokens)
    policy = Given(masks, getattr(parts_of(model), "gates", None))
    states = run(model.model.layers, model.kinds, path, h, model.model.layer_inputs(h), policy=policy)
    expected = model.lm_head(model.model.norm(states))
    tolerance = EXACT if method == "gate-skip" else 0.0
    torch.testing.assert_close(out.logits, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.latin(10)
@torch.no_grad()
def test_new_token_skipping_changes_nothing(family: str, method: str, exact: Exact, ids: Ids) -> None:
    base, tokens = exact(family), ids(ROWS, TOKENS)
    if method == "a-mod":
        base.set_attn_implementation("eager")
    skip = TokenSkipConfig(method=method, scope="all")  # type: ignore[arg-type]
    model = wrap_transformer_with_etd(base, ETDConfig(**SPLIT.model_dump() | {"token_skip": skip})).eval()
    plain = wrap_transformer_with_etd(base, SPLIT).eval()
    for training in (False, True):
        model.train(training)
        for iterations in (1, 3):
            found, expected = (each(tokens, think_iterations=iterations) for each in (model, plain))
            assert torch.equal(found.logits, expected.logits)
            assert executed(found).all()


def trained_loss(model: MullForCausalLM, tokens: Tensor) -> Tensor:
    loss = model(tokens, labels=tokens, use_cache=False).loss
    assert loss is not None
    return loss


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("warmup", [0, 1000])
@pytest.mark.latin(16, "family", "method", "warmup")
def test_everything_learns_with_and_without_checkpointing(
    family: str, method: str, warmup: int, exact: Exact, ids: Ids
) -> None:
    model, tokens = skipping(exact(family), method, warmup=warmup).train(), ids(ROWS, TOKENS)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        trained_loss(model, tokens).backward()  # type: ignore[no-untyped-call]
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, parameter in parts_of(model).named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, atol=EXACT, rtol=1e-6)


@torch.no_grad()
def test_the_highest_of_each_sequence_are_chosen(ids: Ids) -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 9.0, 8.0], [0.0, 0.0, 0.0, 5.0, 5.0, 1.0]])
    numbers = torch.tensor([[0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 2, 2]])
    counted = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1]]).bool()
    expected = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1]]).bool()
    assert torch.equal(highest(scores, numbers, counted, 0.5), expected)
    assert torch.equal(highest(scores, numbers, counted, 1.0), counted)
    ties = torch.zeros(1, 30)
    chosen = highest(ties, torch.zeros(1, 30, dtype=torch.long), torch.ones(1, 30, dtype=torch.bool), 0.1)
    assert torch.equal(chosen, torch.arange(30)[None] < 3)
    values = torch.tensor([4.0, 1.0, 3.0, 2.0])
    for share, threshold in ((1.0, 1.0), (0.75, 2.0), (0.5, 3.0), (0.26, 3.0), (0.25, 4.0), (0.01, 4.0)):
        assert float(quantile(values, share)) == threshold


@pytest.mark.parametrize("score", ["self", "received"])
@torch.no_grad()
def test_attention_scores_are_those_of_the_map_before(score: Any, exact: Exact, ids: Ids) -> None:
    """Against the maps that transformers returns."""
    base, tokens = exact("olmo3"), ids(ROWS, TOKENS)  # its windows of 6 tokens hide keys
    model = skipping(base, "a-mod", score=score, scope="all", capacity=0.3)
    out = model(tokens, use_cache=False, think_iterations=1)
    maps = base(tokens, output_attentions=True).attentions
    assert parts_of(model).numbers == (1, 3, 5, 7)
    weights = maps[0].mean(1)
    if score == "received":
        chosen = weights.sum(1).argsort(descending=True)[:, : math.ceil(0.3 * TOKENS)]
        expected = torch.zeros(ROWS, TOKENS, dtype=torch.bool).scatter(1, chosen, True)
    else:
        seen = torch.arange(1, TOKENS + 1).clamp(max=6)
        expected = weights.diagonal(dim1=1, dim2=2) * seen >= 0.999
    assert torch.equal(executed(out)[0], expected)
    assert mixed(expected)


def test_what_a_method_cannot_do_is_refused(exact: Exact, ids: Ids) -> None:
    tokens = ids(1, 6)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        wrap_transformer_with_etd(
            exact("qwen3"), SPLIT.model_copy(update={"token_skip": TokenSkipConfig(method="a-mod")})
        )
    model = skipping(exact("qwen3"), "a-mod", score="received")
    with pytest.raises(ValueError, match="score='self'"):
        model.generate(tokens, max_new_tokens=2, do_sample=False)
    with pytest.raises(ValueError, match="score='self'"):
        mull.generate(model, tokens, max_new_tokens=2)
    with pytest.raises(ValueError, match="score='self'"):
        model(tokens, use_cache=False, adaptive=True)
    with pytest.raises(ValueError, match="compile"):
        mull.generate(skipping(exact("qwen3")), tokens, max_new_tokens=2, compile=True)
    with pytest.raises(ValueError, match="needs method='a-mod'"):
        TokenSkipConfig(score="received")
    with pytest.raises(ValueError, match="every=2"):
        TokenSkipConfig(method="a-mod", every=1)
    for changes, words in (
        ({"token_skip": {"every": 5}}, "no layer out of 4"),
        ({"token_skip": {}, "layer_router": {}}, "give one of them"),
        ({"token_skip": {"stop": "last_kv"}, "halting": {"stop": "own_state"}}, "token_skip.stop"),
    ):
        with pytest.raises(ValueError, match=words):
            ETDConfig.model_validate(SPLIT.model_dump() | changes)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_all_tokens_run_a_path_that_is_given(method: str, exact: Exact, ids: Ids) -> None:
    model, tokens, path = skipping(exact("qwen3"), method), ids(ROWS, TOKENS), SPLIT.path(2)
    found = model(tokens, path=path).logits
    assert not torch.equal(model(tokens).logits, found)
    h = model.model.embed_tokens(tokens)
    policy = Given({}, getattr(parts_of(model), "gates", None))
    states = run(model.model.layers, model.kinds, path, h, model.model.layer_inputs(h), policy=policy)
    torch.testing.assert_close(found, model.lm_head(model.model.norm(states)), atol=EXACT, rtol=0)


@pytest.mark.parametrize("method", LEARNED)
def test_the_loss_has_its_terms_whoever_trains(method: str, exact: Exact, ids: Ids) -> None:
    model, tokens = skipping(exact("qwen3"), method, loss_weight=0.5).train(), ids(ROWS, TOKENS)
    out = model(tokens, labels=tokens)
    assert out.loss is not None
    assert out.token_skip_loss is not None
    predicted = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, predicted + out.token_skip_loss)
    out.loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    objective = NextToken(IterationSampling(maximum=ITERATIONS))
    stage = Stage(model, objective)
    output = stage(objective.plan_step(model, [{"input_ids": tokens, "labels": tokens}]), 0)
    torch.testing.assert_close(output.sum / output.weight, out.loss)
    assert output.metrics["token_skip_loss"] == pytest.approx(float(out.token_skip_loss.detach()))
    (output.sum / output.weight).backward()
    for ours, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.grad, other, atol=EXACT, rtol=1e-6)
    with model.auxiliary_losses() as terms:
        assert model(tokens, labels=tokens).token_skip_loss == out.token_skip_loss
        assert not terms, "the call has added them"
        model(tokens)
    assert len(terms) == len(executed(out))
    assert model.eval()(tokens, labels=tokens).token_skip_loss is None


@pytest.mark.parametrize("method", METHODS)
def test_the_share_falls_with_optimizer_steps_and_is_kept(method: str, exact: Exact, ids: Ids, tmp_path: Any) -> None:
    model, tokens = skipping(exact("qwen3"), method, warmup=4, capacity=0.5).train(), ids(ROWS, TOKENS)
    parts = parts_of(model)
    if isinstance(parts, Calibrated):
        parts.start_anew()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(6):
        parts.reset_stats()
        for _ in range(2):  # accumulated
            trained_loss(model, tokens)
        share = math.ceil((1 - 0.125 * min(step, 4)) * TOKENS - 1e-9) / TOKENS
        assert parts.stats()["executed_share"] == {3: share, 5: share}
        model.eval()(tokens)
        model.train()
        assert int(parts.n_steps) == step
        optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation=model.config.text_config._attn_implementation
    )
    assert int(parts_of(loaded).n_steps) == 6
    assert torch.equal(loaded(tokens).logits, expected)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(tokens).logits, expected)
    if isinstance(parts, Calibrated):
        other = parts_of(clone)
        assert isinstance(other, Calibrated)
        assert (parts.thresholds > NO_THRESHOLD).all()
        other.thresholds.fill_(torch.inf)
        assert not executed(clone(tokens)).any()
        assert torch.equal(model(tokens).logits, expected)
        other.thresholds.copy_(parts.thresholds)
        assert clone.bfloat16().etd is not None
        assert torch.equal(other.thresholds, parts.thresholds), "in fp32"


@pytest.mark.parametrize("method", ["gate-skip", "a-mod"])
def test_thresholds_let_the_budget_run(method: str, exact: Exact, ids: Ids) -> None:
    model, tokens = skipping(exact("qwen3"), method, capacity=0.3).train(), ids(8, 32)
    parts = parts_of(model)
    parts.start_anew()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        parts.reset_stats()
        for part in tokens.split(4):
            model(part)
        optimizer.step()
    share = executed(model.eval()(tokens)).double().mean()
    assert abs(share - 0.3) < 0.05
    assert parts.stats()["rank_agreement"] > 0.6


def test_predictors_come_to_know_the_ranks(exact: Exact, ids: Ids) -> None:
    model, tokens = skipping(exact("qwen3"), hidden_size=32, scope="all", every=8).train(), ids(8, 32)
    parts = parts_of(model)
    optimizer = torch.optim.Adam(parts.get_submodule("predictors").parameters(), lr=0.02)
    agreement = []
    for _ in range(25):
        parts.reset_stats()
        with model.auxiliary_losses() as terms:
            model.model(tokens, think_iterations=1)
        optimizer.zero_grad()
        torch.stack(terms).mean().backward()
        agreement.append(parts.stats()["rank_agreement"])
        optimizer.step()
    assert agreement[0] < 0.65
    assert agreement[-1] > 0.9
    assert all(parameter.grad is None for parameter in model.model.layers.parameters()), "nothing else learns of them"


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.latin(3, "seed")
def test_the_tokens_that_should_skip_a_layer_learn_to(method: Any, seed: int) -> None:
    """One layer adds a fixed step to the stream, and the teacher takes the step for one half of the vocabulary."""
    base = tiny("qwen3", seed=seed, dtype=torch.float64, num_hidden_layers=3).eval()
    for layer in base.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    step = torch.randn(base.config.hidden_size, dtype=torch.float64)
    base.model.layers[1].register_forward_hook(lambda _module, _args, out: out + step)
    fields = {"n_encoder_layers": 1, "n_think_layers": 1, "n_decoder_layers": 1, "max_think_iterations": 1}
    skip = TokenSkipConfig(method=method, every=1, hidden_size=32)
    model = wrap_transformer_with_etd(base, ETDConfig(**fields, token_skip=skip, token_skip_warmup_steps=40))
    tokens = 3 + torch.stack([torch.randperm(16) for _ in range(8)])
    should = tokens < 11
    taught = base.model.embed_tokens(tokens).detach() + step * should[..., None]
    model.train().requires_grad_(False)
    parts = parts_of(model).requires_grad_(True)
    optimizer = torch.optim.Adam(parts.parameters(), lr=0.03)
    for _ in range(80):
        with model.auxiliary_losses() as terms:
            states = model.model(tokens, use_cache=False, output_hidden_states=[2]).hidden_states
        loss = (states[2] - taught).square().mean() + torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        runs = executed(model.eval()(tokens, use_cache=False))[0]
    assert (runs == should).double().mean() > 0.9
