r"""Find the program, or the number, in what a model wrote.

Nothing is run here. Line ends become ``\n`` first, because programs of one benchmark (MBPP) and some models have ``\r\n``.
"""

import ast
import builtins
import re
import symtable
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

PYTHON_NAMES = frozenset({"", "py", "python", "python3", "py3", "pycon", "ipython"})
"""What is written after the fence of a block that may hold the program. Most blocks have ``python`` or nothing."""

INDENT = 4
"""Spaces that HumanEval indents a body by."""

_FENCE = re.compile(r"^([ \t]*(?:>[ \t]*|[*-][ \t]+|\d+[.)][ \t]+)?)(`{3,}|~{3,})[ \t]*([^\s`{]*)[^`]*$")
_END_OF_THOUGHT = r"(?<![\"'])(?:(?<=```)|(?<!`))</think>(?![\"']|`(?!``))"
_THOUGHT = re.compile(rf"\A\s*<think>.*?(?:</think>|\Z)|(?<![\"'`])<think>.*?{_END_OF_THOUGHT}", re.DOTALL)
_SPACES = {ord(space): " " for space in "\u00a0\u2002\u2003\u2009\u202f\u3000"} | dict.fromkeys(
    map(ord, "\u200b\ufeff")
)
"""Spaces that Python refuses, and signs of no width."""


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

    The template may have opened the thought in the prompt; then everything up to ``</think>`` is one. A thought that begins the
    answer and was never closed leaves nothing. Further on, ``<think>`` without an end is a word of prose, and in quotation marks
    it is one of a program.
    """
    answer = _THOUGHT.sub("", answer)
    ends = [match.end() for match in re.finditer(_END_OF_THOUGHT, answer)]
    return answer[ends[-1] :] if ends else answer


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

    In this order: the last fenced block that defines the entry point, with more than a stub, and is Python, so that a correction
    or an alternative replaces what is above it (as LiveCodeBench reads answers; EvalPlus 0.3.1 takes the longest code, and
    OpenAI's simple-evals the first); a block, or a whole answer, that continues the prompt and is no program by itself; a
    stub, or a block that defines the entry point and is not Python; lines of an answer without fences that are Python and define
    it; what remains. Blocks in other languages, and examples that only call the function, are passed over.

    From a block that is torn after the function, the rest is dropped. Imports and helpers that the program lacks come before it:
    those of the prompt, and those of other blocks.

    Args:
        answer: Prose and code.
        entry_point: Name that the program must define; empty for a program that reads standard input, where the last block that
            reads counts.
        prompt: Code before the answer, such as HumanEval's signature; empty if the task was told in prose.
    """
    text = without_thoughts(unix(answer))
    found = [undocumented(block.code) for block in fenced_blocks(text) if block.language in PYTHON_NAMES]
    blocks = [_readable(block, entry_point) for block in found]
    preamble = preamble_of(prompt, entry_point)
    defining = [place for place, block in enumerate(blocks) if defines(block, entry_point)]
    whole = [place for place in defining if parses(blocks[place])]
    if solving := [place for place in whole if _solves(blocks[place], entry_point)]:
        return _joined(preamble, blocks, solving[-1])
    # Bodies have a return, or are indented: what is Python by itself is a program, or an example.
    text = _readable(text, entry_point) if not blocks else text
    bodies = [*blocks, *([] if defines(text, entry_point) else [text])] if prompt else []
    for body in bodies:
        if body.strip() and not parses(body) and parses(program := completed(prompt, _indented(body), ())):
            return program
    if whole or defining:
        return _joined(preamble, blocks, (whole or defining)[0])
    return preamble + (code_in_prose(text, entry_point) or next(iter(blocks), text))


def _readable(code: str, entry_point: str) -> str:
    """Code with Python's spaces, and without what is torn after the function."""
    if parses(code):
        return code
    code = code.translate(_SPACES)
    if parses(moved := textwrap.dedent(code)) and entry_point and defines(moved, entry_point):
        return moved
    return code if parses(code) or not entry_point else _untorn(code, entry_point) or code


def _untorn(code: str, entry_point: str) -> str:
    """The longest beginning that is Python and defines the entry point; else a run of lines that does; else empty."""
    return _longest_run(code.split("\n"), 0, entry_point) or code_in_prose(code, entry_point)


def _solves(code: str, entry_point: str) -> bool:
    """Whether the entry point is more than a stub; without one, whether the program reads."""
    if not entry_point:
        return bool(re.search(r"\b(?:input|stdin|open)\b", code))
    functions = [
        node
        for node in ast.walk(_tree(code))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == entry_point
    ]
    return not functions or not all(all(map(_does_nothing, function.body)) for function in functions)


def _does_nothing(node: ast.stmt) -> bool:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    raises = isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node)
    return is_text or raises or isinstance(node, ast.Pass)


def _joined(preamble: str, blocks: Sequence[str], place: int) -> str:
    """One of the blocks after the preamble, and after what it reads and lacks: imports and definitions of other blocks.

    Statements with effects, such as examples, stay where they are. A name that several blocks define is that of the next one
    above, or else of the first one below.
    """
    code = blocks[place]
    if not parses(code):
        return preamble + code
    order = [other for other in [*reversed(range(place)), *range(place + 1, len(blocks))] if parses(blocks[other])]
    offered: dict[str, tuple[int, int, str]] = {}
    for other in order:
        for node in reversed([node for node in _tree(blocks[other]).body if _is_definition(node)]):
            piece = ast.unparse(node) + "\n"
            for name in ["*"] if piece.endswith("import *\n") else _names(piece)[0]:
                offered.setdefault(name, (other, node.lineno, piece))
    bound, read = _names(code)
    bound |= _names(preamble)[0] if parses(preamble) else set()
    taken = set()
    while missing := (read - bound) & offered.keys():
        taken |= {offered[name] for name in missing}
        for name in missing:
            more_bound, more_read = _names(offered[name][2])
            bound, read = bound | more_bound | {name}, read | more_read
    if read - bound - set(dir(builtins)) and "*" in offered:
        taken.add(offered["*"])
    future = "".join(
        ast.unparse(node) + "\n" for other in order for node in _tree(blocks[other]).body if _is_future(node)
    )
    lines = code.split("\n")
    own = max((node.end_lineno or 0 for node in _tree(code).body if _is_future(node)), default=0)
    head = "".join(line + "\n" for line in lines[:own])  # Python wants imports from __future__ first
    return head + future + preamble + "".join(piece for _, _, piece in sorted(taken)) + "\n".join(lines[own:])


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_definition(node: ast.stmt) -> bool:
    """An import, a function, a class, or a constant."""
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        return not any(isinstance(part, ast.Call | ast.Await | ast.NamedExpr) for part in ast.walk(node))
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return isinstance(node, kinds) and not _is_future(node)


def _tree(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def _names(code: str) -> tuple[set[str], set[str]]:
    """Names that Python binds in the module, imports included, and names of the module or of Python that it reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = [symtable.symtable(code, "program", "exec")]
    bound = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    read: set[str] = set()
    for table in tables:  # grows
        read |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced() and symbol.is_global()}
        tables += table.get_children()
    return bound, read


def fenced_blocks(text: str) -> list[FencedBlock]:
    """The blocks between fences, of three or more backticks or tildes; a fence that is never closed ends with the text.

    A fence closes with at least as many of the same character, also at the end of a line of Python, but not within a docstring. A
    block of a list item is moved to column 0, that of a quotation loses its marks, and blocks of no content are left out.
    """
    blocks: list[FencedBlock] = []
    lines = text.split("\n")
    place = 0
    while place < len(lines):
        if opened := _FENCE.match(lines[place]):
            place, block = _closed(lines, place, opened)
            blocks.append(block)
        place += 1
    return [block for block in blocks if block.code.strip()]


def _closed(lines: Sequence[str], start: int, opened: re.Match[str]) -> tuple[int, FencedBlock]:
    """The block that a line opens, and the line that closes it."""
    in_string: tuple[int, FencedBlock] | None = None
    for place in range(start + 1, len(lines)):
        fence = _FENCE.match(lines[place])
        if fence and fence[2].startswith(opened[2]) and not fence[3]:
            block = _block(opened, lines[start + 1 : place])
            if not _ends_in_string(block) and (in_string is None or parses(block.code)):
                return place, block
            in_string = in_string or (place, block)
        elif not fence and lines[place].endswith(opened[2]):
            block = _block(opened, [*lines[start + 1 : place], lines[place].rstrip("`~")])
            if block.language in PYTHON_NAMES and parses(block.code):
                return place, block
    rest = _block(opened, lines[start + 1 :])
    # The string may be what was never closed.
    return in_string if in_string and _ends_in_string(rest) else (len(lines), rest)


def _ends_in_string(block: FencedBlock) -> bool:
    return block.language in PYTHON_NAMES and "unterminated triple-quoted" in str(_refusal(block.code))


def _block(opened: re.Match[str], lines: Sequence[str]) -> FencedBlock:
    # Only the indentation of the fence is taken away: what the code has beyond it may be a body without its signature.
    width = len(opened[1].expandtabs(INDENT))
    if ">" in opened[1]:
        width, spaces = 0, len(opened[1].rpartition(">")[2])
        lines = [re.sub(rf"^[ \t]*>[ \t]{{0,{spaces}}}", "", line) for line in lines]
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
    if not _defining(entry_point).search(undocumented(text)):
        return ""
    lines = undocumented(text).split("\n")
    starts = [place for place, line in enumerate(lines) if _begins_code(line, bool(entry_point))]
    return next((code for start in starts if (code := _longest_run(lines, start, entry_point))), "")


def _longest_run(lines: Sequence[str], start: int, entry_point: str) -> str:
    """The most lines from a start that are Python and define the entry point; empty if there are none.

    A line in column 0 ends the function above it, so half a function is never left, nor is prose, which begins there, too.
    """
    ends = [len(lines), *reversed([end for end in range(start + 1, len(lines)) if lines[end][:1].strip()])]
    last = len(lines)
    for end in ends:
        if end > last:
            continue
        code = "\n".join(lines[start:end]).rstrip() + "\n"
        if (error := _refusal(code)) is None:
            return code if defines(code, entry_point) else ""
        # With the line that Python complains about, fewer lines are no Python either.
        last = start + (getattr(error, "lineno", None) or end - start) - 1
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


def _defining(name: str) -> re.Pattern[str]:
    escaped = re.escape(name)
    lines = rf"^(?:(?:async\s+)?def\s+{escaped}\s*[(\[]|class\s+{escaped}\b|{escaped}\s*(?::[^=\n]+)?=[^=])"
    return re.compile(lines if name else "", re.MULTILINE)


def defines(code: str, name: str) -> bool:
    """Whether code defines a function, a class or a variable of this name in its module; an empty name always.

    Code that is not Python may do so in column 0.
    """
    if _defining(name).search(code):
        return True
    if name not in code or not parses(code):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = symtable.symtable(code, "program", "exec")
    return name in table.get_identifiers() and table.lookup(name).is_assigned()


def parses(code: str) -> bool:
    """Whether code is Python."""
    return _refusal(code) is None


def _refusal(code: str) -> Exception | None:
    """Why code is not Python; None if it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escape sequences
        try:
            compile(code, "program", "exec", dont_inherit=True)  # ast.parse accepts a return outside of a function
        # The last two also with thousands of nested brackets.
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            return error
    return None


def _indented(body: str) -> str:
    """A function's body at the indentation that it has in a prompt."""
    body = body.strip("\n")
    return textwrap.indent(textwrap.dedent(body), " " * INDENT) + "\n"


_UNITS = r"(?:[mck]?m|[mk]?g|[mc]?l|L|mL|oz|lbs?|inch|feet|foot|ft|hours?|minutes?|pages?)"
_NUMBER = re.compile(
    rf"""
    (?P<none>[-−–+]?\s?[$€£]?\s?(?:  # dates, and commas that separate no thousands
        \d+(?:/\d+){{2,}} | \d{{4}}-\d\d-\d\d | \d+(?:\.\d+){{2,}} | \d{{1,3}}(?:,\d{{3}})+,(?:\d\d?|\d{{4,}})(?:,\d+)*
    )(?!\d))
  | (?P<sign>[-−–+]?)\s?[$€£]?\s?(?P<minus>[-−]?)
    (?:
        (?:(?P<whole>\d+)\s+)?(?P<over>\d+)\s?/\s?(?P<under>\d+)(?![\d/])(?!\s*=)  # 3/4, 1 1/2; not 54/3=18
      | (?P<digits>
            \d{{1,3}}(?:,\d{{3}})+(?![\d,]\d) | \d{{1,2}}(?:,\d\d)+,\d{{3}}(?![\d,]\d)  # 1,234 and, as in India, 12,34,567
          | \d{{1,3}}(?:[ ]\d{{3}})+(?!\d|-[a-zA-Z]|[ ]{_UNITS}[ ](?!of\b)[a-z])  # 1 234; not 5 200 g bags
          | \d+
        )
        (?P<decimals>\.\d+)?(?P<exponent>[eE][-+]?\d{{1,2}}(?!\w))?
        (?P<scales>(?:\s+(?:hundred|thousand|million|billion|trillion)\b(?!-))*)
      | (?P<point>\.\d+)
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_FRACTION = re.compile(r"([-−]?)\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LONGEST = 1000
"""Digits of a number; a model that repeats itself writes longer ones, which Python refuses to read."""

_ANSWER = re.compile(
    r"\banswer(?:\s+(?:to|of|for|in)\b[^\n.:=]{0,80}?)?(?:\s*\([^()\n]*\))?(?:\s*[:=]|\s+is\b)\s*[:=]?\s*([^\n]*)",
    re.IGNORECASE,
)
_TERM = r"[-−–]?\s?\(*\s?[-−–]?[$€£]?\d[\d,]*(?:\.\d+)?%?\)*(?:\s?/?\s?[a-z%]+\)*){0,3}?"
_CALCULATION = re.compile(rf"\A\D*?{_TERM}(?:\s*[-−–+*/x×÷·^]\s*{_TERM})+\s*=(?=\s*\S)", re.IGNORECASE)
_ANNOTATION = re.compile(r"<<[^<>\n]*(?:>>(?=\s*\$?\d)|\Z)")


def final_number(text: str) -> Fraction | None:
    r"""The number that a solution ends with; None if there is none.

    In this order: after the last ``####``, in the last ``\boxed``, after the last *answer is*, *answer to … is* or *answer:*, and
    the last number of the text. Where a calculation stands there, it is its result: 15 in *the answer is 20 - 5 = 15*.
    Currencies, percent signs, units, separators of thousands and a full stop do not count: ``$1,234.00`` equals ``1234``. Percent
    are not divided by 100. *Thousand*, *million* and the like multiply. Dates, and commas that separate no thousands, are no
    numbers.
    """
    text = _plain(without_thoughts(unix(text)))
    hashes = text.rpartition("####")[2].strip().partition("\n")[0] if "####" in text else None
    answers = [*_ANSWER.finditer(text)]
    for marked in (hashes, _last_boxed(text), answers[-1][1] if answers else None):
        if marked is None:
            continue
        while calculation := _CALCULATION.match(marked):
            marked = marked[calculation.end() :]
        if (found := next(_numbers(marked), None)) is not None:
            return found
    return next(iter(reversed([*_numbers(text)])), None)


def _plain(text: str) -> str:
    """Text without the typography of numbers in Markdown and LaTeX, and without the notes of GSM8K's calculator."""
    text = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r" \1", text)
    text = _FRACTION.sub(r"\1\2/\3", text).replace("\\times", "*").replace("\\cdot", "*")
    text = re.sub(r"\\[,;! ]|\{,\}|(?<=\d)_(?=\d)", lambda match: "," if match[0] == "{,}" else "", text)
    text = _ANNOTATION.sub("", text)
    return text.replace("\\$", "$").replace("\\%", "%").replace("**", "").replace("\u00a0", " ").replace("\u202f", " ")


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
        if match["none"] or len(match[0]) > _LONGEST:
            continue
        if match["over"]:
            if not int(match["under"]):
                continue
            value = Fraction(int(match["over"]), int(match["under"])) + int(match["whole"] or 0)
        else:
            whole = re.sub("[, ]", "", match["digits"] or "0")
            value = Fraction(f"{whole}{match['decimals'] or match['point'] or ''}{match['exponent'] or ''}")
            for scale in (match["scales"] or "").lower().split():
                value *= _SCALES[scale]
        # In 16-3 and "pages 3 - 5" it is an operator, or a range.
        negative = match["minus"] or (match["sign"] not in ("", "+") and not before.strip().isalnum())
        yield -value if negative else value
