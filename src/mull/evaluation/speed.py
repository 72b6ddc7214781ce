"""Variants of decoding against each other, in turns in one process, with the same weights and prompts.

A variant continues a batch of prompts. Each round runs all of them on every prompt, and each prompt begins with another one, so
that a drifting machine affects all alike. The time of a call includes the prompt. The first round warms up; what mull compiles
after that is left out.

Shapes: B rows, T tokens.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mull.decoding.generate import GenerationStats, generate
from mull.evaluation.acceptance import acceptance_by_position
from mull.model.causal_lm import MullForCausalLM
from mull.runtime.progress import Progress
from mull.runtime.timing import synchronize


@dataclass(frozen=True)
class Outcome:
    """What one call returned."""

    rows: list[list[int]]
    """The new tokens of each row."""

    stats: GenerationStats | None = None
    """`mull.generate`'s account of the call."""


Variant = Callable[[Tensor, Tensor], Outcome]
"""Continues ``input_ids [B, T]`` under ``attention_mask [B, T]``."""


@dataclass(frozen=True)
class Timing:
    """All calls of one variant."""

    seconds: list[list[float]]
    """By round, without the first, which warms up, and prompt."""

    outcomes: list[list[Outcome]]
    """By round, the first included, and prompt."""

    @property
    def tokens(self) -> list[int]:
        """New tokens of each prompt in a round."""
        return [sum(map(len, outcome.rows)) for outcome in self.outcomes[-1]]

    @property
    def per_second(self) -> list[float]:
        """Tokens per second of each round."""
        return [sum(self.tokens) / sum(seconds) for seconds in self.seconds]

    @property
    def stats(self) -> list[GenerationStats]:
        """Of the timed calls; none where the variant gives no account."""
        outcomes = [outcome for of_round in self.outcomes[1:] for outcome in of_round]
        return [outcome.stats for outcome in outcomes if outcome.stats is not None]

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens per row and forward pass after the prompt; None if the variant does not report it."""
        n_passes = sum(one.row_rounds for one in self.stats)
        return 1 + sum(sum(one.accepted) for one in self.stats) / n_passes if n_passes else None

    @property
    def acceptance(self) -> list[float]:
        """Share of accepted drafts by position, of those whose predecessors were accepted."""
        return [position.conditional for position in acceptance_by_position(self.stats)]


def mull_variant(
    model: MullForCausalLM, tokens: int, options: Mapping[str, Any], *, temperature: float = 0.0
) -> Variant:
    """`mull.generate` with these options, for `tokens` tokens whatever is written."""
    # What mull learns of a model and prepares for it belongs to the object: with one per variant, none evicts another's.
    own = copy.copy(model)

    def run(ids: Tensor, mask: Tensor) -> Outcome:
        sampling = {"temperature": temperature, "seed": 0}
        fixed = {"max_new_tokens": tokens, "eos_token_id": (), "pad_token_id": 0}
        out = generate(own, ids, mask, **fixed, **sampling, **options)  # type: ignore[arg-type]
        return Outcome(out.sequences[:, ids.shape[1] :].tolist(), out.stats)

    return run


def stock_variant(model: Any, tokens: int, options: Mapping[str, Any], *, temperature: float = 0.0) -> Variant:
    """``generate`` of transformers with these options. Whether a text may end early is in the model's generation config."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def run(ids: Tensor, mask: Tensor) -> Outcome:
        fixed = {"attention_mask": mask, "max_new_tokens": tokens, "pad_token_id": 0}
        out = model.generate(ids, **fixed, **sampling, **options)
        return Outcome(out[:, ids.shape[1] :].tolist())

    return run


def measure_in_turns(
    variants: Mapping[str, Variant], prompts: Sequence[tuple[Tensor, Tensor]], rounds: int, label: str
) -> dict[str, Timing]:
    """Run all variants in turns on each prompt: a round to warm up, then `rounds`. Each prompt begins with another variant."""
    names, n_prompts = list(variants), len(prompts)
    turns = [names[place % len(names) :] + names[: place % len(names)] for place in range(n_prompts)]
    calls = [
        (number, place, name) for number in range(rounds + 1) for place in range(n_prompts) for name in turns[place]
    ]
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(rounds + 1)] for name in names}
    outcomes: dict[str, list[list[Outcome]]] = {name: [[] for _ in range(rounds + 1)] for name in names}
    with Progress(len(calls), "call", label=label) as bar:
        for number, place, name in calls:
            ids, mask = prompts[place]
            synchronize(ids.device)
            started = time.perf_counter()
            outcome = variants[name](ids, mask)
            synchronize(ids.device)
            warm_up = 0.0 if outcome.stats is None else outcome.stats.warm_up_seconds
            seconds[name][number].append(time.perf_counter() - started - warm_up)
            outcomes[name][number].append(outcome)
            bar.advance()
    return {name: Timing(seconds[name][1:], outcomes[name]) for name in names}
