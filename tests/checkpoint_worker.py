"""Processes that write and read checkpoints, for tests: ``python checkpoint_worker.py <task> <rank> <ranks> <store> <url>``.

The state is a small model under FSDP2 with AdamW and Muon, every tensor filled with numbers that follow from its name. No
number of ranks divides its sizes, and one parameter has fewer rows than there are ranks.
"""

import sys
import threading
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mull.runtime import checkpoint as module
from mull.runtime.checkpoint import CheckpointWriter, checkpoints, load_checkpoint, stored_tensors
from mull.training.state import rng_tensors, training_tensors

CONFIGURATION = {"train.peak_lr": 1e-3}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.hidden = nn.Linear(5, 3)
        self.single = nn.Linear(5, 1)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def build(sharded: bool) -> dict[str, Tensor]:
    model = Tiny()
    if sharded:
        fully_shard(model)
    matrices = [model.hidden.weight]
    rest = [parameter for parameter in model.parameters() if parameter is not model.hidden.weight]
    return training_tensors(model, [torch.optim.Muon(matrices), torch.optim.AdamW(rest, fused=True)])


def content(name: str, like: Tensor) -> Tensor:
    """The whole tensor of this name."""
    numbers = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randint(-(10**6), 10**6, like.shape, generator=numbers).to(like.dtype)


def fill(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        full = content(name, tensor)
        sharded = isinstance(tensor, DTensor)
        tensor.copy_(distribute_tensor(full, tensor.device_mesh, tensor.placements) if sharded else full)


def wrong(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors with another content than they should have."""
    return [
        name
        for name, tensor in tensors.items()
        if not torch.equal(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, content(name, tensor))
    ]


def save(rank: int, ranks: int, url: str) -> None:
    """Write while the training communicates, slowly on rank 0."""
    tensors = build(ranks > 1)
    expected = rng_tensors(rank)
    writer = CheckpointWriter(url, keep_last=2, asynchronous=True)
    real = module._Writer.write_data

    def slow(self: module._Writer, *arguments: object) -> object:
        time.sleep(0.5 if rank == 0 else 0)
        return real(self, *arguments)

    module._Writer.write_data = slow
    for step in (1, 2):
        fill(tensors)
        writer.save(step, tensors | expected, {"step": step, "ranks": ranks}, CONFIGURATION)
        for tensor in tensors.values():
            tensor.zero_()  # what is written is a copy
        for number in range(50):
            writer.poll()
            if ranks > 1:
                total = torch.tensor(float(number + rank))
                dist.all_reduce(total)
                assert total == ranks * number + sum(range(ranks))
    writer.close()
    assert [Path(path).name for path in checkpoints(url)] == ["step-000001", "step-000002"]


def load(rank: int, ranks: int, url: str) -> None:
    tensors = build(ranks > 1)
    newest = checkpoints(url)[-1]
    values = load_checkpoint(newest, tensors, CONFIGURATION)
    assert values["step"] == 2
    assert wrong(tensors) == []
    names = stored_tensors(newest)
    assert {f"rng.{stored}.torch" in names for stored in range(values["ranks"])} == {True}
    assert f"rng.{values['ranks']}.torch" not in names
    if rank < values["ranks"]:
        load_checkpoint(newest, rng_tensors(rank), CONFIGURATION)


def fail(rank: int, ranks: int, url: str) -> None:
    """The last rank's disk is full: every rank raises, in the same step, and the previous checkpoint stays."""
    tensors = build(ranks > 1)
    fill(tensors)
    writer = CheckpointWriter(url, keep_last=1, asynchronous=True)
    writer.save(1, tensors, {}, CONFIGURATION)
    writer.close()
    writer = CheckpointWriter(url, keep_last=1, asynchronous=True)
    if rank == ranks - 1:

        def full(*_: object) -> None:
            time.sleep(0.3)
            raise OSError(28, "No space left on device")

        module._Writer.write_data = full
    writer.save(2, tensors, {}, CONFIGURATION)
    failure, steps = "", 0
    while not failure:
        steps += 1
        time.sleep(0.01 * rank)
        try:
            writer.poll()
        except RuntimeError as error:
            failure = str(error)
    assert f"rank {ranks - 1}: [Errno 28] No space left on device. The previous one, step-000001, is intact" in failure
    everyones: list[int] = [0] * ranks
    dist.all_gather_object(everyones, steps)
    assert len(set(everyones)) == 1, everyones
    writer.close()
    assert [Path(path).name for path in checkpoints(url)] == ["step-000001"]


def interrupted(_rank: int, _ranks: int, url: str) -> None:
    """Stop for ever in the middle of the second checkpoint, and say so: the test kills this process."""

    def half(self: module._Writer, *arguments: object) -> object:
        result = super(module._Writer, self).write_data(*arguments)
        if self.path.endswith("step-000002"):
            print("half-written", flush=True)
            threading.Event().wait()
        return result

    module._Writer.write_data = half
    tensors = build(sharded=False)
    fill(tensors)
    writer = CheckpointWriter(url, keep_last=1, asynchronous=True)
    writer.save(1, tensors, {"step": 1}, CONFIGURATION)
    for name in tensors:
        tensors[name].zero_()
    writer.save(2, tensors, {"step": 2}, CONFIGURATION)


def main() -> None:
    task, rank, ranks, store, url = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for name, where in zip(task.split(","), url.split(","), strict=True):
        {"save": save, "load": load, "fail": fail, "interrupted": interrupted}[name](rank, ranks, where)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
