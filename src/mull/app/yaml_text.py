"""The YAML of recipes: YAML 1.2, environment variables, no key twice, and overrides of single values.

PyYAML parses; its own reading of plain values is that of YAML 1.1, where ``3:20`` is 200 and ``0200`` is 128. ruamel.yaml would
bring YAML 1.2, but also dates and ``1_000``, which the core schema does not have.
"""

import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import yaml

MAX_CHARACTERS = 100_000
"""Of a recipe. Ours have a thousand; PyYAML takes up to three seconds for 100,000."""

MAX_VALUES = 20_000
"""Of a document whose aliases are written out."""

TAG = "tag:yaml.org,2002:"
MERGE = TAG + "merge"
CORE = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
    "merge": re.compile("<<"),
}
"""Plain values that are no texts, by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, 10.3.2), in this order; and merge keys."""


class _Loader(yaml.SafeLoader):
    """PyYAML with the core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def _integer(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    try:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    except ValueError:
        raise yaml.constructor.ConstructorError(
            None, None, f"{text[:40]!r} is no whole number of at most 4,300 digits", node.start_mark
        ) from None


def _real(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _kind, _pattern in CORE.items():
    _Loader.add_implicit_resolver(TAG + _kind, re.compile(f"(?:{_pattern.pattern})$"), None)
_Loader.add_constructor(TAG + "int", _integer)
_Loader.add_constructor(TAG + "float", _real)

_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\})?")

_TAG = re.compile(r"(?:&\S+\s+)?(!\S*)")
"""A tag in front of a value, perhaps after an anchor."""


def read_yaml(text: str, source: str, place: tuple[str, ...]) -> Any:
    """Parse YAML and replace environment variables.

    Args:
        text: The document.
        source: Where it comes from, for error messages.
        place: Keys above the document, for error messages.

    Raises:
        ValueError: not YAML, too large, an alias inside what it stands for, a key given twice, or an environment variable that is
            not set.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{source} has {len(text):,} characters, and a recipe at most {MAX_CHARACTERS:,}: is it a recipe?"
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, source)
        for scalar, key in _scalars(node, place):
            tag = _TAG.match(text, scalar.start_mark.index)
            if tag is not None and tag[1] == "!":
                scalar.tag = TAG + "str"  # as YAML says; PyYAML resolves the value
            if "${" in scalar.value:
                scalar.value = _VARIABLE.sub(partial(_expand, key), scalar.value)
                if scalar.style is None and tag is None:  # not quoted
                    scalar.tag = loader.resolve(yaml.ScalarNode, scalar.value, (True, False))
            _check_tag(scalar)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply for a recipe.") from None


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_size(root: yaml.Node, source: str) -> None:
    """Refuse aliases that stand inside what they stand for, or that would make a small file huge."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in above:
            line = node.start_mark.line + 1
            raise ValueError(f"{source} has an alias in line {line} or below that stands inside what it stands for.")
        if id(node) not in sizes:
            above.add(id(node))
            sizes[id(node)] = 1 + sum(map(size, _parts(node)))
            above.discard(id(node))
        return sizes[id(node)]

    if (found := size(root)) > MAX_VALUES:
        raise ValueError(f"{source} has {found:,} values once its aliases are written out, more than {MAX_VALUES:,}.")


def _check_tag(node: yaml.Node) -> None:
    """Refuse values with a tag that they do not fit, such as ``!!int x``, and tags outside the core schema, such as dates."""
    kind = node.tag.removeprefix(TAG)
    fits = kind in ("map", "seq", "str")
    if isinstance(node, yaml.ScalarNode):
        fits = kind == "str" or (kind in CORE and CORE[kind].fullmatch(node.value) is not None)
    if not fits:
        raise ValueError(f"The tag {node.tag} in line {node.start_mark.line + 1} does not fit its value: leave it out.")


def _scalars(node: yaml.Node, place: tuple[str, ...]) -> Iterator[tuple[yaml.ScalarNode, str]]:
    """Values of a document and their keys."""
    found: dict[int, tuple[yaml.ScalarNode, str]] = {}  # by identity: an alias is the node that it refers to
    waiting = [(node, place)]
    while waiting:
        current, where = waiting.pop()
        if not isinstance(current, yaml.ScalarNode):
            _check_tag(current)
        if isinstance(current, yaml.ScalarNode):
            found[id(current)] = (current, ".".join(where))
        elif isinstance(current, yaml.SequenceNode):
            waiting += [(value, (*where, str(index))) for index, value in enumerate(current.value)]
        elif isinstance(current, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in current.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise ValueError(f"A key in line {line} is a list or a section: keys are texts.")
                _check_tag(key)
                if key.value in seen:
                    name = ".".join((*where, key.value))
                    raise ValueError(f"the key {name} is given twice, in lines {seen[key.value]} and {line}")
                seen[str(key.value)] = line
                waiting.append((value, (*where, str(key.value))))
            current.value = [(_as_text(key), value) for key, value in current.value]
    return iter(found.values())


def _as_text(key: yaml.ScalarNode) -> yaml.ScalarNode:
    """A key as text, so that ``1`` and ``01`` are two keys, and not one number twice."""
    return key if key.tag == MERGE else yaml.ScalarNode(TAG + "str", key.value, key.start_mark, key.end_mark)


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
    if not all((*sections, last)):
        raise ValueError(f"--set {assignment} has an empty key: write --set section.key=value.")
    place: Any = content
    for section in sections:
        if isinstance(place, list) and section.isdecimal() and int(section) < len(place):
            place = place[int(section)]
        else:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict | list):
            raise ValueError(f"--set {key} goes through {section}, which is a value and has no keys.")
    if isinstance(place, list):
        raise ValueError(f"--set {key} ends in a list: give the number of a stage and a key in it, from 0.")
    place[last] = read_yaml(value, f"--set {assignment}", tuple(key.split(".")))
