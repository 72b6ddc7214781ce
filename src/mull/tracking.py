"""Metrics of a run, one JSON object per line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


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
