"""Documents and records from files, S3 and Hugging Face datasets.

A *source* is one of

* a file or folder: a path, ``file://…``, ``s3://bucket/…`` or another URL that fsspec knows. A ``.jsonl`` or ``.ndjson`` file
  has one JSON object per line, a ``.json`` file a list of them or also one per line, any other file one text. Files that end in
  ``.gz`` are unpacked. Endings may be in capitals;
* ``hf:…``, read by the datasets library: a folder that its `save_to_disk` wrote or one ``.parquet``, ``.arrow`` or ``.csv`` file,
  both also by URL; a local folder that its `load_dataset` understands; or else the name of a dataset on the hub.

A *record* is a dictionary with the place that it was read from. Everything is read into memory.

The datasets library is an extra: it installs 260 MB and takes 0.7 s to import, for files that forty lines here read; and its
errors about a bad line name neither the file nor the line.
"""

import contextlib
import glob
import gzip
import json
import logging
import re
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mull.runtime import storage
from mull.runtime.arguments import require, shown
from mull.runtime.progress import tracked

DATASET = "hf:"
"""Prefix of a source that the datasets library reads."""

ALL = "all"
"""Name for all splits of a dataset, joined."""

LINE_SUFFIXES = frozenset({".jsonl", ".ndjson"})
TEXT_SUFFIXES = LINE_SUFFIXES | {".md", ".py", ".txt"}
"""Files to look for in a folder, also with ``.gz``. A file that is given itself may have any suffix. Files and folders with names
that begin with a dot are left out: ``.venv``, ``.git``, and the ``._a.txt`` that macOS writes beside ``a.txt``."""

RECORD_SUFFIXES = LINE_SUFFIXES | {".json"}
TABLE_BUILDERS = {".arrow": "arrow", ".csv": "csv", ".parquet": "parquet"}
SAVED_MARKERS = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes: the first for several splits, the second for a single dataset."""


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Document(NamedTuple):
    """One text, and the path or URL that it comes from; for one record of many also its number."""

    name: str
    text: str


class Record(NamedTuple):
    """One JSON object or one row of a dataset."""

    place: str
    """``file:line``, or ``file:item`` in a list, counted from 1; ``source:row`` in a dataset, from 0."""

    fields: dict[str, Any]


def load_documents(
    sources: Iterable[str | Path], *, key: str = "text", split: str | None = None, config: str | None = None
) -> list[Document]:
    """Read texts.

    Args:
        sources: Files, folders, URLs and datasets, as above. Folders are searched, in sorted order, for ``.py``, ``.txt``,
            ``.md``, ``.jsonl`` and ``.ndjson`` files, also with ``.gz``, but not for hidden ones.
        key: Key of a record's text.
        split: Split of the datasets among the sources, such as ``train``; ``all`` joins them. Optional if there is only one.
        config: Configuration of the datasets among the sources, for those on the hub that have several.

    Returns:
        The documents that are not blank, in the order of `sources`.

    Raises:
        TypeError: `sources` is no list of texts or paths.
        FileNotFoundError: a source does not exist.
        ValueError: a file is not UTF-8, a record has no string under `key`, `split` or `config` does not apply or does not exist,
            or nothing is left to read.
        ConnectionError: the Hugging Face Hub cannot be reached.
        RuntimeError: a package is missing; the message names the extra that installs it.
    """
    if isinstance(sources, str | Path):
        raise TypeError(f"sources is {shown(sources)}: give a list of sources.")
    given = [_written(source) for source in sources]
    if not any(source.startswith(DATASET) for source in given):
        _refuse_dataset_options(", ".join(given), split, config)
    found = (
        document
        for source in given
        for document in (
            _dataset_texts(source, key, split, config) if source.startswith(DATASET) else _file_texts(source, key)
        )
    )
    documents = [document for document in tracked(found, "document", "reading") if document.text.strip()]
    if not documents:
        where = ", ".join(given) or "an empty list of paths"
        raise ValueError(
            f"There is no text in {where}: at least one document must not be blank "
            f"(folders are searched for {', '.join(sorted(TEXT_SUFFIXES))})."
        )
    return documents


def read_records(
    source: str | Path, *, split: str | None = None, config: str | None = None, columns: Collection[str] | None = None
) -> Iterator[Record]:
    """Read records one by one.

    Args:
        source: As above. Files must be ``.jsonl`` or ``.json``; folders are searched for ``.jsonl``.
        split: As in `load_documents`.
        config: As in `load_documents`.
        columns: Keys that are needed. Other columns of a dataset are not decoded.

    Raises:
        ValueError: as in `load_documents`, or a file is of another kind.
        FileNotFoundError, ConnectionError, RuntimeError: as in `load_documents`.
    """
    source = _written(source)
    if source.startswith(DATASET):
        yield from _dataset_records(source, split, config, columns)
        return
    _refuse_dataset_options(source, split, config)
    files = list(_files(source, LINE_SUFFIXES))
    if not files:
        raise ValueError(f"There are no .jsonl files in {source}: records are read from .jsonl and .json files.")
    for name, content in files:
        if _suffix(name) not in RECORD_SUFFIXES:
            raise ValueError(f"{name} has no records: give a .jsonl or .json file, or a dataset as {DATASET}….")
        yield from _records_of(name, content)


def _written(source: str | Path) -> str:
    require("A source", source, (str, Path), "a path, a URL or hf:…")
    return str(source)


def string_field(record: Record, key: str) -> str:
    """The string under `key`.

    Raises:
        ValueError: there is none; the message names the place, and the keys that the record has.
    """
    value = record.fields.get(key)
    if not isinstance(value, str):
        found = f"{type(value).__name__} under {key!r}" if key in record.fields else "the keys " + _names(record.fields)
        raise ValueError(f"{record.place} has {found}: each record must have a string under {key!r}.")
    return value


def _names(keys: Iterable[str]) -> str:
    return ", ".join(keys) or "(none)"


def _refuse_dataset_options(source: str, split: str | None, config: str | None) -> None:
    for name, value in (("split", split), ("config", config)):
        if value is not None:
            raise ValueError(
                f"{name}={value!r} is for datasets, but {source} does not begin with {DATASET}: leave {name} out."
            )


def _file_texts(source: str, key: str) -> Iterator[Document]:
    for name, content in _files(source, TEXT_SUFFIXES):
        if _suffix(name) in RECORD_SUFFIXES:
            yield from (Document(record.place, string_field(record, key)) for record in _records_of(name, content))
        else:
            yield Document(name, content)


def _dataset_texts(source: str, key: str, split: str | None, config: str | None) -> Iterator[Document]:
    records = _dataset_records(source, split, config, [key])
    return (Document(record.place, string_field(record, key)) for record in records)


def _files(source: str, suffixes: Collection[str]) -> Iterator[tuple[str, str]]:
    """Name and text of a file, or of the files with these suffixes in a folder."""
    if not storage.exists(source):
        raise FileNotFoundError(f"{source} does not exist: give a file that does, or a folder of files.")
    names = _names_in(source)
    if names is not None:
        root = len(source.rstrip("/")) + 1
        names = [name for name in names if not any(part.startswith(".") for part in name[root:].split("/"))]
    for name in [source] if names is None else [name for name in names if _suffix(name) in suffixes]:
        yield name, _decode(name, storage.read_bytes(name))


def _names_in(source: str) -> list[str] | None:
    """All files below a folder, sorted folder by folder; None for a file."""
    filesystem = storage.filesystem(source)
    root = filesystem._strip_protocol(str(storage.local_path(source)) if storage.is_local(source) else source)
    with storage.os_errors(source):
        if not filesystem.isdir(root):
            return None
        found = sorted(filesystem.find(root), key=lambda path: path.split("/"))
    return [storage.join(source, path[len(root) :].lstrip("/")) for path in found]


def _suffix(name: str) -> str:
    return PurePosixPath(name.lower().removesuffix(".gz")).suffix


def _decode(name: str, content: bytes) -> str:
    if name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{name} is not a complete gzip file: {error}.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{name} is not valid UTF-8 in line {line} (byte {error.start}): convert it, or leave it out. Give tables such as "
            f".parquet as {DATASET}{name}."
        ) from None


def _records_of(name: str, text: str) -> Iterator[Record]:
    if _suffix(name) == ".json" and not _has_lines(text):
        content = _parse(name, text)
        if not isinstance(content, list):
            raise ValueError(
                f"{name} has a {type(content).__name__}: a .json file must be a list of objects, or have one object per line."
            )
        values: Iterable[tuple[int, Any]] = enumerate(content, start=1)
    else:
        # Not splitlines(), which also splits at Unicode line separators: these are allowed inside a JSON string.
        lines = enumerate(text.split("\n"), start=1)
        values = ((number, _parse(f"{name}:{number}", line)) for number, line in lines if line.strip())
    for number, value in values:
        if not isinstance(value, dict):
            raise ValueError(f"{name}:{number} has a {type(value).__name__}: each record must be an object.")
        yield Record(f"{name}:{number}", value)


def _has_lines(text: str) -> bool:
    """Whether the first line is a whole object and another one follows."""
    first, _, rest = text.strip().partition("\n")
    return first.startswith("{") and first.rstrip().endswith("}") and rest.lstrip().startswith("{")


def _parse(place: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = place if error.lineno == 1 else f"{place}:{error.lineno}"
        raise ValueError(f"{where} is not JSON ({error.msg}): each record must be an object.") from None
    except ValueError:
        raise ValueError(f"{place} has a number of more than {sys.get_int_max_str_digits():,} digits.") from None
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply.") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{place} has half of a surrogate pair, such as \\ud83d without its other half, which is no character: repair or "
                "remove the record."
            ) from None
    return value


def _dataset_records(
    source: str, split: str | None, config: str | None, columns: Collection[str] | None
) -> Iterator[Record]:
    rows = _load_dataset(source, split, config)
    known = set(rows.column_names) & set(rows.column_names if columns is None else columns)
    if known:  # otherwise keep all columns, because the error message names them
        rows = rows.select_columns([name for name in rows.column_names if name in known])
    return (Record(f"{source}:{number}", row) for number, row in enumerate(rows))


def _load_dataset(source: str, split: str | None, config: str | None) -> Any:
    """One `datasets.Dataset`."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise RuntimeError(f"{source} needs the datasets library: pip install 'mull[data]'.") from None
    name = source.removeprefix(DATASET)
    if storage.is_local(name) and storage.exists(name):
        name = str(storage.local_path(name))
    try:
        with _quiet(datasets), contextlib.nullcontext() if storage.is_local(name) else storage.os_errors(name):
            return _find_dataset(datasets, name, split, config)
    except ConnectionError as error:
        raise ConnectionError(
            f"{source} is no local path, and the Hugging Face Hub cannot be reached ({_flat(error)}): check the path or the "
            f"connection, or give {DATASET} and a folder that save_to_disk wrote."
        ) from None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source} cannot be read: {_flat(error)}") from None
    except OSError as error:
        raise OSError(f"{source} cannot be read: {_flat(error)}") from None
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{source} cannot be read: {_flat(error.__cause__ or error)}") from None


def _find_dataset(datasets: Any, name: str, split: str | None, config: str | None) -> Any:
    if any(storage.exists(storage.join(name, marker)) for marker in SAVED_MARKERS):
        if config is not None:
            raise ValueError(f"config={config!r} is for datasets of the hub, not for one that save_to_disk wrote.")
        return _pick(datasets, datasets.load_from_disk(name), split)
    suffix = PurePosixPath(name.lower()).suffix
    if suffix in TABLE_BUILDERS and storage.exists(name):
        files = glob.escape(name) if storage.is_local(name) else name  # the library reads patterns
        place: dict[str, Any] = {"path": TABLE_BUILDERS[suffix], "data_files": files}
    elif not storage.is_local(name):
        tables = ", ".join(TABLE_BUILDERS)
        raise FileNotFoundError(f"a URL must be a folder that save_to_disk wrote, or one file ({tables}), that exists.")
    else:
        place = {"path": name}
    if split is None:
        # Asked first, so that an error comes before any download.
        (split,) = _only(datasets.get_dataset_split_names(config_name=config, **place))
    return datasets.load_dataset(name=config, split=split, **place)


def _pick(datasets: Any, saved: Any, split: str | None) -> Any:
    """The split of what `save_to_disk` wrote."""
    if isinstance(saved, datasets.Dataset):
        if split not in (None, ALL):
            raise ValueError(f"it is one dataset without splits, so split={split!r} does not exist: leave split out.")
        return saved
    if split == ALL:
        return datasets.concatenate_datasets(list(saved.values()))
    if split is None:
        (split,) = _only(list(saved))
    if split not in saved:
        raise ValueError(f"there is no split {split!r}: known are {_names(saved)}, and {ALL}.")
    return saved[split]


def _only(splits: list[str]) -> list[str]:
    if len(splits) != 1:
        raise ValueError(f"it has the splits {_names(splits)}: choose one with split, or {ALL}.")
    return splits


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Hide progress bars and messages about retries. Both are settings of the process, which are restored."""
    bars_shown = not datasets.are_progress_bars_disabled()
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    datasets.disable_progress_bars()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)
        if bars_shown:
            datasets.enable_progress_bars()
