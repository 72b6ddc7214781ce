"""Tokens that do not run a visit: the three memories, and an independent oracle, compute the same.

A policy switches single tokens off. A token that does not run a visit keeps its state, and offers to the others what the policy
says: the keys and values of the last time it ran that layer (``last_kv``; where it never ran it, nothing), those of the state
that it keeps (``own_state``), or nothing (``active_only``). With ``share_first`` it offers those of the first time that it ran
the layer, and does so when it runs, too. A recurrent layer runs the sequence of the tokens that do run. All in fp64, where errors
of bookkeeping stand out.
"""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from conftest import EXACT, SPLIT, tiny
from torch import Tensor
from transformers import PreTrainedModel

from mull import HaltingConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.model.configs import Stop
from mull.model.fixed_cache import StaticCall, StaticSlotCache
from mull.model.path import Path, Visit, from_layers
from mull.model.policy import GivenTokens

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]
Masks = dict[Visit, Tensor]

ROWS, TOKENS = 3, 14
KINDS = ["qwen3", "olmo3", "qwen3_next-moe", "qwen3_5", "olmo_hybrid"]
"""Families that between them have every kind of layer, position and norm."""

PATHS = {
    "halting": SPLIT.path(3),
    "skipping": SPLIT.path(2),
    "arbitrary": from_layers([0, 3, 1, 1, 7, 3, 5, 0]),
}


def halting(path: Path) -> Masks:
    """Each token stops after an iteration of its own: 1, 2 or 3."""
    depth = torch.randint(1, 4, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))
    depth[1] = 1  # a row that stops at once
    depth[:, 5] = 1  # a token at which, fed alone, nobody goes on
    return {visit: depth > visit.occurrence for visit in path if visit.occurrence}


def skipping(path: Path) -> Masks:
    """Any token skips any visit but the first layer's first; some visits are skipped by all."""
    generator = torch.Generator().manual_seed(4)
    masks = {visit: torch.rand(ROWS, TOKENS, generator=generator) < 0.6 for visit in path[1:]}
    masks[path[4]] = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    return masks


def masks_of(name: str) -> Masks:
    return (halting if name == "halting" else skipping)(PATHS[name])


STOP: Stop = "last_kv"
"""Of the running test; the fixture `stop` sets it."""


@pytest.fixture(params=get_args(Stop))
def stop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stop:
    monkeypatch.setitem(globals(), "STOP", request.param)
    return request.param  # type: ignore[no-any-return]


def part(masks: Masks, start: int, stop: int) -> GivenTokens:
    return GivenTokens({visit: mask[:, start:stop] for visit, mask in masks.items()}, STOP)


@torch.no_grad()
def oracle(model: MullForCausalLM, tokens: Tensor, path: Path, masks: Masks) -> Tensor:
    """Every layer runs every token; hooks put the kept projections in the place of those of tokens that do not run.

    Recurrent layers run each row's chosen tokens by themselves, without mask or cache.
    """
    base = model.model
    h = base.embed_tokens(tokens)
    positions = torch.arange(TOKENS)[None]
    rotary = base.rotary(set(base.kinds), h, positions)
    kept: dict[Any, Tensor] = {}
    ran = {layer: torch.zeros(ROWS, TOKENS, dtype=torch.bool) for layer in range(len(base.layers))}
    for visit in path:
        layer, kind = base.layers[visit.layer], base.kinds[visit.layer]
        active = masks.get(visit, torch.ones(ROWS, TOKENS, dtype=torch.bool))
        options = {"position_ids": positions, "position_embeddings": rotary[kind]}
        if kind == "linear_attention":
            out = h.clone()
            for row in range(ROWS):
                if active[row].any():
                    chosen = h[row : row + 1, active[row]]
                    out[row, active[row]] = layer(chosen, attention_mask=None, **options)[0]
            h = out
            continue
        ran_before = ran[visit.layer]
        ran[visit.layer] = ran_before | active
        visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        if kind == "sliding_attention":
            visible &= ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-base.text_config.sliding_window)
        offering = {"own_state": torch.ones_like(active), "active_only": active}.get(STOP, ran[visit.layer])
        visible = visible & offering[:, None, None]
        visible = visible | ~active[:, None, :, None]  # the state of a token that does not run is thrown away

        new = active & ~ran_before if STOP == "share_first" else active

        def keep(projection: Any, _inputs: Any, out: Tensor, new: Tensor = new) -> Tensor:
            if STOP == "own_state":
                return out
            before = kept.get(projection, torch.zeros_like(out))
            kept[projection] = torch.where(new[..., None], out, before)
            return kept[projection]

        attention = layer.self_attn
        hooks = [attention.get_submodule(name).register_forward_hook(keep) for name in ("k_proj", "v_proj")]
        out = layer(h, attention_mask=visible, **options)
        for hook in hooks:
            hook.remove()
        h = torch.where(active[..., None], out, h)
    return base.norm(h)


def in_parts(lengths: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for length in lengths:
        yield start, start + length
        start += length


@torch.no_grad()
def on_growing_cache(model: MullForCausalLM, tokens: Tensor, path: Path, masks: Masks, lengths: list[int]) -> Tensor:
    cache, states = model.new_cache(), []
    for start, stop in in_parts(lengths):
        out = model.model(
            tokens[:, start:stop], past_key_values=cache, path=path, policy=part(masks, start, stop), use_cache=True
        )
        states.append(out.last_hidden_state)
    return torch.cat(states, 1)


def fixed_cache(model: MullForCausalLM, path: Path) -> StaticSlotCache:
    weight = model.lm_head.weight
    options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device, "shares": STOP == "share_first"}
    return StaticSlotCache(model.text_config, path, ROWS, 32, **options)


def fixed_call(start: int, stop: int, n_valid: int | None, fresh: bool = False) -> StaticCall:
    positions = torch.arange(start, stop).expand(ROWS, -1)
    return StaticCall(positions, stop, None if n_valid is None else torch.full((ROWS,), n_valid), fresh)


@torch.no_grad()
def on_fixed_cache(
    model: MullForCausalLM, tokens: Tensor, path: Path, masks: Masks, lengths: list[int], fresh: bool = False
) -> Tensor:
    cache, states = fixed_cache(model, path), []
    for start, stop in in_parts(lengths):
        call = fixed_call(start, stop, stop - start, fresh and start == 0)
        states.append(model.model.decode(tokens[:, start:stop], cache, call, part(masks, start, stop)))
    return torch.cat(states, 1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=EXACT, rtol=0, check_dtype=False)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.latin(11, "family", "name", "stop")
def test_every_memory_computes_what_the_oracle_does(family: str, name: str, stop: Stop, exact: Exact, ids: Ids) -> None:
    model, tokens, path, masks = wrapped(exact, family), ids(ROWS, TOKENS), PATHS[name], masks_of(name)
    expected = oracle(model, tokens, path, masks)
    with torch.no_grad():
        whole = model.model(tokens, path=path, policy=part(masks, 0, TOKENS), use_cache=False).last_hidden_state
    assert_same(whole, expected)
    one_by_one = [1] * TOKENS
    assert_same(on_growing_cache(model, tokens, path, masks, one_by_one), expected)
    assert_same(on_growing_cache(model, tokens, path, masks, [6, 1, 7]), expected)
    assert_same(on_fixed_cache(model, tokens, path, masks, one_by_one), expected)
    assert_same(on_fixed_cache(model, tokens, path, masks, [6, 8], fresh=True), expected)


def wrapped(exact: Exact, family: str) -> MullForCausalLM:
    stops = SPLIT.model_copy(update={"halting": HaltingConfig(rule="fixed", stop=STOP)})
    return wrap_transformer_with_etd(exact(family), stops)


@pytest.mark.parametrize("family_name", KINDS)
@pytest.mark.latin(4, "family_name", "stop")
def test_a_policy_that_lets_everybody_run_changes_nothing(family_name: str, stop: Stop, exact: Exact, ids: Ids) -> None:
    model, tokens, path, everybody = wrapped(exact, family_name), ids(ROWS, TOKENS), PATHS["halting"], part({}, 0, 0)
    with torch.no_grad():
        expected = model.model(tokens, path=path, use_cache=False).last_hidden_state
        assert_same(model.model(tokens, path=path, policy=everybody, use_cache=False).last_hidden_state, expected)
    assert_same(expected, oracle(model, tokens, path, {}))
    assert_same(on_growing_cache(model, tokens, path, {}, [6, 1, 7]), expected)
    assert_same(on_fixed_cache(model, tokens, path, {}, [6, 1, 7]), expected)


@pytest.mark.parametrize("family_name", KINDS)
@pytest.mark.latin(4, "family_name", "stop")
@torch.no_grad()
def test_left_padding_and_policies_go_together(family_name: str, stop: Stop, exact: Exact, ids: Ids) -> None:
    model, tokens, path, masks = wrapped(exact, family_name), ids(ROWS, TOKENS), PATHS["skipping"], masks_of("skipping")
    expected = model.model(tokens, path=path, policy=part(masks, 0, TOKENS), use_cache=False).last_hidden_state
    padding = 4
    padded = torch.cat([ids(ROWS, padding, seed=5), tokens], 1)
    mask = torch.ones(ROWS, padding + TOKENS, dtype=torch.long)
    mask[:, :padding] = 0
    wide = {visit: torch.cat([torch.ones(ROWS, padding, dtype=torch.bool), m], 1) for visit, m in masks.items()}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for n_prefill in (padding + TOKENS, padding + 3):
        cache, states = model.new_cache(), []
        for start, stop in in_parts([n_prefill, *[1] * (padding + TOKENS - n_prefill)]):
            out = model.model(
                padded[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                path=path,
                policy=part(wide, start, stop),
                use_cache=True,
            )
            states.append(out.last_hidden_state)
        assert_same(torch.cat(states, 1)[:, padding:], expected)


@pytest.mark.parametrize("family_name", KINDS)
@pytest.mark.latin(4, "family_name", "stop")
@torch.no_grad()
def test_packed_documents_are_documents_alone(family_name: str, stop: Stop, exact: Exact, ids: Ids) -> None:
    model, tokens, path, masks = wrapped(exact, family_name), ids(ROWS, TOKENS), PATHS["skipping"], masks_of("skipping")
    lengths = [5, 9]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(ROWS, -1)
    whole = model.model(tokens, position_ids=positions, path=path, policy=part(masks, 0, TOKENS)).last_hidden_state
    for start, stop in in_parts(lengths):
        alone = model.model(tokens[:, start:stop], path=path, policy=part(masks, start, stop), use_cache=False)
        assert_same(whole[:, start:stop], alone.last_hidden_state)


@pytest.mark.parametrize("family_name", KINDS)
@pytest.mark.latin(4, "family_name", "stop")
@torch.no_grad()
def test_tokens_can_be_taken_back(family_name: str, stop: Stop, exact: Exact, ids: Ids) -> None:
    """Wrong tokens, with masks of their own, are fed and taken back: what follows does not notice."""
    model, tokens, path, masks = wrapped(exact, family_name), ids(ROWS, TOKENS), PATHS["skipping"], masks_of("skipping")
    expected = oracle(model, tokens, path, masks)
    wrong = {visit: mask.flip(0, 1) for visit, mask in masks.items()}
    wrong[path[6]][:, :3] = torch.tensor([True, False, False])  # the last two of them run no recurrent layer there
    for n_kept in range(4):
        cache = model.new_cache()
        feed = {"past_key_values": cache, "path": path, "use_cache": True}
        model.model(tokens[:, :6], policy=part(masks, 0, 6), **feed)
        cache.activate_past_recording()
        drafted = torch.cat([tokens[:, 6 : 6 + n_kept], ids(ROWS, 3, seed=8)], 1)
        mixed = {v: torch.cat([m[:, 6 : 6 + n_kept], wrong[v][:, :3]], 1) for v, m in masks.items()}
        for start, stop in ((0, n_kept + 1), (n_kept + 1, n_kept + 3)):
            model.model(drafted[:, start:stop], policy=part(mixed, start, stop), **feed)
        cache.crop(-3)
        rest = model.model(tokens[:, 6 + n_kept :], policy=part(masks, 6 + n_kept, TOKENS), **feed)
        assert_same(rest.last_hidden_state, expected[:, 6 + n_kept :])

        fixed = fixed_cache(model, path)
        model.model.decode(tokens[:, :6], fixed, fixed_call(0, 6, 6), part(masks, 0, 6))
        model.model.decode(drafted, fixed, fixed_call(6, 9 + n_kept, None), GivenTokens(mixed, STOP))
        fixed.commit(torch.full((ROWS,), n_kept))
        call = fixed_call(6 + n_kept, TOKENS, TOKENS - 6 - n_kept)
        states = model.model.decode(tokens[:, 6 + n_kept :], fixed, call, part(masks, 6 + n_kept, TOKENS))
        assert_same(states, expected[:, 6 + n_kept :])


@pytest.mark.parametrize("family_name", KINDS)
@pytest.mark.latin(4, "family_name", "stop")
@torch.no_grad()
def test_rows_of_a_cache_with_gaps_can_be_reordered_and_chosen(
    family_name: str, stop: Stop, exact: Exact, ids: Ids
) -> None:
    model, tokens, path, masks = wrapped(exact, family_name), ids(ROWS, TOKENS), PATHS["skipping"], masks_of("skipping")
    expected = oracle(model, tokens, path, masks)
    for rows in ([2, 0, 1], [1, 1, 0]):
        cache, order = model.new_cache(), torch.tensor(rows)
        feed = {"past_key_values": cache, "path": path, "use_cache": True}
        model.model(tokens[:, :8], policy=part(masks, 0, 8), **feed)
        cache.reorder_cache(order)
        rest = GivenTokens({visit: mask[order, 8:] for visit, mask in masks.items()}, STOP)
        assert_same(model.model(tokens[order, 8:], policy=rest, **feed).last_hidden_state, expected[order, 8:])


@pytest.mark.parametrize("family_name", KINDS)
@pytest.mark.latin(4, "family_name", "stop")
@torch.no_grad()
def test_a_call_without_a_policy_does_not_see_what_earlier_ones_skipped(
    family_name: str, stop: Stop, exact: Exact, ids: Ids
) -> None:
    model, tokens, path, masks = wrapped(exact, family_name), ids(ROWS, TOKENS), PATHS["skipping"], masks_of("skipping")
    partly = {visit: mask.clone().index_fill_(1, torch.arange(8, TOKENS), True) for visit, mask in masks.items()}
    expected = oracle(model, tokens, path, partly)
    cache = model.new_cache()
    model.model(tokens[:, :8], policy=part(masks, 0, 8), past_key_values=cache, path=path, use_cache=True)
    rest = model.model(tokens[:, 8:], past_key_values=cache, path=path, use_cache=True).last_hidden_state
    assert_same(rest, expected[:, 8:])
    fixed = fixed_cache(model, path)
    model.model.decode(tokens[:, :8], fixed, fixed_call(0, 8, 8), part(masks, 0, 8))
    assert_same(model.model.decode(tokens[:, 8:], fixed, fixed_call(8, TOKENS, 6)), expected[:, 8:])


@pytest.mark.parametrize("family_name", ["qwen3", "olmo3", "qwen3_5", "olmo_hybrid"])
@pytest.mark.latin(3, "family_name", "stop")
def test_gradients_do_not_depend_on_checkpointing(family_name: str, stop: Stop, exact: Exact, ids: Ids) -> None:
    model, tokens, masks = wrapped(exact, family_name), ids(ROWS, TOKENS), masks_of("halting")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        states = model.hidden_states(tokens, think_iterations=3, policy=part(masks, 0, TOKENS))
        states.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert (expected is None) == (gradients[1][name] is None)
        if expected is not None:
            torch.testing.assert_close(gradients[1][name], expected, atol=1e-9, rtol=1e-9)


def test_an_attention_that_takes_no_such_mask_is_named(exact: Exact, ids: Ids) -> None:
    model = wrapped(exact, "llama")
    model.model.text_config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' cannot run a part of the tokens"), torch.no_grad():
        model.model(
            ids(ROWS, TOKENS),
            attention_mask={"full_attention": torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool).tril()},
            policy=part(masks_of("halting"), 0, TOKENS),
            use_cache=False,
        )


def test_eager_attention_takes_the_same_tokens(exact: Exact, ids: Ids) -> None:
    model, tokens, masks = wrapped(exact, "olmo3"), ids(ROWS, TOKENS), masks_of("skipping")
    expected = oracle(model, tokens, PATHS["skipping"], masks)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.model(tokens, path=PATHS["skipping"], policy=part(masks, 0, TOKENS), use_cache=False)
    # eager softmax in transformers is in fp32
    torch.testing.assert_close(out.last_hidden_state, expected, atol=1e-5, rtol=0)


def test_tokens_that_stopped_cost_nothing(ids: Ids) -> None:
    """Layers see the gathered tokens only, and are not called when nobody runs."""
    model, path = wrap_transformer_with_etd(tiny("qwen3"), SPLIT), PATHS["halting"]
    shapes: list[tuple[int, int]] = []
    model.model.layers[3].register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    few = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    few[:, :4] = True
    none = torch.zeros_like(few)
    masks = {visit: [few, few, none][visit.occurrence] for visit in path if visit.layer in range(2, 6)}
    with torch.no_grad():
        model.model(ids(ROWS, TOKENS), path=path, policy=GivenTokens(masks), use_cache=False)
    assert shapes == [(ROWS, 4), (ROWS, 4)]
