"""What a training run will cost: parameters, memory and FLOPs, before anything is allocated.

Everything works on a model on the meta device. FLOPs are formulas over its parameters. The activations that a layer keeps for
the backward pass are found by running it on fake tensors, which have a shape and no content.

Shapes: B rows of a micro-batch, T tokens of a row, D model width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from mull.evaluation.cost.count import mixing_flops, product_flops, products, visible_keys, whole_layer
from mull.evaluation.cost.disk import in_bytes
from mull.layers.recursive_heads import ChainedSteps
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import layer_kinds
from mull.model.executor import run_layer
from mull.model.families import MIXERS
from mull.model.inputs import LayerInputs
from mull.ops.cross_entropy import CHUNK_LOGITS, MIN_CHUNK_ROWS
from mull.training.optimization import OptimizationConfig, build_optimizers
from mull.training.step import DistributedConfig

OPTIMIZER_COPIES = {"Muon": 1, "AdamW": 2}
"""Tensors of a parameter's size that its optimizer keeps: a momentum; two moving averages."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Shape of the micro-batches, and how they are computed."""

    rows: int
    """Rows B of a micro-batch."""

    length: int
    """Tokens T of a row."""

    accumulate: int = 1
    """Micro-batches of an optimizer step, over all ranks."""

    max_iterations: int | None = None
    """Most passes through the think block, which decide memory. None: as the model is configured."""

    mean_iterations: float | None = None
    """Mean passes through the think block, which decide FLOPs. None: `max_iterations`."""

    backprop_iterations: int | None = None
    """Passes that are back-propagated through; None for all."""

    precision: str = "fp32"
    """``bf16`` for autocast, or ``fp32``."""

    checkpointing: bool = False
    """Recompute layers in the backward pass instead of keeping their activations."""

    forward_passes: int = 0
    """Additional passes without gradient over every token, for sampling or for algorithms that weight a whole step."""

    n_heads: int | None = None
    """Extra heads that are trained; None for all."""

    packed: bool = True
    """Rows contain several documents, so attention needs a mask that every visit keeps. Not counted: recurrent layers run each
    document as its own row, padded to the longest."""

    world_size: int = 1
    """Ranks that share the weights, gradients and optimizer state."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters; a tied tensor counts once."""

    total: int
    trainable: int
    active: int
    """Those that one token uses in one pass: of routed experts, only the chosen ones."""

    embedding: int
    """Token embeddings, and the unembedding if the weights are tied."""

    unembedding: int
    """0 with tied weights."""

    encoder: int
    """Layers before the think block; all layers if there is none."""

    think: int
    decoder: int
    heads: int
    """Extra heads."""

    beside: int
    """Modules trained beside the model, such as a value head."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each rank at the end of a micro-batch's forward pass, when memory peaks."""

    weights: int
    """This rank's share, and a whole reference model if there is one."""

    gradients: int
    optimizer: int
    activations: int
    """What autograd keeps for the backward pass, including copies of the weights in the autocast type."""

    loss: int
    """One chunk of logits, the gradient of the targets' hidden states, and that of the unembedding before it is accumulated."""

    gathered: int
    """With several ranks: whole weights and gradients of the layers being computed."""

    @property
    def total(self) -> int:
        """Sum of all parts. Not counted: temporary tensors inside one operation, masks, and fragmentation in the allocator."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.gathered


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training run will cost."""

    parameters: Parameters
    memory: Memory
    forward_flops: float
    """FLOPs of a forward pass, per token."""

    training_flops: float
    """FLOPs of a forward and backward pass, per token, without recomputation; the numerator of the MFU."""

    tokens_per_step: int
    """Over all ranks, including padding."""

    step_flops: float
    """FLOPs of an optimizer step over all ranks, including recomputation and a reference model's passes."""

    def seconds_per_step(self, peak_flops: float, world_size: int = 1) -> float:
        """Lower bound of an optimizer step's time, at the peak FLOP/s of every rank. Divide it by an expected MFU."""
        return self.step_flops / (peak_flops * world_size)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Names and values to print; parts that are 0 are left out."""
        parts = dataclasses.asdict(self.parameters)
        yield "parameters", f"{parts.pop('total'):,}"
        yield from ((f"  {name}", f"{count:,}") for name, count in parts.items() if count)
        yield "memory per rank", in_bytes(self.memory.total)
        yield from ((f"  {name}", in_bytes(size)) for name, size in dataclasses.asdict(self.memory).items() if size)
        yield "FLOPs per token, forward", f"{self.forward_flops:,.0f}"
        yield "FLOPs per token, training", f"{self.training_flops:,.0f}"
        yield "FLOPs per step", f"{self.step_flops:.3e}"


def flops_per_token(
    model: MullForCausalLM, length: int, iterations: float | None = None, n_heads: int | None = None
) -> float:
    """FLOPs of a forward pass per token.

    ``Σ over visits (2 · matrix parameters + mixing) + Σ over heads (2 · matrix parameters + mixing + 2 V D)``

    * A multiplication and an addition are two FLOPs. Only matrix products and convolutions count, not norms, activations,
      softmax, rotary embeddings or embedding lookups.
    * Every visit of a layer counts, so a think iteration costs what the think block costs.
    * Of routed experts, the chosen ones count, ``top_k / experts`` of their parameters.
    * Attention mixes with ``4 · heads · head width · keys`` FLOPs, where ``keys`` is T or the window if that is smaller. As in
      PaLM (arXiv:2204.02311, appendix B), neither the causal half nor the borders of packed documents are subtracted.
    * A gated delta rule in chunks of C = 64 mixes with ``C (4 d_k + 2 d_v) + 6 d_k d_v`` FLOPs per value head, without the
      triangular solve inside it.

    Args:
        model: Its weights are not read, so it may be on the meta device.
        length: Tokens T of a row.
        iterations: Mean passes through the think block; None as configured.
        n_heads: Extra heads that run; None for all.
    """
    config, costs = model.config.get_text_config(), _layer_flops(model, length)
    visits = zip(_visits(model, iterations), _parts(model), strict=True)
    trunk = sum(times * sum(costs[layer] for layer in part) for times, part in visits)
    heads = [product_flops(head, config) + mixing for head, mixing in _extra_heads(model, length, n_heads)]
    return trunk + sum(heads) + 2.0 * model.lm_head.weight.numel() * (1 + len(heads))


def training_flops_per_token(
    model: MullForCausalLM,
    length: int,
    iterations: float | None = None,
    backprop_iterations: int | None = None,
    n_heads: int | None = None,
) -> float:
    """FLOPs of a forward and a backward pass per token, the numerator of the MFU.

    The backward pass computes a product for the gradient of each trained weight, and one for the gradient of each input that
    depends on a trained weight: three times the forward pass where everything is trained. Frozen parts below the first trained
    one have no backward pass. (A delta rule computes a few products more, for the triangular solve.) If `backprop_iterations` is
    smaller than `iterations`, the encoder and the first iterations run forward only. Targets of weight 0 and heads that are
    detached from the trunk are not subtracted, and recomputed activations are not added.

    Args:
        model: Its weights are not read, so it may be on the meta device. Parameters with ``requires_grad`` are trained.
        length: Tokens T of a row.
        iterations: Mean passes through the think block; None as configured.
        backprop_iterations: Passes that are back-propagated through; None for all.
        n_heads: Extra heads that run; None for all.
    """
    forward = flops_per_token(model, length, iterations, n_heads)
    visits = list(_differentiated(model, iterations, backprop_iterations))
    tracer = _Tracer(model, Schedule(rows=1, length=length))
    backward = sum(times * tracer.layer_backward(layer, reached) for layer, times, reached in visits)
    unembedding, is_trained = 2.0 * model.lm_head.weight.numel(), model.lm_head.weight.requires_grad
    reached = bool(visits) or not _is_frozen(model.model.norm)
    backward += unembedding * ((reached or is_trained) + is_trained)
    for k, (head, mixing) in enumerate(_extra_heads(model, length, n_heads), start=1):
        states, cost = tracer.head_backward(k, head, mixing, reached)
        backward += cost + unembedding * ((states or is_trained) + is_trained)
    return forward + backward


def estimate(
    model: MullForCausalLM,
    optimization: OptimizationConfig,
    schedule: Schedule,
    *,
    distributed: DistributedConfig | None = None,
    companion: nn.Module | None = None,
    reference: MullForCausalLM | None = None,
) -> Estimate:
    """Count what training `model` will cost.

    Args:
        model: On the meta device (`mull.model.causal_lm` under ``torch.device("meta")``), or a real one.
        optimization: Decides the optimizer state.
        schedule: Micro-batches, iterations, precision, ranks.
        distributed: How ranks share the weights; ignored for a single rank.
        companion: Module that is trained beside the model.
        reference: A second model that runs forward only, whole on every rank.
    """
    modules = [module for module in (model, companion) if module is not None]
    tensors = _distinct(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    optimizers = build_optimizers(model, optimization, companion)
    share = schedule.world_size
    memory = Memory(
        weights=_size(tensors) // share + (0 if reference is None else _size(_distinct(reference.parameters()))),
        gradients=_size(tensor for tensor in tensors if tensor.requires_grad) // share,
        optimizer=sum(map(_state_size, optimizers)) // share,
        activations=_activations(model, schedule),
        loss=_loss_size(model, schedule),
        gathered=0 if share == 1 else _gathered(model, distributed or DistributedConfig()),
    )
    mean = schedule.max_iterations if schedule.mean_iterations is None else schedule.mean_iterations
    training = training_flops_per_token(model, schedule.length, mean, schedule.backprop_iterations, schedule.n_heads)
    forward = flops_per_token(model, schedule.length, mean, schedule.n_heads)
    beside = forward * schedule.forward_passes
    if reference is not None:
        beside += flops_per_token(reference, schedule.length)
    if schedule.checkpointing:
        costs = _layer_flops(model, schedule.length)
        beside += sum(
            times * costs[layer] for layer, times, _ in _differentiated(model, mean, schedule.backprop_iterations)
        )
    tokens = schedule.accumulate * schedule.rows * schedule.length
    return Estimate(
        parameters=_count(model, companion, tensors),
        memory=memory,
        forward_flops=forward,
        training_flops=training,
        tokens_per_step=tokens,
        step_flops=(training + beside) * tokens,
    )


def _parts(model: MullForCausalLM) -> tuple[range, range, range]:
    """Layers before, in and after the think block; without one, all layers are before it."""
    n_layers, etd = len(model.model.layers), model.etd_config
    first, last = (n_layers, n_layers) if etd is None else (etd.n_encoder_layers, n_layers - etd.n_decoder_layers)
    return range(first), range(first, last), range(last, n_layers)


def _visits(
    model: MullForCausalLM, iterations: float | None, backprop_iterations: int | None = None
) -> tuple[float, float, float]:
    """How often each of the `_parts` runs; with `backprop_iterations`, how often a gradient flows through it."""
    etd = model.etd_config
    passes = 1.0 if etd is None else float(etd.max_think_iterations if iterations is None else iterations)
    if backprop_iterations is None or passes <= backprop_iterations:
        return 1, passes, 1
    return 0, backprop_iterations, 1


def _differentiated(
    model: MullForCausalLM, iterations: float | None, backprop_iterations: int | None
) -> Iterator[tuple[int, float, bool]]:
    """Layers of the backward pass, how often each is in it, and whether its input has a gradient."""
    visits = _visits(model, iterations, backprop_iterations)
    reached = visits[0] > 0 and model.model.embed_tokens.weight.requires_grad
    first = _first_decision(model)
    for count, part in zip(visits, _parts(model), strict=True):
        for times in filter(None, (min(count, 1), count - min(count, 1))):  # the first pass, and later ones
            for layer in part:
                if reached or layer >= first or not _is_frozen(whole_layer(model, layer)):
                    yield layer, times, reached
                    reached = True


def _first_decision(model: MullForCausalLM) -> float:
    """The first layer whose states a trained router or expert changes; infinity if none is trained."""
    etd, parts = model.etd_config, model.etd
    if etd is None or parts is None or _is_frozen(parts):
        return math.inf
    decided = {*etd.routed_layers, *etd.skipped_layers}
    return min(decided) if decided else etd.n_encoder_layers


def _layer_flops(model: MullForCausalLM, length: int) -> list[float]:
    """FLOPs per token of a forward pass of each layer."""
    config = model.config.get_text_config()
    return [
        product_flops(whole_layer(model, number), config) + mixing_flops(kind, config, length)
        for number, kind in enumerate(layer_kinds(config))
    ]


def _extra_heads(model: MullForCausalLM, length: int, n_heads: int | None) -> Iterator[tuple[nn.Module, float]]:
    """Extra heads that run, and the FLOPs per token of their attention."""
    heads, config = model.mtp_heads, model.config.get_text_config()
    if heads is None:
        return
    for k in range(heads.n_heads if n_heads is None else n_heads):
        span = (k + 1) * length if heads.recursive else length  # of the keys of this and earlier steps
        yield heads.heads[k % len(heads.heads)], mixing_flops("full_attention", config, span) if heads.blocks else 0.0


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tied tensors once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # which lists tied parameters once


def _state_size(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an optimizer will keep, without AdamW's step counters of 4 bytes each."""
    copies = OPTIMIZER_COPIES[type(optimizer).__name__]
    return copies * _size(parameter for group in optimizer.param_groups for parameter in group["params"])


def _count(model: MullForCausalLM, companion: nn.Module | None, tensors: Iterable[Tensor]) -> Parameters:
    """Numbers of parameters; `tensors` are those of both modules, tied ones once."""
    beside = 0 if companion is None else _numel(companion)
    encoder, think, decoder = (sum(_numel(model.model.layers[layer]) for layer in part) for part in _parts(model))
    idle = sum(p.numel() * (1 - share) for _, p, share in products(model, model.config.get_text_config()))
    embedding, unembedding = model.model.embed_tokens.weight, model.lm_head.weight
    return Parameters(
        total=_numel(model) + beside,
        trainable=sum(tensor.numel() for tensor in tensors if tensor.requires_grad),
        active=round(_numel(model) - idle),
        embedding=embedding.numel(),
        unembedding=0 if unembedding is embedding else unembedding.numel(),
        encoder=encoder,
        think=think,
        decoder=decoder,
        heads=0 if model.mtp_heads is None else _numel(model.mtp_heads),
        beside=beside,
    )


def _gathered(model: MullForCausalLM, config: DistributedConfig) -> int:
    """Whole weights and gradients of everything outside the layers and of the layer being computed, and prefetched weights."""
    sizes = [_size(layer.parameters()) for layer in model.model.layers]
    outside = _size(model.parameters()) - sum(sizes)
    weights = outside + (2 * max(sizes) if config.reshard_after_forward else sum(sizes))
    scale = 2 / model.lm_head.weight.element_size() if config.param_dtype == "bf16" else 1
    return round((weights + outside + max(sizes)) * scale)


def _loss_size(model: MullForCausalLM, schedule: Schedule) -> int:
    """Bytes of `mull.ops.cross_entropy`: a chunk of fp32 logits, in bf16 with what the matrix products read and write."""
    unembedding = model.lm_head.weight
    half = schedule.precision == "bf16"
    n_targets = schedule.rows * (schedule.length - 1)
    chunk = min(max(CHUNK_LOGITS // len(unembedding), MIN_CHUNK_ROWS), n_targets) * len(unembedding)
    width = unembedding.element_size()
    states = n_targets * unembedding.shape[1] * ((2 if half else width) + width)
    heads = [] if model.mtp_heads is None else model.mtp_heads.parameters()
    return chunk * (8 if half else 4) + states + _size([unembedding, *heads])


def _activations(model: MullForCausalLM, schedule: Schedule) -> int:
    """Bytes that autograd keeps of one micro-batch."""
    tracer = _Tracer(model, schedule)
    differentiated = _differentiated(model, schedule.max_iterations, schedule.backprop_iterations)
    visits = [layer for layer, times, _ in differentiated for _ in range(int(times))]
    saved = {layer: tracer.layer(layer) for layer in set(visits)}
    outside = tracer.norm() + tracer.heads()
    if schedule.checkpointing:
        largest = max((kept.of(schedule.rows) for kept in saved.values()), default=0)
        return len(visits) * tracer.stream_size + largest + outside
    casts = visits if schedule.world_size > 1 else saved  # a single process keeps its cast weights for the next visit
    rows = sum(saved[layer].per_row for layer in visits) * schedule.rows
    return rows + sum(saved[layer].copies for layer in casts) + outside


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


class _Saved(NamedTuple):
    """Bytes that a module keeps for its backward pass."""

    per_row: int
    copies: int
    """Independent of the number of rows: weights in the autocast type."""

    def of(self, rows: int) -> int:
        return self.per_row * rows + self.copies


class _Tracer:
    """Runs parts of a model on fake CPU tensors and counts what autograd keeps: the same as it keeps of real ones.

    Attention is PyTorch's fused one. Delta rules are transformers' torch code, which keeps more than the kernels of
    flash-linear-attention do.
    """

    def __init__(self, model: MullForCausalLM, schedule: Schedule) -> None:
        self._model, self._schedule = model, schedule
        self._config = model.config.get_text_config()
        self._kinds = layer_kinds(self._config)
        self._found: dict[Any, _Saved] = {}
        self._mode = FakeTensorMode()
        with self._mode:
            self._tensors = {
                f"model.{name}": torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
                for name, tensor in (*model.named_parameters(), *model.named_buffers())
            }
        self._weight = model.lm_head.weight

    @property
    def stream_size(self) -> int:
        """Bytes of the hidden states ``[B, T, D]`` between two layers."""
        n_values = self._schedule.rows * self._schedule.length * self._weight.shape[1]
        return n_values * self._weight.element_size()

    def layer(self, number: int) -> _Saved:
        """What a visit of a layer keeps; measured once for layers of the same kind and shapes."""
        layer, whole, kind = self._model.model.layers[number], whole_layer(self._model, number), self._kinds[number]
        signature = (kind, tuple((name, p.shape, p.requires_grad) for name, p in whole.named_parameters()))
        if signature not in self._found:
            self._found[signature] = self._measure(lambda h: self._run(layer, kind, h))
        return self._found[signature]

    def layer_backward(self, number: int, reached: bool) -> float:
        """FLOPs per token of a layer's backward pass; `reached` says whether its input has a gradient."""
        layer, kind, config = self._model.model.layers[number], self._kinds[number], self._config
        mixing = mixing_flops(kind, config, self._schedule.length)
        return self._backward(whole_layer(self._model, number), mixing, reached, lambda h: self._run(layer, kind, h))

    def head_backward(self, k: int, head: nn.Module, mixing: float, reached: bool) -> tuple[bool, float]:
        """Whether the states of extra head `k` have a gradient, and FLOPs per token of its backward pass."""
        heads: Any = self._model.mtp_heads
        trained = not _is_frozen(head)
        if heads.sequential:
            reached = reached or self._model.model.embed_tokens.weight.requires_grad or (k > 1 and trained)

        def call(h: Tensor) -> Tensor:
            return heads(k, h, torch.empty_like(h), self._run_block)

        return reached or trained, self._backward(head, mixing, reached, call)

    def _backward(self, module: nn.Module, mixing: float, reached: bool, call: Callable[[Tensor], Tensor]) -> float:
        if not reached and _is_frozen(module):
            return 0.0
        parts = set(module.modules()) if reached else self._reached(call)
        found = products(module, self._config)
        cost = sum(2 * p.numel() * share * (p.requires_grad + (part in parts)) for part, p, share in found)
        mixers = [part for name, part in module.named_modules() if name.endswith(MIXERS)]
        return cost + 2 * mixing * any(part in parts for mixer in mixers for part in mixer.modules())

    def _reached(self, call: Callable[[Tensor], Tensor]) -> set[nn.Module]:
        """Parts with an input that has a gradient, though that of `call` has none."""
        found: set[nn.Module] = set()

        def note(part: nn.Module, inputs: tuple[Any, ...]) -> None:
            if any(isinstance(given, Tensor) and given.requires_grad for given in inputs):
                found.add(part)

        with register_module_forward_pre_hook(note):
            self._bytes(call, 2, differentiable=False)
        return found

    def norm(self) -> int:
        """What the final norm keeps for its rows; a copy of its weight vector is not counted."""
        return self._measure(lambda h: self._model.model.norm(h)).per_row * self._schedule.rows

    def heads(self) -> int:
        """What the extra heads keep. Sequential ones form a chain and keep all their states; others run one at a time."""
        heads = self._model.mtp_heads
        if heads is None:
            return 0
        if heads.recursive:
            return self._measure(self._chain).of(self._schedule.rows)

        saved = self._measure(lambda h: heads(1, h, torch.empty_like(h), self._run_block))
        return saved.of(self._schedule.rows * (heads.n_heads if heads.sequential else 1))

    def _chain(self, h: Tensor) -> Tensor:
        heads: Any = self._model.mtp_heads
        kind = "full_attention"
        inputs = self._inputs(kind, h)
        run_block = ChainedSteps(inputs.masks[kind], inputs.position_ids, lambda _: inputs.rotary[kind], "sdpa")
        for k in range(1, 1 + heads.n_heads):
            h = heads(k, h, torch.empty_like(h), run_block)
        return h

    def _run_block(self, block: nn.Module, h: Tensor, _k: int) -> Tensor:
        return self._run(block, "full_attention", h)

    def _run(self, layer: nn.Module, kind: str, h: Tensor) -> Tensor:
        return run_layer(layer, kind, h, self._inputs(kind, h))

    def _inputs(self, kind: str, h: Tensor) -> LayerInputs:
        position_ids = torch.arange(h.shape[1])[None]
        config = self._model.config.get_text_config()
        rotary = self._model.model.rotary({kind}, h, position_ids)
        mask = None
        if kind != "linear_attention" and (
            self._schedule.packed or visible_keys(kind, config, h.shape[1]) < h.shape[1]
        ):
            mask = torch.empty(len(h), 1, h.shape[1], h.shape[1], dtype=torch.bool)
        self._shared.update(_storage(tensor) for tensor in (*(rotary[kind] or ()), mask) if tensor is not None)
        return LayerInputs("sdpa", {kind: mask}, rotary, position_ids)

    def _measure(self, call: Callable[[Tensor], Tensor]) -> _Saved:
        two, three = self._bytes(call, 2), self._bytes(call, 3)  # not 1: a single row needs fewer copies
        return _Saved(per_row=three - two, copies=3 * two - 2 * three)

    def _bytes(self, call: Callable[[Tensor], Tensor], rows: int, differentiable: bool = True) -> int:
        self._shared = {_storage(tensor) for tensor in self._tensors.values()}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[_storage(tensor)] = tensor
            return tensor

        shape = (rows, self._schedule.length, self._weight.shape[1])
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self._schedule.precision == "bf16")
        with self._mode, autocast, _OneExpert(), saved_tensors_hooks(pack, lambda tensor: tensor):
            # A clone, because autocast caches the cast of a leaf for all its readers.
            h = torch.empty(shape, dtype=self._weight.dtype, requires_grad=differentiable).clone()
            out = functional_call(_Call(self._model, call), self._tensors, (h,))
        del out
        return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in self._shared)


class _Call(nn.Module):
    """Wraps a function of a model's parts as a module, so that `functional_call` can substitute the model's tensors.

    The function must not be a module itself: it would be registered, and its tensors substituted twice.
    """

    def __init__(self, model: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, h: Tensor) -> Tensor:
        return self._call(h)


class _OneExpert(TorchFunctionMode):
    """Sends all rows of a grouped product through one expert: the sizes are the same, and fake tensors of any type work."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._grouped_mm:
            with torch.autocast("cpu", enabled=False):  # autocast does not touch grouped products
                return args[0] @ args[1][0]
        return function(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
