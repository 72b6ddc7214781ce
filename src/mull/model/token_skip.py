"""Token skipping: each layer has a budget, and some of the tokens run it. The others pass it by unchanged.

Three ways to choose them: Mixture-of-Depths (`DepthRouters`), GateSkip (`SkipGates`) and A-MoD (`AttentionScores`). Each is a
policy over the visits of an ordinary path; a token that skips leaves to later tokens what `ETDConfig.stop` says.

Shapes: B batch, T tokens of a call, D model width, N tokens of any number.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from mull.layers.routers import EXECUTE, LayerRouter
from mull.layers.skipping import (
    ResidualGate,
    TokenScore,
    attention_received,
    attention_to_itself,
    highest,
    quantile,
)
from mull.model.configs import ETDConfig, Stop
from mull.model.path import Visit
from mull.model.policy import NOTHING, Extra, Policy, running
from mull.model.warmup import WarmedUp
from mull.runtime.distributed import global_sum

ATTENTION = "self_attn"
"""What the attention of a decoder layer of transformers is called; recurrent layers have none."""

SEEN_VISITS = 256
"""Latest visits of a layer in an optimizer step whose scores its threshold is taken from."""

NO_THRESHOLD = torch.finfo(torch.float32).min
"""Every score reaches it. It is finite, as all that training saves."""

THRESHOLD_RATE = 0.1
"""Share of the way that a threshold moves in an optimizer step towards that of the step's tokens."""


class SkipCall(NamedTuple):
    """What token skipping needs to know about a call."""

    states: Tensor
    """``[B, T, D]``; only their shape counts."""

    sequences: Callable[[], Tensor | None]
    """``[B, T]``: number of each token's sequence; None for one in each row."""

    tokens: Tensor | None
    """``[B, T]``, False for padding; None without."""

    whole: bool
    """Nothing precedes the call, so it has all tokens of its sequences."""

    fixed: bool
    """The path was given, and all tokens run it."""

    stops: bool
    """Another policy lets tokens stop."""

    def counted(self) -> Tensor:
        """``[B, T]``: tokens that are no padding."""
        shape, device = self.states.shape[:2], self.states.device
        return torch.ones(shape, dtype=torch.bool, device=device) if self.tokens is None else self.tokens

    def highest(self, scores: Tensor, share: float) -> Tensor:
        """``[B, T]``: the share of each sequence's tokens that have the highest scores ``[B, T]``."""
        sequences = self.sequences()
        if sequences is None:
            sequences = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
        return highest(scores, sequences, self.counted(), share)


class TokenSkips(WarmedUp):
    """What token skipping learns and counts. Its share of tokens falls from 1 to the capacity while it warms up.

    Args:
        config: Of the think block.
        layers: Decoder layers of the model.
        width: Model width D.
    """

    def __init__(self, config: ETDConfig, layers: nn.ModuleList, width: int) -> None:
        super().__init__(config.token_skip_warmup_steps)
        assert config.token_skip is not None, "a model with token skipping"
        self.settings = config.token_skip
        self.numbers = self._skippable(config, layers)
        """Indices of the layers that tokens may skip."""
        self._terms: list[Tensor] | None = None
        self._executed: dict[int, tuple[Tensor, int]] = {}
        self._agreed: tuple[Tensor | int, int] = 0, 0

    def _skippable(self, config: ETDConfig, layers: nn.ModuleList) -> tuple[int, ...]:
        return tuple(config.skipped_layers)

    @property
    def share(self) -> float:
        """Share of the tokens that run a layer at this step of the training."""
        done = min(float(self.n_steps) / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        return 1.0 - (1.0 - self.settings.capacity) * done

    @property
    def learns(self) -> bool:
        """Whether a call now is part of the training."""
        return self.training and torch.is_grad_enabled()

    def attach(self, layers: nn.ModuleList) -> None:
        """Work on these layers."""

    def policies(self, stop: Stop, call: SkipCall) -> list[Policy]:
        """That of a call; none where all tokens run, and nothing is weighed."""
        raise NotImplementedError

    @contextmanager
    def auxiliary_losses(self) -> Iterator[list[Tensor]]:
        """Collect the terms of the visits that run meanwhile."""
        outer, self._terms = self._terms, []
        try:
            yield self._terms
        finally:
            self._terms = outer

    def add_loss(self, term: Tensor) -> None:
        """Add the term of a visit, a scalar, where somebody collects them."""
        if self._terms is not None:
            self._terms.append(self.settings.loss_weight * term)

    def count(self, layer: int, runs: Tensor) -> None:
        """Add to the statistics: the tokens ``[N]`` that run a layer, padding left out."""
        n_ran, n_tokens = self._executed.get(layer, (0, 0))
        self._executed[layer] = runs.sum() + n_ran, n_tokens + runs.numel()

    def compare(self, ranked: Tensor, decided: Tensor) -> None:
        """Add to the statistics: whether tokens ``[N]`` run by their rank, and whether they would in use."""
        n_agreed, n_tokens = self._agreed
        self._agreed = (ranked == decided).sum() + n_agreed, n_tokens + ranked.numel()

    def stats(self) -> dict[str, Any]:
        """See `RoutedParts.get_router_stats`."""
        shares = {layer: int(ran) / (total or 1) for layer, (ran, total) in self._executed.items()}
        n_agreed, n_tokens = self._agreed
        agreement = {"rank_agreement": int(n_agreed) / n_tokens} if n_tokens else {}
        return {"executed_share": shares, **agreement}

    def reset_stats(self) -> None:
        """Forget what was counted."""
        self._executed = {}
        self._agreed = 0, 0


class TokenSkipping(Policy):
    """The policy of one call of a model with token skipping.

    In training, the tokens of a sequence are ranked, and the share with the highest scores runs. A rank takes the whole sequence,
    later tokens included, so in use another rule decides about each token by itself.

    Args:
        parts: What it learns.
        stop: What tokens that skip a visit leave behind.
        call: The call.
    """

    def __init__(self, parts: TokenSkips, stop: Stop, call: SkipCall) -> None:
        self.stop = stop
        self.executed: dict[Visit, Tensor] = {}
        """``[B, T]`` by visit."""
        self.call = call
        self.share = parts.share if parts.training and call.whole else None
        """Of the tokens that run by their rank; None where ranks do not decide."""
        self._all = parts

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """Tokens that are chosen."""
        if visit.layer not in self._all.numbers:
            return True
        scores, decided = self.judge(visit.layer, h)
        runs, real, tokens = decided, self.call.counted(), self.call.tokens
        if self.share is not None:
            runs = self.call.highest(scores.detach(), self.share)
            if decided is not None:
                self._all.compare(runs[real], decided[real])
        assert runs is not None, "without ranks, a rule decides"
        if self._all.learns:
            self.learn(visit.layer, scores[real], runs[real])
        if self.call.fixed:
            return True
        self.executed[visit] = runs & real
        self._all.count(visit.layer, runs[real])
        return running(runs, tokens)

    def judge(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores ``[B, T]`` of the states ``[B, T, D]`` before a layer; and which of them run it in use, None if ranks say so."""
        raise NotImplementedError

    def learn(self, layer: int, scores: Tensor, runs: Tensor) -> None:
        """Add what is to be learned of a visit in training, from the tokens ``[N]`` that are no padding."""

    def metrics(self) -> dict[str, Any]:
        """``token_skip_executed``: ``[B, T]`` for each visit that tokens may skip, in the order of the path."""
        return {"token_skip_executed": list(self.executed.values())}


class DepthRouters(TokenSkips):
    """Mixture-of-Depths: a learned score ranks the tokens, and in use a predictor says who would be among the highest.

    The predictor learns from the ranks of training, and passes no gradient to the states. It starts by letting all tokens run.

    Source:
        Mixture-of-Depths (arXiv:2404.02258), which multiplies the update of a token by its score. Then a pretrained model would
        no longer be what it was. Here the update is multiplied by 1, with the derivative of the score (straight through). The
        paper trains from scratch, with a capacity of 12.5 % in every other layer.
    """

    def __init__(self, config: ETDConfig, layers: nn.ModuleList, width: int) -> None:
        super().__init__(config, layers, width)
        hidden = self.settings.hidden_size
        self.scores = nn.ModuleDict({str(layer): TokenScore(width) for layer in self.numbers})
        self.predictors = nn.ModuleDict({str(layer): LayerRouter(width, hidden, 2) for layer in self.numbers})

    def policies(self, stop: Stop, call: SkipCall) -> list[Policy]:
        """Nothing along a path that was given."""
        return [] if call.fixed else [DepthRouting(self, stop, call)]


class DepthRouting(TokenSkipping):
    """The policy of `DepthRouters`."""

    def __init__(self, parts: DepthRouters, stop: Stop, call: SkipCall) -> None:
        super().__init__(parts, stop, call)
        self._parts = parts
        self._scores: Tensor | None = None
        self._logits: Tensor | None = None

    def judge(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """The score, and what the predictor says."""
        self._scores = self._parts.scores[str(layer)](h)
        self._logits = self._parts.predictors[str(layer)](h.detach())
        assert self._scores is not None, "set above"
        assert self._logits is not None, "set above"
        return self._scores, self._logits.argmax(-1) == EXECUTE

    def learn(self, layer: int, scores: Tensor, runs: Tensor) -> None:
        """Who was among the highest."""
        assert self._logits is not None, "judged before"
        if self.share is not None:
            self._parts.add_loss(F.cross_entropy(self._logits[self.call.counted()], runs.long()))

    def weigh(self, visit: Visit, before: Tensor, after: Tensor) -> Tensor:
        """The same states, with a gradient to the scores of the tokens that ran."""
        if visit.layer not in self._parts.numbers or not self._parts.learns:
            return after
        assert self._scores is not None, "judged before"
        weight = self._scores - self._scores.detach()
        return after + weight.to(after.dtype)[..., None] * (after - before).detach()


class Calibrated(TokenSkips):
    """Token skipping that decides in use by a threshold for each layer, which the share of the latest training tokens reaches.

    A new model has no thresholds, and all tokens run.
    """

    in_fp32 = ("thresholds",)
    thresholds: Tensor
    """``[L]``, one for each of `numbers`."""

    def __init__(self, config: ETDConfig, layers: nn.ModuleList, width: int) -> None:
        super().__init__(config, layers, width)
        self.register_buffer("thresholds", torch.full((len(self.numbers),), NO_THRESHOLD, dtype=torch.float32))
        self._seen = {layer: deque[Tensor](maxlen=SEEN_VISITS) for layer in self.numbers}

    def start_anew(self) -> None:
        """Begin the warm-up without thresholds."""
        super().start_anew()
        init.constant_(self.thresholds, NO_THRESHOLD)

    def reach(self, layer: int, scores: Tensor) -> Tensor:
        """Which of the scores reach the layer's threshold."""
        return scores.detach() >= self.thresholds[self.numbers.index(layer)]

    def note(self, layer: int, scores: Tensor) -> None:
        """Let the scores ``[N]`` of training tokens move the layer's threshold at the end of the step."""
        self._seen[layer].append(scores.detach().float())

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the thresholds."""
        super().end_step()
        share = self.share
        for index, layer in enumerate(self.numbers):
            scores = torch.cat([*self._seen[layer], self.thresholds.new_empty(0)])
            self._seen[layer].clear()
            found = quantile(scores, share) if len(scores) else scores.sum()
            total, n_ranks = global_sum(torch.stack([found, found.new_tensor(float(len(scores) > 0))]))
            if share < 1 and n_ranks:
                old, new = self.thresholds[index], total / n_ranks
                self.thresholds[index] = torch.where(old > NO_THRESHOLD, old.lerp(new, THRESHOLD_RATE), new)


class SkipGates(Calibrated):
    """GateSkip: a gate scales each component of a layer's update, and tokens with a low mean gate skip the layer.

    The loss adds to each visit the root mean square of a token's gate, averaged over the tokens: gates close where that costs
    little.

    Source:
        GateSkip (arXiv:2510.13876) has a gate at each attention and each feed-forward part, where there is one for both here. It
        ranks in use as well, and hands the keys of the layer below to later tokens. Its loss divides the norm of a gate by D and
        not by its root.
    """

    def __init__(self, config: ETDConfig, layers: nn.ModuleList, width: int) -> None:
        super().__init__(config, layers, width)
        self.gates = nn.ModuleDict({str(layer): ResidualGate(width) for layer in self.numbers})

    def policies(self, stop: Stop, call: SkipCall) -> list[Policy]:
        """Gates scale in every call; all tokens run a path that was given."""
        return [GateSkipping(self, stop, call)]


class GateSkipping(TokenSkipping):
    """The policy of `SkipGates`."""

    def __init__(self, parts: SkipGates, stop: Stop, call: SkipCall) -> None:
        super().__init__(parts, stop, call)
        self._parts = parts
        self._gates: Tensor | None = None

    def judge(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """The mean gate, and whether it reaches the threshold."""
        gates: Tensor = self._parts.gates[str(layer)](h)
        self._gates = gates
        scores = gates.mean(-1)
        return scores, self._parts.reach(layer, scores)

    def learn(self, layer: int, scores: Tensor, runs: Tensor) -> None:
        """To close gates, and where the threshold belongs."""
        assert self._gates is not None, "judged before"
        self._parts.note(layer, scores)
        self._parts.add_loss(self._gates[self.call.counted()].square().mean(-1).sqrt().mean())

    def weigh(self, visit: Visit, before: Tensor, after: Tensor) -> Tensor:
        """The states before, and the update as far as the gates let it pass. A gate of 1 gives `after` bit for bit."""
        if visit.layer not in self._parts.numbers:
            return after
        assert self._gates is not None, "a visit is chosen for before it is weighed"
        return torch.lerp(before, after, self._gates.to(after.dtype))


class Watch:
    """Reads the attention of one layer, in the calls of the model that it belongs to.

    Args:
        number: Index of the layer.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.weights: Tensor | None = None
        """``[R, H, A, K]`` of the layer's latest run; None where the back end gives none."""
        self.visible: Tensor | None = None
        """``[R or 1, 1, A, K]``: the keys that queries saw; None for all."""
        self.tokens: Tensor | None = None
        """``[R, A]``: number of each query's token in the batch."""

    @property
    def keyword(self) -> str:
        """With which the layer is handed the numbers ``[B, T]`` of its tokens: other models may share the layer."""
        return f"watched_tokens_{id(self)}"

    def attach(self, layer: nn.Module) -> None:
        """Read the attention of this layer."""
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.register_forward_hook(self._end, always_call=True)
        layer.get_submodule(ATTENTION).register_forward_hook(self._read, with_kwargs=True)

    def _begin(
        self, layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._numbers = options.pop(self.keyword, None)
        return arguments, options

    def _end(self, *_: Any) -> None:
        self._numbers = None

    def _read(self, module: nn.Module, arguments: Any, options: dict[str, Any], output: tuple[Any, ...]) -> None:
        if self._numbers is None:
            return  # a call of another model, or the layer once more for its gradient
        mask: Tensor | None = options.get("attention_mask")
        self.tokens, self.weights = self._numbers, None if output[1] is None else output[1].detach()
        self.visible = None if mask is None else mask == 0

    _numbers: Tensor | None = None


class AttentionScores(Calibrated):
    """A-MoD: the attention of the layer before says who runs a layer. Nothing is learned.

    ``score="self"``: see `attention_to_itself`. ``score="received"``: see `attention_received`; it ranks in use as well, and
    takes whole calls. Where some layers are recurrent, tokens skip layers that follow an attention layer, with at least
    ``every - 1`` layers between them.

    Source:
        A-MoD (arXiv:2412.20875), for vision transformers, whose score is the attention received from all tokens. A language model
        does not know what later tokens will look at, and of its attention received so far, a new token knows its own.
    """

    def __init__(self, config: ETDConfig, layers: nn.ModuleList, width: int) -> None:
        super().__init__(config, layers, width)
        self.watches = {number: Watch(number - 1) for number in self.numbers}
        self._layers: tuple[nn.ModuleList, ...] = ()

    def _skippable(self, config: ETDConfig, layers: nn.ModuleList) -> tuple[int, ...]:
        settings, grid = config.token_skip, config.skipped_layers
        assert settings is not None, "a model with token skipping"
        found: list[int] = []
        last = grid.start - settings.every
        for number in range(grid.start, grid.stop):
            if number - last >= settings.every and hasattr(layers[number - 1], ATTENTION):
                found.append(number)
                last = number
        if not found:
            raise ValueError(
                "method='a-mod' reads the attention of the layer before the one that tokens skip, and these are all recurrent: "
                "change token_skip.every, token_skip.scope or the method."
            )
        return tuple(found)

    def attach(self, layers: nn.ModuleList) -> None:
        """Read the attention of these layers."""
        self._layers = (layers,)  # in a tuple, since they are no part of this module
        for watch in self.watches.values():
            watch.attach(layers[watch.number])

    def counted_parameters(self) -> Iterable[nn.Parameter]:
        """Those of the layers: there are no others."""
        return (parameter for layers in self._layers for parameter in layers.parameters())

    def policies(self, stop: Stop, call: SkipCall) -> list[Policy]:
        """Nothing along a path that was given.

        Raises:
            ValueError: tokens are to be ranked that are not all there, or do not all run.
        """
        if call.fixed:
            return []
        if self.settings.score == "received" and (not call.whole or call.stops):
            raise ValueError(
                "token_skip.score='received' ranks tokens by what all tokens of their sequence attend to: call without a cache "
                "that has tokens, and without adaptive depth, or load the model with score='self'."
            )
        return [AttentionSkipping(self, stop, call)]


class AttentionSkipping(TokenSkipping):
    """The policy of `AttentionScores`."""

    def __init__(self, parts: AttentionScores, stop: Stop, call: SkipCall) -> None:
        super().__init__(parts, stop, call)
        self._received = parts.settings.score == "received"
        if self._received:
            self.share = parts.share
        self._parts = parts
        self._watches = {watch.number: watch for watch in parts.watches.values()}
        shape = call.states.shape[:2]
        self._numbers = torch.arange(shape.numel(), device=call.states.device).view(shape)
        self._moved: Tensor | None = None

    def extra(self, visit: Visit) -> Extra:
        """Numbers of the tokens, for layers that are watched."""
        watch = self._watches.get(visit.layer)
        if watch is None:
            return NOTHING
        watch.tokens = None
        return {watch.keyword: self._numbers}

    def judge(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """The score, the lowest for a token that did not run the layer before; and whether it reaches the threshold."""
        watch, real = self._parts.watches[layer], self.call.counted()
        scores = torch.full(real.shape, -torch.inf, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
        tokens, weights = watch.tokens, watch.weights
        watch.tokens = watch.weights = None
        if tokens is not None and weights is None:
            raise ValueError(
                "method='a-mod' reads attention weights, which only one back end gives: load the model with "
                "attn_implementation='eager'."
            )
        if tokens is not None and weights is not None and self._received:
            scores = attention_received(weights, real.flatten()[tokens])
        elif tokens is not None and weights is not None:
            found = attention_to_itself(weights, watch.visible).to(scores.dtype)
            scores = scores.flatten().index_copy(0, tokens.flatten(), found.flatten()).view_as(real)
            if self._moved is not None:
                scores = scores.masked_fill(~self._moved, -torch.inf)
        return scores, None if self._received else self._parts.reach(layer, scores)

    def weigh(self, visit: Visit, before: Tensor, after: Tensor) -> Tensor:
        """The same states."""
        if self.call.stops and visit.layer in self._watches:
            # Rows with fewer tokens that run are filled up with others, whose attention means nothing.
            self._moved = (after != before).any(-1)
        return after

    def learn(self, layer: int, scores: Tensor, runs: Tensor) -> None:
        """Where the threshold belongs."""
        if not self._received:
            self._parts.note(layer, scores[scores.isfinite()])


METHODS: dict[str, type[TokenSkips]] = {"mod": DepthRouters, "gate-skip": SkipGates, "a-mod": AttentionScores}
"""By `TokenSkipConfig.method`."""
