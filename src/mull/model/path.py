"""Paths: which decoder layers a forward pass visits, in which order, and how often.

A path is an ordered tuple of visits ``(layer, occurrence)``. Recursion, skipping, repeating, a route found by search and a
fixed-depth export only *produce* paths; `mull.model.executor.run` executes them. The pair is the identity of a visit for
everything that is remembered between calls (keys and values, recurrent state, convolution state): see `mull.model.memory`.
"""

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from itertools import count
from typing import NamedTuple

from mull.runtime.arguments import require, require_count

MAX_ITERATIONS = 1000
"""Most passes through a think block; a path holds every visit of all of them. Published models run at most 132
(arXiv:2502.05171)."""

MAX_LAYERS = 1000
"""Most layers of one block."""


class Visit(NamedTuple):
    """One execution of one decoder layer."""

    layer: int
    """Index of the decoder layer, from 0."""

    occurrence: int
    """How often the path has visited this layer before: 0 for the first time."""


Path = tuple[Visit, ...]
"""Visits in the order in which they run."""


def from_layers(layers: Sequence[int]) -> Path:
    """Number the occurrences of a plain list of layer indices.

    ``[0, 1, 1, 2]`` becomes ``(0, 0), (1, 0), (1, 1), (2, 0)``: layer 1 is repeated, and each of its two visits remembers
    its own past.

    Raises:
        TypeError: no sequence of whole numbers.
        ValueError: the list is empty or holds a negative index.
    """
    _require_numbers("layers", layers)
    if not layers:
        raise ValueError("A path needs at least one layer: an empty list would return the embeddings unchanged.")
    if min(layers) < 0:
        raise ValueError(f"Layer indices count from 0, but the path holds {min(layers)}.")
    occurrences: dict[int, Iterator[int]] = defaultdict(count)
    return tuple(Visit(layer, next(occurrences[layer])) for layer in layers)


def recursion(n_encoder_layers: int, n_think_layers: int, n_decoder_layers: int, iterations: int) -> Path:
    """Encode once, think `iterations` times, decode once: ``E · T^k · D``.

    Raises:
        TypeError: a count that is no whole number.
        ValueError: a count outside its limits, or no layer at all.

    Source:
        Encode-Think-Decode (arXiv:2510.07358), notation ``7-4*k-5``.
    """
    require_count("n_encoder_layers", n_encoder_layers, 0, MAX_LAYERS)
    require_count("n_think_layers", n_think_layers, 0, MAX_LAYERS)
    require_count("n_decoder_layers", n_decoder_layers, 0, MAX_LAYERS)
    require_count("iterations", iterations, 0, MAX_ITERATIONS)
    layers = list(range(n_encoder_layers + n_think_layers + n_decoder_layers))
    encoder, others = layers[:n_encoder_layers], layers[n_encoder_layers:]
    return from_layers(encoder + others[:n_think_layers] * iterations + others[n_think_layers:])


def repeatable(path: Path, layers: Container[int]) -> Path:
    """A path with room to repeat: each visit of one of these layers is followed by a second one.

    Source:
        Dr.LLM (arXiv:2510.12773): a repeated layer runs twice in succession.
    """
    return from_layers([layer for layer, _ in path for _ in range(2 if layer in layers else 1)])


def from_actions(actions: Sequence[int]) -> Path:
    """Turn one action per layer (0 skip, 1 execute, 2 repeat) into a path.

    Raises:
        TypeError: no sequence of whole numbers.
        ValueError: an action outside 0, 1, 2, or every layer skipped.

    Source:
        Dr.LLM (arXiv:2510.12773): a repeated layer runs twice in succession.
    """
    _require_numbers("actions", actions)
    if unknown := sorted(set(actions) - {0, 1, 2}):
        raise ValueError(f"Layer actions are 0 (skip), 1 (execute) or 2 (repeat), but got {unknown}.")
    return from_layers([layer for layer, times in enumerate(actions) for _ in range(times)])


def check_path(path: Sequence[Sequence[int]], n_layers: int) -> Path:
    """Validate a path that came from a caller against a model of `n_layers` decoder layers.

    Args:
        path: Pairs ``(layer, occurrence)``.
        n_layers: Decoder layers of the model.

    Returns:
        The same visits as `Visit` tuples.

    Raises:
        TypeError: no list of pairs of whole numbers.
        ValueError: a layer outside the model, or occurrences that do not count up from 0.
    """
    require("path", path, (list, tuple), "a list of pairs (layer, occurrence)")
    for visit in path:
        _require_numbers("A visit of the path", visit)
    if any(len(visit) != 2 for visit in path):
        raise ValueError(
            "A path is a list of pairs (layer, occurrence); use mull.model.path.from_layers for plain layer indices."
        )
    layers = [layer for layer, _ in path]
    if layers and max(layers) >= n_layers:
        raise ValueError(f"The path visits layer {max(layers)}, but the model has layers 0 to {n_layers - 1}.")
    expected = from_layers(layers)
    for given, wanted in zip(path, expected, strict=True):
        if tuple(given) != wanted:
            raise ValueError(
                f"The path visits {tuple(given)} where {tuple(wanted)} comes next: the occurrences of a layer count up from 0. "
                "Use mull.model.path.from_layers to number them."
            )
    return expected


def relative_cost(path: Path, n_layers: int) -> float:
    """Executed decoder layers per token, relative to one plain pass through all `n_layers`."""
    return len(path) / n_layers


def _require_numbers(name: str, values: Sequence[int]) -> None:
    require(name, values, (list, tuple, range), "a list of whole numbers")
    for value in values:
        require(f"An entry of {name}", value, int, "a whole number")
