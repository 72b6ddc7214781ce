"""Qwen3-Next with a think block and its own extra heads, under the names and settings that the source documents promise."""

from typing import Any

from transformers import PreTrainedConfig, Qwen3NextConfig

from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig, LayerRouterConfig, LoRAExpertConfig, MTPConfig
from mull.retrofit.native_heads import HUB_OPTIONS
from mull.retrofit.presets import TransformerConfig
from mull.retrofit.reading import NO_CODE, TRUST
from mull.retrofit.source import find_source, load_config
from mull.retrofit.wrap import from_pretrained

RELEASED = "Qwen/Qwen3-Next-80B-A3B-Instruct"
NEVER_RELEASED = "Qwen/Qwen3-Next-32B-A3B"
"""The name in the documents."""


def create_qwen3_next_model(
    model_name: str = RELEASED,
    use_etd: bool = True,
    use_mtp: bool = True,
    freeze_backbone: bool = False,
    *,
    etd_config: ETDConfig | None = None,
    mtp_config: MTPConfig | None = None,
    gradient_checkpointing: bool = True,
    **options: Any,
) -> MullForCausalLM:
    """Load Qwen3-Next with a think block and the extra heads that its checkpoint has.

    Args:
        model_name: Directory or hub name of a checkpoint. The released ones have 79.7 billion parameters, 159 GB in bf16.
        use_etd: Whether half of the layers think: 12, 24 and 12 of the released 48, at most 3 times, until a token is predicted
            with a probability of 0.85; with routers of layers and 4 LoRA experts of rank 32.
        use_mtp: Whether the model has extra heads: the checkpoint's own, used recursively for 4 tokens.
        freeze_backbone: Train only what is added: routers, LoRA experts and extra heads.
        etd_config: Another think block.
        mtp_config: Other extra heads.
        gradient_checkpointing: Whether training computes activations once more instead of keeping them.
        options: Passed to `mull.from_pretrained`; ``dtype`` is bf16 if not given.

    Returns:
        The model in evaluation mode.

    Raises:
        TypeError: an option that is not known, or an argument of another type.
        OSError: no checkpoint at `model_name`.
        ValueError: the name of the documents, which was never released; another architecture; configurations that are not
            used; or as in `mull.from_pretrained`.
    """
    return _create(
        model_name,
        {},
        {},
        use_etd=use_etd,
        use_mtp=use_mtp,
        freeze_backbone=freeze_backbone,
        etd_config=etd_config,
        mtp_config=mtp_config,
        gradient_checkpointing=gradient_checkpointing,
        **options,
    )


def create_qwen3_next_efficient(model_name: str = RELEASED, **options: Any) -> MullForCausalLM:
    """`create_qwen3_next_model` with a frozen backbone, 2 think iterations and 3 extra heads."""
    etd, mtp = {"max_think_iterations": 2}, {"num_predict_tokens": 3}
    return _create(model_name, etd, mtp, **{"freeze_backbone": True} | options)


def create_qwen3_next_performance(model_name: str = RELEASED, **options: Any) -> MullForCausalLM:
    """`create_qwen3_next_model` with 5 think iterations, 8 LoRA experts and 4 extra heads, all of which is trained."""
    return _create(model_name, {"max_think_iterations": 5, "num_lora_experts": 8}, {}, **options)


def _create(
    model_name: str,
    etd_changes: dict[str, Any],
    mtp_changes: dict[str, Any],
    *,
    use_etd: bool = True,
    use_mtp: bool = True,
    freeze_backbone: bool = False,
    etd_config: ETDConfig | None = None,
    mtp_config: MTPConfig | None = None,
    gradient_checkpointing: bool = True,
    **options: Any,
) -> MullForCausalLM:
    for name, used, given in (("etd", use_etd, etd_config), ("mtp", use_mtp, mtp_config)):
        if given is not None and not used:
            raise ValueError(f"{name}_config is given, and use_{name}=False: leave one of them out.")
    config = _config(model_name, options)
    etd = etd_config or next_etd(config, **etd_changes) if use_etd else None
    mtp = mtp_config or next_mtp(**mtp_changes) if use_mtp else None
    model = from_pretrained(model_name, etd, mtp, **{"dtype": "bfloat16"} | options)
    if freeze_backbone:
        model.freeze_backbone()
    if gradient_checkpointing:
        # Not reentrant: after a frozen embedding, reentrant checkpoints give no gradient.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def next_etd(config: PreTrainedConfig, **changes: Any) -> ETDConfig:
    """The think block of `create_qwen3_next_model`, with these fields changed, for a model of any depth."""
    settings: dict[str, Any] = {
        "max_think_iterations": 3,
        "adaptive_depth": True,
        "confidence_threshold": 0.85,
        "layer_router": LayerRouterConfig(hidden_size=256, temperature=1.0),
        "num_lora_experts": 4,
        "lora_expert": LoRAExpertConfig(rank=32, alpha=64.0),
    }
    return ETDConfig.for_model(config, "quarters", **settings | changes)


def next_mtp(**changes: Any) -> MTPConfig:
    """The extra heads of `create_qwen3_next_model`, with these fields changed."""
    settings = {"num_predict_tokens": 4, "loss_weight_decay": 0.5, "mtp_loss_weight": 0.3, "speculation_lookahead": 3}
    return MTPConfig(mtp_head_type="native", **settings | changes)


def qwen3_next_80B_A3B(use_etd: bool = True, use_mtp: bool = True) -> TransformerConfig:  # noqa: N802 - as the others
    """The sizes of the released models, to build one without a checkpoint: on the meta device, it takes no memory."""
    base = Qwen3NextConfig(max_position_embeddings=262144, rope_parameters={"rope_type": "default", "rope_theta": 1e7})
    return TransformerConfig(base, next_etd(base) if use_etd else None, next_mtp() if use_mtp else None)


def _config(model_name: str, options: dict[str, Any]) -> PreTrainedConfig:
    """Configuration of a checkpoint of Qwen3-Next, read before its weights are."""
    if model_name == NEVER_RELEASED:
        raise ValueError(
            f"{NEVER_RELEASED} was never released: the models are {RELEASED}, which is the default, and "
            "Qwen/Qwen3-Next-80B-A3B-Thinking."
        )
    hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
    source = find_source(model_name, **(NO_CODE | options))
    config = load_config(source, {**hub_options, TRUST: source.options[TRUST]})
    if config.model_type != "qwen3_next":
        raise ValueError(
            f"{model_name} is of the architecture {config.model_type!r} and not Qwen3-Next: load it with mull.from_pretrained."
        )
    return config
