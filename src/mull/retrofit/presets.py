"""Configurations of published models, with and without a retrofit.

They build a model with random weights, to train from scratch or for tests on the meta device. `mull.from_pretrained` loads the
published weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Olmo3Config, PreTrainedConfig

from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig, LoRAExpertConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.arguments import require_count

OLMO3_VOCAB_SIZE = 100278
"""Size of the OLMo 3 tokenizer."""


@dataclass(frozen=True)
class TransformerConfig:
    """A backbone's configuration and what mull adds to it; `build` makes the model."""

    base: PreTrainedConfig
    """Configuration of the backbone."""

    etd: ETDConfig | None = None
    """Which layers think; None for the plain model."""

    @classmethod
    def olmo3_7B(cls, vocab_size: int = OLMO3_VOCAB_SIZE) -> "TransformerConfig":  # noqa: N802 - the promised name
        """OLMo 3 7B: 32 layers, width 4096, 32 heads, a sliding window of 4096 in three layers of four."""
        require_count("vocab_size", vocab_size, 1)
        return cls(Olmo3Config(vocab_size=vocab_size))

    @classmethod
    def olmo3_7B_etd(  # noqa: N802 - the promised name
        cls,
        vocab_size: int = OLMO3_VOCAB_SIZE,
        *,
        n_encoder_layers: int | None = None,
        n_think_layers: int | None = None,
        n_decoder_layers: int | None = None,
        max_think_iterations: int = 5,
        adaptive_depth: bool = True,
        confidence_threshold: float = 0.9,
        use_layer_router: bool = True,
        use_lora_experts: bool = True,
        num_lora_experts: int = 4,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
    ) -> "TransformerConfig":
        """OLMo 3 7B with a think block, in which tokens stop, layers have routers and linear maps LoRA experts.

        One iteration of the new model is OLMo 3, bit for bit.

        Args:
            vocab_size: Size of the tokenizer.
            n_encoder_layers: Layers before the think block. If no count is given, the split is 14/8/10: the published 7/4/5 of 16
                layers, scaled to 32.
            n_think_layers: Layers of the think block.
            n_decoder_layers: Layers after the think block.
            max_think_iterations: Passes through the think block.
            adaptive_depth: Whether tokens stop where their prediction is probable enough.
            confidence_threshold: How probable that is.
            use_layer_router: Whether think layers have routers.
            use_lora_experts: Whether the think block has LoRA experts.
            num_lora_experts: How many.
            lora_rank: Their rank.
            lora_alpha: Their alpha.

        Raises:
            ValueError: only some counts are given, or they do not add up to 32; or a number is out of its range.
        """
        base = cls.olmo3_7B(vocab_size).base
        lora = LoRAExpertConfig(rank=lora_rank, alpha=lora_alpha) if use_lora_experts else None
        options: dict[str, Any] = {
            "max_think_iterations": max_think_iterations,
            "adaptive_depth": adaptive_depth,
            "confidence_threshold": confidence_threshold if adaptive_depth else None,
            "use_layer_router": use_layer_router,
            "use_lora_experts": use_lora_experts,
            "num_lora_experts": num_lora_experts,
            "lora_expert": lora,
        }
        if n_encoder_layers is None and n_think_layers is None and n_decoder_layers is None:
            return cls(base, ETDConfig.for_model(base, **options))
        if n_encoder_layers is None or n_think_layers is None or n_decoder_layers is None:
            raise ValueError(
                "Give all of n_encoder_layers, n_think_layers and n_decoder_layers, or none; got "
                f"{n_encoder_layers}, {n_think_layers} and {n_decoder_layers}."
            )
        etd = ETDConfig(
            n_encoder_layers=n_encoder_layers,
            n_think_layers=n_think_layers,
            n_decoder_layers=n_decoder_layers,
            **options,
        )
        etd.check_depth(base.num_hidden_layers, list(base.layer_types))
        return cls(base, etd)

    def build(self, device: str | torch.device = "cpu", **options: Any) -> MullForCausalLM:
        """Make the model with random weights.

        Args:
            device: Device of the weights; ``"meta"`` allocates none.
            options: Passed to transformers' ``from_config``, such as ``dtype``.

        Returns:
            The model in evaluation mode. On ``"meta"``, `certify_identity` checks nothing.
        """
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(self.base, **options)
        return wrap_transformer_with_etd(model.eval(), self.etd)
