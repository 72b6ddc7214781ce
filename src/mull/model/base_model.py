"""`MullModel`: a pretrained decoder whose layers run along a path, up to the final norm. `MullForCausalLM` adds the heads.

Its weights keep their Hugging Face names, so a base checkpoint loads without renaming.

Shapes: B batch, T tokens, D model width.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import resolve_hidden_states_indices, selected_hidden_states

from mull.model.configs import HaltingConfig
from mull.model.configuration import MullConfig
from mull.model.executor import OnVisit, run, run_layer
from mull.model.fixed_cache import FixedMemory, StaticCall, StaticSlotCache
from mull.model.growing_cache import GrowingMemory, SlotCache
from mull.model.halting import GivenDepths, Halting
from mull.model.inputs import (
    LayerInputs,
    check_call,
    check_embeddings,
    check_keywords,
    check_padding_side,
    new_tokens,
    packed_positions,
    use_of_cache,
)
from mull.model.memory import CallMemory, Memory
from mull.model.path import Path, Visit
from mull.model.policy import Extra, Policy
from mull.model.routing import Routed, RoutedCall
from mull.model.trunk import Trunk
from mull.runtime.arguments import require, require_ids, require_shape, require_tensors


@dataclass
class MullModelOutput(MoeModelOutputWithPast):
    """Output of `MullModel`; fields as in transformers."""

    metrics: dict[str, Any] | None = None
    """See `Halting.metrics`; None where every token runs all iterations."""


class MullModel(Trunk):
    """A pretrained decoder whose layers run along a path; returns final-normed states.

    Raises:
        ValueError: unsupported architecture, or a split that does not add up to the backbone's depth.
    """

    def __init__(self, config: MullConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.heads_beside: tuple[nn.Module, ...] = ()
        """Extra heads that `MullForCausalLM` trains on this model's states."""
        self._etd_metrics: dict[str, Any] = {}
        self._collects_router_logits = False
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SlotCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        think_iterations: int | None = None,
        path: Sequence[Sequence[int]] | None = None,
        adaptive: bool | HaltingConfig | None = None,
        policy: Policy | None = None,
        prompt_mask: Tensor | None = None,
        on_visit: OnVisit | None = None,
        output_router_logits: bool | None = None,
        heads_follow: bool = False,
        unembed: Callable[[Tensor], Tensor] | None = None,
        **keywords: Any,
    ) -> MullModelOutput:
        """Run the decoder along a path.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, past + T]`` with 0 at padding, or ``[B, 1, T, past + T]`` boolean.
            position_ids: ``[B, T]``. Without a mask, a restart begins a new document, which attention and recurrent layers keep
                apart; such a call returns no cache.
            past_key_values: Cache of earlier calls, from `new_cache` or a former output.
            inputs_embeds: ``[B, T, D]`` instead of `input_ids`.
            use_cache: Return a cache; default as in the backbone's configuration.
            output_hidden_states: Return the residual stream after every visit, or these entries only, as in transformers; default
                as in the configuration.
            output_attentions: Refused: attention weights are not collected.
            think_iterations: Passes through the think block; default as in `ETDConfig`.
            path: Explicit visits ``(layer, occurrence)`` instead; see `mull.model.path`.
            adaptive: Whether tokens may stop earlier, or by which rule (`mull.model.halting`); default as in `ETDConfig`.
            policy: Which tokens run a visit, instead; see `mull.model.policy`. Layer routers decide, too.
            prompt_mask: ``[B, T]``, True for tokens that routers of sequences look at; see `with_routing`.
            on_visit: See `mull.model.executor.run`.
            output_router_logits: Return what the routers of experts gave, ``[B * T, E]`` for each visit of a layer that has one.
            heads_follow: The caller runs the extra heads. Otherwise training would leave them as they are without a word.
            unembed: The unembedding, for halting rules that decode early.
            **keywords: What collators add: packed documents (`mull.model.inputs.packed_positions`), and `WITHOUT_EFFECT`.

        Returns:
            ``last_hidden_state``: final-normed states ``[B, T, D]``. ``hidden_states``: embeddings, then the residual stream
            after each visit; the last entry is the final-normed state, as in transformers. None where one was not asked for.
            ``metrics``: how many iterations the tokens of an adaptive call ran; see `Halting.metrics`.

        Raises:
            TypeError: a keyword that is not known, or an argument of another type.
            ValueError: arguments that contradict each other or the cache, or that cannot be obeyed; or the model is in training
                mode, with extra heads that could be trained and do not follow.
        """
        self._check_options(output_attentions, policy, heads_follow)
        visits = self.path(think_iterations, path)
        kept = self._kept_states(output_hidden_states, 1 + len(visits))
        h = self._embed(input_ids, inputs_embeds)
        check_call(self.text_config, h.shape[:2], attention_mask, position_ids, use_cache)
        position_ids = packed_positions(keywords, h.shape[:2], attention_mask, position_ids)
        check_keywords(keywords)
        if position_ids is not None and attention_mask is None:
            use_cache = use_of_cache(position_ids, past_key_values is not None, use_cache)
        if prompt_mask is None and (past_key_values is not None or use_cache is True):
            prompt_mask = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        if path is None and policy is None:
            policy = self.halting(adaptive, think_iterations, new_tokens(attention_mask, h), unembed)
        elif adaptive:
            raise ValueError("adaptive decides which tokens run, and so does a path or a policy: give one of them.")
        cache = self._bound_cache(past_key_values, use_cache, visits, attention_mask, h.shape[1], policy)
        stream = None if kept is None else [h if 0 in kept else None]
        inputs = self.layer_inputs(h, attention_mask, position_ids, cache)
        policy = self.with_routing(
            policy, h, inputs, new_tokens(attention_mask, h), prompt_mask, cache, fixed=path is not None
        )

        def after(visit: Any, before: Tensor, state: Tensor) -> None:
            if stream is not None and kept is not None:
                stream.append(state if len(stream) in kept else None)
            if on_visit is not None:
                on_visit(visit, before, state)

        watched = after if stream is not None or on_visit is not None else None
        memory = self._memory(policy, cache)
        with self.router_logits() if self._wants_router_logits(output_router_logits) else nullcontext() as routed:
            h = self._run(visits, h, inputs, memory, policy, watched)
        if cache is not None:
            cache.advance(h.shape[1])
        h = self.norm(h)
        if stream is not None and stream[-1] is not None:
            stream[-1] = h
        metrics = self._keep_metrics(policy, think_iterations)
        return MullModelOutput(
            last_hidden_state=h,
            past_key_values=cache,
            hidden_states=None if stream is None else tuple(stream),  # type: ignore[arg-type]
            router_logits=None if routed is None else tuple(routed),  # type: ignore[arg-type]
            metrics=metrics,
        )

    def _wants_router_logits(self, asked: bool | None) -> bool:
        return getattr(self.text_config, "output_router_logits", False) if asked is None else asked

    def _keep_metrics(self, policy: Policy | None, think_iterations: int | None) -> dict[str, Any] | None:
        metrics = None if policy is None else policy.metrics() or None
        if not torch.compiler.is_compiling():
            fixed = {"think_iterations": self.iterations(think_iterations), "early_exit": False}
            self._etd_metrics = metrics if metrics and fixed.keys() <= metrics.keys() else fixed | (metrics or {})
        return metrics

    def given_depths(self, depths: Tensor) -> GivenDepths:
        """The policy of a call whose tokens run these iterations ``[B, T]``.

        Raises:
            ValueError: the model has no think block.
        """
        if self.etd_config is None:
            raise ValueError("Iterations per token need a think block, and this model has none.")
        etd = self.etd_config
        return GivenDepths(depths, etd.think_layers, etd.stop, etd.visits_per_iteration)

    def with_routing(
        self,
        policy: Policy | None,
        h: Tensor,
        inputs: LayerInputs | None,
        tokens: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        cache: SlotCache | StaticSlotCache | None = None,
        given: Tensor | None = None,
        fixed: bool = False,
    ) -> Policy | None:
        """The policy of a call together with the decisions of layer routers and gates; the same policy in a model without them.

        Args:
            policy: What else decides.
            h: States ``[B, T, D]`` that enter the first layer.
            inputs: What the layers of the call share; None on a cache of fixed size, where a row is one sequence.
            tokens: ``[B, T]``, False for padding; None without.
            prompt_mask: ``[B, T]``, True or 1 for the tokens that routers and gates of sequences may look at. In a call that
                fills a cache these are all. If not given, they look at the first token of each sequence, since a caller may want
                to know how probable the others are.
            cache: Keeps the decisions about rows.
            given: ``[B, L]`` actions by layer that are taken instead. What is computed then teaches the routers nothing.
            fixed: The path was given, and layer routers do not decide about it.

        Raises:
            ValueError: `prompt_mask` of another shape.
        """
        if self.etd is None:
            return policy
        if prompt_mask is not None:
            require_tensors(prompt_mask=prompt_mask)
            require_shape("prompt_mask", prompt_mask, h.shape[:2])
        # Without a past, a layer can be tried on the call's tokens alone, whether or not a cache is being filled.
        fresh = cache is None or (isinstance(cache, SlotCache) and not cache.n_tokens)
        learns = self.training and torch.is_grad_enabled() and fresh and given is None
        call = RoutedCall(h, inputs, tokens, prompt_mask, None if cache is None else cache.decisions, fresh)
        attempt = partial(self._attempt, inputs) if learns and inputs is not None else None
        return self.etd.policy(policy, call, attempt=attempt, given=given, fixed=fixed)

    @torch.no_grad()
    def _attempt(self, inputs: LayerInputs, visit: Visit, h: Tensor, extra: Extra) -> Tensor:
        """What a visit makes of states ``[B, T, D]`` if all tokens run it."""
        return run_layer(self.layers[visit.layer], self.kinds[visit.layer], h, inputs, extra=extra)

    def halting(
        self,
        adaptive: bool | HaltingConfig | None,
        think_iterations: int | None,
        tokens: Tensor | None = None,
        unembed: Callable[[Tensor], Tensor] | None = None,
    ) -> Halting | None:
        """The policy of a call with these arguments; None if every token runs all iterations.

        Args:
            adaptive: As in `forward`.
            think_iterations: As in `forward`.
            tokens: ``[B, T]``, False for padding; None without.
            unembed: The unembedding, for rules that decode early.

        Raises:
            TypeError: an argument of another type.
            ValueError: a rule that is not known, or a model without a think block or exit head.
        """
        if self.etd_config is None:
            if adaptive:
                raise ValueError(
                    "adaptive needs a think block, and this model has none: load it with etd=ETDConfig(...)."
                )
            return None
        config = self.etd_config.halting_of(adaptive)
        if config is None:
            return None
        return Halting(
            config,
            self.etd_config.think_layers,
            self.iterations(think_iterations),
            tokens=tokens,
            readout=None if unembed is None else lambda states: unembed(self.norm(states)),
            exit_head=self.exit_head,
            depth_router=None if self.etd is None else self.etd.depth_router,
            visits_per_iteration=self.etd_config.visits_per_iteration,
        )

    def _kept_states(self, asked: bool | int | Sequence[int] | None, n_states: int) -> Container[int] | None:
        """Which of a call's hidden states it returns; None if it returns none."""
        asked = self.config.output_hidden_states if asked is None else asked
        if not asked:
            return None
        selected = selected_hidden_states(asked)  # type: ignore[arg-type]
        return range(n_states) if selected is None else resolve_hidden_states_indices(self, selected, n_states)

    def _check_options(self, output_attentions: bool | None, policy: Policy | None, heads_follow: bool) -> None:
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions=True is not supported: attention weights are not collected.")
        if policy is not None:
            require("policy", policy, Policy, "a mull.model.policy.Policy")
        trains = self.training and torch.is_grad_enabled() and not heads_follow
        if trains and any(parameter.requires_grad for heads in self.heads_beside for parameter in heads.parameters()):
            raise ValueError(
                "The base model is trained by itself, as TRL does it, so its extra heads would stay untrained. Freeze them "
                "(model.mtp_heads.requires_grad_(False)), or train with mull train or transformers' Trainer."
            )

    @contextmanager
    def router_logits(self) -> Iterator[list[Tensor]]:
        """Collect the logits ``[tokens, E]`` of every router of experts that runs meanwhile, visit by visit."""
        collected: list[Tensor] = []
        self._collects_router_logits = True
        recorder: Any = (self.rules._can_record_outputs or {}).get("router_logits")
        hooks = [
            module.register_forward_hook(lambda _module, _args, output: collected.append(output[recorder.index]))
            for module in self.layers.modules()
            if recorder is not None and isinstance(module, recorder.target_class)
        ]
        try:
            yield collected
        finally:
            self._collects_router_logits = False
            for hook in hooks:
                hook.remove()

    def hidden_states(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Final-normed states ``[B, T, D]`` of the last iteration, without a cache; see `hidden_states_by_iteration`."""
        return self._decoded(input_ids, every_iteration=False, **options)[-1]

    def hidden_states_by_iteration(self, input_ids: Tensor, **options: Any) -> list[Tensor]:
        """Final-normed states ``[B, T, D]`` after each iteration, as early exits and step supervision need them.

        Args:
            input_ids: ``[B, T]``.
            options: ``attention_mask``, ``position_ids``, ``think_iterations``, ``policy``, ``prompt_mask`` and ``unembed`` as in
                `forward`; ``adaptive``, too, but False if not given; and ``backprop_iterations``: back-propagate through the last
                ones only. The others, and the encoder before them, run without gradient. None back-propagates through all.
                To a list ``think_states``, the states ``[B, T, D]`` after each iteration are appended, before they are decoded.

        Raises:
            TypeError: an argument of another type.
            ValueError: `backprop_iterations` below 1.
        """
        return self._decoded(input_ids, every_iteration=True, **options)

    def _decoded(
        self,
        input_ids: Tensor,
        *,
        every_iteration: bool,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        think_iterations: int | None = None,
        backprop_iterations: int | None = None,
        adaptive: bool | HaltingConfig = False,
        unembed: Callable[[Tensor], Tensor] | None = None,
        policy: Policy | None = None,
        prompt_mask: Tensor | None = None,
        think_states: list[Tensor] | None = None,
    ) -> list[Tensor]:
        require_tensors(attention_mask=attention_mask, position_ids=position_ids, prompt_mask=prompt_mask)
        iterations = self.iterations(think_iterations)
        if backprop_iterations is not None:
            require("backprop_iterations", backprop_iterations, int, "a whole number, or leave it out")
        if backprop_iterations is not None and backprop_iterations < 1:
            raise ValueError(f"backprop_iterations={backprop_iterations} must be at least 1, or nothing is trained.")
        n_detached = 0 if backprop_iterations is None else max(iterations - backprop_iterations, 0)
        if n_detached and self.stop_of(policy) == "share_first":
            raise ValueError(
                f"backprop_iterations={backprop_iterations} cuts off the first iteration, whose keys all others look at "
                "('share_first'), so nothing would train them: leave it out."
            )
        visits = self.path(think_iterations)
        etd, whole = self.etd_config, slice(0, len(visits))
        encoder, thinks, decoder = (slice(0), [whole], slice(0)) if etd is None else etd.sections(iterations)
        h = self._embed(input_ids, None)
        inputs = self.layer_inputs(h, attention_mask, position_ids)
        tokens = new_tokens(attention_mask, h)
        policy = policy or self.halting(adaptive, think_iterations, tokens, unembed)
        policy = self.with_routing(policy, h, inputs, tokens, prompt_mask)
        memory = self._memory(policy)

        def advance(h: Tensor, part: Path) -> Tensor:
            return self._run(part, h, inputs, memory, policy)

        states = []
        with torch.no_grad() if n_detached else nullcontext():
            h = advance(h, visits[encoder])
        for iteration, think in enumerate(thinks):
            with torch.no_grad() if iteration < n_detached else nullcontext():
                h = advance(h, visits[think])
                if think_states is not None:
                    think_states.append(h)
                if every_iteration or iteration == iterations - 1:
                    states.append(self.norm(advance(h, visits[decoder])))
        return states

    def _run(
        self,
        path: Path,
        h: Tensor,
        inputs: LayerInputs,
        memory: Memory | None,
        policy: Policy | None,
        on_visit: OnVisit | None = None,
    ) -> Tensor:
        """See `mull.model.executor.run`."""
        self._check_policy(policy)
        # The host takes decisions that read values, which no graph can hold.
        runner = run if policy is None or policy.traceable else torch.compiler.disable(run)
        return runner(self.layers, self.kinds, path, h, inputs, memory, policy, on_visit=on_visit)

    def _memory(self, policy: Policy | None, cache: SlotCache | None = None) -> Memory | None:
        stop = self.stop_of(policy) if policy is not None or self.stop_of(None) == "share_first" else None
        call = None if stop is None else CallMemory(stop)
        return call if cache is None else GrowingMemory(cache, stop)

    def _check_policy(self, policy: Policy | None) -> None:
        records = self._collects_router_logits and (self.rules._can_record_outputs or {}).get("router_logits")
        if policy is not None and records:
            raise ValueError(
                "Tokens that stop have no router logits: call with output_router_logits=False, or adaptive=False and iterations "
                "that are drawn per step."
            )
        first: Any = self.layers[0]
        reentrant = getattr(getattr(first, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant")
        trains = self.training and torch.is_grad_enabled() and getattr(first, "gradient_checkpointing", False)
        experts = self.etd is not None and self.etd.experts is not None
        stop = self.stop_of(policy)
        keys = stop == "share_first" or (policy is not None and (experts or stop != "active_only"))
        if reentrant and trains and (keys or self.attention_gates is not None):
            raise ValueError(
                "Reentrant gradient checkpointing would lose the gradient of gates, and of the keys that stopped tokens leave "
                "behind: enable it with gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

    def decode(
        self,
        input_ids: Tensor,
        cache: StaticSlotCache,
        call: StaticCall,
        policy: Policy | None = None,
        *,
        routed: Routed = "not",
    ) -> Tensor:
        """Run tokens ``[B, T]`` along the path of a cache of fixed size, as `mull.generate` does.

        Args:
            input_ids: The tokens.
            cache: Its path's visits run.
            call: Where the tokens are in it.
            policy: Which of them run a visit.
            routed: What decides, too; in the first call, routers and gates of sequences about the tokens that count.

        Returns:
            Final-normed states ``[B, T, D]``.
        """
        h = self.embed_tokens(input_ids)
        if routed != "not":
            everything = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
            tokens = None
            if call.n_valid is not None:
                tokens = torch.arange(h.shape[1], device=h.device) < call.n_valid[:, None]
            policy = self.with_routing(policy, h, None, tokens, everything, cache, fixed=routed == "experts")
        return self.norm(self.decode_part(h, cache, call, slice(0, len(cache.path)), policy))

    def decode_part(
        self, h: Tensor, cache: StaticSlotCache, call: StaticCall, part: slice, policy: Policy | None = None
    ) -> Tensor:
        """Run states ``[B, T, D]`` along a part of the path of a cache of fixed size. The parts before it have run.

        Returns:
            States ``[B, T, D]``, without the final norm.
        """
        inputs = self.fixed_layer_inputs(h, call)
        memory = FixedMemory(cache, call, None if policy is None else policy.stop)
        return run(self.layers, self.kinds, cache.path[part], h, inputs, memory, policy, first=part.start)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if input_ids is not None:
            require_ids("input_ids", input_ids)
        else:
            check_embeddings(inputs_embeds, self.text_config.hidden_size)
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _bound_cache(
        self,
        cache: SlotCache | None,
        use_cache: bool | None,
        visits: Path,
        attention_mask: Tensor | dict[str, Any] | None,
        n_new: int,
        policy: Policy | None,
    ) -> SlotCache | None:
        if use_cache is None:
            use_cache = cache is not None or bool(self.text_config.use_cache)
        if not use_cache or (self.training and self.gradient_checkpointing):
            return None
        if cache is None:
            cache = self.new_cache()
        if not isinstance(cache, SlotCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, which has one slot per layer; a looped layer needs one per visit. "
                "Use model.new_cache(). Prefix tuning makes caches of this kind: use LoRA or prompt tuning instead."
            )
        cache.bind(visits, self.stop_of(policy) == "share_first")
        if isinstance(attention_mask, Tensor):
            check_padding_side(attention_mask, n_new, self.text_config)
        return cache


AutoModel.register(MullConfig, MullModel)
