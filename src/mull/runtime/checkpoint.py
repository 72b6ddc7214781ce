"""Save and resume a run on a local disk or in S3, from one process or many.

A checkpoint is a folder ``step-000123``:

* ``__0_0.distcp``, ``__1_0.distcp``, …: the tensors, one file per rank, by `torch.distributed.checkpoint` (DCP). A sharded
  tensor is stored as its shards and read back into any other sharding.
* ``.metadata``: which file holds which shard. torch writes it as a pickle, so load only checkpoints you trust.
* ``checkpoint.json``: settings and plain values, written last and in one piece. A folder is a checkpoint once it holds this file;
  no folder is ever renamed, because object stores cannot.

With several ranks the folder must be one that all of them see.
"""

import contextlib
import dataclasses
import io
import json
import logging
import pickle
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import IO, Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from mull.runtime import distributed, storage

logger = logging.getLogger(__name__)

MARKER = "checkpoint.json"
FORMAT = 1
"""Layout of a checkpoint; a later one that this version cannot read has a larger number."""

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others to write their part."""

_NAME = re.compile(r"step-(\d+)")
_FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|checkpoint\.json(\.partial)?")

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]
T = TypeVar("T")


class CheckpointConfig(BaseModel):
    """Where, how often and how a run saves what it needs to continue."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    url: str | None = None
    """Folder of the checkpoints: a path, ``file://…`` or ``s3://bucket/…``; ``None`` is ``checkpoints`` in the run's folder."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two checkpoints; ``None`` saves after the last step only."""

    keep_last: int | None = Field(default=2, ge=1)
    """How many checkpoints stay, the newest included; ``None`` keeps all."""

    asynchronous: bool = True
    """Write in the background, from a copy in main memory (one more copy of weights and optimizer state while it is written)."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is not None:
            storage.check_url(url)
        return url


class CheckpointWriter:
    """Writes the checkpoints of one run.

    All ranks make one and call its methods alike. Collective operations run in process groups of its own, so they cannot
    meet those of the training.

    Args:
        url: Folder of the run's checkpoints; made when missing.
        keep_last: How many complete checkpoints stay; ``None`` keeps all.
        asynchronous: `save` returns when the tensors are copied to main memory, and a thread writes them.

    Raises:
        ValueError: `url` names no known kind of storage.
        OSError: the storage cannot be reached, or its bucket does not exist.
        RuntimeError: a package is missing.
    """

    def __init__(self, url: str, keep_last: int | None, asynchronous: bool) -> None:
        self._url = url
        self._keep_last = keep_last
        distributed.on_first_rank(lambda: storage.make_folder(url))
        self._training_side = _Ranks()
        self._writing_side = _Ranks()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, JSON], configuration: Mapping[str, Any]
    ) -> None:
        """Write ``step-<step>``, then remove the oldest checkpoints and the remains of interrupted ones.

        Waits for the write before it. A complete checkpoint of the same step is left as it is.

        Args:
            step: Optimizer steps done.
            tensors: Tensors by name; a `DTensor` is stored by its shards, any other tensor of one name is equal on all ranks
                and stored once. Names may differ between ranks (`rng_tensors`).
            values: What else the run needs to continue, as JSON. Rank 0's are stored.
            configuration: Settings of the run as flat JSON values; `load_checkpoint` compares them.

        Raises:
            RuntimeError: this write, or the asynchronous one before it, failed: the disk is full, or the storage is lost.
                Earlier checkpoints are untouched.
        """
        self._wait()
        content = {"format": FORMAT, "step": step, "configuration": dict(configuration), "values": dict(values)}
        marker = json.dumps(content, indent=1, ensure_ascii=False)
        planner = _SavePlanner(tensors, self._training_side)
        if self._thread is None:
            self._write(step, planner, marker)
        else:
            planner.stage()
            self._pending = self._thread.submit(self._write, step, planner, marker)

    def poll(self) -> None:
        """Look whether the asynchronous write is done, and raise its error; cheap, for every step.

        While a write is under way this is a collective operation of one number, so that all ranks raise in the same step.

        Raises:
            RuntimeError: the write failed.
        """
        if self._pending is not None and self._training_side.all(self._pending.done()):
            self._wait()

    def close(self) -> None:
        """Wait for the asynchronous write and free thread and process groups.

        Raises:
            RuntimeError: the write failed.
        """
        try:
            self._wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._training_side.close()
            self._writing_side.close()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, planner: "_SavePlanner", marker: str) -> None:
        folder = storage.join(self._url, f"step-{step:06d}")
        ranks = self._writing_side
        try:
            if ranks.exchange(lambda: distributed.rank() == 0 and _prepare(folder))[0]:
                return
            written = ranks.exchange(lambda: planner.write(folder))
            ranks.exchange(lambda: _commit(folder, planner, written, marker) if distributed.rank() == 0 else None)
        except _WriteError as error:
            raise RuntimeError(self._failure(step, folder, error)) from error
        if distributed.rank() == 0:
            _prune(self._url, step, self._keep_last)

    def _failure(self, step: int, folder: str, error: "_WriteError") -> str:
        """Remove what was written as far as possible, and tell the user."""
        intact = "Earlier checkpoints were not touched"
        with contextlib.suppress(OSError):
            if distributed.rank() == 0:
                _remove(folder)
            previous = latest(self._url)
            intact = f"The previous one, {_last_name(previous)}, is intact" if previous else "There is no earlier one"
        return (
            f"The checkpoint of step {step} could not be written to {self._url}: {error}. {intact}. "
            "Make room on the disk, or restore the connection, and resume the run."
        )


def checkpoints(url: str) -> list[str]:
    """URLs of a run's complete checkpoints, oldest first; none when the folder does not exist.

    Raises:
        OSError: the storage cannot be reached.
    """
    return [folder for _, folder in _folders(url) if _is_complete(folder)]


def latest(url: str) -> str | None:
    """URL of a run's newest complete checkpoint; half-written ones do not count."""
    return next((folder for _, folder in reversed(_folders(url)) if _is_complete(folder)), None)


def stored_tensors(url: str) -> set[str]:
    """Names of the tensors in one checkpoint.

    A run that resumes with another number of ranks sees here which ranks' generators (``rng.<rank>.…``) can be restored.

    Raises:
        FileNotFoundError: `url` is not a complete checkpoint.
    """
    _read_marker(url)
    return set(_read_metadata(url, _reader(url)).state_dict_metadata)


def load_checkpoint(url: str, tensors: Mapping[str, Tensor], configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Fill tensors from a checkpoint, after checking that it belongs to this run.

    Every rank reads its own part; nothing is communicated. Tensors in the checkpoint that are not asked for are left there.

    Args:
        url: One checkpoint, e.g. from `latest`.
        tensors: Tensors to overwrite in place, by name (`training_tensors`, `rng_tensors`), on any device; a `DTensor` may
            be sharded over another number of ranks than when it was stored.
        configuration: Settings of the run that resumes.

    Returns:
        The values given to `CheckpointWriter.save`.

    Raises:
        FileNotFoundError: `url` is not a complete checkpoint.
        ValueError: the checkpoint was written with other settings (names each one with both values), lacks tensors, or holds
            them in another shape or type (names them). Nothing is overwritten.
        RuntimeError: a file of the checkpoint is damaged.
        OSError: the storage cannot be reached.
    """
    content = _read_marker(url)
    _check_configuration(url, content["configuration"], configuration)
    reader = _reader(url)
    metadata = _read_metadata(url, reader)
    _check_tensors(url, tensors, metadata)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    with _damage(url), storage.os_errors(url):
        reader.read_data(plan, planner).wait()
    values: dict[str, Any] = content["values"]
    return values


def training_tensors(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All tensors that training changes, by name: ``model.<name>`` and ``optimizer.<parameter name>.<state name>``.

    The tensors share memory with the module and the optimizers, so they can be stored and be loaded into. Tied weights appear
    once, under their first name; buffers that are not persistent do not appear. Optimizer state that does not exist yet is
    made as the optimizer itself would make it in its next step; no weight changes.

    Args:
        module: Owner of the parameters, sharded by FSDP2 or not.
        optimizers: `torch.optim.AdamW` and `torch.optim.Muon`, of parameters of `module`.

    Raises:
        ValueError: an optimizer holds a parameter that is not in `module`, or is of another class; the module keeps state
            that is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} of {type(module).__name__} is no tensor but {type(tensor).__name__}: it cannot be saved."
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
                        f"An optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the module to save."
                    )
                state = _optimizer_state(optimizer, group, parameter)
                tensors |= {f"optimizer.{names[id(parameter)]}.{entry}": tensor for entry, tensor in state.items()}
    return tensors


def rng_state() -> dict[str, Tensor]:
    """States of this process's global random generators as tensors on the CPU.

    ``torch`` (CPU), ``cuda`` (the current device, once CUDA is in use), ``numpy`` (624 keys and the position in them), ``python``
    (likewise), and ``gauss``: for numpy and for Python whether half of a pair of Gaussian numbers is left over, and which.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, internal, python_gauss = random.getstate()
    left_over = [float(has_gauss), gauss, float(python_gauss is not None), python_gauss or 0.0]
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position]),
        "python": torch.tensor(internal),
        "gauss": torch.tensor(left_over, dtype=torch.float64),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Restore `rng_state`. The generator of CUDA is restored when the state holds it and there is a device."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    has_gauss, gauss, python_has_gauss, python_gauss = state["gauss"].tolist()
    *keys, position = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), gauss))
    random.setstate((3, tuple(state["python"].tolist()), python_gauss if python_has_gauss else None))


def rng_tensors(rank: int) -> dict[str, Tensor]:
    """`rng_state` under the names that it has in a checkpoint, ``rng.<rank>.torch`` and so on."""
    return {f"rng.{rank}.{name}": tensor for name, tensor in rng_state().items()}


def set_rng_tensors(tensors: Mapping[str, Tensor], rank: int) -> None:
    """Restore the generators of this process from the tensors of a rank; other entries are not read."""
    prefix = f"rng.{rank}."
    set_rng_state({name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)})


class _WriteError(Exception):
    """Why a checkpoint could not be written, the same on every rank."""


class _Ranks:
    """A channel between the ranks, apart from that of the training; one process needs none."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if distributed.world_size() > 1 else None

    def exchange(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank and hand out all results; if it fails on one rank, fail on all."""
        try:
            outcome: tuple[T | None, str | None] = work(), None
        except (OSError, RuntimeError) as error:  # torch reports a failed write to its archive as RuntimeError
            outcome = None, str(_root_cause(error)).rstrip(".")
        outcomes = [outcome]
        if self._group is not None:
            outcomes *= distributed.world_size()
            dist.all_gather_object(outcomes, outcome, group=self._group)
        failures = [f"rank {number}: {failure}" for number, (_, failure) in enumerate(outcomes) if failure is not None]
        if failures:
            raise _WriteError("; ".join(failures) if self._group is not None else outcome[1])
        return [result for result, _ in outcomes]  # type: ignore[misc]  # a rank that did not fail has a result

    def all(self, condition: bool) -> bool:
        """Whether something holds on every rank."""
        if self._group is None:
            return condition
        held = torch.tensor(int(condition))
        dist.all_reduce(held, dist.ReduceOp.MIN, group=self._group)
        return bool(held)

    def close(self) -> None:
        """Leave the channel; it cannot be used any more."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)


class _SavePlanner(DefaultSavePlanner):
    """Agrees with the other ranks which of them writes what, and writes this rank's share.

    Args:
        tensors: Tensors by name.
        ranks: Channel of the calling thread.
    """

    def __init__(self, tensors: Mapping[str, Tensor], ranks: _Ranks) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies: dict[MetadataIndex, Tensor] | None = None
        self.set_up_planner(dict(tensors), is_coordinator=distributed.rank() == 0)
        # Every rank computes the whole plan, which saves a second exchange.
        plans, self.metadata = self.create_global_plan(ranks.exchange(self.create_local_plan))
        self._plans = plans
        self.finish_plan(plans[distributed.rank()])

    def stage(self) -> None:
        """Copy this rank's share to main memory; the tensors themselves may change from here on."""
        self._copies = {item.index: _copy_to_cpu(self.lookup_object(item.index)) for item in self.plan.items}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Hand DCP's writer the tensor, or the copy of it."""
        return super().resolve_data(write_item) if self._copies is None else self._copies[write_item.index]

    def write(self, folder: str) -> list[WriteResult]:
        """Write this rank's file, and say what lies where in it."""
        # DCP's prepare_local_plan is left out: it makes the folder, and in S3 a missing bucket with it.
        writer = _writer(folder)
        plan = writer.prepare_global_plan(self._plans)[distributed.rank()]
        with storage.os_errors(folder):
            return writer.write_data(plan, self).value()


class _ObjectReader(FsspecReader):
    """Reads every file front to back. DCP's own order jumps, and in an object store each jump fetches a block of megabytes."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Sort the reads by their place."""

        def place(item: ReadItem) -> tuple[str, int]:
            stored = self.storage_data[item.storage_index]
            return stored.relative_path, stored.offset

        return dataclasses.replace(plan, items=sorted(plan.items, key=place))

    def _slice_file(self, file: IO[bytes], place: Any) -> IO[bytes]:
        file.seek(place.offset)
        return io.BytesIO(file.read(place.length))


def _writer(folder: str) -> FileSystemWriter:
    if storage.is_local(folder):
        return FileSystemWriter(storage.local_path(folder), per_thread_copy_ahead=0)
    return FsspecWriter(folder, sync_files=False, per_thread_copy_ahead=0, **storage.OPTIONS)


def _reader(folder: str) -> FileSystemReader:
    if storage.is_local(folder):
        return FileSystemReader(storage.local_path(folder))
    return _ObjectReader(folder, **storage.OPTIONS)


def _prepare(folder: str) -> bool:
    """Clear away an interrupted checkpoint and make the folder; whether a complete one is there instead."""
    if _is_complete(folder):
        return True
    _remove(folder)
    if storage.list_names(folder):
        raise OSError(f"{folder} holds files that are no checkpoint's; choose another folder")
    storage.make_folder(folder)
    return False


def _commit(folder: str, planner: _SavePlanner, written: list[list[WriteResult]], marker: str) -> None:
    """Turn a folder that holds everything into a checkpoint."""
    with storage.os_errors(folder):
        _writer(folder).finish(planner.metadata, written)
    storage.flush_folder(folder)
    storage.write_text_atomic(storage.join(folder, MARKER), marker)


def _prune(url: str, step: int, keep_last: int | None) -> None:
    """Remove checkpoints before a step that are too many, or not complete."""
    try:
        older = [folder for number, folder in _folders(url) if number < step]
        complete = [folder for folder in older if _is_complete(folder)]
        kept = complete if keep_last is None else complete[max(0, len(complete) - keep_last + 1) :]
        for folder in older:
            if folder not in kept:
                _remove(folder)
    except OSError as error:
        logger.warning("The checkpoint of step %d is written, but older ones could not be removed: %s", step, error)


def _remove(folder: str) -> None:
    """Remove a checkpoint, whole or not; a folder that holds anything else is somebody's, and stays.

    The marker goes first, so that an interruption leaves nothing that looks complete.
    """
    if all(_FILE.fullmatch(name) for name in storage.list_names(folder)):
        storage.remove_tree(storage.join(folder, MARKER))
        storage.remove_tree(folder)


def _folders(url: str) -> list[tuple[int, str]]:
    """Step and URL of everything that is named as a checkpoint, by step."""
    names = [(int(match[1]), name) for name in storage.list_names(url) if (match := _NAME.fullmatch(name))]
    return [(step, storage.join(url, name)) for step, name in sorted(names)]


def _is_complete(folder: str) -> bool:
    return storage.exists(storage.join(folder, MARKER))


def _last_name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _read_marker(url: str) -> dict[str, Any]:
    try:
        text = storage.read_text(storage.join(url, MARKER))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{url} is not a complete checkpoint: it holds no {MARKER}, which is written last."
        ) from None
    content: dict[str, Any] = json.loads(text)
    if content["format"] > FORMAT:
        raise ValueError(
            f"{url} has format {content['format']}, this version of mull reads up to {FORMAT}: install a later mull to load it."
        )
    return content


def _read_metadata(url: str, reader: FileSystemReader) -> Metadata:
    with _damage(url), storage.os_errors(url):
        return reader.read_metadata()


@contextlib.contextmanager
def _damage(url: str) -> Iterator[None]:
    """Say which checkpoint is at fault when torch cannot read one of its files."""
    advice = "Remove the folder to resume from the checkpoint before it"
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} lacks a file ({_root_cause(error)}). {advice}.") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RuntimeError(f"{url} is damaged ({error}). {advice}.") from error


def _check_configuration(url: str, stored: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    given = json.loads(json.dumps(configuration))
    differing = sorted(name for name in stored.keys() | given.keys() if stored.get(name) != given.get(name))
    if differing:
        listed = "; ".join(f"{name}: {stored.get(name)!r} stored, {given.get(name)!r} given" for name in differing)
        raise ValueError(
            f"{url} belongs to a run with another configuration ({listed}). "
            "Resume with the stored settings, or start a new run in another directory."
        )


def _check_tensors(url: str, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    faults = []
    for name, tensor in tensors.items():
        stored = metadata.state_dict_metadata.get(name)
        given = tensor.shape, tensor.dtype
        if not isinstance(stored, TensorStorageMetadata):
            faults.append(f"{name} is missing")
        elif (found := (stored.size, stored.properties.dtype)) != given:
            faults.append(f"{name}: {_described(*found)} stored, {_described(*given)} given")
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise ValueError(f"{url} does not fit the tensors of this run ({shown}). Resume with the model that was saved.")


def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _optimizer_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: nn.Parameter
) -> dict[str, Tensor]:
    """State of one parameter; made where the optimizer would make it in its next step."""
    state = optimizer.state.get(parameter)
    if not state:
        if not parameter.requires_grad:
            return {}
        state = optimizer.state[parameter] = _initial_state(optimizer, group, parameter)
    return dict(state)


def _initial_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: nn.Parameter
) -> dict[str, Tensor]:
    zeros = torch.zeros_like(parameter, requires_grad=False, memory_format=torch.preserve_format)
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": zeros}
    if not isinstance(optimizer, torch.optim.Adam):
        raise ValueError(f"The state of {type(optimizer).__name__} cannot be saved: use torch.optim.AdamW or Muon.")
    on_device = group["fused"] or group["capturable"]
    double = not group["fused"] and torch.get_default_dtype() == torch.float64
    step = torch.zeros(
        (), dtype=torch.float64 if double else torch.float32, device=parameter.device if on_device else "cpu"
    )
    moments = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])
    return {"step": step} | {name: zeros.clone() for name in moments}


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """A copy that is whole on a CPU at once, and from CUDA after a synchronization."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


def _root_cause(error: BaseException) -> BaseException:
    """The first OSError behind an error; torch wraps it in one about its archive."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error
