"""What ``mull eval`` does: run suites on a model, and compare two results."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from mull.app.report.evaluation_page import REPORT, comparison_table, safe, score_table, write_report
from mull.evaluation.suites.prompts import PROTOCOLS
from mull.evaluation.suites.results import RESULTS, Result, compare_results, keep_settings, read_result
from mull.evaluation.suites.statistics import Comparison
from mull.evaluation.suites.subject import Request, load_subject
from mull.evaluation.suites.table import SHOTS, TEXT, Place, Prepared, find_suites
from mull.runtime import storage
from mull.runtime.arguments import nearest
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

    The folder receives one folder per suite, with ``settings.json``, ``results.json`` and, where answers are drawn,
    ``samples.jsonl`` and ``verdicts.jsonl``; and ``report.md`` with figures of all results that are there. Before the first suite
    runs, all are checked and their data read. A run that was killed at any moment continues with the same call, to the same
    result; suites that were finished are not run again.

    Args:
        model: Folder, ``.gguf`` file or hub name of a checkpoint.
        suites: Names of `mull.evaluation.suites.table.SUITES`, ``meta-mtp``, or ``lm_eval:TASK``.
        out: Local folder for the results.
        request: Settings; None takes each suite as published.
        mlflow: Database or server that receives the scores, too; empty for ``mlflow.db`` in the folder, None for none.
        command: Is written into the result and the report.

    Returns:
        Results by suite, on every rank.

    Raises:
        ValueError: an unknown suite, or settings that do not fit the model, the suite or the samples in the folder.
        FileNotFoundError, ConnectionError, OSError: problems or a checkpoint cannot be read.
        RuntimeError: the sandbox is not safe enough, a package is missing, or another process uses the folder.
    """
    request, folder = request or Request(), storage.local_path(out)
    chosen = find_suites(suites)
    _check_data(request.data)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{out} is a file: give a folder for samples and results.")
    results: dict[str, Result] = {}
    with session(), side_group(PATIENCE) as group, _kept(folder):
        on_first_rank(lambda: _kept_results(folder), group)  # a damaged one is told now
        subject = load_subject(model, request, device())
        prepared = {name: prepare(subject, request) for name, prepare in chosen.items()}
        on_first_rank(lambda: _keep_all_settings(prepared, folder), group)
        for name, suite in prepared.items():
            place = folder / safe(name)
            result = on_first_rank(partial(_finished, place), group) or suite.run(Place(place, group))
            results[name] = result.model_copy(update={"command": result.command or command})
            on_first_rank(partial(_keep, results[name], folder, name), group)
        if rank() == 0:
            print(f"report: {folder / REPORT}")
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


def _kept(folder: Path) -> AbstractContextManager[None]:
    """Keep other runs out of the folder, on the first rank."""
    return storage.exclusive(folder) if rank() == 0 else nullcontext()


def _results_in(place: str | Path) -> dict[str, Result]:
    """Results of a folder of suites, by folder name; or of a single suite."""
    folder = storage.local_path(place)
    inside = sorted(file.parent for file in folder.glob(f"*/{RESULTS}"))
    found: dict[str, Result] = {}
    places: dict[str, Path] = {}
    for each in inside or [folder]:
        result = read_result(each)
        name = safe(f"{result.settings.get('protocol', 'published')} {result.suite}")
        if name in found:
            raise ValueError(f"{places[name]} and {each} both have a result of {result.suite}: give one of them.")
        found[name], places[name] = result, each
    return found


def _check_data(data: Mapping[str, str]) -> None:
    known = [*PROTOCOLS, SHOTS, TEXT]
    if unknown := [name for name in data if name not in known]:
        raise ValueError(f"data names {unknown[0]}, which no suite reads. {nearest(unknown[0], known)}")


def _keep_all_settings(prepared: Mapping[str, Prepared], folder: Path) -> None:
    for name, suite in prepared.items():
        keep_settings(folder / safe(name), suite.settings)


def _finished(place: Path) -> Result | None:
    """The result of an earlier run with these settings."""
    if not (place / RESULTS).exists():
        return None
    print(f"{place} has the result of an earlier run, which is not repeated: remove the folder to run the suite again.")
    return read_result(place)


def _kept_results(folder: Path) -> dict[str, Result]:
    """Results that are in the folder of a run, by folder name."""
    found = {}
    for file in sorted(folder.glob(f"*/{RESULTS}")):
        try:
            found[file.parent.name] = read_result(file)
        except ValueError:
            raise ValueError(f"{file} is damaged: remove it to run the suite again.") from None
    return found


def _keep(result: Result, folder: Path, name: str) -> None:
    result.write(folder / safe(name))
    write_report(_kept_results(folder), folder)
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
            ends = {f"{key} low": score.low, f"{key} high": score.high}
            record |= {key: score.value, **{end: value for end, value in ends.items() if value is not None}}
    log.log(record)
    log.close()
