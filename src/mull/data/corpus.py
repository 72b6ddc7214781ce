"""A corpus that every machine has: the sources of the Python standard library."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mull.data.sources import Document

INSTALLED_FOLDERS = frozenset({"__pycache__", "dist-packages", "site-packages"})
# encodings: code pages, which are tables of numbers
SKIPPED_FOLDERS = INSTALLED_FOLDERS | {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
MIN_BYTES, MAX_BYTES = 500, 200_000
HELD_OUT_EVERY = 20
"""One file in this many is held out."""


class Corpus(NamedTuple):
    """Documents, split by file."""

    train: list[Document]
    held_out: list[Document]


def load_stdlib() -> Corpus:
    """Read the sources of the running Python's standard library.

    Tests, caches, installed packages, code pages, machine-specific files, very small or large files and files that are not
    UTF-8 are left out. About one file in twenty is held out, by a hash of its path, so the same one on every machine and in
    every version.

    Returns:
        Documents sorted by path, named by their path inside the library.

    Raises:
        FileNotFoundError: this Python lacks the sources of its library, as some zipped installations do.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus = Corpus([], [])
    for path in sorted(_sources(root)):
        relative = path.relative_to(root)
        if not MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        part = corpus.held_out if _is_held_out(relative.as_posix()) else corpus.train
        part.append(Document(relative.as_posix(), text))
    if not corpus.train or not corpus.held_out:
        raise FileNotFoundError(
            f"{root} does not contain the sources of the standard library. Use a Python installation that has them, or "
            "load your own files with mull.data.sources.load_documents."
        )
    return corpus


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        # In place, so that os.walk does not enter them: installed packages can be many thousand files.
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not _is_machine_specific(name)]
        yield from (Path(folder, name) for name in files if name.endswith(".py") and not _is_machine_specific(name))


def _is_machine_specific(name: str) -> bool:
    return name.startswith(("_sysconfigdata", "config-"))


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0


def subsample(documents: Sequence[Document], max_bytes: int, seed: int = 0) -> list[Document]:
    """Draw documents at random, without replacement, up to `max_bytes` of UTF-8 text.

    A drawn document that no longer fits is skipped. Equal seeds draw equal documents from equal lists.

    Returns:
        The drawn documents in the order of `documents`.

    Raises:
        ValueError: no document is small enough.
    """
    drawn, left = [], max_bytes
    for index in np.random.default_rng(seed).permutation(len(documents)).tolist():
        size = len(documents[index].text.encode())
        if size <= left:
            drawn.append(index)
            left -= size
    if not drawn:
        raise ValueError(f"max_bytes={max_bytes} is smaller than each of the {len(documents)} documents: allow more.")
    return [documents[index] for index in sorted(drawn)]
