"""The model: embed, visit decoder layers along a path, norm, head.

`MullForCausalLM` owns a Hugging Face backbone and drives its decoder layers. Its weights keep their Hugging Face names, so a
base checkpoint loads without renaming, and `generate`, PEFT, lm-eval and safetensors work as they do on the base model.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mull.layers.heads import HeadTask, MTPHeads, NativeHeads, RunBlock, before_norm, head_losses
from mull.layers.recursive_heads import ChainedSteps
from mull.model.configs import MTPConfig, etd_from_dict, mtp_from_dict
from mull.model.executor import run_layer
from mull.model.families import family_of, layer_kinds, new_block, new_norm
from mull.model.fixed_cache import StaticCall, StaticSlotCache, StaticSlotView
from mull.model.growing_cache import SlotCache, SlotView
from mull.model.inputs import Sides, check_not_behind_padding, is_packed, prepare, prepare_static
from mull.model.path import Path, check_path, from_layers
from mull.ops.cross_entropy import accurate
from mull.ops.targets import label_positions, targets_of

CACHE_IMPLEMENTATIONS = {None: False, "dynamic": False, "offloaded": True}
"""``cache_implementation`` of ``generate`` that a `SlotCache` serves, and whether it offloads."""


@strict
class MullConfig(PreTrainedConfig):
    """Configuration of a retrofitted model: the backbone's own configuration, and what mull adds to it.

    Args:
        text_config: Configuration of the backbone.
        etd: Fields of `ETDConfig`, or None for a model that runs every layer once.
        mtp: Fields of `MTPConfig`, or None for a model that predicts the next token only.
    """

    model_type = "mull"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3")}
    keys_to_ignore_at_inference = ["past_key_values", "mtp_loss", "mtp_step_losses"]

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    etd: dict[str, Any] | None = None
    mtp: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(self.text_config, name, None))


@dataclass
class MullOutput(CausalLMOutputWithPast):
    """Output of a forward pass; fields as in transformers.

    ``hidden_states``, where asked for, holds the embeddings, the stream behind each visit of the path, and in the last place the
    normed states, like transformers does. ``loss - mtp_loss`` is the next-token loss.
    """

    mtp_loss: Tensor | None = None
    """What the heads behind the main one add to ``loss``, weighted as `MTPConfig` says; given labels and heads."""

    mtp_step_losses: dict[str, Tensor] | None = None
    """Mean loss of each such head in nats per target, ``mtp_1`` and following; not weighted, detached."""


class MullForCausalLM(PreTrainedModel, GenerationMixin):
    """A pretrained decoder language model whose layers run along a path.

    Args:
        config: Backbone and retrofit.

    Raises:
        ValueError: unsupported architecture, or a split that does not add up to the backbone's depth.
    """

    config: MullConfig
    config_class = MullConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # `forward` takes num_items_in_batch, so transformers' Trainer divides by the targets of the whole step.
    accepts_loss_kwargs = True
    # Recurrent states can be rolled back exactly (mull.model.growing_cache), so assisted generation is allowed on hybrids as
    # well.
    _is_stateful = False

    def __init__(self, config: MullConfig) -> None:
        super().__init__(config)
        text_config = config.text_config
        assert isinstance(text_config, PreTrainedConfig), "transformers turns a dictionary into a configuration"
        self._text_config = text_config
        self._family = family_of(text_config)
        self._kinds = layer_kinds(text_config)
        self.etd_config = etd_from_dict(config.etd)
        if self.etd_config is not None:
            self.etd_config.check_depth(text_config.num_hidden_layers, self._kinds)
        self.model = AutoModel.from_config(text_config)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.mtp_config = mtp_from_dict(config.mtp)
        if self.mtp_config is not None:
            self.attach_heads(new_heads(self.mtp_config, self.model))
        self._no_split_modules = self.model._no_split_modules
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for its own decorators in this module's source; the backbone decides for itself.
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # In custom code transformers passes over modules without parameters of their own: the heads, and the experts' routers.
        super()._initialize_weights(module, is_custom_code=False)

    def _init_weights(self, module: nn.Module) -> None:
        self.model._init_weights(module)
        if isinstance(module, MTPHeads | NativeHeads):
            module.start_as_identity(self.model.norm)

    @property
    def mtp_heads(self) -> MTPHeads | NativeHeads | None:
        """The heads behind the main one, or PEFT's wrapper around them.

        They are the submodule ``mtp_heads``; native ones ``mtp``, so that their weights have the names of released checkpoints.
        """
        heads: Any = self._modules.get("mtp_heads", self._modules.get("mtp"))
        return heads

    def attach_heads(self, heads: MTPHeads | NativeHeads) -> None:
        """Make these the model's heads."""
        setattr(self, "mtp" if heads.kind == "native" else "mtp_heads", heads)

    def new_cache(self, offloading: bool = False) -> SlotCache:
        """An empty cache for calls of this model that share a past."""
        return SlotCache(self._text_config, offloading)

    def path(self, think_iterations: int | None = None, path: Sequence[Sequence[int]] | None = None) -> Path:
        """The path that a call with these arguments takes.

        Args:
            think_iterations: Passes through the think block; None is the configuration's number.
            path: Explicit visits ``(layer, occurrence)`` instead.

        Raises:
            ValueError: both are given, iterations below 1 or without a think block, or a path that does not fit the model.
        """
        n_layers = len(self.model.layers)
        if path is not None:
            if think_iterations is not None:
                raise ValueError(
                    "Give think_iterations or path, not both: a path already says how often each layer runs."
                )
            return check_path(path, n_layers)
        if self.etd_config is None:
            if think_iterations not in (None, 1):
                raise ValueError(
                    f"think_iterations={think_iterations} needs a think block, and this model has none: load it with "
                    "etd=ETDConfig(...) or wrap it with wrap_transformer_with_etd."
                )
            return from_layers(range(n_layers))
        return self.etd_config.path(self.iterations(think_iterations))

    def iterations(self, think_iterations: int | None) -> int:
        """Passes through the think block of a call with this argument; 1 for a model without one.

        Raises:
            ValueError: iterations below 1.
        """
        if self.etd_config is None:
            return 1
        iterations = self.etd_config.max_think_iterations if think_iterations is None else think_iterations
        if iterations < 1:
            raise ValueError(f"think_iterations={iterations} must be at least 1, which is the unmodified model.")
        return iterations

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SlotCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        think_iterations: int | None = None,
        path: Sequence[Sequence[int]] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> MullOutput:
        """Run the model along a path.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, past + T]`` with 0 at padding, or ``[B, 1, T, past + T]`` boolean.
            position_ids: ``[B, T]``. Without a mask, a restart begins a new document, which attention and recurrent layers keep
                apart; such a call returns no cache.
            past_key_values: Cache of earlier calls, from `new_cache` or a former output.
            inputs_embeds: ``[B, T, D]`` instead of `input_ids`.
            labels: ``[B, T]``, unshifted, -100 ignored; gives ``loss``, the mean over the targets, and for a model with heads
                what they add to it.
            use_cache: Return a cache; default as in the backbone's configuration.
            output_hidden_states: Return the stream behind every visit.
            output_attentions: Refused: attention weights are not collected.
            logits_to_keep: Compute logits for the last positions only (0: all), or at these indices.
            think_iterations: Passes through the think block, exactly this many; default as in `ETDConfig`.
            path: Explicit visits ``(layer, occurrence)`` instead; see `mull.model.path`.
            num_items_in_batch: Divide the summed loss by this instead of the number of targets, as transformers' Trainer does.

        Raises:
            ValueError: arguments that contradict each other or the cache, or labels without a target.
        """
        if output_attentions:
            raise ValueError("output_attentions=True is not supported: attention weights are not collected.")
        visits = self.path(think_iterations, path)
        h = self._embed(input_ids, inputs_embeds)
        if position_ids is not None and attention_mask is None and is_packed(position_ids):
            use_cache = self._without_cache(past_key_values, use_cache)
        cache = self._bound_cache(past_key_values, use_cache, visits)
        if cache is not None and isinstance(attention_mask, Tensor):
            check_not_behind_padding(attention_mask, h.shape[1], self._text_config)
        stream: list[Tensor] | None = [h] if output_hidden_states else None
        sides = prepare(self.model, self._family, h, attention_mask, position_ids, cache)
        view = None if cache is None else partial(cache.view, active=sides.active)
        h = self._visit(h, visits, sides, view, stream)
        if cache is not None:
            cache.advance(h.shape[1])
        h = self.model.norm(h)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, keep])
        loss, mtp_loss, mtp_step_losses = None, None, None
        if labels is not None:
            if num_items_in_batch is None and not torch.compiler.is_compiling() and bool((labels[:, 1:] == -100).all()):
                raise ValueError(
                    f"No label of shape {tuple(labels.shape)} is a target: all are -100 behind the first token, which nothing "
                    "predicts. The mean over them is not a number."
                )
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self._text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            if self.mtp_config is not None:
                if cache is not None and cache.n_tokens != h.shape[1]:
                    raise ValueError(
                        "Heads that predict further tokens see the tokens of one call, so their loss cannot continue from a "
                        "cache: give labels with whole rows."
                    )
                mtp_loss, mtp_step_losses = self._mtp_loss(
                    h, input_ids, labels, attention_mask, position_ids, num_items_in_batch
                )
                loss = loss + mtp_loss
        return MullOutput(
            loss=loss,
            mtp_loss=mtp_loss,
            mtp_step_losses=mtp_step_losses,
            logits=logits,
            past_key_values=cache,
            hidden_states=None if stream is None else (*stream[:-1], h),
        )

    def _mtp_loss(
        self,
        h: Tensor,
        input_ids: Tensor | None,
        labels: Tensor,
        attention_mask: Tensor | dict[str, Any] | None,
        position_ids: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss of the heads behind the main one, and the mean loss of each."""
        assert self.mtp_config is not None
        n_heads = self.mtp_config.num_predict_tokens
        targets = targets_of(labels, label_positions(attention_mask, position_ids), 1 + n_heads)
        valid = targets >= 0
        valid[..., 0] = False  # the main head has its loss already
        counts = valid.sum((0, 1)).clamp(min=1)
        weights = torch.tensor(self.mtp_config.head_weights, device=h.device, dtype=accurate(h.dtype))
        divisor = counts if num_items_in_batch is None else num_items_in_batch
        coefficients = valid * (weights / divisor)
        loss, losses = self.head_losses(
            h, input_ids, targets, coefficients, attention_mask=attention_mask, position_ids=position_ids
        )
        means = losses.sum((0, 1)) / counts
        return loss, {f"mtp_{k}": means[k] for k in range(1, 1 + n_heads)}

    def head_losses(
        self,
        hidden: Tensor,
        input_ids: Tensor | None,
        targets: Tensor,
        coefficients: Tensor,
        *,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        trunk_gradient: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """``Σ coefficients · CE`` of the main head and those behind it, one head after the other; see `mull.layers.heads`.

        Args:
            hidden: Final-normed states ``[B, T, D]``, from `early_decoded`.
            input_ids: ``[B, T]``, read by sequential heads.
            targets: ``[B, T, H]``, from `mull.ops.targets.targets_of`; H may leave out the last heads.
            coefficients: ``[B, T, H]``; targets with 0 are not computed.
            attention_mask: As in `forward`.
            position_ids: As in `forward`.
            trunk_gradient: Factor of the gradient from the heads behind the main one into the trunk; 0 detaches them.

        Returns:
            The sum, differentiable once; and the loss of each computed target ``[B, T, H]``, detached, 0 elsewhere.

        Raises:
            ValueError: targets for more heads than the model has, or sequential heads without `input_ids`.
        """
        n_heads = 1 + (0 if self.mtp_config is None else self.mtp_config.num_predict_tokens)
        if targets.shape[-1] > n_heads:
            raise ValueError(
                f"There are targets for {targets.shape[-1]} heads, the main one included, but the model has {n_heads}: load it "
                f"with mtp=MTPConfig(num_predict_tokens={targets.shape[-1] - 1})."
            )
        embedded = None
        if self.mtp_heads is not None and self.mtp_heads.sequential:
            if input_ids is None:
                raise ValueError(
                    "Sequential heads read the embeddings of the tokens: give input_ids, not inputs_embeds."
                )
            embedded = self.model.embed_tokens(input_ids)
        sides = prepare(self.model, self._family, hidden, attention_mask, position_ids, None)
        task = HeadTask(self.mtp_heads, targets, coefficients, self._run_block(hidden, sides), trunk_gradient)
        read = self.head_input(hidden)
        return head_losses(hidden, embedded, self.lm_head.weight, task, None if read is hidden else read)

    def _run_block(self, hidden: Tensor, sides: Sides) -> RunBlock:
        """Run the layers of heads on the tokens of one call, without a cache."""
        if self.mtp_config is None or not self.mtp_config.recursive:
            return lambda block, h, _k: run_layer(block, "full_attention", h, sides, None)
        base, kind = self.model, "full_attention"
        return ChainedSteps(
            sides.masks[kind],
            sides.position_ids,
            lambda position_ids: self._family.rotary(base, {kind}, hidden, position_ids)[kind],
            self._text_config._attn_implementation,
        )

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the first head, or all parallel ones, read where the trunk's final-normed state is `hidden` ``[..., D]``."""
        reads_stream = self.mtp_config is not None and self.mtp_config.native_hidden_state == "stream"
        return before_norm(hidden, self.model.norm) if reads_stream else hidden

    def early_decoded(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        think_iterations: int | None = None,
        backprop_iterations: int | None = None,
        every_iteration: bool = False,
    ) -> tuple[Tensor, ...]:
        """Final-normed hidden states, as training and early exits need them. Logits are ``lm_head(state)``.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: As in `forward`.
            position_ids: As in `forward`.
            think_iterations: Passes through the think block.
            backprop_iterations: Back-propagate through the last ones only; the others, and the encoder before them, run without
                gradient. None back-propagates through all.
            every_iteration: Decode the state behind each iteration instead of the last only.

        Returns:
            One ``[B, T, D]`` per decoded iteration, in order.

        Raises:
            ValueError: `backprop_iterations` below 1.
        """
        iterations = self.iterations(think_iterations)
        if backprop_iterations is not None and backprop_iterations < 1:
            raise ValueError(f"backprop_iterations={backprop_iterations} must be at least 1, or nothing is trained.")
        n_detached = 0 if backprop_iterations is None else max(iterations - backprop_iterations, 0)
        visits = self.path(think_iterations)
        etd = self.etd_config
        n_encoder, n_think = (0, 0) if etd is None else (etd.n_encoder_layers, etd.n_think_layers)
        h = self._embed(input_ids, None)
        sides = prepare(self.model, self._family, h, attention_mask, position_ids, None)
        decoder = visits[n_encoder + n_think * iterations :]
        states = []
        with torch.no_grad() if n_detached else nullcontext():
            h = self._visit(h, visits[:n_encoder], sides)
        for iteration in range(iterations):
            with torch.no_grad() if iteration < n_detached else nullcontext():
                first = n_encoder + iteration * n_think
                h = self._visit(h, visits[first : first + n_think], sides)
                if every_iteration or iteration == iterations - 1:
                    states.append(self.model.norm(self._visit(h, decoder, sides)))
        return tuple(states)

    def decode(self, input_ids: Tensor, cache: StaticSlotCache, call: StaticCall) -> Tensor:
        """Run tokens against a static cache, as `mull.generate` does. Logits are ``lm_head(state)``.

        Args:
            input_ids: ``[B, T]``.
            cache: Cache of the path to run.
            call: Where the tokens stand.

        Returns:
            Final-normed states ``[B, T, D]``.
        """
        h = self.model.embed_tokens(input_ids)
        sides = self.static_sides(h, call)
        return self.model.norm(self._visit(h, cache.path, sides, partial(cache.view, call=call)))

    def static_sides(self, h: Tensor, call: StaticCall) -> Sides:
        """What the layers of a call on a static cache share, for `decode_head`; `h` is ``[B, T, D]``."""
        return prepare_static(self.model, self._family, h, call)

    def decode_head(
        self,
        k: int,
        h: Tensor,
        embedded: Tensor | None,
        cache: StaticSlotCache,
        call: StaticCall,
        sides: Sides,
    ) -> Tensor:
        """Run head ``k`` against its block's slot of a static cache.

        Args:
            k: Which head, from 1.
            h: ``[B, T, D]``: final-normed states of the trunk; for the later ones of sequential heads what the head before wrote.
            embedded: ``[B, T, D]``, embeddings that sequential heads read.
            cache: The cache.
            call: Where the head's entries stand.
            sides: From `static_sides`.

        Returns:
            States ``[B, T, D]``.
        """
        heads = self.mtp_heads
        assert heads is not None, "only a model with heads drafts"

        def run_block(block: nn.Module, x: Tensor, step: int) -> Tensor:
            view = cache.head_view((step - 1) % len(heads.heads), call)
            return run_layer(block, "full_attention", x, sides, view)

        states: Tensor = heads(k, self.head_input(h) if k == 1 else h, embedded, run_block)
        return states

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            return inputs_embeds
        return self.model.embed_tokens(input_ids)

    @staticmethod
    def _without_cache(cache: SlotCache | None, use_cache: bool | None) -> bool:
        """Packed rows are never cached: with a cache, transformers' masks would let documents see each other, silently."""
        if cache is not None or use_cache:
            raise ValueError(
                "position_ids restart, so the rows hold several packed documents, and these cannot continue from a cache. Pass "
                "use_cache=False, or one document per row."
            )
        return False

    def _bound_cache(self, cache: SlotCache | None, use_cache: bool | None, visits: Path) -> SlotCache | None:
        if use_cache is None:
            use_cache = cache is not None or bool(self._text_config.use_cache)
        if not use_cache or (self.training and self.model.gradient_checkpointing):
            return None
        if cache is None:
            cache = self.new_cache()
        if not isinstance(cache, SlotCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, which has one slot per layer; a looped layer needs one per visit. "
                "Use model.new_cache()."
            )
        cache.bind(visits)
        return cache

    def _visit(
        self,
        h: Tensor,
        visits: Path,
        sides: Sides,
        view: Callable[[int], SlotView | StaticSlotView] | None = None,
        stream: list[Tensor] | None = None,
    ) -> Tensor:
        """The one loop that executes paths. `view` gives the cache's slot of a visit; then `visits` is the cache's whole path."""
        for slot, (layer, _) in enumerate(visits):
            h = run_layer(self.model.layers[layer], self._kinds[layer], h, sides, None if view is None else view(slot))
            if stream is not None:
                stream.append(h)
        return h

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Give ``generate`` a cache with a slot per visit; its own builds one slot per layer."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            parent: Any = super()
            return parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if generation_config.cache_implementation not in CACHE_IMPLEMENTATIONS:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} has one slot per layer. Use one of "
                f"{', '.join(repr(name) for name in CACHE_IMPLEMENTATIONS)}."
            )
        offloading = CACHE_IMPLEMENTATIONS[generation_config.cache_implementation]
        model_kwargs["past_key_values"] = self.new_cache(offloading)
        return None


AutoConfig.register("mull", MullConfig)
AutoModelForCausalLM.register(MullConfig, MullForCausalLM)


def new_heads(config: MTPConfig, base: PreTrainedModel) -> MTPHeads | NativeHeads:
    """Heads for a backbone, not initialised."""
    n_heads, width = config.num_predict_tokens, base.config.hidden_size
    if config.mtp_head_type == "native":
        reads_stream = config.native_hidden_state == "stream"
        return NativeHeads(n_heads, width, lambda: new_block(base, routed=True), lambda: new_norm(base), reads_stream)
    return MTPHeads(
        config.mtp_head_type, n_heads, width, lambda: new_block(base), lambda: new_norm(base), config.recursive
    )
