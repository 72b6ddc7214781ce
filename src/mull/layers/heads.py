"""Multi-token prediction heads, and their loss, one head after the other.

Head ``k ≥ 1`` at position ``i`` predicts token ``i + 1 + k``. The main head, ``k = 0``, is the model itself. All heads share the
model's unembedding, and start as the model's own next-token prediction.

Shapes: B batch, T tokens, D model width, V vocabulary, H heads, the main one included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from mull.ops.cross_entropy import accurate, weighted_cross_entropy

RunBlock = Callable[[nn.Module, Tensor, int], Tensor]
"""Runs a head's decoder layer on hidden states ``[B, T, D]`` with the masks, positions and keys of the call. The number is that
of the head, or of the step of a recursive one."""


class LinearHead(nn.Module):
    """``W h``, identity at the start: the lightest head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Map final-normed states of the trunk to those of the head."""
        return self.proj(h)

    def start_as_identity(self, _trunk_norm: nn.Module) -> None:
        """Predict what the trunk predicts."""
        init.eye_(self.proj.weight)


class ResidualHead(nn.Module):
    """``h + silu(W h)``, the head of Medusa (arXiv:2401.10774, section 2.1.1), with W = 0 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, h: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Map final-normed states of the trunk to those of the head."""
        return h + F.silu(self.proj(h))

    def start_as_identity(self, _trunk_norm: nn.Module) -> None:
        """Predict what the trunk predicts."""
        init.zeros_(self.proj.weight)


class BlockHead(nn.Module):
    """``norm(block(h))`` with a decoder layer of the backbone, as in Meta's parallel heads (arXiv:2404.19737, section 2).

    Meta's layer reads the stream before the final norm and all heads share that norm; ours reads the normed states, the one
    convention of all heads here, and has a norm of its own.
    """

    def __init__(self, block: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.norm = norm

    def forward(self, k: int, h: Float[Tensor, "B T D"], run_block: RunBlock) -> Float[Tensor, "B T D"]:
        """Map final-normed states of the trunk to those of head `k`."""
        return self.norm(run_block(self.block, h, k))

    def start_as_identity(self, trunk_norm: nn.Module) -> None:
        """Make the block's two branches write nothing; what is left is the norm, at the scale of the trunk's."""
        silence(self.block)
        match_scale(self.norm, trunk_norm)


class SequentialHead(nn.Module):
    """``norm(block(proj [norm_e(e); norm_h(h)]))``: DeepSeek-V3's module (arXiv:2412.19437, equations 21 to 23).

    ``h`` is the state of the head before, ``e`` the embedding of the token that it predicted.
    """

    def __init__(self, width: int, block: nn.Module, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm, self.norm = make_norm(), make_norm(), make_norm()
        self.proj = nn.Linear(2 * width, width, bias=False)
        self.block = block

    def forward(
        self, k: int, h: Float[Tensor, "B T D"], embedded: Float[Tensor, "B T D"], run_block: RunBlock
    ) -> Float[Tensor, "B T D"]:
        """Advance the states by one token; `k` is the head or step that does so."""
        joined = torch.cat([self.embedding_norm(embedded), self.hidden_norm(h)], -1)  # (B, T, 2D)
        return self.norm(run_block(self.block, self.proj(joined), k))

    def start_as_identity(self, trunk_norm: nn.Module) -> None:
        """Let the hidden half through; the embedded half starts at zero, and the block's two branches write nothing."""
        pass_hidden(self.proj)
        silence(self.block)
        match_scale(self.norm, trunk_norm)


def pass_hidden(proj: nn.Linear) -> None:
    """Let a map of ``[e; h]`` start as ``h``."""
    width = proj.out_features
    init.copy_(proj.weight, torch.cat([torch.zeros(width, width), torch.eye(width)], 1))


def silence(block: nn.Module) -> None:
    """Zero what a decoder layer's attention and MLP write with, so that it adds nothing to its stream.

    That is their output maps; in layers of the OLMo family the norms behind them, which would multiply the gradient of a zero
    map by ``1 / sqrt(eps)``.
    """
    norms_branches = hasattr(block, "post_feedforward_layernorm")
    last = ("post_attention_layernorm", "post_feedforward_layernorm") if norms_branches else ("o_proj", "down_proj")
    for name, parameter in block.named_parameters():
        if any(part in name for part in last):
            init.zeros_(parameter)


def match_scale(norm: nn.Module, trunk_norm: nn.Module) -> None:
    """Let `norm` write states of the root mean square that the trunk's norm gives: a smaller one flattens the prediction.

    A norm answers a vector of ones with its factors, whether they are its weights or, as in Qwen3-Next, 1 + its weights.
    """
    weight = norm.get_parameter("weight")
    ones = torch.ones_like(weight)
    factor = trunk_norm(ones).square().mean().sqrt()
    init.copy_(weight, weight + factor - norm(ones))


def before_norm(normed: Float[Tensor, "*B D"], norm: nn.Module) -> Float[Tensor, "*B D"]:
    """The stream before an RMS norm, each state at root mean square 1: what the norm wrote, divided by the norm's factors.

    A following RMS norm is blind to the scale of a state, so it writes the same for this as for the stream itself: with the same
    gradient into the stream and none into `norm`, and up to its epsilon, of which half is the relative error where the stream
    is large. Dimensions that `norm` erases, by a factor of 0, are 0.
    """
    wide = accurate(normed.dtype)
    factor = norm(torch.ones_like(norm.get_parameter("weight"), dtype=wide))
    erased = factor == 0
    return (normed.to(wide) / factor.masked_fill(erased, 1)).masked_fill(erased, 0).to(normed.dtype)


class MTPHeads(nn.Module):
    """The heads behind the main one, of all types but ``native``.

    Args:
        kind: ``transformer``, ``mlp``, ``shared_lm_head`` or ``sequential``; see `MTPConfig.mtp_head_type`.
        n_heads: Number of heads.
        width: D.
        make_block: Builds a full-attention decoder layer of the backbone.
        make_norm: Builds a norm like the backbone's final one.
        recursive: Run one ``sequential`` module as all heads.
    """

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
        self.n_heads = n_heads
        self.kind = kind
        self.recursive = recursive
        make: dict[str, Callable[[], nn.Module]] = {
            "transformer": lambda: BlockHead(make_block(), make_norm()),
            "mlp": lambda: ResidualHead(width),
            "shared_lm_head": lambda: LinearHead(width),
            "sequential": lambda: SequentialHead(width, make_block(), make_norm),
        }
        n_modules = 1 if self.recursive else self.n_heads
        self.heads = nn.ModuleList(make[self.kind]() for _ in range(n_modules))

    @property
    def pointwise(self) -> bool:
        """Whether a head's state depends on the trunk's state of the same position alone."""
        return self.kind in ("mlp", "shared_lm_head")

    @property
    def sequential(self) -> bool:
        """Whether a head continues from the states of the head before, and reads the embedding of the token in between."""
        return self.kind == "sequential"

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The decoder layer of each module; none for pointwise heads."""
        return tuple(head.get_submodule("block") for head in self.heads if not self.pointwise)

    def forward(self, k: int, h: Tensor, embedded: Tensor | None, run_block: RunBlock) -> Tensor:
        """States of head ``k ≥ 1``; logits are the model's unembedding of them.

        Args:
            k: Which head, or step of a recursive one, which may go on behind the number of heads.
            h: ``[B, T, D]``: the trunk's final-normed states, for `sequential` heads those of head ``k - 1``. Pointwise heads
                take any leading shape.
            embedded: ``[B, T, D]``: embedding of token ``i + k`` at position ``i``, for `sequential` heads.
            run_block: See `RunBlock`.
        """
        head = self.heads[(k - 1) % len(self.heads)]
        if self.pointwise:
            return head(h)
        return head(k, h, embedded, run_block) if self.sequential else head(k, h, run_block)

    def start_as_identity(self, trunk_norm: nn.Module) -> None:
        """Initialise every head so that it predicts what the trunk predicts.

        Pointwise heads do so exactly, the others up to what their own norm does to the length of single states.

        Args:
            trunk_norm: The backbone's final norm.
        """
        for head in self.heads:
            head.start_as_identity(trunk_norm)  # type: ignore[operator]


class NativeHeads(nn.Module):
    """``norm(layer(fc [norm_e(e); norm_h(h)]))``, run recursively: the multi-token module of Qwen3-Next and Qwen3.5.

    It computes what a recursive `SequentialHead` computes, and has the interface of `MTPHeads`. Its parts are named as in the
    released checkpoints, where they stand under ``mtp.``. Step 1 reads the trunk's final-normed state, or with
    ``native_hidden_state="stream"`` the stream before the final norm (`before_norm`); step k reads what step ``k - 1`` wrote.

    Args:
        n_heads: Number of steps that are trained.
        width: D.
        make_block: Builds a full-attention decoder layer of the backbone.
        make_norm: Builds a norm like the backbone's final one.
        reads_stream: Step 1 reads the stream before the final norm.
    """

    kind = "native"
    pointwise = False
    sequential = True
    recursive = True

    def __init__(
        self,
        n_heads: int,
        width: int,
        make_block: Callable[[], nn.Module],
        make_norm: Callable[[], nn.Module],
        reads_stream: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.reads_stream = reads_stream
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = make_norm(), make_norm(), make_norm()
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([make_block()])

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """The modules that predict: this one."""
        return (self,)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The decoder layer of each module."""
        return tuple(self.layers)

    def forward(self, k: int, h: Tensor, embedded: Tensor | None, run_block: RunBlock) -> Tensor:
        """States of step ``k ≥ 1``; logits are the model's unembedding of them.

        Args:
            k: Which step, 1 or more.
            h: ``[B, T, D]``: what the trunk gives to step 1, otherwise the states of step ``k - 1``.
            embedded: ``[B, T, D]``: embedding of token ``i + k`` at position ``i``.
            run_block: See `RunBlock`.
        """
        assert embedded is not None, "native heads need embeddings"
        joined = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(h)], -1)  # (B, T, 2D)
        return self.norm(run_block(self.layers[0], self.fc(joined), k))

    def start_as_identity(self, trunk_norm: nn.Module) -> None:
        """Initialise so that every step predicts what the trunk predicts, up to the length of single states.

        With the stream as input that holds for step 1 alone: its norm then has to repeat the trunk's, and the steps behind it
        would do so again.

        Args:
            trunk_norm: The backbone's final norm.
        """
        pass_hidden(self.fc)
        silence(self.layers[0])
        if not self.reads_stream:
            match_scale(self.norm, trunk_norm)
            return
        weight = self.norm.get_parameter("weight")
        ones = torch.ones_like(weight)
        init.copy_(weight, weight + trunk_norm(ones) - self.norm(ones))


def shifted(x: Float[Tensor, "B T D"], offset: int) -> Float[Tensor, "B T D"]:
    """Bring position ``i + offset`` to position ``i``; zeros where there is none."""
    return F.pad(x[:, offset:], (0, 0, 0, min(offset, x.shape[1])))


@dataclass(frozen=True, eq=False)
class HeadTask:
    """What the heads are asked to predict, and how much each prediction counts."""

    heads: Any
    """`MTPHeads`, or PEFT's wrapper around them; None where only the main head has targets."""

    targets: Int[Tensor, "B T H"]
    """Token that each head shall predict at each position; below 0: none. H may be less than the model has heads: the further
    ones are then not run at all."""

    coefficients: Float[Tensor, "B T H"]
    """Factor of each target's loss. Targets with 0 are not computed."""

    run_block: RunBlock
    trunk_gradient: float = 1.0
    """Factor of the gradient that the heads behind the main one send into the trunk; 0 detaches them."""

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

    Each head's forward and backward pass runs into a detached copy of the trunk's states before the next head starts, so the
    activations of one head exist at a time, and the trunk is back-propagated through once (arXiv:2404.19737, section 2; there the
    logits of one head exist at a time, here those of one chunk of rows). Sequential heads are chained: the states of all are
    computed, then the chain is walked back, cross-entropy and head by head. The steps of a recursive head also share keys, so
    their chain is one graph, and walked back at once behind the cross-entropy of every step.

    Args:
        hidden: Final-normed states of the trunk.
        embedded: Embeddings of the input tokens, for sequential heads.
        unembedding: The model's vocabulary projection.
        task: Targets, coefficients, heads.
        read: What the heads behind the main one read from the trunk; None is `hidden`.

    Returns:
        The sum, differentiable once with respect to `hidden`, `embedded`, `unembedding`, `read` and the parameters of the heads;
        and the loss of each computed target in nats, detached, 0 elsewhere.
    """
    parameters = [] if task.heads is None else [p for p in task.heads.parameters() if p.requires_grad]
    total, losses = _HeadByHead.apply(task, torch.is_grad_enabled(), unembedding, hidden, read, embedded, *parameters)
    return total, losses


class _HeadByHead(torch.autograd.Function):
    """Takes the gradient in the forward pass, head by head; the backward pass scales it."""

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
            work = _Pass(task, unembedding, (hidden, read, embedded), parameters)
            work.run()
        if work.gradients[0] is not None:
            work.gradients[0] = work.gradients[0].to(unembedding.dtype)
        ctx.gradients = work.gradients
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


class _Pass:
    """One forward and backward pass through all heads."""

    def __init__(
        self,
        task: HeadTask,
        unembedding: Tensor,
        trunk: tuple[Tensor, Tensor | None, Tensor | None],
        parameters: tuple[Tensor, ...],
    ) -> None:
        self.task = task
        self.unembedding = unembedding
        differentiable = torch.is_grad_enabled()
        hidden, read, self.embedded = (
            None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad and differentiable)
            for tensor in trunk
        )
        assert hidden is not None
        self.hidden = hidden
        self.read = hidden if read is None else read
        self.inputs = (hidden, read, self.embedded, *parameters)
        self.losses = torch.zeros_like(task.coefficients, dtype=accurate(hidden.dtype))
        self.total = self.losses.new_zeros(())
        wanted = differentiable and unembedding.requires_grad
        self.gradients: list[Tensor | None] = [
            torch.zeros_like(unembedding, dtype=accurate(unembedding.dtype)) if wanted else None
        ]
        self.gradients += [None] * len(self.inputs)

    def run(self) -> None:
        """Compute the losses, and the gradients where they are wanted."""
        n_heads = self.task.targets.shape[-1]
        rows = self.task.rows(0)
        self._back([self._loss(0, self.hidden[rows], rows)], [None])
        heads = self.task.heads
        if n_heads == 1:
            return
        assert heads is not None, "targets of further heads need heads"
        if heads.sequential:
            if heads.recursive:
                self._recursion(heads, n_heads)
            else:
                self._chain(heads, n_heads)
            return
        for k in range(1, n_heads):
            rows = self.task.rows(k)
            if heads.pointwise:
                states = heads(k, self.read[rows], None, self.task.run_block)
            else:
                states = heads(k, self.read, None, self.task.run_block)[rows]
            self._back([self._loss(k, states, rows)], [None], self.task.trunk_gradient)

    def _chain(self, heads: Any, n_heads: int) -> None:
        links: list[tuple[Tensor, Tensor]] = []  # what a head reads, detached from the head before, and what it writes
        states = self.read
        for k in range(1, n_heads):
            assert self.embedded is not None, "sequential heads need embeddings"
            read = states if k == 1 else states.detach().requires_grad_(torch.is_grad_enabled())
            states = heads(k, read, shifted(self.embedded, k), self.task.run_block)
            links.append((read, states))
        carried: Tensor | None = None
        for k in range(n_heads - 1, 0, -1):
            read, states = links.pop()
            rows = self.task.rows(k)
            loss = self._loss(k, states[rows], rows)
            outputs, upstream = ([loss], [None]) if carried is None else ([loss, states], [None, carried])
            carried = self._back(outputs, upstream, self.task.trunk_gradient, None if k == 1 else read)

    def _recursion(self, heads: Any, n_heads: int) -> None:
        assert self.embedded is not None, "sequential heads need embeddings"
        chain: list[Tensor] = [self.read]
        for k in range(1, n_heads):
            chain.append(heads(k, chain[-1], shifted(self.embedded, k), self.task.run_block))
        steps, upstream = chain[1:], []
        for k, states in enumerate(steps, start=1):
            rows = self.task.rows(k)
            leaf = states.detach().requires_grad_(states.requires_grad)
            loss = self._loss(k, leaf[rows], rows)
            upstream.append(torch.autograd.grad(loss, leaf)[0] if leaf.requires_grad else None)
        self._back(steps, upstream, self.task.trunk_gradient)

    def _loss(self, k: int, states: Tensor, rows: Tensor) -> Tensor:
        total, losses = weighted_cross_entropy(
            states,
            self.unembedding,
            self.task.targets[..., k][rows],
            self.task.coefficients[..., k][rows],
            self.gradients[0],
        )
        self.losses[..., k][rows] = losses
        self.total += total.detach()
        return total

    def _back(
        self,
        outputs: list[Tensor],
        upstream: Sequence[Tensor | None],
        trunk_gradient: float = 1.0,
        link: Tensor | None = None,
    ) -> Tensor | None:
        """Add to the gradients of the inputs; return that of the link to the head before."""
        factors = [trunk_gradient] * 3 + [1.0] * (len(self.inputs) - 3)  # the first three come from the trunk
        wanted = [
            (place, tensor)
            for place, (tensor, factor) in enumerate(zip(self.inputs, factors, strict=True))
            if tensor is not None and tensor.requires_grad and factor != 0
        ]
        tensors = [tensor for _, tensor in wanted] + ([] if link is None else [link])
        if not tensors or not outputs[0].requires_grad:
            return None
        found = torch.autograd.grad(outputs, tensors, upstream, allow_unused=True)
        for (place, _), gradient in zip(wanted, found, strict=False):
            if gradient is not None:
                self._add(place, gradient if factors[place] == 1 else gradient * factors[place])
        return None if link is None else found[-1]

    def _add(self, place: int, gradient: Tensor) -> None:
        total = self.gradients[place + 1]
        self.gradients[place + 1] = gradient if total is None else total.add_(gradient)
