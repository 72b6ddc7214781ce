"""Ranks: how many there are, and what they exchange. With one process every function is the identity.

Every process group is made here, by `session` and `side_group`, and nothing else in mull asks how many devices there are.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

T = TypeVar("T")

WATCH_SECONDS = 0.5
"""How often a rank looks whether its launcher is alive."""


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Join the processes that ``torchrun`` started into one group, and close it at the end. Without torchrun, do nothing.

    Where there are GPUs, rank r of a machine uses GPU r. After an error the group is not closed, because that could wait for
    ranks that are stuck; this process should then end, and torchrun ends the others. A rank also ends when its torchrun does,
    even if that was killed: otherwise it would go on writing beside the run that is started next.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Not `PR_SET_PDEATHSIG`, which follows the thread that started this process instead of the launcher.
        threading.Thread(target=_end_with, args=(os.getppid(),), name="launcher", daemon=True).start()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    # With gloo beside NCCL, numbers on the CPU can be exchanged, too.
    dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()


def _end_with(launcher: int) -> None:
    """Wait until this process has another parent than its launcher, and end it."""
    while os.getppid() == launcher:
        time.sleep(WATCH_SECONDS)
    logger.error("The launcher (process %d) has ended, so process %d ends, too.", launcher, os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def side_group(patience: timedelta) -> Iterator[dist.ProcessGroup | None]:
    """A second group of all ranks, for CPU tensors that another thread, or at another pace, exchanges beside the training.

    Like that of `session`, the group is not closed after an error. One process needs none and gets None.

    Args:
        patience: How long a rank waits for the others.
    """
    if world_size() == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=patience)
    yield group
    if dist.is_initialized():  # otherwise the session has ended before, and this group with it
        dist.destroy_process_group(group)


def device() -> torch.device:
    """The device of this rank: a GPU of its own if this machine has any, otherwise the CPU.

    Raises:
        ValueError: this machine has fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, available = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= available:
        raise ValueError(
            f"This is process {local + 1} of the run on this machine, which has {available} GPUs: start at most one per GPU with "
            f"torchrun --nproc-per-node {available}."
        )
    return torch.device("cuda", local)


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def global_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum a tensor over the ranks, on every rank; a new tensor. Shapes must be equal."""
    total = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(total, group=group)
    return total


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks in order, on every rank. Shapes must be equal."""
    if world_size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered


def gather_objects(value: T) -> list[T]:
    """The values of all ranks in order, on every rank. They must be picklable."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def on_first_rank(call: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call a function on rank 0 only; every rank returns its result, which must be picklable, or raises its error."""
    if world_size() == 1:
        return call()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = call()
        except (OSError, ValueError, RuntimeError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def same_everywhere(value: int) -> int:
    """The value of rank 0, on every rank."""
    return on_first_rank(lambda: value)


def shares_weights(module: nn.Module) -> bool:
    """Whether ranks hold parts of its weights (FSDP2) and gather them unit by unit, so that all must run equally many units."""
    return any(isinstance(unit, FSDPModule) for unit in module.modules())


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor. If it is sharded, all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The unsharded state of a module on the CPU of rank 0; empty on the others, which must call this too."""
    state = {}
    # Tensor by tensor, so that a device has room for one more of them only.
    for name, tensor in module.state_dict().items():
        full = whole(tensor)
        if rank() == 0:
            state[name] = full.cpu()
    return state
