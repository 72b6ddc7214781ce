"""Claim: gates on the output of attention compute ``o_proj(heads · 2 σ(W x))`` on the tokens that a layer is handed.

They follow every token through caches, loops, stops, routes, documents and drafts, they start as no gates, and the backbone that
shares the layers has none. In fp64 where not said otherwise.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import accelerate
import jaxtyping
import pytest
import torch
from conftest import EXACT, FAMILIES, SPLIT, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import mull
from mull import (
    ETDConfig,
    GatedAttentionConfig,
    HaltingConfig,
    LayerRouterConfig,
    LoRAExpertConfig,
    MTPConfig,
    MullForCausalLM,
    wrap_transformer_with_etd,
)
from mull.layers.output_gate import OutputGate
from mull.model.attention_gates import AttentionGates

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]

ROWS, TOKENS = 3, 12
PLAIN = [name for name in FAMILIES if not name.startswith("qwen3_")]
"""Families whose attention has no gate of its own."""
GRANULARITIES = ["head", "element"]


def gates_of(model: MullForCausalLM) -> AttentionGates:
    assert model.model.attention_gates is not None
    return model.model.attention_gates


def with_gates(
    base: PreTrainedModel,
    granularity: Any = "head",
    etd: ETDConfig | None = SPLIT,
    mtp: MTPConfig | None = None,
    layers: tuple[int, ...] | None = None,
) -> MullForCausalLM:
    """A model with random gates."""
    gates = GatedAttentionConfig(granularity=granularity, layers=layers)
    model = wrap_transformer_with_etd(base, etd, mtp, gates).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in gates_of(model).parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


def deciding(decides: str | None) -> ETDConfig:
    """A configuration in which tokens stop, or are routed and have experts."""
    changes: dict[str, Any] = {"max_think_iterations": 2}
    if decides in ("last_kv", "own_state"):
        changes |= {"adaptive_depth": True, "halting": HaltingConfig(threshold=0.9, stop=decides)}
    if decides == "routers":
        changes |= {"layer_router": LayerRouterConfig(hidden_size=8, granularity="token"), "router_warmup_steps": 0}
        changes |= {"lora_expert": LoRAExpertConfig(rank=2), "expert_warmup_steps": 0}
    return ETDConfig(**SPLIT.model_dump() | changes)


def with_decisions(base: PreTrainedModel, granularity: Any, decides: str | None, **options: Any) -> MullForCausalLM:
    model = with_gates(base, granularity, deciding(decides), **options)
    generator = torch.Generator().manual_seed(2)
    routers = None if model.etd is None else model.etd.layer_routers
    for router in () if routers is None else routers.by_layer.values():
        nn.init.normal_(router.out.weight, std=3.0, generator=generator)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(router.out.bias)  # type: ignore[union-attr, arg-type]
    return model


@pytest.mark.parametrize("family_name", PLAIN)
@torch.no_grad()
def test_gates_multiply_what_the_heads_give(family_name: str, exact: Exact, ids: Ids) -> None:
    """Against a copy of the backbone whose attention modules are replaced by ones with the formula written out."""
    base, tokens = exact(family_name, num_hidden_layers=4), ids(ROWS, TOKENS)
    heads = base.config.num_attention_heads
    for granularity in GRANULARITIES:
        model, expected = with_gates(base, granularity, None), copy.deepcopy(base)
        for name, gate in gates_of(model).items():
            attention = expected.model.layers[int(name)].self_attn
            attend, read = attention.forward, []

            def forward(hidden_states: Tensor, *, attend: Any = attend, read: Any = read, **options: Any) -> Any:
                read.append(hidden_states)
                return attend(hidden_states=hidden_states, **options)

            def o_proj(y: Tensor, w: Any = gate.weight, map_: Any = attention.o_proj, read: Any = read) -> Tensor:
                factor = 2 / (1 + (-(read.pop() @ w.T)).exp())  # type: ignore[operator]
                return y * factor.repeat_interleave(y.shape[-1] // len(w), -1) @ map_.weight.T

            attention.forward = forward
            del attention.o_proj
            attention.o_proj = o_proj
        found = model(tokens, use_cache=False).logits
        torch.testing.assert_close(found, expected(tokens).logits, atol=EXACT, rtol=0)
        assert (found - base(tokens).logits).abs().max() > 1e-2
        assert len(gate.weight) == heads * (1 if granularity == "head" else 16)
        assert len(gates_of(model)) == base.config.num_hidden_layers / (4 if "hybrid" in family_name else 1)


@torch.no_grad()
def test_element_gates_are_those_of_qwen3_5(exact: Exact, ids: Ids) -> None:
    """transformers' own gated attention: the same gates in its query map, its output map doubled, its norms less one."""
    base, tokens = exact("qwen3"), ids(ROWS, TOKENS)
    model, config = with_gates(base, "element", None), base.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    fields = {name: getattr(config, name) for name in (*names, "num_key_value_heads", "pad_token_id", "rms_norm_eps")}
    rope = {**config.rope_parameters, "partial_rotary_factor": 1.0}
    kinds = ["full_attention"] * config.num_hidden_layers
    native = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**fields, rope_parameters=rope, layer_types=kinds)).double().eval()
    weights = {name: value - 1 if "norm" in name else value for name, value in base.state_dict().items()}
    for number, gate in gates_of(model).items():
        place = f"model.layers.{number}.self_attn"
        parts = [weights[f"{place}.q_proj.weight"], gate.weight]
        by_head = [part.unflatten(0, (config.num_attention_heads, config.head_dim)) for part in parts]  # type: ignore[operator, union-attr]
        weights[f"{place}.q_proj.weight"] = torch.cat(by_head, 1).flatten(0, 1)
        weights[f"{place}.o_proj.weight"] = 2 * weights[f"{place}.o_proj.weight"]
    native.load_state_dict(weights)
    torch.testing.assert_close(model(tokens).logits, native(tokens).logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("decides", [None, "last_kv", "own_state", "routers"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family_name", PLAIN)
@pytest.mark.latin(12, "family_name", "granularity", "decides")
@torch.no_grad()
def test_calls_agree_however_tokens_are_divided(
    family_name: str, granularity: Any, decides: Any, exact: Exact, ids: Ids
) -> None:
    mtp = MTPConfig(num_predict_tokens=2, mtp_head_type="sequential")
    model, tokens = with_decisions(exact(family_name), granularity, decides, mtp=mtp), ids(ROWS, TOKENS)
    whole = model(tokens, use_cache=False).logits
    for lengths in ([5] + [1] * 7, [4, 1, 7]):
        cache = model.new_cache()
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split(lengths, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=EXACT, rtol=0)
    padded = torch.cat([ids(ROWS, 3, seed=7), tokens], 1)
    mask = (torch.arange(15) >= 3).long().expand(ROWS, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(found, whole, atol=EXACT, rtol=0)
    positions = torch.cat([torch.arange(3), torch.arange(TOKENS)]).expand(ROWS, -1)
    packed = model(padded, position_ids=positions, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(packed, whole, atol=EXACT, rtol=0)
    text = model.generate(tokens, do_sample=False, max_new_tokens=6, eos_token_id=None)
    for options in ({}, {"draft": "mtp", "draft_length": 2}):
        out = mull.generate(model, tokens, max_new_tokens=6, eos_token_id=(), **options)  # type: ignore[arg-type]
        assert torch.equal(out.sequences, text)
    for parameter in gates_of(model).parameters():
        nn.init.zeros_(parameter)
    assert (model(tokens, use_cache=False).logits - whole).abs().max() > 1e-2


@pytest.mark.parametrize("granularity", ["head", pytest.param("element", marks=pytest.mark.slow)])
@torch.no_grad()
def test_models_share_layers_and_have_their_own_gates(granularity: Any, ids: Ids) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, tokens = tiny("olmo3", dtype=dtype), ids(ROWS, TOKENS)
        before = base(tokens).logits
        fresh = wrap_transformer_with_etd(base, SPLIT, None, GatedAttentionConfig(granularity=granularity))
        assert torch.equal(fresh(tokens, think_iterations=1).logits, before), "open gates are none"
        model, plain = with_gates(base, granularity, layers=(3,)), wrap_transformer_with_etd(base, SPLIT)
        gated = model(tokens, think_iterations=1).logits
        assert not torch.equal(gated, before)
        assert model.model.layers[3].self_attn.q_proj is base.model.layers[3].self_attn.q_proj
        assert model.model.layers[2] is base.model.layers[2], "only layers with gates are twins"
        for other in (fresh, plain, model, base):
            options = {} if other is base else {"think_iterations": 1}
            assert torch.equal(other(tokens, **options).logits, gated if other is model else before)
        base.model.layers[3].self_attn.o_proj.weight.mul_(2)
        assert not torch.equal(model(tokens, think_iterations=1).logits, gated), "weights are shared"
        assert (model.num_parameters() - plain.num_parameters()) == 4 * (1 if granularity == "head" else 16) * 32


@pytest.mark.parametrize("family_name", ["qwen3", pytest.param("olmo_hybrid", marks=pytest.mark.slow)])
def test_gates_learn_from_the_first_step_on_and_checkpointing_changes_nothing(
    family_name: str, exact: Exact, ids: Ids
) -> None:
    model = wrap_transformer_with_etd(exact(family_name), deciding("last_kv"), None, GatedAttentionConfig()).train()
    tokens, gradients = ids(ROWS, TOKENS), []
    for backbone in (True, False):  # a frozen one hands the first layer states without a gradient
        model.model.requires_grad_(backbone)
        gates_of(model).requires_grad_()
        model.gradient_checkpointing_disable()
        for _ in range(2):
            model.zero_grad()
            loss = model(tokens, labels=tokens, use_cache=False).loss
            assert loss is not None
            loss.backward()  # type: ignore[no-untyped-call]
            gradients.append([parameter.grad for parameter in gates_of(model).parameters()])
            model.gradient_checkpointing_enable({"use_reentrant": False})
    for parts in zip(*gradients, strict=True):
        for part in parts:
            assert part is not None
            assert part.any()
            torch.testing.assert_close(part, parts[0], atol=1e-12, rtol=1e-6)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="Reentrant"):
        model(tokens, labels=tokens, adaptive=False)


@torch.no_grad()
def test_copies_and_saved_models_keep_their_gates(ids: Ids, tmp_path: Any) -> None:
    model, tokens = with_gates(tiny("qwen3-tied"), "element"), ids(ROWS, TOKENS)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    saved = mull.from_pretrained(tmp_path)
    assert saved.config.gated_attention == {"granularity": "element", "layers": None}
    for other in (saved, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens).logits, expected)
        for parameter in gates_of(other).parameters():
            parameter.zero_()
        assert not torch.equal(other(tokens).logits, expected)
        assert torch.equal(model(tokens).logits, expected)
    base = tmp_path / "base"
    tiny("qwen3").save_pretrained(base)
    gates = GatedAttentionConfig(layers=(1,))
    loaded = mull.from_pretrained(base, gated_attention=gates)
    assert torch.equal(loaded(tokens).logits, mull.from_pretrained(base)(tokens).logits)
    loaded.save_pretrained(tmp_path / "gated")
    more = mull.from_pretrained(tmp_path / "gated", gated_attention=GatedAttentionConfig(layers=(1, 2)))
    assert set(gates_of(more)) == {"1", "2"}
    assert torch.equal(more(tokens).logits, loaded(tokens).logits)


def test_what_cannot_have_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="qwen3_next gates each element of its output already"):
        wrap_transformer_with_etd(tiny("qwen3_next-dense"), None, None, GatedAttentionConfig())
    with pytest.raises(
        ValueError, match="names 2, which is no layer with softmax attention. Those of this model are 3, 7"
    ):
        wrap_transformer_with_etd(tiny("olmo_hybrid"), None, None, GatedAttentionConfig(layers=(3, 2)))
    with pytest.raises(ValueError, match="names 8"):
        wrap_transformer_with_etd(tiny("qwen3"), None, None, GatedAttentionConfig(layers=(8,)))
    with pytest.raises(ValueError, match="different numbers"):
        GatedAttentionConfig(layers=(1, 1))
    with pytest.raises(TypeError, match="GatedAttentionConfig"):
        wrap_transformer_with_etd(tiny("qwen3"), None, None, "head")  # type: ignore[arg-type]


def test_a_part_of_the_heads_is_refused() -> None:
    gate = OutputGate(8, 4, 2, per_element=False)
    assert gate(torch.ones(3, 8), torch.ones(3, 8)).equal(torch.ones(3, 8))
    with pytest.raises(ValueError, match="here are 4 of 8 values: do not use tensor parallelism"):
        gate(torch.ones(3, 8), torch.ones(3, 4))


@torch.no_grad()
def test_adapters_leave_gates_alone(ids: Ids) -> None:
    peft = pytest.importorskip("peft")
    model, tokens = with_gates(tiny("qwen3"), "element"), ids(ROWS, TOKENS)
    before = model(tokens).logits
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert not any("gates" in name for name, _ in adapted.named_parameters() if "lora" in name)
    after = adapted(tokens).logits
    assert not torch.equal(after, before)
    gates = next(iter(gates_of(model).values()))
    nn.init.zeros_(gates.weight)  # type: ignore[arg-type]
    assert not torch.equal(adapted(tokens).logits, after), "gates still work on the adapted output map"


@torch.no_grad()
def test_gates_work_on_layers_that_accelerate_has_hooked(ids: Ids) -> None:
    tokens = ids(ROWS, TOKENS)
    expected = with_gates(tiny("qwen3"))(tokens).logits
    hooked = tiny("qwen3")
    for module in hooked.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    before = hooked(tokens).logits
    assert torch.equal(with_gates(hooked)(tokens).logits, expected)
    assert torch.equal(hooked(tokens).logits, before)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_has_its_gates(ids: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks cannot be traced
    model, tokens = with_gates(tiny("qwen3", num_hidden_layers=2), "head", None), ids(2, 6)
    mask = torch.ones_like(tokens)
    expected = model(tokens, attention_mask=mask, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(tokens, attention_mask=mask, use_cache=False).logits, expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@torch.no_grad()
def test_gates_come_before_adapters_on_the_output_map(experts: bool, exact: Exact, ids: Ids) -> None:
    """The gated heads enter the adapter, too. So merging it changes nothing, and neither does replacing the map by its copy."""
    peft = pytest.importorskip("peft", reason="needs the extra eval")
    tokens = ids(ROWS, TOKENS)
    lora = LoRAExpertConfig(rank=2, target_modules=("o_proj", "q_proj"))
    model = with_gates(
        exact("qwen3"), etd=ETDConfig(**SPLIT.model_dump() | {"lora_expert": lora} if experts else SPLIT.model_dump())
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    plain = model(tokens).logits
    settings = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, r=4)
    adapted = peft.get_peft_model(model, settings).eval()
    expected = adapted(tokens).logits
    assert (expected - plain).abs().max() > 1e-2
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, atol=EXACT, rtol=0)
    if not experts:  # their updates are hooks of the map itself
        for layer in merged.model.layers:
            new = nn.Linear(*layer.self_attn.o_proj.weight.T.shape, bias=False, dtype=torch.float64)
            new.weight.copy_(layer.self_attn.o_proj.weight)
            layer.self_attn.o_proj = new
        torch.testing.assert_close(merged(tokens).logits, expected, atol=EXACT, rtol=0)
