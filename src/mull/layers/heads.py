"""Extra heads, which predict further tokens, and their loss, one head after another.

The main head is the model's own next-token prediction, ``k = 0``. *Extra head* ``k ≥ 1`` at position ``i`` predicts token
``i + 1 + k``. All heads share the model's unembedding. Extra heads start as the model's own prediction.

Shapes: B batch, T tokens, D model width, V vocabulary, H heads including the main one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from mull.ops.cross_entropy import accurate, weighted_cross_entropy

RunBlock = Callable[[nn.Module, Tensor, int], Tensor]
"""Runs a head's decoder layer on hidden states ``[B, T, D]`` with the call's masks, positions and keys. The number is the head's,
or for recursive heads the step's."""


class LinearHead(nn.Module):
    """``W h``, with W = 1 at the start: the lightest head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Map the trunk's final-normed states to the head's."""
        return self.proj(h)

    def start_as_identity(self, _trunk_norm: nn.Module) -> None:
        """Predict what the trunk predicts."""
        init.eye_(self.proj.weight)


class ResidualHead(LinearHead):
    """``h + silu(W h)``, the head of Medusa (arXiv:2401.10774, section 2.1.1), with W = 0 at the start."""

    def forward(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Map the trunk's final-normed states to the head's."""
        return h + F.silu(self.proj(h))

    def start_as_identity(self, _trunk_norm: nn.Module) -> None:
        """Predict what the trunk predicts."""
        init.zeros_(self.proj.weight)


class BlockHead(nn.Module):
    """``norm(block(h))`` with a decoder layer of the backbone, as in Meta's parallel heads (arXiv:2404.19737, section 2).

    Meta's layer reads the residual stream before the final norm, and all its heads share that norm. Ours reads the final-normed
    states, as all our heads do, and has its own norm.
    """

    def __init__(self, block: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.norm = norm

    def forward(self, k: int, h: Float[Tensor, "B T D"], run_block: RunBlock) -> Float[Tensor, "B T D"]:
        """Map the trunk's final-normed states to those of head `k`."""
        return self.norm(run_block(self.block, h, k))

    def start_as_identity(self, trunk_norm: nn.Module) -> None:
        """Silence the block, so that only the norm acts, at the scale of the trunk's."""
        silence(self.block)
        match_scale(self.norm, trunk_norm)


class SequentialParts(NamedTuple):
    """The parts of a sequential head, whatever a checkpoint calls them."""

    embedding_norm: nn.Module
    hidden_norm: nn.Module
    proj: nn.Linear
    block: nn.Module
    norm: nn.Module

    def start_as_identity(self, trunk_norm: nn.Module, reads_stream: bool = False) -> None:
        """Pass ``h`` through, ignore ``e`` and silence the block.

        A head that reads the stream before the final norm must apply that norm itself.
        """
        width = self.proj.out_features
        init.copy_(self.proj.weight, torch.cat([torch.zeros(width, width), torch.eye(width)], 1))
        silence(self.block)
        match_scale(self.norm, trunk_norm, per_dimension=reads_stream)


def advance(
    parts: SequentialParts, k: int, h: Float[Tensor, "B T D"], embedded: Float[Tensor, "B T D"], run_block: RunBlock
) -> Float[Tensor, "B T D"]:
    """``norm(block(proj [embedding_norm(e); hidden_norm(h)]))``, for head or step `k`."""
    joined = torch.cat([parts.embedding_norm(embedded), parts.hidden_norm(h)], -1)  # (B, T, 2D)
    return parts.norm(run_block(parts.block, parts.proj(joined), k))


class SequentialHead(nn.Module):
    """``norm(block(proj [norm_e(e); norm_h(h)]))``: DeepSeek-V3's module (arXiv:2412.19437, equations 21 to 23).

    ``h`` is the previous head's state, ``e`` the embedding of the token that it predicted.
    """

    def __init__(self, width: int, block: nn.Module, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm, self.norm = make_norm(), make_norm(), make_norm()
        self.proj = nn.Linear(2 * width, width, bias=False)
        self.block = block

    @property
    def parts(self) -> SequentialParts:
        """The submodules by role."""
        return SequentialParts(self.embedding_norm, self.hidden_norm, self.proj, self.block, self.norm)

    def forward(self, k: int, h: Tensor, embedded: Tensor, run_block: RunBlock) -> Tensor:
        """Advance the states ``[B, T, D]`` by one token."""
        return advance(self.parts, k, h, embedded, run_block)

    def start_as_identity(self, trunk_norm: nn.Module) -> None:
        """See `SequentialParts.start_as_identity`."""
        self.parts.start_as_identity(trunk_norm)


def silence(block: nn.Module) -> None:
    """Zero the output maps of a decoder layer's attention and MLP, so that it adds nothing to the residual stream.

    Layers of the OLMo family normalise what a branch writes. There the factors of those norms are zeroed instead: after a zero
    map, such a norm would multiply the gradient by ``1 / sqrt(eps)``.
    """
    norms_branches = hasattr(block, "post_feedforward_layernorm")
    last = ("post_attention_layernorm", "post_feedforward_layernorm") if norms_branches else ("o_proj", "down_proj")
    for name, parameter in block.named_parameters():
        if any(part in name for part in last):
            init.zeros_(parameter)


def match_scale(norm: nn.Module, trunk_norm: nn.Module, per_dimension: bool = False) -> None:
    """Let `norm` write states of the same root mean square as the trunk's norm: smaller ones would flatten the prediction.

    Args:
        norm: Changed in place.
        trunk_norm: The backbone's final norm.
        per_dimension: Copy the factor of each dimension, not only their root mean square.
    """
    weight = norm.get_parameter("weight")
    # Applied to ones, a norm returns its factors: its weights or, in Qwen3-Next, 1 + its weights.
    ones = torch.ones_like(weight)
    factors = trunk_norm(ones)
    if not per_dimension:
        factors = factors.square().mean().sqrt()
    init.copy_(weight, weight + factors - norm(ones))


def before_norm(normed: Float[Tensor, "*B D"], norm: nn.Module) -> Float[Tensor, "*B D"]:
    """The stream before an RMS norm, up to the scale of each state: the norm's output divided by its factors.

    The next RMS norm ignores scale, so it gives the same output for this as for the true stream, up to its epsilon. The gradient
    into the stream is the same; `norm` gets none. Dimensions that `norm` multiplies by 0 cannot be recovered and are 0.
    """
    wide = accurate(normed.dtype)
    factor = norm(torch.ones_like(norm.get_parameter("weight"), dtype=wide))
    erased = factor == 0
    return (normed.to(wide) / factor.masked_fill(erased, 1)).masked_fill(erased, 0).to(normed.dtype)


class MTPHeads(nn.Module):
    """The extra heads of a model, named ``heads.0``, ``heads.1``, …; see `NativeHeads` for those with released names.

    Args:
        kind: ``transformer``, ``mlp``, ``shared_lm_head``, ``sequential`` or ``native``; see `MTPConfig.mtp_head_type`.
        n_heads: Number of heads, or of the steps that a recursive one is trained for.
        make_block: Builds a full-attention decoder layer of the backbone.
        make_norm: Builds a norm like the backbone's final one.
        recursive: One ``sequential`` module, fed with its own states, acts as all heads. ``native`` heads always do so.
    """

    heads: nn.ModuleList | tuple[nn.Module, ...]
    """One module per head; a single one for recursive heads."""

    def __init__(
        self,
        kind: str,
        n_heads: int,
        width: int,
        make_block: Callable[[], nn.Module],
        make_norm: Callable[[], nn.Module],
        recursive: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.n_heads = n_heads
        self.recursive = recursive or kind == "native"
        self._build(width, make_block, make_norm)

    def _build(self, width: int, make_block: Callable[[], nn.Module], make_norm: Callable[[], nn.Module]) -> None:
        make: dict[str, Callable[[], nn.Module]] = {
            "transformer": lambda: BlockHead(make_block(), make_norm()),
            "mlp": lambda: ResidualHead(width),
            "shared_lm_head": lambda: LinearHead(width),
            "sequential": lambda: SequentialHead(width, make_block(), make_norm),
        }
        self.heads = nn.ModuleList(make[self.kind]() for _ in range(1 if self.recursive else self.n_heads))

    @property
    def pointwise(self) -> bool:
        """Whether a head reads only the trunk's state at its own position."""
        return self.kind in ("mlp", "shared_lm_head")

    @property
    def sequential(self) -> bool:
        """Whether a head reads the previous head's states, and the embedding of the token in between."""
        return self.kind in ("sequential", "native")

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The decoder layer of each module; none for pointwise heads."""
        return () if self.pointwise else tuple(head.get_submodule("block") for head in self.heads)

    def forward(self, k: int, h: Tensor, embedded: Tensor | None, run_block: RunBlock) -> Tensor:
        """States of head ``k ≥ 1``; logits are the model's unembedding of them.

        Args:
            k: Head, or step of a recursive one, which may exceed `n_heads`.
            h: ``[B, T, D]``: what the trunk gives to the heads; for `sequential` heads after the first, the states of head
                ``k - 1``. Pointwise heads accept any leading shape.
            embedded: ``[B, T, D]``, for `sequential` heads: the embedding of token ``i + k`` at position ``i``.
            run_block: See `RunBlock`.
        """
        head = self.heads[(k - 1) % len(self.heads)]
        if self.pointwise:
            return head(h)
        return head(k, h, embedded, run_block) if self.sequential else head(k, h, run_block)

    def start_as_identity(self, trunk_norm: nn.Module, reads_stream: bool = False) -> None:
        """Initialise every head so that it predicts what the trunk predicts.

        Pointwise heads do so exactly, the others up to the length of single states, which their own norm changes. If the heads
        read the stream, only step 1 does: it applies the trunk's norm, and each later step would apply it once more.

        Args:
            trunk_norm: The backbone's final norm.
            reads_stream: The heads read the stream before that norm; ``native`` only.
        """
        assert not reads_stream, "only native heads read the stream"
        for head in self.heads:
            head.start_as_identity(trunk_norm)  # type: ignore[operator]


class NativeHeads(MTPHeads):
    """The multi-token module of Qwen3-Next and Qwen3.5: a recursive sequential head under the names of released checkpoints.

    There the parts follow ``mtp.`` directly, so they are submodules of this module, which is its own only head.
    """

    def _build(self, width: int, make_block: Callable[[], nn.Module], make_norm: Callable[[], nn.Module]) -> None:
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = make_norm(), make_norm(), make_norm()
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([make_block()])

    @property
    def heads(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """This module."""
        return (self,)

    @property
    def parts(self) -> SequentialParts:
        """The submodules by role."""
        return SequentialParts(self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.fc, self.layers[0], self.norm)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """As in `MTPHeads`."""
        return (self.parts.block,)

    def forward(self, k: int, h: Tensor, embedded: Tensor | None, run_block: RunBlock) -> Tensor:
        """As in `MTPHeads`."""
        assert embedded is not None, "native heads need embeddings"
        return advance(self.parts, k, h, embedded, run_block)

    def start_as_identity(self, trunk_norm: nn.Module, reads_stream: bool = False) -> None:
        """As in `MTPHeads`."""
        self.parts.start_as_identity(trunk_norm, reads_stream)


def shifted(x: Float[Tensor, "B T D"], offset: int) -> Float[Tensor, "B T D"]:
    """Bring position ``i + offset`` to position ``i``; zeros where there is none."""
    return F.pad(x[:, offset:], (0, 0, 0, min(offset, x.shape[1])))


@dataclass(frozen=True, eq=False)
class HeadTask:
    """What the heads are asked to predict, and how much each prediction counts."""

    heads: Any
    """`MTPHeads`, or PEFT's wrapper around them; None if only the main head has targets."""

    targets: Int[Tensor, "B T H"]
    """Token that each head should predict at each position; negative where there is none. If H is smaller than the model's number
    of heads, the remaining heads are not run."""

    coefficients: Float[Tensor, "B T H"]
    """Factor of each target's loss. Targets with 0 are not computed."""

    run_block: RunBlock
    trunk_gradient: float = 1.0
    """Factor of the gradient that the extra heads send into the trunk; 0 detaches them."""

    def rows(self, k: int) -> Tensor:
        """``[B, T]``: positions at which head `k` has something to learn."""
        return (self.coefficients[..., k] != 0) & (self.targets[..., k] >= 0)


def head_losses(
    hidden: Float[Tensor, "B T D"],
    embedded: Float[Tensor, "B T D"] | None,
    unembedding: Float[Tensor, "V D"],
    task: HeadTask,
    read: Float[Tensor, "B T D"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "B T H"]]:
    """``Σ coefficients · CE`` over positions and heads, head by head.

    Each head runs forward and backward before the next one starts; its gradient ends at a detached copy of the trunk's states. So
    the activations of one head exist at a time, and the trunk is back-propagated through once (arXiv:2404.19737, section 2; there
    the logits of one head exist at a time, here those of one chunk of rows).

    Args:
        hidden: Final-normed states of the trunk.
        embedded: Embeddings of the input tokens, for sequential heads.
        unembedding: The model's vocabulary projection.
        task: Targets, coefficients, heads.
        read: What the extra heads read from the trunk; None is `hidden`.

    Returns:
        The sum, differentiable once with respect to `hidden`, `embedded`, `unembedding`, `read` and the parameters of the heads;
        and the loss of each computed target in nats, detached, 0 elsewhere.
    """
    parameters = [] if task.heads is None else [p for p in task.heads.parameters() if p.requires_grad]
    total, losses = _HeadByHead.apply(task, torch.is_grad_enabled(), unembedding, hidden, read, embedded, *parameters)
    return total, losses


class _HeadByHead(torch.autograd.Function):
    """Computes the gradients in the forward pass, head by head; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        task: HeadTask,
        differentiable: bool,
        unembedding: Tensor,
        hidden: Tensor,
        read: Tensor | None,
        embedded: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(differentiable and any(ctx.needs_input_grad)):
            inputs = Inputs(
                unembedding,
                _leaf(hidden),
                None if read is None else _leaf(read),
                None if embedded is None else _leaf(embedded),
                parameters,
            )
            work = _Pass(task, inputs)
            rows = task.rows(0)
            work.backward([work.loss(0, inputs.hidden[rows], rows)])
            if task.targets.shape[-1] > 1:
                assert task.heads is not None, "targets of extra heads need heads"
                extra = _parallel if not task.heads.sequential else _recursive if task.heads.recursive else _chain
                extra(work)
        ctx.gradients = [work.gradient(tensor) for tensor in inputs.in_order]
        ctx.mark_non_differentiable(work.losses)
        return work.total, work.losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _losses: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradient of the heads is used up: compute the loss again for another backward pass."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # In place: a second copy of the unembedding's gradient could be the largest tensor of the step.
        return None, None, *(None if gradient is None else gradient.mul_(upstream) for gradient in gradients)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the loss is differentiated by, named as in `head_losses`."""

    unembedding: Tensor
    hidden: Tensor
    read: Tensor | None
    embedded: Tensor | None
    parameters: tuple[Tensor, ...]

    @property
    def trunk(self) -> list[Tensor]:
        """The tensors that come from the trunk."""
        return [tensor for tensor in (self.hidden, self.read, self.embedded) if tensor is not None]

    @property
    def in_order(self) -> tuple[Tensor | None, ...]:
        """All of them, as `_HeadByHead.forward` takes them."""
        return (self.unembedding, self.hidden, self.read, self.embedded, *self.parameters)


def _leaf(tensor: Tensor) -> Tensor:
    """Cut the trunk's tensor off its graph, so that no head's backward pass enters it."""
    return tensor.detach().requires_grad_(tensor.requires_grad and torch.is_grad_enabled())


class _Pass:
    """Losses and gradients of one pass through all heads, summed as it goes."""

    def __init__(self, task: HeadTask, inputs: Inputs) -> None:
        self.task = task
        self.inputs = inputs
        self.read = inputs.hidden if inputs.read is None else inputs.read
        self.losses = torch.zeros_like(task.coefficients, dtype=accurate(inputs.hidden.dtype))
        self.total = self.losses.new_zeros(())
        self.gradients: dict[Tensor, Tensor] = {}  # by input; tensors are hashed by identity
        weight = inputs.unembedding
        if torch.is_grad_enabled() and weight.requires_grad:
            # The cross-entropy of every head adds to this one matrix, which may be the largest tensor of the step.
            self.gradients[weight] = torch.zeros_like(weight, dtype=accurate(weight.dtype))

    def loss(self, k: int, states: Tensor, rows: Tensor) -> Tensor:
        """``Σ coefficients · CE`` of head `k`, from its states ``[N, D]`` at its rows ``[B, T]``."""
        total, losses = weighted_cross_entropy(
            states,
            self.inputs.unembedding,
            self.task.targets[..., k][rows],
            self.task.coefficients[..., k][rows],
            self.gradients.get(self.inputs.unembedding),
        )
        self.losses[..., k][rows] = losses
        self.total += total.detach()
        return total

    def backward(
        self,
        outputs: list[Tensor],
        upstream: Sequence[Tensor | None] | None = None,
        trunk_gradient: float = 1.0,
        link: Tensor | None = None,
    ) -> Tensor | None:
        """Add to the gradients of the inputs.

        Args:
            outputs: What to differentiate.
            upstream: Gradient of each output; None is 1, for a scalar.
            trunk_gradient: Factor of the gradients of the trunk's tensors.
            link: Leaf that this head reads from the previous one.

        Returns:
            The gradient of `link`.
        """
        factors = dict.fromkeys(self.inputs.trunk, trunk_gradient) | dict.fromkeys(self.inputs.parameters, 1.0)
        wanted = [tensor for tensor, factor in factors.items() if factor != 0 and tensor.requires_grad]
        leaves = wanted if link is None else [*wanted, link]
        if not leaves or not outputs[0].requires_grad:
            return None
        found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
        for tensor, gradient in zip(wanted, found, strict=False):
            if gradient is not None:
                self._add(tensor, gradient if factors[tensor] == 1 else gradient * factors[tensor])
        return None if link is None else found[-1]

    def _add(self, tensor: Tensor, gradient: Tensor) -> None:
        total = self.gradients.get(tensor)
        self.gradients[tensor] = gradient if total is None else total.add_(gradient)

    def gradient(self, tensor: Tensor | None) -> Tensor | None:
        """Sum of an input's gradients, in its own precision; None where nothing reached it."""
        total = None if tensor is None else self.gradients.get(tensor)
        return total if tensor is None or total is None else total.to(tensor.dtype)


def _parallel(work: _Pass) -> None:
    """Heads that read only the trunk: each runs forward and backward before the next one."""
    task, heads = work.task, work.task.heads
    for k in range(1, task.targets.shape[-1]):
        rows = task.rows(k)
        if heads.pointwise:
            states = heads(k, work.read[rows], None, task.run_block)
        else:
            states = heads(k, work.read, None, task.run_block)[rows]
        work.backward([work.loss(k, states, rows)], trunk_gradient=task.trunk_gradient)


def _chain(work: _Pass) -> None:
    """Sequential heads: run all, each detached from the one before, then walk back, head by head, with its cross-entropy."""
    task, embedded = work.task, work.inputs.embedded
    assert embedded is not None, "sequential heads need embeddings"
    links: list[tuple[Tensor, Tensor]] = []  # what each head reads, and what it writes
    states = work.read
    for k in range(1, task.targets.shape[-1]):
        # The first head reads the trunk's tensor, whose gradient is collected by name.
        read = states if k == 1 else states.detach().requires_grad_(states.requires_grad)
        states = task.heads(k, read, shifted(embedded, k), task.run_block)
        links.append((read, states))
    carried: Tensor | None = None  # gradient of what head k writes, from head k + 1
    for k in range(task.targets.shape[-1] - 1, 0, -1):
        read, states = links.pop()
        rows = task.rows(k)
        loss = work.loss(k, states[rows], rows)
        outputs, upstream = ([loss], None) if carried is None else ([loss, states], [None, carried])
        carried = work.backward(outputs, upstream, task.trunk_gradient, read if k > 1 and read.requires_grad else None)


def _recursive(work: _Pass) -> None:
    """The steps of a recursive head share keys, so their chain is one graph, walked back once, after all cross-entropies."""
    task, embedded = work.task, work.inputs.embedded
    assert embedded is not None, "sequential heads need embeddings"
    steps: list[Tensor] = []
    for k in range(1, task.targets.shape[-1]):
        read = steps[-1] if steps else work.read
        steps.append(task.heads(k, read, shifted(embedded, k), task.run_block))
    upstream: list[Tensor | None] = []
    for k, states in enumerate(steps, start=1):
        rows = task.rows(k)
        leaf = states.detach().requires_grad_(states.requires_grad)
        loss = work.loss(k, leaf[rows], rows)
        upstream.append(torch.autograd.grad(loss, leaf)[0] if leaf.requires_grad else None)
    work.backward(steps, upstream, task.trunk_gradient)
