"""What a training run will write: checkpoints, and the models that it exports."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from mull.model.causal_lm import MullForCausalLM
from mull.runtime.checkpoint import CheckpointConfig


class Saving(NamedTuple):
    """What a stage of a run saves."""

    config: CheckpointConfig
    steps: int | None
    """Length of the stage; None with a time budget."""

    optimizer: int
    """Bytes of the optimizer state, of all ranks."""

    @property
    def n_kept(self) -> int | None:
        """Checkpoints that are there at the end, at most; None if that depends on the time they take."""
        every, keep = self.config.every, self.config.keep_last
        made = 1 if every is None else None if self.steps is None else -(-self.steps // every)
        return keep if made is None else min(made, keep or made)


def disk_rows(
    model: MullForCausalLM, companion: nn.Module | None, stages: Sequence[Saving]
) -> Iterator[tuple[str, str]]:
    """Names and values to print.

    Args:
        model: On the meta device, or a real one.
        companion: Module that is trained beside the model, and saved with it.
        stages: In the order in which they run.
    """
    heads = () if model.mtp_heads is None else model.mtp_heads.state_dict(keep_vars=True).values()
    trunk = _size(set(model.state_dict(keep_vars=True).values()) - set(heads))
    beside = {} if companion is None else companion.state_dict(keep_vars=True)
    whole = _size({*model.state_dict(keep_vars=True).values(), *beside.values()})
    rows = []
    total = whole + trunk
    for stage in stages:
        size, n_kept = whole + stage.optimizer, stage.n_kept
        rows.append(("  checkpoints", f"{'any number' if n_kept is None else n_kept} of {in_bytes(size)}"))
        total += size * (n_kept or 1)
    yield "disk", f"{in_bytes(total)}, and a checkpoint more while one is written"
    yield from rows
    yield "  model", in_bytes(whole)
    yield "  trunk", in_bytes(trunk)


def in_bytes(size: float) -> str:
    """A number of bytes as text, such as ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.1f} {unit}"


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
