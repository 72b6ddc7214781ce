"""What a suite found, as it is kept on disk, and the comparison of two such files."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from mull.evaluation.suites.statistics import Comparison, Score, Sums, best_score, compare, pass_at_k, score
from mull.runtime import storage
from mull.runtime.arguments import Frozen

RESULTS, SETTINGS = "results.json", "settings.json"
"""Files of a suite's folder: its result, and what the result depends on, which is there from the start."""

ORACLE = "oracle over temperatures"
"""Label of a maximum over temperatures: it was chosen on the test problems, so no deployed model has it."""

COMPARED_APART = frozenset(
    {
        "model",
        "weights",
        "config",
        "tokenizer",
        "end_tokens",
        "generation",
        "engine",
        "dtype",
        "etd",
        "mtp",
        "think_iterations",
        "adaptive",
        "path",
        "draft_length",
        "batch_size",
        "text",
    }
)
"""Settings in which two compared results may differ: the model, how it runs, and where the text was, which has a hash."""


HASHES = ("config", "digest", "documents", "examples", "generation", "tokenizer", "weights")
"""Settings that nobody gives: another one that differs, too, is the better explanation."""


class Bin(NamedTuple):
    """Predictions of one range of confidence."""

    confidence: float
    """Mean probability of the predicted token; 0 without predictions."""

    accuracy: float
    n: int


class Result(Frozen):
    """Result of one suite."""

    suite: str
    model: str
    settings: dict[str, Any]
    scores: dict[str, Score]
    """Each with its interval."""

    values: dict[str, dict[str, Sums]]
    """What each problem adds to the sums of a score, for the paired comparison."""

    command: str = ""
    notes: tuple[str, ...] = ()
    reliability: dict[str, tuple[Bin, ...]] = {}
    """Calibration of each head."""

    acceptance: dict[str, tuple[float, ...]] = {}
    """Acceptance by head, in ranges of the position in the text or of the draft."""

    def write(self, folder: Path) -> Path:
        """Write ``results.json`` into a folder."""
        file = folder / RESULTS
        storage.write_text_atomic(str(file), self.model_dump_json(indent=1) + "\n")
        return file


def read_result(place: str | Path) -> Result:
    """Read a result: the file itself, or the folder that has it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is something else.
    """
    path = storage.local_path(place)
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{place} has no {RESULTS}: give the folder of one suite that mull eval has written.")
    try:
        return Result.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        raise ValueError(f"{file} is no result of mull eval: give the folder of one of its suites.") from None


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Store the settings of a suite in its folder, made if missing, or compare them with those that are there.

    Raises:
        ValueError: they differ, and the folder has samples or a result; names the first that differs. Or the stored ones are
            missing or damaged.
    """
    file, now = folder / SETTINGS, json.loads(json.dumps(settings))
    found = [path.name for path in folder.glob("*") if path.name == RESULTS or path.match("samples*.jsonl")]
    stored = _stored_settings(file) if found else now
    names = sorted({*stored, *now}, key=lambda name: (name in HASHES, name))
    if different := [name for name in names if stored.get(name) != now.get(name)]:
        name = different[0]
        raise ValueError(
            f"{folder} has {'samples' if 'samples' in found[0] else 'a result'} with {name}={_short(stored.get(name))}, and now "
            f"it is {_short(now.get(name))}: give the same value to continue, or another folder to begin anew."
        )
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_text_atomic(str(file), json.dumps(now, indent=1, sort_keys=True) + "\n")


def _stored_settings(file: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError, FileNotFoundError):
        stored = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(stored, dict):
            return stored
    raise ValueError(f"{file} is missing or damaged, so nobody knows what was asked there: choose another folder.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def code_scores(
    records: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]], ks: Sequence[int], *, seed: int = 0
) -> tuple[dict[str, Score], dict[str, dict[str, Sums]]]:
    """Pass@k of each temperature and, where there are several, their maximum, which is an oracle's.

    Args:
        records: Samples.
        verdicts: Of these samples, in the same order.
        ks: For each, every problem must have at least k samples.
        seed: Of the bootstrap.

    Raises:
        ValueError: a problem has fewer than k samples.
    """
    counts: dict[float, dict[str, list[bool]]] = {}
    for record, verdict in zip(records, verdicts, strict=True):
        of_temperature = counts.setdefault(float(record["temperature"]), {})
        of_temperature.setdefault(str(record["problem"]), []).append(bool(verdict["passed"]))
    several = len(counts) > 1
    values: dict[str, dict[str, Sums]] = {}
    scores: dict[str, Score] = {}
    for k in ks:
        series = []
        for temperature, problems in counts.items():
            rates = {name: (pass_at_k(len(passed), sum(passed), k), 1.0) for name, passed in problems.items()}
            name = f"pass@{k} at T={temperature:g}" if several else f"pass@{k}"
            values[name], scores[name] = rates, score(rates, seed=seed)
            series.append(rates)
        if several:
            scores[f"pass@{k}, {ORACLE}"] = best_score(series, seed=seed)
    first = next(iter(counts.values()))
    values["first sample"] = {name: (float(passed[0]), 1.0) for name, passed in first.items()}
    return scores, values


def compare_results(first: Result, second: Result, *, seed: int = 0) -> dict[str, Comparison]:
    """Compare two results of one suite, score by score, on the problems that both have.

    Raises:
        ValueError: other suites, or settings other than those of the model that differ; names them.
    """
    if first.suite != second.suite:
        raise ValueError(f"The results are of {first.suite} and of {second.suite}: compare two of the same suite.")
    names = sorted({*first.settings, *second.settings} - COMPARED_APART)
    different = [name for name in names if first.settings.get(name) != second.settings.get(name)]
    if different:
        name = different[0]
        others = f" ({', '.join(different[1:])} differ, too)" if different[1:] else ""
        raise ValueError(
            f"The results have {name}={first.settings.get(name)!r} and {name}={second.settings.get(name)!r}{others}: evaluate "
            "both models with the same settings, or the difference is not the models'."
        )
    shared = [name for name in first.values if name in second.values]
    return {name: compare(first.values[name], second.values[name], seed=seed) for name in shared}
