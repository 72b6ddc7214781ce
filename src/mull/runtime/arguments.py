"""What a caller passed to a public function, checked before it is used, and settings that say what they refuse."""

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, ValidationInfo, ValidatorFunctionWrapHandler, field_validator
from torch import Tensor, nn

_INTEGERS = (torch.int64, torch.int32)
"""What embeddings take."""

_SHOWN = 60

MAX_WHOLE = 10**15
"""Largest whole number of a setting, which 64-bit floats hold exactly."""


def shown(value: object) -> str:
    """A value in a message: its type, and its beginning."""
    text = "" if isinstance(value, Tensor | nn.Module) else repr(value)
    return type(value).__name__ if not text else f"{type(value).__name__} {text[:_SHOWN]}{'…' * (len(text) > _SHOWN)}"


def require(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuse a value of another type; `wanted` ends the sentence.

    Raises:
        TypeError: `value` is none of `kinds`. A bool is no int.
    """
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise TypeError(f"{name} is {shown(value)}: give {wanted}.")


def require_count(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number between two limits, both included.

    Raises:
        TypeError: no whole number.
        ValueError: below `least` or above `most`.
    """
    require(name, value, int, "a whole number")
    assert isinstance(value, int)
    if value < least or (most is not None and value > most):
        above = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name}={value} must be at least {least}{above}.")


def require_ids(name: str, value: object) -> None:
    """Refuse what is not ``[B, T]`` of whole numbers, or has no tokens.

    Raises:
        TypeError: no tensor.
        ValueError: a tensor of another type or shape.
    """
    require(name, value, Tensor, "a tensor [rows, tokens] of token numbers")
    assert isinstance(value, Tensor)
    if value.dtype not in _INTEGERS:
        raise ValueError(f"{name} has the type {value.dtype}: token numbers are torch.int64 or torch.int32.")
    if value.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; give [rows, tokens].")
    if 0 in value.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: every row needs at least one token.")


def require_shape(name: str, value: Tensor, *shapes: Sequence[int]) -> None:
    """Refuse a tensor that has none of these shapes.

    Raises:
        ValueError: the shape is another one.
    """
    if all(value.shape != torch.Size(shape) for shape in shapes):
        wanted = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(map(tuple, shapes)))
        raise ValueError(f"{name} has shape {tuple(value.shape)}, and the tokens of the call need {wanted}.")


def require_number(name: str, value: object) -> None:
    """Refuse what is no finite number.

    Raises:
        TypeError: no number.
        ValueError: infinite or NaN.
    """
    require(name, value, (int, float), "a number")
    assert isinstance(value, int | float)
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite.")


def require_seed(name: str, value: object) -> None:
    """Refuse what numpy or torch cannot seed a generator with.

    Raises:
        TypeError: no whole number.
        ValueError: negative, or 2^63 and more.
    """
    require_count(name, value, 0, 2**63 - 1)


def require_callable(name: str, value: object, wanted: str) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: names the argument.
    """
    if not callable(value):
        raise TypeError(f"{name} is {shown(value)}: give {wanted}.")


def require_tensors(**given: object) -> None:
    """Refuse what is neither a tensor nor None.

    Raises:
        TypeError: names the argument.
    """
    for name, value in given.items():
        if value is not None:
            require(name, value, Tensor, "a tensor, or leave it out")


def nearest(name: str, known: Iterable[str], prefix: str = "", elsewhere: Sequence[str] = ()) -> str:
    """What a misspelt name may have meant, as a sentence.

    Args:
        name: What was given.
        known: What is allowed, in the order in which it is listed.
        prefix: Goes before a known name.
        elsewhere: Where the same name is known.
    """
    names = list(known)
    near = [*(prefix + match for match in difflib.get_close_matches(name, names, n=1)), *elsewhere]
    return f"Did you mean {near[0]}?" if near else f"Known are {', '.join(names)}."


class Frozen(BaseModel):
    """Settings: checked once, then constant. Unknown keys, infinite or very large numbers, and bools as numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Refuse unknown fields of a call in one sentence; those of a mapping are left to pydantic, which knows their place."""
        for name in given:
            if name not in cls.model_fields:
                raise ValueError(f"{cls.__name__} has no field {name}. {nearest(name, cls.model_fields)}")
        return super().__new__(cls)

    @field_validator("*", mode="wrap")
    @classmethod
    def _check_numbers(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Pydantic alone would read True as 1."""
        kinds = _leaves(cls.model_fields[str(info.field_name)].annotation)
        truths = [item for item in _items(value) if isinstance(item, bool)]
        if truths and bool not in kinds and kinds & {int, float}:
            raise ValueError(f"{truths[0]} is no number")
        checked = handler(value)
        if any(isinstance(item, int) and abs(item) > MAX_WHOLE for item in _items(checked)):
            raise ValueError(f"{shown(value)} is too large: whole numbers end at {MAX_WHOLE:,}")
        return checked


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _leaves(annotation: Any) -> set[Any]:
    """Types and literal values that an annotation allows, at any depth."""
    inner = get_args(annotation)
    return {annotation} if not inner else set().union(*map(_leaves, inner))
