"""Claim: a run whose process is killed at an arbitrary moment and then resumed ends with the same bits as one that was not.

The whole command is killed (SIGKILL), not a function: whatever is half-written stays as it is. The run has what can go wrong:
a weighting with a memory, heads, sampled iterations, Muon, and checkpoints that are written in the background.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipes import changed, content
from safetensors.torch import load_file

from mull.app.recipe import parse_recipe
from mull.app.run import run_recipe
from mull.runtime.checkpoint import checkpoints

pytest_plugins = ["s3_server"]

STEPS = 60


def recipe(folder: Path, name: str, url: str) -> dict[str, Any]:
    return changed(
        content(folder),
        run__name=name,
        model__mtp={"num_predict_tokens": 2, "mtp_head_type": "mlp"},
        train__steps=STEPS,
        train__algo="gradient-wmtp",
        train__optimizer="muon",
        gradient={"mode": "norm"},
        loss__control="shuffled",
        checkpoint={"every": 3, "url": f"{url}/{name}"},
    )


def kill_in_the_middle(folder: Path, content: dict[str, Any]) -> int:
    """Start the command, kill it when it has logged some steps, and say how many."""
    file = folder / "killed.yaml"
    file.write_text(yaml.safe_dump(content))
    metrics = folder / "killed" / "metrics.jsonl"
    command = [sys.executable, "-W", "ignore", "-m", "mull", "train", str(file)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 17:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return metrics.read_text().count("\n")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "s3"])
def test_killed_and_resumed_equals_uninterrupted(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path / "elsewhere") if place == "local" else request.getfixturevalue("bucket")
    killed = recipe(tmp_path, "killed", url)
    steps = kill_in_the_middle(tmp_path, killed)
    assert 17 <= steps < STEPS, "it was killed before its end"
    assert checkpoints(f"{url}/killed"), "it had something to resume from"

    resumed = run_recipe(parse_recipe(killed), resume=True)
    straight = run_recipe(parse_recipe(recipe(tmp_path, "straight", url)))

    assert (resumed.step, resumed.tokens) == (straight.step, straight.tokens)
    for folder in ("model", "trunk"):
        ours, theirs = (load_file(tmp_path / name / folder / "model.safetensors") for name in ("killed", "straight"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("killed", "straight")
    ]
    clock = {"seconds", "tokens_per_second", "mfu"}
    assert [{k: v for k, v in record.items() if k not in clock} for record in logs[0]] == [
        {k: v for k, v in record.items() if k not in clock} for record in logs[1]
    ]
