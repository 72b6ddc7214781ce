"""Files on a local disk or in an object store, by one name: a path, ``file://…``, ``s3://…`` or any other URL of fsspec.

Credentials, region and endpoint of S3 come from the usual environment (``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_PROFILE``, ``AWS_ENDPOINT_URL``). Every function raises `OSError`, or `FileNotFoundError` where a file is missing, with a
sentence that names the URL; `ValueError` where the URL itself is wrong; `RuntimeError` where a package is missing.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

OPTIONS: dict[str, Any] = {"use_listings_cache": False}
"""How to open a file system of fsspec: without a cached listing, because other processes write, too."""

PARTIAL = ".partial"
"""Suffix of a local file that is being written."""

_EXTRAS = {"s3": "s3", "s3a": "s3"}
_PATTERN = frozenset("*?[]")


def join(url: str, *names: str) -> str:
    """Append names to a folder's URL."""
    return "/".join([url.rstrip("/"), *names])


def is_local(url: str) -> bool:
    """Whether the URL is a path or ``file://``."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """Path behind a local URL; ``~`` is the home folder."""
    return Path(url.removeprefix("file://")).expanduser()


def check_url(url: str) -> None:
    """Refuse a URL that no file system understands, before anything is read or written.

    Raises:
        ValueError: the URL is empty, its protocol is unknown, or a remote name holds one of ``* ? [ ]``, which fsspec expands.
    """
    if not url.strip():
        raise ValueError("The URL is empty: give a path, file://… or s3://bucket/folder.")
    if is_local(url):
        return
    protocol = url.split("://", 1)[0]
    if protocol not in fsspec.available_protocols():
        raise ValueError(
            f"{url}: the protocol {protocol}:// is not known. Give a path, file://… or s3://bucket/folder."
        )
    if _PATTERN & set(url):
        raise ValueError(f"{url} holds one of * ? [ ], which stand for patterns. Choose another name for the folder.")


def filesystem(url: str) -> AbstractFileSystem:
    """The file system of fsspec that serves a URL.

    Raises:
        RuntimeError: the package behind the protocol is missing; names the extra that installs it.
    """
    check_url(url)
    protocol = "file" if is_local(url) else url.split("://", 1)[0]
    try:
        return fsspec.filesystem(protocol, **OPTIONS)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'mull[{extra}]'" if extra else f"{error}"
        raise RuntimeError(f"{url} needs a package that is not installed: {remedy}.") from None


def exists(url: str) -> bool:
    """Whether there is a file or folder. A store that does not answer is an error, never a no."""
    if is_local(url):
        return local_path(url).exists()
    files = filesystem(url)
    with os_errors(url):
        try:
            files.info(url)
        except FileNotFoundError:
            return False
    return True


def list_names(folder: str) -> list[str]:
    """Names of the files and folders in a folder, sorted; none when there is no such folder."""
    if is_local(folder):
        path = local_path(folder)
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    files = filesystem(folder)
    with os_errors(folder):
        try:
            entries = files.ls(folder, detail=False)
        except FileNotFoundError:
            return []
    return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries})


def read_bytes(url: str) -> bytes:
    """Read a file whole."""
    if is_local(url):
        return local_path(url).read_bytes()
    files = filesystem(url)
    with os_errors(url):
        return bytes(files.cat_file(url))


def read_text(url: str) -> str:
    """Read a file of UTF-8 text whole."""
    return read_bytes(url).decode("utf-8")


def write_text_atomic(url: str, text: str) -> None:
    """Write a file of UTF-8 text so that readers and crashes see either none of it or all of it.

    On a local disk the text goes to another name, is flushed and renamed, and the rename is flushed; the folder must exist.
    An object store takes it in one request.
    """
    if not is_local(url):
        files = filesystem(url)
        with os_errors(url):
            files.pipe_file(url, text.encode("utf-8"))
        return
    path = local_path(url)
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8")
        _flush(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def make_folder(url: str) -> None:
    """Make a folder and those above it. In S3 folders come with their files: only the bucket is looked for.

    Raises:
        FileNotFoundError: the bucket does not exist. It is not made, the name may be a slip.
    """
    if is_local(url):
        local_path(url).mkdir(parents=True, exist_ok=True)
        return
    files = filesystem(url)
    with os_errors(url):
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
    """Remove a folder and all it holds, or a file; nothing happens when there is none."""
    if is_local(url):
        path = local_path(url)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    files = filesystem(url)
    with os_errors(url), contextlib.suppress(FileNotFoundError):
        files.rm(url, recursive=True)


def flush_folder(url: str) -> None:
    """Make the files of a local folder, their names and the folder's own name survive a power failure.

    Object stores answer a write when it is durable, so there is nothing to do.
    """
    if not is_local(url):
        return
    path = local_path(url)
    for file in path.iterdir():
        _flush(file)
    _flush(path)
    _flush(path.absolute().parent)


@contextlib.contextmanager
def os_errors(url: str) -> Iterator[None]:
    """Give errors of remote storage the URL, and those that S3's client raises beside `OSError` that type, too.

    Errors of a local disk name their path themselves.
    """
    if is_local(url):
        yield
        return
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} was not found: {error}.") from error
    except PermissionError as error:
        raise PermissionError(f"{url} was refused: {error}. Check the credentials and their rights.") from error
    except _client_errors() as error:
        raise OSError(f"{url} could not be reached: {error}.") from error


def _client_errors() -> tuple[type[Exception], ...]:
    """`OSError`, and what botocore raises for missing credentials and lost connections, where it is loaded."""
    module = sys.modules.get("botocore.exceptions")
    return (OSError,) if module is None else (OSError, module.BotoCoreError, module.ClientError)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
