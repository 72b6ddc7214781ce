"""What a training will cost: parameters, memory and FLOPs, before anything is allocated.

Everything works on a model on the meta device. FLOPs are formulas over its parameters; the activations that a layer keeps for the
backward pass are found by running it on fake tensors, which have a shape and no content.

Shapes: B rows of a micro-batch, T tokens of a row, D model width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from mull.evaluation.cost.count import active_matrices, mixing_flops, visible_keys
from mull.layers.recursive_heads import ChainedSteps
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import layer_kinds
from mull.model.executor import run_layer
from mull.model.inputs import LayerInputs
from mull.ops.cross_entropy import CHUNK_LOGITS, MIN_CHUNK_ROWS
from mull.runtime.distributed import DistributedConfig
from mull.training.optimization import OptimizationConfig, build_optimizers

OPTIMIZER_COPIES = {"Muon": 1, "AdamW": 2}
"""Tensors of a parameter's size that its optimizer keeps: a momentum; two moving averages."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the micro-batches of a training look like."""

    rows: int
    """Rows B of a micro-batch."""

    length: int
    """Tokens T of a row."""

    accumulate: int = 1
    """Micro-batches of an optimizer step, over all ranks."""

    max_iterations: int | None = None
    """Passes through the think block at most; decides memory. None: as the model is configured."""

    mean_iterations: float | None = None
    """Passes through the think block on average; decides FLOPs. None: `max_iterations`."""

    backprop_iterations: int | None = None
    """Passes that are back-propagated through; None for all."""

    precision: str = "fp32"
    """``bf16`` for autocast, or ``fp32``."""

    checkpointing: bool = False
    """Whether layers are recomputed in the backward pass instead of keeping their activations."""

    forward_passes: int = 0
    """Further passes without gradient over every token, as of algorithms that weigh a whole step, or for sampling it."""

    packed: bool = True
    """Whether rows hold several documents: attention then needs a mask, which every visit keeps. That recurrent layers run
    documents as rows of their own, padded to the longest, is not counted."""

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
    """Token embeddings, and with tied weights the unembedding."""

    unembedding: int
    """0 with tied weights."""

    encoder: int
    """Layers before the think block; without one, all layers."""

    think: int
    decoder: int
    heads: int
    """Heads behind the main one."""

    beside: int
    """What is trained beside the model, such as a value head."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each rank at the end of a micro-batch's forward pass, when most is held."""

    weights: int
    """This rank's share; and a reference model, whole."""

    gradients: int
    optimizer: int
    activations: int
    """What autograd keeps for the backward pass, copies of the weights in the autocast type included."""

    loss: int
    """One chunk of logits, the gradient of the targets' hidden states, and that of the unembedding before it is added up."""

    gathered: int
    """With several ranks: whole weights, and their gradients, of what is being computed."""

    @property
    def total(self) -> int:
        """All of it. Temporary tensors inside one operation, masks and the allocator's waste come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.gathered


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training will cost."""

    parameters: Parameters
    memory: Memory
    forward_flops: float
    """FLOPs of a forward pass, per token."""

    training_flops: float
    """FLOPs of a forward and backward pass, per token, recomputation not counted; the numerator of the MFU."""

    tokens_per_step: int
    """Over all ranks, padding included."""

    step_flops: float
    """FLOPs of an optimizer step over all ranks, recomputation and the passes of a reference model included."""

    def seconds_per_step(self, peak_flops: float, world_size: int = 1) -> float:
        """Time of an optimizer step if all ranks computed at their peak all the time: a lower bound; divide it by an MFU.

        Args:
            peak_flops: FLOP per second of a rank, from `mull.training.optimization.peak_flops`.
            world_size: Ranks.
        """
        return self.step_flops / (peak_flops * world_size)

    def rows(self) -> Iterator[tuple[str, str]]:
        """The estimate as names and values to print; parts that are 0 are left out."""
        parts = dataclasses.asdict(self.parameters)
        yield "parameters", f"{parts.pop('total'):,}"
        yield from ((f"  {name}", f"{count:,}") for name, count in parts.items() if count)
        yield "memory per rank", _in_bytes(self.memory.total)
        yield from ((f"  {name}", _in_bytes(size)) for name, size in dataclasses.asdict(self.memory).items() if size)
        yield "FLOPs per token, forward", f"{self.forward_flops:,.0f}"
        yield "FLOPs per token, training", f"{self.training_flops:,.0f}"
        yield "FLOPs per step", f"{self.step_flops:.3e}"


def flops_per_token(
    model: MullForCausalLM, length: int, iterations: float | None = None, n_heads: int | None = None
) -> float:
    """FLOPs of a forward pass per token.

    ``Σ over visits (2 · matrix parameters + mixing) + Σ over heads (2 · matrix parameters + mixing + 2 V D)``

    * A multiplication and an addition are two FLOPs, and only matrix products and convolutions count: no norms, activations,
      softmax, rotary embeddings or embedding lookups.
    * Every visit of a layer counts, so a think iteration costs what the think block costs.
    * Of routed experts, the chosen ones count, ``top_k / experts`` of their parameters.
    * Mixing of attention: ``4 · heads · head width · keys`` with ``keys = T``, or the window where it is smaller. As in PaLM
      (arXiv:2204.02311, appendix B) the causal half is not subtracted, and neither are the borders of packed documents.
    * Mixing of a gated delta rule in chunks of C = 64, per value head: ``C (4 d_k + 2 d_v) + 6 d_k d_v``. The triangular solve
      inside it is left out.

    Args:
        model: Its weights are not read; the meta device will do.
        length: Tokens T of a row.
        iterations: Passes through the think block, on average; None as configured.
        n_heads: Heads behind the main one that are run; None for all.
    """
    return _Trunk.of(model, length).forward(_passes(model, iterations)) + _head_flops(model, length, n_heads)


def training_flops_per_token(
    model: MullForCausalLM, length: int, iterations: float | None = None, backprop_iterations: int | None = None
) -> float:
    """FLOPs of a forward and a backward pass per token: three times the forward pass, which is what an MFU refers to.

    The backward pass takes two products for each one of the forward pass (that of a delta rule a few more, for the triangular
    solve). Visits that are not back-propagated through count once: the first iterations and the encoder, where
    `backprop_iterations` is smaller than `iterations`. Frozen weights, and targets that are left out for their weight of 0, are
    not subtracted; recomputed activations are not added.

    Args:
        model: Its weights are not read; the meta device will do.
        length: Tokens T of a row.
        iterations: Passes through the think block, on average; None as configured.
        backprop_iterations: Passes that are back-propagated through; None for all.
    """
    trunk, passes = _Trunk.of(model, length), _passes(model, iterations)
    differentiated = trunk.differentiated(passes, backprop_iterations)
    return trunk.forward(passes) + 2 * differentiated + 3 * _head_flops(model, length)


def estimate(
    model: MullForCausalLM,
    optimization: OptimizationConfig,
    schedule: Schedule,
    *,
    distributed: DistributedConfig | None = None,
    companion: nn.Module | None = None,
    reference: MullForCausalLM | None = None,
) -> Estimate:
    """Count what a training of `model` will cost.

    Args:
        model: On the meta device (`mull.model.causal_lm` under ``torch.device("meta")``), or a real one.
        optimization: Which optimizer.
        schedule: Micro-batches, iterations, precision, ranks.
        distributed: How ranks share the weights; read with more than one rank.
        companion: Module that is trained beside the model.
        reference: A second model that only runs forward, whole on every rank.
    """
    modules = [module for module in (model, companion) if module is not None]
    tensors = _distinct(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    optimizers = build_optimizers(model, optimization, companion)
    share = schedule.world_size
    memory = Memory(
        weights=_size(tensors) // share + (0 if reference is None else _size(_distinct(reference.parameters()))),
        gradients=_size(trained) // share,
        optimizer=sum(map(_state_size, optimizers)) // share,
        activations=_activations(model, schedule),
        loss=_loss_size(model, schedule),
        gathered=0 if share == 1 else _gathered(model, distributed or DistributedConfig()),
    )
    mean = schedule.max_iterations if schedule.mean_iterations is None else schedule.mean_iterations
    training = training_flops_per_token(model, schedule.length, mean, schedule.backprop_iterations)
    forward = flops_per_token(model, schedule.length, mean)
    beside = forward * schedule.forward_passes
    if reference is not None:
        beside += flops_per_token(reference, schedule.length)
    if schedule.checkpointing:
        trunk = _Trunk.of(model, schedule.length)
        beside += trunk.differentiated(_passes(model, mean), schedule.backprop_iterations)
    tokens = schedule.accumulate * schedule.rows * schedule.length
    return Estimate(
        parameters=_count(model, companion),
        memory=memory,
        forward_flops=forward,
        training_flops=training,
        tokens_per_step=tokens,
        step_flops=(training + beside) * tokens,
    )


@dataclass(frozen=True)
class _Trunk:
    """FLOPs per token of one pass through the layers before, in and behind the think block."""

    encoder: float
    think: float
    decoder: float

    @classmethod
    def of(cls, model: MullForCausalLM, length: int) -> "_Trunk":
        """Without a think block, all layers are encoder."""
        text_config = model.config.get_text_config()
        costs = [
            _layer_flops(layer, kind, text_config, length)
            for layer, kind in zip(model.model.layers, layer_kinds(text_config), strict=True)
        ]
        return cls(*(sum(costs[part]) for part in _parts(model)))

    def forward(self, passes: float) -> float:
        return self.encoder + passes * self.think + self.decoder

    def differentiated(self, passes: float, backprop_iterations: int | None) -> float:
        """The share of `forward` that is back-propagated through."""
        if backprop_iterations is None or passes <= backprop_iterations:
            return self.forward(passes)
        return backprop_iterations * self.think + self.decoder


def _parts(model: MullForCausalLM) -> tuple[slice, slice, slice]:
    """Layers before, in and behind the think block."""
    n_layers, etd = len(model.model.layers), model.etd_config
    first, last = (n_layers, n_layers) if etd is None else (etd.n_encoder_layers, n_layers - etd.n_decoder_layers)
    return slice(0, first), slice(first, last), slice(last, n_layers)


def _passes(model: MullForCausalLM, iterations: float | None) -> float:
    if model.etd_config is None:
        return 1.0
    return float(model.etd_config.max_think_iterations if iterations is None else iterations)


def _layer_flops(layer: nn.Module, kind: str, config: Any, length: int) -> float:
    return 2 * active_matrices(layer, config) + mixing_flops(kind, config, length)


def _head_flops(model: MullForCausalLM, length: int, n_heads: int | None = None) -> float:
    """The unembedding of every head, and the heads behind the main one themselves."""
    config = model.config.get_text_config()
    unembedding = 2.0 * model.lm_head.weight.numel()
    if model.mtp_heads is None:
        return unembedding
    count = model.mtp_heads.n_heads if n_heads is None else n_heads
    if count == 0:
        return unembedding
    one: nn.Module = model.mtp_heads.heads[0]
    cost = count * (2 * active_matrices(one, config) + unembedding)
    if model.mtp_heads.blocks:
        # Step k of a recursive head goes over the keys of steps 1 to k.
        spans = [k * length for k in range(1, 1 + count)] if model.mtp_heads.recursive else [length] * count
        cost += sum(mixing_flops("full_attention", config, span) for span in spans)
    return unembedding + cost


def _in_bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.1f} {unit}"


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tied tensors once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state_size(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an optimizer will keep; AdamW's step counters of 4 bytes each are not counted."""
    copies = OPTIMIZER_COPIES[type(optimizer).__name__]
    return copies * _size(parameter for group in optimizer.param_groups for parameter in group["params"])


def _count(model: MullForCausalLM, companion: nn.Module | None) -> Parameters:
    config = model.config.get_text_config()
    own = _distinct(model.parameters())
    beside = [] if companion is None else _distinct(companion.parameters())
    layers = [_distinct(layer.parameters()) for layer in model.model.layers]
    encoder, think, decoder = (sum(_numel(layer) for layer in layers[part]) for part in _parts(model))
    idle = sum(
        parameter.numel() * (1 - config.num_experts_per_tok / parameter.shape[0])
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3 and not isinstance(module, nn.Conv1d)
    )
    embedding, unembedding = model.model.embed_tokens.weight, model.lm_head.weight
    return Parameters(
        total=_numel(own) + _numel(beside),
        trainable=sum(parameter.numel() for parameter in (*own, *beside) if parameter.requires_grad),
        active=round(_numel(own) - idle),
        embedding=embedding.numel(),
        unembedding=0 if unembedding is embedding else unembedding.numel(),
        encoder=encoder,
        think=think,
        decoder=decoder,
        heads=0 if model.mtp_heads is None else _numel(_distinct(model.mtp_heads.parameters())),
        beside=_numel(beside),
    )


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _gathered(model: MullForCausalLM, config: DistributedConfig) -> int:
    """Whole weights and gradients of everything outside the layers, and of the layer that computes; and weights that wait."""
    layers = [_distinct(layer.parameters()) for layer in model.model.layers]
    inside = {id(tensor) for layer in layers for tensor in layer}
    outside = _size(tensor for tensor in _distinct(model.parameters()) if id(tensor) not in inside)
    sizes = [_size(layer) for layer in layers]
    weights = outside + (2 * max(sizes) if config.reshard_after_forward else sum(sizes))
    scale = 2 / model.lm_head.weight.element_size() if config.param_dtype == "bf16" else 1
    return round((weights + outside + max(sizes)) * scale)


def _loss_size(model: MullForCausalLM, schedule: Schedule) -> int:
    """See `mull.ops.cross_entropy`: logits in fp32; in bf16 beside them what the matrix products write and read."""
    unembedding = model.lm_head.weight
    heads = [] if model.mtp_heads is None else _distinct(model.mtp_heads.parameters())
    n_targets = schedule.rows * (schedule.length - 1)
    chunk = min(max(CHUNK_LOGITS // len(unembedding), MIN_CHUNK_ROWS), n_targets) * len(unembedding)
    half = schedule.precision == "bf16"
    states = (
        n_targets * unembedding.shape[1] * ((2 if half else unembedding.element_size()) + unembedding.element_size())
    )
    return chunk * (8 if half else 4) + states + _size([unembedding, *heads])


def _activations(model: MullForCausalLM, schedule: Schedule) -> int:
    """Bytes that autograd keeps of one micro-batch."""
    tracer = _Tracer(model, schedule)
    encoder, think, decoder = (list(range(len(model.model.layers))[part]) for part in _parts(model))
    passes, differentiated = int(_passes(model, schedule.max_iterations)), schedule.backprop_iterations
    detached = differentiated is not None and differentiated < passes
    visits = ([] if detached else encoder) + think * (differentiated or passes if detached else passes) + decoder
    if not model.model.embed_tokens.weight.requires_grad:  # frozen layers below the first trainable one keep nothing
        visits = list(dropwhile(lambda number: _is_frozen(model.model.layers[number]), visits))
    saved = {layer: tracer.layer(layer) for layer in set(visits)}
    outside = tracer.norm() + tracer.heads()
    if not schedule.checkpointing:
        rows = sum(saved[layer].per_row for layer in visits) * schedule.rows
        casts = visits if schedule.world_size > 1 else saved  # one process keeps what it has cast for the next visit
        return rows + sum(saved[layer].copies for layer in casts) + outside
    largest = max((layer.per_row * schedule.rows + layer.copies for layer in saved.values()), default=0)
    return len(visits) * tracer.stream_size + largest + outside


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


class _Saved(NamedTuple):
    """Bytes that a module keeps for its backward pass."""

    per_row: int
    copies: int
    """Whatever the number of rows: weights in the autocast type."""


class _Tracer:
    """Runs parts of a model on fake tensors on the CPU, and counts what autograd keeps: exactly what it keeps of real ones.

    Attention is PyTorch's fused one. Delta rules are transformers' torch code, which keeps more than the kernels of
    flash-linear-attention do.
    """

    def __init__(self, model: MullForCausalLM, schedule: Schedule) -> None:
        self._model, self._schedule = model, schedule
        self._kinds = layer_kinds(model.config.get_text_config())
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
        """What a visit of a layer keeps; layers of one kind and the same shapes keep the same."""
        layer, kind = self._model.model.layers[number], self._kinds[number]
        signature = (kind, tuple((name, p.shape, p.requires_grad) for name, p in layer.named_parameters()))
        if signature not in self._found:
            self._found[signature] = self._measure(lambda h: self._run(layer, kind, h))
        return self._found[signature]

    def norm(self) -> int:
        """What the final norm keeps."""
        return self._measure(lambda h: self._model.model.norm(h)).per_row * self._schedule.rows

    def heads(self) -> int:
        """What the heads behind the main one keep: those of one head at a time, but sequential ones form a chain."""
        heads = self._model.mtp_heads
        if heads is None:
            return 0
        if heads.recursive:
            chain = self._measure(self._chain)
            return chain.per_row * self._schedule.rows + chain.copies

        def run_block(block: nn.Module, h: Tensor, _k: int) -> Tensor:
            return self._run(block, "full_attention", h)

        saved = self._measure(lambda h: heads(1, h, torch.empty_like(h), run_block))
        chained = heads.n_heads if heads.sequential else 1
        return saved.per_row * self._schedule.rows * chained + saved.copies

    def _chain(self, h: Tensor) -> Tensor:
        heads: Any = self._model.mtp_heads
        kind = "full_attention"
        sides = self._sides(kind, h)
        run_block = ChainedSteps(sides.masks[kind], sides.position_ids, lambda _: sides.rotary[kind], "sdpa")
        for k in range(1, 1 + heads.n_heads):
            h = heads(k, h, torch.empty_like(h), run_block)
        return h

    def _run(self, layer: nn.Module, kind: str, h: Tensor) -> Tensor:
        return run_layer(layer, kind, h, self._sides(kind, h))

    def _sides(self, kind: str, h: Tensor) -> LayerInputs:
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
        two, three = self._bytes(call, 2), self._bytes(call, 3)  # a single row needs fewer copies
        return _Saved(per_row=three - two, copies=3 * two - 2 * three)

    def _bytes(self, call: Callable[[Tensor], Tensor], rows: int) -> int:
        self._shared = {_storage(tensor) for tensor in self._tensors.values()}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[_storage(tensor)] = tensor
            return tensor

        shape = (rows, self._schedule.length, self._weight.shape[1])
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self._schedule.precision == "bf16")
        with self._mode, autocast, _OneExpert(), saved_tensors_hooks(pack, lambda tensor: tensor):
            # A clone, because autocast would cast a leaf once for all of its readers.
            h = torch.empty(shape, dtype=self._weight.dtype, requires_grad=True).clone()
            out = functional_call(_Call(self._model, call), self._tensors, (h,))
        del out
        return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in self._shared)


class _Call(nn.Module):
    """Makes a function of a model's parts a module, so that `functional_call` can lend the model other tensors."""

    def __init__(self, model: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, h: Tensor) -> Tensor:
        return self._call(h)


class _OneExpert(TorchFunctionMode):
    """Sends all rows of a grouped product through one expert: the same sizes, and defined for fake tensors of every type."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch._grouped_mm:
            with torch.autocast("cpu", enabled=False):  # which leaves grouped products alone
                return args[0] @ args[1][0]
        return function(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
