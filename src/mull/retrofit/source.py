"""Where a model comes from: a folder, a GGUF file or a name on the Hugging Face Hub, and its configuration and tokenizer."""

import copy
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mull.data.arithmetic import CHARACTERS
from mull.retrofit.reading import read_config, read_tokenizer
from mull.runtime import storage
from mull.runtime.arguments import require
from mull.runtime.progress import Progress

GGUF = ".gguf"
LARGE = 20_000_000
"""Bytes of a GGUF file that is announced before it is read."""

TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
"""Files of which a folder with a tokenizer has one; without any, what transformers says depends on the architecture."""

EXPORTS = ("model", "trunk")
"""Folders of a finished run that hold a model."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class Source(NamedTuple):
    """A model as transformers finds it."""

    name: str
    """A folder, or a name on the hub."""

    options: dict[str, Any]
    """Keywords of transformers' ``from_pretrained``: ``gguf_file`` for a GGUF file."""


def find_source(written: str | os.PathLike[str], **options: Any) -> Source:
    """Turn what a user wrote into what transformers takes.

    Args:
        written: A folder, a ``.gguf`` file, or a name on the hub. What exists on the disk comes before the hub.
        options: Keywords of transformers' ``from_pretrained``.

    Raises:
        TypeError: neither text nor a path.
        FileNotFoundError: a path that does not exist, or a folder without ``config.json``.
        ValueError: a URL of remote storage, or a file that is no GGUF.
    """
    require("The name of a model", written, (str, os.PathLike), "a folder, a .gguf file or a name on the hub")
    text = os.fspath(written)
    if not storage.is_local(text):
        raise ValueError(f"{text} cannot be read as a model: give a local folder, or a name on the Hugging Face Hub.")
    path = storage.local_path(text)
    if path.is_file():
        if path.suffix.lower() != GGUF:
            raise ValueError(f"{text} is a file: give the folder that holds config.json, or a {GGUF} file.")
        return Source(str(path.parent), {**options, "gguf_file": path.name})
    if path.is_dir():
        if not (path / "config.json").exists() and (path / "model" / "config.json").exists():
            raise ValueError(f"{text} is the folder of a run: give the model in it, {path / 'model'}.")
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() == GGUF)
        if files and "gguf_file" not in options and not (path / "config.json").exists():
            raise ValueError(f"{text} has no config.json, but GGUF files: give one of them, such as {path / files[0]}.")
        if not (path / "config.json").exists() and not options.keys() & {"gguf_file", "subfolder"}:
            raise FileNotFoundError(f"{text} has no config.json: give the folder of a checkpoint.")
        return Source(str(path), options)
    if isinstance(written, str) and _HUB_NAME.fullmatch(text):
        return Source(text, options)
    raise FileNotFoundError(f"There is no model at {text}. {_origin(path)}")


def _origin(path: Path) -> str:
    """Which run writes a model to this path."""
    if path.name not in EXPORTS or not path.parent.name:
        return "Check the path."
    run = path.parent.name
    recipes = [recipe for folder in ("runs", ".") if (recipe := Path(folder) / f"{run}.yaml").is_file()]
    command = f"mull train {recipes[0]}" if recipes else f"mull train with the recipe of run.name={run}"
    return f"The run {run} writes it when it is finished: {command}."


def load_config(source: Source, hub_options: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a model.

    Raises:
        OSError: no model there.
        RuntimeError: a GGUF file without the package that reads it.
    """
    gguf = source.options.get("gguf_file")
    try:
        if gguf is None:
            return read_config(source.name, **hub_options)
        file = Path(source.name) / gguf
        if not file.is_file():
            return read_config(source.name, **hub_options, gguf_file=gguf)
        return copy.deepcopy(_gguf_config(file, file.stat().st_mtime_ns))
    except ImportError:
        raise RuntimeError(f"{gguf} needs a package that is missing: pip install 'mull[gguf]'.") from None
    except OSError as error:
        if Path(source.name).is_dir():
            raise
        raise OSError(
            f"{source.name} is no local folder, and cannot be loaded from the Hugging Face Hub: {' '.join(str(error).split())}"
        ) from None


@functools.lru_cache(maxsize=1)
def _gguf_config(file: Path, _changed: int) -> PreTrainedConfig:
    """Transformers takes ten seconds for it, and everything that loads a model needs it."""
    if (size := file.stat().st_size) > LARGE:
        Progress(None, "file").say(f"Reading {file} ({size / 1e9:.1f} GB): transformers takes half a minute or more.")
    return read_config(str(file.parent), gguf_file=file.name)


def load_tokenizer(written: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        OSError: no model there.
        ValueError: a model without a tokenizer.
    """
    source = find_source(written)
    load_config(source, {})  # its error about a place that is not a checkpoint is clearer
    folder = Path(source.name)
    files = [file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)]
    if files or "gguf_file" in source.options or not folder.is_dir():
        tokenizer = read_tokenizer(source.name, **source.options)
        if tokenizer(CHARACTERS)["input_ids"]:  # transformers makes an empty one if files are missing
            return tokenizer
    raise ValueError(f"{written} has no tokenizer: save the model's own beside it, with tokenizer.save_pretrained.")
