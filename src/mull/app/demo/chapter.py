"""What the chapters of the demo have in common: where they work, how they train, and what the page asks of them."""

import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mull.app.report.page import Table
from mull.model.causal_lm import MullForCausalLM
from mull.training.loop import Batches, Evaluation, TrainConfig, TrainResult, train
from mull.training.objectives.base import Objective


class Chapter(Protocol):
    """One capability: what was measured, which the class method ``train`` of each chapter returns.

    Its words are a template in the folder ``words``, which reads the chapter's fields and what it tells.
    """

    def tell(self) -> dict[str, Any]:
        """The figures and tables that the words place, and what else they mention."""


def table_by_iterations(heading: str, rows: Mapping[str, Mapping[int, float]]) -> Table:
    """Values by name of the row and number of think iterations."""
    counts = sorted({k for row in rows.values() for k in row})
    cells = [[name, *(row.get(k) for k in counts)] for name, row in rows.items()]
    return Table([heading, *(f"k={k}" for k in counts)], cells)


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How large the demo is. The defaults take 5 to 8 minutes on two cores; tests shrink them."""

    corpus_bytes: int = 6_000_000
    vocab_size: int = 2048
    length: int = 256
    batch_size: int = 8
    width: int = 128
    layers: int = 8
    base_steps: int = 160
    continued_steps: int = 80
    max_iterations: int = 4
    held_out_rows: int = 96
    new_tokens: int = 60
    """Tokens of each sample."""

    weights_steps: int = 12
    own_rows: int = 64
    """Rows of text that the looped model writes for its heads, of `own_tokens` each."""

    own_tokens: int = 160
    drafting_steps: int = 32
    drafting_prompts: int = 8
    """Held-out prompts that are decoded in every way, for `drafting_tokens` each."""

    drafting_tokens: int = 96
    chain_steps: int = 400
    chain_prompts: int = 256
    depth_rows: int = 8
    """Held-out rows on which halting rules are compared."""

    calibration_rows: int = 32
    hybrid_steps: int = 24


@dataclass(frozen=True)
class Bench:
    """Where the chapters work."""

    out: Path
    """Folder for metrics and trained models."""

    seed: int = 0
    """Seed of weights, data order and sampled iterations."""

    size: DemoSize = field(default_factory=DemoSize)

    def train(
        self,
        name: str,
        model: MullForCausalLM,
        objective: Objective,
        batches: Batches,
        *,
        evaluation: Evaluation | None = None,
        **settings: Any,
    ) -> TrainResult:
        """Train from scratch in an emptied folder `name`, with `settings` of `TrainConfig`; Muon is the optimizer.

        SIGTERM ends the whole demo, not only this run.
        """
        folder = self.out / name
        if folder.is_dir():
            shutil.rmtree(folder)
        rates = {"muon_lr": 0.02, "peak_lr": 3e-3}
        config = TrainConfig(optimizer="muon", log_every=1, seed=self.seed, **{**rates, **settings})
        result = train(model, objective, batches, config, folder, evaluation=evaluation)
        if result.stopped == "sigterm":
            raise SystemExit(128 + signal.SIGTERM)
        model.eval()
        return result
