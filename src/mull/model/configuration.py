"""`MullConfig`: the configuration of a retrofitted model, as ``config.json`` holds it."""

import sys
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

REQUIRES = "pip install mull, and import mull before AutoModelForCausalLM.from_pretrained"
"""Stands in ``config.json``: where mull was not imported, transformers says only that it does not know the model type."""


@strict
class MullConfig(PreTrainedConfig):
    """Configuration of a retrofitted model: the backbone's own configuration, and what mull adds to it.

    Fields of the backbone's configuration are read and set here, too: ``config.vocab_size`` is ``config.text_config.vocab_size``.

    Args:
        text_config: Configuration of the backbone.
        etd: Fields of `ETDConfig`, or None for a model that runs every layer once.
        mtp: Fields of `MTPConfig`, or None for a model that predicts the next token only.
        gated_attention: Fields of `GatedAttentionConfig`, or None for attention as the backbone has it.

    Raises:
        ValueError: no `text_config`, as in the configuration of a model that was not retrofitted.
    """

    model_type = "mull"
    has_no_defaults_at_init = True
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3")}
    keys_to_ignore_at_inference = ["past_key_values", "mtp_loss", "mtp_step_losses"]

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    etd: dict[str, Any] | None = None
    mtp: dict[str, Any] | None = None
    gated_attention: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            # transformers would make up a backbone of billions of random weights.
            raise ValueError(
                "A MullConfig needs text_config, the configuration of a backbone. Load a checkpoint that is not mull's with "
                "mull.from_pretrained, which retrofits it."
            )
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if not hasattr(self, name):
                setattr(self, name, None)

    def __getattr__(self, name: str) -> Any:
        """Fields that only the backbone's configuration has: other libraries ask for them here."""
        if not name.startswith("_"):
            text_config = vars(self).get("text_config")
            if isinstance(text_config, PreTrainedConfig):
                return getattr(text_config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        text_config = vars(self).get("text_config")
        if name == "tie_word_embeddings" and vars(self).get("_post_init_done"):
            setattr(text_config, name, value)  # a field of every configuration; loading takes the backbone's
        own = name.startswith("_") or name in vars(self) or hasattr(type(self), name)
        if not own and isinstance(text_config, PreTrainedConfig) and hasattr(text_config, name):
            setattr(text_config, name, value)
        else:
            super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values; ``config.json`` also says what it takes to load it."""
        self._name_adapter_targets()
        return {**super().to_dict(), "requires": REQUIRES}

    def _name_adapter_targets(self) -> None:
        # PEFT looks up by model type which modules to adapt, in the dictionary that it asked for just before.
        for targets in vars(sys.modules.get("peft.utils.constants", sys)).values():
            if isinstance(targets, dict) and "llama" in targets:
                targets["mull"] = targets.get(self.get_text_config().model_type)


AutoConfig.register("mull", MullConfig)
