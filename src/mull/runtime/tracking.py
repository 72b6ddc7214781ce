"""Metrics of a run: always in a file, one JSON object per line; on request also in MLflow."""

import contextlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mull.runtime import storage

logger = logging.getLogger(__name__)

MLFLOW_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
"""Where MLflow keeps metrics: databases and servers."""

MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Settings of MLflow while mull calls it, unless the user has set them. By default, MLflow would hold up the training for minutes
when its server does not answer, print, and report usage."""

PAUSE_AFTER_FAILURE_SECONDS = 60.0
"""How long records are collected, but not sent, after MLflow failed."""


class MetricsLog:
    """Appends records to a JSONL file, and drops those that a resumed run is about to repeat.

    Every line is flushed, so a killed run loses at most the line it was writing. NaN and infinities, which JSON does not have,
    become null.

    Args:
        path: The file, in an existing folder. ``None`` keeps the records in memory only.
        last_step: Step the run continues from. Records of later steps and an unfinished last line are removed; 0 starts a new
            file.

    Attributes:
        records: Every record of the run, including those from before a resume.
    """

    def __init__(self, path: Path | None, last_step: int = 0) -> None:
        self.records: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self.records = [record for record in read_metrics(path) if record["step"] <= last_step]
            storage.write_text_atomic(str(path), "".join(map(_line, self.records)))
        self._file = (path or Path(os.devnull)).open("a", encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record, which must have a ``step``."""
        self.records.append(dict(record))
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted names, such as ``train.peak_lr``. An empty mapping is kept as a value."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = {f"{name}.{key}": entry for key, entry in flat(value).items()} if isinstance(value, dict) else {}
        found |= inner or {name: value}
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file, except for a last line that a killed run left unfinished.

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
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not JSON ({error}). Repair or remove the line.") from error
    return records


def _line(record: Mapping[str, Any]) -> str:
    finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class MlflowLog:
    """Sends the numbers of each record to MLflow, as one MLflow run that a resumed run continues.

    A resumed run repeats the steps after its checkpoint bit for bit, so what MLflow already has of them is not sent again. When
    the server fails during training, mull warns once and collects records until it is back.

    MLflow's own asynchronous logging is not used. When the server is gone, it prints an error and drops the numbers of each call
    or, with its default retries, keeps the process from ending (mlflow 3.17: more than two minutes for one record).

    Args:
        uri: A server, or a database such as ``sqlite:///out/mlflow.db``, which is made if missing, with artifacts beside it.
        experiment: Name of the experiment, which is made if missing.
        run_name: Name of the run.
        run_id_file: Stores the identifier of the MLflow run. If the file exists, that run is continued.
        parameters: Settings of the run, flat; logged without the secrets of URLs. MLflow cannot change a parameter: one that
            differs in a resumed run becomes a tag ``resumed.<name>``.
        tags: Labels of the run.

    Attributes:
        run_id: Identifier of the MLflow run.

    Raises:
        ValueError: `uri` is neither a database nor a server, or has no such run as `run_id_file` names.
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
        if uri.startswith("sqlite:///~"):
            uri = f"sqlite:///{storage.local_path(uri.removeprefix('sqlite:///'))}"
        _check_uri(uri)
        self._uri = uri
        # None: a new run repeats nothing.
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
                raise RuntimeError(f"MLflow at {storage.redact(uri)} cannot be used: {_brief(error)}") from error
        run_id_file.write_text(self.run_id + "\n", encoding="utf-8")

    def _begin(self, experiment: str, run_name: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        identifier = found.experiment_id if found else self._client.create_experiment(experiment, _artifacts(self._uri))
        return str(self._client.create_run(identifier, run_name=run_name).info.run_id)

    def _continue(self, run_id_file: Path) -> str:
        run_id = run_id_file.read_text(encoding="utf-8").strip()
        try:
            self._client.update_run(run_id, status="RUNNING")
        except self._mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise ValueError(
                f"MLflow at {storage.redact(self._uri)} has no run {run_id}, which {run_id_file} names: give the uri where that "
                "run was logged, or remove the file to log to a new run."
            ) from None
        return run_id

    def _describe(self, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        stored = self._client.get_run(self.run_id).data.params
        given = {_clean(name): storage.redact(str(value)) for name, value in parameters.items()}
        new = [self._mlflow.entities.Param(name, value) for name, value in given.items() if name not in stored]
        changed = {f"resumed.{name}": value for name, value in given.items() if stored.get(name, value) != value}
        labels = {_clean(name): value for name, value in {**tags, **changed}.items()}
        run_tags = [self._mlflow.entities.RunTag(*label) for label in labels.items()]
        self._client.log_batch(self.run_id, params=new, tags=run_tags)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a record, which must have a ``step``; other values are ignored.

        MLflow restricts the characters of a name: ``@`` becomes ``_at_``, and any other forbidden one an underscore.
        """
        now, step = time.time_ns() // 1_000_000, int(record["step"])
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._pending.append(self._mlflow.entities.Metric(_clean(name), float(value), now, step))
        if time.monotonic() - self._failed_at >= PAUSE_AFTER_FAILURE_SECONDS:
            self._send("records are collected until it is back")

    def close(self, status: str = "FINISHED") -> None:
        """Send what is left and end the MLflow run. A second call does nothing.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        """
        if not self._open:
            return
        self._open = False
        self._failed_at = -math.inf  # one last attempt, and one last warning, even during an outage
        self._send("its copy of this run is incomplete; metrics.jsonl has every record")
        if not self._pending:
            with self._tolerating("the end of the run is not recorded there"):
                self._client.set_terminated(self.run_id, status=status)

    def _send(self, consequence: str) -> None:
        with self._tolerating(consequence):
            fresh = [metric for metric in self._pending if metric.step > self._last_step(metric.key)]
            self._client.log_batch(self.run_id, metrics=fresh)
            self._pending.clear()
            self._failed_at = -math.inf

    def _last_step(self, name: str) -> int:
        """Last step of a metric that MLflow had before this process logged it."""
        if self._last_steps is None:
            return -1
        if name not in self._last_steps:
            history = self._client.get_metric_history(self.run_id, name)
            self._last_steps[name] = max((metric.step for metric in history), default=-1)
        return self._last_steps[name]

    @contextlib.contextmanager
    def _tolerating(self, consequence: str) -> Iterator[None]:
        """Turn a failure of MLflow into one warning per outage, because it must not end the training."""
        try:
            with _mlflow_settings():
                yield
        except self._failures as error:
            if self._failed_at == -math.inf:
                logger.warning("MLflow at %s failed, and %s: %s", storage.redact(self._uri), consequence, _brief(error))
            self._failed_at = time.monotonic()


def sqlite_uri(folder: Path) -> str:
    """URI of the MLflow database ``mlflow.db`` in a folder.

    Raises:
        ValueError: MLflow could not find the folder again, because a URI ends at ``?``, and ``%`` begins a code.
    """
    place = folder.absolute()
    if set("?%") & set(str(place)):
        raise ValueError(
            f"MLflow cannot keep a database in {place}, because of the ? or % in its name: choose another run.out, or set "
            "tracking.uri."
        )
    return f"sqlite:///{place / 'mlflow.db'}"


def _import_mlflow() -> tuple[Any, tuple[type[Exception], ...]]:
    """MLflow, and what its calls raise when a database, a server or a driver does not work."""
    try:
        import mlflow  # here, because it takes 1.5 s
        from sqlalchemy.exc import SQLAlchemyError
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"tracking.mlflow needs a package that is missing ({error.name}): pip install 'mull[mlflow]', or set "
            "tracking.mlflow to false."
        ) from None
    # Both report at level INFO each table of a database that they make.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return mlflow, (mlflow.MlflowException, SQLAlchemyError, ImportError)


@contextlib.contextmanager
def _mlflow_settings() -> Iterator[None]:
    """Apply `MLFLOW_ENVIRONMENT`. MLflow reads its settings from the environment, at each call."""
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
        advice = (
            f" MLflow no longer writes to plain folders: use sqlite:///{storage.local_path(uri).absolute()}/mlflow.db."
        )
    allowed = ", ".join(f"{name}:" for name in MLFLOW_SCHEMES)
    shown = storage.redact(uri)
    raise ValueError(f"tracking.uri={shown!r} is neither a database nor a server ({allowed}).{advice}")


def _artifacts(uri: str) -> str | None:
    """Folder for an experiment's artifacts, beside an SQLite database. A server chooses its own."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts")


def _clean(name: str) -> str:
    return re.sub(r"[^\w.\- :/]", "_", name.replace("@", "_at_"), flags=re.ASCII)


def _brief(error: Exception) -> str:
    return storage.redact(" ".join(str(error).split()))[:500]
