"""Claim: the files of a checkpoint are data. None of them runs code or leads out of the folder, and each changed bit is noticed.

On a local disk and in S3.
"""

import copyreg
import json
import pickle
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from mull.runtime import storage
from mull.runtime.checkpoint import MARKER, CheckpointWriter, load_checkpoint, stored_tensors
from mull.runtime.shards import DIGEST, read_metadata

pytest_plugins = ["s3_server"]

FILES = (".metadata", "__0_0.distcp", MARKER)
RUN = {"train.peak_lr": 1e-3}
TENSORS = {"w": torch.arange(6.0).view(2, 3), "half": torch.ones(5).bfloat16(), "counts": torch.tensor([3, 4])}


@pytest.fixture(params=["local", "s3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a checkpoint."""
    return save(str(tmp_path / "run") if request.param == "local" else f"{request.getfixturevalue('bucket')}/run")


@pytest.fixture
def local(tmp_path: Path) -> str:
    return save(str(tmp_path / "run"))


def save(url: str) -> str:
    with closing(CheckpointWriter(url, None, False)) as writer:
        writer.save(1, TENSORS, {"step": 1, "ratio": 0.1, "nan": float("nan")}, RUN)
    return storage.join(url, "step-000001")


def load(checkpoint: str) -> dict[str, torch.Tensor]:
    into = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    assert load_checkpoint(checkpoint, into, RUN)["ratio"] == 0.1
    return into


def same(tensors: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def read(checkpoint: str, name: str) -> bytes:
    return storage.read_bytes(storage.join(checkpoint, name))


def write(checkpoint: str, name: str, content: bytes) -> None:
    file = storage.join(checkpoint, name)
    storage.filesystem(file).pipe_file(file, content)


def change_metadata(checkpoint: str, change: Callable[[Metadata], Any]) -> None:
    """Change the metadata as somebody who knows of digests: the marker gets the new one, or none as in earlier versions."""
    metadata = pickle.loads(read(checkpoint, ".metadata"))
    write(checkpoint, ".metadata", pickle.dumps(change(metadata) or metadata))
    marker = json.loads(read(checkpoint, MARKER))
    write(checkpoint, MARKER, json.dumps({k: v for k, v in marker.items() if k not in ("digest", "digests")}).encode())


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_in_a_checkpoint_runs(checkpoint, tmp_path):
    witness = tmp_path / "ran"
    for place in ("planner_data", "storage_meta", "version"):
        change_metadata(checkpoint, lambda metadata, place=place: setattr(metadata, place, Runs(witness)))
        pickle.loads(read(checkpoint, ".metadata"))
        assert witness.exists(), "the trap works"
        witness.unlink()
        for call in (load, stored_tensors):
            with pytest.raises(RuntimeError, match=r"step-000001 is damaged \(\.metadata: it refers to pathlib"):
                call(checkpoint)
        assert not witness.exists()


@pytest.mark.parametrize(
    "reference",
    [
        b"cposix\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch\nSize.__class__\n.",
        b"ctorch.distributed.checkpoint.metadata\nos\n.",
        b"ctorch.serialization\nos\n.",
        b"\x82\x01.",
        b"N.",
        b"]q\x00.",
    ],
)
def test_what_is_no_description_of_tensors_is_refused(local, reference):
    copyreg.add_extension("posix", "system", 1)
    try:
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            read_metadata(reference)
    finally:
        copyreg.remove_extension("posix", "system", 1)
    write(local, ".metadata", reference)
    with pytest.raises(RuntimeError, match=r"step-000001 is damaged \(\.metadata: "):
        load(local)


@pytest.mark.parametrize(
    "path", ["../elsewhere.distcp", "/etc/passwd", "a/__0_0.distcp", "checkpoint.json", "", None, 3]
)
def test_a_path_that_leaves_the_folder_is_refused(checkpoint, path):
    def lead_out(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = path

    change_metadata(checkpoint, lead_out)
    with pytest.raises(RuntimeError, match=r"step-000001 is damaged \(\.metadata: "):
        load(checkpoint)


@pytest.mark.parametrize(
    "place", [("offset", -1), ("offset", "x"), ("length", 2**62), ("length", 3), ("offset", 2**62)]
)
def test_a_place_that_does_not_exist_is_refused(local, place):
    def misplace(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            setattr(info, *place)

    change_metadata(local, misplace)
    with pytest.raises(RuntimeError, match=r"step-000001 is damaged \((\.metadata|__0_0.distcp): "):
        load(local)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_wherever_it_is(checkpoint, name):
    whole, numbers = read(checkpoint, name), random.Random(0)
    for place in range(0, len(whole), 11 if checkpoint.startswith("/") else len(whole) // 6):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << numbers.randrange(8)
        write(checkpoint, name, bytes(flipped))
        refused = ""
        try:
            assert same(load(checkpoint))
        except (RuntimeError, ValueError) as error:
            refused = str(error)
        if refused:
            assert name in refused or "has format" in refused
        else:
            assert name == MARKER, "only white space and names of digests may change unnoticed"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"{}", b"[1]", b"null", "half", "foreign"], ids=str)
@pytest.mark.latin(3, "name", "content")
def test_an_empty_truncated_or_foreign_file_is_named(checkpoint, tmp_path, name, content):
    if content == "half":
        content = read(checkpoint, name)[: len(read(checkpoint, name)) // 2]
    if content == "foreign":
        with closing(CheckpointWriter(str(tmp_path / "other"), None, False)) as writer:
            writer.save(1, {key: value + 1 for key, value in TENSORS.items()}, {"step": 1, "ratio": 0.2}, {})
        content = read(str(tmp_path / "other" / "step-000001"), name)
        if name == MARKER:
            content = content.replace(b"0.2", b"0.3")  # a whole one is refused by its settings
    write(checkpoint, name, content)
    with pytest.raises(RuntimeError, match=rf"step-000001 is damaged \({name}: .*Remove the folder to resume") as error:
        load(checkpoint)
    assert "\n" not in str(error.value)


def test_the_first_wrong_byte_is_found_before_it_is_used(local):
    shard = bytearray(read(local, "__0_0.distcp"))
    shard[len(shard) // 2] ^= 1
    write(local, "__0_0.distcp", bytes(shard))
    with pytest.raises(RuntimeError, match=r"__0_0\.distcp: its content has changed since it was written"):
        load(local)


def test_checkpoints_of_earlier_versions_have_no_digests_and_load(checkpoint):
    def forget(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            delattr(info, DIGEST)

    change_metadata(checkpoint, forget)
    assert b"digest" not in read(checkpoint, MARKER) + read(checkpoint, ".metadata")
    assert same(load(checkpoint))
    write(checkpoint, "__0_0.distcp", read(checkpoint, "__0_0.distcp")[:-700])
    with pytest.raises(RuntimeError, match=r"step-000001 is damaged \(__0_0.distcp: "):
        load(checkpoint)
