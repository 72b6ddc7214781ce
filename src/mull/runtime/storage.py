"""Files on a local disk or in an object store, named by a path, ``file://…``, ``s3://…`` or any other URL of fsspec.

Credentials, region and endpoint of S3 come from the usual environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_PROFILE``, ``AWS_ENDPOINT_URL``). Errors are `OSError` (`FileNotFoundError` for a missing file) with a sentence that names
the URL, `ValueError` for a URL that cannot work, and `RuntimeError` for a missing package.

fsspec is used directly. ``universal-pathlib`` would replace one-line functions only: it writes no file atomically, makes missing
buckets, and passes on the errors of S3's client.
"""

import contextlib
import fcntl
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec import AbstractFileSystem

from mull.runtime.arguments import require

logger = logging.getLogger(__name__)

LOCK_PATIENCE_SECONDS = 2.0
"""How long a folder that is in use is waited for: ranks of a run whose launcher was killed need a moment to end."""

# Large files are read tensor by tensor. Blocks are kept, because torch reads the end of a tensor's archive before its start:
# fsspec's default read-ahead would fetch a new block (50 MB in S3) for each such jump.
_READING: dict[str, Any] = {"cache_type": "blockcache", "cache_options": {"maxblocks": 4}}
_PATTERN = frozenset("*?[]")
_USER = re.compile(r"(?<=://)(?:[^\s/@:]*:\S*|[^\s/@]+)@")
_SECRET = re.compile(
    r"([?&;#][^=&;#\s]*(?:token|key|secret|pass|pwd|sig|credential|auth|jwt)[^=&;#\s]*=)"
    r"(?:\"[^\"]*\"|'[^']*'|[^&;#\s'\")]+)",
    re.IGNORECASE,
)
_MISSING = (FileNotFoundError, NotADirectoryError)


def join(url: str, *names: str) -> str:
    """Append names to a folder's URL."""
    return "/".join([url.rstrip("/"), *names])


def redact(text: str) -> str:
    """Text with ``***`` for users, passwords and tokens inside URLs. Everything shown, logged or sent passes through here."""
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


def is_local(url: str) -> bool:
    """Whether the URL is a path or ``file://``."""
    return "://" not in url or url.startswith("file://")


def local_path(written: str | os.PathLike[str]) -> Path:
    """The local path that a user wrote as a path or as ``file://…``; every option that names a local place is read by this.

    A leading ``~`` is the home folder. All other characters stand for themselves: nothing is a pattern, a query or percent-coded.

    Raises:
        TypeError: neither text nor a path.
        ValueError: an empty path, a URL of remote storage, the home of an unknown user, or a character that no path may have.
    """
    require("The path", written, (str, os.PathLike), "a path as text")
    text = os.fspath(written)
    require("The path", text, str, "a path as text")
    if not is_local(text):
        raise ValueError(f"{text} is no local path: this has to be on a local disk.")
    path = text.removeprefix("file://")
    if not path.strip() or "\0" in path:
        raise ValueError(f"The path {text!r} is empty or has a null character: give a path such as out/model.")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{text}: there is no such user. Write ./{path} for a name that begins with ~.") from None


def check_url(url: str) -> str:
    """Refuse a URL that no file system understands, before anything is read or written.

    Returns:
        The URL.

    Raises:
        ValueError: the URL is empty, its protocol is unknown, or a remote name contains one of ``* ? [ ]``, which fsspec expands.
    """
    if not url.strip():
        raise ValueError("The URL is empty: give a path, file://… or s3://bucket/folder.")
    if is_local(url):
        local_path(url)
        return url
    protocol = url.split("://", 1)[0]
    if protocol not in fsspec.available_protocols():
        raise ValueError(
            f"{url}: the protocol {protocol}:// is not known. Give a path, file://… or s3://bucket/folder."
        )
    if _PATTERN & set(url):
        raise ValueError(f"{url} contains one of * ? [ ], which are read as patterns. Choose another folder name.")
    return url


def filesystem(url: str) -> AbstractFileSystem:
    """The fsspec file system that serves a URL.

    Raises:
        RuntimeError: the package for the protocol is missing; names the extra that installs it.
    """
    check_url(url)
    protocol = "file" if is_local(url) else url.split("://", 1)[0]
    try:
        # Other processes write too, so a cached listing could be out of date.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError as error:
        remedy = "pip install 'mull[s3]'" if protocol in ("s3", "s3a") else f"{error}"
        raise RuntimeError(f"{url} needs a package that is not installed: {remedy}.") from None


@contextlib.contextmanager
def access(url: str) -> Iterator[AbstractFileSystem]:
    """The file system that serves a URL; what it raises meanwhile is translated by `os_errors`."""
    files = filesystem(url)
    with os_errors(url):
        yield files


def exists(url: str) -> bool:
    """Whether there is a file or folder. A store that does not answer is an error, never a no."""
    with access(url) as files, contextlib.suppress(*_MISSING):
        files.info(url)
        return True
    return False


def list_names(folder: str) -> list[str]:
    """Sorted names of the files and folders in a folder; none if there is no such folder."""
    with access(folder) as files, contextlib.suppress(*_MISSING):
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(folder, detail=False)})
    return []


def read_bytes(url: str) -> bytes:
    """Read a whole file, in one request."""
    with access(url) as files:
        return bytes(files.cat_file(url))


@contextlib.contextmanager
def open_stream(url: str, mode: str) -> Iterator[IO[bytes]]:
    """Open a file to be read (``rb``) or written (``wb``) piece by piece."""
    with access(url) as files, files.open(url, mode, **(_READING if mode == "rb" else {})) as stream:
        yield stream


def write_text_atomic(url: str, text: str) -> None:
    """Write a file of UTF-8 text so that after a crash it has all of the new content or is unchanged.

    A local file is written under another name, flushed and renamed, and the rename is flushed; its folder must exist. An object
    store receives it in one request.
    """
    if not is_local(url):
        with access(url) as files:
            files.pipe_file(url, text.encode("utf-8"))
        return
    path = local_path(url)
    partial = path.with_name(path.name + ".partial")
    with _named(path):
        try:
            partial.write_text(text, encoding="utf-8")
            _flush(partial)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        _flush(path.parent)


def append(stream: FileIO, text: str) -> None:
    """Write UTF-8 text to the end of a local file, opened without a buffer; an error, such as of a full disk, names the file."""
    left = memoryview(text.encode("utf-8"))
    with _named(Path(str(stream.name))):
        while left:
            left = left[stream.write(left) :]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in errors of the system that name none: those of writing, not of opening."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(url: str) -> None:
    """Make a folder and its parents. S3 has no folders: there, only the bucket is looked for.

    Raises:
        FileNotFoundError: the bucket does not exist. It is not made, because the name may be a typing error.
    """
    with access(url) as files:
        if "s3" not in files.protocol:
            files.makedirs(url, exist_ok=True)
            return
        bucket = files.split_path(url)[0]
        try:
            files.call_s3("head_bucket", Bucket=bucket)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no bucket {bucket}. Make it, or correct the URL") from None
        except PermissionError:
            return  # credentials may be good for the folder only


def remove_tree(url: str) -> None:
    """Remove a file, or a folder with its content, if there is one."""
    with access(url) as files, contextlib.suppress(FileNotFoundError):
        files.rm(url, recursive=True)


def flush_folder(url: str) -> None:
    """Make the files of a local folder, their names and the folder's own name survive a power failure.

    An object store confirms a write once it is durable, so nothing is left to do.
    """
    if not is_local(url):
        return
    path = local_path(url)
    for changed in (*path.iterdir(), path, path.absolute().parent):
        _flush(changed)


def publish(staged: Path, target: Path) -> None:
    """Move the files of a folder where readers look for them, so that each of them is there completely or not at all.

    A target that does not exist appears at once. In one that does, files of the same name are replaced and others stay.
    """
    flush_folder(str(staged))
    if not target.exists():
        staged.rename(target)
    else:
        for file in staged.iterdir():
            file.replace(target / file.name)
    flush_folder(str(target))


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep a folder for this process; other processes of this machine that ask are refused.

    The lock is the file ``.<name>.lock`` beside the folder, locked by the operating system, which frees it when the process ends,
    however it ends. Where the file system has no locks, a warning says so. Other machines are not kept out of a shared folder.

    Raises:
        RuntimeError: another process uses the folder; names it.
        OSError: the folder cannot be there, or not be written.
    """
    target = folder.expanduser().resolve()
    file = target.with_name(f".{target.name}.lock")
    with contextlib.ExitStack() as ends:
        with _refused(folder):
            descriptor = _locked(file, folder)
            ends.callback(os.close, descriptor)
            ends.callback(file.unlink, missing_ok=True)
            os.write(descriptor, f"process {os.getpid()}".encode())
        yield


@contextlib.contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Say of a folder that it cannot be used, whichever step towards that failed."""
    try:
        yield
    except OSError as error:
        place = folder.expanduser()
        if file := next((path for path in place.parents if os.path.lexists(path) and not path.is_dir()), None):
            raise OSError(f"{folder} cannot be made, because {file} is a file: choose another folder.") from error
        raise OSError(f"{folder} cannot be written ({error.strerror}): choose another folder.") from error


def _locked(file: Path, folder: Path) -> int:
    """Descriptor of the file, locked."""
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    while (descriptor := _try_lock(file)) is None:
        if time.monotonic() > deadline:
            holder = file.read_text(encoding="utf-8") if file.exists() else "another process"
            raise RuntimeError(
                f"{folder} is in use by {holder or 'another process'}. Wait until it ends, or choose another folder."
            )
        time.sleep(0.05)
    return descriptor


def _try_lock(file: Path) -> int | None:
    """Descriptor of the locked file; None if somebody else has it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have removed the file meanwhile, and a third process may have made another.
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            os.truncate(descriptor, 0)
            return descriptor
    except BlockingIOError:
        pass
    except OSError as error:
        logger.warning("%s cannot be locked (%s): take care that only one process uses the folder.", file, error)
        return descriptor
    os.close(descriptor)
    return None


@contextlib.contextmanager
def os_errors(url: str) -> Iterator[None]:
    """Add the URL to errors of remote storage, and turn those of S3's client that are no `OSError` into one.

    Errors of a local disk name their path already.
    """
    if is_local(url):
        yield
        return
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(redact(f"{url} was not found: {error}.")) from error
    except PermissionError as error:
        raise PermissionError(redact(f"{url} was refused: {error}. Check the credentials and their rights.")) from error
    except _client_errors() as error:
        raise OSError(redact(f"{url} could not be reached: {error}.")) from error


def _client_errors() -> tuple[type[Exception], ...]:
    # botocore raises errors of its own for missing credentials and lost connections. Where it is not loaded, it raised none.
    module = sys.modules.get("botocore.exceptions")
    return (OSError,) if module is None else (OSError, module.BotoCoreError, module.ClientError)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)  # `Path.open` refuses folders
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
