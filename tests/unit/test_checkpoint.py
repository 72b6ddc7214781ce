"""Claim: a checkpoint under its final name is whole, belongs to its run, and survives a failure to write the next one."""

import errno
import os
import random
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mull import checkpoint as module
from mull.checkpoint import checkpoints, latest, load_checkpoint, rng_state, save_checkpoint, set_rng_state

RUN = {"train.peak_lr": 1e-3, "train.betas": (0.9, 0.95), "model.hidden_size": 8}


def state(value: float, size: int = 4) -> dict[str, object]:
    return {"model": {"w": torch.full((size,), value)}, "step": 3, "rng": rng_state()}


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "run", 3, state(1.5), RUN)
    assert path == latest(tmp_path / "run") == tmp_path / "run" / "step-000003"
    assert torch.equal(load_checkpoint(path, RUN)["model"]["w"], torch.full((4,), 1.5))


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return (float(torch.randn(())), float(np.random.randn()), random.gauss(0, 1))

    draw()  # leaves half of a Gaussian pair in numpy's and Python's generators
    path = save_checkpoint(tmp_path, 1, state(0.0), RUN)
    expected = [draw() for _ in range(3)]
    set_rng_state(load_checkpoint(path, RUN)["rng"])
    assert [draw() for _ in range(3)] == expected


def test_half_written_checkpoints_do_not_count(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path, 3, state(0.0), RUN)
    shutil.copytree(whole, tmp_path / "step-000009.partial")
    shutil.copytree(whole, tmp_path / "step-000008")
    (tmp_path / "step-000008" / "state.pt").unlink()
    (tmp_path / "step-notes").mkdir()
    assert latest(tmp_path) == whole
    with pytest.raises(FileNotFoundError, match="complete"):
        load_checkpoint(tmp_path / "step-000008", RUN)
    assert latest(tmp_path / "absent") is None


def test_nothing_carries_the_final_name_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch.save

    def watching(*args: object, **kwargs: object) -> None:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        real(*args, **kwargs)

    monkeypatch.setattr(module.torch, "save", watching)
    save_checkpoint(tmp_path, 1, state(0.0), RUN)
    assert seen == [["step-000001.partial"]]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_steps_are_ordered_as_numbers_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        save_checkpoint(tmp_path, step, state(float(step)), RUN)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]
    save_checkpoint(tmp_path, 1_000_001, state(0.0), RUN, keep_last=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]


def test_another_configuration_is_refused_by_the_names_that_differ(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, state(0.0), RUN)
    with pytest.raises(
        ValueError, match=r"model\.hidden_size: 8 stored, 9 given; train\.new: None stored, 1 given"
    ) as error:
        load_checkpoint(path, {**RUN, "model.hidden_size": 9, "train.new": 1})
    assert "betas" not in str(error.value)


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """Let the operating system refuse to grow a file, as it does when the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    previous = save_checkpoint(tmp_path, 1, state(1.0), RUN)
    message = r"step 2 could not be written .*File too large.* step-000001, is intact.*resume"
    with full_disk(100_000), pytest.raises(RuntimeError, match=message):
        save_checkpoint(tmp_path, 2, state(2.0, size=1_000_000), RUN, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"], "something half-written was left"
    assert torch.equal(load_checkpoint(previous, RUN)["model"]["w"], torch.full((4,), 1.0))


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_late_failure_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    previous = save_checkpoint(tmp_path, 1, state(1.0), RUN)

    def fail(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*{"fsync": (module.os, "fsync"), "rename": (Path, "rename")}[call], fail)
    with pytest.raises(RuntimeError, match="No space left on device"):
        save_checkpoint(tmp_path, 2, state(2.0), RUN)
    assert latest(tmp_path) == previous
    assert len(list(tmp_path.iterdir())) == 1
