"""Claim: what is special about S3 (lost connections, missing buckets, price of a request) is handled.

What S3 has in common with a local disk is in test_checkpoint.py.
"""

from collections.abc import Iterator
from contextlib import closing

import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer

from mull.runtime import storage
from mull.runtime.checkpoint import CheckpointWriter, checkpoints, latest, load_checkpoint

pytest_plugins = ["s3_server"]


@pytest.fixture
def failing(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    """A second server with the same content, which a test may stop."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    yield server
    s3fs.S3FileSystem.clear_instance_cache()


def tensors(value: float, count: int = 4) -> dict[str, torch.Tensor]:
    return {f"w{number}": torch.full((1000,), value) for number in range(count)}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_lost_connection_is_reported_and_the_previous_checkpoint_stays(
    bucket: str, failing: ThreadedMotoServer, s3: str, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
):
    with closing(CheckpointWriter(bucket, 1, asynchronous)) as writer:
        writer.save(1, tensors(1.0), {}, {})
        writer.poll()
        while latest(bucket) is None:
            pass
        failing.stop()
        message = (
            rf"step 2 could not be written to {bucket}: .*could not be reached.*not touched.*restore the connection"
        )
        if asynchronous:
            writer.save(2, tensors(2.0), {}, {})
        with pytest.raises(RuntimeError, match=message):
            writer.save(2 + asynchronous, tensors(3.0), {}, {})
    with pytest.raises(OSError, match="could not be reached"):
        latest(bucket)
    with pytest.raises(OSError, match="could not be reached"):
        load_checkpoint(f"{bucket}/step-000001", tensors(0.0), {})
    with pytest.raises(OSError, match="could not be reached"):
        CheckpointWriter(bucket, 1, asynchronous)

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    s3fs.S3FileSystem.clear_instance_cache()
    assert checkpoints(bucket) == [f"{bucket}/step-000001"]
    into = tensors(0.0)
    load_checkpoint(f"{bucket}/step-000001", into, {})
    assert torch.equal(into["w0"], tensors(1.0)["w0"])


def test_a_missing_bucket_is_said_before_training_and_not_made(s3: str):
    with pytest.raises(FileNotFoundError, match="there is no bucket no-such-bucket. Make it, or correct the URL"):
        CheckpointWriter("s3://no-such-bucket/run", 1, True)
    with pytest.raises(FileNotFoundError, match="there is no bucket"):
        storage.make_folder("s3://no-such-bucket/run")


def test_a_checkpoint_of_many_tensors_is_read_once_and_in_few_requests(bucket: str, monkeypatch: pytest.MonkeyPatch):
    with closing(CheckpointWriter(bucket, 1, False)) as writer:
        writer.save(1, dict(reversed(tensors(1.0, 200).items())), {}, {})
    size = sum(file["size"] for file in s3fs.S3FileSystem(use_listings_cache=False).ls(latest(bucket), detail=True))
    fetched = []
    real = s3fs.core._fetch_range

    def counting(fs: object, *args: object, **kwargs: object) -> bytes:
        data = real(fs, *args, **kwargs)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(s3fs.core, "_fetch_range", counting)
    # Small blocks stand for a large checkpoint: a block then holds few of its tensors.
    monkeypatch.setattr(s3fs.S3FileSystem, "default_block_size", 2**16)
    s3fs.S3FileSystem.clear_instance_cache()
    into = tensors(0.0, 200)
    load_checkpoint(latest(bucket), into, {})
    s3fs.S3FileSystem.clear_instance_cache()
    assert all(torch.equal(tensor, torch.ones(1000)) for tensor in into.values())
    assert sum(fetched) <= 1.1 * size
    assert len(fetched) <= size / 2**16 + 5
