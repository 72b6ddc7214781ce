"""Save and resume a run on a local disk or in S3, from one process or many.

A checkpoint is a folder ``step-000123`` with

* ``__0_0.distcp``, ``__1_0.distcp``, …: the tensors, one file per rank, by `torch.distributed.checkpoint` (DCP). A sharded
  tensor is stored as its shards and can be read into any other sharding.
* ``.metadata``: which file has which shard, and the digest of each. torch writes it as a pickle. It is read as plain data: one
  that refers to anything but DCP's own descriptions, or to a file outside the folder, is refused and no code runs.
* ``checkpoint.json``: settings, plain values and digests, written last and atomically. Only a folder with this file is a
  checkpoint. Nothing depends on renaming a folder, which object stores cannot do.

Every tensor and file is compared with its SHA-256 when it is read. Checkpoints of versions before that have none.

All ranks must see the same folder.
"""

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from os import PathLike
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict
from torch.distributed.checkpoint.storage import WriteResult

from mull.runtime import distributed, storage
from mull.runtime.arguments import Frozen
from mull.runtime.shards import (
    DIGEST,
    SHARD,
    UNREADABLE,
    CheckingReader,
    DigestingStream,
    check_digest,
    read_metadata,
    sealed,
    unsealed,
)
from mull.runtime.timing import synchronize

logger = logging.getLogger(__name__)

MARKER = "checkpoint.json"
METADATA = ".metadata"
DIGESTS = "digests"
"""Key of `MARKER` with the digests of other files by name."""

FORMAT = 1
"""Number of the layout; a version of mull refuses checkpoints with a larger one."""

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others to write their part."""

_NAME = re.compile(r"step-(\d+)")
_FILE = re.compile(rf"{SHARD.pattern}|\.metadata(\.tmp)?|checkpoint\.json(\.partial)?")

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


class CheckpointConfig(Frozen):
    """Where, how often and how a run saves what it needs to continue."""

    url: Annotated[str, AfterValidator(storage.check_url)] | None = None
    """Folder of the checkpoints: a path, ``file://…`` or ``s3://bucket/…``. ``None`` is ``checkpoints`` in the run's folder."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints. ``None`` saves after the last step only."""

    keep_last: int | None = Field(default=2, ge=1)
    """How many checkpoints to keep, including the newest. ``None`` keeps all."""

    asynchronous: bool = True
    """Write in the background, from a copy in main memory: one more copy of weights and optimizer state until it is written."""


class CheckpointWriter:
    """Writes the checkpoints of one run.

    Every rank makes one and makes the same calls. They communicate in process groups of their own, so they cannot interfere
    with the training's.

    Args:
        url: Folder of the run's checkpoints; made if missing.
        keep_last: How many complete checkpoints to keep; ``None`` keeps all.
        asynchronous: `save` returns once the tensors are copied to main memory, and a thread writes the copies.

    Raises:
        ValueError: `url` names no known kind of storage.
        OSError: the storage cannot be reached, or its bucket does not exist.
        RuntimeError: a package is missing.
    """

    def __init__(self, url: str, keep_last: int | None, asynchronous: bool) -> None:
        self._url = url
        self._keep_last = keep_last
        self._pending: Future[None] | None = None
        distributed.on_first_rank(lambda: storage.make_folder(url))
        self._resources = contextlib.ExitStack()
        # Two, because the thread and `poll` communicate at the same time.
        self._write_group = self._resources.enter_context(distributed.side_group(PATIENCE))
        self._poll_group = self._resources.enter_context(distributed.side_group(PATIENCE))
        # Not DCP's `async_save`: the thread also clears the folder before, and commits and prunes after.
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._thread = self._resources.enter_context(thread) if asynchronous else None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, JSON], configuration: Mapping[str, Any]
    ) -> None:
        """Write ``step-<step>``, then remove the oldest checkpoints and the remains of interrupted ones.

        Waits for the previous write. A complete checkpoint of the same step is left as it is.

        Args:
            step: Optimizer steps done.
            tensors: Tensors by name. A `DTensor` is stored by its shards. Any other tensor is stored once, so it must be equal
                on all ranks that have its name; not all need to.
            values: What else the run needs to continue, as JSON. Rank 0's are stored.
            configuration: Settings of the run as flat JSON values; `load_checkpoint` compares them.

        Raises:
            RuntimeError: this write, or the previous asynchronous one, failed: the disk is full, or the storage is lost.
                Earlier checkpoints are untouched.
        """
        self._wait()
        content = {"format": FORMAT, "step": step, "configuration": dict(configuration), "values": dict(values)}
        marker = json.dumps(content, indent=1, ensure_ascii=False)
        if self._thread is None:
            self._write(step, tensors, marker)
            return
        # `non_blocking` copies from a GPU to pinned memory. The tensors may change once the devices are done.
        copies = {name: tensor.detach().to("cpu", non_blocking=True, copy=True) for name, tensor in tensors.items()}
        for device in {tensor.device for tensor in tensors.values()}:
            synchronize(device)
        self._pending = self._thread.submit(self._write, step, copies, marker)

    def poll(self) -> None:
        """Raise the `RuntimeError` of an asynchronous write that has failed; cheap, for every step."""
        if self._pending is None:
            return
        # On all ranks together, so that all of them raise in the same step.
        n_writing = distributed.global_sum(torch.tensor(int(not self._pending.done())), self._poll_group)
        if n_writing == 0:
            self._wait()

    def close(self) -> None:
        """Wait for the asynchronous write, free thread and process groups, and raise `RuntimeError` if the write failed."""
        try:
            self._wait()
        finally:
            self._resources.close()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, tensors: Mapping[str, Tensor], marker: str) -> None:
        folder = storage.join(self._url, f"step-{step:06d}")
        group = self._write_group
        try:
            if distributed.on_first_rank(lambda: _prepare(folder), group):
                return
            digest = _save_tensors(folder, tensors, group)
            distributed.on_first_rank(lambda: _commit(folder, marker, digest), group)
        except (OSError, CheckpointException) as error:
            raise RuntimeError(self._failure(step, folder, _reason(error))) from error
        if distributed.rank() == 0:
            _prune(self._url, step, self._keep_last)

    def _failure(self, step: int, folder: str, reason: str) -> str:
        """Remove as much as possible of what was written, and say what is left."""
        intact = "Earlier checkpoints were not touched"  # all that is known when the storage is lost
        with contextlib.suppress(OSError):
            if distributed.rank() == 0:
                _remove(folder)
            previous = latest(self._url)
            intact = (
                f"The previous one, {previous.rsplit('/', 1)[-1]}, is intact" if previous else "There is no earlier one"
            )
        return (
            f"The checkpoint of step {step} could not be written to {self._url}: {reason}. {intact}. "
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

    With another number of ranks, they tell which ranks' generators (``rng.<rank>.…``) can be restored.

    Raises:
        FileNotFoundError: `url` is not a complete checkpoint.
    """
    return set(_open(url, _read_marker(url))[1].state_dict_metadata)


def load_checkpoint(
    url: str, tensors: Mapping[str, Tensor], configuration: Mapping[str, Any], newer: str = "-"
) -> dict[str, Any]:
    """Fill tensors from a checkpoint, after checking that it belongs to this run.

    Every rank reads its own part; the ranks do not communicate. Other tensors in the checkpoint are ignored.

    Args:
        url: One checkpoint, e.g. from `latest`.
        tensors: Tensors to overwrite in place, by name, on any device. A `DTensor` may be sharded over another number of ranks
            than when it was stored.
        configuration: Settings of the run that resumes.
        newer: Prefix of settings that checkpoints of earlier versions lack. Where none is stored, the settings that both versions
            note are compared, and a warning names the others.

    Returns:
        The values given to `CheckpointWriter.save`.

    Raises:
        FileNotFoundError: `url` is not a complete checkpoint.
        ValueError: the checkpoint was written with other settings (names each one with both values), lacks tensors, or has them
            in another shape or type (names them). Nothing is overwritten.
        RuntimeError: a file of the checkpoint is damaged, or is not of this checkpoint; names it.
        OSError: the storage cannot be reached.
    """
    content = _read_marker(url)
    stored = content["configuration"]
    noted, given = (any(name.startswith(newer) for name in names) for names in (stored, configuration))
    if given and not noted:
        # Versions differ in what they note, and None may have stood for what is noted now.
        both = {name for name, value in stored.items() if name in configuration and value is not None}
        _warn_of_earlier_version(url, sorted(configuration.keys() - both))
        stored = {name: stored[name] for name in both}
        configuration = {name: configuration[name] for name in both}
    _check_configuration(url, stored, configuration)
    reader, metadata = _open(url, content)
    _check_tensors(url, tensors, metadata)
    # Not DCP's `load`: it reads the metadata again, and turns each error into a `CheckpointException`, which is no `Exception`.
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    with _damage(url):
        reader.read_data(planner.create_local_plan(), planner).wait()
    return content["values"]


def _warn_of_earlier_version(url: str, absent: Sequence[str]) -> None:
    if absent and distributed.rank() == 0:
        logger.warning(
            "%s is of an earlier version, so these are not compared: %s.", storage.redact(url), ", ".join(absent)
        )


class _Files(FileSystem):
    """Gives DCP's writer and reader `storage` for their files.

    DCP can use fsspec itself, in a private module, but would make a missing bucket and, in S3, read each tensor in jumps that
    fetch 50 MB each.
    """

    def __init__(self) -> None:
        self.written: dict[str, DigestingStream] = {}
        """What was written, by name of the file."""

    @contextlib.contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[Any]:
        name = str(path).rsplit("/", 1)[-1]
        try:
            with storage.open_stream(str(path), mode) as stream:
                if mode == "rb":
                    yield stream
                    return
                self.written[name] = DigestingStream(stream)
                yield self.written[name]
                self.written[name].tell()
        except UNREADABLE as error:
            # If a write fails, torch raises an error about its archive. The user needs the cause, such as a full disk.
            cause = _root_cause(error)
            if mode == "rb" and cause is error:
                raise RuntimeError(f"{name}: {error}") from error
            raise cause from None

    def concat_path(self, path: str | PathLike[str], suffix: str) -> str:
        return storage.join(str(path), suffix)

    def rename(self, path: str | PathLike[str], new_path: str | PathLike[str]) -> None:
        with storage.access(str(path)) as files:
            files.mv(str(path), str(new_path))

    def mkdir(self, path: str | PathLike[str]) -> None:
        pass  # `_prepare` has made the folder

    def exists(self, path: str | PathLike[str]) -> bool:
        return storage.exists(str(path))

    def rm_file(self, path: str | PathLike[str]) -> None:
        storage.remove_tree(str(path))


class _Writer(FileSystemWriter):
    def __init__(self, folder: str) -> None:
        # Only a local file has a descriptor to flush; without one, DCP would flush all disks of the machine.
        super().__init__(folder, sync_files=storage.is_local(folder), per_thread_copy_ahead=0)
        self.fs: _Files = _Files()
        self.path = folder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        results = super().write_data(plan, planner)
        for info in (result.storage_data for result in results.value()):
            # DCP stores the descriptions of all ranks in the metadata, with whatever attributes they have.
            setattr(info, DIGEST, self.fs.written[info.relative_path].digests[info.offset])
        return results


def _save_tensors(folder: str, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> str | None:
    """Write all files but the marker. Returns the digest of the metadata on rank 0, which writes them."""
    # DCP warns whenever one process saves alone. The filter is set once and for all: in a thread it could not be undone safely.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer, alone = _Writer(folder), group is None
    save_state_dict(dict(tensors), storage_writer=writer, planner=planner, process_group=group, no_dist=alone)
    metadata = writer.fs.written.get(f"{METADATA}.tmp")  # under this name DCP writes it
    return None if metadata is None else metadata.digests[0]


def _reason(error: OSError | CheckpointException) -> str:
    """Why a checkpoint could not be written, in the same words on every rank."""
    if isinstance(error, OSError):
        return str(error).rstrip(".")
    failures = {rank: cause for rank, (cause, _) in error.failures.items()}
    for cause in failures.values():
        if not isinstance(cause, Exception):
            raise cause  # DCP catches a KeyboardInterrupt, too
    alone = distributed.world_size() == 1
    return "; ".join(f"{'' if alone else f'rank {rank}: '}{cause}".rstrip(".") for rank, cause in failures.items())


def _prepare(folder: str) -> bool:
    """Whether the checkpoint is complete already. If not, make its folder, without the files of an interrupted write."""
    if _is_complete(folder):
        return True
    _remove(folder)
    if storage.list_names(folder):
        raise OSError(f"{folder} has files that are not a checkpoint's; choose another folder")
    storage.make_folder(folder)
    return False


def _commit(folder: str, marker: str, digest: str | None) -> None:
    """Turn a folder with all its files into a checkpoint."""
    storage.flush_folder(folder)
    content = {**json.loads(marker), DIGESTS: {METADATA: digest}}
    storage.write_text_atomic(storage.join(folder, MARKER), sealed(content))


def _prune(url: str, step: int, keep_last: int | None) -> None:
    """Of the checkpoints before a step, remove the incomplete ones and the oldest beyond `keep_last`."""
    try:
        older = [folder for number, folder in _folders(url) if number < step]
        complete = [folder for folder in older if _is_complete(folder)]
        kept = complete if keep_last is None else complete[max(0, len(complete) - keep_last + 1) :]
        for folder in older:
            if folder not in kept:
                _remove(folder)
    except OSError as error:
        logger.warning("The checkpoint of step %d is saved, but older ones could not be removed: %s", step, error)


def _remove(folder: str) -> None:
    """Remove a checkpoint, complete or not. A folder with any other file is somebody else's and stays."""
    if all(_FILE.fullmatch(name) for name in storage.list_names(folder)):
        # The marker goes first, so that an interruption leaves nothing that looks complete.
        storage.remove_tree(storage.join(folder, MARKER))
        storage.remove_tree(folder)


def _folders(url: str) -> list[tuple[int, str]]:
    """Step and URL of everything with the name of a checkpoint, sorted by step."""
    names = [(int(match[1]), name) for name in storage.list_names(url) if (match := _NAME.fullmatch(name))]
    return [(step, storage.join(url, name)) for step, name in sorted(names)]


def _is_complete(folder: str) -> bool:
    return storage.exists(storage.join(folder, MARKER))


def _read_marker(url: str) -> dict[str, Any]:
    try:
        text = storage.read_bytes(storage.join(url, MARKER))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{url} is not a complete checkpoint: it has no {MARKER}, which is written last."
        ) from None
    with _damage(url, MARKER):
        stated = json.loads(text)["format"]
        if stated <= FORMAT:
            content = unsealed(text.decode())
            if not all(isinstance(content[name], dict) for name in ("configuration", "values")):
                raise ValueError("it has no settings or values")
            return content
    raise ValueError(
        f"{url} has format {stated}; this version of mull reads up to {FORMAT}. Install a later one to load it."
    )


def _open(url: str, marker: Mapping[str, Any]) -> tuple[CheckingReader, Metadata]:
    """A reader of DCP for a checkpoint, and which tensors it has."""
    reader = CheckingReader(url)
    reader.fs, reader.path = _Files(), url
    with _damage(url, METADATA):
        content = storage.read_bytes(storage.join(url, METADATA))
        check_digest(content, marker.get(DIGESTS, {}).get(METADATA))
        return reader, read_metadata(content)


@contextlib.contextmanager
def _damage(url: str, name: str | None = None) -> Iterator[None]:
    """Name the checkpoint, and the file if the error does not, when one of its files cannot be read."""
    advice = "Remove the folder to resume from the previous checkpoint"
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} lacks a file ({error}). {advice}.") from error
    except UNREADABLE as error:
        file = "" if name is None else f"{name}: "
        raise RuntimeError(f"{url} is damaged ({file}{error}). {advice}.") from error


def _check_configuration(url: str, stored: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    given = json.loads(json.dumps(configuration))  # tuples become lists, as in the stored one
    differing = sorted(name for name in stored.keys() | given.keys() if stored.get(name) != given.get(name))
    if differing:
        listed = "; ".join(f"{name}: {stored.get(name)!r} stored, {given.get(name)!r} given" for name in differing)
        raise ValueError(
            f"{url} belongs to a run with another configuration ({listed}). "
            "Resume with the stored settings, or start a new run in another folder."
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


def _root_cause(error: BaseException) -> BaseException:
    """The first OSError among the causes of an error, or the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
