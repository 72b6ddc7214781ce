"""Metrics of a run: one JSON object per line of a file, always; and in MLflow, where asked for."""

import contextlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

MLFLOW_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
"""Where MLflow keeps metrics: databases and servers."""

MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Settings of MLflow while mull calls it, where the user has set none: a server that is away must not hold up the training for
minutes, nothing but mull prints, and no usage is reported to anybody."""

PAUSE_AFTER_FAILURE_SECONDS = 60.0
"""How long records are only collected after MLflow refused some."""

MAX_ENTRIES_PER_CALL = 100
MAX_METRICS_PER_CALL = 1000
"""MLflow accepts so many parameters or tags, and metrics, at once."""


class MetricsLog:
    """Appends records to a JSONL file, and drops what a resumed run is about to repeat.

    Every line is flushed, so that a killed run loses at most the line it was writing. Numbers that JSON cannot hold (NaN,
    infinities) are written as null.

    Args:
        path: The file; its directory must exist. ``None`` keeps the records in memory only.
        last_step: Step the run continues from: records of later steps and a half-written last line are removed. 0 starts
            a new file.

    Attributes:
        records: Every record of the run, those of before a resume included.
    """

    def __init__(self, path: Path | None, last_step: int = 0) -> None:
        self.records: list[dict[str, Any]] = []
        self._file = None
        if path is None:
            return
        if path.exists():
            self.records = [record for record in read_metrics(path) if record["step"] <= last_step]
            _replace(path, self.records)
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record; it must hold ``step``."""
        self.records.append(dict(record))
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        """Return the log."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names, ``train.peak_lr``; an empty mapping stays as it is."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = {f"{name}.{key}": entry for key, entry in flat(value).items()} if isinstance(value, dict) else {}
        found |= inner or {name: value}
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that a killed run left unfinished is skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is not a JSON object; names its number.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not JSON ({error}). Repair or remove the line.") from error
    return records


def _replace(path: Path, records: list[dict[str, Any]]) -> None:
    """Rewrite the file so that a crash leaves either the old or the new content."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(_line(record) for record in records)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


class MlflowLog:
    """Sends the numbers of each record to MLflow, as one MLflow run that a resumed run continues.

    A resumed run repeats the steps behind its checkpoint bit for bit, so what MLflow already holds of them stays and is not sent
    again. When the server is away during training, a warning says so once, and records are collected until it is back.

    Args:
        uri: A database, such as ``sqlite:///out/mlflow.db`` (made where it does not exist, artifacts beside it), or a server.
        experiment: Name of the experiment; made where it does not exist.
        run_name: Name of the run.
        run_id_file: Keeps the identifier of the MLflow run; where the file exists, that run is continued.
        parameters: Settings of the run, flat. MLflow does not change a parameter: one that differs in a resumed run becomes a
            tag ``resumed.<name>``.
        tags: Labels of the run.

    Attributes:
        run_id: Identifier of the MLflow run.

    Raises:
        ValueError: `uri` is neither a database nor a server, or holds no such run as `run_id_file` names.
        RuntimeError: MLflow is not installed, or the database or server cannot be used.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        run_id_file: Path,
        *,
        parameters: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        _check_uri(uri)
        self._uri = uri
        self._last_steps: dict[str, int] | None = {} if run_id_file.exists() else None
        self._pending: list[Any] = []
        self._failed_at = -math.inf
        self._open = True
        with _mlflow_settings():
            self._mlflow, self._failures = _import_mlflow()
            try:
                self._client = self._mlflow.MlflowClient(tracking_uri=uri)
                self.run_id = self._continue(run_id_file) if run_id_file.exists() else self._begin(experiment, run_name)
                self._describe(parameters, tags)
            except self._failures as error:
                raise RuntimeError(f"MLflow at {uri} cannot be used: {_brief(error)}") from error
        run_id_file.write_text(self.run_id + "\n", encoding="utf-8")

    def _begin(self, experiment: str, run_name: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            identifier = self._client.create_experiment(experiment, artifact_location=_artifacts(self._uri))
        else:
            identifier = found.experiment_id
        return str(self._client.create_run(identifier, run_name=run_name).info.run_id)

    def _continue(self, run_id_file: Path) -> str:
        run_id = run_id_file.read_text(encoding="utf-8").strip()
        try:
            self._client.update_run(run_id, status="RUNNING")
        except self._mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise ValueError(
                f"MLflow at {self._uri} has no run {run_id}, as which {run_id_file} says this run is logged: give the uri it "
                "was logged to, or remove the file to log to a new one."
            ) from None
        return run_id

    def _describe(self, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        stored = self._client.get_run(self.run_id).data.params
        given = {_clean(name): str(value) for name, value in parameters.items()}
        new = [self._mlflow.entities.Param(name, value) for name, value in given.items() if name not in stored]
        changed = {f"resumed.{name}": value for name, value in given.items() if stored.get(name, value) != value}
        labels = {_clean(name): value for name, value in {**tags, **changed}.items()}
        for part in _parts(new, MAX_ENTRIES_PER_CALL):
            self._client.log_batch(self.run_id, params=part)
        for part in _parts([self._mlflow.entities.RunTag(*label) for label in labels.items()], MAX_ENTRIES_PER_CALL):
            self._client.log_batch(self.run_id, tags=part)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a record, which must hold ``step``; other values are left out.

        MLflow restricts the characters of a name: ``pass@1`` becomes ``pass_at_1``, and any other forbidden one an underscore.
        """
        now, step = time.time_ns() // 1_000_000, int(record["step"])
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._pending.append(self._mlflow.entities.Metric(_clean(name), float(value), now, step))
        if time.monotonic() - self._failed_at >= PAUSE_AFTER_FAILURE_SECONDS:
            self._send("records are collected until it is back")

    def close(self, status: str = "FINISHED") -> None:
        """Send what is collected and end the MLflow run; a second call does nothing.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        """
        if not self._open:
            return
        self._open = False
        self._failed_at = -math.inf
        self._send("its picture of this run is incomplete; metrics.jsonl has every record")
        if not self._pending:
            with self._tolerating("the end of the run is not noted"):
                self._client.set_terminated(self.run_id, status=status)

    def _send(self, consequence: str) -> None:
        with self._tolerating(consequence):
            fresh = [metric for metric in self._pending if metric.step > self._last_step(metric.key)]
            for part in _parts(fresh, MAX_METRICS_PER_CALL):
                self._client.log_batch(self.run_id, metrics=part)
            self._pending.clear()
            self._failed_at = -math.inf

    def _last_step(self, name: str) -> int:
        """Last step of a metric that MLflow held when this process began to log it."""
        if self._last_steps is None:
            return -1
        if name not in self._last_steps:
            history = self._client.get_metric_history(self.run_id, name)
            self._last_steps[name] = max((metric.step for metric in history), default=-1)
        return self._last_steps[name]

    @contextlib.contextmanager
    def _tolerating(self, consequence: str) -> Iterator[None]:
        """Turn a failure of MLflow into one warning per outage: a picture of the training must not end it."""
        try:
            with _mlflow_settings():
                yield
        except self._failures as error:
            if self._failed_at == -math.inf:
                logger.warning("MLflow at %s failed, and %s: %s", self._uri, consequence, _brief(error))
            self._failed_at = time.monotonic()


def sqlite_uri(folder: Path) -> str:
    """Address of the MLflow database ``mlflow.db`` in a folder."""
    return f"sqlite:///{folder.absolute() / 'mlflow.db'}"


def _import_mlflow() -> tuple[Any, tuple[type[Exception], ...]]:
    """MLflow, and what its calls raise where a database, a server or a driver of either is not as it should be."""
    try:
        import mlflow  # 1.5 s
        from sqlalchemy.exc import SQLAlchemyError
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"tracking.mlflow needs a package that is missing ({error.name}): pip install 'mull[mlflow]', or set "
            "tracking.mlflow to false."
        ) from None
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return mlflow, (mlflow.MlflowException, SQLAlchemyError, ImportError)


@contextlib.contextmanager
def _mlflow_settings() -> Iterator[None]:
    """MLflow reads its settings from the environment, at each call."""
    unset = {name: value for name, value in MLFLOW_ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(unset)
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def _check_uri(uri: str) -> None:
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in MLFLOW_SCHEMES:
        return
    advice = ""
    if scheme in ("", "file"):
        folder = Path(uri.removeprefix("file://"))
        advice = f" MLflow no longer writes to plain folders: use {sqlite_uri(folder)}."
    raise ValueError(
        f"tracking.uri={uri!r} is neither a database nor a server ({', '.join(f'{name}:' for name in MLFLOW_SCHEMES)}).{advice}"
    )


def _artifacts(uri: str) -> str | None:
    """Artifacts of an experiment: beside an SQLite database; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts")


def _clean(name: str) -> str:
    return re.sub(r"[^\w.\- :/]", "_", name.replace("@", "_at_"), flags=re.ASCII)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _parts(entries: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(entries), size):
        yield entries[first : first + size]
