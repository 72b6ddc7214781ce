"""The YAML of recipes: numbers as in YAML 1.2, environment variables, no key twice, and overrides of single values."""

import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-4`` is a number, as in YAML 1.2; PyYAML reads version 1.1, which wants ``1.0e-4``."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)

_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\})?")


def read_yaml(text: str, source: str, place: tuple[str, ...]) -> Any:
    """Parse YAML and replace environment variables.

    Args:
        text: The document.
        source: Where it comes from, for error messages.
        place: Keys above the document, for error messages.

    Raises:
        ValueError: not YAML, a key given twice, or an environment variable that is not set.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        for scalar, key in _scalars(node, place):
            if "${" in scalar.value:
                scalar.value = _VARIABLE.sub(partial(_expand, key), scalar.value)
                if scalar.style is None:  # not quoted
                    scalar.tag = loader.resolve(yaml.ScalarNode, scalar.value, (True, False))
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from None


def _scalars(node: yaml.Node, place: tuple[str, ...]) -> Iterator[tuple[yaml.ScalarNode, str]]:
    """Values of a document and their keys."""
    found: dict[int, tuple[yaml.ScalarNode, str]] = {}  # by identity: an alias is the node that it refers to
    waiting = [(node, place)]
    while waiting:
        current, where = waiting.pop()
        if isinstance(current, yaml.ScalarNode):
            found[id(current)] = (current, ".".join(where))
        elif isinstance(current, yaml.SequenceNode):
            waiting += [(value, (*where, str(index))) for index, value in enumerate(current.value)]
        elif isinstance(current, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in current.value:
                line = key.start_mark.line + 1
                if key.value in seen and isinstance(key, yaml.ScalarNode):
                    name = ".".join((*where, key.value))
                    raise ValueError(f"the key {name} is given twice, in lines {seen[key.value]} and {line}")
                seen[str(key.value)] = line
                waiting.append((value, (*where, str(key.value))))
    return iter(found.values())


def _expand(key: str, match: re.Match[str]) -> str:
    name, default = match.groups()
    if match.group() == "$${":
        return "${"
    if name is None:
        raise ValueError(
            f"{key}: ${{ must begin ${{NAME}} or ${{NAME:-default}}, with a name of letters, digits and underscores; $${{ is a "
            "plain ${."
        )
    value = os.environ.get(name)
    if default is not None and not value:
        return default
    if value is None:
        raise ValueError(
            f"{key} reads the environment variable {name}, which is not set: set it, or write ${{{name}:-default}}."
        )
    return value


def override(content: dict[str, Any], assignment: str) -> None:
    """Set a value by ``section.key=value``, with the value in YAML and numbers for the places of a list.

    Raises:
        ValueError: no value, or a key inside something that has none.
    """
    key, separator, value = assignment.partition("=")
    if not separator:
        raise ValueError(f"--set {assignment} lacks a value: write --set section.key=value.")
    *sections, last = key.split(".")
    place: Any = content
    for section in sections:
        if isinstance(place, list) and section.isdigit() and int(section) < len(place):
            place = place[int(section)]
        else:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict | list):
            raise ValueError(f"--set {key} goes through {section}, which is a value and has no keys.")
    if isinstance(place, list):
        raise ValueError(f"--set {key} ends in a list: give the number of a stage and a key in it, from 0.")
    place[last] = read_yaml(value, f"--set {assignment}", tuple(key.split(".")))
