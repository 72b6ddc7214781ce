"""Claim: the metrics file, and MLflow where asked for, hold every step once, whatever killed the run that wrote it."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest

from mull.runtime.tracking import MetricsLog, MlflowLog, read_metrics, sqlite_uri


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
    with closing(MetricsLog(path, last_step=2)) as log:
        assert [record["step"] for record in log.records] == [1, 2]
        log.log({"step": 3, "run": "new"})
    assert [(record["step"], record["run"]) for record in read_metrics(path)] == [(1, "old"), (2, "old"), (3, "new")]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_values_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsLog(path)) as log:
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
    with closing(MetricsLog(None)) as log:
        log.log({"step": 1})
    assert log.records == [{"step": 1}]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that MLflow has made; that takes seconds, a copy none."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowLog(sqlite_uri(folder), "e", "template", folder / "id", parameters={}, tags={}).close()
    return folder / "mlflow.db"


@pytest.fixture
def database(template: Path, tmp_path: Path) -> str:
    shutil.copy(template, tmp_path / "mlflow.db")
    return sqlite_uri(tmp_path)


def begin(uri: str, folder: Path, **parameters: Any) -> MlflowLog:
    return MlflowLog(uri, "mull", "tiny", folder / "mlflow-run-id", parameters=parameters, tags={"team": "a"})


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    client = mlflow.MlflowClient(tracking_uri=uri)
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


def status(uri: str, run_id: str) -> str:
    return str(mlflow.MlflowClient(tracking_uri=uri).get_run(run_id).info.status)


def test_mlflow_holds_the_numbers_the_parameters_and_the_tags_of_a_run(database: str, tmp_path: Path) -> None:
    log = begin(database, tmp_path, **{"train.steps": 3, "data.paths": ["a", "b"], "x": None})
    log.log(
        {"step": 1, "loss": 2.5, "pass@1": 0.25, "weights/head0/ess": 1, "device": "cpu", "last": True, "odd name!": 7}
    )
    log.log({"step": 2, "loss": math.nan})
    assert status(database, log.run_id) == "RUNNING"
    log.close("KILLED")
    log.close()
    run = mlflow.MlflowClient(tracking_uri=database).get_run(log.run_id)
    assert run.data.params == {"train.steps": "3", "data.paths": "['a', 'b']", "x": "None"}
    assert run.data.tags["team"] == "a"
    assert (run.info.status, run.info.run_name) == ("KILLED", "tiny")
    assert run.info.end_time is not None
    assert run.info.artifact_uri.startswith(str(tmp_path / "mlartifacts"))
    assert set(run.data.metrics) == {"loss", "pass_at_1", "weights/head0/ess", "odd name_"}
    assert history(database, log.run_id, "pass_at_1") == [(1, 0.25)]


def test_a_resumed_run_goes_on_in_its_mlflow_run_without_repeating_a_step(database: str, tmp_path: Path) -> None:
    killed = begin(database, tmp_path, a=1, log_every=10)
    for step in (1, 2, 3):
        killed.log({"step": step, "loss": float(step)} | ({"eval_loss": 0.5} if step == 2 else {}))
    resumed = begin(database, tmp_path, a=1, log_every=5, new=2)  # from the checkpoint of step 1
    for step in (2, 3, 4):
        resumed.log({"step": step, "loss": float(step), "eval_loss": 0.5})
    resumed.close()
    assert resumed.run_id == killed.run_id
    assert history(database, resumed.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert history(database, resumed.run_id, "eval_loss") == [(2, 0.5), (3, 0.5), (4, 0.5)]
    run = mlflow.MlflowClient(tracking_uri=database).get_run(resumed.run_id)
    assert run.data.params == {"a": "1", "log_every": "10", "new": "2"}
    assert run.data.tags["resumed.log_every"] == "5"
    assert "resumed.a" not in run.data.tags
    assert run.info.status == "FINISHED"


def test_another_run_of_the_experiment_is_another_mlflow_run(database: str, tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runs.append(begin(database, tmp_path / name))
    assert runs[0].run_id != runs[1].run_id
    client = mlflow.MlflowClient(tracking_uri=database)
    assert len({client.get_run(run.run_id).info.experiment_id for run in runs}) == 1


def test_more_parameters_and_metrics_than_mlflow_takes_in_one_call_all_arrive(database: str, tmp_path: Path) -> None:
    log = begin(database, tmp_path, **{f"p{number}": number for number in range(205)})
    log.log({"step": 1} | {f"m{number}": 1.0 for number in range(2001)})
    run = mlflow.MlflowClient(tracking_uri=database).get_run(log.run_id)
    assert (len(run.data.params), len(run.data.metrics)) == (205, 2001)


def test_an_outage_is_one_warning_and_loses_no_record(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = begin(database, tmp_path)
    works = log._client.log_batch

    def away(*_: object, **__: object) -> None:
        raise mlflow.MlflowException("connection refused")

    monkeypatch.setattr("mull.runtime.tracking.PAUSE_AFTER_FAILURE_SECONDS", 0.0)
    monkeypatch.setattr(log._client, "log_batch", away)
    with caplog.at_level(logging.WARNING, "mull"):
        for step in (1, 2, 3):
            log.log({"step": step, "loss": 0.5})
        assert [record.getMessage() for record in caplog.records] == [
            f"MLflow at {database} failed, and records are collected until it is back: connection refused"
        ]
        monkeypatch.setattr(log._client, "log_batch", works)
        log.log({"step": 4, "loss": 0.5})
        monkeypatch.setattr(log._client, "log_batch", away)
        log.log({"step": 5, "loss": 0.5})
        assert len(caplog.records) == 2, "a second outage is worth a second warning"
        log.close()
    assert [step for step, _ in history(database, log.run_id, "loss")] == [1, 2, 3, 4]
    assert "metrics.jsonl has every record" in caplog.records[-1].getMessage()


def test_after_a_failure_mlflow_is_left_alone_for_a_while(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, calls = begin(database, tmp_path), []

    def away(*_: object, **__: object) -> None:
        calls.append(1)
        raise mlflow.MlflowException("slow")

    monkeypatch.setattr(log._client, "log_batch", away)
    for step in (1, 2, 3):
        log.log({"step": step, "loss": 0.5})
    assert len(calls) == 1


def test_an_address_that_cannot_be_used_is_one_sentence(database: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"MLflow at http://127\.0\.0\.1:1 cannot be used: API request .*refused"):
        begin("http://127.0.0.1:1", tmp_path)
    assert not (tmp_path / "mlflow-run-id").exists()
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ, "the settings of a user's process are not ours"
    (tmp_path / "bad.db").write_text("no database " * 100)
    with pytest.raises(RuntimeError, match="cannot be used: .*file is not a database"):
        begin(f"sqlite:///{tmp_path / 'bad.db'}", tmp_path)
    with pytest.raises(RuntimeError, match="cannot be used: No module named 'psycopg"):
        begin("postgresql://localhost:1/x", tmp_path)
    for uri in ("mlruns", f"file://{Path('mlruns').absolute()}"):
        with pytest.raises(
            ValueError, match=r"no longer writes to plain folders: use sqlite:///.*/mlruns/mlflow\.db\.$"
        ):
            begin(uri, tmp_path)
    with pytest.raises(ValueError, match=r"tracking.uri='s3://b/x' is neither a database nor a server \(sqlite:, "):
        begin("s3://b/x", tmp_path)
    (tmp_path / "mlflow-run-id").write_text("0123456789abcdef0123456789abcdef\n")
    with pytest.raises(ValueError, match="has no run 0123456789abcdef0123456789abcdef, which"):
        begin(database, tmp_path)


def test_no_password_reaches_mlflow_or_a_log(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = {"tracking.uri": "http://ann:s3cret@host", "data.paths": ("s3://a", "https://h/x?token=s3cret")}
    log = begin(database, tmp_path, **secrets)
    stored = mlflow.MlflowClient(tracking_uri=database).get_run(log.run_id).data.params
    assert stored == {"tracking.uri": "http://***@host", "data.paths": "('s3://a', 'https://h/x?token=***')"}
    log._uri = "http://ann:s3cret@host"

    def fail(*_: object, **__: object) -> None:
        raise mlflow.MlflowException("http://ann:s3cret@host is down")

    monkeypatch.setattr(log._client, "log_batch", fail)
    log.log({"step": 1, "loss": 1.0})
    log.close()
    assert "MLflow at http://***@host failed" in caplog.text
    assert "s3cret" not in caplog.text
    for uri in ("http://ann:s3cret@127.0.0.1:1", "nope://ann:s3cret@host"):
        with pytest.raises((RuntimeError, ValueError), match=r"\*\*\*@") as error:
            begin(uri, tmp_path / "other")
        assert "s3cret" not in str(error.value)


def test_without_mlflow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RuntimeError, match=r"needs a package that is missing \(mlflow\): pip install 'mull\[mlflow\]'"):
        begin(sqlite_uri(tmp_path), tmp_path)


@pytest.mark.slow
def test_mlflow_prints_nothing(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from mull.runtime.tracking import MlflowLog, sqlite_uri
folder = Path({str(tmp_path)!r})
log = MlflowLog(sqlite_uri(folder), "e", "r", folder / "id", parameters={{}}, tags={{}})
log.log({{"step": 1, "loss": 1.0}})
log.close()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("name", ["a?b", "100%41"])
def test_no_database_lands_where_a_uri_would_end_early(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="MLflow cannot keep a database in"):
        sqlite_uri(tmp_path / name)


def test_the_home_folder_is_read_in_the_uri_of_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("HOME", str(tmp_path))
    MlflowLog("sqlite:///~/a b.db", "e", "r", tmp_path / "id", parameters={}, tags={}).close()
    assert (tmp_path / "a b.db").is_file()
