"""Claim: a hybrid whose layers all keep their attention is the Qwen3 model that it was made from, bit for bit in fp32, whatever
its shape; and what is written is a checkpoint of transformers.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import COMMON, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mull
from mull import CrossArchTransferConfig, ETDConfig, HybridAttentionConfig, create_hybrid_from_qwen3
from mull.retrofit.convert import convert_checkpoint, convert_model
from mull.retrofit.hybrid import GATE_LOGITS, DeltaStart, convert_layer

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide-heads": {"head_dim": 64},
    "yarn": {"rope_parameters": YARN},
    "linear-rope": {"rope_parameters": LINEAR_ROPE, "rms_norm_eps": 1e-5},
    "bias": {"attention_bias": True},
    "moe": {"model_type": "qwen3_moe"},
}
NO_DELTA = CrossArchTransferConfig(hybrid_attention=HybridAttentionConfig(deltanet_layer_pattern=()))


def qwen3(n_layers: int = 4, norms: tuple[float, float] = (0.5, 1.5), **changes: Any) -> PreTrainedModel:
    """A Qwen3 model in which a wrong map shows: no norm is 1, no bias 0, and attention is sharp."""
    if changes.pop("model_type", "qwen3") == "qwen3":
        model = tiny("qwen3", num_hidden_layers=n_layers, **changes)
    else:
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
        config = CONFIG_MAPPING["qwen3_moe"](**{**COMMON, **moe, "num_hidden_layers": n_layers, **changes})
        model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            sharpness = 3.0 if "q_norm" in name else 1.0
            parameter.data.uniform_(*norms, generator=generator).mul_(sharpness)
        elif name.endswith(("bias", "gate.weight")):
            parameter.data.normal_(0, 0.5, generator=generator)
    return model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # padding on the left
    return model(tokens, attention_mask=mask).logits[mask == 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_without_deltanet_layers_nothing_changes(shape, ids):
    source = qwen3(**SHAPES[shape])
    hybrid, coverage = convert_model(source, NO_DELTA)
    assert isinstance(hybrid, Qwen3_5MoeForCausalLM if shape == "moe" else Qwen3_5ForCausalLM)
    tokens = ids(2, 100)
    assert torch.equal(logits(hybrid, tokens), logits(source, tokens))
    assert coverage.used.keys() == source.state_dict().keys()


def test_the_test_sees_a_wrong_map(ids):
    """Each source tensor matters: with another value, logits differ by more than rounding."""
    source, tokens = qwen3(n_layers=2, attention_bias=True), ids(2, 100)
    expected = logits(source, tokens)
    for name, parameter in source.named_parameters():
        kept = parameter.data.clone()
        parameter.data = kept * (1 + 0.1 * torch.randn_like(kept))
        assert (logits(source, tokens) - expected).abs().max() > 1e-4, name
        parameter.data = kept


@pytest.mark.parametrize("gate", GATE_LOGITS)
def test_gates_have_three_starts_and_compute_the_same(gate, ids):
    source, tokens = qwen3(), ids(2, 40)
    settings = NO_DELTA.model_copy(update={"gate_init_strategy": gate})
    hybrid, _ = convert_model(source, settings)
    opened: list[torch.Tensor] = []
    attention = hybrid.model.layers[1].self_attn
    attention.q_proj.register_forward_hook(lambda _m, _i, out: opened.append(out.unflatten(-1, (4, 32))[..., 16:]))
    difference = (logits(hybrid, tokens) - logits(source, tokens)).abs().max()
    assert difference == 0 if gate == "zero" else difference < 1e-4
    value = {"zero": 0.5, "small": 0.6225, "ones": 0.8808}[gate]
    torch.testing.assert_close(opened[0].sigmoid(), torch.full_like(opened[0], value), atol=1e-4, rtol=0)
    assert hybrid.config.attention_bias == (gate != "zero")
    # Gates can learn from the first step.
    hybrid(tokens, labels=tokens).loss.backward()
    gradient = attention.q_proj.weight.grad.unflatten(0, (4, 32))[:, 16:]
    assert gradient.abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_storing_norms_loses_nothing_that_maps_can_take_over(dtype, tied, ids):
    """Norms over five powers of ten, with negative weights and zeros, in half precision; computed in fp32."""
    source = qwen3(tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in source.named_parameters():
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(3).exp()
            parameter.data[::3] *= -1
            parameter.data[5] = 0
    for parameter in source.parameters():  # not `to`, which would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    hybrid, coverage = convert_model(source, NO_DELTA)
    assert {parameter.dtype for parameter in hybrid.parameters()} == {dtype}
    if dtype == torch.bfloat16:
        assert coverage.rounded().keys() == ({"model.norm.weight"} if tied else set())
        if not tied:
            assert torch.equal(logits(hybrid.float(), ids(2, 40)), logits(source.float(), ids(2, 40)))
    else:  # columns underflow, so some channels stay, and the report says by how much they are off
        assert 0 < max(coverage.rounded().values()) < 1


def test_norms_that_need_no_help_leave_the_maps_alone():
    _, coverage = convert_model(qwen3().to(torch.bfloat16), NO_DELTA)
    assert coverage.tensors["model.layers.0.self_attn.k_proj.weight"].origin == "copied"
    assert coverage.tensors["model.layers.0.mlp.up_proj.weight"].origin == "copied"


@torch.no_grad()
def test_a_deltanet_layer_is_the_delta_rule_on_the_teachers_queries_keys_and_values():
    """Against the teacher's own attention module with its keys and values repeated, and the delta rule written out."""
    source = qwen3(n_layers=2, norms=(0.2, 2.0))
    settings = CrossArchTransferConfig(hybrid_attention=HybridAttentionConfig(layers=(0,), half_life=20.0))
    hybrid, _ = convert_model(source, settings)
    attention, delta = source.model.layers[0].self_attn, hybrid.model.layers[0].linear_attn
    states = torch.randn(2, 9, 32)
    x = source.model.layers[0].input_layernorm(states)
    x_of_hybrid = hybrid.model.layers[0].input_layernorm(states)  # some channels have moved into the maps

    def heads(name: str, norm: Any) -> torch.Tensor:
        projected = norm * getattr(attention, name)(x).unflatten(-1, (-1, 16))
        return projected.repeat_interleave(4 // projected.shape[2], 2)  # [B, T, H, K]

    q, k, v = heads("q_proj", attention.q_norm.weight), heads("k_proj", attention.k_norm.weight), heads("v_proj", 1.0)
    unit = torch.nn.functional.normalize
    silu = torch.nn.functional.silu
    q, k, v = unit(silu(0.05 * q), dim=-1), unit(silu(0.05 * k), dim=-1), silu(0.05 * v)
    state, outputs = torch.zeros(2, 4, 16, 16), []
    for t in range(9):
        state = state * 0.5 ** (1 / 20)
        state = state + 0.5 * k[:, t, :, :, None] * (v[:, t] - (k[:, t, :, None] @ state)[:, :, 0])[:, :, None]
        outputs.append((q[:, t, :, None] @ state)[:, :, 0] * 16**-0.5)
    out = torch.stack(outputs, 1)
    out = (
        out
        * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6)
        * silu(delta.in_proj_z(x_of_hybrid)).unflatten(-1, (4, 16))
    )
    torch.testing.assert_close(delta(x_of_hybrid), attention.o_proj(out.flatten(2)), atol=2e-4, rtol=2e-3)


def test_measured_starts_go_where_they_belong():
    source = qwen3(n_layers=1)
    layer = {
        name.removeprefix("model.layers.0."): value for name, value in source.state_dict().items() if "layers.0" in name
    }
    start = DeltaStart(
        half_life=torch.tensor([1.0, 3.0, 700.0, 1e6]),
        gate=torch.randn(32),
        out_scale=torch.tensor([1.0, 2.0, 3.0, 4.0]),
    )
    for dtype, accuracy in ((torch.float32, 1e-5), (torch.bfloat16, 1e-3)):
        halves = {name: value.to(dtype) for name, value in layer.items()}
        made = {
            name: t.value for name, t in convert_layer(halves, source.config, "linear_attention", start=start).items()
        }
        rate = made["linear_attn.A_log"].double().exp() * torch.nn.functional.softplus(
            made["linear_attn.dt_bias"].double()
        )
        torch.testing.assert_close(torch.exp2(-1 / start.half_life.double()), torch.exp(-rate), atol=accuracy, rtol=0)
        torch.testing.assert_close(2.0 ** (-1 / 700), torch.exp(-rate)[2].item(), atol=accuracy / 100, rtol=0)
        assert torch.equal(made["linear_attn.in_proj_z.weight"], start.gate.to(dtype).expand(64, 32))
        expected = halves["self_attn.o_proj.weight"].unflatten(1, (4, 16)) * start.out_scale[:, None].to(dtype)
        torch.testing.assert_close(made["linear_attn.out_proj.weight"], expected.flatten(1))


def test_a_measured_gate_follows_its_norm_into_bf16():
    """Norms far below one move into all maps behind, the measured gate included: the layer computes the same."""
    source = qwen3(n_layers=1, norms=(0.01, 0.4)).to(torch.bfloat16)
    layer = {
        name.removeprefix("model.layers.0."): value for name, value in source.state_dict().items() if "layers.0" in name
    }
    gate = torch.randn(32).to(torch.bfloat16)
    made = convert_layer(layer, source.config, "linear_attention", start=DeltaStart(gate=gate))
    norm = 1 + made["input_layernorm.weight"].value.double()
    assert (norm >= 1).sum() > 10
    read = made["linear_attn.in_proj_z.weight"].value[7].double() * norm
    assert torch.equal(read, gate.double() * layer["input_layernorm.weight"].double())


def test_each_target_depends_on_the_sources_that_the_report_names():
    for kind in ("full_attention", "linear_attention"):
        source = qwen3(n_layers=1, model_type="qwen3_moe")
        layer = {
            name.removeprefix("model.layers.0."): value.clone()
            for name, value in source.state_dict().items()
            if "layers.0" in name
        }
        before = convert_layer(layer, source.config, kind)
        for name in layer:
            after = convert_layer(layer | {name: layer[name] * 1.25}, source.config, kind)
            changed = {target for target in before if not torch.equal(after[target].value, before[target].value)}
            assert changed == {target for target in before if name in before[target].sources}, name


ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    tokens, expected, tied = torch.load(folder + ".pt")
    assert model.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    assert torch.equal(model(tokens, attention_mask=mask).logits[mask == 1], expected), folder
    texts = [model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use) for use in (1, 0)]
    assert texts[0].shape == (2, 25) == texts[1].shape
assert "mull" not in sys.modules
"""


def test_what_is_written_is_a_checkpoint_of_transformers(tmp_path, ids):
    """A fresh process without mull loads it, continues a text, and gets the logits of the model converted in memory."""
    for shape in ("gqa", "tied", "moe"):
        qwen3(**SHAPES[shape]).to(torch.bfloat16).save_pretrained(tmp_path / "source" / shape, max_shard_size="20KB")
        coverage = convert_checkpoint(tmp_path / "source" / shape, tmp_path / shape)
        model, same = convert_model(tmp_path / "source" / shape)
        assert coverage == same
        torch.save((ids(2, 20), logits(model, ids(2, 20)), shape == "tied"), tmp_path / f"{shape}.pt")
        model.save_pretrained(tmp_path / "again")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (shape == "tied")
        assert ("lm_head.weight" in load_file(tmp_path / "again" / "model.safetensors")) == (shape != "tied")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, "gqa", "tied", "moe"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr


def test_the_configuration_says_what_engines_look_for(tmp_path):
    source = qwen3(n_layers=8, rope_parameters=YARN)
    source.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "hybrid")
    config = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]
    assert config["layer_types"] == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert config["full_attention_interval"] == 4
    assert config["attn_output_gate"] is True
    assert (config["partial_rotary_factor"], config["rope_theta"]) == (1.0, 1e4)
    assert config["rope_parameters"] == YARN | {"partial_rotary_factor": 1.0}
    assert config["dtype"] == "float32"
    shapes = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "head_dim": 16}
    assert {name: config[name] for name in shapes} == shapes


def test_a_hybrid_is_a_model_of_mull(ids):
    """Cached = uncached, and loops over whole periods of attention leave one iteration what it was."""
    source = qwen3(n_layers=8)
    hybrid = create_hybrid_from_qwen3(source)
    assert hybrid.get_layer_stats() == {"deltanet_layers": 6, "gated_attention_layers": 2, "total_layers": 8}
    assert not hybrid.training
    tokens = ids(2, 12)
    with torch.no_grad():
        whole = hybrid(tokens).logits
        cache = hybrid.new_cache()
        pieces = [hybrid(tokens[:, a:b], past_key_values=cache).logits for a, b in ((0, 7), (7, 8), (8, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=1e-4)
    greedy = [hybrid.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*greedy)

    stock, _ = convert_model(source)
    split = ETDConfig.for_model(stock, split="quarters")
    assert split.n_think_layers % 4 == 0
    looped = mull.wrap_transformer_with_etd(stock, split)
    assert torch.equal(logits_of(looped, tokens, 1), whole)
    assert not torch.equal(logits_of(looped, tokens, 2), whole)


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor, iterations: int) -> torch.Tensor:
    return model(tokens, think_iterations=iterations).logits


def test_a_hybrid_shares_no_memory_with_its_source(ids):
    source = qwen3(tie_word_embeddings=True)
    hybrid = create_hybrid_from_qwen3(source)
    expected = logits(source, ids(2, 9))
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.zero_()
    assert torch.equal(logits(source, ids(2, 9)), expected)
    assert hybrid.lm_head.weight is hybrid.model.embed_tokens.weight
