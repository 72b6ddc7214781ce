"""Retrofit an existing model, in memory or from a checkpoint."""

import os
from types import NoneType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mull.model.causal_lm import MullForCausalLM, new_heads
from mull.model.configs import ETDConfig, GatedAttentionConfig, MTPConfig, mtp_from_dict
from mull.model.configuration import MullConfig
from mull.model.families import require_supported
from mull.retrofit.native_heads import HUB_OPTIONS, choose_hidden_state, load_native_heads, read_native_heads
from mull.retrofit.reading import ADDED, NO_CODE, TRUST, explained
from mull.retrofit.source import find_source, load_config
from mull.runtime.arguments import require


def wrap_transformer_with_etd(
    model: PreTrainedModel,
    config: ETDConfig | None,
    mtp: MTPConfig | None = None,
    gated_attention: GatedAttentionConfig | None = None,
) -> MullForCausalLM:
    """Retrofit a model in memory. The weights are shared, not copied.

    Args:
        model: A causal language model of transformers, of a supported architecture.
        config: Which layers think. None adds no think block; the model can still run explicit paths.
        mtp: Extra heads. They start as the model's own next-token prediction, native ones included: only `from_pretrained` reads
            native heads from a checkpoint.
        gated_attention: Gates on the output of attention. They start open. The layers of `model` itself get none.

    Returns:
        The retrofitted model, in training mode if `model` is.

    Raises:
        TypeError: an argument of another type.
        ValueError: unsupported architecture, a split that does not fit, a model that is wrapped already, or a wrapped model
            whose single-iteration logits differ from the base model's.
    """
    require("model", model, PreTrainedModel, "a causal language model of transformers")
    _require_configs(config, mtp, gated_attention)
    wrapped = _share_weights(model, config, mtp, gated_attention)
    certify_identity(wrapped, model)
    if wrapped.etd is not None:
        wrapped.etd.reset_stats()  # of the probe
    return wrapped


def _require_configs(etd: Any, mtp: Any, gated_attention: Any) -> None:
    require("The configuration of the think block", etd, (ETDConfig, NoneType), "an ETDConfig, or None")
    require("mtp", mtp, (MTPConfig, NoneType), "an MTPConfig, or None")
    require("gated_attention", gated_attention, (GatedAttentionConfig, NoneType), "a GatedAttentionConfig, or None")


def _share_weights(
    model: PreTrainedModel,
    config: ETDConfig | None,
    mtp: MTPConfig | None,
    gated_attention: GatedAttentionConfig | None,
) -> MullForCausalLM:
    if isinstance(model, MullForCausalLM):
        raise ValueError("The model is wrapped already. Wrap the Hugging Face model that it was made from.")
    if not isinstance(getattr(model, "lm_head", None), nn.Linear):
        raise ValueError(f"{type(model).__name__} has no language-model head. Load it with AutoModelForCausalLM.")
    text_config = model.config.get_text_config()
    require_supported(text_config)
    # transformers' constructors write back ends into their configuration. It is shared with the base model, so they get its own.
    back_ends: dict[str, Any] = {
        "attn_implementation": text_config._attn_implementation,
        "experts_implementation": text_config._experts_implementation,
    }
    parts = {"etd": config, "mtp": mtp, "gated_attention": gated_attention}
    fields: dict[str, Any] = {name: None if part is None else part.model_dump() for name, part in parts.items()}
    # On the meta device: its own trunk is replaced by the base model's.
    with torch.device("meta"):
        wrapped = MullForCausalLM(MullConfig(text_config=text_config, **fields, **back_ends))
    wrapped.model.adopt(model.model)
    wrapped.lm_head = model.lm_head
    weight = model.lm_head.weight
    for added in (wrapped.model.attention_gates, wrapped.model.exit_head, wrapped.model.etd):
        if added is not None:
            added.to_empty(device=weight.device).to(weight.dtype).apply(wrapped._init_weights)
    if mtp is not None:
        with torch.device(weight.device):
            heads = new_heads(mtp, wrapped.model).to(weight.dtype)
        wrapped.attach_heads(heads)
        # Once they are attached: initialisation reads the trunk's norm, which has real weights only now.
        heads.apply(wrapped._init_weights)
    wrapped.generation_config = model.generation_config
    return wrapped.train(model.training)


@torch.no_grad()
def certify_identity(wrapped: MullForCausalLM, model: PreTrainedModel) -> None:
    """Check that one iteration of the wrapped model gives the base model's logits, bit for bit.

    The probe is a batch of two short rows, one of them padded on the left. It runs through the real weights in their own
    precision. A model on the meta device has no weights and is not checked.

    Raises:
        TypeError: an argument of another type.
        ValueError: the logits differ.
    """
    require("wrapped", wrapped, MullForCausalLM, "a wrapped model")
    require("model", model, PreTrainedModel, "the causal language model of transformers that it was made from")
    weight = model.lm_head.weight
    if weight.is_meta:
        return
    probe = torch.arange(2 * 12, device=weight.device).view(2, 12) * 7919 % model.config.get_text_config().vocab_size
    mask = torch.ones_like(probe)
    mask[1, :3] = 0
    training = model.training
    model.eval()
    wrapped.eval()
    expected = model(probe, attention_mask=mask, use_cache=False).logits
    iterations = None if wrapped.etd_config is None else 1
    actual = wrapped(probe, attention_mask=mask, use_cache=False, think_iterations=iterations).logits
    model.train(training)
    wrapped.train(training)
    real = mask == 1  # logits of padding are undefined
    if not torch.equal(actual[real], expected[real]):
        difference = (actual - expected)[real].abs().max().item()
        raise ValueError(
            f"The wrapped {type(model).__name__} does not reproduce the base model: with one iteration its logits must be equal "
            f"bit for bit, but differ by up to {difference:.3g}. The installed transformers may have changed this architecture."
        )


def from_pretrained(
    name_or_dir: str | os.PathLike[str],
    etd: ETDConfig | None = None,
    mtp: MTPConfig | None = None,
    *,
    gated_attention: GatedAttentionConfig | None = None,
    allow_missing: bool = True,
    **options: Any,
) -> MullForCausalLM:
    """Load a checkpoint, retrofitted.

    Args:
        name_or_dir: Directory or hub name of a Hugging Face checkpoint of a supported architecture, or of a model that mull
            saved; or a ``.gguf`` file, which transformers unpacks (extra ``gguf``).
        etd: Which layers think. For a model that mull saved, it replaces the stored configuration, which is the default.
        mtp: Extra heads. For a model that mull saved, they replace the stored configuration, which is the default; weights that
            the checkpoint lacks start as the model's own next-token prediction. Native heads are read from a Hugging Face
            checkpoint. Unless `native_hidden_state` is given, it is looked up or measured; see `mull.retrofit.native_heads`.
        gated_attention: Gates on the output of attention, which start open. For a model that mull saved, they replace the stored
            configuration, which is the default.
        allow_missing: Whether weights of the trunk that the checkpoint lacks may start at random, with a warning of transformers.
        options: Passed to ``from_pretrained`` of transformers, such as ``dtype``, ``device_map`` or ``revision``, and fields of
            the configuration, such as ``use_cache``. Code of a checkpoint runs only with ``trust_remote_code=True``.

    Returns:
        The model in evaluation mode.

    Raises:
        TypeError: an argument of another type.
        OSError: no checkpoint at `name_or_dir`.
        ValueError: as in `wrap_transformer_with_etd`; or the checkpoint lacks native heads, or has some that do not fit; or a
            file of it is damaged, or it needs code of its own; or it lacks other weights, and `allow_missing` is False.
    """
    _require_configs(etd, mtp, gated_attention)
    hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
    source = find_source(name_or_dir, **(NO_CODE | options))
    name_or_dir, options = source
    config = load_config(source, {**hub_options, TRUST: options[TRUST]})
    if not isinstance(config, MullConfig):
        require_supported(config.get_text_config())
        if "gguf_file" in options:  # otherwise it would be read once more
            options = _with_config(name_or_dir, config, options)
        return _from_base(name_or_dir, (etd, mtp, gated_attention), hub_options, options, allow_missing)
    options = _with_config(name_or_dir, config, options)
    if etd is not None:
        config.etd = etd.model_dump()
    if gated_attention is not None:
        config.gated_attention = gated_attention.model_dump()
    if mtp is not None:
        stored = mtp_from_dict(config.mtp)
        if stored is not None and stored.mtp_head_type != mtp.mtp_head_type:
            raise ValueError(
                f"{name_or_dir} has heads of type {stored.mtp_head_type}, which cannot be loaded as type {mtp.mtp_head_type}. "
                f"Leave mtp out, or give mtp_head_type={stored.mtp_head_type!r}."
            )
        if stored is not None and "native_hidden_state" not in mtp.model_fields_set:
            mtp = mtp.model_copy(update={"native_hidden_state": stored.native_hidden_state})
        config.mtp = mtp.model_dump()
    model: MullForCausalLM = _loaded(MullForCausalLM, name_or_dir, allow_missing, options)
    return model


def _with_config(name_or_dir: str, config: PreTrainedConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Options for ``from_pretrained`` with this configuration; those that are fields of it become its own."""
    fields = {name for name in options if name not in ("dtype", "torch_dtype") and hasattr(config, name)}
    with explained(name_or_dir):
        for name in fields:
            setattr(config, name, options[name])
    return {"config": config} | {name: value for name, value in options.items() if name not in fields}


def _loaded(auto: Any, name_or_dir: str, allow_missing: bool, options: dict[str, Any]) -> Any:
    with explained(name_or_dir, weights=True):
        model, found = auto.from_pretrained(name_or_dir, output_loading_info=True, **options)
    # Heads start as the model's own prediction.
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(ADDED))
    if missing and not allow_missing:
        raise ValueError(
            f"{name_or_dir} lacks {len(missing)} of the weights that its configuration asks for, such as "
            f"{', '.join(missing[:3])}: its files belong to different models, or some are missing. Fetch it again."
        )
    return model


def _from_base(
    name_or_dir: str,
    parts: tuple[ETDConfig | None, MTPConfig | None, GatedAttentionConfig | None],
    hub_options: dict[str, Any],
    options: dict[str, Any],
    allow_missing: bool,
) -> MullForCausalLM:
    """Retrofit a checkpoint of transformers."""
    _, mtp, _ = parts
    native = mtp is not None and mtp.mtp_head_type == "native"
    # Read first, so that a checkpoint without them is refused before a large trunk is loaded.
    tensors = read_native_heads(name_or_dir, **hub_options) if native else {}
    base: PreTrainedModel = _loaded(AutoModelForCausalLM, name_or_dir, allow_missing, options)
    if "gguf_file" in options:
        # transformers has unpacked the weights. The note that they are packed would be saved with them, and spoil a checkpoint.
        vars(base.config).pop("quantization_config", None)
    model = wrap_transformer_with_etd(base, *parts)
    if mtp is not None and native:
        load_native_heads(model, tensors, name_or_dir)
        if "native_hidden_state" not in mtp.model_fields_set:
            choose_hidden_state(model, name_or_dir)
    return model
