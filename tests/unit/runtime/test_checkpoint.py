"""Claim: a checkpoint is complete or does not count, resumes bit for bit in any sharding, and survives the failure of the next.

Whatever depends on the storage is tested on a local disk and in S3.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import checkpoint_worker
import numpy as np
import pytest
import torch
from noisy_module import Noisy, optimizers_of, step

from mull.runtime import checkpoint as module
from mull.runtime import storage
from mull.runtime.checkpoint import (
    MARKER,
    CheckpointConfig,
    CheckpointWriter,
    checkpoints,
    latest,
    load_checkpoint,
    stored_tensors,
)
from mull.training.state import rng_tensors, set_rng_tensors, training_tensors

pytest_plugins = ["s3_server"]

RUN = {"train.peak_lr": 1e-3, "train.betas": (0.9, 0.95), "model.hidden_size": 8}
WORKER = Path(checkpoint_worker.__file__)


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "läufe 1") if request.param == "local" else f"{request.getfixturevalue('bucket')}/läufe 1"


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def save(url: str, step: int, keep_last: int | None = None, size: int = 4, asynchronous: bool = False) -> str:
    with closing(CheckpointWriter(url, keep_last, asynchronous)) as writer:
        writer.save(step, {"w": torch.full((size,), float(step))}, {"step": step}, RUN)
    return storage.join(url, f"step-{step:06d}")


def load(url: str, size: int = 4) -> float:
    tensors = {"w": torch.zeros(size)}
    step = load_checkpoint(url, tensors, RUN)["step"]
    assert torch.equal(tensors["w"], torch.full((size,), float(step)))
    return step


def names(url: str) -> list[str]:
    return [path.rsplit("/", 1)[-1] for path in checkpoints(url)]


# Training


@pytest.mark.latin(2)
def test_a_resumed_run_continues_bit_for_bit(url, asynchronous):
    model = Noisy()
    optimizers = optimizers_of(model)
    with closing(CheckpointWriter(url, 2, asynchronous)) as writer:
        for _ in range(3):
            step(model, optimizers)
        random.gauss(0, 1), np.random.randn()  # leaves half of a Gaussian pair in both generators
        tensors = training_tensors(model, optimizers) | rng_tensors(0)
        writer.save(3, tensors, {}, RUN)
        losses = [step(model, optimizers) for _ in range(3)]

    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    fresh = Noisy()
    fresh_optimizers = optimizers_of(fresh)
    tensors = training_tensors(fresh, fresh_optimizers) | rng_tensors(0)
    load_checkpoint(latest(url), tensors, RUN)
    set_rng_tensors(tensors, 0)
    assert [step(fresh, fresh_optimizers) for _ in range(3)] == losses
    ours, theirs = training_tensors(fresh, fresh_optimizers), training_tensors(model, optimizers)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ours["model.steps"] == 6


# Completeness


def test_every_kind_of_tensor_and_value_comes_back(url):
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "int": torch.tensor([-(2**62), 2**62]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "slice": torch.arange(10.0)[3:5],
        "expanded": torch.tensor(2.0).expand(3),
        "ñame.with.döts/🙂": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    values = {"größe 🙂": [1, 2.5, None, True, "ä"], "nested": {"a": {"b": []}}, "third": 1 / 3, "inf": float("inf")}
    with closing(CheckpointWriter(url, None, True)) as writer:
        writer.save(1, tensors, values, {"data.path": "Ω", **RUN})
    into = {name: torch.ones(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    assert load_checkpoint(latest(url), into, {"data.path": "Ω", **RUN}) == values
    assert stored_tensors(latest(url)) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(into[name].nan_to_num(7), tensor.nan_to_num(7)), name
    assert torch.signbit(into["ñame.with.döts/🙂"][2])


def test_a_checkpoint_without_its_marker_is_neither_listed_nor_loaded(url):
    whole, half = save(url, 3), save(url, 8)
    storage.remove_tree(storage.join(half, MARKER))
    storage.write_text_atomic(storage.join(url, "step-notes"), "")
    assert checkpoints(url) == [whole]
    assert latest(url) == whole
    for call in (lambda: load(half), lambda: stored_tensors(half), lambda: load(storage.join(url, "step-notes"))):
        with pytest.raises(FileNotFoundError, match="is not a complete checkpoint: it has no checkpoint.json"):
            call()
    absent = storage.join(url, "absent")
    assert latest(absent) is None
    assert checkpoints(absent) == []


def test_the_marker_is_written_last(url, monkeypatch):
    seen = []
    real = storage.write_text_atomic

    def watching(name: str, text: str) -> None:
        seen.append((latest(url), storage.list_names(name.rsplit("/", 1)[0])))
        real(name, text)

    monkeypatch.setattr(storage, "write_text_atomic", watching)
    path = save(url, 1)
    assert seen == [(None, [".metadata", "__0_0.distcp"])]
    assert storage.list_names(path) == [".metadata", "__0_0.distcp", "checkpoint.json"]


def test_everything_is_on_the_disk_before_the_marker(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(Path(f"/proc/self/fd/{fd}").readlink()), real(fd)))
    path = Path(save(str(tmp_path / "run"), 1))
    marker = flushed.index(path / "checkpoint.json.partial")
    assert {path / ".metadata", path / "__0_0.distcp", path, path.parent} <= set(flushed[:marker])
    assert flushed[-1] == path, "the marker's name"


def test_a_half_written_folder_of_the_same_step_is_replaced(url):
    path = save(url, 1, size=9)
    storage.remove_tree(storage.join(path, MARKER))
    for left_over in (
        "__7_0.distcp",
        ".metadata.tmp",
        "checkpoint.json.partial",
    ):  # of more ranks, of a crash in each step
        storage.write_text_atomic(storage.join(path, left_over), "")
    assert load(save(url, 1)) == 1
    assert storage.list_names(path) == [".metadata", "__0_0.distcp", "checkpoint.json"]


def test_a_complete_checkpoint_of_the_same_step_stays(url):
    path = save(url, 1)
    with closing(CheckpointWriter(url, 1, True)) as writer:
        writer.save(1, {"w": torch.zeros(4)}, {"step": 5}, RUN)
    assert load(path) == 1


@pytest.mark.latin(2)
def test_the_oldest_go_in_the_order_of_numbers(url):
    for number in (999_999, 1_000_000, 5):
        save(url, number)
    assert names(url) == ["step-000005", "step-999999", "step-1000000"]
    half = save(url, 999_998)
    storage.remove_tree(storage.join(half, MARKER))
    save(url, 1_000_001, keep_last=2)
    assert storage.list_names(url) == ["step-1000000", "step-1000001"], "half-written ones go, too"
    save(url, 1_000_002, keep_last=1)
    assert names(url) == ["step-1000002"]
    save(url, 7, keep_last=1)
    assert names(url) == ["step-000007", "step-1000002"], "what was just written stays"


def test_somebodys_folder_is_never_removed(url):
    theirs = [storage.join(url, name) for name in ("step-000001", "step-000002")]
    for folder in theirs:
        storage.make_folder(folder)
        storage.write_text_atomic(storage.join(folder, "model.safetensors"), "months of work")
    with pytest.raises(RuntimeError, match=r"step-000002 has files that are not a checkpoint's; choose another folder"):
        save(url, 2)
    save(url, 3, keep_last=1)
    assert names(url) == ["step-000003"]
    for folder in theirs:
        assert storage.list_names(folder) == ["model.safetensors"]


def test_a_removal_that_is_interrupted_leaves_nothing_that_looks_complete(url, monkeypatch):
    save(url, 1)
    real, calls = storage.remove_tree, []

    def interrupted(name: str) -> None:
        calls.append(name)
        if name.endswith("step-000001"):
            raise OSError("interrupted")
        real(name)

    monkeypatch.setattr(storage, "remove_tree", interrupted)
    save(url, 2, keep_last=1)
    assert storage.join(url, "step-000001") in calls
    assert names(url) == ["step-000002"]


def test_old_ones_that_cannot_be_removed_are_reported_and_the_new_one_counts(url, monkeypatch, caplog):
    save(url, 1)
    real = storage.remove_tree

    def refuse(name: str) -> None:
        if "step-000001" in name:
            raise OSError("read-only")
        real(name)

    monkeypatch.setattr(storage, "remove_tree", refuse)
    save(url, 2, keep_last=1)
    assert names(url) == ["step-000001", "step-000002"]
    assert "step 2 is saved, but older ones could not be removed: read-only" in caplog.text


# What does not fit


def test_another_configuration_is_refused_by_the_names_that_differ(tmp_path):
    url = str(tmp_path)
    path = save(url, 1)
    with pytest.raises(
        ValueError, match=r"model\.hidden_size: 8 stored, 9 given; train\.new: None stored, 1 given"
    ) as error:
        load_checkpoint(path, {}, {**RUN, "model.hidden_size": 9, "train.new": 1})
    assert "betas" not in str(error.value)


def test_tensors_that_are_missing_or_differ_are_named_and_nothing_is_overwritten(tmp_path):
    url = str(tmp_path)
    with closing(CheckpointWriter(url, None, False)) as writer:
        writer.save(1, {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4)}, {}, RUN)
    tensors = {"a": torch.zeros(4), "b": torch.zeros(5), "c": torch.zeros(4).half(), "d": torch.zeros(1)}
    message = r"b: float32 \[4\] stored, float32 \[5\] given; c: .* float16 \[4\] given; d is missing\)"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(latest(url), tensors, RUN)
    assert torch.equal(tensors["a"], torch.zeros(4))
    with pytest.raises(ValueError, match=r"x4 is missing; and 3 more\)"):
        load_checkpoint(latest(url), {f"x{number}": torch.zeros(1) for number in range(8)}, RUN)
    assert load_checkpoint(latest(url), {"b": torch.zeros(4)}, RUN) == {}, "a part is enough"


def test_a_damaged_checkpoint_is_named(url):
    path = save(url, 1)
    data = storage.join(path, "__0_0.distcp")
    half = storage.read_bytes(data)[:200]
    storage.remove_tree(data)
    with pytest.raises(FileNotFoundError, match=r"step-000001 lacks a file .*__0_0.distcp.*previous checkpoint"):
        load(path)
    storage.filesystem(data).pipe_file(data, half)
    with pytest.raises(RuntimeError, match=r"step-000001 is damaged .*previous checkpoint"):
        load(path)
    metadata = storage.join(path, ".metadata")
    storage.filesystem(metadata).pipe_file(metadata, b"")
    with pytest.raises(RuntimeError, match="step-000001 is damaged"):
        load(path)


def test_a_later_format_is_refused(tmp_path):
    url = str(tmp_path)
    marker = storage.join(save(url, 1), MARKER)
    storage.write_text_atomic(marker, json.dumps(json.loads(storage.read_bytes(marker).decode()) | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2; this version of mull reads up to 1"):
        load(latest(url))


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep_last": 0}, {"url": "s4://x"}, {"url": ""}, {"keep": 1}])
def test_a_setting_that_cannot_work_is_refused(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        CheckpointConfig(**wrong)


# Failures


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """Let the operating system refuse to grow a file, as it does when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, asynchronous):
    url = str(tmp_path)
    previous = save(url, 1)
    message = r"step 2 could not be written .*File too large.* step-000001, is intact.*resume"
    with full_disk(100_000), pytest.raises(RuntimeError, match=message):
        save(url, 2, size=1_000_000, keep_last=1, asynchronous=asynchronous)
    assert storage.list_names(url) == ["step-000001"], "something half-written was left"
    assert load(previous) == 1


@pytest.mark.parametrize("call", ["_Writer.write_data", "_commit"])
@pytest.mark.parametrize("when", ["poll", "save", "close"])
def test_a_failure_in_the_background_is_raised_once_at_the_next_call(tmp_path, monkeypatch, call, when):
    url = str(tmp_path)
    previous = save(url, 1)

    def fail(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter(url, 1, True)
    with monkeypatch.context() as patch:
        patch.setattr(f"mull.runtime.checkpoint.{call}", fail)
        writer.save(2, {"w": torch.zeros(4)}, {"step": 2}, RUN)
        while not writer._pending.done():
            time.sleep(0.01)
    arguments = {"poll": (), "close": (), "save": (3, {"w": torch.zeros(4)}, {"step": 3}, RUN)}[when]
    with pytest.raises(RuntimeError, match=r"\[Errno 28\] No space left on device. The previous one, step-000001"):
        getattr(writer, when)(*arguments)
    writer.close()
    assert storage.list_names(url) == ["step-000001"]
    assert load(previous) == 1


def test_a_failure_without_an_earlier_checkpoint_says_so(tmp_path):
    url = str(tmp_path)
    with full_disk(1000), pytest.raises(RuntimeError, match="There is no earlier one. Make room"):
        save(url, 1, size=10_000)


def test_an_interruption_by_the_user_is_not_reported_as_a_failure_of_the_disk(tmp_path, monkeypatch):
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Writer, "write_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(str(tmp_path), 1)
    assert latest(str(tmp_path)) is None


# In the background


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds every write until the test opens it."""
    gate = threading.Event()
    real = module._Writer.write_data

    def held(self: module._Writer, *arguments: object) -> object:
        assert gate.wait(30)
        return real(self, *arguments)

    monkeypatch.setattr(module._Writer, "write_data", held)
    yield gate
    gate.set()


def test_what_changes_after_save_is_not_in_the_checkpoint(tmp_path, gate):
    url = str(tmp_path)
    model = Noisy()
    optimizers = optimizers_of(model)
    step(model, optimizers)
    tensors = training_tensors(model, optimizers)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    values = {"list": [1]}
    with closing(CheckpointWriter(url, 1, True)) as writer:
        writer.save(1, tensors, values, RUN)
        values["list"].append(2)
        step(model, optimizers)
        assert not torch.equal(tensors["model.embed.weight"], expected["model.embed.weight"])
        writer.poll()
        assert latest(url) is None, "not written yet, and nobody waited"
        gate.set()
    assert load_checkpoint(latest(url), tensors, RUN) == {"list": [1]}
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    url = str(tmp_path)
    with closing(CheckpointWriter(url, None, True)) as writer:
        writer.save(1, {"w": torch.full((4,), 1.0)}, {"step": 1}, RUN)
        second = threading.Thread(target=writer.save, args=(2, {"w": torch.full((4,), 2.0)}, {"step": 2}, RUN))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        gate.set()
        second.join(30)
        assert load(storage.join(url, "step-000001")) == 1
    assert load(storage.join(url, "step-000002")) == 2


def test_a_killed_process_leaves_the_previous_checkpoint(tmp_path, bucket):
    urls = [str(tmp_path / "run"), bucket]
    arguments = ["interrupted,interrupted", "0", "1", "-", ",".join(urls)]
    process = subprocess.Popen([sys.executable, str(WORKER), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert [process.stdout.readline() for _ in urls] == ["half-written\n"] * 2
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
        process.stdout.close()
    for url in urls:
        assert "__0_0.distcp" in storage.list_names(storage.join(url, "step-000002"))
        assert names(url) == ["step-000001"]
        tensors = checkpoint_worker.build(sharded=False)
        assert load_checkpoint(latest(url), tensors, checkpoint_worker.CONFIGURATION) == {"step": 1}
        assert checkpoint_worker.wrong(tensors) == []
        with closing(CheckpointWriter(url, 1, True)) as writer:
            writer.save(2, tensors, {"step": 2}, RUN)
        assert storage.list_names(url) == ["step-000002"]


# Many ranks


@pytest.mark.slow
def test_checkpoints_pass_between_one_and_two_ranks(tmp_path, bucket):
    one, two, full = (str(tmp_path / name) for name in ("one", "two", "full"))
    checkpoint_worker.save(0, 1, one)
    # 1 -> 2, 2 -> 2 and a failure on one rank here; 2 -> 1 below.
    tasks = {"load": one, "save": two, "load ": two, "save ": bucket, "load  ": bucket, "fail": full}
    arguments = [",".join(task.strip() for task in tasks)], [",".join(tasks.values())]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *arguments[0], str(rank), "2", str(tmp_path / "store"), *arguments[1]],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    for url in (two, bucket):
        assert storage.list_names(latest(url)) == [".metadata", "__0_0.distcp", "__1_0.distcp", "checkpoint.json"]
        checkpoint_worker.load(0, 1, url)
