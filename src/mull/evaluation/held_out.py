"""Held-out loss of every head."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mull.data.packing import PackedDataset
from mull.model.causal_lm import MullForCausalLM
from mull.ops.targets import label_positions, targets_of
from mull.runtime.arguments import require, require_count
from mull.runtime.distributed import global_sum, rank, world_size
from mull.runtime.progress import tracked


@torch.no_grad()
def held_out_losses(
    model: MullForCausalLM,
    dataset: PackedDataset,
    iterations: int | None,
    *,
    batch_size: int = 16,
    max_rows: int | None = None,
    n_heads: int | None = None,
) -> dict[str, float]:
    """Mean loss of each head over held-out rows, in nats per target, in the model's own precision.

    With several ranks, every rank must call this. Each evaluates a share of the batches, and all return the same numbers.

    Args:
        model: Stays in training or evaluation mode, whichever it is in.
        dataset: Packed documents.
        iterations: Passes through the think block; None for a model without one.
        batch_size: Rows per forward pass.
        max_rows: Evaluate only the first rows.
        n_heads: Extra heads to evaluate; None for all.

    Returns:
        ``loss`` of the main head, and ``head1_loss``, ``head2_loss``, … of the extra heads. A head without a target in the rows
        is left out.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number below its limit.
    """
    require("model", model, nn.Module, "a model of mull")
    require("dataset", dataset, PackedDataset, "a PackedDataset")
    require_count("batch_size", batch_size, 1)
    if max_rows is not None:
        require_count("max_rows", max_rows, 1)
    if n_heads is not None:
        require_count("n_heads", n_heads, 0)
    if n_heads is None:
        n_heads = 0 if model.mtp_config is None else model.mtp_config.num_predict_tokens
    rows = torch.arange(min(len(dataset), max_rows or len(dataset)))
    batches = [dataset.rows(part) for part in rows.split(batch_size)]
    total = torch.zeros(2, 1 + n_heads, dtype=torch.float64, device=model.device)
    # Ranks that share weights must run the same number of layers, so a rank without a batch in the last round repeats one.
    rounds = range(0, len(batches), world_size())
    for first in tracked(rounds, "batch", "held-out loss", len(rounds)):
        number = first + rank()
        found = _sums(model, batches[min(number, len(batches) - 1)], iterations, n_heads)
        total += found if number < len(batches) else 0 * found
    sums, counts = global_sum(total).tolist()
    names = ["loss", *(f"head{k}_loss" for k in range(1, 1 + n_heads))]
    return {name: loss / count for name, loss, count in zip(names, sums, counts, strict=True) if count}


def held_out_loss(model: MullForCausalLM, dataset: PackedDataset, iterations: int | None, **options: Any) -> float:
    """Mean loss of the main head; see `held_out_losses`, whose `batch_size` and `max_rows` are the options."""
    return held_out_losses(model, dataset, iterations, n_heads=0, **options)["loss"]


def _sums(model: MullForCausalLM, batch: Mapping[str, Tensor], iterations: int | None, n_heads: int) -> Tensor:
    """Summed loss and number of targets of each head, ``[2, H]``."""
    tensors = {name: tensor.to(model.device) for name, tensor in batch.items()}
    position_ids = tensors["position_ids"]
    hidden = model.hidden_states(tensors["input_ids"], position_ids=position_ids, think_iterations=iterations)
    targets = targets_of(tensors["labels"], label_positions(None, position_ids), 1 + n_heads)
    valid = targets >= 0
    _, losses = model.head_losses(hidden, tensors["input_ids"], targets, valid.float(), position_ids=position_ids)
    return torch.stack([losses.double().sum((0, 1)), valid.sum((0, 1)).double()])
