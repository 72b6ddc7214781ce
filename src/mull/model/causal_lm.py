"""`MullForCausalLM`: `MullModel`, the unembedding, extra heads, losses, and generation.

``generate``, PEFT, lm-eval and safetensors work on it as they do on the base model.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mull.layers.heads import HeadTask, MTPHeads, NativeHeads, RunBlock, before_norm, head_losses
from mull.layers.recursive_heads import ChainedSteps
from mull.model.base_model import MullModel
from mull.model.configs import HaltingConfig, MTPConfig
from mull.model.configuration import MullConfig
from mull.model.executor import run_layer
from mull.model.families import new_block, new_norm
from mull.model.fixed_cache import StaticCall, StaticSlotCache
from mull.model.growing_cache import SlotCache
from mull.model.inputs import LayerInputs, packed_positions
from mull.model.pretrained import MullPreTrainedModel
from mull.model.router_losses import router_losses
from mull.model.routing import RoutedParts
from mull.ops.cross_entropy import accurate
from mull.ops.targets import IGNORED, label_positions, require_targets, targets_of
from mull.runtime.arguments import require_count, require_ids, require_shape
from mull.runtime.distributed import whole

CACHE_IMPLEMENTATIONS = {None: False, "dynamic": False, "offloaded": True}
"""``cache_implementation`` of ``generate`` that a `SlotCache` serves, and whether it offloads."""

ROUTE = ("think_iterations", "path", "adaptive")
"""Keywords of ``generate`` that say which layers run."""


@dataclass
class MullOutput(CausalLMOutputWithPast):
    """Output of a forward pass; fields as in transformers.

    ``hidden_states``: embeddings, then the residual stream after each visit; the last entry is the final-normed state.
    ``loss - mtp_loss`` is the next-token loss.
    """

    mtp_loss: Tensor | None = None
    """What the extra heads add to ``loss``, weighted as `MTPConfig` says; None without labels or extra heads."""

    mtp_step_losses: dict[str, Tensor] | None = None
    """Mean loss of each extra head in nats per target, ``mtp_1`` and following; not weighted, detached."""

    aux_loss: Tensor | None = None
    """Balancing loss of routed experts, before its coefficient; None without ``output_router_logits``."""

    router_z_loss: Tensor | None = None
    """Loss of large logits of routers, before its coefficient; None without ``router_z_loss_coef`` in the configuration."""

    router_logits: tuple[Tensor, ...] | None = None
    """``[B * T, E]`` for each visit of a layer with routed experts; None without ``output_router_logits``."""

    token_skip_loss: Tensor | None = None
    """What token skipping adds to ``loss`` in training, see `mull.model.token_skip`; None without it or without labels."""

    metrics: dict[str, Any] | None = None
    """Which iterations the tokens of an adaptive call ran, see `Halting.metrics`; None where every token runs all of them. The
    model keeps those of its latest call as ``_etd_metrics``."""


class MullForCausalLM(MullPreTrainedModel, GenerationMixin):
    """A pretrained language model whose layers run along a path, with or without extra heads for later tokens.

    Raises:
        ValueError: unsupported architecture, or a split that does not add up to the backbone's depth.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    # `forward` takes num_items_in_batch, so transformers' Trainer divides by the targets of the whole step.
    accepts_loss_kwargs = True

    def __init__(self, config: MullConfig) -> None:
        super().__init__(config)
        self.model = MullModel(config)
        self.lm_head = nn.Linear(self.text_config.hidden_size, self.text_config.vocab_size, bias=False)
        if self.mtp_config is not None:
            self.attach_heads(new_heads(self.mtp_config, self.model))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        self.model._init_weights(module)
        if isinstance(module, MTPHeads):
            module.start_as_identity(self.model.norm, self._heads_read_stream)

    @property
    def _heads_read_stream(self) -> bool:
        return self.mtp_config is not None and self.mtp_config.native_hidden_state == "stream"

    @property
    def mtp_heads(self) -> MTPHeads | None:
        """The extra heads, or PEFT's wrapper around them.

        They are the submodule ``mtp_heads``; native ones ``mtp``, so that their weights have the names of released checkpoints.
        """
        heads: Any = self._modules.get("mtp_heads", self._modules.get("mtp"))
        return heads

    def attach_heads(self, heads: MTPHeads) -> None:
        """Make these the model's extra heads."""
        setattr(self, "mtp" if heads.kind == "native" else "mtp_heads", heads)
        self.model.heads_beside = (heads,)

    def _set_gradient_checkpointing(self, *args: Any, **options: Any) -> None:
        super()._set_gradient_checkpointing(*args, **options)
        # The heads' losses take gradients inside the forward pass, where reentrant checkpoints cannot.
        for module in [] if self.mtp_heads is None else self.mtp_heads.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]

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
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        think_iterations: int | None = None,
        path: Sequence[Sequence[int]] | None = None,
        adaptive: bool | HaltingConfig | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_router_logits: bool | None = None,
        **keywords: Any,
    ) -> MullOutput:
        """Run the model along a path. What is not named here is as in `MullModel.forward`.

        Args:
            labels: ``[B, T]``, unshifted, -100 ignored; gives ``loss``, the mean over the targets, and for a model with extra
                heads what they add to it.
            logits_to_keep: Compute logits for the last positions only (0: all), or at these indices.
            num_items_in_batch: Divide the summed loss by this instead of the number of targets, as transformers' Trainer does.
            output_router_logits: Return what the routers of experts gave, and add their losses to `loss`; default as configured.
            **keywords: ``shift_labels`` ``[B, T]``, the target of each position, instead of `labels`, but not for a model with
                extra heads; otherwise as in `MullModel.forward`.

        Raises:
            TypeError: a keyword that is not known, or an argument of another type.
            ValueError: arguments that contradict each other or the cache, or that cannot be obeyed; labels without a target.
        """
        _check_kept(logits_to_keep)
        # Not a parameter: transformers' Trainer takes every parameter with this name for labels that a batch must have.
        shift_labels = keywords.pop("shift_labels", None)
        if shift_labels is not None and self.mtp_config is not None:
            raise ValueError("Extra heads predict further tokens than shift_labels names: give labels, unshifted.")
        if labels is not None:
            keywords = self._with_prompts(keywords, labels)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if isinstance(tokens, Tensor):
            position_ids = packed_positions(keywords, tokens.shape[:2], attention_mask, position_ids)
        has_loss = labels is not None or shift_labels is not None
        run = partial(
            self.model,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            think_iterations=think_iterations,
            path=path,
            adaptive=adaptive,
            output_router_logits=output_router_logits,
            heads_follow=True,
            unembed=self.lm_head,
            **keywords,
        )
        out, auxiliary = self._collected(run) if has_loss else (run(), [])
        h, cache = out.last_hidden_state, out.past_key_values
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, keep])
        loss, mtp_loss, mtp_step_losses = None, None, None
        routed = self.router_losses(out.router_logits, attention_mask) if out.router_logits else {}
        token_skip_loss = torch.stack(auxiliary).mean() if auxiliary else None
        if has_loss:
            labels = self.checked_labels("labels", labels, h.shape[:2])
            shift_labels = self.checked_labels("shift_labels", shift_labels, h.shape[:2])
            self._check_targets(labels, shift_labels, num_items_in_batch)
            loss = self.loss_function(
                logits, labels, self.text_config.vocab_size, num_items_in_batch, shift_labels=shift_labels
            )
            loss = loss + sum(coefficient * term for coefficient, term in routed.values())
            if token_skip_loss is not None:
                loss = loss + token_skip_loss * _share_of_step(labels, shift_labels, num_items_in_batch)
            if self.mtp_config is not None and labels is not None:
                _require_whole(cache, h)
                mtp_loss, mtp_step_losses = self._mtp_loss(
                    h, input_ids, labels, attention_mask, position_ids, num_items_in_batch
                )
                loss = loss + mtp_loss
        self._keep_mtp_loss(mtp_loss)
        return MullOutput(
            loss=loss,
            mtp_loss=mtp_loss,
            mtp_step_losses=mtp_step_losses,
            logits=logits,
            past_key_values=cache,
            hidden_states=out.hidden_states,
            aux_loss=routed.get("balancing_loss", (0.0, None))[1],
            router_z_loss=routed.get("router_z_loss", (0.0, None))[1],
            router_logits=out.router_logits,
            token_skip_loss=token_skip_loss,
            metrics=out.metrics,
        )

    def _with_prompts(self, keywords: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        """Let routers and gates of sequences look at the tokens before the first one with a label."""
        etd = self.etd_config
        deciding = [] if etd is None else [part for part in (etd.router, etd.experts) if part is not None]
        if all(part.granularity == "token" for part in deciding) or "prompt_mask" in keywords:
            return keywords
        return keywords | {"prompt_mask": labels == IGNORED}

    def checked_labels(self, name: str, labels: Any, shape: Sequence[int]) -> Tensor | None:
        """Labels as int64.

        Raises:
            TypeError: no tensor.
            ValueError: another shape or type, or neither tokens of the vocabulary nor -100.
        """
        if labels is None:
            return None
        require_ids(name, labels)
        require_shape(name, labels, shape)
        vocabulary = self.text_config.vocab_size
        unknown = ((labels < 0) | (labels >= vocabulary)) & (labels != IGNORED)
        if not torch.compiler.is_compiling() and unknown.any():
            raise ValueError(
                f"{name} has {int(labels[unknown][0])}: give token numbers from 0 to {vocabulary - 1}, and {IGNORED} for none."
            )
        checked: Tensor = labels.long()
        return checked

    def _check_targets(
        self, labels: Tensor | None, shift_labels: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> None:
        if torch.compiler.is_compiling():
            return
        if num_items_in_batch is None:
            given = labels if shift_labels is None else shift_labels
            assert given is not None
            targets = given[:, 1:] if shift_labels is None else given
            require_targets((targets != IGNORED).sum(), given)
        elif not num_items_in_batch > 0:
            raise ValueError(
                f"num_items_in_batch={num_items_in_batch} must be positive: the summed loss is divided by it."
            )

    def router_losses(
        self, router_logits: Sequence[Tensor], attention_mask: Tensor | dict[str, Any] | None = None
    ) -> dict[str, tuple[float, Tensor]]:
        """What routers of experts add to the loss; see `mull.model.router_losses`."""
        return router_losses(self.model.rules, self.text_config, router_logits, attention_mask)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the backbone had before anything was added to it. Extra heads may share some of them."""
        for part in (self.model.embed_tokens, self.model.layers, self.model.norm, self.lm_head):
            yield from part.parameters()

    def freeze_backbone(self) -> None:
        """Train only what was added to the backbone: extra heads, routers, LoRA experts, gates of attention."""
        for parameter in self.backbone_parameters():
            parameter.requires_grad_(False)

    def get_metrics(self) -> dict[str, Any]:
        """What the latest forward pass decided, as ``etd``; and ``mtp_loss``, if it had labels and the model extra heads."""
        loss = self._latest_mtp_loss
        return {"etd": self._etd_metrics} | ({} if loss is None else {"mtp_loss": float(loss)})

    def _keep_mtp_loss(self, loss: Tensor | None) -> None:
        if not torch.compiler.is_compiling():
            self._latest_mtp_loss = None if loss is None else loss.detach()

    _latest_mtp_loss: Tensor | None = None

    @property
    def mtp_decoder(self) -> Any:
        """Decodes with drafts of the extra heads: a `mull.decoding.mtp_decoder.MTPDecoder`."""
        return self.decoder_type(self)

    decoder_type: ClassVar[Any]
    """It builds on this class, and puts itself here."""

    def generate(self, inputs: Any = None, *arguments: Any, use_speculative: bool | None = None, **options: Any) -> Any:
        """Continue prompts, as ``generate`` of transformers does; or, where `use_speculative` is given, as `mull.generate`.

        Args:
            inputs: ``[B, T]``.
            arguments: Of transformers.
            use_speculative: Whether to draft with the extra heads. Given, the options are those of `mull.generate`.
            options: Of transformers.

        Returns:
            Tokens ``[B, T + N]``; where `use_speculative` is given, those and the `GenerationStats`.

        Raises:
            TypeError: `use_speculative` beside an option that `mull.generate` does not have.
        """
        if use_speculative is not None:
            given = () if inputs is None else (inputs,)  # tokenizers name them input_ids
            return self.mtp_decoder.decode(*given, *arguments, use_speculative=use_speculative, **options)
        parent: Any = super()
        return parent.generate(inputs, *arguments, **options)

    @property
    def etd(self) -> RoutedParts | None:
        """Layer routers and their statistics; None without a think block."""
        return self.model.etd

    def auxiliary_losses(self) -> AbstractContextManager[list[Tensor]]:
        """Collect the terms whose mean is to be added to the loss; see `RoutedParts.auxiliary_losses`.

        `forward` collects and adds them in a call with labels, and such a call leaves none to the collection around it.
        """
        return nullcontext([]) if self.etd is None else self.etd.auxiliary_losses()

    def _collected(self, run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """What a call returns, and what token skipping adds to its loss."""
        if self.etd is None or self.etd.token_skip is None:
            return run(), []  # torch.compile cannot go on inside of a context after decisions of the host
        with self.auxiliary_losses() as auxiliary:
            return run(), auxiliary

    @property
    def _etd_metrics(self) -> dict[str, Any]:
        """``think_iterations`` and ``early_exit`` of the latest call, see `Halting.metrics`; plain numbers if it was fixed."""
        return self.model._etd_metrics

    def hidden_states(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Final-normed states ``[B, T, D]``; logits are ``lm_head`` of them. See `MullModel.hidden_states`."""
        return self.model.hidden_states(input_ids, unembed=self.lm_head, **options)

    def hidden_states_by_iteration(self, input_ids: Tensor, **options: Any) -> list[Tensor]:
        """Final-normed states after each iteration. See `MullModel.hidden_states_by_iteration`."""
        return self.model.hidden_states_by_iteration(input_ids, unembed=self.lm_head, **options)

    def _mtp_loss(
        self,
        h: Tensor,
        input_ids: Tensor | None,
        labels: Tensor,
        attention_mask: Tensor | dict[str, Any] | None,
        position_ids: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss of the extra heads, and the mean loss of each."""
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

    def require_in_memory(self) -> None:
        """Refuse weights that accelerate left on disk or in another memory: only a whole call of their module brings them in.

        Raises:
            ValueError: a weight is offloaded.
        """
        offloaded = any(parameter.is_meta for parameter in self.parameters())
        if offloaded and any(hasattr(module, "_hf_hook") for module in self.modules()):
            raise ValueError(
                "Some weights are offloaded (device_map). Losses of extra heads and mull.generate read weights directly: load "
                "the whole model on one device, or leave labels out and use model.generate."
            )

    def unembedding(self) -> Tensor:
        """What `lm_head` multiplies states by, ``[V, D]``, with a gradient to all of its parameters.

        Adapters, such as LoRA, change what a module computes and not its weight.
        """
        weight: Tensor = whole(self.lm_head.weight)  # tensor parallelism shards it
        if type(self.lm_head) is nn.Linear:
            return weight
        columns: Tensor = self.lm_head(torch.eye(self.text_config.hidden_size, dtype=self.dtype, device=weight.device))
        return columns.T

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
        """``Σ coefficients · CE`` of the main and the extra heads, one head after the other; see `mull.layers.heads`.

        Args:
            hidden: Final-normed states ``[B, T, D]``, from `hidden_states`.
            input_ids: ``[B, T]``, read by sequential heads.
            targets: ``[B, T, H]``, from `mull.ops.targets.targets_of`; H may leave out the last heads.
            coefficients: ``[B, T, H]``; targets with 0 are not computed.
            attention_mask: As in `forward`.
            position_ids: As in `forward`.
            trunk_gradient: Factor of the gradient from the extra heads into the trunk; 0 detaches them.

        Returns:
            The sum, differentiable once; and the loss of each computed target ``[B, T, H]``, detached, 0 elsewhere.

        Raises:
            ValueError: targets for more heads than the model has, sequential heads without `input_ids`, or offloaded weights.
        """
        self.require_in_memory()
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
        inputs = self.model.layer_inputs(hidden, attention_mask, position_ids)
        task = HeadTask(self.mtp_heads, targets, coefficients, self._run_block(hidden, inputs), trunk_gradient)
        read = self.head_input(hidden)
        return head_losses(hidden, embedded, self.unembedding(), task, None if read is hidden else read)

    def _run_block(self, hidden: Tensor, inputs: LayerInputs) -> RunBlock:
        """Run the layers of heads on the tokens of one call, without a cache."""
        kind = "full_attention"
        if self.mtp_config is None or not self.mtp_config.recursive:
            return lambda block, h, _k: run_layer(block, kind, h, inputs)
        return ChainedSteps(
            inputs.masks[kind],
            inputs.position_ids,
            lambda position_ids: self.model.rotary({kind}, hidden, position_ids)[kind],
            self.text_config._attn_implementation,
        )

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the first head, or all parallel ones, read where the trunk's final-normed state is `hidden` ``[..., D]``."""
        return before_norm(hidden, self.model.norm) if self._heads_read_stream else hidden

    def decode_head(
        self, k: int, h: Tensor, embedded: Tensor | None, cache: StaticSlotCache, call: StaticCall, inputs: LayerInputs
    ) -> Tensor:
        """Run head ``k`` against its block's slot of a cache of fixed size.

        Args:
            k: Which head, from 1.
            h: ``[B, T, D]``: final-normed states of the trunk; for the later ones of sequential heads what the head before wrote.
            embedded: ``[B, T, D]``, embeddings that sequential heads read.
            cache: The cache.
            call: Where the head's entries are.
            inputs: From `MullModel.fixed_layer_inputs`.

        Returns:
            States ``[B, T, D]``.
        """
        heads = self.mtp_heads
        assert heads is not None, "only a model with heads drafts"

        def run_block(block: nn.Module, x: Tensor, step: int) -> Tensor:
            return run_layer(block, "full_attention", x, inputs, cache.head_slot((step - 1) % len(heads.heads), call))

        return heads(k, self.head_input(h) if k == 1 else h, embedded, run_block)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any) -> Any:
        """Give ``generate`` a cache with a slot per visit; its own builds one slot per layer."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            parent: Any = super()
            return parent._prepare_cache_for_generation(generation_config, model_kwargs, *others)
        if generation_config.cache_implementation not in CACHE_IMPLEMENTATIONS:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} has one slot per layer. Use one of "
                f"{', '.join(repr(name) for name in CACHE_IMPLEMENTATIONS)}."
            )
        offloading = CACHE_IMPLEMENTATIONS[generation_config.cache_implementation]
        cache = model_kwargs["past_key_values"] = self.new_cache(offloading)
        if generation_config.is_assistant:
            cache.activate_past_recording()  # its drafts may have to be taken back
        return None

    def _get_logits_processor(self, *args: Any, **options: Any) -> Any:
        """Those of transformers; guidance, which calls the model by itself, takes the path of the call."""
        parent: Any = super()
        route = {name: value for name, value in (options.get("model_kwargs") or {}).items() if name in ROUTE}
        processors = parent._get_logits_processor(*args, **options)
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = partial(self, **route)
        return processors

    def _get_candidate_generator(self, *args: Any, **options: Any) -> Any:
        """That of transformers, without what an assistant that is no mull model does not know."""
        parent: Any = super()
        if not isinstance(options.get("assistant_model"), MullForCausalLM | None):
            options["model_kwargs"] = {key: value for key, value in options["model_kwargs"].items() if key not in ROUTE}
        return parent._get_candidate_generator(*args, **options)

    def _validate_generated_length(self, generation_config: Any, input_ids_length: int, *others: Any) -> None:
        """Refuse, before anything runs, what `generate` of transformers would get wrong."""
        parent: Any = super()
        parent._validate_generated_length(generation_config, input_ids_length, *others)
        # transformers cuts layers off while it drafts, which no think block survives; and it looks for heads of its own.
        for name in ("assistant_early_exit", "use_mtp"):
            if getattr(generation_config, name) not in (None, False):
                raise ValueError(f"{name} is not supported. Draft with the model's heads: mull.generate(draft='mtp').")
        limit = self.text_config.max_position_embeddings
        if generation_config.max_length > limit:
            raise ValueError(
                f"The prompt's {input_ids_length} tokens and max_length={generation_config.max_length} exceed the model's "
                f"{limit} positions: shorten one."
            )

    def init_continuous_batching(self, *_args: Any, **_options: Any) -> Any:
        """Refused, and with it ``generate_batch``: transformers' paged cache has one slot per layer.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Continuous batching (generate_batch) needs a paged cache, which has one slot per layer and none per visit. Use "
            "model.generate or mull.generate."
        )


def _check_kept(logits_to_keep: int | Tensor) -> None:
    if not isinstance(logits_to_keep, Tensor):
        require_count("logits_to_keep", logits_to_keep, 0)
    elif logits_to_keep.is_floating_point() or logits_to_keep.dtype == torch.bool:
        raise ValueError(f"logits_to_keep has the type {logits_to_keep.dtype}: indices are whole numbers.")


def _share_of_step(
    labels: Tensor | None, shift_labels: Tensor | None, num_items_in_batch: Tensor | int | None
) -> Tensor | float:
    """Share of an optimizer step's targets that are in this call, as transformers' Trainer divides the loss."""
    if num_items_in_batch is None:
        return 1.0
    targets = shift_labels if shift_labels is not None else labels[:, 1:] if labels is not None else None
    assert targets is not None, "a loss has labels"
    return (targets != IGNORED).sum() / num_items_in_batch


def _require_whole(cache: SlotCache | None, h: Tensor) -> None:
    if cache is not None and cache.n_tokens != h.shape[1]:
        raise ValueError(
            "Extra heads see the tokens of one call, so their loss cannot continue from a cache: give labels with whole rows."
        )


def new_heads(config: MTPConfig, base: MullModel) -> MTPHeads:
    """Extra heads for a backbone, not initialised."""
    text_config = base.text_config
    n_heads, width = config.num_predict_tokens, text_config.hidden_size
    native = config.mtp_head_type == "native"
    make_block = partial(new_block, text_config, base.layers, routed=native)
    make_norm = partial(new_norm, text_config, base.norm)
    make_heads = NativeHeads if native else MTPHeads
    return make_heads(config.mtp_head_type, n_heads, width, make_block, make_norm, config.recursive)


AutoModelForCausalLM.register(MullConfig, MullForCausalLM)
