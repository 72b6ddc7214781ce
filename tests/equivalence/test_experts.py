"""Claim: tokens choose the same LoRA experts, and the model computes the same, however the tokens are divided into calls.

And a chosen expert is what LoRA says: the model with that expert's update merged into its weights. All in fp64.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EXACT, SPLIT, tiny
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import mull
from mull import (
    ETDConfig,
    HaltingConfig,
    LayerRouterConfig,
    LoRAExpertConfig,
    MTPConfig,
    MullForCausalLM,
    wrap_transformer_with_etd,
)
from mull.layers.experts import LoRABranches
from mull.model.experts import Experts

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]

ROWS, TOKENS, ITERATIONS, EXPERTS = 3, 12, 2, 3
SOME = ["qwen3", "olmo3", "qwen3_next-moe", "qwen3_5", "olmo_hybrid"]
GRANULARITIES = ["sequence", "token"]
MAPS = ("q_proj", "v_proj", "o_proj", "down_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_q", "out_proj")
"""Of attention, of recurrent layers and of feed-forward layers."""


def experts_of(model: MullForCausalLM) -> Experts:
    assert model.etd is not None
    assert model.etd.experts is not None
    return model.etd.experts


def branches_of(model: MullForCausalLM) -> dict[str, LoRABranches]:
    return {name: part for name, part in model.named_modules() if isinstance(part, LoRABranches)}


def with_experts(
    base: PreTrainedModel,
    mtp: MTPConfig | None = None,
    *,
    scale: float = 1.0,
    adaptive: bool = False,
    routers: Any = None,
    **fields: Any,
) -> MullForCausalLM:
    """A model whose gate chooses at random between random experts; a `scale` of 30 leaves no close calls."""
    settings = LoRAExpertConfig(**{"rank": 4, "alpha": 8.0, "target_modules": MAPS} | fields)
    changes: dict[str, Any] = {"lora_expert": settings, "num_lora_experts": EXPERTS, "expert_warmup_steps": 0}
    if routers:
        changes |= {"layer_router": LayerRouterConfig(hidden_size=8, granularity=routers), "router_warmup_steps": 0}
    if adaptive:
        changes["halting"] = HaltingConfig(rule="state", threshold=0.9, stop="own_state")
    config = ETDConfig(**SPLIT.model_dump() | {"max_think_iterations": ITERATIONS} | changes)
    model = wrap_transformer_with_etd(base, config, mtp).eval()
    experts = experts_of(model)
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(experts.gate.weight, std=scale, generator=generator)
    for branches in branches_of(model).values():
        nn.init.normal_(branches.lora_B, std=0.3, generator=generator)
    if routers:
        assert model.etd is not None
        assert model.etd.layer_routers is not None
        for router in model.etd.layer_routers.by_layer.values():
            nn.init.normal_(router.out.weight, generator=generator)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(router.out.bias)  # type: ignore[union-attr, arg-type]
    return model


def chosen_by(out: Any) -> Tensor:
    """``[iterations, B, T]``."""
    return torch.stack(out.metrics["expert_selections"])


def in_calls(model: MullForCausalLM, tokens: Tensor, lengths: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    cache, start, logits, chosen = model.new_cache(), 0, [], []
    for length in lengths:
        out = model(tokens[:, start : start + length], past_key_values=cache, use_cache=True, **options)
        logits.append(out.logits)
        chosen.append(chosen_by(out))
        start += length
    return torch.cat(logits, 1), torch.cat(chosen, 2)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("routers", [None, "sequence"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.latin(16, "family", "adaptive", "routers", "scale")
@torch.no_grad()
def test_tokens_choose_the_same_in_one_call_and_in_many(
    family: str, adaptive: bool, routers: Any, scale: float, exact: Exact, ids: Ids
) -> None:
    model = with_experts(exact(family), scale=scale, adaptive=adaptive, routers=routers)
    tokens, n_prompt = ids(ROWS, TOKENS), 5
    prompt = (torch.arange(TOKENS) < n_prompt).expand(ROWS, -1)
    whole = model(tokens, use_cache=False, adaptive=adaptive, prompt_mask=prompt)
    assert set(chosen_by(whole).unique().tolist()) == set(range(EXPERTS))
    for lengths in ([n_prompt] + [1] * (TOKENS - n_prompt), [n_prompt, 1, 6]):
        logits, chosen = in_calls(model, tokens, lengths, adaptive=adaptive)
        assert torch.equal(chosen, chosen_by(whole))
        torch.testing.assert_close(logits, whole.logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("family_name", SOME)
@torch.no_grad()
def test_experts_of_rows_are_chosen_on_the_prompt_and_stay(family_name: str, exact: Exact, ids: Ids) -> None:
    model, tokens, n_prompt = with_experts(exact(family_name), granularity="sequence"), ids(ROWS, TOKENS), 8
    prompt = (torch.arange(TOKENS) < n_prompt).expand(ROWS, -1)
    expected = model(tokens, use_cache=False, prompt_mask=prompt)
    chosen = chosen_by(expected)
    assert torch.equal(chosen, chosen[..., :1].expand_as(chosen)), "one choice for a row"
    assert len(chosen.unique()) > 1
    changed = torch.where(prompt, tokens, (tokens + 1) % 97)
    assert torch.equal(chosen_by(model(changed, use_cache=False, prompt_mask=prompt)), chosen)
    labels = torch.where(prompt, -100, tokens)
    assert torch.equal(model(tokens, use_cache=False, labels=labels).logits, expected.logits), (
        "the prompt has no labels"
    )
    cache = model.new_cache()
    cache.activate_past_recording()
    model(tokens[:, :n_prompt], past_key_values=cache)
    order = torch.tensor([2, 0, 2])
    cache.reorder_cache(order)
    model(tokens[order, 8:11], past_key_values=cache)
    cache.crop(-2)
    cache.batch_select_indices(torch.tensor([0, 1]))
    out = model(tokens[order[:2], 9:], past_key_values=cache)
    torch.testing.assert_close(out.logits, expected.logits[order[:2], 9:], atol=EXACT, rtol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("side", ["left", "right", "packed"])
@pytest.mark.latin(20, "family", "granularity", "side")
@torch.no_grad()
def test_padding_other_rows_and_other_documents_choose_nothing(
    family: str, granularity: Any, side: str, exact: Exact, ids: Ids
) -> None:
    model, tokens, padding = with_experts(exact(family), granularity=granularity), ids(ROWS, TOKENS), 3
    filling = ids(ROWS, padding, seed=7)
    real = slice(0, TOKENS) if side == "right" else slice(padding, None)
    padded = torch.cat([tokens, filling] if side == "right" else [filling, tokens], 1)
    options: dict[str, Any] = {"prompt_mask": torch.ones_like(padded)}
    if side == "left":
        options["prompt_mask"][:, :padding] = 0
    if side == "packed":
        options["position_ids"] = torch.cat([torch.arange(padding), torch.arange(TOKENS)]).expand(ROWS, -1)
    else:
        options["attention_mask"] = torch.zeros_like(padded)
        options["attention_mask"][:, real] = 1
        options["position_ids"] = (options["attention_mask"].cumsum(1) - 1).clamp(min=0)
    experts_of(model).reset_stats()
    out = model(padded, use_cache=False, **options)
    n_decisions = {"token": ROWS * TOKENS, "sequence": ROWS}[granularity]
    if side != "packed":
        assert sum(experts_of(model).selections) == ITERATIONS * n_decisions
    for row in range(ROWS):
        alone = model(tokens[row : row + 1], use_cache=False, prompt_mask=torch.ones(1, TOKENS))
        assert torch.equal(chosen_by(out)[:, row, real], chosen_by(alone)[:, 0])
        torch.testing.assert_close(out.logits[row, real], alone.logits[0], atol=EXACT, rtol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("draft_length", [None, 0, 2])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.latin(48, "family", "granularity", "draft_length", "adaptive")
@torch.no_grad()
def test_both_generators_write_the_same_text_with_and_without_drafts(
    family: str, granularity: Any, draft_length: int | None, adaptive: bool, exact: Exact, ids: Ids
) -> None:
    mtp = MTPConfig(num_predict_tokens=2, mtp_head_type="sequential")
    model = with_experts(exact(family), mtp, granularity=granularity, adaptive=adaptive)
    tokens, options = ids(2, 6), {"max_new_tokens": 8, "eos_token_id": ()}
    expected = model.generate(tokens, do_sample=False, max_new_tokens=8, eos_token_id=None, adaptive=adaptive)
    draft = None if draft_length is None else "mtp"
    found = mull.generate(model, tokens, draft=draft, draft_length=draft_length, adaptive=adaptive, **options)
    assert torch.equal(found.sequences, expected)
    for branches in branches_of(model).values():
        nn.init.zeros_(branches.lora_B)
    assert not torch.equal(found.sequences, mull.generate(model, tokens, adaptive=adaptive, **options).sequences)


def merged(model: MullForCausalLM, base: PreTrainedModel, expert: int) -> MullForCausalLM:
    """The model without experts, and this one's update in its weights."""
    changed = copy.deepcopy(base)
    experts = experts_of(model)
    for number in SPLIT.think_layers:
        own: Any = experts.layers[str(number)]
        for name, path in own.paths.items():
            linear, branches = changed.model.layers[number].get_submodule(path), own.maps[name]
            linear.weight.data += branches.scale * branches.lora_B[expert] @ branches.lora_A[expert]
    return wrap_transformer_with_etd(changed, SPLIT)


@torch.no_grad()
def test_an_expert_is_its_lora_merged_into_the_weights(family: str, exact: Exact, ids: Ids) -> None:
    base, tokens = exact(family), ids(ROWS, TOKENS)
    model = with_experts(base)
    plain = wrap_transformer_with_etd(base, SPLIT).eval()
    for expert in range(EXPERTS):
        experts_of(model).bias.copy_(10.0 * torch.eye(EXPERTS)[expert])  # everybody's choice
        expected = merged(model, base, expert).eval()
        for options in ({}, {"path": [(0, 0), (3, 0), (3, 1), (5, 0), (7, 0)]}):
            found = model(tokens, use_cache=False, **options).logits
            asked = options or {"think_iterations": ITERATIONS}
            torch.testing.assert_close(found, expected(tokens, use_cache=False, **asked).logits, atol=EXACT, rtol=0)
            assert (found - plain(tokens, use_cache=False, **asked).logits).abs().max() > 1e-3
    assert base(tokens).logits.equal(plain(tokens, think_iterations=1).logits), "the base model shares only the layers"


@torch.no_grad()
def test_tokens_with_different_experts_each_take_their_own(exact: Exact, ids: Ids) -> None:
    """Against a linear map written out: for every token the matrices of the expert that it chose."""
    base, tokens = exact("qwen3"), ids(ROWS, TOKENS)
    model = with_experts(base)
    out = model(tokens, use_cache=False)
    expected, calls = wrap_transformer_with_etd(copy.deepcopy(base), SPLIT).eval(), [0]
    for number in SPLIT.think_layers:
        own: Any = experts_of(model).layers[str(number)]
        for name, path in own.paths.items():

            def add(_module: Any, args: Any, output: Tensor, branches: Any = own.maps[name]) -> Tensor:
                chosen = out.metrics["expert_selections"][calls[0]]
                inner = torch.einsum("bti,btri->btr", args[0], branches.lora_A[chosen])
                return output + branches.scale * torch.einsum("btr,btor->bto", inner, branches.lora_B[chosen])

            expected.model.layers[number].get_submodule(path).register_forward_hook(add)
    last = expected.model.layers[SPLIT.think_layers[-1]]
    last.register_forward_hook(lambda *_: calls.append(calls.pop() + 1))
    found = expected(tokens, use_cache=False, think_iterations=ITERATIONS).logits
    torch.testing.assert_close(out.logits, found, atol=EXACT, rtol=0)


@torch.no_grad()
def test_new_experts_change_nothing(family: str, exact: Exact, ids: Ids) -> None:
    base, tokens = exact(family), ids(ROWS, TOKENS)
    config = SPLIT.model_copy(update={"lora_expert": LoRAExpertConfig(target_modules=MAPS), "expert_warmup_steps": 0})
    model = wrap_transformer_with_etd(base, config).eval()  # certifies identity
    plain = wrap_transformer_with_etd(base, SPLIT).eval()
    for iterations in (1, 3):
        found, expected = (each(tokens, think_iterations=iterations).logits for each in (model, plain))
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"no such linear map. It has q_proj"):
        wrap_transformer_with_etd(
            exact("qwen3"), SPLIT.model_copy(update={"lora_expert": LoRAExpertConfig(target_modules=("wq",))})
        )


def trained_loss(model: MullForCausalLM, tokens: Tensor, **options: Any) -> Tensor:
    labels = torch.where(torch.arange(tokens.shape[1]) < 4, -100, tokens)
    loss = model(tokens, labels=labels, **options).loss
    assert loss is not None
    return loss


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("routers", [None, "token"])
@pytest.mark.latin(12, "family", "granularity", "routers")
def test_everything_learns_and_training_is_hard(
    family: str, granularity: Any, routers: Any, exact: Exact, ids: Ids
) -> None:
    model = with_experts(exact(family), granularity=granularity, routers=routers)
    tokens, results = ids(ROWS, TOKENS), []
    with torch.no_grad():
        expected = trained_loss(model, tokens, use_cache=False)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss = trained_loss(model, tokens, use_cache=False)
        torch.testing.assert_close(loss, expected, atol=EXACT, rtol=0)
        loss.backward()  # type: ignore[no-untyped-call]
        results.append(({name: p.grad for name, p in model.named_parameters()}, copy.deepcopy(experts_of(model)._load)))
        experts_of(model)._load = 0
    for name, parameter in experts_of(model).named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    for name, gradient in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], gradient, msg=name, atol=EXACT, rtol=1e-6)
    assert torch.equal(results[0][1], results[1][1]), "running a layer again counts nothing"
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="Reentrant"):
        trained_loss(model, tokens)


@torch.no_grad()
def test_the_bias_chooses_and_does_nothing_else(exact: Exact, ids: Ids) -> None:
    model, tokens = with_experts(exact("qwen3")), ids(1, 1)
    before = model(tokens, use_cache=False)
    chosen = int(chosen_by(before)[0])
    experts_of(model).bias[chosen] += 0.3
    assert torch.equal(model(tokens, use_cache=False).logits, before.logits)
    experts_of(model).bias[chosen] -= 10.0
    assert int(chosen_by(model(tokens, use_cache=False))[0]) != chosen


def test_the_bias_stays_in_fp32(tmp_path: Any) -> None:
    model = with_experts(tiny("qwen3"))
    experts_of(model).bias.copy_(torch.tensor([0.1, 1e-7, -0.001]))
    expected = experts_of(model).bias.clone()
    model.half()
    model.to(torch.bfloat16)
    assert experts_of(model).gate.weight.dtype == torch.bfloat16
    assert torch.equal(experts_of(model).bias, expected)
    experts_of(model).n_steps += 7
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(experts_of(loaded).bias, expected)
        assert int(experts_of(loaded).n_steps) == 7


@pytest.mark.slow
def test_the_load_becomes_even_and_every_optimizer_does_it(exact: Exact, ids: Ids) -> None:
    model, tokens = with_experts(exact("qwen3"), balance_rate=0.01).train(), ids(4, 48)
    experts = experts_of(model)
    experts.bias[0] = 0.2  # nearly everybody's choice
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.0)
    imbalance = []
    for _ in range(40):
        for part in tokens.split(2):
            trained_loss(model, part).backward()  # type: ignore[no-untyped-call]
        assert isinstance(experts._load, Tensor)
        load = experts._load.float()
        assert load.sum() == ITERATIONS * tokens.numel(), "both micro-batches"
        imbalance.append(float(load.max() / load.mean()) - 1)
        optimizer.step()
    assert imbalance[0] > 1, imbalance
    assert max(imbalance[-5:]) < 0.3
    before = experts.bias.clone()
    trained_loss(model, tokens).backward()  # type: ignore[no-untyped-call]
    assert model.etd is not None
    model.etd.update_expert_bias(lr=0.5)
    assert (experts.bias - before).abs().max() == 0.5
    before = experts.bias.clone()
    trained_loss(model, tokens).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert torch.equal(experts.bias, before), "who has called update_expert_bias goes on to do so"
    with torch.no_grad():
        model(tokens)
    model.eval()(tokens)
    load = copy.deepcopy(experts._load)
    model.etd.reset_stats()
    assert torch.equal(torch.as_tensor(experts._load), torch.as_tensor(load)), "statistics are not the load"
    assert model.etd.get_router_stats()["expert_counts"] == [0] * EXPERTS


def test_experts_are_drawn_while_they_warm_up(exact: Exact, ids: Ids) -> None:
    model, tokens = with_experts(exact("qwen3"), balance_rate=0.0), ids(16, 32)
    experts = experts_of(model)
    experts.warmup_steps = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gated = chosen_by(model(tokens))
    assert torch.equal(chosen_by(model(tokens)), gated), "in use the gate chooses"
    model.train()
    out = model(tokens, labels=tokens)
    shares = chosen_by(out).flatten().bincount().double() / chosen_by(out).numel()
    assert (shares - 1 / EXPERTS).abs().max() < 0.05
    assert not torch.equal(chosen_by(out), gated)
    out.loss.backward()
    assert experts.gate.weight.grad is not None
    assert experts.gate.weight.grad.any()
    optimizer.step()
    assert torch.equal(chosen_by(model(tokens)), gated)
    experts.warmup_steps = 1000
    assert not torch.equal(chosen_by(model(tokens)), gated)
    experts.requires_grad_(False)
    assert torch.equal(chosen_by(model(tokens)), gated), "frozen experts have no warm-up to end"


@torch.no_grad()
def test_a_token_costs_one_branch_and_a_traced_graph_gives_the_same(exact: Exact, monkeypatch: Any) -> None:
    costs, x = [], torch.randn(24, 32, dtype=torch.float64)
    for n_experts in (1, 8):
        branches = LoRABranches(32, 16, n_experts, rank=4, scale=2.0, dropout=0.0).double()
        nn.init.normal_(branches.lora_B)
        gates = nn.functional.one_hot(torch.arange(24) % n_experts, n_experts).double()
        counter = FlopCounterMode(display=False)
        with counter:
            found = branches(x, mull.layers.experts.Gates(gates))
        costs.append(counter.get_total_flops())
    assert costs[0] == costs[1] == 2 * 24 * 4 * (32 + 16)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(branches(x, mull.layers.experts.Gates(gates)), found, atol=1e-12, rtol=0)


@torch.no_grad()
def test_an_expert_is_an_adapter_of_peft_and_the_other_way_round(exact: Exact, ids: Ids, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    base, tokens = exact("qwen3_5"), ids(ROWS, TOKENS)
    model, expert = with_experts(base), 1
    mull.export_expert(model, expert, tmp_path)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    bias = experts_of(model).bias
    bias[expert] = 10.0  # everybody's choice
    expected = model(tokens, think_iterations=1).logits
    torch.testing.assert_close(adapted(tokens).logits, expected, atol=EXACT, rtol=0)
    for fields in ({}, {"rank": 6, "alpha": 3.0}):
        other = with_experts(base, **fields)
        experts_of(other).bias[0] = 10.0
        assert (other(tokens, think_iterations=1).logits - expected).abs().max() > 1e-3
        mull.load_expert(other, 0, tmp_path)
        torch.testing.assert_close(other(tokens, think_iterations=1).logits, expected, atol=EXACT, rtol=0)
    for fields, message in (({"rank": 2}, "rank 4"), ({"target_modules": ("q_proj",)}, "changes model.layers")):
        with pytest.raises(ValueError, match=message):
            mull.load_expert(with_experts(base, **fields), 0, tmp_path)
    with pytest.raises(ValueError, match="expert"):
        mull.load_expert(model, EXPERTS, tmp_path)
    with pytest.raises(ValueError, match="no LoRA experts"):
        mull.export_expert(wrap_transformer_with_etd(base, SPLIT), 0, tmp_path)


def test_adapters_of_peft_go_beside_routers_and_experts(ids: Ids, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model, tokens = with_experts(tiny("qwen3"), routers="token"), ids(ROWS, TOKENS)
    before = model(tokens, use_cache=False).logits
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    assert torch.equal(adapted(tokens, use_cache=False).logits, before)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    adapted.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in trained), "routers are no maps to adapt"
    optimizer.step()
    after = adapted.eval()(tokens, use_cache=False).logits
    assert (after - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert torch.equal(loaded(tokens, use_cache=False).logits, after)
    merged = loaded.merge_and_unload()(tokens, use_cache=False).logits
    torch.testing.assert_close(merged, after, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_emptied_cache_has_no_decisions(exact: Exact, ids: Ids) -> None:
    model = with_experts(exact("qwen3"), granularity="sequence", scale=30.0)
    cache = model.new_cache()
    model(ids(ROWS, 6), past_key_values=cache)
    cache.crop(-6)
    other = ids(ROWS, 6, seed=5)
    found = model(other, past_key_values=cache).logits
    assert torch.equal(found, model(other, past_key_values=model.new_cache()).logits)


def test_adapters_that_change_more_than_a_lora_are_refused(ids: Ids, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model = with_experts(tiny("qwen3"))
    for options in ({"init_lora_weights": "pissa"}, {"use_dora": True}, {"alora_invocation_tokens": [90]}):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        peft.get_peft_model(tiny("qwen3"), config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no plain LoRA adapter"):
            mull.load_expert(model, 0, tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        mull.load_expert(model, 0, "nowhere")


def test_padding_is_no_load(exact: Exact, ids: Ids) -> None:
    model, tokens = with_experts(exact("qwen3")).train(), ids(ROWS, TOKENS)
    mask = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [5], [3]])).long()
    model(tokens, attention_mask=mask, labels=tokens.where(mask == 1, -100), use_cache=False)
    assert int(torch.as_tensor(experts_of(model)._load).sum()) == ITERATIONS * int(mask.sum())
    assert sum(experts_of(model).selections) == ITERATIONS * int(mask.sum())
