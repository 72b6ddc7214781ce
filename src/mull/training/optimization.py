"""How a gradient becomes an update: optimizers, learning-rate schedule, precision, and the peak of a device."""

import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mull.runtime.arguments import Frozen
from mull.runtime.distributed import whole
from mull.runtime.timing import measured_peak

Precision = Literal["fp32", "bf16"]

PEAK_BF16_FLOPS = {
    r"GB200": 2500e12,
    r"B200": 2250e12,
    r"H200 NVL": 835e12,
    r"H200|GH200": 989e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H100": 989e12,
    r"A100\S*": 312e12,
    r"L40S": 362e12,
    r"RTX 4090$": 165e12,
}
"""Dense bf16 peak of GPUs in FLOP per second, without sparsity, from NVIDIA's data sheets, by a pattern for the device's name."""


MAX_LR = 100.0
"""Above it a learning rate, or a decay per unit of it, is a slip of the pen."""

Average = Annotated[float, Field(ge=0, lt=1)]


class OptimizationConfig(Frozen):
    """Optimizer, schedule and precision."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon`` trains the two-dimensional hidden matrices of the model with Muon, and everything else with AdamW: embeddings,
    unembedding, norms, biases, convolutions, and what an objective trains beside the model."""

    peak_lr: float = Field(default=3e-4, gt=0, le=MAX_LR)
    """Learning rate of AdamW after warm-up."""

    muon_lr: float = Field(default=0.02, gt=0, le=MAX_LR)
    """Learning rate of Muon after warm-up. Its updates are orthogonal matrices times ``sqrt(max(1, rows / columns))``."""

    weight_decay: float = Field(default=0.1, ge=0, le=MAX_LR)
    """Decoupled weight decay, per unit of learning rate. Embeddings, norms and biases do not decay."""

    betas: tuple[Average, Average] = (0.9, 0.95)
    """Decay of AdamW's two moving averages."""

    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient, in nats per unit of target weight; ``None`` does not clip."""

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after warm-up: half a cosine; warm-up, stable, linear decay; or constant."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0. It multiplies the schedule, which starts at step 0."""

    decay_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the run in which ``wsd`` decays; only ``wsd`` reads it."""

    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate of ``cosine`` and ``wsd``, as a fraction of the peak."""

    precision: Literal["fp32", "bf16", "auto"] = "auto"
    """``bf16`` runs the loss under autocast; the weights keep their type. ``auto`` is bf16 on devices that compute it natively
    (CUDA; CPUs with AVX512-BF16 or AMX), otherwise fp32."""


def learning_rate_factor(config: OptimizationConfig, step: int, share: float) -> float:
    """Fraction of the peak learning rate after `step` optimizer steps, when this `share` of the run is done."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = {
        "constant": 0.0,
        "cosine": (1 - math.cos(math.pi * min(share, 1.0))) / 2,
        "wsd": min(max(0.0, (share - 1 + config.decay_share) / config.decay_share), 1.0),
    }[config.schedule]
    return warmup * (1 - decay * (1 - config.final_lr_fraction))


class Muon(torch.optim.Muon):
    """Muon whose matrices may be sharded over ranks; without shards it is torch's.

    Orthogonalisation needs the whole matrix. So matrices are updated one after the other: the matrix, its gradient and its
    momentum are gathered, every rank computes the update as one device would, bit for bit, and keeps its shard. The work is not
    divided.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "part of the signature of optimizers; not supported"
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    self._step_one(group, parameter)
        finally:
            self.param_groups = groups

    def _step_one(self, group: dict[str, Any], parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if not isinstance(parameter, DTensor):
            self.param_groups = [{**group, "params": [parameter]}]
            super().step()
            return
        matrix, momentum = parameter.full_tensor(), self.state[parameter].get("momentum_buffer")
        matrix.grad = whole(parameter.grad)
        self.state[matrix] = {} if momentum is None else {"momentum_buffer": momentum.full_tensor()}
        self.param_groups = [{**group, "params": [matrix]}]
        super().step()
        mesh, placements = parameter.device_mesh, parameter.placements
        shard = functools.partial(distribute_tensor, device_mesh=mesh, placements=placements, src_data_rank=None)
        parameter.copy_(shard(matrix))
        self.state[parameter] = {name: shard(tensor) for name, tensor in self.state.pop(matrix).items()}


def build_optimizers(
    model: nn.Module, config: OptimizationConfig, companion: nn.Module | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the hidden matrices of the model and AdamW for the rest, over what requires a gradient.

    Embeddings are the weights of `nn.Embedding` and whatever is tied to them; the model's unembedding is called ``lm_head``.
    Weight decay applies to all parameters of two or more dimensions except embeddings. Each group keeps its learning rate after
    warm-up as ``peak_lr``.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    everything = nn.ModuleList([model] if companion is None else [model, companion])  # yields a shared parameter once
    trainable = [p for p in everything.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("No parameter of the model requires a gradient: unfreeze some before training.")
    embeddings = {id(part.weight) for part in everything.modules() if isinstance(part, nn.Embedding)}
    unembedding = id(getattr(getattr(model, "lm_head", None), "weight", None))
    beside = {id(p) for p in companion.parameters()} if companion is not None else set()
    decayed = {id(p) for p in trainable if p.ndim >= 2} - embeddings
    matrices = {id(p) for p in trainable if p.ndim == 2} - embeddings - {unembedding} - beside
    hidden = matrices if config.optimizer == "muon" else set()

    by_muon = [p for p in trainable if id(p) in hidden]
    by_adamw = [p for p in trainable if id(p) not in hidden]
    groups = [
        {"params": [p for p in by_adamw if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in by_adamw if id(p) not in decayed], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if by_muon:
        optimizers.append(Muon(by_muon, lr=config.muon_lr, weight_decay=config.weight_decay))
    if groups := [group for group in groups if group["params"]]:
        # The default loop over parameters is several times slower on a CPU.
        optimizers.append(torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def update(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Step every optimizer at this fraction of its peak learning rate, and drop the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of the whole gradient, a scalar; over all shards where parameters are sharded, equal on every rank."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def resolve_precision(precision: Literal["fp32", "bf16", "auto"], device: torch.device) -> Precision:
    """Replace ``auto`` by what the device computes natively: emulated bf16 is slower than fp32."""
    if precision != "auto":
        return precision
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return "bf16" if native else "fp32"


@functools.cache
def peak_flops(device: torch.device, precision: Precision) -> float:
    """Peak of a device in FLOP per second, the denominator of the model FLOPs utilisation (MFU).

    For common NVIDIA GPUs in bf16 this is the dense peak of the data sheet. Otherwise it is measured once per process, as the
    best of five products of large matrices. A device reaches this in practice, so an MFU against it is higher than one against
    a data sheet.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and precision == "bf16" else ""
    return published_peak(name) or measured_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def published_peak(name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP per second, by its name. None if it is not listed, or is a slice of a GPU (MIG)."""
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b(?:{pattern})(?!\S)", name)), None)
