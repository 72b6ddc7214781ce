"""Ranks: how many there are, what they agree on, and how they share a model. With one process every function is the identity.

Every process group is made here, by `session` and `side_group`, and nothing else in mull asks how many devices there are.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

T = TypeVar("T")


class DistributedConfig(BaseModel):
    """How several ranks share the weights. Has no effect with one process."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    reshard_after_forward: bool = True
    """Free a decoder layer's gathered weights after each visit and gather them again for the next one and for the backward pass.
    ``False`` keeps them until the backward pass: faster, since a layer that is visited k times is gathered once instead of k
    times, but the whole model is in memory."""

    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` gathers the weights in bf16, which halves the traffic, and computes in it. Each rank keeps its shard and the
    optimizer's state in the weights' own type, and gradients are summed over ranks in fp32. ``fp32`` gathers the weights in the
    type they have; ``train.precision`` sets the precision of the computation, as on one device."""


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Join the processes that ``torchrun`` started into one group, and close it at the end. Without torchrun, do nothing.

    Where there are GPUs, rank r of a machine uses GPU r. After an error the group is not closed, because that could wait for
    ranks that are stuck; this process should then end, and torchrun ends the others.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()


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


def same_everywhere(value: int) -> int:
    """The value of rank 0, on every rank."""
    if world_size() == 1:
        return value
    shared = torch.tensor(value)
    dist.broadcast(shared, src=0)
    return int(shared)


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


def shard(root: nn.Module, units: Iterable[nn.Module], methods: Sequence[str], config: DistributedConfig) -> None:
    """Share the weights of a module among the ranks, in place (FSDP2), starting from the values of rank 0.

    Afterwards parameters are `DTensor`, sharded along their first dimension. Inside ``forward`` and `methods` of `root` they are
    whole; those of a unit, while the unit runs.

    Args:
        root: Its parameters outside of `units`, including tied ones, are gathered for the whole of a call.
        units: Submodules that are gathered one by one, such as decoder layers. A unit may run several times in a call.
        methods: Names of the methods of `root`, other than ``forward``, that use its parameters.
        config: When units are freed, and the type they are gathered in.

    Raises:
        ValueError: the trained weights have several types.
    """
    parameters = list(root.parameters())
    dtypes = {parameter.dtype for parameter in parameters if parameter.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"The weights to train have the types {', '.join(sorted(map(str, dtypes)))}, but ranks can share weights of "
            "one type only: convert the model, for instance with model.float()."
        )
    for tensor in (*parameters, *root.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(parameters[0].device.type, (world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.param_dtype == "bf16" else None,
        reduce_dtype=torch.promote_types(parameters[0].dtype, torch.float32),
        cast_forward_inputs=False,  # rewards and other inputs that are numbers keep their precision
    )
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=config.reshard_after_forward, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(root, method)


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
