"""Digests of what decides a run's result besides its settings: rows of data, tokenizer, frozen models.

A checkpoint stores them, and a resumed run must have the same. Where the content comes from may change.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mull.data.sampler import ShuffledBatches

ROWS_AT_ONCE = 4096


def batches_content(batches: ShuffledBatches) -> dict[str, Any]:
    """The rows that batches are drawn from, as a digest, and how they are drawn."""
    dataset = batches.dataset
    starts = range(0, len(dataset), ROWS_AT_ONCE)
    ends = (min(start + ROWS_AT_ONCE, len(dataset)) for start in starts)
    # On the CPU also where a model without weights is being built, on the meta device.
    numbers = (torch.arange(*part, device="cpu") for part in zip(starts, ends, strict=True))
    chunks = map(dataset.rows, numbers)
    rows = tensors_digest(pair for chunk in chunks for pair in sorted(chunk.items()))
    return {"rows": rows, "batch_size": batches.batch_size, "seed": batches.seed}


def module_digest(module: nn.Module) -> str:
    """Digest of the weights and buffers of a module by name."""
    return tensors_digest(sorted(module.state_dict().items()))


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256, in hexadecimal, of files with their names, in the order of the names."""
    found = hashlib.sha256()
    for file in sorted(files, key=lambda path: path.name):
        with file.open("rb") as stream:
            found.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of how a tokenizer turns text into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for setting in ("padding", "truncation"):  # of the last call
        content.pop(setting, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, in hexadecimal, of names, types, shapes and values in the given order."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes, because numpy has no bf16.
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
