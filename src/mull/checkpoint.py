"""Save and resume a run on a local disk.

A checkpoint is a directory ``step-000123`` with ``state.pt`` (tensors and plain values, readable by
``torch.load(weights_only=True)``) and ``configuration.json`` (the settings of the run). It is written under another name and
renamed when complete, so a directory that carries the final name is whole.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

STATE = "state.pt"
CONFIGURATION = "configuration.json"
PARTIAL = ".partial"
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    directory: Path, step: int, state: Mapping[str, Any], configuration: Mapping[str, Any], keep_last: int | None = None
) -> Path:
    """Write ``directory/step-<step>`` atomically and remove the oldest checkpoints.

    Files and directories are flushed to the disk before the rename. A checkpoint of the same step is left as it is.

    Args:
        directory: Directory of the run's checkpoints; created when missing.
        step: Optimizer steps done.
        state: Tensors, containers and plain values that ``torch.load(weights_only=True)`` accepts.
        configuration: Settings of the run as flat JSON values; `load_checkpoint` compares them.
        keep_last: How many checkpoints stay, the new one included; ``None`` keeps all.

    Returns:
        Path of the checkpoint.

    Raises:
        RuntimeError: the disk is full or otherwise refuses; earlier checkpoints are untouched.
    """
    final = directory / f"step-{step:06d}"
    if _complete(final):
        return final
    temporary = directory / (final.name + PARTIAL)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(temporary, state, configuration)
        temporary.rename(final)
        _fsync_directory(directory)
    # torch reports a failed write to a zip archive as RuntimeError.
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        previous = latest(directory)
        raise RuntimeError(
            f"The checkpoint of step {step} could not be written to {directory}: {_root_cause(error)}. "
            f"{f'The previous one, {previous.name}, is intact' if previous else 'There is no earlier one'}. "
            "Make room on the disk and resume the run."
        ) from error
    if keep_last is not None:
        for old in checkpoints(directory)[:-keep_last]:
            shutil.rmtree(old)
    return final


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; none when the directory does not exist."""
    if not directory.is_dir():
        return []
    numbered = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered) if _complete(path)]


def latest(directory: Path) -> Path | None:
    """Newest complete checkpoint of a run; half-written ones do not count."""
    found = checkpoints(directory)
    return found[-1] if found else None


def load_checkpoint(path: Path, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Read the state of a checkpoint, on the CPU, after checking that it belongs to this run.

    Args:
        path: A checkpoint directory, e.g. from `latest`.
        configuration: Settings of the run that resumes.

    Raises:
        FileNotFoundError: `path` is not a complete checkpoint.
        ValueError: the checkpoint was written with other settings; names each one with both values.
    """
    if not _complete(path):
        raise FileNotFoundError(f"{path} is not a complete checkpoint: it must hold {STATE} and {CONFIGURATION}.")
    stored = json.loads((path / CONFIGURATION).read_text(encoding="utf-8"))
    given = json.loads(json.dumps(configuration))
    differing = sorted(name for name in stored.keys() | given.keys() if stored.get(name) != given.get(name))
    if differing:
        listed = "; ".join(f"{name}: {stored.get(name)!r} stored, {given.get(name)!r} given" for name in differing)
        raise ValueError(
            f"{path} belongs to a run with another configuration ({listed}). "
            "Resume with the stored settings, or start a new run in another directory."
        )
    state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return state


def rng_state() -> dict[str, Any]:
    """States of the global random generators of torch (CPU and CUDA), numpy and Python."""
    kind, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (
            str(kind),
            torch.from_numpy(np.asarray(keys).copy()),
            int(position),
            int(has_gauss),
            float(cached_gaussian),
        ),
        "python": random.getstate(),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore `rng_state`. CUDA generators are restored when this machine has as many devices."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    random.setstate(state["python"])


def _complete(path: Path) -> bool:
    return (path / STATE).is_file() and (path / CONFIGURATION).is_file()


def _write(directory: Path, state: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()
    with (directory / STATE).open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    with (directory / CONFIGURATION).open("w", encoding="utf-8") as text:
        json.dump(dict(configuration), text, indent=2, sort_keys=True)
        text.flush()
        os.fsync(text.fileno())
    _fsync_directory(directory)


def _fsync_directory(directory: Path) -> None:
    """Make the directory's entries durable; a rename alone may be lost in a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _root_cause(error: BaseException) -> BaseException:
    """The first OSError behind an error; torch wraps it in one about its archive."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error
