"""Model-side configurations: frozen, validated once, and the same schema for Python calls, recipes and ``config.json``."""

from collections.abc import Mapping
from itertools import pairwise
from types import NoneType
from typing import Any, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedConfig

from mull.model.path import MAX_ITERATIONS, MAX_LAYERS, Path, recursion, repeatable
from mull.runtime.arguments import Frozen, require

Stop = Literal["last_kv", "own_state", "active_only", "share_first"]
"""What a token offers to later tokens in a layer's visits that it does not run: the keys and values of the last time it ran that
layer; those that the layer projects from the state in which the token rests; or nothing. ``share_first`` is about running tokens,
too: in all visits after the first that it runs, a token offers the keys and values of that first one, so a layer has a single
slot however often it is visited. Recurrent layers know one answer: a token that does not run is not in their sequence."""

SPLITS: dict[str, tuple[float, float]] = {"published": (7 / 16, 4 / 16), "quarters": (1 / 4, 1 / 2)}
"""Encoder and think fractions of the depth. ``published`` is 7-4-5 of 16 layers (arXiv:2510.07358), ``quarters`` 25/50/25."""


LIMITS = {"fixed": 0.0, "state": 0.95, "confidence": 0.9, "kl": 1e-3, "repeat": 1.0, "learned": 0.5}
"""Thresholds of the halting rules where none is given."""


class HaltingConfig(Frozen):
    """When a token stops thinking, and what it leaves behind; see `mull.model.halting` for the rules."""

    rule: str = "state"
    """``fixed``, ``state``, ``confidence``, ``kl``, ``repeat``, ``learned``, ``router``, or one of another package."""

    threshold: float | None = None
    """Where the rule stops. Tokens think longer the higher it is for ``state`` (cosine), ``confidence`` (probability), ``repeat``
    (times) and ``learned`` (cumulative probability), and the lower it is for ``kl`` (nats). None: 0.95, 0.9, 1, 0.5 and 1e-3."""

    stop: Stop = "last_kv"
    """What a stopped token offers to later tokens in the iterations that it does not run. Stored with a checkpoint: a model
    computes something else under another kind than it was trained with."""

    min_iterations: int = Field(default=1, ge=1, le=MAX_ITERATIONS)
    """No token stops before so many iterations."""

    balance_rate: float = Field(default=0.001, ge=0)
    """For ``router``: step of its bias at each optimizer step, towards equally many tokens of each depth. 0 leaves the bias as it
    is. It counts where the model is made, and not in a call."""

    @property
    def limit(self) -> float:
        """The threshold, or the rule's usual one."""
        return LIMITS.get(self.rule, 0.5) if self.threshold is None else self.threshold


class LayerRouterConfig(Frozen):
    """Which layers have a router that skips, executes or repeats them, and how it decides; see `mull.model.routing`.

    Source:
        Dr.LLM (arXiv:2510.12773), whose routers are 128 wide and in front of every layer.
    """

    hidden_size: int = Field(default=256, ge=1, le=2**20)
    """Width of a router's inner layer."""

    num_windows: int = Field(default=8, ge=1, le=2**20)
    """Windows that a prompt is cut into, for routers of sequences."""

    num_actions: Literal[2, 3] = 3
    """3: skip, execute, repeat; 2 leaves repeating out, and with it the slots of second visits."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of the probabilities that training learns by."""

    use_gumbel: bool = False
    """Training draws the action from its probability (Gumbel-softmax, arXiv:1611.01144, straight through) instead of taking the
    most probable one."""

    granularity: Literal["sequence", "token"] = "sequence"
    """``sequence``: decided once per row, on its prompt, and kept with the cache. ``token``: by each token's own state."""

    scope: Literal["think", "all"] = "think"
    """The layers of the think block, or all layers."""

    stop: Stop | None = None
    """What a token offers to later tokens in the visits that it skips. None: nothing (``active_only``); in a model with adaptive
    depth what its stopped tokens offer, since a model has one kind of stopping."""


class TokenSkipConfig(Frozen):
    """Which tokens run a layer, out of a budget for each layer; see `mull.model.token_skip`."""

    method: Literal["mod", "gate-skip", "a-mod"] = "mod"
    """``mod``: Mixture-of-Depths (arXiv:2404.02258). ``gate-skip``: GateSkip (arXiv:2510.13876). ``a-mod``: A-MoD
    (arXiv:2412.20875)."""

    capacity: float = Field(default=0.5, gt=0, le=1)
    """Share of the tokens that run a layer, once the warm-up is over."""

    scope: Literal["think", "all"] = "think"
    """The layers of the think block, or all layers."""

    every: int = Field(default=2, ge=1, le=MAX_LAYERS)
    """Tokens skip each of these layers whose number from 1 is a multiple of this; the layers between run all tokens."""

    hidden_size: int = Field(default=64, ge=1, le=2**20)
    """Width of the inner layer of the predictor that decides in use, of ``mod``."""

    score: Literal["self", "received"] = "self"
    """What ``a-mod`` ranks tokens by: the attention that a token pays to itself, which is known when it comes; or that it
    receives from all tokens, as published, which takes the whole sequence."""

    loss_weight: float = Field(default=0.1, ge=0, le=1000)
    """Weight of the loss of predictors (``mod``) or gates (``gate-skip``)."""

    stop: Stop | None = None
    """What a token offers to later tokens in the visits that it skips, as in `LayerRouterConfig`."""

    @model_validator(mode="after")
    def _check_method(self) -> "TokenSkipConfig":
        if self.score != "self" and self.method != "a-mod":
            raise ValueError(f"score={self.score!r} needs method='a-mod', not {self.method!r}: leave it out.")
        if self.method == "a-mod" and self.every < 2:
            raise ValueError(
                "method='a-mod' reads the attention of the layer before, which all tokens run: give every=2 or more."
            )
        return self


class LoRAExpertConfig(Frozen):
    """The branches of a think block with LoRA experts, and how a token gets its own; see `mull.model.experts`.

    Source:
        MoDr (ICLR 2026), which has 4 branches of rank 16 and scale 1, and chooses one for the whole text from all of its tokens.
    """

    rank: int = Field(default=16, ge=1, le=2**16)
    """Rank of each branch."""

    alpha: float = Field(default=32.0, gt=0)
    """Branches are multiplied by ``alpha / rank``."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which training drops an input of a branch."""

    target_modules: tuple[str, ...] = Field(default=("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    """Names of the linear maps of a layer that have branches. Layers without such a map have none."""

    granularity: Literal["token", "sequence"] = "token"
    """``token``: chosen by a token's own state. ``sequence``: once per row, on its prompt, and kept with the cache."""

    balance_rate: float = Field(default=0.001, ge=0)
    """Step of the gate's bias at each optimizer step, towards an even load. 0 leaves the bias as it is."""


class GatedAttentionConfig(Frozen):
    """Which layers multiply what their attention gives by a gate that reads the attention's input, and how finely.

    Source:
        Gated attention (arXiv:2505.06708), gate G1, which has gates in all layers and is trained from the start.
    """

    granularity: Literal["head", "element"] = "head"
    """A gate per head, or one for each element of its output."""

    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Numbers of the layers, from 0; None for all with softmax attention."""

    @model_validator(mode="after")
    def _check_layers(self) -> "GatedAttentionConfig":
        layers = self.layers or ()
        if len(set(layers)) < len(layers) or any(layer < 0 for layer in layers):
            raise ValueError(f"layers={list(layers)} must be different numbers of layers, from 0.")
        return self


class ETDConfig(Frozen):
    """Which decoder layers encode, think and decode, and how often the think block runs.

    Source:
        Encode-Think-Decode (arXiv:2510.07358). The paper reports one model (OLMo-2 1B, 16 layers, 7-4-5); `for_model`
        scales that split to other depths, and ``mull split`` measures one.
    """

    n_encoder_layers: int = Field(ge=0, le=MAX_LAYERS)
    """Layers that run once, before the loop."""

    n_think_layers: int = Field(ge=1, le=MAX_LAYERS)
    """Layers of the block that is iterated."""

    n_decoder_layers: int = Field(ge=0, le=MAX_LAYERS)
    """Layers that run once, after the loop."""

    max_think_iterations: int = Field(default=5, ge=1, le=MAX_ITERATIONS)
    """Passes through the think block when a call does not say ``think_iterations``; 1 is the unmodified model. A call may
    ask for more, to measure how the model extrapolates."""

    adaptive_depth: bool = False
    """Whether tokens may stop before the last iteration where a call does not say ``adaptive``."""

    confidence_threshold: float | None = Field(default=None, gt=0)
    """Short for ``halting=HaltingConfig(rule="confidence", threshold=…)``."""

    halting: HaltingConfig | None = None
    """When tokens stop in adaptive calls; the rule ``state`` if not given."""

    use_layer_router: bool | None = None
    """Whether layers have routers; None: if `layer_router` is given."""

    layer_router: LayerRouterConfig | None = None
    """How they decide; the usual settings if not given."""

    router_warmup_steps: int = Field(default=1000, ge=0)
    """Optimizer steps of the routers in which they execute every layer."""

    token_skip: TokenSkipConfig | None = None
    """Which tokens run a layer, out of a budget; None for all."""

    token_skip_warmup_steps: int = Field(default=1000, ge=0)
    """Optimizer steps of token skipping in which the share of the tokens that run falls linearly from 1 to its capacity."""

    use_lora_experts: bool | None = None
    """Whether the think block has LoRA experts; None: if `num_lora_experts` or `lora_expert` is given."""

    num_lora_experts: int | None = Field(default=None, ge=1, le=2**10)
    """How many; 4 if not given."""

    lora_expert: LoRAExpertConfig | None = None
    """What they are; the usual settings if not given."""

    expert_warmup_steps: int = Field(default=500, ge=0)
    """Optimizer steps of the experts in which training draws each token's expert uniformly."""

    @model_validator(mode="after")
    def _one_rule(self) -> "ETDConfig":
        if self.confidence_threshold is not None and self.halting is not None:
            raise ValueError(
                "confidence_threshold is short for a halting rule, and halting is given too: give one of them."
            )
        if self.router is not None and self.token_skip is not None:
            raise ValueError("Layer routers and token skipping both decide who runs a layer: give one of them.")
        if self.depth_router is not None and self.max_think_iterations < 2:
            raise ValueError(
                "halting.rule='router' chooses among 1 to max_think_iterations iterations, which is 1: give at least 2."
            )
        if self.token_skip is not None and not self.skipped_layers:
            raise ValueError(
                f"token_skip.every={self.token_skip.every} leaves no layer out of {len(self._in_scope(self.token_skip.scope))} "
                "for tokens to skip: give less, or scope='all'."
            )
        skipping, name = (self.router, "layer_router") if self.token_skip is None else (self.token_skip, "token_skip")
        if skipping is not None and skipping.stop and self.halting is not None and self.halting.stop != skipping.stop:
            raise ValueError(
                f"Stopped tokens would leave behind {self.halting.stop!r} and skipping ones {skipping.stop!r}: give halting.stop "
                f"and {name}.stop the same value."
            )
        if self.router is not None and self.stop == "share_first":
            raise ValueError(
                "Layer routers learn from tries of a layer with keys of its own, which 'share_first' would not let it see: give "
                "halting.stop and layer_router.stop another value, or leave the routers out."
            )
        return self

    @property
    def router(self) -> LayerRouterConfig | None:
        """How layer routers decide; None without them."""
        if self.use_layer_router is False or (self.use_layer_router is None and self.layer_router is None):
            return None
        return self.layer_router or LayerRouterConfig()

    @property
    def experts(self) -> LoRAExpertConfig | None:
        """What the LoRA experts are; None without them."""
        given = self.num_lora_experts is not None or self.lora_expert is not None
        if self.use_lora_experts is False or (self.use_lora_experts is None and not given):
            return None
        return self.lora_expert or LoRAExpertConfig()

    @property
    def n_experts(self) -> int:
        """How many LoRA experts there are."""
        return 0 if self.experts is None else self.num_lora_experts or 4

    @property
    def depth_router(self) -> HaltingConfig | None:
        """How the router of the think block's iterations is made; None without it."""
        return self.halting if self.halting is not None and self.halting.rule == "router" else None

    @property
    def stop(self) -> Stop:
        """What a token leaves behind in the visits that it does not run."""
        skipping = self.router or self.token_skip
        if skipping is not None and skipping.stop is not None:
            return skipping.stop
        if self.halting is not None:
            return self.halting.stop
        stops = self.adaptive_depth or self.confidence_threshold is not None
        return "last_kv" if skipping is None or stops else "active_only"

    def halting_of(self, adaptive: bool | HaltingConfig | None) -> HaltingConfig | None:
        """When tokens stop in a call with this argument; None if they all run every iteration.

        Args:
            adaptive: True takes the model's own rule; None takes `adaptive_depth`.

        Raises:
            TypeError: an argument of another type.
            ValueError: a stopped token would leave behind something else than this model was made for.
        """
        require("adaptive", adaptive, (bool, HaltingConfig, NoneType), "True, False or a HaltingConfig")
        if adaptive is False or (adaptive is None and not self.adaptive_depth):
            return None
        if isinstance(adaptive, HaltingConfig):
            fixed = self.halting is not None or self.router is not None or self.token_skip is not None
            if fixed and adaptive.stop != self.stop:
                raise ValueError(
                    f"The model's stopped tokens leave behind {self.stop!r} (etd.halting.stop), and the call asks for "
                    f"{adaptive.stop!r}, which would compute something else: give stop={self.stop!r}, or load the model with "
                    "another."
                )
            return adaptive
        if self.confidence_threshold is not None:
            return HaltingConfig(rule="confidence", threshold=self.confidence_threshold, stop=self.stop)
        return (self.halting or HaltingConfig()).model_copy(update={"stop": self.stop})

    @property
    def think_layers(self) -> range:
        """Indices of the layers that think."""
        return range(self.n_encoder_layers, self.n_encoder_layers + self.n_think_layers)

    @property
    def n_layers(self) -> int:
        """Decoder layers that the three blocks add up to."""
        return self.n_encoder_layers + self.n_think_layers + self.n_decoder_layers

    def path(self, iterations: int) -> Path:
        """The visits of a call with this many iterations; two in succession where a router may repeat a layer."""
        once = recursion(self.n_encoder_layers, self.n_think_layers, self.n_decoder_layers, iterations)
        return repeatable(once, self.routed_layers) if self._repeats else once

    @property
    def routed_layers(self) -> range:
        """Indices of the layers that have a router."""
        return range(0) if self.router is None else self._in_scope(self.router.scope)

    @property
    def skipped_layers(self) -> range:
        """Indices of the layers that tokens may skip by `token_skip`."""
        if self.token_skip is None:
            return range(0)
        layers, every = self._in_scope(self.token_skip.scope), self.token_skip.every
        return range(layers.start + every - 1, layers.stop, every)

    def _in_scope(self, scope: str) -> range:
        return self.think_layers if scope == "think" else range(self.n_layers)

    @property
    def _repeats(self) -> bool:
        return self.router is not None and self.router.num_actions == 3

    @property
    def visits_per_iteration(self) -> int:
        """How often the path visits a think layer in each iteration."""
        return 2 if self._repeats else 1

    def sections(self, iterations: int) -> tuple[slice, list[slice], slice]:
        """Where encoder, iterations and decoder are in a path of this configuration."""
        twice = self._repeats and self.router is not None and self.router.scope == "all"
        first, width = self.n_encoder_layers * (2 if twice else 1), self.n_think_layers * self.visits_per_iteration
        thinks = [slice(first + j * width, first + (j + 1) * width) for j in range(iterations)]
        last = thinks[-1].stop
        return slice(0, first), thinks, slice(last, last + self.n_decoder_layers * (2 if twice else 1))

    def check_depth(self, n_layers: int, layer_types: list[str]) -> None:
        """Refuse a split that does not add up to the model's depth.

        Raises:
            ValueError: names the model's depth and proposes a split.
        """
        if self.n_layers != n_layers:
            proposal = split_for(n_layers, layer_types)
            raise ValueError(
                f"The split {self.n_encoder_layers}+{self.n_think_layers}+{self.n_decoder_layers} covers {self.n_layers} layers, "
                f"but the model has {n_layers}. A split that fits is "
                f"{'+'.join(map(str, proposal))} (ETDConfig.for_model); `mull split` measures one."
            )

    @classmethod
    def for_model(
        cls, model: Any, split: Literal["published", "quarters"] = "published", **options: Any
    ) -> "ETDConfig":
        """Scale a published split to a model's depth.

        A model with recurrent layers keeps the period of its attention layers whole: the think block is a multiple of it, so
        that each iteration attends to the context as often as a pass through the unmodified model does.

        Args:
            model: A Hugging Face or mull model, or its configuration.
            split: ``published`` scales 7-4-5 of 16 layers, ``quarters`` 25/50/25.
            options: Further fields of the configuration.
        """
        config = getattr(model, "config", model)
        require("model", config, PreTrainedConfig, "a model or its configuration")
        config = config.get_text_config()
        encoder, think, decoder = split_for(config.num_hidden_layers, layer_kinds(config), split)
        return cls(n_encoder_layers=encoder, n_think_layers=think, n_decoder_layers=decoder, **options)


class MTPConfig(Frozen):
    """How many tokens beyond the next one a model predicts, and with which extra heads.

    Source:
        Parallel heads: arXiv:2404.19737. Sequential modules: DeepSeek-V3 (arXiv:2412.19437). Decaying weights: FastMTP
        (arXiv:2509.18362). Native heads: the ``mtp.*`` weights of released Qwen3-Next and Qwen3.5 checkpoints.
    """

    num_predict_tokens: int = Field(default=4, ge=1, le=64)
    """Number of extra heads. Head ``k`` at position ``i`` predicts token ``i + 1 + k``."""

    mtp_head_type: Literal["transformer", "mlp", "shared_lm_head", "sequential", "native"] = "transformer"
    """``transformer``: a decoder layer per head. ``mlp``: a residual map per head. ``shared_lm_head``: a linear map per head.
    ``sequential``: each head continues from the head before and the token in between. ``native``: one such module, run
    recursively, with the weights' names of Qwen3-Next and Qwen3.5. All share the model's unembedding."""

    share_weights_across_steps: bool = False
    """Use one set of weights for all heads, recursively; for ``sequential`` heads. ``native`` heads always do."""

    native_hidden_state: Literal["normed", "stream"] = "normed"
    """What ``native`` heads read from the trunk: its final-normed state, or the stream before the final norm."""

    speculation_lookahead: int = Field(default=3, ge=0, le=64)
    """Most tokens that decoding drafts per round; 0 drafts none. Heads with weights of their own draft at most
    `num_predict_tokens`, recursive ones any number."""

    loss_weight_decay: float = Field(default=0.5, gt=0, le=1)
    """Ratio of the weights of two consecutive heads in the loss: ``α_k ∝ decay^(k-1)``, and the ``α_k`` sum to 1."""

    mtp_loss_weight: float = Field(default=0.3, ge=0, le=1000)
    """Weight of all extra heads together, relative to the main head."""

    @model_validator(mode="after")
    def _check_head_type(self) -> "MTPConfig":
        if self.share_weights_across_steps and self.mtp_head_type not in ("sequential", "native"):
            raise ValueError(
                f"share_weights_across_steps needs mtp_head_type='sequential', not {self.mtp_head_type!r}: parallel heads with "
                "the same weights would all predict the same token."
            )
        if self.native_hidden_state != "normed" and self.mtp_head_type != "native":
            raise ValueError(
                f"native_hidden_state={self.native_hidden_state!r} needs mtp_head_type='native', not {self.mtp_head_type!r}: all "
                "other heads read the final-normed state. Leave it out."
            )
        return self

    @property
    def recursive(self) -> bool:
        """Whether one module, fed with its own states, is all extra heads."""
        return self.mtp_head_type == "native" or self.share_weights_across_steps

    @property
    def head_weights(self) -> tuple[float, ...]:
        """Weight of each head in the loss: 1 for the main one, then ``mtp_loss_weight · α_k``."""
        decays = [self.loss_weight_decay**k for k in range(self.num_predict_tokens)]
        return (1.0, *(self.mtp_loss_weight * decay / sum(decays) for decay in decays))


def split_for(n_layers: int, layer_types: list[str], split: str = "published") -> tuple[int, int, int]:
    """Encoder, think and decoder layers that scale a published split to `n_layers`.

    The think block is whole periods of attention. So are the other parts where three periods allow it; otherwise none is empty
    if the block leaves two layers.

    Raises:
        ValueError: unknown name of a split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known. Choose one of {', '.join(SPLITS)}.")
    encoder_share, think_share = SPLITS[split]
    period = attention_period(layer_types)
    n_think = max(int(think_share * n_layers / period + 0.5), 1) * period  # a half counts: 8-20-8 of 36, not 8-16-12
    # What is left to the parts around the think block: whole periods if there are three, or at least one layer each.
    least = period if n_layers >= 3 * period else int(n_layers >= period + 2)
    n_think = min(n_think, (n_layers - 2 * least) // period * period) or n_layers
    n_encoder = min(max(round(encoder_share * n_layers), least), n_layers - n_think - least)
    aligned = min(round(n_encoder / period), (n_layers - n_think - least) // period) * period
    if aligned >= least:
        n_encoder = aligned
    return n_encoder, n_think, n_layers - n_encoder - n_think


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Kind of each decoder layer: ``full_attention``, ``sliding_attention`` or ``linear_attention``."""
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


def attention_period(layer_types: list[str]) -> int:
    """Distance between the attention layers of a hybrid, 1 where there is none to keep."""
    attention = [layer for layer, kind in enumerate(layer_types) if kind != "linear_attention"]
    if not attention:
        return 1
    distances = {after - before for before, after in pairwise(attention)} or {attention[0] + 1}
    return distances.pop() if len(distances) == 1 else 1


def etd_from_dict(etd: Mapping[str, Any] | None) -> ETDConfig | None:
    """Read the ``etd`` entry of a stored configuration."""
    return None if etd is None else ETDConfig.model_validate(dict(etd))


def mtp_from_dict(mtp: Mapping[str, Any] | None) -> MTPConfig | None:
    """Read the ``mtp`` entry of a stored configuration."""
    return None if mtp is None else MTPConfig.model_validate(dict(mtp))


def gates_from_dict(gates: Mapping[str, Any] | None) -> GatedAttentionConfig | None:
    """Read the ``gated_attention`` entry of a stored configuration."""
    return None if gates is None else GatedAttentionConfig.model_validate(dict(gates))
