"""Calibration: the threshold of a halting rule for a mean depth or a loss, and what each rule gives at each depth.

Every point is measured by running the model as it runs in use: tokens that stop leave behind what the configuration says. Beside
the rules stand the fixed depths; *random*, the depths that the chosen rule gave, shuffled among the tokens; and the *oracle*, in
which each token runs the iteration that predicts its next token best, which only someone who knows that token can do.

Shapes: B batch, T tokens, k iterations.
"""

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mull.data.packing import PackedDataset
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import HaltingConfig, Stop
from mull.model.halting import GivenDepths, Halting
from mull.ops.targets import label_positions, targets_of
from mull.runtime.progress import Progress

SCALES: dict[str, Callable[[float], float]] = {
    "state": lambda u: 1 - 2 * (1 - u) ** 4,
    "confidence": lambda u: 1 - (1 - u) ** 2,
    "kl": lambda u: 10 ** (1 - 7 * u),
    "repeat": lambda u: float(round(1 + 4 * u)),
    "learned": lambda u: u,
}
"""From 0 to 1 to a threshold, such that tokens think longer the larger the number is, and a grid covers what matters."""

GRID = (0.1, 0.3, 0.5, 0.65, 0.8, 0.9)
BISECTIONS = 9


class DepthPoint(BaseModel):
    """What a way of stopping costs and gives."""

    model_config = ConfigDict(frozen=True)

    rule: str
    """A rule of `mull.model.halting`, ``fixed``, ``random`` or ``oracle``."""

    threshold: float | None
    iterations: float
    """Mean think iterations of a token."""

    layers: float
    """Mean decoder layers that a token runs."""

    readouts: float
    """Mean passes of the unembedding that a token's decisions take, on top of that of the prediction."""

    loss: float
    """Nats per target."""


class Calibration(BaseModel):
    """What `calibrate` measured, and chose."""

    model_config = ConfigDict(frozen=True)

    chosen: DepthPoint
    shuffled: DepthPoint
    """The depths of `chosen`, shuffled among the tokens: what its mean depth alone is worth."""

    curve: list[DepthPoint]
    halting: HaltingConfig
    """The chosen rule with its threshold."""

    n_targets: int


@torch.no_grad()
def calibrate(
    model: MullForCausalLM,
    rows: PackedDataset,
    *,
    rule: str = "state",
    iterations: int | None = None,
    target_iterations: float | None = None,
    tolerance: float | None = None,
    stop: Stop | None = None,
    max_rows: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> Calibration:
    """Find the threshold of a rule on held-out rows.

    Args:
        model: A model with a think block, in evaluation mode.
        rows: Held-out text.
        rule: The rule to calibrate; the curve shows all of them.
        iterations: Most iterations; default as in the model's configuration.
        target_iterations: Mean iterations of a token to come closest to. Give this or `tolerance`.
        tolerance: Stop as early as the loss stays within so many nats of that of all iterations.
        stop: What a stopped token leaves behind; default as in the model.
        max_rows: Measure on the first rows only.
        batch_size: Rows per pass.
        seed: Of the shuffling.

    Raises:
        ValueError: both or neither of the aims, no think block, or an unknown rule.
    """
    if (target_iterations is None) == (tolerance is None):
        raise ValueError("Give either a mean number of iterations or a tolerance of the loss.")
    if model.etd_config is None:
        raise ValueError("Calibration needs a think block, and this model has none: load it with etd=ETDConfig(...).")
    rules = [name for name in SCALES if name != "learned" or model.model.exit_head is not None]
    if rule not in rules:
        raise ValueError(
            f"rule={rule!r} cannot be calibrated here: the range of its thresholds is unknown, or the model has no exit head. "
            f"Choose one of {', '.join(rules)}."
        )
    n_iterations = model.iterations(iterations)
    if stop is None:
        stop = "last_kv" if model.etd_config.halting is None else model.etd_config.halting.stop
    kept = rows.in_order(batch_size)
    batches = list(kept if max_rows is None else islice(kept, -(-max_rows // batch_size)))
    measure = _Measure(model, batches, n_iterations, seed)
    grids = {name: list(dict.fromkeys(SCALES[name](place) for place in GRID)) for name in rules}
    grids["repeat"] = [times for times in grids["repeat"] if times < n_iterations]  # more are never reached
    n_passes = n_iterations + sum(map(len, grids.values())) + len(grids[rule]) + BISECTIONS + 3
    with Progress(n_passes, "pass", patient=True) as progress:

        def at(name: str, threshold: float) -> DepthPoint:
            progress.advance()
            return measure.rule(HaltingConfig(rule=name, threshold=threshold, stop=stop))

        curve = []
        for number in range(1, n_iterations + 1):
            progress.advance()
            curve.append(measure.fixed(number, stop))
        full = curve[-1]
        for name in rules:
            for threshold in grids[name]:
                curve.append(at(name, threshold))
                if name == rule:
                    progress.advance()
                    curve.append(measure.shuffled(stop))
        progress.advance()
        curve.append(measure.oracle(stop))

        def too_shallow(point: DepthPoint) -> bool:
            if target_iterations is not None:
                return point.iterations < target_iterations
            assert tolerance is not None
            return point.loss > full.loss + tolerance

        low, high, tried = 0.0, 1.0, []
        for _ in range(BISECTIONS):
            place = (low + high) / 2
            tried.append(at(rule, SCALES[rule](place)))
            low, high = (place, high) if too_shallow(tried[-1]) else (low, place)
        every = [*tried, *(point for point in curve if point.rule == rule)]
        if target_iterations is not None:
            chosen = min(every, key=lambda point: abs(point.iterations - target_iterations))
        else:
            fits = [point for point in every if not too_shallow(point)]
            chosen = min(fits or [full], key=lambda point: point.iterations)
        if chosen.rule == rule and chosen.threshold is not None:
            chosen = at(rule, chosen.threshold)
            progress.advance()
            shuffled = measure.shuffled(stop)
            curve += [chosen, shuffled]
        else:
            shuffled = full
    found = HaltingConfig(rule=chosen.rule, threshold=chosen.threshold if chosen.rule == rule else None, stop=stop)
    return Calibration(chosen=chosen, shuffled=shuffled, curve=curve, halting=found, n_targets=measure.n_targets)


class _Measure:
    """Runs held-out rows under policies."""

    def __init__(
        self, model: MullForCausalLM, batches: Sequence[dict[str, Tensor]], iterations: int, seed: int
    ) -> None:
        self._model = model
        self._iterations = iterations
        self._batches = [{name: x.to(model.device) for name, x in batch.items()} for batch in batches]
        self._generator = torch.Generator().manual_seed(seed)
        self._latest: list[Tensor] = []
        """Depths of the latest rule, by batch."""
        self.n_targets = int((self._targets(self._batches) >= 0).sum())

    def _targets(self, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        found = [
            targets_of(batch["labels"], label_positions(None, batch["position_ids"]), 1).flatten() for batch in batches
        ]
        return torch.cat(found)

    def rule(self, config: HaltingConfig) -> DepthPoint:
        """Let a rule decide."""
        policies = [
            self._model.model.halting(config, self._iterations, None, self._model.lm_head) for _ in self._batches
        ]
        assert all(policy is not None for policy in policies), "a configuration makes every call adaptive"
        losses = [self._losses(batch, policy) for batch, policy in zip(self._batches, policies, strict=True)]
        self._latest = [policy.depth for policy in policies if policy is not None and policy.depth is not None]
        n_readouts = sum(policy.n_readouts for policy in policies if policy is not None)
        return self._point(config.rule, config.limit, losses, n_readouts)

    def fixed(self, depth: int, stop: Stop) -> DepthPoint:
        """Let every token run so many iterations."""
        self._latest = [torch.full_like(batch["input_ids"], depth) for batch in self._batches]
        return self._given("fixed", float(depth), stop)

    def _given(self, name: str, threshold: float | None, stop: Stop) -> DepthPoint:
        assert self._model.etd_config is not None, "checked by `calibrate`"
        layers = self._model.etd_config.think_layers
        losses = [
            self._losses(batch, GivenDepths(depths, layers, stop))
            for batch, depths in zip(self._batches, self._latest, strict=True)
        ]
        return self._point(name, threshold, losses, 0)

    def shuffled(self, stop: Stop) -> DepthPoint:
        """The depths of the latest rule, shuffled among the tokens of a batch."""
        for index, depths in enumerate(self._latest):
            order = torch.randperm(depths.numel(), generator=self._generator).to(depths.device)
            self._latest[index] = depths.flatten()[order].view_as(depths)
        return self._given("random", None, stop)

    def oracle(self, stop: Stop) -> DepthPoint:
        """Every token runs the first iteration of the lowest loss, measured while all tokens run all iterations."""
        self._latest = []
        for batch in self._batches:
            states = self._model.hidden_states_by_iteration(
                batch["input_ids"], position_ids=batch["position_ids"], think_iterations=self._iterations
            )
            losses = torch.stack([self._of_targets(state, batch) for state in states])
            self._latest.append(1 + losses.argmin(0))
        return self._given("oracle", None, stop)

    def _losses(self, batch: dict[str, Tensor], policy: Halting | GivenDepths | None) -> Tensor:
        hidden = self._model.hidden_states(
            batch["input_ids"], position_ids=batch["position_ids"], think_iterations=self._iterations, policy=policy
        )
        return self._of_targets(hidden, batch).sum()

    def _of_targets(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Loss at each position ``[B, T]``; 0 where there is no target."""
        targets = self._targets([batch]).view(*hidden.shape[:2], 1)
        _, losses = self._model.head_losses(
            hidden, batch["input_ids"], targets, (targets >= 0).float(), position_ids=batch["position_ids"]
        )
        return losses[..., 0]

    def _point(self, name: str, threshold: float | None, losses: Sequence[Tensor], n_readouts: int) -> DepthPoint:
        depths = torch.cat([depth.flatten() for depth in self._latest]).double()
        etd = self._model.etd_config
        assert etd is not None, "checked by `calibrate`"
        iterations = float(depths.mean())
        return DepthPoint(
            rule=name,
            threshold=threshold,
            iterations=iterations,
            layers=etd.n_encoder_layers + etd.n_think_layers * iterations + etd.n_decoder_layers,
            readouts=n_readouts / depths.numel(),
            loss=float(torch.stack(list(losses)).double().sum()) / self.n_targets,
        )
