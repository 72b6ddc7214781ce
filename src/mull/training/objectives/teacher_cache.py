"""What a teacher predicts for every row of a dataset, recorded on disk once: its top-k tokens, and a bucket for the rest.

A record is found by the number of its row in the data, so it serves every epoch, order and batch size. A file holds some rows and
appears when it is complete. So a recording that was killed goes on with the rows that it lacks. Each file says whose predictions
it has, and one that is damaged counts as lacking.

Shapes: B rows, T tokens of a row, K kept tokens.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mull.data.sampler import RowDataset
from mull.model.causal_lm import MullForCausalLM
from mull.ops.divergence import Predictor, TopK, top_k
from mull.ops.targets import label_positions, valid_tokens
from mull.runtime.arguments import require
from mull.runtime.distributed import gather_objects, on_first_rank, rank, world_size
from mull.runtime.progress import tracked
from mull.runtime.storage import exclusive, local_path, write_text_atomic
from mull.training.objectives.base import batch_states, evaluating, layout

MANIFEST = "cache.json"
METADATA = "identity"
"""Entry of a file's header that repeats the manifest."""

TOKENS_PER_FILE = 2**18
"""Tokens whose predictions share a file: what a kill can cost."""


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """Whose predictions of what a cache holds, and how much of them."""

    teacher: str
    """Digest of the teacher's files, or its name on the hub with the commit."""

    dtype: str
    """Type of its weights."""

    data: str
    """Digest of the rows."""

    rows: int
    length: int
    """Tokens T of a row."""

    top_k: int
    temperature: float
    n_tokens: int
    """Tokens of the vocabulary that are compared."""


class TeacherCache:
    """A folder with a teacher's predictions. Nothing is written before `record`.

    Args:
        folder: A local folder, which may not exist yet.
        identity: What it has to hold.

    Raises:
        ValueError: the folder holds something else; names it.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: CacheIdentity) -> None:
        require("identity", identity, CacheIdentity, "a CacheIdentity")
        self.folder, self.identity = local_path(folder), identity
        self._per_file = max(TOKENS_PER_FILE // identity.length, 1)
        on_first_rank(self._check)

    def _check(self) -> None:
        """Refuse a folder with predictions of something else, whichever of its files says so."""
        manifest = self.folder / MANIFEST
        if manifest.is_file():
            try:
                stored = json.loads(manifest.read_text(encoding="utf-8"))
            except ValueError:
                stored = None
            if not isinstance(stored, dict):
                raise ValueError(f"{manifest} is damaged: remove {self.folder}, which is recorded again then.")
            self._require_ours(stored)
        for number in self._numbers():
            self._intact(number)

    def _require_ours(self, stored: Mapping[str, Any]) -> None:
        for name, wanted in asdict(self.identity).items():
            if stored.get(name) != wanted:
                raise ValueError(
                    f"{self.folder} holds predictions with another {name}, {stored.get(name)!r} instead of {wanted!r}: choose "
                    "another folder (distill.cache), or remove this one."
                )

    def _intact(self, number: int) -> bool:
        """Whether a file is there and whole.

        Raises:
            ValueError: it holds something else.
        """
        try:
            # Compares the file's size with that of its tensors.
            with safe_open(self._file(number), framework="pt") as stored:
                metadata = stored.metadata() or {}
        except (FileNotFoundError, SafetensorError):
            return False
        self._require_ours(json.loads(metadata.get(METADATA, "{}")))
        return True

    @property
    def n_recorded(self) -> int:
        """Rows that are recorded; the same on every rank."""
        identity, absent = self.identity, self._absent()
        last = (identity.rows - 1) // self._per_file
        lacking = len(absent) * self._per_file - (last in absent) * ((last + 1) * self._per_file - identity.rows)
        return identity.rows - lacking

    @property
    def complete(self) -> bool:
        """Whether all rows are recorded, so that nobody needs the teacher."""
        return on_first_rank((self.folder / MANIFEST).is_file) and not self._absent()

    @property
    def size(self) -> int:
        """Bytes on the disk when it is complete."""
        each = 4 * self.identity.top_k + 4 * (self.identity.top_k + 1)
        return each * self.identity.rows * self.identity.length

    def _numbers(self) -> range:
        """Of all files."""
        return range(-(-self.identity.rows // self._per_file))

    def _absent(self) -> list[int]:
        """Numbers of the files that do not exist or are damaged."""
        return on_first_rank(lambda: [number for number in self._numbers() if not self._intact(number)])

    def _file(self, number: int) -> Path:
        return self.folder / f"rows-{number * self._per_file:09d}.safetensors"

    def record(self, teacher: MullForCausalLM, dataset: RowDataset, batch_size: int) -> None:
        """Record the rows that are not yet. Called on every rank; ranks share the rows.

        Args:
            teacher: Whole on every rank. It runs in evaluation mode.
            dataset: The rows of `CacheIdentity.data`.
            batch_size: Rows of a forward pass.

        Raises:
            RuntimeError: another process records into the folder.
            ValueError: the teacher predicts NaN.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(teacher))
            on_first_rank(lambda: stack.enter_context(exclusive(self.folder)))
            on_first_rank(self._begin)
            absent = self._absent()[rank() :: world_size()]
            for number in tracked(absent, "file", "Recording the teacher's predictions", len(absent)):
                start = number * self._per_file
                rows = torch.arange(start, min(start + self._per_file, self.identity.rows))
                parts = [self._predict(teacher, dataset.rows(part)) for part in rows.split(batch_size)]
                tokens, log_p = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
                _write(self._file(number), {"tokens": tokens, "log_p": log_p}, self._metadata())
            gather_objects(None)  # nobody reads before all have written

    def _metadata(self) -> dict[str, str]:
        return {METADATA: json.dumps(asdict(self.identity))}

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check()  # another process may have begun one since
        write_text_atomic(str(self.folder / MANIFEST), json.dumps(asdict(self.identity), indent=2) + "\n")

    @torch.no_grad()
    def _predict(self, teacher: MullForCausalLM, batch: Mapping[str, Tensor]) -> TopK:
        """``[B, T, K]`` and ``[B, T, K + 1]``."""
        hidden = batch_states(teacher, {name: tensor.to(teacher.device) for name, tensor in batch.items()})
        predictor = Predictor(hidden.flatten(0, 1), teacher.unembedding())
        of = self.identity
        found = top_k(predictor, of.top_k, temperature=of.temperature, n_tokens=of.n_tokens)
        read = valid_tokens(batch["labels"], label_positions(**layout(batch)))[:, 1:]
        undefined = found.log_p.isnan().any(-1).unflatten(0, hidden.shape[:2])[:, :-1]
        if (undefined & read.to(undefined.device)).any():  # padding may predict anything
            raise ValueError(
                "The teacher predicts NaN for a row of the data: load its weights in fp32 or bf16, and check them."
            )
        return TopK(*(tensor.unflatten(0, hidden.shape[:2]) for tensor in found))

    def rows(self, numbers: Tensor) -> TopK:
        """The records of the rows with these numbers ``[B]``, on the CPU: ``[B, T, K]`` and ``[B, T, K + 1]``.

        Raises:
            ValueError: there is no such row, or it is not recorded.
        """
        found = [self._row(int(number)) for number in numbers]
        return TopK(*(torch.stack(part) for part in zip(*found, strict=True)))

    def _row(self, number: int) -> tuple[Tensor, Tensor]:
        if not 0 <= number < self.identity.rows:
            raise ValueError(
                f"row_numbers has {number}, and {self.folder} is about the rows 0 to {self.identity.rows - 1}."
            )
        file, place = divmod(number, self._per_file)
        try:
            with safe_open(self._file(file), framework="pt") as stored:
                return stored.get_slice("tokens")[place], stored.get_slice("log_p")[place]
        except (FileNotFoundError, SafetensorError):
            raise ValueError(
                f"{self._file(file)} is not recorded, or damaged: record the teacher's predictions again."
            ) from None


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file so that it exists only when it is complete and on the disk."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(save(tensors, metadata))
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
