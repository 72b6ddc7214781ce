"""The tensors of a source that is to be converted, of which none is read before it is needed."""

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from mull.model.configuration import MullConfig
from mull.retrofit.reading import explained, listed, opened, read_weight_map, tensors_in
from mull.retrofit.source import find_source, load_config
from mull.runtime.arguments import require

COMPANIONS = (
    *(
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "*.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
    ),
    *("additional_chat_templates", GENERATION_CONFIG_NAME, "LICENSE*", "NOTICE*"),
)
"""Files of a checkpoint that are copied as they are."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FREQUENCIES = "rotary_emb.inv_freq"
"""In names of tensors of old checkpoints, which are computed from the configuration now. transformers ignores them, too."""


class Weights(NamedTuple):
    """A source and its tensors, of which none has been read."""

    config: PreTrainedConfig
    tensors: dict[str, Tensor]
    """On the meta device."""

    read: Callable[[Sequence[str]], dict[str, Tensor]]
    generation_config: GenerationConfig | None
    folder: Path | None
    """None for a model in memory."""

    ignored: tuple[str, ...] = ()
    """Names of tensors that are not used."""


def open_weights(source: str | os.PathLike[str] | PreTrainedModel) -> Weights:
    """Find a source's tensors, without reading them.

    Raises:
        OSError, ValueError: no checkpoint in safetensors there.
    """
    if isinstance(source, PreTrainedModel):
        _require_backbone(source.config)
        if not isinstance(getattr(source, "lm_head", None), nn.Linear):
            raise ValueError(f"{type(source).__name__} has no language-model head. Load it with AutoModelForCausalLM.")
        state = source.state_dict()
        if any(tensor.is_meta for tensor in state.values()):
            raise ValueError("The source has weights on the meta device, which have no values: load it first.")
        specs = {name: tensor.to("meta") for name, tensor in state.items()}
        config = source.config.get_text_config()
        return Weights(config, specs, lambda names: {n: state[n] for n in names}, source.generation_config, None)
    require("source", source, (str, os.PathLike), "a folder, a name on the hub or a model of transformers")
    found = find_source(source)
    if "gguf_file" in found.options:
        raise ValueError(f"{source} is a GGUF file: give the checkpoint in safetensors that it was made from.")
    config = load_config(found, {})
    _require_backbone(config)
    folder = Path(found.name)
    if not folder.is_dir():
        wanted = ["*.safetensors", SAFE_WEIGHTS_INDEX_NAME, "config.json", *COMPANIONS]
        folder = Path(snapshot_download(found.name, allow_patterns=wanted))
    with explained(str(folder), weights=True):
        files = read_weight_map(folder)
        headers = {file: tensors_in(folder / file) for file in sorted(set(files.values()))}
    # transformers loads them, in an order that decides which of two of one name counts.
    extra = {f"{name} in {file}" for file, header in headers.items() for name in header if files.get(name) != file}
    if extra := {name for name in extra if FREQUENCIES not in name}:
        raise ValueError(
            f"{folder} has tensors that its index lists in no or another file: {listed(extra)}. Fetch it again."
        )
    ignored = tuple(sorted(name for name in files if FREQUENCIES in name))
    specs = {}
    for name, file in files.items():
        if name in ignored:
            continue
        if name in headers[file]:  # else it is reported as missing
            header = headers[file][name]
            if header.dtype not in DTYPES:
                raise ValueError(
                    f"{name} is in {header.dtype}: give a checkpoint in bf16 or fp32, not a quantized one."
                )
            specs[name] = torch.empty(tuple(header.shape), dtype=DTYPES[header.dtype], device="meta")

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in sorted({files[name] for name in names}):
            with opened(folder / file) as shard:
                tensors |= {name: shard.get_tensor(name) for name in names if files[name] == file}
        return tensors

    generation = folder / GENERATION_CONFIG_NAME
    return Weights(
        config.get_text_config(),
        specs,
        read,
        GenerationConfig.from_pretrained(str(folder)) if generation.is_file() else None,
        folder,
        ignored,
    )


def _require_backbone(config: PreTrainedConfig) -> None:
    """Refuse what mull has added to a model: the hybrid would be without it."""
    added = [name for name in ("etd", "mtp", "gated_attention") if getattr(config, name, None) is not None]
    if isinstance(config, MullConfig) and added:
        raise ValueError(
            f"The source has parts of mull that a conversion would drop ({', '.join(added)}): convert the backbone that they "
            "were added to, and add them to the hybrid."
        )


def companions(folder: Path) -> list[Path]:
    """What is copied as it is.

    Raises:
        FileNotFoundError: a link to nothing.
    """
    # Not `Path.glob`, which is silent about a broken link to a name without wildcards.
    found = sorted(file for file in folder.iterdir() if any(fnmatch(file.name, pattern) for pattern in COMPANIONS))
    if broken := [file for file in found if not file.exists()]:
        raise FileNotFoundError(f"{broken[0]} is a link to a file that is not there: fetch the source again.")
    return found
