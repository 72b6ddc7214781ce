"""Claim: Mixture-of-Recursions is a rule and a kind of stopping, and computes the same however the tokens are divided into calls.

The rule ``router`` decides when a token enters the think block; with ``share_first`` iterations look at the keys of the first.
The oracles are written out in plain loops. All in fp64.
"""

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from conftest import EXACT, SPLIT, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import mull
from mull import ETDConfig, HaltingConfig, LayerRouterConfig, MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.model.configs import Stop
from mull.model.depth_router import DepthRouter
from mull.model.fixed_cache import StaticSlotCache
from mull.model.growing_cache import SlotCache
from mull.model.memory import CallMemory
from mull.model.policy import GivenTokens

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]

ROWS, TOKENS, ITERATIONS = 3, 12, 4
STOPS = get_args(Stop)
SOME = ["qwen3", "olmo3", "qwen3_next-moe", "qwen3_5", "olmo_hybrid"]


def router_of(model: MullForCausalLM) -> DepthRouter:
    assert model.etd is not None
    assert model.etd.depth_router is not None
    return model.etd.depth_router


def with_router(
    base: PreTrainedModel, stop: Stop = "share_first", mtp: MTPConfig | None = None, **fields: Any
) -> MullForCausalLM:
    """A model whose router gives random tokens 1 to 4 iterations."""
    halting = HaltingConfig(rule="router", stop=stop, **fields)
    changes = {"max_think_iterations": ITERATIONS, "adaptive_depth": True, "halting": halting}
    model = wrap_transformer_with_etd(base, ETDConfig(**SPLIT.model_dump() | changes), mtp).eval()
    out = router_of(model).gate.out
    nn.init.normal_(out.weight, generator=torch.Generator().manual_seed(1))
    nn.init.zeros_(out.bias)
    return model


def sharing(base: PreTrainedModel, mtp: MTPConfig | None = None) -> MullForCausalLM:
    """A looped model in which all tokens run all iterations, and iterations share their keys."""
    halting = HaltingConfig(rule="fixed", stop="share_first")
    changes = {"max_think_iterations": ITERATIONS, "halting": halting}
    return wrap_transformer_with_etd(base, ETDConfig(**SPLIT.model_dump() | changes), mtp).eval()


def depths_of(out: Any) -> Tensor:
    return out.metrics["think_iterations"]  # type: ignore[no-any-return]


def in_calls(model: MullForCausalLM, tokens: Tensor, lengths: list[int], **options: Any) -> tuple[Tensor, list[Any]]:
    cache, start, outs = model.new_cache(), 0, []
    for length in lengths:
        outs.append(model(tokens[:, start : start + length], past_key_values=cache, use_cache=True, **options))
        start += length
    return torch.cat([out.logits for out in outs], 1), outs


def written_out(model: MullForCausalLM, tokens: Tensor, depths: Tensor) -> Tensor:
    """Logits of a Qwen3 model token by token: iteration after iteration, each with the keys of the first one."""
    base = model.model
    rows = []
    for row, text in enumerate(tokens):
        keys: dict[int, list[Tensor]] = {layer: [] for layer in range(len(base.layers))}
        values: dict[int, list[Tensor]] = {layer: [] for layer in range(len(base.layers))}
        states = []
        for position, token in enumerate(text):
            h = base.embed_tokens(token)[None, None]
            rotary = base.rotary({"full_attention"}, h, torch.tensor([[position]]))["full_attention"]
            think = SPLIT.think_layers
            for iteration in range(int(depths[row, position])):
                first = 0 if iteration == 0 else think.start
                for number in range(first, think.stop):
                    h = attended(base.layers[number], h, rotary, keys[number], values[number], iteration == 0)
            for number in range(think.stop, len(base.layers)):
                h = attended(base.layers[number], h, rotary, keys[number], values[number], True)
            states.append(h[0, 0])
        rows.append(torch.stack(states))
    return model.lm_head(base.norm(torch.stack(rows)))


def attended(layer: Any, h: Tensor, rotary: Any, keys: list[Tensor], values: list[Tensor], first: bool) -> Tensor:
    """One layer on one token, whose keys are added to the past at the first visit."""
    attention, x = layer.self_attn, layer.input_layernorm(h)
    shape = (1, 1, -1, attention.head_dim)
    query = attention.q_norm(attention.q_proj(x).view(shape)).transpose(1, 2)
    key = attention.k_norm(attention.k_proj(x).view(shape)).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    if first:
        keys.append(key)
        values.append(attention.v_proj(x).view(shape).transpose(1, 2))
    groups = query.shape[1] // key.shape[1]
    all_keys, all_values = (torch.cat(past, 2).repeat_interleave(groups, 1) for past in (keys, values))
    scores = (query @ all_keys.mT * attention.head_dim**-0.5).softmax(-1)
    h = h + attention.o_proj((scores @ all_values).transpose(1, 2).flatten(2))
    return h + layer.mlp(layer.post_attention_layernorm(h))


@torch.no_grad()
def test_iterations_look_at_the_keys_of_the_first_one(exact: Exact, ids: Ids) -> None:
    base, tokens = exact("qwen3"), ids(ROWS, TOKENS)
    for model in (with_router(base), sharing(base)):
        out = model(tokens, use_cache=False)
        depths = torch.full_like(tokens, ITERATIONS) if out.metrics is None else depths_of(out)
        torch.testing.assert_close(out.logits, written_out(model, tokens, depths), atol=EXACT, rtol=0)
    other = wrap_transformer_with_etd(base, SPLIT)(tokens, think_iterations=ITERATIONS).logits
    assert (other - out.logits).abs().max() > 1e-2, "with keys of their own, iterations compute something else"


@pytest.mark.parametrize("family_name", SOME)
@pytest.mark.latin(3, "family_name")
@torch.no_grad()
def test_iterations_of_all_tokens_share_keys_in_all_memories(family_name: str, exact: Exact, ids: Ids) -> None:
    """Without anything that decides: training, both caches and both generators know from the configuration."""
    model, tokens = sharing(exact(family_name), MTPConfig(num_predict_tokens=2)), ids(ROWS, TOKENS)
    expected = model(tokens, use_cache=False).logits
    for lengths in ([1] * TOKENS, [5, 1, 6], [TOKENS]):
        logits, _ = in_calls(model, tokens, lengths)
        torch.testing.assert_close(logits, expected, atol=EXACT, rtol=0)
    torch.testing.assert_close(model.lm_head(model.hidden_states(tokens)), expected, atol=EXACT, rtol=0)
    text = model.generate(tokens, do_sample=False, max_new_tokens=6, eos_token_id=None, use_cache=False)
    assert torch.equal(model.generate(tokens, do_sample=False, max_new_tokens=6, eos_token_id=None), text)
    for draft in ({}, {"draft": "mtp", "draft_length": 2}):
        found = mull.generate(model, tokens, max_new_tokens=6, eos_token_id=(), pad_token_id=0, **draft)
        assert torch.equal(found.sequences, text)


@pytest.mark.parametrize("family_name", SOME)
@pytest.mark.latin(3, "family_name")
@torch.no_grad()
def test_early_decoding_is_a_shorter_path(family_name: str, exact: Exact, ids: Ids) -> None:
    """Decoder layers run anew after each iteration, with keys of that iteration."""
    model, tokens = sharing(exact(family_name)), ids(ROWS, TOKENS)
    for iteration, states in enumerate(model.hidden_states_by_iteration(tokens), start=1):
        expected = model(tokens, think_iterations=iteration, use_cache=False).logits
        torch.testing.assert_close(model.lm_head(states), expected, atol=EXACT, rtol=0)


def bytes_of(cache: SlotCache) -> int:
    return sum(slot.keys.nbytes + slot.values.nbytes for slot in cache.layers if hasattr(slot, "keys"))


@torch.no_grad()
def test_shared_keys_take_the_memory_of_one_iteration(exact: Exact, ids: Ids) -> None:
    base, tokens = exact("qwen3"), ids(ROWS, TOKENS)
    plain = wrap_transformer_with_etd(base, SPLIT)
    one = bytes_of(plain(tokens, think_iterations=1, use_cache=True).past_key_values)
    own = bytes_of(plain(tokens, think_iterations=4, use_cache=True).past_key_values)
    assert own == one * (8 + 3 * 4) // 8, "8 layers, 4 of which run three more times"
    shared = with_router(base)
    assert bytes_of(shared(tokens, use_cache=True).past_key_values) == one
    options: dict[str, Any] = {"dtype": torch.float64, "device": torch.device("cpu")}
    caches = [
        StaticSlotCache(plain.text_config, plain.path(iterations), ROWS, 32, shares=shares, **options)
        for iterations, shares in ((1, False), (4, True), (4, False))
    ]
    assert caches[0].n_bytes == caches[1].n_bytes < caches[2].n_bytes


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.latin(13, "family", "stop")
@torch.no_grad()
def test_tokens_get_the_same_iterations_in_one_call_and_in_many(
    family: str, stop: Stop, exact: Exact, ids: Ids
) -> None:
    model, tokens = with_router(exact(family), stop), ids(ROWS, TOKENS)
    whole = model(tokens, use_cache=False)
    assert set(depths_of(whole).unique().tolist()) == set(range(1, 1 + ITERATIONS))
    for lengths in ([1] * TOKENS, [5, 1, 6], [TOKENS]):
        logits, outs = in_calls(model, tokens, lengths)
        assert torch.equal(torch.cat([depths_of(out) for out in outs], 1), depths_of(whole))
        torch.testing.assert_close(logits, whole.logits, atol=EXACT, rtol=0)
    given = model.model(tokens, policy=model.model.given_depths(depths_of(whole)), use_cache=False)
    assert torch.equal(model.lm_head(given.last_hidden_state), whole.logits), "the given depths, bit for bit"


@pytest.mark.parametrize("stop", ["share_first", "active_only"])
@pytest.mark.parametrize("side", ["left", "right", "packed"])
@pytest.mark.latin(19, "family", "stop", "side")
@torch.no_grad()
def test_padding_other_rows_and_other_documents_change_nothing(
    family: str, stop: Stop, side: str, exact: Exact, ids: Ids
) -> None:
    model, tokens, padding = with_router(exact(family), stop), ids(ROWS, TOKENS), 3
    filling = ids(ROWS, padding, seed=7)
    real = slice(0, TOKENS) if side == "right" else slice(padding, None)
    padded = torch.cat([tokens, filling] if side == "right" else [filling, tokens], 1)
    options: dict[str, Any] = {"use_cache": False}
    if side == "packed":
        options["position_ids"] = torch.cat([torch.arange(padding), torch.arange(TOKENS)]).expand(ROWS, -1)
    else:
        options["attention_mask"] = torch.zeros_like(padded)
        options["attention_mask"][:, real] = 1
        options["position_ids"] = (options["attention_mask"].cumsum(1) - 1).clamp(min=0)
    router_of(model).reset_stats()
    out = model(padded, **options)
    assert sum(router_of(model).selections) == ROWS * (TOKENS + (padding if side == "packed" else 0))
    for row in range(ROWS):
        alone = model(tokens[row : row + 1], use_cache=False)
        assert torch.equal(depths_of(out)[row, real], depths_of(alone)[0])
        torch.testing.assert_close(out.logits[row, real], alone.logits[0], atol=EXACT, rtol=0)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("draft_length", [None, 3])
@pytest.mark.latin(27, "family", "stop", "draft_length")
def test_both_generators_write_the_same_text_with_and_without_drafts(
    family: str, stop: Stop, draft_length: int | None, exact: Exact, ids: Ids
) -> None:
    model, tokens = with_router(exact(family), stop, MTPConfig(num_predict_tokens=3)), ids(ROWS, TOKENS)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    expected = model.generate(
        tokens, attention_mask=mask, do_sample=False, pad_token_id=0, max_new_tokens=8, eos_token_id=None
    )
    draft: dict[str, Any] = {} if draft_length is None else {"draft": "mtp", "draft_length": draft_length}
    out = mull.generate(model, tokens, mask, pad_token_id=0, max_new_tokens=8, eos_token_id=(), **draft)
    assert torch.equal(out.sequences, expected)
    assert len(out.stats.think_histogram) > 1


@torch.no_grad()
def test_a_cache_that_shares_keys_is_cropped_and_reordered_whole(exact: Exact, ids: Ids) -> None:
    for name in ("olmo3", "qwen3_5"):
        model, tokens = with_router(exact(name)), ids(ROWS, TOKENS)
        expected, order = model(tokens, use_cache=False).logits, torch.tensor([2, 0, 2])
        cache = model.new_cache()
        cache.activate_past_recording()
        model(tokens[:, :7], past_key_values=cache)
        model(ids(ROWS, 3, seed=9), past_key_values=cache)
        cache.crop(-3)
        cache.reorder_cache(order)
        rest = model(tokens[order, 7:], past_key_values=cache)
        torch.testing.assert_close(rest.logits, expected[order, 7:], atol=EXACT, rtol=0)


@pytest.mark.latin(5, "family")
@torch.no_grad()
def test_a_new_router_runs_the_looped_model(family: str, ids: Ids) -> None:
    base, tokens = tiny(family), ids(ROWS, TOKENS)
    for stop in ("last_kv", "share_first"):
        halting = HaltingConfig(rule="router", stop=stop)
        changes: dict[str, Any] = {"max_think_iterations": 3, "adaptive_depth": True, "halting": halting}
        model = wrap_transformer_with_etd(base, ETDConfig(**SPLIT.model_dump() | changes)).eval()  # certifies identity
        for iterations in (1, 2, 3, 5):
            out = model(tokens, think_iterations=iterations)
            assert (depths_of(out) == iterations).all(), "the deepest choice has no end but that of the call"
            assert not out.metrics["early_exit"].any()
            assert torch.equal(out.logits, model(tokens, think_iterations=iterations, adaptive=False).logits)
        assert torch.equal(model(tokens, think_iterations=1).logits, base(tokens).logits)


@torch.no_grad()
def test_the_choice_is_that_of_the_formula_and_of_the_bias(exact: Exact, ids: Ids) -> None:
    model, tokens = with_router(exact("qwen3")), ids(ROWS, TOKENS)
    router = router_of(model)
    out = model(tokens, use_cache=False, output_hidden_states=True)
    entered = out.hidden_states[SPLIT.n_encoder_layers]
    normed = entered / entered.square().mean(-1, keepdim=True).add(torch.finfo(entered.dtype).eps).sqrt()
    logits = normed @ router.gate.out.weight.T + router.gate.out.bias
    scores = logits.softmax(-1)
    assert torch.equal(depths_of(out), 1 + scores.argmax(-1))
    router.bias[1] = 0.9
    changed = depths_of(model(tokens, use_cache=False))
    assert torch.equal(changed, 1 + (scores + router.bias).argmax(-1))
    assert not torch.equal(changed, 1 + (logits + router.bias).argmax(-1)), "the bias is added to probabilities"
    at_least = HaltingConfig(rule="router", stop="share_first", min_iterations=3)
    depths = depths_of(model(tokens, adaptive=at_least, use_cache=False))
    assert torch.equal(depths, (1 + (scores + router.bias).argmax(-1)).clamp(min=3))


@pytest.mark.parametrize("family_name", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.latin(4, "family_name", "stop")
def test_the_router_has_a_gradient_with_and_without_checkpointing(
    family_name: str, stop: Stop, exact: Exact, ids: Ids
) -> None:
    model, tokens = with_router(exact(family_name), stop), ids(ROWS, TOKENS)
    found, counts = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        router_of(model).reset_stats()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        counts.append(router_of(model).selections)
        assert torch.equal(loss, model.eval()(tokens, labels=tokens, use_cache=False).loss), "the value is hard"
    assert counts[0] == counts[1]
    assert all(parameter.grad is not None for parameter in router_of(model).parameters())
    assert all(bool((parameter.grad != 0).any(-1).all()) for parameter in router_of(model).parameters())  # type: ignore[union-attr]
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("stop", ["share_first", "last_kv"])
def test_updates_count_with_the_probability_that_their_iteration_runs(stop: Stop, exact: Exact, ids: Ids) -> None:
    """Over what that probability was, which is 1. All gradients against the iterations written out."""
    model, tokens = with_router(exact("qwen3"), stop, min_iterations=2).train(), ids(ROWS, TOKENS)
    base, router = model.model, router_of(model)
    out = model(tokens, use_cache=False)
    out.logits.square().sum().backward()
    depths, path = depths_of(out), base.path()
    encoder, thinks, decoder = base.etd_config.sections(ITERATIONS)  # type: ignore[union-attr]
    h = base.embed_tokens(tokens)
    inputs, memory = base.layer_inputs(h), CallMemory(stop)
    h = base._run(path[encoder], h, inputs, memory, GivenTokens({}, stop))
    p = router.gate(h).softmax(-1)
    chances = [None, None, p[..., 2] + p[..., 3], p[..., 3]]  # all tokens run two
    for number, (think, chance) in enumerate(zip(thinks, chances, strict=True)):
        running = dict.fromkeys(path[think], depths > number)
        after = base._run(path[think], h, inputs, memory, GivenTokens(running, stop))
        h = after if chance is None else h + (after - h) * (1 + chance - chance.detach())[..., None]
    h = base._run(path[decoder], h, inputs, memory, GivenTokens({}, stop))
    loss = model.lm_head(base.norm(h)).square().sum()
    for parameter, expected in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-5)


def test_truncated_training_still_reaches_the_router(exact: Exact, ids: Ids) -> None:
    model, tokens = with_router(exact("qwen3"), "last_kv").train(), ids(ROWS, TOKENS)
    model.hidden_states(tokens, adaptive=True, backprop_iterations=1).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in router_of(model).parameters() if p.grad is not None)
    assert router_of(model).gate.out.weight.grad is not None


@pytest.mark.slow
def test_the_bias_evens_the_load_after_each_step(ids: Ids) -> None:
    model, tokens = with_router(tiny("qwen3"), balance_rate=0.02), ids(ROWS, TOKENS)
    router = router_of(model)
    nn.init.constant_(router.gate.out.bias, 0.0)
    router.gate.out.weight.data *= 0.2
    router.gate.out.bias.data[0] = 3.0
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    before = depths_of(model(tokens))
    assert (before == 1).double().mean() > 0.5
    model.train()
    for _ in range(35):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
    counts = depths_of(model.eval()(tokens)).flatten().bincount(minlength=5)[1:]
    assert counts.max() < 0.45 * ROWS * TOKENS, counts
    assert int(router.n_steps) == 35
    same = router.bias.clone()
    model(tokens)
    optimizer.step()
    assert torch.equal(router.bias, same), "only training counts"
    assert model.half() is model
    assert router.bias.dtype == torch.float32
    assert model.etd is not None
    assert sum(model.etd.get_router_stats()["depth_counts"]) > 0


def test_a_saved_model_gives_the_same_iterations(tmp_path: Any, ids: Ids) -> None:
    model, tokens = with_router(tiny("qwen3")), ids(ROWS, TOKENS)
    router_of(model).bias[2] = 0.1
    model.save_pretrained(tmp_path)
    loaded = mull.from_pretrained(tmp_path)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        expected, *others = (each(tokens) for each in (model, loaded, copied))
    for other in others:
        assert torch.equal(other.logits, expected.logits)
        assert torch.equal(depths_of(other), depths_of(expected))


def test_what_does_not_fit_is_refused(ids: Ids) -> None:
    tokens, split = ids(1, 4), SPLIT.model_dump()
    plain = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    with pytest.raises(ValueError, match="'router' needs a trained depth router"):
        plain(tokens, adaptive=HaltingConfig(rule="router"))
    with pytest.raises(ValueError, match="chooses among 1 to max_think_iterations"):
        ETDConfig(**split | {"max_think_iterations": 1, "halting": HaltingConfig(rule="router")})
    for fields in (
        {"halting": HaltingConfig(stop="share_first"), "layer_router": LayerRouterConfig()},
        {"layer_router": LayerRouterConfig(stop="share_first")},
    ):
        with pytest.raises(ValueError, match="Layer routers learn from tries of a layer"):
            ETDConfig(**split | fields)
    cache = plain(tokens, adaptive=HaltingConfig(stop="share_first"), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="'share_first' has one slot"):
        plain(tokens, past_key_values=cache)
    model = sharing(tiny("qwen3")).train()
    with pytest.raises(ValueError, match="nothing would train them"):
        model.hidden_states(tokens, think_iterations=3, backprop_iterations=2)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="Reentrant gradient checkpointing would lose"):
        model(tokens, labels=tokens, use_cache=False)


@pytest.mark.slow
def test_a_compiled_model_shares_keys_in_its_graph(ids: Ids) -> None:
    model, tokens = sharing(tiny("qwen3")), ids(ROWS, 9)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        assert torch.equal(torch.compile(model, backend="eager")(tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_keys_of_the_first_iteration_are_trained_by_all(checkpointing: bool, exact: Exact, ids: Ids) -> None:
    """Every gradient is that of the loops that are written out."""
    model, tokens = sharing(exact("qwen3")), ids(2, 5)
    expected = torch.autograd.grad(
        written_out(model, tokens, torch.full_like(tokens, ITERATIONS)).square().sum(), [*model.parameters()]
    )
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()(tokens, use_cache=False).logits.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-5)
