"""Which parameters of a model are trained; the others are frozen meanwhile."""

import contextlib
import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from mull.model.causal_lm import MullForCausalLM

CHOICES = ("all", "heads", "new")


@contextlib.contextmanager
def frozen_except(model: MullForCausalLM, choice: str | Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Freeze all parameters but the chosen ones; at the end every parameter is as before.

    A frozen parameter has no gradient and no optimizer state. Layers below the first trainable one keep no activations.

    Args:
        model: The model; its parameters may be sharded in between.
        choice: As `mull.training.loop.TrainConfig.trainable`; an empty sequence freezes everything.

    Yields:
        The trainable parameters by name.

    Raises:
        ValueError: nothing in the model is what was chosen; of patterns, names the nearest parameters.
    """
    chosen = _choose(model, choice)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def _choose(model: MullForCausalLM, choice: str | Sequence[str]) -> set[int]:
    """The chosen parameters by identity, because a tied one has several names."""
    if choice == "all":
        return {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if isinstance(choice, str):
        return _added(model, choice)
    return {id(parameter) for pattern in choice for parameter in _matching(model, pattern)}


def _added(model: MullForCausalLM, choice: str) -> set[int]:
    """Parameters that are not the backbone's; of the extra heads alone, or all. Heads may share weights with the backbone."""
    module: nn.Module | None = model.mtp_heads if choice == "heads" else model
    backbone = {id(parameter) for parameter in model.backbone_parameters()}
    found = set() if module is None else {id(parameter) for parameter in module.parameters()} - backbone
    if not found:
        raise ValueError(
            f"train.trainable={choice}, but the model has no parameters beside its backbone: give it extra heads (model.mtp), or "
            "choose what to train by patterns of names."
        )
    return found


def _matching(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    """Parameters with a name like this; a tied one has several names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3) or [*named][:3]
        raise ValueError(
            f"train.trainable: no parameter of the model matches {pattern!r}. The nearest names are {', '.join(near)}."
        )
    return found


def summary(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Numbers of values by name, with ``*`` for the numbers of layers and heads."""
    counts: Counter[str] = Counter()
    for name, parameter in parameters.items():
        counts[re.sub(r"\.\d+(?=\.)", ".*", name)] += parameter.numel()
    return dict(counts)
