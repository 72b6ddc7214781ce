"""Configurations of published models, with and without a retrofit.

They build a model with random weights, to train from scratch or for tests on the meta device. `mull.from_pretrained` loads the
published weights.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, Olmo3Config, PreTrainedConfig, Qwen3NextConfig

from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig, GatedAttentionConfig, LoRAExpertConfig, MTPConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.arguments import require, require_count

OLMO3_VOCAB_SIZE = 100278
"""Size of the OLMo 3 tokenizer."""


@dataclass(frozen=True)
class TransformerConfig:
    """A backbone's configuration and what mull adds to it; `build` makes the model."""

    base: PreTrainedConfig
    """Configuration of the backbone."""

    etd: ETDConfig | None = None
    """Which layers think; None for the plain model."""

    mtp: MTPConfig | None = None
    """Extra heads; None for none."""

    gated_attention: GatedAttentionConfig | None = None
    """Gates on the output of attention; None for attention as the backbone has it."""

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

    @classmethod
    def olmo3_7B_hybrid_gated(  # noqa: N802 - the promised name
        cls,
        vocab_size: int = OLMO3_VOCAB_SIZE,
        *,
        hybrid_period: int = 4,
        granularity: Literal["head", "element"] = "head",
    ) -> "TransformerConfig":
        """OLMo 3 7B with gates on the output of attention, in all but one layer of each period.

        The name is that of the source documents. All layers are softmax attention, whose cost grows with the square of the
        length: the gates make no linear attention of them. At the start the gates are open, and the model is OLMo 3.

        Args:
            vocab_size: Size of the tokenizer.
            hybrid_period: Layers of a period. Its last one has no gate; with 4 it is the one without a sliding window.
            granularity: A gate per head, or one per element of its output.

        Raises:
            ValueError: a period below 2, or longer than the model.
        """
        base = cls.olmo3_7B(vocab_size).base
        require_count("hybrid_period", hybrid_period, 2, base.num_hidden_layers)
        layers = [layer for layer in range(base.num_hidden_layers) if (layer + 1) % hybrid_period]
        return cls(base, gated_attention=GatedAttentionConfig(granularity=granularity, layers=tuple(layers)))

    @classmethod
    def olmo3_7B_hybrid_moe(  # noqa: N802 - the promised name
        cls,
        vocab_size: int = OLMO3_VOCAB_SIZE,
        *,
        hybrid_period: int = 2,
        num_experts: int = 64,
        top_k: int = 8,
        shared_expert: bool = True,
        lb_loss_weight: float = 0.01,
        z_loss_weight: float = 0.001,
        capacity_factor: float | None = None,
    ) -> "TransformerConfig":
        """A model of OLMo 3 7B's sizes with routed experts in every layer that ends a period: 23.3 billion parameters.

        No class of transformers has OLMo 3's layers with experts in some of them. This is Qwen3-Next's, all layers with softmax
        attention: norms before the maps instead of after them, queries and keys normalised by head, no sliding windows, and an
        element gate on the output of attention. A token's experts are together as wide as the MLP of the layers without experts.

        Args:
            vocab_size: Size of the tokenizer.
            hybrid_period: Layers of a period; its last one has experts.
            num_experts: Routed experts of such a layer.
            top_k: Experts that a token takes.
            shared_expert: Whether every token takes a further one, as wide as they are, with a gate. Its width is 0 without it,
                and torch remarks that it has nothing to initialise.
            lb_loss_weight: Weight of the balancing loss in the loss of training.
            z_loss_weight: Weight of the loss of large router logits (arXiv:2202.08906).
            capacity_factor: Refused: experts take all tokens that choose them, so there is no capacity to exceed.

        Raises:
            ValueError: a number out of its range, or a capacity.
        """
        if capacity_factor is not None:
            raise ValueError(
                f"capacity_factor={capacity_factor} would drop tokens that an expert has no room for, and the experts of "
                "transformers take all tokens that choose them: leave it out."
            )
        olmo: Any = cls.olmo3_7B(vocab_size).base
        require_count("hybrid_period", hybrid_period, 1, olmo.num_hidden_layers)
        require_count("num_experts", num_experts, 1)
        require_count("top_k", top_k, 1, num_experts)
        for name, weight in (("lb_loss_weight", lb_loss_weight), ("z_loss_weight", z_loss_weight)):
            require(name, weight, (int, float), "a number")
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}={weight} must be a number from 0: it multiplies a loss.")
        width = max(olmo.intermediate_size // top_k, 1)
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        base = Qwen3NextConfig(
            **{name: getattr(olmo, name) for name in (*sizes, "max_position_embeddings", "rms_norm_eps")},
            vocab_size=vocab_size,
            head_dim=olmo.hidden_size // olmo.num_attention_heads,
            rope_parameters={**olmo.rope_parameters["full_attention"], "partial_rotary_factor": 1.0},
            layer_types=["full_attention"] * olmo.num_hidden_layers,
            decoder_sparse_step=hybrid_period,
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=width,
            shared_expert_intermediate_size=width if shared_expert else 0,
            output_router_logits=True,
            router_aux_loss_coef=float(lb_loss_weight),
            **{name: getattr(olmo, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        )
        base.router_z_loss_coef = float(
            z_loss_weight
        )  # no field of transformers: mull reads it, and config.json keeps it
        return cls(base)

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
        return wrap_transformer_with_etd(model.eval(), self.etd, self.mtp, self.gated_attention)
