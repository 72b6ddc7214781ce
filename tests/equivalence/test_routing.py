"""Claim: layer routers take the same decisions, and the model computes the same, however the tokens are divided into calls.

`test_active_tokens` has that for tokens that do not run a visit. Here routers with random weights decide which those are. All in
fp64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EXACT, SPLIT, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

import mull
from mull import ETDConfig, HaltingConfig, LayerRouterConfig, MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.layers.routers import EXECUTE, REPEAT, SKIP
from mull.model.executor import run
from mull.model.path import from_layers

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]

ROWS, TOKENS, ITERATIONS = 3, 12, 2
SOME = ["qwen3", "olmo3", "qwen3_next-moe", "qwen3_5", "olmo_hybrid"]
STOPS = ["last_kv", "own_state", "active_only"]
GRANULARITIES = ["sequence", "token"]


def routed(
    base: PreTrainedModel, mtp: MTPConfig | None = None, *, scale: float = 1.0, adaptive: bool = False, **fields: Any
) -> MullForCausalLM:
    """A model whose routers decide at random, and all three ways; a `scale` of 30 leaves no close calls and no small weights."""
    stop = fields.get("stop")
    changes: dict[str, Any] = {"layer_router": LayerRouterConfig(hidden_size=8, **fields), "router_warmup_steps": 0}
    if adaptive:
        changes["halting"] = HaltingConfig(rule="state", threshold=0.9, stop=stop or "active_only")
    config = ETDConfig(**SPLIT.model_dump() | {"max_think_iterations": ITERATIONS} | changes)
    model = wrap_transformer_with_etd(base, config, mtp).eval()
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    generator = torch.Generator().manual_seed(1)
    for router in model.etd.layer_routers.by_layer.values():
        nn.init.normal_(router.out.weight, std=scale, generator=generator)  # type: ignore[arg-type]
        nn.init.zeros_(router.out.bias)  # type: ignore[arg-type]
    return model


def actions_of(out: Any) -> Tensor:
    """``[decisions, B, T]``."""
    return torch.stack(out.metrics["router_actions"])


def in_calls(model: MullForCausalLM, tokens: Tensor, lengths: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    cache, start, logits, actions = model.new_cache(), 0, [], []
    for length in lengths:
        out = model(tokens[:, start : start + length], past_key_values=cache, use_cache=True, **options)
        logits.append(out.logits)
        actions.append(actions_of(out))
        start += length
    return torch.cat(logits, 1), torch.cat(actions, 2)


def every_action(actions: Tensor) -> bool:
    return set(actions.unique().tolist()) == {SKIP, EXECUTE, REPEAT}


@pytest.mark.parametrize("scope", ["think", "all"])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.latin(24, "family", "scope", "stop", "scale")
@torch.no_grad()
def test_routers_of_tokens_decide_the_same_in_one_call_and_in_many(
    family: str, scope: Any, stop: Any, scale: float, exact: Exact, ids: Ids
) -> None:
    model = routed(exact(family), granularity="token", scope=scope, stop=stop, scale=scale)
    tokens = ids(ROWS, TOKENS)
    whole = model(tokens, use_cache=False)
    assert every_action(actions_of(whole))
    for lengths in ([1] * TOKENS, [5, 1, 6], [TOKENS]):
        logits, actions = in_calls(model, tokens, lengths)
        assert torch.equal(actions, actions_of(whole))
        torch.testing.assert_close(logits, whole.logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("scope", ["think", "all"])
@pytest.mark.latin(6, "family", "scope")
@torch.no_grad()
def test_routers_of_sequences_decide_on_the_prompt_and_stay_with_it(
    family: str, scope: Any, exact: Exact, ids: Ids
) -> None:
    model, tokens, n_prompt = routed(exact(family), scope=scope), ids(ROWS, TOKENS), 7
    prompt = (torch.arange(TOKENS) < n_prompt).expand(ROWS, -1)
    whole = model(tokens, use_cache=False, prompt_mask=prompt)
    labels = torch.where(prompt, -100, tokens)
    assert torch.equal(model(tokens, use_cache=False, labels=labels).logits, whole.logits)
    actions = actions_of(whole)
    assert torch.equal(actions, actions[..., :1].expand_as(actions)), "one decision for a row"
    assert len(actions[:, 0, 0].unique()) > 1
    for lengths in ([n_prompt] + [1] * (TOKENS - n_prompt), [n_prompt, TOKENS - n_prompt]):
        logits, made = in_calls(model, tokens, lengths)
        assert torch.equal(made, actions)
        torch.testing.assert_close(logits, whole.logits, atol=EXACT, rtol=0)
    changed = tokens.clone()
    changed[:, n_prompt:] = (changed[:, n_prompt:] + 1) % 97
    again = model(changed, use_cache=False, prompt_mask=prompt)
    assert torch.equal(actions_of(again), actions), "later tokens decide nothing"
    assert torch.equal(again.logits[:, :n_prompt], whole.logits[:, :n_prompt])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family_name", SOME)
@torch.no_grad()
def test_decisions_stay_with_their_rows(family_name: str, granularity: Any, exact: Exact, ids: Ids) -> None:
    model, tokens = routed(exact(family_name), granularity=granularity), ids(ROWS, TOKENS)
    cache = model.new_cache()
    cache.activate_past_recording()
    model(tokens[:, :8], past_key_values=cache)
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    model(tokens[order, 8:11], past_key_values=cache)
    cache.crop(-2)
    cache.batch_select_indices(torch.tensor([0, 1]))
    out = model(tokens[order[:2], 9:], past_key_values=cache)
    prompt = (torch.arange(TOKENS) < 8).expand(ROWS, -1)
    expected = model(tokens, use_cache=False, prompt_mask=prompt)
    torch.testing.assert_close(out.logits, expected.logits[order[:2], 9:], atol=EXACT, rtol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.latin(8, "family", "granularity", "side")
@torch.no_grad()
def test_padding_and_other_rows_decide_nothing(
    family: str, granularity: Any, side: str, exact: Exact, ids: Ids
) -> None:
    model, tokens, padding = routed(exact(family), granularity=granularity), ids(ROWS, TOKENS), 3
    filling = ids(ROWS, padding, seed=7)
    real = slice(padding, None) if side == "left" else slice(0, TOKENS)
    padded = torch.cat([filling, tokens] if side == "left" else [tokens, filling], 1)
    mask = torch.zeros_like(padded)
    mask[:, real] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=positions, use_cache=True)
    for row in range(ROWS):
        alone = model(tokens[row : row + 1], use_cache=True)
        assert torch.equal(actions_of(out)[:, row, real], actions_of(alone)[:, 0])
        torch.testing.assert_close(out.logits[row, real], alone.logits[0], atol=EXACT, rtol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family_name", SOME)
@torch.no_grad()
def test_packed_documents_are_routed_as_if_alone(family_name: str, granularity: Any, exact: Exact, ids: Ids) -> None:
    model, tokens = routed(exact(family_name), granularity=granularity), ids(ROWS, TOKENS)
    positions = torch.cat([torch.arange(5), torch.arange(TOKENS - 5)]).expand(ROWS, -1)
    prompt = (positions < 3).expand(ROWS, -1)
    whole = model(tokens, position_ids=positions, prompt_mask=prompt, use_cache=False)
    for part in (slice(0, 5), slice(5, None)):
        alone = model(tokens[:, part], prompt_mask=prompt[:, part], use_cache=False)
        assert torch.equal(actions_of(whole)[..., part], actions_of(alone))
        torch.testing.assert_close(whole.logits[:, part], alone.logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_a_mask_of_ones_own_says_which_tokens_are_one_sequence(
    granularity: Any, attention: str, exact: Exact, ids: Ids
) -> None:
    """Positions that jump or restart do not, where attention goes by the mask."""
    model, tokens = routed(exact("qwen3"), granularity=granularity), ids(ROWS, TOKENS)
    model.set_attn_implementation(attention)
    causal = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    prompt = (torch.arange(TOKENS) < 3).expand(ROWS, -1)
    for positions in (torch.arange(TOKENS) // 2, 3 * torch.arange(TOKENS), torch.arange(TOKENS) % 5):
        options = {"position_ids": positions.expand(ROWS, -1), "prompt_mask": prompt, "use_cache": False}
        whole = model(tokens, attention_mask=causal, **options)
        padded = model(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert torch.equal(actions_of(whole), actions_of(padded))
        torch.testing.assert_close(whole.logits, padded.logits, atol=EXACT, rtol=0)
    bias = torch.full(causal.shape, -1e-3, dtype=torch.float64)
    for mask in (causal, bias.where(causal, torch.finfo(bias.dtype).min), bias.where(causal, -torch.inf)):
        inputs = model.model.layer_inputs(
            model.model.embed_tokens(tokens), mask, torch.arange(TOKENS).expand(ROWS, -1) // 2
        )
        assert torch.equal(inputs.sequences(ROWS), torch.arange(ROWS)[:, None].expand(-1, TOKENS))
    cache, half = model.new_cache(), TOKENS // 2
    model(tokens[:, :half], past_key_values=cache, use_cache=True)
    late = causal[:, :, half:].clone()
    late[..., :3] = False  # as padding on the left
    h = model.model.embed_tokens(tokens[:, half:])
    inputs = model.model.layer_inputs(h, late, torch.arange(half, TOKENS).expand(ROWS, -1), cache)
    assert torch.equal(inputs.sequences(ROWS), torch.arange(ROWS)[:, None].expand(-1, half))
    document = (torch.arange(TOKENS) >= 5).long()
    prompt = ((torch.arange(TOKENS) - 5 * document) < 3).expand(ROWS, -1)
    apart = causal & (document[:, None] == document)
    positions = (torch.arange(TOKENS) - 5 * document).expand(ROWS, -1)
    masked = model(tokens, attention_mask=apart, position_ids=positions, prompt_mask=prompt, use_cache=False)
    packed = model(tokens, position_ids=positions, prompt_mask=prompt, use_cache=False)
    assert torch.equal(actions_of(masked), actions_of(packed))
    torch.testing.assert_close(masked.logits, packed.logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("draft_length", [None, 0, 2])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.latin(24, "family", "granularity", "draft_length", "adaptive")
@torch.no_grad()
def test_both_generators_write_the_same_text_with_and_without_drafts(
    family: str, granularity: Any, draft_length: int | None, adaptive: bool, exact: Exact, ids: Ids
) -> None:
    mtp = MTPConfig(num_predict_tokens=2, mtp_head_type="sequential")
    model = routed(exact(family), mtp, granularity=granularity, adaptive=adaptive)
    tokens, options = ids(2, 6), {"max_new_tokens": 8, "eos_token_id": ()}
    expected = model.generate(tokens, do_sample=False, max_new_tokens=8, eos_token_id=None, adaptive=adaptive)
    draft = None if draft_length is None else "mtp"
    found = mull.generate(model, tokens, draft=draft, draft_length=draft_length, adaptive=adaptive, **options)
    assert torch.equal(found.sequences, expected)
    assert not torch.equal(found.sequences, mull.generate(model, tokens, path=SPLIT.path(1), **options).sequences)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.latin(4)
@torch.no_grad()
def test_a_route_equals_its_path(family: str, granularity: Any, exact: Exact, ids: Ids) -> None:
    """Hard decisions, bit for bit: rows that all take the same actions run the layers of that path, and no others."""
    model, tokens = routed(exact(family), granularity=granularity), ids(1, TOKENS)
    etd = model.etd_config
    assert etd is not None
    actions = torch.tensor([[1, 1, 0, 2, 1, 2, 1, 1]])
    h = model.model.embed_tokens(tokens)
    inputs = model.model.layer_inputs(h)
    policy = model.model.with_routing(None, h, inputs, given=actions)
    found = run(model.model.layers, model.kinds, etd.path(1), h, inputs, policy=policy)
    path = from_layers([0, 1, 3, 3, 4, 5, 5, 6, 7])
    torch.testing.assert_close(found, run(model.model.layers, model.kinds, path, h, inputs), atol=0, rtol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.latin(4)
@torch.no_grad()
def test_a_new_router_executes(family: str, granularity: Any, exact: Exact, ids: Ids) -> None:
    base, tokens = exact(family), ids(ROWS, TOKENS)
    config = ETDConfig(**SPLIT.model_dump() | {"layer_router": LayerRouterConfig(granularity=granularity, scope="all")})
    model = wrap_transformer_with_etd(base, config).eval()  # certifies identity
    for warmup in (1000, 0):
        assert model.etd is not None
        assert model.etd.layer_routers is not None
        model.etd.layer_routers.warmup_steps = warmup
        assert torch.equal(model(tokens, think_iterations=1).logits, base(tokens).logits)


def loss_of(model: MullForCausalLM, tokens: Tensor) -> Tensor:
    labels = torch.where(torch.arange(tokens.shape[1]) < 4, -100, tokens)
    loss = model(tokens, labels=labels, use_cache=False).loss
    assert loss is not None
    return loss


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("use_gumbel", [False, True])
@pytest.mark.latin(8, "family", "granularity", "use_gumbel")
def test_every_router_parameter_learns_and_training_is_hard(
    family: str, granularity: Any, use_gumbel: bool, exact: Exact, ids: Ids
) -> None:
    model, tokens = routed(exact(family), granularity=granularity, use_gumbel=use_gumbel), ids(ROWS, TOKENS)
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    with torch.no_grad():
        expected = loss_of(model, tokens)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        loss = loss_of(model, tokens)
        if not use_gumbel:
            torch.testing.assert_close(loss, expected, atol=EXACT, rtol=0)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, parameter in model.etd.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, atol=EXACT, rtol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_plain_call_with_labels_trains_the_routers(granularity: Any, exact: Exact, ids: Ids) -> None:
    """The backbone's configuration has it fill a cache, which says nothing about whether it trains."""
    model, tokens = routed(exact("qwen3_5"), granularity=granularity).train(), ids(ROWS, TOKENS)
    gradients = []
    for options in ({}, {"use_cache": False}):
        model.zero_grad()
        model(tokens, labels=torch.where(torch.arange(TOKENS) < 4, -100, tokens), **options).loss.backward()
        assert model.etd is not None
        assert model.etd.layer_routers is not None
        gradients.append([parameter.grad for parameter in model.etd.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        assert expected.any()
        torch.testing.assert_close(ours, expected, atol=EXACT, rtol=1e-6)


@torch.no_grad()
def test_the_prompt_is_marked_as_attention_masks_are(exact: Exact, ids: Ids) -> None:
    model, tokens = routed(exact("qwen3")), ids(ROWS, TOKENS)
    prompt = (torch.arange(TOKENS) < 7).expand(ROWS, -1)
    expected = model(tokens, prompt_mask=prompt, use_cache=False).logits
    assert torch.equal(model(tokens, prompt_mask=prompt.long(), use_cache=False).logits, expected)
    with pytest.raises(ValueError, match="prompt_mask"):
        model(tokens, prompt_mask=prompt[:, :5])


@torch.no_grad()
def test_without_a_prompt_the_first_real_token_decides(exact: Exact, ids: Ids) -> None:
    """Logits of a call without a cache may be probabilities of its own tokens, which no router may have seen."""
    model, tokens = routed(exact("qwen3")), ids(ROWS, TOKENS)
    mask = (torch.arange(TOKENS) >= 2).long().expand(ROWS, -1)  # padded on the left
    for options, first in (({}, 0), ({"attention_mask": mask}, 2)):
        expected = actions_of(model(tokens, use_cache=False, **options))
        changed = torch.where(torch.arange(TOKENS) > first, (tokens + 1) % 97, tokens)
        assert torch.equal(actions_of(model(changed, use_cache=False, **options)), expected)
        changed[:, first] = (changed[:, first] + 40) % 97
        assert not torch.equal(actions_of(model(changed, use_cache=False, **options)), expected)


@pytest.mark.parametrize("scope", ["think", "all"])
@pytest.mark.parametrize("num_actions", [2, 3])
@torch.no_grad()
def test_tokens_stop_where_they_do_without_routers(num_actions: Any, scope: Any, exact: Exact, ids: Ids) -> None:
    base, tokens = exact("qwen3_5"), ids(ROWS, TOKENS)
    halting = HaltingConfig(rule="state", threshold=0.9, stop="last_kv")
    fields = SPLIT.model_dump() | {"max_think_iterations": 4, "halting": halting}
    router = LayerRouterConfig(num_actions=num_actions, scope=scope)
    plain, model = (
        wrap_transformer_with_etd(base, ETDConfig(**fields | more)).eval() for more in ({}, {"layer_router": router})
    )
    expected, found = (each(tokens, adaptive=True, use_cache=False) for each in (plain, model))
    depths = expected.metrics["think_iterations"]
    assert len(depths.unique()) > 1
    assert torch.equal(found.metrics["think_iterations"], depths)
    torch.testing.assert_close(found.logits, expected.logits, atol=EXACT, rtol=0)
    given = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 4 + 1
    states = [each.hidden_states(tokens, policy=each.model.given_depths(given)) for each in (plain, model)]
    torch.testing.assert_close(*states, atol=EXACT, rtol=0)


@torch.no_grad()
def test_a_long_prompt_is_read_whole(exact: Exact, ids: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = routed(exact("qwen3")), ids(ROWS, TOKENS)
    expected = mull.generate(model, tokens, max_new_tokens=6, eos_token_id=(), pad_token_id=0).sequences
    monkeypatch.setattr("mull.decoding.rounds.PREFILL_TOKENS", 3)
    found = mull.generate(model, tokens, max_new_tokens=6, eos_token_id=(), pad_token_id=0).sequences
    assert torch.equal(found, expected)


def test_optimizers_that_share_the_routers_count_a_step_once(exact: Exact, ids: Ids) -> None:
    model, tokens = routed(exact("qwen3"), granularity="token").train(), ids(ROWS, TOKENS)
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    groups = [[p for p in model.etd.parameters() if (p.ndim == 2) is matrix] for matrix in (True, False)]
    optimizers = [torch.optim.SGD(group, lr=0.0) for group in groups]
    others = torch.optim.SGD(model.lm_head.parameters(), lr=0.0)
    loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
    for optimizer in (*optimizers, others):
        optimizer.step()
    assert int(model.etd.layer_routers.n_steps) == 1


def test_the_warm_up_counts_optimizer_steps(exact: Exact, ids: Ids, tmp_path: Any) -> None:
    model, tokens = routed(exact("qwen3"), granularity="token"), ids(ROWS, TOKENS)
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    model.etd.layer_routers.warmup_steps = 2
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def executes() -> bool:
        return bool((actions_of(model(tokens, use_cache=False)) == EXECUTE).all())

    for step in range(2):
        assert executes()
        model.eval()
        assert executes(), "evaluation counts nothing, and warms up, too"
        model.train()
        for _ in range(4):  # accumulated
            loss_of(model, tokens).backward()  # type: ignore[no-untyped-call]
        assert int(model.etd.layer_routers.n_steps) == step
        optimizer.step()
        model.save_pretrained(tmp_path)
        model = MullForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert model.etd is not None
        assert model.etd.layer_routers is not None
        model.etd.layer_routers.warmup_steps = 2
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model.train()
        assert int(model.etd.layer_routers.n_steps) == step + 1
    assert not executes()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_routers_learn_while_they_warm_up(granularity: Any, exact: Exact, ids: Ids) -> None:
    """Otherwise nothing would depend on a parameter that is trained, where the backbone is frozen."""
    model, tokens = routed(exact("qwen3"), granularity=granularity).train(), ids(ROWS, TOKENS)
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    model.etd.layer_routers.warmup_steps = 1
    model.requires_grad_(False)
    model.etd.requires_grad_(True)
    labels = torch.where(torch.arange(TOKENS) < 4, -100, tokens)
    loss = model(tokens, labels=labels).loss
    plain = model(tokens, labels=labels, path=SPLIT.path(ITERATIONS)).loss
    assert torch.equal(loss, plain), "and every layer runs once"
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.etd.parameters())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@torch.no_grad()
def test_statistics_are_those_of_the_decisions(granularity: Any, exact: Exact, ids: Ids) -> None:
    model, tokens = routed(exact("qwen3"), granularity=granularity), ids(ROWS, TOKENS)
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    model.etd.reset_stats()
    actions = actions_of(model(tokens, use_cache=False))
    if granularity == "sequence":
        actions = actions[..., :1]
    counts = [int((actions == action).sum()) for action in (SKIP, EXECUTE, REPEAT)]
    assert [*model.etd.get_router_stats().values()] == counts
    model.etd.reset_stats()
    assert sum(model.etd.get_router_stats().values()) == 0


def test_routing_policies_are_those_of_the_model(exact: Exact, ids: Ids) -> None:
    model = routed(exact("qwen3"), adaptive=True)
    assert model.etd_config is not None
    assert model.etd_config.stop == "active_only"
    with pytest.raises(ValueError, match="stop='active_only'"):
        model(ids(1, 4), adaptive=HaltingConfig(stop="last_kv"))
    with pytest.raises(ValueError, match="same value"):
        ETDConfig.model_validate(
            SPLIT.model_dump() | {"halting": {"stop": "own_state"}, "layer_router": {"stop": "last_kv"}}
        )
    with pytest.raises(ValueError, match="compile"):
        mull.generate(model, ids(1, 4), max_new_tokens=2, compile=True)


@pytest.mark.latin(3)
@pytest.mark.parametrize("use_gumbel", [False, True])
@pytest.mark.parametrize("right", [SKIP, REPEAT])
@pytest.mark.parametrize("seed", range(3))
def test_routers_learn_which_layer_to_skip_and_which_to_repeat(right: int, use_gumbel: bool, seed: int) -> None:
    """One layer adds a fixed step to the stream, and the teacher takes the step never, or twice."""
    base = tiny("qwen3", seed=seed, dtype=torch.float64).eval()
    layer = base.model.layers[3]
    torch.manual_seed(seed)
    step = torch.randn(base.config.hidden_size, dtype=torch.float64)
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)
    layer.register_forward_hook(lambda _module, _args, out: out + step)
    config = ETDConfig(
        n_encoder_layers=3,
        n_think_layers=1,
        n_decoder_layers=4,
        max_think_iterations=1,
        layer_router=LayerRouterConfig(hidden_size=8, granularity="token", use_gumbel=use_gumbel),
        router_warmup_steps=0,
    )
    model = wrap_transformer_with_etd(base, config)
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    tokens = torch.randint(0, 97, (4, 16))
    with torch.no_grad():
        taught = model(tokens, path=from_layers([0, 1, 2, *[3] * right, 4, 5, 6, 7])).logits
    model.train().requires_grad_(False)
    model.etd.requires_grad_(True)
    optimizer = torch.optim.Adam(model.etd.parameters(), lr=0.05)
    for _ in range(60):
        loss = (model(tokens, use_cache=False).logits - taught).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    actions = actions_of(model(tokens, use_cache=False))
    assert (actions == right).double().mean() > 0.95
