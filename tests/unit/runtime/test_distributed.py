"""Claim: without torchrun one process is a group of its own, and a group that cannot work is refused.

What several ranks do is tested in equivalence/test_one_gradient.py.
"""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from mull.runtime import distributed


def test_one_process_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.session():
        assert not torch.distributed.is_initialized()
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
        tensor = torch.tensor([1.0, 2.0])
        total = distributed.global_sum(tensor)
        assert torch.equal(total, tensor)
        assert total is not tensor
        assert distributed.gather(tensor) == [tensor]
        assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
        assert distributed.same_everywhere(3) == 3
        assert distributed.on_first_rank(lambda: "result") == "result"
        with distributed.side_group(timedelta(seconds=1)) as group:
            assert group is None
    with pytest.raises(ValueError, match="as it is"):
        distributed.on_first_rank(fails)


def fails() -> None:
    raise ValueError("as it is")


def test_torchrun_makes_a_group_that_ends_with_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two processes are announced; the group itself is the subject of other tests.
    made: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", made.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: made.append("end"))
    with distributed.session():
        assert made == ["gloo"]
    assert made == ["gloo", "end"]
    with pytest.raises(KeyError), distributed.session():
        raise KeyError
    assert made == ["gloo", "end", "gloo"], "closing a group after an error may wait for ranks that are stuck"


def test_each_rank_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert distributed.device() == torch.device("cuda", int(local))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 3 .* has 2 GPUs: .* --nproc-per-node 2"):
        distributed.device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.device() == torch.device("cpu")


RANK = """
import sys, time
from mull.runtime.distributed import session
with session():
    print("started", flush=True)
    time.sleep(60)
"""
LAUNCHER = f"""
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", {RANK!r}])
print(rank.pid, flush=True)
rank.wait()
"""


@pytest.mark.parametrize("elastic", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["torchrun", "by hand"])
def test_a_rank_ends_when_its_torchrun_is_killed(monkeypatch: pytest.MonkeyPatch, elastic: bool) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    if elastic:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    command = [sys.executable, "-W", "ignore", "-c", LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        assert launcher.stdout.readline() == "started\n"
        launcher.kill()
        launcher.wait()
        try:
            deadline = time.monotonic() + (20 if elastic else 2)
            while alive(pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert alive(pid) is not elastic
        finally:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_state_of_one_process_is_unchanged() -> None:
    module = nn.Linear(2, 3)
    state = distributed.full_state_dict(module)
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
