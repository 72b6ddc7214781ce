"""What ``mull eval`` does: run suites on a model, and compare two results."""

import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from mull.app.report.evaluation_page import comparison_table, safe, score_table, write_report
from mull.evaluation.suites.results import Result, compare_results, read_result
from mull.evaluation.suites.statistics import Comparison
from mull.evaluation.suites.subject import Request, load_subject
from mull.evaluation.suites.table import Place, find_suites
from mull.runtime import storage
from mull.runtime.distributed import device, on_first_rank, rank, session, side_group
from mull.runtime.tracking import MlflowLog, flat, sqlite_uri

logger = logging.getLogger(__name__)

PATIENCE = timedelta(days=14)
"""How long a rank waits for the others, which may draw, or grade, for days."""

EXPERIMENT = "mull-eval"


def run_evaluation(
    model: str,
    suites: Sequence[str],
    out: str | Path,
    request: Request | None = None,
    *,
    mlflow: str | None = None,
    command: str = "mull eval",
) -> dict[str, Result]:
    """Evaluate a model, suite by suite; under ``torchrun``, on all its devices.

    The folder receives one folder per suite, with ``samples.jsonl``, ``verdicts.jsonl``, ``settings.json`` and ``results.json``,
    and ``report.md`` with figures. A run that was killed at any moment continues with the same call, to the same result.

    Args:
        model: Folder, ``.gguf`` file or hub name of a checkpoint.
        suites: Names of `mull.evaluation.suites.table.SUITES`, ``meta-mtp``, or ``lm_eval:TASK``.
        out: Local folder for the results.
        request: Settings; None takes each suite as published.
        mlflow: Database or server that receives the scores, too; empty for ``mlflow.db`` in the folder, None for none.
        command: Is written into the report.

    Returns:
        Results by suite, on every rank.

    Raises:
        ValueError: an unknown suite, or settings that do not fit the model, the suite or the samples in the folder.
        FileNotFoundError, ConnectionError, OSError: problems or a checkpoint cannot be read.
        RuntimeError: the sandbox is not safe enough, a package is missing, or another process uses the folder.
    """
    request, folder = request or Request(), storage.local_path(out)
    chosen = find_suites(suites)
    results: dict[str, Result] = {}
    with session(), side_group(PATIENCE) as group:
        subject = load_subject(model, request, device())
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        for name, run in chosen.items():
            place = folder / safe(name)
            results[name] = run(subject, request, Place(place, group))
            on_first_rank(lambda name=name, place=place: _keep(results[name], place, name), group)  # type: ignore[misc]
        if rank() == 0:
            print(f"report: {write_report(results, folder, command)}")
        if mlflow is not None:
            on_first_rank(lambda: _track(results, folder, model, request, mlflow), group)
    return results


def compare(first: str | Path, second: str | Path, *, seed: int = 0) -> dict[str, dict[str, Comparison]]:
    """Compare the results of two evaluations, and print a table for each suite that both have.

    Args:
        first: Folder of an evaluation, or of one of its suites.
        second: That of the other model.
        seed: Of the bootstrap.

    Returns:
        Comparisons by suite and score.

    Raises:
        FileNotFoundError: a folder without results.
        ValueError: no suite in common, or settings that differ; names them.
    """
    ones, others = _results_in(first), _results_in(second)
    shared = [name for name in ones if name in others]
    if not shared:
        raise ValueError(
            f"{first} has results of {', '.join(ones)}, {second} of {', '.join(others)}: evaluate both models on the same suite."
        )
    found = {name: compare_results(ones[name], others[name], seed=seed) for name in shared}
    for name, compared in found.items():
        print(f"\n{name}: A is {ones[name].model}, B is {others[name].model}\n")
        print(comparison_table(compared))
    return found


def _results_in(place: str | Path) -> dict[str, Result]:
    """Results of a folder of suites, by folder name; or of a single suite."""
    folder = storage.local_path(place)
    inside = sorted(file.parent for file in folder.glob("*/results.json"))
    results = [read_result(each) for each in inside or [folder]]
    return {safe(f"{result.settings.get('protocol', 'published')} {result.suite}"): result for result in results}


def _keep(result: Result, place: Path, name: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    result.write(place)
    print(f"\n{name}: {result.model}\n\n{score_table(result.scores)}")
    for note in result.notes:
        print(note)


def _track(results: Mapping[str, Result], folder: Path, model: str, request: Request, uri: str) -> None:
    parameters: dict[str, Any] = {"model": model, **flat(request.model_dump(exclude_none=True))}
    log = MlflowLog(
        uri or sqlite_uri(folder),
        EXPERIMENT,
        folder.name,
        folder / "mlflow-run-id",
        parameters=parameters,
        tags={"suites": " ".join(results)},
    )
    record: dict[str, Any] = {"step": 0}
    for name, result in results.items():
        for label, score in result.scores.items():
            key = f"{safe(name)}/{label.replace('=', ' ').replace(',', '')}"
            record |= {key: score.value, f"{key} low": score.low, f"{key} high": score.high}
    log.log(record)
    log.close()
