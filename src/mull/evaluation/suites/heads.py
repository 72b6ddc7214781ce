"""Accuracy, calibration and acceptance of each head, on texts and in decoding.

Shapes: B rows, T tokens, V vocabulary, H heads, the main one included.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mull.data.packing import PackedDataset
from mull.decoding.generate import generate
from mull.evaluation.acceptance import Acceptance, acceptance_by_position
from mull.evaluation.suites.results import Bin
from mull.evaluation.suites.statistics import Score, Sums, score
from mull.evaluation.suites.writers import OWN_ROUTE, Route
from mull.layers.heads import shifted
from mull.model.causal_lm import MullForCausalLM
from mull.ops.cross_entropy import accurate
from mull.ops.targets import IGNORED, label_positions, targets_of
from mull.runtime.distributed import gather_objects, rank, world_size
from mull.runtime.progress import Progress

BINS = 15
"""Bins of equal width of a reliability figure, as in Guo et al. 2017 (arXiv:1706.04599)."""

TOP, NATS = 5, "nats per token"
RANGES = 8
"""Ranges of equal width of the position in a text."""

TOKENS_AT_ONCE = 512
"""Positions whose logits exist at a time."""


@dataclass
class HeadTally:
    """Counts of one head."""

    rows: dict[str, dict[str, Sums]] = field(default_factory=dict)
    """Sums of each score by row."""

    confidence: Tensor = field(default_factory=lambda: torch.zeros(BINS, 3, dtype=torch.float64))
    """Summed confidence, right predictions and predictions of each bin."""

    agreement: Tensor = field(default_factory=lambda: torch.zeros(RANGES, 2, dtype=torch.float64))
    """Predictions equal to the main head's and all predictions, by range of the position."""

    @property
    def bins(self) -> tuple[Bin, ...]:
        """For the reliability figure."""
        return tuple(
            Bin(confidence / n if n else 0.0, right / n if n else 0.0, int(n))
            for confidence, right, n in self.confidence.tolist()
        )

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean distance of accuracy from confidence, weighted by the predictions of a bin."""
        n = float(self.confidence[:, 2].sum())
        return float((self.confidence[:, 1] - self.confidence[:, 0]).abs().sum()) / n if n else 0.0

    @property
    def agreement_by_range(self) -> tuple[float, ...]:
        """Share of predictions that the main head makes, too, in each range that has some."""
        return tuple(same / n for same, n in self.agreement.tolist() if n)


@torch.no_grad()
def head_tallies(
    model: Any, dataset: PackedDataset, route: Route = OWN_ROUTE, *, batch_size: int = 8, n_heads: int | None = None
) -> list[HeadTally]:
    """Predictions of every head on texts, the main head first.

    A head reads the true tokens before its target, as in training. It *agrees* where its best token is the main head's, which had
    those tokens, too: where the text is the model's own, that is the share of drafts that greedy decoding accepts after accepted
    ones. With several ranks, each measures a share of the batches, and all return the same.

    Args:
        model: Of mull; or of transformers, which has the main head only. In evaluation mode.
        dataset: Packed documents.
        route: Which layers run.
        batch_size: Rows per pass.
        n_heads: Extra heads to measure; None for all.
    """
    available = 0
    if isinstance(model, MullForCausalLM) and model.mtp_config is not None:
        available = model.mtp_config.num_predict_tokens
    n_extra = available if n_heads is None else min(n_heads, available)
    tallies = [HeadTally() for _ in range(1 + n_extra)]
    numbers = torch.arange(len(dataset)).split(batch_size)[rank() :: world_size()]
    with Progress(len(numbers), "batch", label="heads") as progress:
        for part in numbers:
            _count(model, dataset.rows(part), part.tolist(), route, tallies)
            progress.advance()
    return _summed(gather_objects(tallies))


def _count(
    model: Any, batch: Mapping[str, Tensor], numbers: Sequence[int], route: Route, tallies: list[HeadTally]
) -> None:
    ids, positions = batch["input_ids"].to(model.device), batch["position_ids"].to(model.device)
    labels = batch["labels"].to(model.device)
    n_heads = len(tallies)
    targets = targets_of(labels, label_positions(None, positions), n_heads)
    best = torch.full_like(targets, IGNORED)  # [B, T, H]
    facts = torch.zeros(*targets.shape, 4, dtype=torch.float64)  # right, among the best, nats, confidence
    for k, states in enumerate(head_states(model, ids, positions, route, n_heads - 1)):
        valid = targets[..., k] != IGNORED
        rows = valid.nonzero()
        for chunk in rows.split(TOKENS_AT_ONCE):
            place = tuple(chunk.T)
            logits = states.logits(place)
            wanted = targets[..., k][place]
            log_p = logits.to(accurate(logits.dtype)).log_softmax(-1)
            top = log_p.topk(min(TOP, log_p.shape[-1]), -1)
            best[..., k][place] = top.indices[:, 0]
            chosen = -log_p.gather(-1, wanted[:, None])[:, 0]
            hits = top.indices == wanted[:, None]
            facts[..., k, :][tuple(index.cpu() for index in place)] = (
                torch.stack([hits[:, 0], hits.any(-1), chosen, top.values[:, 0].exp()], -1).double().cpu()
            )
    _add(tallies, targets.cpu(), best.cpu(), facts, positions.cpu(), numbers)


def _add(
    tallies: list[HeadTally], targets: Tensor, best: Tensor, facts: Tensor, positions: Tensor, numbers: Sequence[int]
) -> None:
    length = positions.shape[1]
    for k, tally in enumerate(tallies):
        valid = targets[..., k] != IGNORED
        right, among, nats, confidence = facts[..., k, :].unbind(-1)
        # The main head says the same token k positions later.
        main = torch.full_like(best[..., 0], IGNORED)
        main[:, : length - k] = best[:, k:, 0]
        compared = valid & (main != IGNORED)
        same = compared & (best[..., k] == main)
        for row, number in enumerate(numbers):
            n, n_compared = float(valid[row].sum()), float(compared[row].sum())
            if n:
                tally.rows[f"row {number}"] = {
                    "top-1": (float(right[row].sum()), n),
                    f"top-{TOP}": (float(among[row].sum()), n),
                    NATS: (float(nats[row].sum()), n),
                    "agreement": (float(same[row].sum()), n_compared),
                }
        bins = (confidence[valid] * BINS).long().clamp(max=BINS - 1)
        values = torch.stack([confidence[valid], right[valid], torch.ones_like(right[valid])], -1)
        tally.confidence.index_add_(0, bins, values)
        ranges = (positions[compared] * RANGES // length).clamp(max=RANGES - 1)
        tally.agreement.index_add_(
            0, ranges, torch.stack([same[compared], torch.ones_like(same[compared])], -1).double()
        )


def _summed(parts: Sequence[Sequence[HeadTally]]) -> list[HeadTally]:
    found = []
    for of_head in zip(*parts, strict=True):
        rows = {name: sums for tally in of_head for name, sums in tally.rows.items()}
        confidence = torch.stack([tally.confidence for tally in of_head]).sum(0)
        found.append(HeadTally(rows, confidence, torch.stack([tally.agreement for tally in of_head]).sum(0)))
    return found


@dataclass(frozen=True)
class _States:
    """States of one head, or the logits of a model of transformers."""

    tensor: Tensor
    unembed: nn.Module | None

    def logits(self, place: tuple[Tensor, ...]) -> Tensor:
        rows = self.tensor[place]
        return rows if self.unembed is None else self.unembed(rows)


def head_states(model: Any, ids: Tensor, positions: Tensor, route: Route, n_extra: int) -> Iterator[_States]:
    """States ``[B, T, D]`` of the main head and the extra ones, each when it is asked for."""
    if not isinstance(model, MullForCausalLM):
        # Some architectures scale or cap their logits, which only they know.
        yield _States(model(ids, position_ids=positions, use_cache=False).logits, None)
        return
    options = {"position_ids": positions, "use_cache": False, "unembed": model.lm_head, **route.options()}
    hidden = model.model(ids, **options).last_hidden_state
    yield _States(hidden, model.lm_head)
    if not n_extra:
        return
    heads = model.mtp_heads
    assert heads is not None, "asked for heads that the model lacks"
    run_block = model._run_block(hidden, model.model.layer_inputs(hidden, None, positions))
    read = states = model.head_input(hidden)
    embedded = model.model.embed_tokens(ids) if heads.sequential else None
    for k in range(1, 1 + n_extra):
        if embedded is None:
            yield _States(heads(k, read, None, run_block), model.lm_head)
        else:
            states = heads(k, states, shifted(embedded, k), run_block)
            yield _States(states, model.lm_head)


def head_scores(tallies: Sequence[HeadTally], *, seed: int = 0) -> tuple[dict[str, Score], dict[str, dict[str, Sums]]]:
    """Scores of each head with intervals over rows, such as ``top-1, head 2``."""
    scores: dict[str, Score] = {}
    values: dict[str, dict[str, Sums]] = {}
    for k, tally in enumerate(tallies):
        for name in next(iter(tally.rows.values()), {}):
            if name == "agreement" and k == 0:
                continue
            label = f"{name}, {head_name(k)}"
            sums = {row: of_row[name] for row, of_row in tally.rows.items() if of_row[name][1]}
            if sums:
                values[label] = sums
                scores[label] = score(sums, seed=seed, proportion=name != NATS)
    return scores, values


def head_name(k: int) -> str:
    """Name of a head in scores and figures."""
    return f"head {k}" if k else "main head"


def draft_acceptance(
    model: MullForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    route: Route = OWN_ROUTE,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Acceptance]:
    """Acceptance by drafted position when the model continues prompts with as many drafts as it has heads.

    With several ranks, each decodes a share of the prompts, and all return the same.

    Args:
        model: With heads, in evaluation mode.
        prompts: Tokens of each prompt.
        max_new_tokens: Tokens to write after each.
        route: Which layers run.
        temperature: 0 is greedy.
        seed: Of the sampling.
    """
    assert model.mtp_config is not None, "only a model with heads drafts"
    calls = []
    mine = list(enumerate(prompts))[rank() :: world_size()]
    with Progress(len(mine), "prompt", label="acceptance") as progress:
        for number, prompt in mine:
            output = generate(
                model,
                torch.tensor([list(prompt)], device=model.device),
                max_new_tokens=max_new_tokens,
                draft="mtp",
                draft_length=model.mtp_config.num_predict_tokens,
                temperature=temperature,
                seed=[seed + number],
                eos_token_id=(),
                **route.options(),
            )
            calls.append(output.stats)
            progress.advance()
    return acceptance_by_position([stats for part in gather_objects(calls) for stats in part])
