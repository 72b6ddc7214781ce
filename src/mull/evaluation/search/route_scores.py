"""What a model answers along routes, sharing what the routes have in common.

Routes run layer by layer, all of them together. Those that ran the same layers so far have one state, which runs the next layer
once; different states are stacked into one batch. States are kept for later calls, up to a number of bytes.

Shapes: R rows (one per question, or one per option of a multiple-choice question), T tokens, D model width, S states.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mull.data.arithmetic import ArithmeticTask
from mull.data.sources import Record, read_records, string_field
from mull.data.tokenizer import TextEncoder
from mull.evaluation.search.route_tree import Route
from mull.model.causal_lm import MullForCausalLM
from mull.model.executor import run
from mull.model.inputs import LayerInputs
from mull.model.path import from_actions, from_layers
from mull.ops.targets import IGNORED

CACHE_BYTES = 2**29
"""States that a runner keeps."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with an exact answer, or with options of which one is right."""

    prompt: str
    answer: str
    wrong: tuple[str, ...] = ()
    """The other options; none where the answer has to be exact."""


def load_questions(task: str, most: int | None = None, seed: int = 0) -> list[Question]:
    """Questions of a task.

    Args:
        task: ``arithmetic``, which is training questions of `mull.data.arithmetic.ArithmeticTask` as text; or what
            `mull.data.sources.read_records` reads, with ``prompt`` and ``answer``, or ``prompt``, ``choices`` and ``label``
            (number of the right choice, from 0).
        most: Only the first so many. ``arithmetic`` has 100 where it is not said.
        seed: Of generated questions.

    Raises:
        ValueError: a record of another form, or none.
        FileNotFoundError, ConnectionError, RuntimeError: as in `read_records`.
    """
    if task == "arithmetic":
        generated = ArithmeticTask(seed=seed)
        batch = generated.prompts(0, most or 100)
        texts = ([generated.decode(row).strip("_.") for row in batch[key].tolist()] for key in ("input_ids", "answers"))
        return [Question(prompt, answer) for prompt, answer in zip(*texts, strict=True)]
    questions = [_question(record) for record in read_records(task)][:most]
    if not questions:
        raise ValueError(f"{task} has no questions: give one JSON object per line.")
    return questions


def _question(record: Record) -> Question:
    prompt = string_field(record, "prompt")
    if "choices" not in record.fields:
        return Question(prompt, string_field(record, "answer"))
    choices, label = record.fields["choices"], record.fields.get("label")
    texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(choice, str) for choice in choices)
    if not texts or type(label) is not int or not 0 <= label < len(choices):
        raise ValueError(
            f"{record.place} has choices={choices!r} and label={label!r}: give at least two texts, and the number of the right "
            "one, from 0."
        )
    return Question(prompt, choices[label], (*choices[:label], *choices[label + 1 :]))


class Score(NamedTuple):
    """How a model answers one question."""

    correct: bool
    """An exact answer: every token is the model's likeliest, so greedy decoding writes it. Options: the right one has a higher
    log-likelihood, summed over its tokens, than any other."""

    loss: float
    """Nats per token of the right answer."""

    n_tokens: int
    """Tokens of the right answer."""


@dataclass(frozen=True)
class Rows:
    """Tokenized questions."""

    input_ids: Tensor
    """``[R, T]``, padded on the right."""

    attention_mask: Tensor | None
    """``[R, T]``, 0 at padding; None without any."""

    targets: Tensor
    """``[R, T]``: the next token where that belongs to an answer, -100 elsewhere."""

    of_questions: list[range]
    """Rows of each question, that of the right answer first."""

    def scores(self, logits: Tensor) -> list[Score]:
        """Judge logits ``[N, V]`` at the targets, in their order."""
        valid = self.targets >= 0
        targets, row = self.targets[valid], valid.nonzero()[:, 0]
        losses = -logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].double()
        zeros = losses.new_zeros(len(valid))
        sums = zeros.index_add(0, row, losses).tolist()
        misses = zeros.index_add(0, row, (logits.argmax(-1) != targets).double()).tolist()
        counts = valid.sum(1).tolist()
        found = []
        for right, *wrong in self.of_questions:
            correct = sums[right] < min(sums[row] for row in wrong) if wrong else misses[right] == 0
            found.append(Score(correct, sums[right] / counts[right], counts[right]))
        return found


@dataclass(frozen=True)
class RouteTask:
    """Questions, and the model that answers them."""

    model: MullForCausalLM
    """In evaluation mode. Its think iterations are left out: the plain route runs every layer once."""

    encoder: TextEncoder
    """Of the model's tokenizer."""

    questions: Sequence[Question]
    end: bool = False
    """Whether the token that ends texts belongs to an answer."""

    def rows(self, chosen: Sequence[int], wrong_options: bool = True) -> Rows:
        """The questions with these numbers, tokenized and on the model's device.

        Args:
            chosen: Numbers of the questions.
            wrong_options: Whether to have rows for these; without them, a multiple-choice question is one with an exact answer.

        Raises:
            ValueError: an answer has no token, no token comes before it, or a row is longer than the model's positions.
        """
        rows, targets, of_questions = list[Tensor](), list[Tensor](), list[range]()
        longest, device = self.model.config.get_text_config().max_position_embeddings, self.model.device
        for number in chosen:
            question = self.questions[number]
            asked = [question.answer, *question.wrong] if wrong_options else [question.answer]
            of_questions.append(range(len(rows), len(rows) + len(asked)))
            for prompt, ended in self.encoder.examples([(question.prompt, option) for option in asked]):
                answer = ended if self.end else ended[:-1]
                if not prompt or not answer or len(prompt) + len(answer) > longest:
                    raise ValueError(
                        f"Question {number} has {len(prompt)} tokens and an answer {len(answer)}: give each at least one, and "
                        f"both together at most {longest}, the positions of the model."
                    )
                rows.append(torch.tensor([*prompt, *answer], device=device))
                targets.append(torch.tensor([*[IGNORED] * (len(prompt) - 1), *answer, IGNORED], device=device))
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        padded = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
        return Rows(pad_sequence(rows, batch_first=True), None if bool(mask.all()) else mask, padded, of_questions)


Prefix = tuple[int, ...]
"""Layers that ran so far, in order: all that a state depends on."""


class SharedRuns:
    """Runs the same rows along many routes.

    Args:
        model: In evaluation mode.
        rows: The questions.
        batch_size: States that run a layer together. 1 computes what a pass of its own computes, bit for bit; a larger batch may
            round differently.
        cache_bytes: States that are kept between calls; the least recently used go first.

    Attributes:
        layers: Layers that ran, one per state.
        layers_unshared: Layers that passes of their own would have run.
    """

    def __init__(self, model: MullForCausalLM, rows: Rows, batch_size: int = 1, cache_bytes: int = CACHE_BYTES) -> None:
        self.layers = self.layers_unshared = 0
        self._model, self._rows, self._batch_size = model, rows, batch_size
        self._cache: OrderedDict[Prefix, Tensor] = OrderedDict()
        self._inputs: dict[int, LayerInputs] = {}
        self._embedded = model.model.embed_tokens(rows.input_ids).detach()
        self._most_states = cache_bytes // self._embedded.nbytes

    @torch.no_grad()
    def scores(self, routes: Sequence[Route]) -> list[list[Score]]:
        """For each route the scores of the questions."""
        norm, head, valid = self._model.model.norm, self._model.lm_head, self._rows.targets >= 0
        return [self._rows.scores(head(norm(state)[valid])) for state in self.states(routes)]

    @torch.no_grad()
    def states(self, routes: Sequence[Route]) -> list[Tensor]:
        """Final states ``[R, T, D]`` of each route, before the norm."""
        paths = [tuple(visit.layer for visit in from_actions(route)) for route in routes]
        self.layers_unshared += sum(map(len, paths))
        reached = {path: self._longest_known(path) for path in paths}
        known = {prefix: self._cache.get(prefix, self._embedded) for prefix in reached.values()}
        while waiting := [path for path, prefix in reached.items() if prefix != path]:
            following = {path: path[: len(reached[path]) + 1] for path in waiting}
            # The lowest layer first: routes that skip it wait, and then run higher layers together with the others.
            layer = min(prefix[-1] for prefix in following.values())
            batch = list(dict.fromkeys(p for p in following.values() if p[-1] == layer))[: self._batch_size]
            states = dict(zip(batch, self._run(layer, [known[prefix[:-1]] for prefix in batch]), strict=True))
            reached |= {path: prefix for path, prefix in following.items() if prefix in states}
            known = {prefix: states[prefix] if prefix in states else known[prefix] for prefix in reached.values()}
            self._cache.update(states)
            while len(self._cache) > self._most_states:
                self._cache.popitem(last=False)
        return [known[path] for path in paths]

    def _longest_known(self, path: Prefix) -> Prefix:
        """The longest beginning of a path whose state is kept."""
        known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self._cache), ())
        if known:
            self._cache.move_to_end(known)
        return known

    def _run(self, layer: int, states: Sequence[Tensor]) -> list[Tensor]:
        """S states after one more layer."""
        n_states, trunk = len(states), self._model.model
        self.layers += n_states
        h = torch.cat(list(states))  # (S * R, T, D)
        if n_states not in self._inputs:
            mask = self._rows.attention_mask
            self._inputs[n_states] = trunk.layer_inputs(h, None if mask is None else mask.repeat(n_states, 1))
        h = run(trunk.layers, trunk.kinds, from_layers([layer]), h, self._inputs[n_states])
        return [part.clone() for part in h.chunk(n_states)]  # views would keep the whole batch in memory
