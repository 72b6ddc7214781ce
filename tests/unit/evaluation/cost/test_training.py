"""Claim: what a training will cost is known before it starts: memory byte by byte, FLOPs as PyTorch counts them."""

import itertools
from typing import Any

import pytest
import torch
from conftest import FAMILIES, SPLIT, tiny
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mull.evaluation.cost.count import product_flops
from mull.evaluation.cost.training import (
    Schedule,
    estimate,
    flops_per_token,
    training_flops_per_token,
)
from mull.layers.value_head import ValueHead
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import (
    ETDConfig,
    GatedAttentionConfig,
    LayerRouterConfig,
    LoRAExpertConfig,
    MTPConfig,
    TokenSkipConfig,
)
from mull.ops.targets import targets_of
from mull.retrofit.presets import TransformerConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.optimization import OptimizationConfig, build_optimizers
from mull.training.step import DistributedConfig
from mull.training.trainable import frozen_except

ADAMW, MUON = OptimizationConfig(), OptimizationConfig(optimizer="muon")
ROWS, LENGTH = 3, 64


def model(family: str = "qwen3", mtp: MTPConfig | None = None, **changes: Any) -> MullForCausalLM:
    return wrap_transformer_with_etd(tiny(family, **changes), SPLIT, mtp).train()


def meta(real: MullForCausalLM) -> MullForCausalLM:
    moved = real.to("meta")
    moved.tie_weights()
    return moved


def tokens() -> Tensor:
    return torch.randint(3, 97, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def counted(call: Any) -> float:
    # The counter does not know the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / (ROWS * LENGTH)


class InBackward(TorchDispatchMode):
    """PyTorch's counter without its tracking of modules, which cannot follow `torch.autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.formulas = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if formula := self.formulas.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_pytorch_counts(family: str) -> None:
    iterations = 3
    # Experts run in groups that the counter does not know; one by one they are ordinary products.
    changes = {"experts_implementation": "eager"} if "moe" in family else {}
    real = model(family, sliding_window=LENGTH) if family == "olmo3" else model(family)
    for name, value in changes.items():
        setattr(real.config.get_text_config(), f"_{name}", value)
    with torch.no_grad():
        expected = counted(lambda: real(tokens(), think_iterations=iterations, use_cache=False))
    assert flops_per_token(meta(real), LENGTH, iterations) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("chosen", ["all", ["model.attention_gates.[35].*"]], ids=["all", "two gates"])
def test_gates_of_attention_count_like_maps_of_their_layer(chosen: Any) -> None:
    gates = GatedAttentionConfig(granularity="element", layers=(3, 4, 5))
    real = wrap_transformer_with_etd(tiny("qwen3"), SPLIT, None, gates).train()

    def run() -> None:
        real.lm_head(real.hidden_states(tokens(), think_iterations=3)).sum().backward()

    with frozen_except(real, chosen):
        with sdpa_kernel(SDPBackend.MATH), InBackward() as counter:
            run()
        expected = counter.total / (ROWS * LENGTH)
        assert training_flops_per_token(real, LENGTH, 3) == pytest.approx(expected, rel=0.015)
    expected = kept(lambda: real.hidden_states(tokens(), think_iterations=3), real.parameters())
    schedule = Schedule(rows=ROWS, length=LENGTH, max_iterations=3, precision="fp32", packed=False)
    assert 0.99 * expected < estimate(real, ADAMW, schedule).memory.activations <= expected


def test_the_state_of_a_delta_rule_counts_with_both_of_its_widths() -> None:
    real = model("qwen3_next-dense", linear_key_head_dim=48, linear_value_head_dim=96)
    with torch.no_grad():
        expected = counted(lambda: real(tokens(), think_iterations=1, use_cache=False))
    assert flops_per_token(meta(real), LENGTH, 1) == pytest.approx(expected, rel=0.01)


def test_a_think_iteration_costs_what_its_layers_cost() -> None:
    looped = model("qwen3")
    one, two, half = (flops_per_token(looped, LENGTH, iterations) for iterations in (1, 2, 1.5))
    plain = wrap_transformer_with_etd(tiny("qwen3"), None)
    head = 2 * 97 * 32
    assert one == flops_per_token(plain, LENGTH)
    assert two - one == (one - head) / 2, "four of eight layers"
    assert half == (one + two) / 2


def test_a_sliding_window_bounds_what_attention_costs() -> None:
    windowed, wide = model("olmo3", sliding_window=16), model("olmo3", sliding_window=256)
    sliding = windowed.kinds.count("sliding_attention") + SPLIT.max_think_iterations * 3 - 3
    saved = flops_per_token(wide, LENGTH) - flops_per_token(windowed, LENGTH)
    assert saved == sliding * 4 * 4 * 16 * (LENGTH - 16)


def test_of_routed_experts_only_the_chosen_ones_count() -> None:
    two, four = model("qwen3_next-moe", num_experts_per_tok=2), model("qwen3_next-moe", num_experts_per_tok=4)
    expert = 3 * 32 * 16
    difference = flops_per_token(four, LENGTH, 1) - flops_per_token(two, LENGTH, 1)
    assert difference == 8 * 2 * (2 * expert)
    parameters = [estimate(meta(each), ADAMW, Schedule(rows=1, length=8)).parameters for each in (two, four)]
    assert [count.total - count.active for count in parameters] == [8 * 2 * expert, 0]


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("transformer", False),
        ("mlp", False),
        ("shared_lm_head", False),
        ("sequential", False),
        ("sequential", True),
        ("native", True),
    ],
)
def test_every_head_counts_itself_and_its_unembedding(kind: Any, share: bool) -> None:
    real = model(mtp=MTPConfig(num_predict_tokens=3, mtp_head_type=kind, share_weights_across_steps=share))
    targets = targets_of(tokens(), None, 4)

    def run() -> None:
        with torch.no_grad():
            hidden = real.hidden_states(tokens(), think_iterations=2)
            real.head_losses(hidden, tokens(), targets, (targets >= 0).float())

    # The last positions of a row have no target.
    assert flops_per_token(real, LENGTH, 2) == pytest.approx(counted(run), rel=0.02)
    assert flops_per_token(real, LENGTH, 2, n_heads=0) == flops_per_token(model(), LENGTH, 2)


def test_heads_that_do_not_run_cost_nothing() -> None:
    real = model(mtp=MTPConfig())
    assert training_flops_per_token(real, LENGTH, 2, n_heads=0) == training_flops_per_token(model(), LENGTH, 2)
    without = estimate(meta(real), ADAMW, Schedule(rows=1, length=LENGTH, n_heads=0))
    assert without.training_flops == training_flops_per_token(model(), LENGTH)


@pytest.mark.parametrize("backprop", [None, 1])
def test_training_costs_three_forward_passes_and_one_where_no_gradient_flows(backprop: int | None) -> None:
    real = model()

    def run() -> None:
        hidden = real.hidden_states(tokens(), think_iterations=3, backprop_iterations=backprop)
        real.lm_head(hidden).sum().backward()

    expected = counted(run)
    assert training_flops_per_token(real, LENGTH, 3, backprop) == pytest.approx(expected, rel=0.03)


TRAINED: dict[str, Any] = {
    "all": "all",
    "heads": "heads",
    "head": ["lm_head.weight"],
    "embeddings": ["model.embed_tokens.weight"],
    "think": ["model.layers.[2345].*"],
    "above": ["model.layers.[67].*", "lm_head.weight"],
    "inside": ["model.layers.5.mlp.*"],
    "last": ["model.layers.5.mlp.down_proj.weight"],
    "norms": ["model.layers.[34].*norm.weight"],
    "final": ["model.norm.weight", "mtp*"],
}


@pytest.mark.parametrize("kind", [None, "mlp", "transformer", "sequential", "native"])
@pytest.mark.parametrize("chosen", TRAINED)
@pytest.mark.parametrize("backprop", [None, 2])
@pytest.mark.latin(16, "kind", "chosen", "backprop")
def test_training_costs_the_products_of_the_gradients_that_it_computes(
    kind: Any, chosen: str, backprop: int | None
) -> None:
    # Not here: single maps of attention, of which fused kernels compute all gradients, and PyTorch's plain one only some.
    if (kind is None and chosen in ("heads", "final")) or (backprop and chosen == "embeddings"):
        pytest.skip("nothing to train")
    real = model(mtp=kind and MTPConfig(num_predict_tokens=3, mtp_head_type=kind))
    targets = targets_of(tokens(), None, 1 if kind is None else 4)

    def run() -> None:
        hidden = real.hidden_states(tokens(), think_iterations=3, backprop_iterations=backprop)
        loss, _ = real.head_losses(hidden, tokens(), targets, (targets >= 0).float())
        loss.backward()

    with frozen_except(real, TRAINED[chosen]):
        # The last positions of a row have no target, and steps of recursive heads see masks instead of causality.
        with sdpa_kernel(SDPBackend.MATH), InBackward() as counter:
            run()
        expected = counter.total / (ROWS * LENGTH)
        assert training_flops_per_token(real, LENGTH, 3, backprop) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", [["model.layers.3.*"], ["model.layers.3.*.down_proj*"]], ids=["layer", "part"])
def test_every_family_costs_nothing_below_what_is_trained(family: str, chosen: list[str]) -> None:
    looped = meta(model(family))
    below = sum(product_flops(layer, looped.config.get_text_config()) for layer in looped.model.layers[:3])
    whole = training_flops_per_token(looped, LENGTH, 1)
    with frozen_except(looped, chosen):
        found = training_flops_per_token(looped, LENGTH, 1)
    assert flops_per_token(looped, LENGTH, 1) < found < whole - 2 * below


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "qwen3_next-moe"])
@pytest.mark.parametrize("optimization", [ADAMW, MUON], ids=["adamw", "muon"])
def test_weights_gradients_and_optimizer_state_are_counted_to_the_byte(
    family: str, optimization: OptimizationConfig
) -> None:
    real = model(family, mtp=MTPConfig(num_predict_tokens=2, mtp_head_type="mlp"))
    real.model.layers[0].requires_grad_(False)
    head = ValueHead(32)
    optimizers = build_optimizers(real, optimization, head)
    (real(tokens(), labels=tokens()).loss + head(torch.randn(1, 4, 32)).sum()).backward()
    for optimizer in optimizers:
        optimizer.step()
    parameters = {id(p): p for p in (*real.parameters(), *head.parameters())}.values()
    buffers = list(real.buffers())
    state = [t for o in optimizers for s in o.state.values() for name, t in s.items() if name != "step"]
    expected = [
        sum(t.numel() * t.element_size() for t in (*parameters, *buffers)),
        sum(p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None),
        sum(t.numel() * t.element_size() for t in state),
    ]
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    found = estimate(meta(real), optimization, Schedule(rows=1, length=8), companion=head)
    assert [found.memory.weights, found.memory.gradients, found.memory.optimizer] == expected
    assert found.parameters.trainable == trainable
    assert found.parameters.total == sum(p.numel() for p in parameters)


def kept(call: Any, parameters: Any) -> int:
    """Bytes of the storages that autograd keeps, weights aside."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in storages.items() if place not in own)
    del out
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.latin(4, "family", "precision")
def test_activations_are_what_autograd_keeps(family: str, precision: str) -> None:
    real = model(family)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = kept(lambda: real.hidden_states(tokens(), think_iterations=3), real.parameters())
    schedule = Schedule(rows=ROWS, length=LENGTH, max_iterations=3, precision=precision, packed=False)
    found = estimate(meta(real), ADAMW, schedule).memory.activations
    # Beinputs, positions and token ids are kept, once.
    assert 0.99 * expected < found <= expected


def test_activations_of_packed_rows_hold_their_masks() -> None:
    real = model()
    positions = torch.arange(LENGTH).remainder(40).expand(ROWS, LENGTH)
    expected = kept(lambda: real.hidden_states(tokens(), position_ids=positions, think_iterations=2), real.parameters())
    found = estimate(meta(real), ADAMW, Schedule(rows=ROWS, length=LENGTH, max_iterations=2)).memory.activations
    assert found == pytest.approx(expected, rel=0.02)


def test_truncated_backpropagation_keeps_the_last_iterations_only() -> None:
    real = model()
    expected = kept(lambda: real.hidden_states(tokens(), think_iterations=4, backprop_iterations=2), real.parameters())
    schedule = Schedule(rows=ROWS, length=LENGTH, max_iterations=4, backprop_iterations=2, packed=False)
    found = estimate(meta(real), ADAMW, schedule).memory.activations
    assert found == pytest.approx(expected, rel=0.01)


def test_checkpointing_keeps_the_inputs_of_layers_and_computes_them_once_more() -> None:
    real = model()
    ids = tokens()
    real.activation_checkpointing_enable({"use_reentrant": False})
    expected = kept(lambda: real.hidden_states(ids, think_iterations=3), real.parameters())
    real.activation_checkpointing_disable()
    meta(real)
    schedules = [
        Schedule(rows=ROWS, length=LENGTH, max_iterations=3, packed=False, checkpointing=checkpointing)
        for checkpointing in (False, True)
    ]
    plain, found = (estimate(real, ADAMW, schedule) for schedule in schedules)
    one_layer = (plain.memory.activations - found.memory.activations) / 15  # 16 visits, of which one is there at a time
    assert found.memory.activations == pytest.approx(expected + one_layer, rel=0.1)
    trunk = flops_per_token(real, LENGTH, 3) - 2 * 97 * 32
    assert found.step_flops - plain.step_flops == trunk * ROWS * LENGTH
    assert found.training_flops == plain.training_flops, "an MFU does not count recomputation"


def test_heads_are_there_one_at_a_time_but_sequential_ones_together() -> None:
    activations = {}
    for kind, n_heads in itertools.product(("transformer", "sequential"), (1, 4)):
        mtp = MTPConfig(num_predict_tokens=n_heads, mtp_head_type=kind)
        schedule = Schedule(rows=ROWS, length=LENGTH, packed=False)
        activations[kind, n_heads] = estimate(meta(model(mtp=mtp)), ADAMW, schedule).memory.activations
    without = estimate(meta(model()), ADAMW, Schedule(rows=ROWS, length=LENGTH, packed=False)).memory.activations
    assert activations["transformer", 4] == activations["transformer", 1] > without
    assert activations["sequential", 4] - without == 4 * (activations["sequential", 1] - without)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_the_steps_of_a_recursive_head_keep_all_their_keys(family: str, packed: bool) -> None:
    real = model(family, MTPConfig(num_predict_tokens=3, mtp_head_type="native"))
    schedule = Schedule(rows=ROWS, length=LENGTH, packed=packed)
    without = estimate(meta(model(family)), ADAMW, schedule).memory.activations
    hidden = torch.randn(ROWS, LENGTH, 32, requires_grad=True) * 2
    positions = torch.arange(LENGTH).remainder(40 if packed else LENGTH).expand(ROWS, LENGTH)
    inputs = real.model.layer_inputs(hidden, None, positions)

    def chain() -> Tensor:
        run_block, states = real._run_block(hidden, inputs), hidden
        for k in (1, 2, 3):
            states = real.mtp_heads(k, states, torch.randn_like(hidden), run_block)
        return states

    shared = {
        tensor for tensor in (*inputs.rotary["full_attention"], inputs.masks["full_attention"]) if tensor is not None
    }
    expected = kept(chain, [*real.parameters(), *shared])
    found = estimate(meta(real), ADAMW, schedule).memory.activations - without
    assert found == pytest.approx(expected, rel=0.03)


def test_ranks_share_weights_and_state_and_gather_layers() -> None:
    real = meta(model())
    schedule = Schedule(rows=ROWS, length=LENGTH)
    one = estimate(real, ADAMW, schedule).memory
    four = [
        estimate(real, ADAMW, Schedule(rows=ROWS, length=LENGTH, world_size=4), distributed=config).memory
        for config in (
            DistributedConfig(),
            DistributedConfig(reshard_after_forward=False),
            DistributedConfig(param_dtype="bf16"),
        )
    ]
    assert one.gathered == 0
    assert (four[0].weights, four[0].gradients, four[0].optimizer) == (
        one.weights // 4,
        one.gradients // 4,
        one.optimizer // 4,
    )
    assert four[0].activations == one.activations
    layer = sum(p.numel() * 4 for p in real.model.layers[0].parameters())
    outside = (2 * 97 * 32 + 32) * 4
    assert four[0].gathered == 2 * outside + 3 * layer
    assert four[1].gathered == 2 * outside + 9 * layer
    assert four[2].gathered == four[0].gathered // 2


def test_a_reference_model_costs_its_weights_and_a_forward_pass() -> None:
    trained, reference = meta(model()), meta(model("qwen3", num_hidden_layers=8))
    schedule = Schedule(rows=ROWS, length=LENGTH, accumulate=2)
    alone, both = estimate(trained, ADAMW, schedule), estimate(trained, ADAMW, schedule, reference=reference)
    size = sum(p.numel() * 4 for p in reference.parameters())
    assert both.memory.total - alone.memory.total == size
    assert both.tokens_per_step == 2 * ROWS * LENGTH
    assert both.step_flops - alone.step_flops == flops_per_token(reference, LENGTH) * both.tokens_per_step
    assert both.seconds_per_step(1e9, 2) == both.step_flops / 2e9


def test_parameters_are_counted_by_what_they_do() -> None:
    tied, untied = (
        estimate(meta(model(family, mtp=MTPConfig(mtp_head_type="mlp"))), ADAMW, Schedule(rows=1, length=8)).parameters
        for family in ("qwen3-tied", "qwen3")
    )
    assert (untied.embedding, untied.unembedding, untied.heads) == (97 * 32, 97 * 32, 4 * 32 * 32)
    assert (tied.embedding, tied.unembedding) == (97 * 32, 0)
    assert untied.think == 2 * untied.encoder == 2 * untied.decoder
    norm = 32
    for counts in (tied, untied):
        parts = (counts.embedding, counts.unembedding, counts.encoder, counts.think, counts.decoder, counts.heads)
        assert counts.total == sum(parts) + norm


def test_a_model_that_fits_on_no_machine_here_is_estimated_without_allocating_it() -> None:
    built = TransformerConfig.olmo3_7B_etd(adaptive_depth=False, use_layer_router=False, use_lora_experts=False).build(
        "meta"
    )
    found = estimate(
        built, MUON, Schedule(rows=1, length=8192, precision="bf16", checkpointing=True, world_size=8, max_iterations=4)
    )
    assert found.parameters.total == sum(p.numel() for p in built.parameters()) == 7_298_011_136
    assert all(parameter.is_meta for parameter in built.parameters())
    # Each of the 32 layers has 4 · 4096² + 3 · 4096 · 11008 weights in matrices.
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 100278 * 4096
    plain = TransformerConfig.olmo3_7B().build("meta")
    mixing = 4 * 4096 * (24 * 4096 + 8 * 8192)
    assert flops_per_token(plain, 8192) == 2 * matrices + mixing


def test_a_layer_without_attention_to_its_left_is_no_layer_of_another_kind() -> None:
    etd = ETDConfig(n_encoder_layers=0, n_think_layers=8, n_decoder_layers=0, max_think_iterations=2)
    everything = wrap_transformer_with_etd(tiny("qwen3"), etd)
    counts = estimate(meta(everything), ADAMW, Schedule(rows=1, length=8)).parameters
    assert (counts.encoder, counts.decoder) == (0, 0)
    assert isinstance(everything.model.layers, nn.ModuleList)


def test_routers_experts_and_skips_in_the_layers_have_a_backward_pass() -> None:
    """With everything else frozen, the gradient flows from the end to the first decision."""
    options: list[dict[str, Any]] = [
        {"lora_expert": LoRAExpertConfig(rank=4)},
        {"layer_router": LayerRouterConfig(granularity="token")},
        {"token_skip": TokenSkipConfig(method="mod", scope="all")},
    ]
    for parts in options:
        etd = ETDConfig(n_encoder_layers=2, n_think_layers=4, n_decoder_layers=2, max_think_iterations=2, **parts)
        built = wrap_transformer_with_etd(tiny("qwen3"), etd).requires_grad_(False)
        assert built.etd is not None
        built.etd.requires_grad_(True)
        forward, found = (each(built, LENGTH, 2) for each in (flops_per_token, training_flops_per_token))
        whole = training_flops_per_token(wrap_transformer_with_etd(tiny("qwen3"), etd), LENGTH, 2)
        assert 1.3 * forward < found < 0.8 * whole
        assert estimate(built, MUON, Schedule(rows=1, length=64, precision="fp32")).parameters.trainable == sum(
            parameter.numel() for parameter in built.etd.parameters()
        )
