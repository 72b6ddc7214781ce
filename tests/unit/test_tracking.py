"""Claim: the metrics file holds every step once, whatever killed the run that wrote it."""

import json
import math
from pathlib import Path

import pytest

from mull.tracking import MetricsLog, read_metrics


def test_every_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.log({"step": 1, "loss": 2.5})
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n', "not flushed"
    log.close()


def test_resuming_drops_later_steps_and_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "run": "old"}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "r'
    )
    with MetricsLog(path, last_step=2) as log:
        assert [record["step"] for record in log.records] == [1, 2]
        log.log({"step": 3, "run": "new"})
    assert [(record["step"], record["run"]) for record in read_metrics(path)] == [(1, "old"), (2, "old"), (3, "new")]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_values_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log({"step": 1, "a": math.nan, "b": -math.inf, "c": 1})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": 1}


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_without_a_path_records_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with MetricsLog(None) as log:
        log.log({"step": 1})
    assert log.records == [{"step": 1}]
    assert not list(tmp_path.iterdir())
