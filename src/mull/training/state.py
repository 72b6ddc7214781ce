"""What the next step depends on, as tensors by name: weights, optimizer state, and random generators."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def training_tensors(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All tensors that training changes, by name: ``model.<name>`` and ``optimizer.<parameter name>.<state name>``.

    They share memory with the module and the optimizers, for saving and for loading. Tied weights appear once, under their first
    name; non-persistent buffers do not appear. Missing optimizer state is made as the optimizer would make it in its next step;
    no weight changes. All ranks must call this.

    Args:
        module: Owner of the parameters, sharded by FSDP2 or not.
        optimizers: `torch.optim.AdamW` and `torch.optim.Muon`, of parameters of `module`.

    Raises:
        ValueError: an optimizer has a parameter that is not in `module`, or is of another class; the module has state other than
            tensors.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} of {type(module).__name__} cannot be saved: it must be a tensor, but is {type(tensor).__name__}."
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"model.{name}"] = tensor.detach()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise ValueError(
                        f"An optimizer has a parameter of shape {tuple(parameter.shape)} that is not in the module to save."
                    )
                if parameter.requires_grad and not optimizer.state.get(parameter):
                    optimizer.state[parameter] = _initial_state(optimizer, group, parameter)
                state = optimizer.state.get(parameter, {})
                tensors |= {f"optimizer.{names[id(parameter)]}.{entry}": tensor for entry, tensor in state.items()}
    return tensors


def first_not_finite(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> str | None:
    """Name of the first tensor with a NaN or an infinity, among weights, buffers and optimizer state.

    Of sharded tensors, this rank's shards are looked at.
    """
    tensors: dict[str, Any] = dict(module.state_dict())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"{entry} of {names[id(parameter)]}": value for entry, value in state.items()}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if isinstance(local, Tensor) and local.is_floating_point() and not bool(local.isfinite().all()):
            return name
    return None


def rng_state() -> dict[str, Tensor]:
    """States of this process's global random generators as tensors on the CPU.

    ``torch`` (CPU), ``cuda`` (the current device, once CUDA is in use), ``numpy`` (624 keys and the position in them), ``python``
    (likewise), and ``gauss``. Gaussian numbers are drawn in pairs; for numpy and for Python, ``gauss`` says whether the second
    of a pair is left over, and its value.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, internal, python_gauss = random.getstate()
    left_over = [float(has_gauss), gauss, float(python_gauss is not None), python_gauss or 0.0]
    state = {"torch": torch.get_rng_state(), "numpy": torch.tensor([*np.asarray(keys).tolist(), position])}
    state |= {"python": torch.tensor(internal), "gauss": torch.tensor(left_over, dtype=torch.float64)}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Restore `rng_state`; the state of CUDA only if there is one and a device for it."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    has_gauss, gauss, python_has_gauss, python_gauss = state["gauss"].tolist()
    *keys, position = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), gauss))
    random.setstate((3, tuple(state["python"].tolist()), python_gauss if python_has_gauss else None))


def rng_tensors(rank: int) -> dict[str, Tensor]:
    """`rng_state` under its names in a checkpoint, ``rng.<rank>.torch`` and so on."""
    return {f"rng.{rank}.{name}": tensor for name, tensor in rng_state().items()}


def set_rng_tensors(tensors: Mapping[str, Tensor], rank: int) -> None:
    """Restore the generators of this process from the tensors of a rank; other entries are ignored."""
    prefix = f"rng.{rank}."
    set_rng_state({name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)})


def _initial_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: nn.Parameter
) -> dict[str, Tensor]:
    """State of a parameter before its first step.

    A step of a twin without gradient makes it, with the names, types and devices of the optimizer itself; AdamW and Muon start
    from zeros. DCP's `get_optimizer_state_dict` makes a parameter's state only if no other has any (pytorch#192202), and leaves
    a step counter of 1.
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.Muon)):
        raise ValueError(f"The state of {type(optimizer).__name__} cannot be saved: use torch.optim.AdamW or Muon.")
    twin = nn.Parameter(torch.zeros_like(parameter))
    twin.grad = torch.zeros_like(twin)
    # Without its iterations, a step of Muon costs no product of matrices.
    maker = type(optimizer)([{**group, "params": [twin], "ns_steps": 0}])
    maker.step()
    return {name: value.zero_() for name, value in maker.state[twin].items()}
