"""Generated retrieval tasks: find the value that a key had earlier in the text.

Tasks are made of token numbers, from the text of any tokenizer. Into a window of the text, facts of three tokens are written: a
marker that all facts of the example share, a key and a value. The window ends with the marker and one of the keys; the answer is
its value. With one fact, this is a needle in a haystack; with several, the key decides (multi-key).

Source:
    RULER (arXiv:2404.06654), which writes facts as sentences and asks for numbers. Random tokens need no instruction, so that
    models that are not tuned to answer can be measured, too.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

FACT = 3
"""Tokens of a fact: marker, key, value."""


class Retrieval(NamedTuple):
    """Examples of a retrieval task."""

    input_ids: Int[Tensor, "E T"]
    """Text with facts, ending with a marker and a key."""

    answers: Int[Tensor, " E"]
    """The token that should follow."""


def retrieval_task(text: Int[Tensor, "R T"], n_examples: int, n_keys: int, *, seed: int = 0) -> Retrieval:
    """Write facts into windows of a text.

    Args:
        text: Rows of token numbers without padding. Example ``e`` is made from row ``e mod R``.
        n_examples: How many examples.
        n_keys: Facts of an example.
        seed: Of places, markers, keys and values. These are tokens of the text that do not occur elsewhere in the example.

    Raises:
        ValueError: no rows or no examples, rows too short for the facts, or a text of too few different tokens.
    """
    rows, length = text.shape
    if not rows or n_examples < 1:
        raise ValueError(f"{n_examples} examples of {rows} rows of text cannot be made: both must be at least 1.")
    places = (length - 2) // FACT
    if n_keys < 1 or places < n_keys:
        raise ValueError(
            f"n_keys={n_keys} must be from 1 to {places}, the facts that fit into rows of {length} tokens."
        )
    generator = torch.Generator().manual_seed(seed)
    known = text.unique()
    examples, answers = [], []
    for number in range(n_examples):
        window = text[number % rows].clone()
        unused = known[~torch.isin(known, window)]
        if len(unused) < 1 + 2 * n_keys:
            raise ValueError(
                f"The text has {len(known)} different tokens, of which a row leaves {len(unused)} for the {1 + 2 * n_keys} of "
                f"{n_keys} facts: give more rows, or shorter ones."
            )
        drawn = unused[torch.randperm(len(unused), generator=generator)[: 1 + 2 * n_keys]]
        marker, keys, values = drawn[0], drawn[1 : 1 + n_keys], drawn[1 + n_keys :]
        for place, key, value in zip(torch.randperm(places, generator=generator)[:n_keys], keys, values, strict=True):
            window[FACT * place : FACT * place + FACT] = torch.stack([marker, key, value])
        asked = int(torch.randint(n_keys, (), generator=generator))
        window[-2:] = torch.stack([marker, keys[asked]])
        examples.append(window)
        answers.append(values[asked])
    return Retrieval(torch.stack(examples), torch.stack(answers))
