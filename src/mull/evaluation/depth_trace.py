"""What each token of a text did on its way: iterations, what the model would have said meanwhile, actions, experts."""

from itertools import pairwise
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import HaltingConfig
from mull.model.halting import accurately
from mull.model.path import Visit


class IterationTrace(BaseModel):
    """One iteration of one token."""

    model_config = ConfigDict(frozen=True)

    token: int
    """The most probable next token, decoded early: final norm and unembedding on the think state."""

    probability: float
    cosine: float
    """Of the state with the one before the iteration."""

    expert: int | None = None
    """The LoRA expert that it took; None without."""


class LayerAction(BaseModel):
    """What was decided about a token and a layer."""

    model_config = ConfigDict(frozen=True)

    layer: int
    iteration: int
    """From 1; 1 for layers outside the think block."""

    action: int
    """How often the layer runs: 0 skips it, 2 repeats it."""


class TokenTrace(BaseModel):
    """One token of the text."""

    model_config = ConfigDict(frozen=True)

    token: int
    iterations: list[IterationTrace]
    """The iterations that it ran."""

    early_exit: bool
    """It stopped before the last possible iteration."""

    loss: float | None
    """Nats of the token after it; None for the last one."""

    actions: list[LayerAction] = []
    """What layer routers or token skipping decided, in the order of the path."""


class DepthTrace(BaseModel):
    """A text, and the loss of the same text at fixed depths."""

    model_config = ConfigDict(frozen=True)

    halting: HaltingConfig
    iterations: int
    """The most."""

    tokens: list[TokenTrace]
    fixed: dict[int, float]
    """Mean loss in nats per token if every token runs so many iterations."""

    @property
    def loss(self) -> float:
        """Mean loss in nats per token, as the tokens stopped."""
        losses = [token.loss for token in self.tokens if token.loss is not None]
        return sum(losses) / len(losses)

    @property
    def mean_iterations(self) -> float:
        """Mean iterations of a token."""
        return sum(len(token.iterations) for token in self.tokens) / len(self.tokens)


@torch.no_grad()
def trace_depth(
    model: MullForCausalLM,
    input_ids: Tensor,
    halting: HaltingConfig | None = None,
    iterations: int | None = None,
    n_prompt: int | None = None,
) -> DepthTrace:
    """Run a text once adaptively and record every iteration, and once at each fixed depth.

    Args:
        model: A model with a think block, in evaluation mode.
        input_ids: ``[1, T]``, at least two tokens.
        halting: When tokens stop; None takes the model's own rule.
        iterations: The most; default as in the configuration.
        n_prompt: Tokens of the prompt, on which routers and gates of sequences decide; None for all.

    Raises:
        ValueError: not one row of at least two tokens, or no think block.
    """
    if len(input_ids) != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: give one row of at least two tokens.")
    policy = model.model.halting(True if halting is None else halting, iterations, unembed=model.lm_head)
    assert policy is not None, "a rule makes the call adaptive"
    assert model.etd_config is not None, "checked by `halting`"
    think, per_iteration = model.etd_config.think_layers, model.etd_config.visits_per_iteration
    states: list[Tensor] = []

    def keep(visit: Visit, before: Tensor, after: Tensor) -> None:
        if visit == (think.start, 0):
            states.append(before[0])
        if visit.layer == think[-1] and (visit.occurrence + 1) % per_iteration == 0:
            states.append(after[0])

    n_iterations = model.iterations(iterations)
    prompt = (torch.arange(input_ids.shape[1]) < (n_prompt or input_ids.shape[1]))[None].to(input_ids.device)
    options: dict[str, Any] = {"prompt_mask": prompt}
    out = model.model(
        input_ids, think_iterations=n_iterations, policy=policy, on_visit=keep, use_cache=False, **options
    )
    actions, experts = _decisions(model, n_iterations, out.metrics)
    losses = _losses(model, out.last_hidden_state, input_ids)
    depths = policy.metrics()["think_iterations"][0].tolist()
    readouts = [accurately(model.lm_head(model.model.norm(state))).softmax(-1).max(-1) for state in states[1:]]
    cosines = [F.cosine_similarity(accurately(after), accurately(before), dim=-1) for before, after in pairwise(states)]
    tokens = [
        TokenTrace(
            token=token,
            iterations=[
                IterationTrace(
                    token=int(readouts[j].indices[place]),
                    probability=float(readouts[j].values[place]),
                    cosine=float(cosines[j][place]),
                    expert=experts[j][place] if experts else None,
                )
                for j in range(depth)
            ],
            early_exit=depth < n_iterations,
            loss=losses[place] if place < len(losses) else None,
            actions=[
                LayerAction(layer=layer, iteration=iteration, action=of_tokens[place])
                for layer, iteration, of_tokens in actions
                if iteration <= max(depth, 1)
            ],
        )
        for place, (token, depth) in enumerate(zip(input_ids[0].tolist(), depths, strict=True))
    ]
    fixed = {}
    for depth in range(1, n_iterations + 1):
        hidden = model.hidden_states(input_ids, think_iterations=depth, **options)
        fixed[depth] = float(torch.tensor(_losses(model, hidden, input_ids)).mean())
    return DepthTrace(halting=policy.config, iterations=n_iterations, tokens=tokens, fixed=fixed)


def _decisions(
    model: MullForCausalLM, iterations: int, metrics: dict[str, Any] | None
) -> tuple[list[tuple[int, int, list[int]]], list[list[int]]]:
    """Layer, iteration and tokens' actions of each decision about a layer; and tokens' experts of each iteration."""
    config, metrics = model.etd_config, metrics or {}
    assert config is not None, "checked by the caller"
    per_iteration = config.visits_per_iteration
    layers = config.skipped_layers or config.routed_layers  # a model has one kind
    asked = [
        (visit.layer, 1 + visit.occurrence // per_iteration)
        for visit in model.path(iterations)
        if visit.layer in layers and visit.occurrence % per_iteration == 0
    ]
    made = metrics.get("router_actions") or metrics.get("token_skip_executed", [])
    decided = [actions[0].long().tolist() for actions in made]
    experts = [chosen[0].tolist() for chosen in metrics.get("expert_selections", [])]
    return [(*where, actions) for where, actions in zip(asked, decided, strict=bool(decided))], experts


def _losses(model: MullForCausalLM, hidden: Tensor, input_ids: Tensor) -> list[float]:
    logits = accurately(model.lm_head(hidden[0, :-1]))
    found: list[float] = F.cross_entropy(logits, input_ids[0, 1:], reduction="none").tolist()
    return found
