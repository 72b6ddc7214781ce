r"""Find the program, or the number, in what a model wrote.

Nothing is run here. Line ends become ``\n`` first, because programs of one benchmark (MBPP) and some models have ``\r\n``.
"""

import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

PYTHON_NAMES = frozenset({"", "py", "python", "python3", "py3", "pycon", "ipython"})
"""What is written after the fence of a block that may hold the program. Most blocks have ``python`` or nothing."""

INDENT = 4
"""Spaces that HumanEval indents a body by."""

_FENCE = re.compile(r"^([ \t]*(?:[>*-][ \t]+|\d+[.)][ \t]+)?)(`{3,}|~{3,})[ \t]*([^\s`{]*)[^`]*$")
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


class FencedBlock(NamedTuple):
    """A block of code in Markdown."""

    language: str
    """The first word after the fence, in small letters; empty if there is none."""

    code: str


def unix(text: str) -> str:
    r"""Text with ``\n`` as its only line end, and without a byte-order mark."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def cut(text: str, stops: Sequence[str]) -> str:
    """Text before the first occurrence of any of the stops."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def without_thoughts(answer: str) -> str:
    """An answer without what a model thought aloud in ``<think>``, which holds drafts of programs, too.

    The template may have opened the thought in the prompt; then everything up to ``</think>`` is one. A thought that was never
    closed leaves nothing.
    """
    answer = _THOUGHT.sub("", answer)
    return answer.rpartition("</think>")[2]


def completed(prompt: str, completion: str, stops: Sequence[str]) -> str:
    """The program of a completion: the prompt, and the completion up to the first stop.

    Some tokenizers drop spaces at the beginning of a decoded text, so the first line of a body may have lost its indentation.
    It is restored where the following lines prove that: only where the program is no Python without, and is Python with it.

    Args:
        prompt: Code that the completion continues.
        completion: What the model wrote.
        stops: As published with the prompt.
    """
    body = cut(unix(completion), stops)
    program = prompt + body
    if parses(program) or not prompt.endswith("\n"):
        return program
    first, newline, rest = body.partition("\n")
    lost = INDENT - (len(first) - len(first.lstrip(" ")))
    # A body that begins in column 0 and has nothing below it may be what the model meant.
    if not first.strip() or lost <= 0 or (lost == INDENT and not rest.startswith((" ", "\t", "\n"))):
        return program
    restored = prompt + " " * lost + first + newline + rest
    return restored if parses(restored) else program


def answered(answer: str, entry_point: str, prompt: str = "") -> str:
    """The program in the answer of a chat model.

    In this order: the first fenced block that defines the entry point and is Python; such a block that is not Python, because
    no other one is better; a block, or a whole answer, that continues the prompt; lines of an answer without fences that are
    Python and define it; what remains. Blocks in other languages, and examples that only call the function, are passed over. A
    program that lacks imports or helpers of the prompt gets them before it.

    Args:
        answer: Prose and code.
        entry_point: Name that the program must define; empty for a program that reads standard input.
        prompt: Code before the answer, such as HumanEval's signature; empty if the task was told in prose.
    """
    text = without_thoughts(unix(answer))
    blocks = [undocumented(block.code) for block in fenced_blocks(text) if block.language in PYTHON_NAMES]
    preamble = preamble_of(prompt, entry_point)
    defining = [block for block in blocks if defines(block, entry_point)]
    whole = [block for block in defining if parses(block)]
    if whole or defining:
        return preamble + (whole or defining)[0]
    continuing = [*blocks, *([] if defines(text, entry_point) else [text])] if prompt else []
    for body in continuing:
        if body.strip() and (program := completed(prompt, _indented(body), ())) and parses(program):
            return program
    found = code_in_prose(text, entry_point)
    return preamble + (found or next(iter(blocks), text))


def fenced_blocks(text: str) -> list[FencedBlock]:
    """The blocks between fences, of three or more backticks or tildes; a fence that is never closed ends with the text.

    A fence closes with at least as many of the same character. A block of a list item is moved to column 0, and blocks of no
    content are left out.
    """
    blocks: list[FencedBlock] = []
    lines: list[str] = []
    opened: re.Match[str] | None = None
    for line in text.split("\n"):
        fence = _FENCE.match(line)
        if opened is None:
            opened = fence
            lines = []
        elif fence and fence[2].startswith(opened[2]) and not fence[3]:
            blocks.append(_block(opened, lines))
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        blocks.append(_block(opened, lines))
    return [block for block in blocks if block.code.strip()]


def _block(opened: re.Match[str], lines: Sequence[str]) -> FencedBlock:
    # Only the indentation of the fence is taken away: what the code has beyond it may be a body without its signature.
    width = len(opened[1].expandtabs(INDENT))
    code = "\n".join(line[width:] if not line[:width].strip() else line for line in lines)
    return FencedBlock(opened[3].strip("{}.").lower(), code + "\n")


def undocumented(code: str) -> str:
    """Code as it was typed, from a session of the interpreter (``>>>``, ``...``); other code as it is."""
    lines = code.split("\n")
    if not lines or not next((line for line in lines if line.strip()), "").lstrip().startswith(">>>"):
        return code
    typed = [re.sub(r"^\s*(?:>>>|\.\.\.) ?", "", line) for line in lines if re.match(r"\s*(?:>>>|\.\.\.)", line)]
    return "\n".join(typed) + "\n"


def code_in_prose(text: str, entry_point: str) -> str:
    """The longest run of lines that is Python and defines the entry point; empty if there is none.

    Without an entry point, the longest run that begins with a line of code and is Python.
    """
    lines = undocumented(text).split("\n")
    starts = [place for place, line in enumerate(lines) if _begins_code(line, bool(entry_point))]
    for start in starts:
        # Prose below begins in column 0, so the code ends before such a line, or with the text.
        ends = [end for end in range(start + 1, len(lines)) if lines[end][:1].strip()]
        for end in [len(lines), *reversed(ends)]:
            code = "\n".join(lines[start:end]).rstrip() + "\n"
            if parses(code) and (not entry_point or defines(code, entry_point)):
                return code
    return ""


def _begins_code(line: str, has_entry_point: bool) -> bool:
    kinds = (
        r"(?:async\s+def|def|class|import|from|@\w)"
        if has_entry_point
        else r"(?:def|class|import|from|for|while|if|\w+\s*=|\w[\w, ]*=|print\()"
    )
    return bool(re.match(kinds + r"(?:\b|\s|$)", line)) or (not has_entry_point and line.startswith("print("))


def preamble_of(prompt: str, entry_point: str) -> str:
    """Imports and helpers before the definition of the entry point in a prompt."""
    match = re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", prompt, re.MULTILINE) if entry_point else None
    return prompt[: match.start()] if match else ""


def defines(code: str, name: str) -> bool:
    """Whether code, Python or not, defines a function, a class or a variable of this name in column 0; an empty name always."""
    escaped = re.escape(name)
    return not name or bool(
        re.search(
            rf"^(?:(?:async\s+)?def\s+{escaped}\s*[(\[]|class\s+{escaped}\b|{escaped}\s*(?::[^=\n]+)?=[^=])",
            code,
            re.MULTILINE,
        )
    )


def parses(code: str) -> bool:
    """Whether code is Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escape sequences
        try:
            compile(code, "program", "exec", dont_inherit=True)  # ast.parse accepts a return outside of a function
        except (
            SyntaxError,
            ValueError,
            OverflowError,
            RecursionError,
            MemoryError,
        ):  # also thousands of nested brackets
            return False
    return True


def _indented(body: str) -> str:
    """A function's body at the indentation that it has in a prompt."""
    body = body.strip("\n")
    return textwrap.indent(textwrap.dedent(body), " " * INDENT) + "\n"


_NUMBER = re.compile(
    r"""
    (?P<sign>[-−–+]?)\s?[$€£]?\s?(?P<minus>[-−]?)
    (?:
        (?:(?P<whole>\d+)\s+)?(?P<over>\d+)\s?/\s?(?P<under>\d+)(?![\d/])(?!\s*=)  # 3/4, 1 1/2; no date, not 54/3=18
      | (?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ ]\d{3})+(?!\d)|\d+)(?P<decimals>\.\d+)?  # 1,234.50 and 1 234
      | (?P<point>\.\d+)
    )
    """,
    re.VERBOSE,
)
_FRACTION = re.compile(r"([-−]?)\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_MARKED = (
    re.compile(r"####\s*([^\n]*)"),
    re.compile(r"(?:final\s+)?answer(?:\s+is)?\s*(?::|=|\bis\b)?\s*([^\n]*)", re.IGNORECASE),
)


def final_number(text: str) -> Fraction | None:
    r"""The number that a solution ends with; None if there is none.

    In this order: after the last ``####``, in the last ``\boxed``, after the last *answer is* or *answer:*, and the last number
    of the text. Currencies, percent signs, units, separators of thousands and a full stop do not count: ``$1,234.00`` equals
    ``1234``. Percent are not divided by 100.
    """
    text = _plain(without_thoughts(unix(text)))
    for marked in (_last(_MARKED[0], text), _last_boxed(text), _last(_MARKED[1], text)):
        if marked is not None and (found := next(_numbers(marked), None)) is not None:
            return found
    return next(iter(reversed([*_numbers(text)])), None)


def _plain(text: str) -> str:
    """Text without the typography of numbers in Markdown and LaTeX."""
    text = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r" \1", text)
    text = _FRACTION.sub(r"\1\2/\3", text)
    text = re.sub(r"\\[,;! ]|\{,\}|(?<=\d)_(?=\d)", lambda match: "," if match[0] == "{,}" else "", text)
    return text.replace("\\$", "$").replace("\\%", "%").replace("**", "").replace("\u00a0", " ").replace("\u202f", " ")


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    return next((match[1] for match in reversed([*pattern.finditer(text)])), None)


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return text[begin:]


def _numbers(text: str) -> Iterator[Fraction]:
    for match in _NUMBER.finditer(text):
        before = text[: match.start()][-1:]
        if match["over"]:
            if not int(match["under"]):
                continue
            value = Fraction(int(match["over"]), int(match["under"])) + int(match["whole"] or 0)
        else:
            whole = re.sub("[, ]", "", match["digits"] or "0")
            value = Fraction(f"{whole}{match['decimals'] or match['point'] or ''}")
        # In 16-3 and "pages 3 - 5" it is an operator, or a range.
        negative = match["minus"] or (match["sign"] not in ("", "+") and not before.strip().isalnum())
        yield -value if negative else value
