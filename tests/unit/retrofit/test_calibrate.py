"""Claim: the calibrated start of a DeltaNet layer is what its definition says, however the text is cut into batches.

Distances, gates, scales and ridge maps are compared with sums over whole matrices; and the mixers that stand in for converted
layers compute what the converted model does.
"""

from typing import Any

import pytest
import torch
from conftest import EXACT, tiny
from torch import Tensor
from torch.nn import functional as F

from mull.evaluation.divergence import Silent, row_divergences, step_zero, uniform_divergences
from mull.retrofit import calibrate
from mull.retrofit.calibrate import (
    CalibrationConfig,
    advance,
    apply_starts,
    attention_distance,
    calibrate_starts,
    delta_mixer,
    mixers_in_place,
    trunk_of,
)
from mull.retrofit.convert import convert_model
from mull.retrofit.hybrid import UNIT_SILU, CrossArchTransferConfig, DeltaStart, HybridAttentionConfig

LAYERS = (0, 1, 2)


def teacher(**changes: Any) -> Any:
    """Four softmax layers with norms per head that are not 1, and grouped heads that are wider than the model has room for."""
    model: Any = tiny("qwen3", **{"num_hidden_layers": 4, "head_dim": 12, "initializer_range": 0.15, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm, layer.input_layernorm):
                norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
            layer.self_attn.q_norm.weight.mul_(3)  # attention that is far from uniform
    return model


def texts(rows: int = 6, tokens: int = 40) -> Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_distances_are_those_of_the_whole_attention_matrix(window, chunk, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 40, 8, generator=generator).unbind()
    weight = torch.rand(2, 3, 40, generator=generator)
    scores = query.double() @ key.double().mT * 0.7
    at = torch.arange(40)
    distance = at[:, None] - at
    unseen = (distance < 0) | (distance >= (window or 40))
    read = scores.masked_fill(unseen, -torch.inf).softmax(-1) * weight[:, :, None]
    expected = torch.stack([(read * distance).sum((0, 2, 3)), read.sum((0, 2, 3))])

    monkeypatch.setattr(calibrate, "SCORE_BYTES", chunk * 4 * 2 * 3 * 40)
    torch.testing.assert_close(attention_distance(query, key, weight, 0.7, window), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_lives_are_distances_of_the_layers_own_attention():
    # transformers' own attention matrices, weighted by the norms of its values, at a layer with grouped heads.
    model = teacher()
    model.set_attn_implementation("eager")
    ids = texts()
    out = model(ids, output_attentions=True, output_hidden_states=True)
    layer: Any = model.model.layers[2]
    values = layer.self_attn.v_proj(layer.input_layernorm(out.hidden_states[2])).unflatten(-1, (2, 12))
    read = out.attentions[2] * values.norm(dim=-1).transpose(1, 2).repeat_interleave(2, 1)[:, :, None]
    at = torch.arange(ids.shape[1])
    expected = (read * (at[:, None] - at)).sum((0, 2, 3)) / read.sum((0, 2, 3))

    found = calibrate_starts(model, [ids], [2], progress=False)[2].half_life
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.max() > 1.02 * expected.min(), "heads that read equally far would not tell heads apart"


@torch.no_grad()
def test_a_head_that_reads_only_itself_gets_the_shortest_memory():
    model = teacher(use_sliding_window=True, sliding_window=1, max_window_layers=0)
    found = calibrate_starts(model, [texts()], [0], progress=False)[0]
    assert (found.half_life == calibrate.SHORTEST_HALF_LIFE).all()


def mixer_features(model: Any, number: int, start: DeltaStart, h: Tensor) -> Tensor:
    """What the mixer's output map reads, in one row per token."""
    layer = model.model.layers[number]
    seen: list[Tensor] = []
    mixer: Any = delta_mixer(layer, model.config, start)
    mixer.net.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mixer(layer.input_layernorm(h))
    return seen[0].flatten(0, 1).double()


@torch.no_grad()
def test_maps_are_the_least_squares_solutions(monkeypatch):
    model, ids, number = teacher(), texts(), 1
    out = model(ids, output_hidden_states=True)
    h, layer = out.hidden_states[number], model.model.layers[number]
    x = layer.input_layernorm(h)
    position = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    attended = layer.self_attn(x, position_embeddings=position, attention_mask=None)[0].flatten(0, 1).double()

    monkeypatch.setattr(calibrate, "GATE_RIDGE", 1e-7)  # so small, that what is left is plain least squares
    scaled, ridge = (
        calibrate_starts(model, [ids], [number], CalibrationConfig(output=output, ridge=1e-7), progress=False)[number]
        for output in ("scale", "ridge")
    )
    plain = torch.linalg.lstsq(x.flatten(0, 1).double(), torch.full((ids.numel(), 1), UNIT_SILU).double()).solution[
        :, 0
    ]
    torch.testing.assert_close(scaled.gate.double(), plain, rtol=1e-2, atol=1e-3)

    features = mixer_features(model, number, scaled._replace(out_scale=None), h)  # (N, H K)
    by_head = torch.einsum(
        "nhk,dhk->ndh", features.unflatten(1, (4, 12)), layer.self_attn.o_proj.weight.double().unflatten(1, (4, 12))
    )
    expected = torch.linalg.lstsq(by_head.flatten(0, 1), attended.flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(scaled.out_scale.double(), expected, rtol=1e-3, atol=1e-4)

    best = torch.linalg.lstsq(features, attended).solution
    least, found = (
        (features @ best - attended).square().mean(),
        (features @ ridge.out_proj.double().mT - attended).square().mean(),
    )
    assert found / least - 1 < 1e-3
    assert (
        features @ (scaled.out_scale.repeat_interleave(12) * layer.self_attn.o_proj.weight).double().mT - attended
    ).square().mean() > 1.05 * least


@torch.no_grad()
def test_a_large_penalty_keeps_the_scaled_map():
    model, ids = teacher(), texts()
    scaled, ridge = (
        calibrate_starts(model, [ids], [1], CalibrationConfig(output=output, ridge=1e6), progress=False)[1]
        for output in ("scale", "ridge")
    )
    expected = model.model.layers[1].self_attn.o_proj.weight * scaled.out_scale.repeat_interleave(12)
    torch.testing.assert_close(ridge.out_proj, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_gate_is_open_on_the_calibration_text():
    model, ids = teacher(num_hidden_layers=2), texts(12)
    model.model.embed_tokens.weight.add_(0.3)  # trained models have a common part in all states, too
    layer = model.model.layers[1]
    start = calibrate_starts(model, [ids], [1], progress=False)[1]
    mixer: Any = delta_mixer(layer, model.config, start)
    x = layer.input_layernorm(model(ids, output_hidden_states=True).hidden_states[1])
    opened = F.silu(mixer.net.in_proj_z(x))
    assert (opened - opened[..., :1]).abs().max() < 1e-5, "one gate for all channels"
    assert abs(opened.mean() - 1) < 0.1


@torch.no_grad()
def test_batches_do_not_matter():
    model, ids = teacher(), texts()
    for sequential in (True, False):
        config = CalibrationConfig(sequential=sequential)
        whole, parts = (
            calibrate_starts(model, list(ids.split(size)), LAYERS, config, progress=False) for size in (6, 1)
        )
        assert whole.keys() == parts.keys() == set(LAYERS)
        for number in LAYERS:
            for one, other in zip(whole[number], parts[number], strict=True):
                assert one is None or (one - other).norm() < 1e-2 * one.norm()


@torch.no_grad()
def test_bf16_gives_nearly_the_same_start():
    model, ids = teacher(), texts()
    exact = calibrate_starts(model, [ids], LAYERS, CalibrationConfig(output="scale"), progress=False)
    rounded = calibrate_starts(
        model.to(torch.bfloat16), [ids], LAYERS, CalibrationConfig(output="scale"), progress=False
    )
    for number in LAYERS:
        for one, other in zip(exact[number], rounded[number], strict=True):
            assert one is None or (one - other).norm() < 0.1 * one.norm()
            assert other is None or other.dtype == torch.float32


@torch.no_grad()
def test_sequential_layers_make_up_for_errors_before_them():
    model, ids = teacher(), texts(24)
    trunk = trunk_of(model)

    def final(starts: Any) -> Tensor:
        h = trunk.embed_tokens(ids)
        mixers = {} if starts is None else {n: delta_mixer(trunk.layers[n], model.config, starts[n]) for n in LAYERS}
        with mixers_in_place(trunk.layers, mixers):
            for number in LAYERS:
                h = advance(trunk, number, h)
        return h

    both = [
        calibrate_starts(model, [ids], LAYERS, CalibrationConfig(sequential=sequential), progress=False)
        for sequential in (True, False)
    ]
    errors = [(final(starts) - final(None)).norm().item() for starts in both]
    assert errors[0] < 0.95 * errors[1]
    for one, other in zip(both[0][0], both[1][0], strict=True):  # nothing is before the first
        assert one is None or torch.equal(one, other)


def converted(model: Any, starts: Any = None) -> Any:
    settings = CrossArchTransferConfig(hybrid_attention=HybridAttentionConfig(layers=LAYERS))
    return convert_model(model, settings, starts=starts)[0]


@torch.no_grad()
def test_mixers_in_place_compute_what_the_converted_model_does():
    model, ids = teacher(), texts(3)
    starts = calibrate_starts(model, [texts()], LAYERS, progress=False)
    mixers = {number: delta_mixer(model.model.layers[number], model.config, start) for number, start in starts.items()}
    plain = model(ids).logits
    with mixers_in_place(model.model.layers, mixers):
        expected = model(ids).logits
    assert torch.equal(model(ids).logits, plain), "the teacher is as it was"
    torch.testing.assert_close(converted(model, starts)(ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert (plain - expected).abs().max() > 0.05

    late = converted(model)
    apply_starts(late, model, starts)
    torch.testing.assert_close(late(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_starts_of_layers_that_keep_their_attention_are_refused():
    model = teacher()
    starts = calibrate_starts(model, [texts()], [3], progress=False)
    with pytest.raises(ValueError, match=r"starts has the layers \[3\], which keep their attention"):
        converted(model, starts)
    with pytest.raises(ValueError, match="Layer 3 of the student is no DeltaNet"):
        apply_starts(converted(model), model, starts)


def test_a_layer_that_cannot_become_deltanet_is_named():
    ids = [texts()]
    with pytest.raises(ValueError, match="Layer 4 is not one of the model's 4 layers"):
        calibrate_starts(teacher(), ids, [4], progress=False)
    with pytest.raises(ValueError, match="Layer 0 of this llama is no softmax attention with a norm per head"):
        calibrate_starts(tiny("llama"), ids, [0], progress=False)
    with pytest.raises(ValueError, match="no text to calibrate on"):
        calibrate_starts(teacher(), [], [0], progress=False)


@torch.no_grad()
def test_the_step_zero_table_holds_exact_divergences(monkeypatch):
    monkeypatch.setattr("mull.evaluation.divergence.TOKENS_AT_ONCE", 7)
    model, ids = teacher(), texts()
    starts = calibrate_starts(model, [texts(24)], LAYERS, progress=False)
    table = {row.start: row for row in step_zero(model, list(ids.split(4)), {"calibrated": starts}, progress=False)}
    expected = model(ids).logits.double().log_softmax(-1)

    def rows(logits: Tensor) -> Tensor:
        return F.kl_div(logits.double().log_softmax(-1), expected, reduction="none", log_target=True).sum(-1).mean(-1)

    uniform = rows(torch.zeros_like(expected))
    with mixers_in_place(model.model.layers, {number: Silent() for number in LAYERS}):
        silent = rows(model(ids).logits)
    for name, found in (("uniform", uniform), ("zero output", silent)):
        assert table[name].divergence == pytest.approx(found.mean().item(), rel=1e-5)
        assert table[name].standard_error == pytest.approx(found.std().item() / 6**0.5, rel=1e-4)
    assert table["calibrated"].divergence < table["zero output"].divergence
    assert table["copy only"].divergence != table["zero output"].divergence
    states = model.model(ids)[0]
    assert row_divergences(states, states, model.lm_head).abs().max() < EXACT
    assert uniform_divergences(states, model.lm_head).mean().item() == pytest.approx(uniform.mean().item(), rel=1e-5)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("dead", ["one head", "all heads", "norm"])
@torch.no_grad()
def test_a_head_that_reads_nothing_starts_with_the_default_and_writes_nothing(dead, sequential):
    model = teacher()
    layer = model.model.layers[1]
    if dead == "norm":
        layer.input_layernorm.weight.zero_()
    else:
        layer.self_attn.v_proj.weight[: 12 if dead == "one head" else 24].zero_()
    starts = calibrate_starts(model, [texts()], LAYERS, CalibrationConfig(sequential=sequential), progress=False)
    for start in starts.values():
        assert all(value.isfinite().all() for value in start if value is not None)
    heads = slice(0, 2 if dead == "one head" else 4)
    half_life, out_proj = starts[1].half_life, starts[1].out_proj
    assert half_life is not None
    assert out_proj is not None
    assert (half_life[heads] == 128).all()
    assert (out_proj.unflatten(1, (4, 12))[:, heads] == 0).all()
    assert (half_life[heads.stop :] < 40).all()


def test_dropout_of_a_teacher_in_training_is_not_measured():
    model = teacher(attention_dropout=0.5)
    expected = calibrate_starts(model, [texts()], [1], progress=False)[1]
    model.train()
    model.model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    found = calibrate_starts(model, [texts()], [1], progress=False)[1]
    assert modes == [module.training for module in model.modules()]
    assert all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_start_that_the_students_precision_cannot_hold_is_refused():
    model = teacher()
    student, _ = convert_model(model, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"Layer 1 would have values that torch.float16 cannot hold in .*out_proj.weight"
    ):
        apply_starts(student, model, {1: DeltaStart(out_scale=torch.full((4,), 1e9))})
