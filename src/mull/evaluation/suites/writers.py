"""What continues prompts: `mull.generate`, or ``generate`` of transformers. Both draw the same tokens from the same seeds."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mull.data.tokenizer import TextEncoder
from mull.decoding.generate import GenerationStats, generate
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import HaltingConfig
from mull.ops.sampling import Sampling, draw, penalize, warp

Stop = Callable[[Sequence[int]], bool]
"""Whether a row ends after these new tokens."""

CONTEXT = 8
"""Tokens of the prompt with which an answer is decoded: tokenizers drop or add a space at the beginning of a text."""


@dataclass(frozen=True)
class Route:
    """Which layers run; for models of mull."""

    think_iterations: int | None = None
    adaptive: bool | HaltingConfig | None = None
    path: tuple[tuple[int, int], ...] | None = None

    def options(self) -> dict[str, Any]:
        """Keywords of a forward pass, those that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}


OWN_ROUTE = Route()
"""The model's own."""


class Writer(Protocol):
    """Continues prompts."""

    positions: int
    """Longest text of the model."""

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Stop | None,
    ) -> list[list[int]]:
        """New tokens of each prompt, the token that ended it included. Each row draws from its own seed."""
        ...


@dataclass
class MullWriter:
    """Writes with `mull.generate`."""

    model: MullForCausalLM
    end_tokens: Sequence[int]
    route: Route = OWN_ROUTE
    draft_length: int = 0
    """Drafts per round. It is fixed, because one that follows measured times would write other samples in each run."""

    calls: list[GenerationStats] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.positions: int = self.model.config.get_text_config().max_position_embeddings

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Stop | None,
    ) -> list[list[int]]:
        """See `Writer`."""
        tokens, mask = padded(prompts)
        drafts: dict[str, Any] = {"draft": "mtp", "draft_length": self.draft_length} if self.draft_length else {}
        output = generate(
            self.model,
            tokens.to(self.model.device),
            mask.to(self.model.device),
            max_new_tokens=max_new_tokens,
            seed=list(seeds),
            eos_token_id=list(self.end_tokens),
            pad_token_id=0,
            stop=stop,
            **sampling.model_dump(),
            **self.route.options(),
            **drafts,
        )
        self.calls.append(output.stats)
        return _until_end(output.sequences[:, tokens.shape[1] :].tolist(), self.end_tokens, stop)


@dataclass
class PlainWriter:
    """Writes with ``generate`` of transformers, for architectures that mull does not have, and to check mull's own."""

    model: PreTrainedModel
    end_tokens: Sequence[int]
    route: Route = OWN_ROUTE

    def __post_init__(self) -> None:
        self.positions: int = self.model.config.get_text_config().max_position_embeddings

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        max_new_tokens: int,
        stop: Stop | None,
    ) -> list[list[int]]:
        """See `Writer`."""
        tokens, mask = padded(prompts)
        chooser = SeededChoice(sampling, seeds, mask.to(self.model.device))
        # Every setting is given here: those that a checkpoint brings, such as a repetition penalty, would change the protocol.
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.end_tokens) or None,
            pad_token_id=0,
        )
        criteria = [] if stop is None else [StopRows(stop, tokens.shape[1])]
        with OwnSettings(self.model):
            generate_tokens: Any = self.model.generate
            sequences = generate_tokens(
                tokens.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([chooser]),
                stopping_criteria=StoppingCriteriaList(criteria),
                **self.route.options(),
            )
        return _until_end(sequences[:, tokens.shape[1] :].tolist(), self.end_tokens, stop)


class SeededChoice(LogitsProcessor):
    """Chooses each row's next token as `mull.generate` does, from the row's own generator, and leaves it as the only one.

    Transformers samples all rows from one generator, so a row would depend on its batch.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], prompt_mask: Tensor) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.prompt_mask = prompt_mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with 0 at the chosen token and -inf elsewhere."""
        seen = None
        if self.sampling.needs_seen:
            new = torch.ones_like(input_ids[:, self.prompt_mask.shape[1] :])
            real = torch.cat([self.prompt_mask, new], 1).bool()
            seen = torch.zeros_like(scores, dtype=torch.bool)
            for row in range(len(scores)):
                seen[row, input_ids[row, real[row]]] = True
        if self.sampling.greedy:
            chosen = penalize(scores, self.sampling, seen).argmax(-1)
        else:
            uniform = torch.cat([torch.rand(1, dtype=torch.float64, generator=each) for each in self.generators])
            chosen = draw(warp(scores, self.sampling, seen), uniform.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


class StopRows(StoppingCriteria):
    """Ends each row by itself."""

    def __init__(self, stop: Stop, n_prompt: int) -> None:
        self.stop, self.n_prompt = stop, n_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Which rows end."""
        ends = [self.stop(row[self.n_prompt :]) for row in input_ids.tolist()]
        return torch.tensor(ends, device=input_ids.device)


class OwnSettings(AbstractContextManager[None]):
    """Hide the generation settings of a checkpoint, which transformers merges into those of a call."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.kept = model, model.generation_config

    def __enter__(self) -> None:
        self.model.generation_config = GenerationConfig()

    def __exit__(self, *_: object) -> None:
        self.model.generation_config = self.kept


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and mask ``[B, T]``, padded on the left."""
    width = max(map(len, prompts))
    rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(mask)


def _until_end(rows: list[list[int]], end_tokens: Sequence[int], stop: Stop | None) -> list[list[int]]:
    """Rows without their padding: what follows an end token, or what made the row stop."""
    found = []
    for row in rows:
        end = next((place + 1 for place, token in enumerate(row) if token in end_tokens), len(row))
        if stop is not None:
            end = next((place for place in range(1, end + 1) if stop(row[:place])), end)
        found.append(row[:end])
    return found


class AnswerReader:
    """Texts to tokens and back, for prompts and answers.

    Args:
        tokenizer: Of the model.
        chat: Put each prompt into the tokenizer's chat template.

    Raises:
        ValueError: a chat without a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
        if chat and not tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template: leave chat out, and the prompts are completed as text."
            )
        self.tokenizer, self.chat = tokenizer, chat
        self.encoder = TextEncoder(tokenizer)

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts, in the chat template if there is one to use."""
        if not self.chat:
            return self.encoder.prompts(texts)
        conversations = [[{"role": "user", "content": text}] for text in texts]
        template: Any = self.tokenizer.apply_chat_template
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return [list(template(each, **options)) for each in conversations]

    def text(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text that an answer adds to its prompt, without special tokens."""
        before = self._decoded(prompt[-CONTEXT:])
        whole = self._decoded([*prompt[-CONTEXT:], *new])
        return whole[len(before) :] if whole.startswith(before) else self._decoded(new)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stop(self, stops: Sequence[str]) -> Stop | None:
        """Whether new tokens hold one of the stops; looks at the last tokens only, which is enough when asked after each."""
        if not stops:
            return None
        reach = max(map(len, stops)) + CONTEXT

        def stopped(tokens: Sequence[int]) -> bool:
            tail = self._decoded(tokens[-reach - 16 :])  # a round of drafts may add several tokens
            return any(stop in tail for stop in stops)

        return stopped
