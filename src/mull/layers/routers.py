"""Routers of layers, which are skipped, executed or repeated, and of the think block's iterations.

Shapes: B batch, T tokens, D model width, A actions, S sequences, W windows.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

SKIP, EXECUTE, REPEAT = 0, 1, 2
"""Actions: how often the layer runs."""

HEAD_START = 2.0
"""Logit of EXECUTE, and of the most iterations, before any training; those of the others are 0."""


class Router(nn.Module):
    """Reads states, and gives a logit per choice, in fp32 at least."""

    @property
    def precision(self) -> torch.dtype:
        """What it computes in: fp32, or fp64 if its weights are."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)


class Affine(nn.Module):
    """Weights of a linear map of a router. Adapters would change an `nn.Linear`, and nothing would read the change."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_outputs, n_inputs))
        self.bias = nn.Parameter(torch.empty(n_outputs))


class LayerRouter(Router):
    """``out(gelu(inner(norm(h))))``: a logit per action, in fp32 at least. Before any training every input gives EXECUTE.

    The last layer's weights start at zero, so the first one has a gradient from the second step on.

    Args:
        width: Model width D.
        hidden: Width of the inner layer.
        n_actions: 2 leaves REPEAT out.

    Source:
        Dr.LLM (arXiv:2510.12773), section 2.1, without the norm, and with random last weights. States of deep layers have few
        very large components, which would decide alone.
    """

    def __init__(self, width: int, hidden: int, n_actions: int) -> None:
        super().__init__()
        self.inner, self.out = Affine(width, hidden), Affine(hidden, n_actions)
        self.start_at_execute()

    def start_at_execute(self) -> None:
        """Make EXECUTE the action of every input."""
        init.xavier_uniform_(self.inner.weight)
        init.zeros_(self.inner.bias)
        init.zeros_(self.out.weight)
        head_start = torch.zeros(self.out.bias.shape)
        head_start[EXECUTE] = HEAD_START
        init.copy_(self.out.bias, head_start)

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... A"]:
        """Logits of the actions."""
        dtype = self.precision
        with torch.autocast(states.device.type, enabled=False):
            x = normed(states.to(dtype))
            inner = F.linear(x, self.inner.weight.to(dtype), self.inner.bias.to(dtype))
            return F.linear(F.gelu(inner), self.out.weight.to(dtype), self.out.bias.to(dtype))


class DepthGate(Router):
    """``W norm(h) + b``: a logit per number of iterations. Before any training every input gives the most.

    Args:
        width: Model width D.
        n_depths: A, the most iterations.

    Source:
        Mixture-of-Recursions (arXiv:2507.10524), token choice, without the norm, and with random weights.
    """

    def __init__(self, width: int, n_depths: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, n_depths)
        self.start_at_most()

    def start_at_most(self) -> None:
        """Make the most iterations the choice of every input."""
        init.zeros_(self.out.weight)
        head_start = torch.zeros(self.out.bias.shape)
        head_start[-1] = HEAD_START
        init.copy_(self.out.bias, head_start)

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... A"]:
        """Logits of 1, 2 and more iterations."""
        dtype = self.precision
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(normed(states.to(dtype)), self.out.weight.to(dtype), self.out.bias.to(dtype))


def normed(states: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """States of unit mean square."""
    return F.rms_norm(states, states.shape[-1:])


class Prompts:
    """The windows of each sequence's prompt, over which its router looks.

    The prompt's tokens are cut into W contiguous windows of equal length, up to one token; all of them if there are fewer.

    Args:
        tokens: The tokens that belong to a prompt.
        sequences: Number of each token's sequence, in the order in which they stand in the batch.
        n_sequences: S.
        n_windows: W.

    Source:
        Dr.LLM (arXiv:2510.12773) cuts off up to W - 1 tokens at the end of the prompt, and its code takes padding for tokens.
    """

    def __init__(
        self, tokens: Bool[Tensor, "B T"], sequences: Int[Tensor, "B T"], n_sequences: int, n_windows: int
    ) -> None:
        self.sequences = sequences
        self._shape = n_sequences, n_windows
        self._index = tokens.flatten().nonzero()[:, 0]
        of_token = sequences.flatten()[self._index]
        lengths = of_token.bincount(minlength=n_sequences)
        rank = torch.arange(len(of_token), device=tokens.device) - (lengths.cumsum(0) - lengths)[of_token]
        self._window = of_token * n_windows + rank * n_windows // lengths[of_token]
        self._counts = self._window.bincount(minlength=n_sequences * n_windows).view(n_sequences, n_windows)

    @classmethod
    def of(
        cls,
        states: Float[Tensor, "B T D"],
        sequences: Int[Tensor, "B T"] | None,
        real: Bool[Tensor, "B T"] | None,
        prompt_mask: Shaped[Tensor, "B T"] | None,
        n_windows: int,
    ) -> "Prompts":
        """The prompts of a call.

        Args:
            states: Only their shape counts.
            sequences: Number of each token's sequence, as in `sequence_numbers`; None for one in each row.
            real: False for padding; None without.
            prompt_mask: True or 1 for tokens of prompts; None for the first token of each sequence.
            n_windows: W.
        """
        everything = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if sequences is None:
            sequences = torch.arange(len(states), device=states.device)[:, None].expand(everything.shape)
        labelled = everything if prompt_mask is None else ~prompt_mask.bool()
        real = everything if real is None else real
        tokens = prompt_tokens(labelled & real, real, sequences)
        return cls(tokens, sequences, 1 + int(sequences[-1, -1]), n_windows)

    def logits(self, router: Router, states: Float[Tensor, "B T D"]) -> Float[Tensor, "S A"]:
        """Mean over a prompt's windows of the router's logits for the mean of a window's normed states."""
        x = normed(states.flatten(0, 1)[self._index].to(router.precision))
        sums = x.new_zeros(self._counts.numel(), x.shape[-1]).index_add(0, self._window, x)
        means = sums.view(*self._shape, -1) / self._counts.clamp(min=1)[..., None]
        filled = (self._counts > 0)[..., None]
        return (router(means) * filled).sum(1) / filled.sum(1).clamp(min=1)


def prompt_tokens(
    labelled: Bool[Tensor, "B T"], real: Bool[Tensor, "B T"], sequences: Int[Tensor, "B T"]
) -> Bool[Tensor, "B T"]:
    """Tokens before the first one of their sequence that has a label, unshifted; at least the first that is no padding.

    A decision on these tokens cannot look at what is to be predicted.
    """
    begins = F.pad(sequences.flatten().diff() != 0, (1, 0), value=True)
    first = begins.nonzero()[:, 0][begins.long().cumsum(0) - 1]

    def so_far(marked: Tensor) -> Tensor:
        flat = marked.flatten().long()
        before = flat.cumsum(0) - flat
        return (before + flat - before[first]).view_as(marked)

    return real & ((so_far(labelled) == 0) | (so_far(real) == 1))


def sequence_numbers(begins: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Number of the sequence that each token belongs to: one starts with each row, and where `begins` is True."""
    begins = F.pad(begins[:, 1:], (1, 0), value=True)
    return (begins.flatten().long().cumsum(0) - 1).view_as(begins)
