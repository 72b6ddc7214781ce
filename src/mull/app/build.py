"""Build what a recipe names: models, with or without weights, and objectives."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mull.app.recipe import ModelSection
from mull.model.base_model import MullConfig
from mull.model.causal_lm import MullForCausalLM
from mull.model.families import require_supported
from mull.retrofit.wrap import from_pretrained, wrap_transformer_with_etd

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Loader = Callable[[ModelSection, PreTrainedTokenizerBase], MullForCausalLM]
"""`load_model` or `meta_model`."""


def backbone_config(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Configuration of the checkpoint, or of the backbone with random weights."""
    if section.checkpoint is not None:
        config: PreTrainedConfig = AutoConfig.from_pretrained(section.checkpoint)
        return config
    assert section.architecture is not None
    fields = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **section.architecture,
    }
    return CONFIG_MAPPING[fields.pop("model_type")](**fields)


def load_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> MullForCausalLM:
    """Load the checkpoint, or make a model with random weights for the tokenizer's vocabulary; on the CPU.

    Raises:
        OSError: no checkpoint where one is named.
        ValueError: as in `mull.model.causal_lm.wrap_transformer_with_etd`.
    """
    dtype = DTYPES[section.dtype]
    if section.checkpoint is not None:
        return from_pretrained(section.checkpoint, etd=section.etd, mtp=section.mtp, dtype=dtype)
    base = AutoModelForCausalLM.from_config(backbone_config(section, tokenizer)).to(dtype)
    return wrap_transformer_with_etd(base, section.etd, section.mtp)


def meta_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> MullForCausalLM:
    """The same model without its weights, on the meta device.

    Raises:
        OSError: no checkpoint where one is named, or one without weights.
        ValueError: as in `load_model`.
    """
    config = backbone_config(section, tokenizer)
    _check_weights(section.checkpoint)
    if not isinstance(config, MullConfig):
        require_supported(config.get_text_config())
        config = MullConfig(text_config=config.get_text_config())
    if section.etd is not None:
        config.etd = section.etd.model_dump()
    if section.mtp is not None:
        config.mtp = section.mtp.model_dump()
    with torch.device("meta"):
        model = nn.Module.to(MullForCausalLM(config), DTYPES[section.dtype])
    model.tie_weights()
    return model


def _check_weights(checkpoint: str | None) -> None:
    """Refuse a local checkpoint without weights, which only loading would find."""
    if checkpoint is None or not Path(checkpoint).is_dir():
        return
    if not any(file.suffix in (".safetensors", ".bin") for file in Path(checkpoint).iterdir()):
        raise FileNotFoundError(f"{checkpoint} holds no weights (.safetensors): it is no finished checkpoint.")
