"""The calibrated start of DeltaNet layers: what a closed form takes over from the softmax layers that they replace.

A calibration text runs through the model once, layer by layer. For each layer that becomes Gated DeltaNet, it gives

* the half-life of each head's memory: the mean distance at which the head reads, weighted by attention and by the norm of the
  value that is read. A sink token is far away and attended to, but its value is small, so it hardly counts;
* the weights ``w`` of the output gate, which has no bias: least squares for ``w · x = UNIT_SILU``;
* the output map: that of the source with a least-squares scale per head, or a ridge solution close to it.

No attention matrix of a whole row is ever held. Beside the model, memory holds the states of the text (at most four times ``N D``
numbers), sums of products of one layer (``(H K)^2``), and what one layer computes on one batch.

Shapes: B rows of a batch, T tokens, D model width, H heads, K head width, N tokens of the text.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb, repeat_kv
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from mull.model.base_model import MullModel
from mull.model.causal_lm import MullForCausalLM
from mull.model.executor import run
from mull.model.families import FAMILIES, install_recurrent_hooks
from mull.model.path import from_layers
from mull.retrofit.hybrid import (
    UNIT_SILU,
    DeltaStart,
    check_starts,
    convert_layer,
    delta_tensors,
    head_dim_of,
    is_finite,
)
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.arguments import Frozen, require, require_ids
from mull.runtime.progress import Progress

SCORE_BYTES = 32 * 2**20
"""Most bytes of attention scores at a time."""

GATE_RIDGE = 1e-3
"""Penalty on the squared weights of the gate, relative to the mean square of an input."""

HALF_LIFE = 128.0
"""Tokens; of a mixer whose half-lives were not measured, and of a head that reads nothing."""

SHORTEST_HALF_LIFE = 0.5
"""Tokens. A head that reads only its own token has a mean distance of 0."""


class CalibrationConfig(Frozen):
    """How the output maps of DeltaNet layers are fitted."""

    output: Literal["scale", "ridge"] = "ridge"
    """``scale``: the source's map times a number per head. ``ridge``: a map of its own, close to that: nearer to the teacher
    before training."""

    sequential: bool = True
    """Fit each layer on the states that the layers converted before it leave, so that it also makes up for their errors. False
    fits each layer as if it were the only one that is converted."""

    ridge: float = Field(default=1e-3, gt=0)
    """Penalty on the squared distance from the scaled map, relative to the mean square of a feature."""


class DeltaMixer(nn.Module):
    """A Gated DeltaNet that can stand in the place of a softmax layer's ``self_attn``; for rows without padding."""

    def __init__(self, net: Qwen3_5GatedDeltaNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, hidden_states: Float[Tensor, "B T D"], **_: Any) -> tuple[Float[Tensor, "B T D"], None]:
        """The output of the net, and no attention weights."""
        return self.net(hidden_states), None


def require_softmax_layers(trunk: MullModel, layers: Collection[int]) -> None:
    """Refuse layers that are not there, or have not the tensors of Qwen3's attention.

    Raises:
        ValueError: names the layer.
    """
    for number in layers:
        if not 0 <= number < len(trunk.layers):
            raise ValueError(
                f"Layer {number} is not one of the model's {len(trunk.layers)} layers, which count from 0."
            )
        attention: Any = getattr(trunk.layers[number], "self_attn", None)
        width = getattr(attention, "head_dim", None)
        norm = getattr(attention, "q_norm", None)
        if attention is None or norm is None or norm.weight.shape != (width,):
            family = trunk.text_config.model_type
            raise ValueError(
                f"Layer {number} of this {family} is no softmax attention with a norm per head: only layers like those of Qwen3 "
                "become DeltaNet."
            )


def delta_config(config: PreTrainedConfig) -> Qwen3_5TextConfig:
    """A hybrid of one DeltaNet layer, that a layer of the source with this configuration turns into."""
    heads, width = config.num_attention_heads, head_dim_of(config)
    return Qwen3_5TextConfig(
        vocab_size=1,
        hidden_size=config.hidden_size,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width,
        layer_types=["linear_attention"],
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=width,
        linear_value_head_dim=width,
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        pad_token_id=None,
    )


def delta_mixer(layer: Any, config: PreTrainedConfig, start: DeltaStart) -> DeltaMixer:
    """The DeltaNet that a softmax layer of Qwen3 turns into.

    Args:
        layer: The decoder layer of the source. Its weights are copied.
        config: Configuration of the source.
        start: What was measured for it.
    """
    install_recurrent_hooks(FAMILIES["qwen3_5_text"])  # on a CPU, an installed GPU kernel must not be called
    with torch.device("meta"):
        target: Any = delta_config(config)  # transformers annotates the configuration of the multimodal model
        net = Qwen3_5GatedDeltaNet(target, 0)
    source = {f"self_attn.{name}": value.detach() for name, value in layer.self_attn.state_dict().items()}
    found = delta_tensors(source, config, start, HALF_LIFE, torch.Generator().manual_seed(0))
    net.load_state_dict({name.removeprefix("linear_attn."): value.value for name, value in found.items()}, assign=True)
    return DeltaMixer(net).requires_grad_(False).eval()


@contextlib.contextmanager
def mixers_in_place(layers: nn.ModuleList, mixers: Mapping[int, nn.Module]) -> Iterator[None]:
    """Run the decoder layers of these numbers with other mixers: the hybrid, without converting the model."""
    kept = {number: layers[number].self_attn for number in mixers}
    try:
        for number, mixer in mixers.items():
            layers[number].self_attn = mixer
        yield
    finally:
        for number, attention in kept.items():
            layers[number].self_attn = attention


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout, and give each of its modules its mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def calibrate_starts(
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    layers: Collection[int],
    config: CalibrationConfig | None = None,
    *,
    progress: bool = True,
) -> dict[int, DeltaStart]:
    """Measure how the DeltaNet layers of a hybrid should start.

    Args:
        teacher: Qwen3, or a model of mull on it. It is not changed, and runs in evaluation mode.
        batches: Token numbers ``[B, T]`` of the calibration text, without padding. Text that the hybrid is judged on does not
            belong here. A row is read as one text. Half-lives are below T.
        layers: Layers that become DeltaNet.
        config: How output maps are fitted.
        progress: Show on stderr how many layers are done.

    Returns:
        The start of each of these layers, in fp32.

    Raises:
        TypeError: an argument of another type.
        ValueError: a layer that is not there or cannot become DeltaNet, no text, or states of the teacher that are not finite.

    Source:
        Half-life from the attention distance: Taylor-Calibrate (arXiv:2606.16429), which fits value maps; the norm after the
        delta rule cancels their scale, so we fit the output map.
    """
    require("teacher", teacher, PreTrainedModel, "a causal language model")
    config = config or CalibrationConfig()
    if not len(batches):
        raise ValueError("There is no text to calibrate on: give at least one batch of token numbers.")
    for number, batch in enumerate(batches):
        require_ids(f"batch {number}", batch)
    with evaluating(teacher):
        trunk = trunk_of(teacher)
        require_softmax_layers(trunk, layers)
        states = [trunk.embed_tokens(batch.to(teacher.device)) for batch in batches]
        return _walk(trunk, states, layers, config, progress)


def _walk(
    trunk: MullModel, states: list[Tensor], layers: Collection[int], config: CalibrationConfig, progress: bool
) -> dict[int, DeltaStart]:
    """Fit layer after layer, from the states before the first one."""
    starts: dict[int, DeltaStart] = {}
    student = states
    with Progress(len(trunk.layers), "layer", label="calibration", shown=progress) as bar:
        for number in range(len(trunk.layers)):
            before, mixers = student, {}
            if number in layers:
                starts[number], states = _fit(trunk, number, states, before, config)
                check_starts({number: starts[number]}, trunk.text_config)
                mixers[number] = delta_mixer(trunk.layers[number], trunk.text_config, starts[number])
            else:
                states = [advance(trunk, number, h) for h in states]
            if not config.sequential or not starts:
                student = states
            else:
                with mixers_in_place(trunk.layers, mixers):
                    student = [advance(trunk, number, h) for h in before]
            bar.advance()
    return starts


def trunk_of(model: PreTrainedModel) -> MullModel:
    """The model without its language-model head, of mull; weights are shared."""
    wrapped = model if isinstance(model, MullForCausalLM) else wrap_transformer_with_etd(model, None)
    return wrapped.model


def advance(trunk: MullModel, number: int, h: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """States after layer `number`, from those before it, of rows without padding."""
    return run(trunk.layers, trunk.kinds, from_layers([number]), h, trunk.layer_inputs(h))


def _fit(
    trunk: MullModel, number: int, states: Sequence[Tensor], student: Sequence[Tensor], config: CalibrationConfig
) -> tuple[DeltaStart, list[Tensor]]:
    """The start of one layer, and the teacher's states after it. `states` and `student` are those before it."""
    layer: Any = trunk.layers[number]
    after, targets = [], []
    distance = torch.zeros(2, trunk.text_config.num_attention_heads, dtype=torch.float64)
    gate_sums = _Sums(trunk.text_config.hidden_size, 1)
    for h, s in zip(states, student, strict=True):
        with _recorded(layer.self_attn) as calls:
            after.append(advance(trunk, number, h))
        ((x, attended),) = calls
        distance += _distances(trunk, number, x)
        # Beside the attention's output, what would bring the student to the teacher's state.
        targets.append(attended + (h - s))
        gate_input = layer.input_layernorm(s)
        gate_sums.add(gate_input, torch.full_like(gate_input[..., :1], UNIT_SILU, dtype=torch.float32))
    # A head whose values are all zero reads nothing, at no distance.
    mean = torch.where(distance[1] == 0, HALF_LIFE, distance[0] / distance[1])
    half_life = mean.clamp(min=SHORTEST_HALF_LIFE).float()
    start = DeltaStart(half_life, gate_sums.ridge(GATE_RIDGE)[0].float())

    mixer: Any = delta_mixer(layer, trunk.text_config, start)
    source = layer.self_attn.o_proj.weight.cpu().double()
    sums = _Sums(source.shape[1], source.shape[0])
    for s, target in zip(student, targets, strict=True):
        with _recorded(mixer.net.out_proj) as calls:
            mixer(layer.input_layernorm(s))
        sums.add(calls[0][0], target)
    scale = sums.scale_by_head(source, len(half_life))
    if config.output == "scale":
        return start._replace(out_scale=scale.float()), after
    near = source * scale.repeat_interleave(source.shape[1] // len(scale))
    return start._replace(out_proj=sums.ridge(config.ridge, near).float()), after


class _Sums:
    """Sums over tokens for least squares of ``y`` by a linear map of features ``u``: in fp64 on the CPU."""

    def __init__(self, features: int, outputs: int) -> None:
        self._uu = torch.zeros(features, features, dtype=torch.float64)
        self._yu = torch.zeros(outputs, features, dtype=torch.float64)

    def add(self, u: Float[Tensor, "B T F"], y: Float[Tensor, "B T D"]) -> None:
        """Take a batch."""
        u, y = u.flatten(0, 1).float(), y.flatten(0, 1).float()
        self._uu += (u.mT @ u).cpu()
        self._yu += (y.mT @ u).cpu()

    def ridge(self, strength: float, near: Float[Tensor, "D F"] | None = None) -> Float[Tensor, "D F"]:
        """The map; its squared distance from `near`, or from 0, costs `strength` times the mean square of a feature."""
        # All features may be zero: then the map is `near`.
        penalty = strength * self._uu.diagonal().mean().clamp(min=1e-30) * torch.eye(len(self._uu), dtype=torch.float64)
        near = torch.zeros_like(self._yu) if near is None else near
        return near + torch.linalg.solve(self._uu + penalty, self._yu - near @ self._uu, left=False)

    def scale_by_head(self, source: Float[Tensor, "D F"], heads: int) -> Float[Tensor, " H"]:
        """Least squares if the map is that of the source, times a number for each head."""
        gram = (source.mT @ source * self._uu).unflatten(0, (heads, -1)).unflatten(2, (heads, -1)).sum((1, 3))
        right = (source * self._yu).sum(0).unflatten(0, (heads, -1)).sum(1)
        # A head may write nothing, or the same as another.
        system = gram + 1e-6 * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(heads, dtype=torch.float64)
        return torch.linalg.solve(system, right)


@contextlib.contextmanager
def _recorded(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Input and output of each call of a module."""
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        given = args[0] if args else keywords["hidden_states"]
        calls.append((given, out[0] if isinstance(out, tuple) else out))

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _distances(trunk: MullModel, number: int, x: Float[Tensor, "B T D"]) -> Float[Tensor, "2 H"]:
    """`attention_distance` of a layer on its normed inputs."""
    attention: Any = trunk.layers[number].self_attn
    query, key, value = (
        projection(x).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = trunk.layer_inputs(x).rotary[trunk.kinds[number]]
    query, key = apply_rotary_pos_emb(
        attention.q_norm(query).transpose(1, 2), attention.k_norm(key).transpose(1, 2), cos, sin
    )
    groups = attention.num_key_value_groups
    norms = value.float().norm(dim=-1).transpose(1, 2).repeat_interleave(groups, 1)  # [B, H, T]
    return attention_distance(query, repeat_kv(key, groups), norms, attention.scaling, attention.sliding_window)


def attention_distance(
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B H T K"],
    weight: Float[Tensor, "B H T"],
    scaling: float,
    window: int | None = None,
) -> Float[Tensor, "2 H"]:
    """How far causal attention reads: the sum of distances by head, weighted, and the sum of weights.

    A token reads ``weight[j] * attention[i, j]`` at the distance ``i - j``. Queries are taken in chunks, whose scores have at
    most `SCORE_BYTES`, or are those of one query.

    Args:
        query: After norm and rotary positions.
        key: The same, of as many heads.
        weight: Of the token that is read.
        scaling: Factor of the scores.
        window: Tokens that a query reads, its own included; None for all before it.
    """
    rows, heads, tokens, _ = query.shape
    at = torch.arange(tokens, device=query.device)
    total = torch.zeros(2, heads, dtype=torch.float64)
    for readers in at.split(max(1, SCORE_BYTES // (4 * rows * heads * tokens))):
        first, stop = 0 if window is None else max(0, int(readers[0]) - window + 1), int(readers[-1]) + 1
        distance = readers[:, None] - at[first:stop]
        unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = (query[:, :, readers] @ key[:, :, first:stop].mT).float() * scaling
        read = scores.masked_fill(unseen, -torch.inf).softmax(-1) * weight[:, :, None, first:stop]
        total += torch.stack([(read * distance).sum((0, 2, 3)), read.sum((0, 2, 3))]).cpu().double()
    return total


@torch.no_grad()
def apply_starts(student: PreTrainedModel, teacher: PreTrainedModel, starts: Mapping[int, DeltaStart]) -> None:
    """Give measured starts to the DeltaNet layers of a converted model, in its own precision.

    Args:
        student: The hybrid, as it was converted: its other tensors stay as they are.
        teacher: The model that it was converted from.
        starts: By layer.

    Raises:
        ValueError: a layer of the student is no DeltaNet, or its start has another shape, is not finite or overflows.
    """
    config = teacher.config.get_text_config()
    check_starts(starts, config)
    for number, start in starts.items():
        layer, source = student.model.layers[number], teacher.model.layers[number]
        if not hasattr(layer, "linear_attn"):
            raise ValueError(f"Layer {number} of the student is no DeltaNet: calibrate the layers that were converted.")
        weight = layer.linear_attn.out_proj.weight
        tensors = {name: value.detach().to(weight) for name, value in source.state_dict().items()}
        found = convert_layer(tensors, config, "linear_attention", start=start)
        if spoiled := [name for name, target in found.items() if not is_finite(target.value)]:
            raise ValueError(
                f"Layer {number} would have values that {weight.dtype} cannot hold in {', '.join(spoiled)}."
            )
        layer.load_state_dict({name: target.value for name, target in found.items()})
