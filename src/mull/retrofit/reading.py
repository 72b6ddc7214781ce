"""Read the configuration and the tokenizer of a checkpoint, from a folder or the hub, and what its weight files hold.

transformers asks on standard input whether to run code that a checkpoint brings (``auto_map``), and runs it if a pipe says yes.
Here nothing asks: such code does not run unless ``trust_remote_code=True`` is given by name.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

TRUST = "trust_remote_code"
"""Option of transformers' ``from_pretrained``: whether to run Python code of the checkpoint."""

NO_CODE: dict[str, Any] = {TRUST: False}
"""What every ``from_pretrained`` of transformers is given first."""

ADDED = ("mtp_heads.", "model.mtp.", "mtp.", "model.etd.", "model.attention_gates.")
"""How the names of parts begin that may be missing: they start as if they were not there."""

NAMES_SHOWN = 8
"""Names that an error lists before it counts the rest."""

JSON_FILES = ("config", "generation_config", "tokenizer", "tokenizer_config", "model.safetensors.index")


def read_config(name_or_dir: str, **options: Any) -> PreTrainedConfig:
    """Configuration of a checkpoint.

    Args:
        name_or_dir: Directory or hub name.
        options: Passed to ``AutoConfig.from_pretrained``.

    Raises:
        OSError: no checkpoint at `name_or_dir`.
        ValueError: a file is damaged (names it), or the checkpoint needs code of its own.
    """
    with explained(name_or_dir):
        config: PreTrainedConfig = AutoConfig.from_pretrained(name_or_dir, **NO_CODE | options)
    return config


def read_tokenizer(name_or_dir: str, **options: Any) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint.

    Raises:
        OSError, ValueError: as in `read_config`.
    """
    with explained(name_or_dir), TokenizersErrors():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name_or_dir, **NO_CODE | options)
    return tokenizer


@contextlib.contextmanager
def explained(name_or_dir: str, weights: bool = False) -> Iterator[None]:
    """Say which file of a folder is damaged, before transformers reads them; and what to do about code of a checkpoint.

    Args:
        name_or_dir: Directory or hub name.
        weights: Whether they are read, too.

    Raises:
        ValueError: a file is damaged, values of the configuration do not fit, or the checkpoint needs code of its own.
    """
    folder = Path(name_or_dir)
    for name in JSON_FILES if folder.is_dir() else ():
        _check_json(folder / f"{name}.json")
    for file in sorted(folder.glob("*.safetensors")) if weights else ():
        _check_weights(file)
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(
            f"The configuration of {name_or_dir}, with what was given beside it, has values that do not fit: "
            f"{' '.join(str(error).split())}"
        ) from None
    except (AttributeError, LookupError, TypeError) as error:
        if "__init__() got an unexpected keyword" in str(error):
            option = str(error).rpartition(" ")[-1]
            raise TypeError(
                f"{option} is no option of from_pretrained, and no field of the configuration of {name_or_dir}."
            ) from None
        raise ValueError(
            f"{name_or_dir} has a file that transformers cannot read: {error!r}. Fetch it again."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{name_or_dir} has weights of other shapes than its configuration, with what was given beside it, says: give "
            "the settings that it was saved with. If you gave none, its files belong to different models: fetch it again."
        ) from error
    except ValueError as error:
        if TRUST not in str(error):
            raise
        raise ValueError(
            f"{name_or_dir} brings Python code of its own, which mull does not run. Use a checkpoint of an architecture that "
            f"transformers has, or, if you trust the code, call mull.from_pretrained with {TRUST}=True."
        ) from None


class TokenizersErrors(contextlib.AbstractContextManager[None]):
    """Turn what the tokenizers library raises, which is a bare `Exception`, into an `OSError`."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is Exception:
            raise OSError(str(error)) from error


def _check_json(file: Path) -> None:
    try:
        content = json.loads(file.read_bytes()) if file.exists() else {}
        if not isinstance(content, dict):
            raise ValueError(f"it has a {type(content).__name__} instead of an object")
        if content and file.name == "tokenizer.json" and not isinstance(content.get("model"), dict):
            raise ValueError("it describes no tokenizer")
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}. Fetch it again.") from None


def _check_weights(file: Path) -> None:
    """Its header, and that it has as many bytes as that says."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}. Fetch it again.") from None


def read_weight_map(folder: Path) -> dict[str, str]:
    """The file of every tensor of a checkpoint.

    Raises:
        FileNotFoundError: no weights in safetensors.
        ValueError: ``model.safetensors``, which transformers reads first, has a tensor that the index beside it has elsewhere.
    """
    # Not `get_local_safetensors_metadata`: beside a model.safetensors it ignores the index, which an export adds.
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    whole = dict.fromkeys(tensors_in(single), SAFE_WEIGHTS_NAME) if single.is_file() else {}
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if elsewhere := [name for name in whole if weight_map.get(name) != SAFE_WEIGHTS_NAME]:
            raise ValueError(
                f"{single} and {index} disagree where {listed(elsewhere)} is: delete the one that belongs to another model."
            )
        return weight_map
    if whole:
        return whole
    raise FileNotFoundError(
        f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}: its weights have to be in safetensors."
    )


def tensors_in(file: Path) -> dict[str, Any]:
    """`huggingface_hub`'s description of every tensor in a safetensors file, from its header."""
    try:
        return parse_local_safetensors_file_metadata(file).tensors
    except SafetensorsParsingError:
        raise ValueError(f"{file} is not a safetensors file, or is truncated. Fetch it again.") from None


@contextlib.contextmanager
def opened(file: str | Path) -> Iterator[Any]:
    """A safetensors file, to read some of its tensors.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with safe_open(file, "pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}. Fetch it again.") from error


def listed(names: Iterable[str]) -> str:
    """Names for an error: the first eight, and how many more there are."""
    shown = sorted(names)
    rest = f" and {len(shown) - NAMES_SHOWN} more" if len(shown) > NAMES_SHOWN else ""
    return ", ".join(shown[:NAMES_SHOWN]) + rest
