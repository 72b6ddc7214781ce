"""What mull adds to the files of `torch.distributed.checkpoint` (DCP): digests, and a reader of its metadata that runs no code.

A digest is the SHA-256 of the bytes of one tensor in its file, or of a whole small file, in hexadecimal.
"""

import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.serialization import _get_layout

SHARD = re.compile(r"__\d+_\d+\.distcp")
"""Name of a file with tensors."""

DIGEST = "digest"
"""Attribute of DCP's description of a stored tensor, and key of a sealed JSON object."""

UNREADABLE = (
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)
"""What Python and torch raise for files that are not what they should be."""

_CLASSES = (
    dcp.BytesStorageMetadata,
    dcp.ChunkStorageMetadata,
    dcp.Metadata,
    dcp.MetadataIndex,
    dcp.StorageMeta,
    dcp.TensorProperties,
    dcp.TensorStorageMetadata,
    dcp._MEM_FORMAT_ENCODING,
    _StorageInfo,
)
_KNOWN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{(kind.__module__, kind.__qualname__): kind for kind in _CLASSES},
    # Earlier versions noted the folder.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): PureWindowsPath,
}
"""Everything that DCP's metadata may refer to: plain data, and nothing that acts."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint of mull contains")
        return _KNOWN[module, name]


def read_metadata(content: bytes) -> dcp.Metadata:
    """DCP's metadata from its pickle, without importing or calling anything but classes of plain data.

    Raises:
        pickle.UnpicklingError: it refers to anything else, or to files outside the checkpoint.
        Exception: one of `UNREADABLE`, because it is damaged.
    """
    metadata = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(metadata, dcp.Metadata):
        raise pickle.UnpicklingError("it does not describe tensors")
    for info in metadata.storage_data.values():
        numbers = (info.offset, info.length)
        if not SHARD.fullmatch(info.relative_path) or info.transform_descriptors:
            raise pickle.UnpicklingError(f"it refers to {info.relative_path!r}, which is no file of a checkpoint")
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise pickle.UnpicklingError("it has places of tensors that are no numbers")
    return metadata


class DigestingStream:
    """A file that is being written, with the digest of each piece; a piece ends where `tell` is called.

    Attributes:
        digests: The digest of each finished piece by its offset in bytes.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.digests: dict[int, str] = {}
        self._stream, self._start, self._end, self._sum = stream, 0, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        """Append bytes."""
        self._sum.update(data)
        self._end += memoryview(data).nbytes
        return self._stream.write(data)

    def tell(self) -> int:
        """Bytes written so far, also once the file is closed. DCP asks before and after each tensor."""
        if self._end > self._start:
            self.digests[self._start] = self._sum.hexdigest()
            self._start, self._sum = self._end, hashlib.sha256()
        return self._end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class CheckingReader(FileSystemReader):
    """DCP's reader that compares each tensor with its digest; those of earlier versions of mull have none."""

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        if sinfo.offset + sinfo.length > file.seek(0, os.SEEK_END):
            raise RuntimeError("it is shorter than when it was written")
        file.seek(sinfo.offset)
        content = file.read(sinfo.length)
        check_digest(content, getattr(sinfo, DIGEST, None))
        return io.BytesIO(content)


def check_digest(content: bytes, digest: str | None) -> None:
    """Refuse bytes that are not those that were written.

    Raises:
        RuntimeError: they have another digest. None is no digest, and accepts everything.
    """
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise RuntimeError("its content has changed since it was written")


def sealed(content: Mapping[str, Any]) -> str:
    """A JSON object as text, with the digest of the rest under `DIGEST`."""
    return json.dumps({**content, DIGEST: _digest_of(content)}, indent=1, ensure_ascii=False)


def unsealed(text: str) -> dict[str, Any]:
    """The object that `sealed` wrote, or one without a digest.

    Raises:
        ValueError: it is no JSON object, or was changed.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    digest = content.pop(DIGEST, None)
    if digest is not None and digest != _digest_of(content):
        raise ValueError("its content has changed since it was written")
    return content


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
