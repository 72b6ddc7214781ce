"""What benchmarks of decoding print and keep: tables of `mull.evaluation.speed`, and where texts first differ."""

import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from mull.evaluation.lossless import Difference, differences
from mull.evaluation.speed import Outcome, Timing

PAD = 0
PLAIN, STOCK, COMPILED = "mull plain", "transformers", ", compiled"


class Judge:
    """Finds where texts first differ, and whether the two tokens are tied there.

    Args:
        own: The weights that wrote the texts, as a model of transformers.
        exact: The same in the next wider precision.
    """

    def __init__(self, own: PreTrainedModel, exact: PreTrainedModel) -> None:
        self.own, self.exact = own, exact

    def differences(
        self, prompts: Sequence[Tensor], reference: list[list[int]], rows: list[list[int]]
    ) -> list[Difference]:
        """The first difference of each row that has one."""
        return differences(self.own, self.exact, [prompt.tolist() for prompt in prompts], reference, rows)


def distinct_share(rows: Sequence[Sequence[int]], n: int = 8) -> float:
    """Share of distinct ones among all runs of `n` tokens."""
    runs = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(runs)) / max(len(runs), 1)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table_rows(
    timings: Mapping[str, Timing],
    plain_of: Callable[[str], str],
    prompts: Sequence[Tensor],
    judge: Judge | None,
    more: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """A row for each variant.

    Args:
        timings: By variant, `STOCK` among them.
        plain_of: From a variant to the one whose speed it is compared with.
        prompts: What was continued.
        judge: Compares the texts with those of `STOCK`; None where they are sampled.
        more: Further columns by variant, which replace the measured ones.
    """
    reference = rows_of(timings[STOCK].outcomes[0])
    rows = []
    for name, timing in timings.items():
        row = {
            "variant": name,
            "tokens_per_second": {**spread(timing.per_second), "rounds": timing.per_second},
            "times_plain": spread(ratios(timing, timings[plain_of(name)])),
            "predicted": None,
            "times_transformers": spread(ratios(timing, timings[STOCK])),
            "tokens_per_pass": timing.tokens_per_pass,
            "acceptance": timing.acceptance,
        }
        rows.append(row | more.get(name, {}) | ({} if judge is None else equality(timing, prompts, reference, judge)))
    return rows


def ratios(timing: Timing, base: Timing) -> list[float]:
    """Speed relative to another variant's, round by round."""
    return [a / b for a, b in zip(timing.per_second, base.per_second, strict=True)]


def equality(timing: Timing, prompts: list[Tensor], reference: list[list[int]], judge: Judge) -> dict[str, Any]:
    """Share of texts equal to the reference, over all rounds, and the first differences of the others."""
    texts = [rows_of(outcomes) for outcomes in timing.outcomes]
    found = [difference for text in texts for difference in judge.differences(prompts, reference, text)]
    return {
        "equal": 1 - len(found) / (len(texts) * len(prompts)),
        "ties": all(difference.is_tie for difference in found),
        "differences": [asdict(difference) for difference in dict.fromkeys(found)],
    }


def rows_of(outcomes: Sequence[Outcome]) -> list[list[int]]:
    return [row for outcome in outcomes for row in outcome.rows]


def show(label: str, rows: Sequence[Mapping[str, Any]], distinct: float) -> None:
    print(f"\n{label}; distinct {distinct:.0%}")
    print(
        f"{'variant':38} {'tokens/s':>9} {'min':>8} {'max':>8} {'x plain':>8} {'predicted':>9} {'x transf.':>9} "
        f"{'tok/pass':>8} {'equal':>15}"
    )
    for row in rows:
        speed = row["tokens_per_second"]
        per_pass, predicted = (
            "" if row[key] is None else f"{row[key]:.2f}" for key in ("tokens_per_pass", "predicted")
        )
        equal = f"{row['equal']:.0%}" if "equal" in row else ""
        if equal and row["equal"] < 1:
            equal += ", ties" if row["ties"] else ", DIFFERENT"
        print(
            f"{row['variant']:38} {speed['median']:9.1f} {speed['min']:8.1f} {speed['max']:8.1f} "
            f"{row['times_plain']['median']:8.2f} {predicted:>9} {row['times_transformers']['median']:9.2f} "
            f"{per_pass:>8} {equal:>15}"
        )
    sys.stdout.flush()


def machine(device: str = "cpu") -> str:
    """The processor, and how much of it is used."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} thread(s)"


def header(device: str, **settings: Any) -> dict[str, Any]:
    """What was run, where and when."""
    return {
        "command": f"python {shlex.join(sys.argv)}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **settings,
    }
