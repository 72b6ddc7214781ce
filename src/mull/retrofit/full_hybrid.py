"""A Qwen3 model as a hybrid that thinks and predicts several tokens, in one call."""

import os

import torch
from transformers import PreTrainedModel

from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig, MTPConfig
from mull.retrofit.convert import convert_model
from mull.retrofit.hybrid import CrossArchTransferConfig
from mull.retrofit.wrap import wrap_transformer_with_etd


def create_full_hybrid_model(
    source: str | os.PathLike[str] | PreTrainedModel,
    use_etd: bool = True,
    use_mtp: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    config: CrossArchTransferConfig | None = None,
    *,
    etd_config: ETDConfig | None = None,
    mtp_config: MTPConfig | None = None,
) -> MullForCausalLM:
    """Convert a Qwen3 model, and give it a think block and extra heads.

    What it is worth before it is trained is that of the conversion with one iteration: see `create_hybrid_from_qwen3`. Its
    experts, if it has any, are the source's; earlier documents made new ones of every feed-forward layer.

    Args:
        source: As in `create_hybrid_from_qwen3`.
        use_etd: Whether half of the layers think, in whole periods of attention: 8, 20 and 8 of Qwen3-8B's 36.
            Two periods have room for one: 2, 4 and 2 of 8 layers.
        use_mtp: Whether the model has 4 extra heads: native ones, whose weights have names that serving engines read. They start
            as the model's own next-token prediction.
        device: As in `create_hybrid_from_qwen3`.
        dtype: As in `create_hybrid_from_qwen3`.
        config: Which layers become DeltaNet; default: three of four.
        etd_config: Another think block.
        mtp_config: Other extra heads.

    Returns:
        The model in evaluation mode. The loss of a call with labels is that of the next token and that of the heads.

    Raises:
        OSError, TypeError: as in `create_hybrid_from_qwen3`.
        ValueError: as there; or a configuration that is not used or does not fit, or too few layers for a think block between two
            other parts.
    """
    for name, used, given in (("etd", use_etd, etd_config), ("mtp", use_mtp, mtp_config)):
        if given is not None and not used:
            raise ValueError(f"{name}_config is given, and use_{name}=False: leave one of them out.")
    model, _ = convert_model(source, config, dtype)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    etd = (etd_config or _quarters(model)) if use_etd else None
    mtp = mtp_config or MTPConfig(mtp_head_type="native") if use_mtp else None
    return wrap_transformer_with_etd(model, etd, mtp)


def _quarters(model: PreTrainedModel) -> ETDConfig:
    etd = ETDConfig.for_model(model, "quarters")
    if 0 in (etd.n_encoder_layers, etd.n_decoder_layers):
        raise ValueError(
            f"The {etd.n_layers} layers are too few for a think block of whole periods of attention with layers before and after "
            "it: give etd_config, or use_etd=False."
        )
    return etd
