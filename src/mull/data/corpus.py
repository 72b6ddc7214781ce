"""Documents to train on: the Python standard library, which every machine has, or a user's own text files."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",  # code pages: tables of numbers
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
MIN_BYTES, MAX_BYTES = 500, 200_000
HELD_OUT_EVERY = 20
"""One file in this many is held out."""

TEXT_SUFFIXES = frozenset({".jsonl", ".md", ".py", ".txt"})
"""What a folder is searched for. A file that is named itself may have any suffix."""


class Document(NamedTuple):
    """One text that is read on its own."""

    name: str
    """Where it comes from: a path, for a line of a ``.jsonl`` file with its number."""

    text: str


class Corpus(NamedTuple):
    """Documents, split by file: no file is in both parts."""

    train: list[Document]
    held_out: list[Document]


def load_stdlib() -> Corpus:
    """Read the sources of the running Python's standard library.

    Tests, caches, installed packages, code pages, machine-specific files and very small or large files are left out. A
    file is held out when the hash of its path says so, hence on every machine and in every version alike; it is about
    one in twenty.

    Returns:
        Documents sorted by path, named by their path inside the library. Files that are not UTF-8 are left out.

    Raises:
        FileNotFoundError: this Python comes without the sources of its library, as some zipped ones do.
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
            f"{root} does not hold the sources of the standard library. Use a Python installation that has them, or "
            "load your own files with mull.data.corpus.load_text_files."
        )
    return corpus


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        # Pruned before they are entered: installed packages can be many thousand files.
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not _is_machine_specific(name)]
        yield from (Path(folder, name) for name in files if name.endswith(".py") and not _is_machine_specific(name))


def _is_machine_specific(name: str) -> bool:
    return name.startswith(("_sysconfigdata", "config-"))


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0


def load_text_files(paths: Iterable[str | Path]) -> list[Document]:
    """Read a user's own files.

    Args:
        paths: Files and folders. A folder is searched, in sorted order, for ``.py``, ``.txt``, ``.md`` and ``.jsonl``
            files. Each line of a ``.jsonl`` file is a document with its text under the key ``text``; any other file is
            one document.

    Returns:
        The documents that are not blank, in the order of `paths`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is not UTF-8, a line of a ``.jsonl`` file has no ``text``, or nothing is left to read.
    """
    given = [Path(path) for path in paths]
    documents = []
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give text files, .jsonl files or folders that hold them.")
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES) if path.is_dir() else [path]
        documents += [document for file in files for document in _read(file) if document.text.strip()]
    if not documents:
        where = ", ".join(map(str, given)) or "an empty list of paths"
        raise ValueError(
            f"There is no text in {where}: at least one document must not be blank "
            f"(folders are searched for {', '.join(sorted(TEXT_SUFFIXES))})."
        )
    return documents


def _read(file: Path) -> list[Document]:
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not valid UTF-8 (byte {error.start}): convert it, or leave it out.") from None
    if file.suffix != ".jsonl":
        return [Document(str(file), text)]
    # Not splitlines(): a JSON string may hold other line separators of Unicode as they are.
    lines = enumerate(text.split("\n"), start=1)
    return [Document(f"{file}:{number}", _text_of(line, file, number)) for number, line in lines if line.strip()]


def _text_of(line: str, file: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number} is not JSON ({error.msg}): each line must be an object.") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = (
            f"the keys {', '.join(record) or '(none)'}" if isinstance(record, dict) else f"a {type(record).__name__}"
        )
        raise ValueError(f'{file}, line {number} has {found}: each line must be an object with a string under "text".')
    return record["text"]


def subsample(documents: Sequence[Document], max_bytes: int, seed: int = 0) -> list[Document]:
    """Draw documents at random until `max_bytes` of UTF-8 text are full.

    Args:
        documents: What to draw from, without replacement. A drawn document that does not fit any more is passed over.
        max_bytes: Upper bound of the total size.
        seed: Equal seeds draw equal documents from equal lists.

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
