"""Variants of decoding against each other, in turns in one process, with the same weights and prompts.

A variant continues a batch of prompts. Each round runs all of them on every prompt, and each prompt begins with another one, so
that a drifting machine affects all alike. The time of a call includes the prompt. The first round warms up; what mull compiles
after that is left out.
"""

import copy
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import mull
from mull.evaluation.acceptance import acceptance_by_position
from mull.evaluation.lossless import Difference, differences

PAD = 0
PLAIN, STOCK, COMPILED = "mull plain", "transformers", ", compiled"


@dataclass(frozen=True)
class Outcome:
    """What one call returned."""

    rows: list[list[int]]
    """The new tokens of each row."""

    stats: mull.GenerationStats | None = None
    """`mull.generate`'s account of the call."""


Variant = Callable[[Tensor, Tensor], Outcome]
"""Continues ``input_ids [B, T]`` under ``attention_mask [B, T]``."""


@dataclass
class Timing:
    """All calls of one variant."""

    seconds: list[float] = field(default_factory=list)
    """Of each round over all prompts, without the first, which warms up."""

    tokens: int = 0
    """New tokens of a round."""

    outcomes: list[list[Outcome]] = field(default_factory=list)
    """By round, the first included, and prompt."""

    @property
    def per_second(self) -> list[float]:
        """Tokens per second of each round."""
        return [self.tokens / value for value in self.seconds]

    @property
    def stats(self) -> list[mull.GenerationStats]:
        """Of the timed calls; none where the variant gives no account."""
        outcomes = [outcome for of_round in self.outcomes[1:] for outcome in of_round]
        return [outcome.stats for outcome in outcomes if outcome.stats is not None]

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens per row and forward pass after the prompt; None if the variant does not report it."""
        n_passes = sum(one.row_rounds for one in self.stats)
        return 1 + sum(sum(one.accepted) for one in self.stats) / n_passes if n_passes else None

    @property
    def acceptance(self) -> list[float]:
        """Share of accepted drafts by position, of those whose predecessors were accepted."""
        return [position.conditional for position in acceptance_by_position(self.stats)]


def mull_variant(model: Any, tokens: int, temperature: float, options: Mapping[str, Any]) -> Variant:
    # What mull learns of a model and prepares for it belongs to the object: with one per variant, none evicts another's.
    own = copy.copy(model)

    def run(ids: Tensor, mask: Tensor) -> Outcome:
        out = mull.generate(
            own,
            ids,
            mask,
            max_new_tokens=tokens,
            temperature=temperature,
            seed=0,
            eos_token_id=(),
            pad_token_id=PAD,
            **options,
        )
        return Outcome(out.sequences[:, ids.shape[1] :].tolist(), out.stats)

    return run


def stock_variant(model: Any, tokens: int, temperature: float, options: Mapping[str, Any]) -> Variant:
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def run(ids: Tensor, mask: Tensor) -> Outcome:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=PAD, **sampling, **options
        )  # fmt: skip
        return Outcome(out[:, ids.shape[1] :].tolist())

    return run


def measure(
    variants: Mapping[str, Variant], prompts: Sequence[tuple[Tensor, Tensor]], rounds: int, label: str
) -> dict[str, Timing]:
    """Run all variants in turns on each prompt: a round to warm up, then `rounds`. Each prompt begins with another variant."""
    timings = {name: Timing() for name in variants}
    names = list(variants)
    for number in range(rounds + 1):
        begin = time.perf_counter()
        spent = dict.fromkeys(names, 0.0)
        for timing in timings.values():
            timing.outcomes.append([])
        for place, (ids, mask) in enumerate(prompts):
            first = place % len(names)
            for name in names[first:] + names[:first]:
                synchronize(ids)
                started = time.perf_counter()
                outcome = variants[name](ids, mask)
                synchronize(ids)
                spent[name] += time.perf_counter() - started - getattr(outcome.stats, "warm_up_seconds", 0.0)
                timings[name].outcomes[-1].append(outcome)
        for name, timing in timings.items():
            timing.tokens = sum(len(row) for outcome in timing.outcomes[-1] for row in outcome.rows)
            timing.seconds += [spent[name]] if number else []
        done = "warmed up" if number == 0 else f"round {number} of {rounds}"
        print(f"  {label}: {done}, {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    return timings


def synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


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
