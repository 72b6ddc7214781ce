"""The program, or the number, is found in every form in which models are known to write it."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from mull.evaluation.suites.extract import (
    answered,
    code_in_prose,
    completed,
    cut,
    defines,
    fenced_blocks,
    final_number,
    parses,
    without_thoughts,
)

# ruff: noqa: E501
PROMPT = 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum of xs.\n    >>> total([1, 2])\n    3\n    """\n'
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
TWO = ("[1, 2]", 3)


def solves(program: str) -> bool:
    names: dict[str, object] = {}
    exec(program, names)
    return names["total"]([1, 2, 3]) == 6  # type: ignore[operator]


COMPLETIONS = {
    "plain": "    return sum(xs)\n",
    "no line end": "    return sum(xs)",
    "further function": "    return sum(xs)\n\n\ndef other():\n    return (\n",
    "further class": "    return sum(xs)\nclass A(\n",
    "main": "    return sum(xs)\n\nif __name__ == '__main__':\n    main(\n",
    "print": "    return sum(xs)\nprint(total(",
    "comment": "    return sum(xs)\n# Test\nassert total(",
    "windows": "    n = 0\r\n    for x in xs:\r\n        n += x\r\n    return n\r\n",
    "tabs": "\tn = sum(xs)\n\treturn n\n",
    "comment inside": "    # add them\n    return sum(xs)\n",
    "nested function": "    def add(a, b):\n        return a + b\n    n = 0\n    for x in xs:\n        n = add(n, x)\n    return n\n",
    "blank line first": "\n    return sum(xs)\n",
    "one space lost": "   return sum(xs)\n",
    "all spaces lost, lines below": "n = 0\n    for x in xs:\n        n += x\n    return n\n",
    "one space lost, lines below": "   n = 0\n    for x in xs:\n        n += x\n    return n\n",
    "spaces lost before a comment": "# add\n    return sum(xs)\n",
}


@pytest.mark.parametrize("form", COMPLETIONS)
def test_a_completion_becomes_a_program(form: str) -> None:
    if form == "tabs":  # the docstring has spaces: Python refuses the mixture, as HumanEval's own harness does
        assert not parses(completed(PROMPT, COMPLETIONS[form], STOPS))
        return
    assert solves(completed(PROMPT, COMPLETIONS[form], STOPS))


def test_a_body_that_the_model_put_in_column_0_is_not_repaired() -> None:
    assert not parses(completed(PROMPT, "return sum(xs)\n", STOPS))
    assert completed(PROMPT, "x = (\n", STOPS) == PROMPT + "x = (\n"


def test_the_first_of_several_stops_counts() -> None:
    assert cut("a\nprint\nclass", STOPS) == "a"
    assert cut("a [DONE] b [DONE]", ("[DONE]",)) == "a "
    assert cut("abc", ()) == "abc"


GOOD = "def total(xs):\n    return sum(xs)\n"
BAD = "def total(xs):\n    return 0\n"
ANSWERS = {
    "one block": f"Here it is:\n```python\n{GOOD}```\nIt adds them.",
    "py": f"```py\n{GOOD}```",
    "Python, capital": f"```Python\n{GOOD}```",
    "python3": f"```python3\n{GOOD}```",
    "attributes": f'```python title="a.py"\n{GOOD}```',
    "space before the name": f"``` python\n{GOOD}```",
    "no name": f"```\n{GOOD}```",
    "tildes": f"~~~python\n{GOOD}~~~",
    "four backticks": f"````python\n{GOOD}````",
    "unclosed": f"Sure!\n```python\n{GOOD}",
    "unclosed, cut inside a later block": f"```python\n{GOOD}```\nExample:\n```python\nprint(total(",
    "windows": f"Here:\n```python\n{GOOD}```\n".replace("\n", "\r\n"),
    "usage first": f"You call it so:\n```python\ntotal([1])\n```\nThe function:\n```python\n{GOOD}```",
    "usage after": f"```python\n{GOOD}```\nUse:\n```python\nprint(total([1, 2]))\n```",
    "shell first": f"```bash\npip install numpy\n```\n```python\n{GOOD}```",
    "output after": f"```python\n{GOOD}```\n```text\ntotal = 3\n```",
    "prose in the fence": f"```python\nHere is the code:\n\n{GOOD}\nIt adds them.\n```",
    "constant of another block": "```python\nBASE = 0\n```\nThen:\n```python\nZERO = BASE * 2\ndef total(xs):\n    return sum(xs, ZERO)\n```",
    "stub that only says what it does": f"```python\n{GOOD}```\nIt fills:\n```python\ndef total(xs):\n    'Sums.'\n    pass\n```",
    "stub of dots that raises": f"```python\n{GOOD}```\nIt fills:\n```python\ndef total(xs):\n    ...\n    raise NotImplementedError\n```",
    "broken draft first": f"```python\ndef total(xs):\n    return sum(xs\n```\nCorrected:\n```python\n{GOOD}```",
    "corrected": f"```python\n{BAD}```\nThat is wrong. Corrected:\n```python\n{GOOD}```",
    "corrected, cut": f"```python\n{GOOD}```\nFaster:\n```python\ndef total(xs):\n    n = 0\n    for x in xs:\n        n +=",
    "usage that repeats the stub": f"```python\n{GOOD}```\nIt fills this:\n```python\ndef total(xs):\n    ...\n```",
    "stub first": f"You gave:\n```python\n{PROMPT}    pass\n```\nSolution:\n```python\n{GOOD}```",
    "docstring first": f"You gave:\n```python\n{PROMPT}```\nSolution:\n```python\n{GOOD}```",
    "stub that raises first": f"```python\ndef total(xs):\n    raise NotImplementedError('todo')\n```\nNow:\n```python\n{GOOD}```",
    "stub, then body": f"You gave:\n```python\n{PROMPT}```\nThe body:\n```python\n    n = sum(xs)\n    return n\n```",
    "helper in another block": "First:\n```python\nZERO = -0\ndef add(a, b=ZERO):\n    return a + b\n```\nThen:\n```python\ndef total(xs):\n    n = 0\n    for x in xs:\n        n = add(n, x)\n    return n\n```",
    "helper of a helper below": "```python\ndef total(xs):\n    return add(xs)\n```\nwith\n```python\ndef add(xs):\n    return math.fsum(xs)\n```\nand\n```python\nimport math\n```",
    "star import in another block": "```python\nfrom math import *\n```\n```python\ndef total(xs):\n    return fsum(xs)\n```",
    "statement beside a helper": "```python\ndef add(xs):\n    return sum(xs)\nadd(missing)\nx = print(add(5))\n```\n```python\ndef total(xs):\n    return add(xs)\n```",
    "usage that imports": f"```python\n{GOOD}```\nUse:\n```python\nfrom solution import total\nprint(total([1, 2]))\n```",
    "cut after the function": f"```python\nONE = 1\n{GOOD}\nprint(total(",
    "cut inside the next function": f"```python\n{GOOD}\ndef other(xs):\n    for x in",
    "fence in a docstring": '```python\ndef total(xs):\n    """Like\n    ```\n    total([1])\n    ```\n    """\n    return sum(xs)\n```\nDone.',
    "named fence in a docstring": '```python\ndef total(xs):\n    """Like\n    ```python\n    total([1])\n    ```\n    """\n    return sum(xs)\n```\nUse:\n```python\ntotal([1])\n```',
    "fence ends the last line": "```python\ndef total(xs):\n    return sum(xs)```\nUse:\n```python\nprint(total([1]))\n```",
    "quoted": "> ```python\n> def total(xs):\n>\n>     return sum(xs)\n> ```\nDone.",
    "quoted, tight": ">```python\n>def total(xs):\n>    return sum(xs)\n>```",
    "no-break spaces": "```python\ndef total(xs):\n\u00a0\u00a0\u00a0\u00a0return\u00a0sum(xs)\n```",
    "wide spaces": "```python\ndef total(xs):\n\u3000return sum(xs)\u200b\n```",
    "thought named in prose": f"I used the <think> tag.\n```python\n{GOOD}```",
    "thought named in code": "```python\ndef total(xs):\n    s = '<think>'\n    return sum(xs)\n```",
    "end of a thought named in code": "```python\ndef total(xs):\n    s = '<think></think>'\n    t = \"</think>\"\n    return sum(xs)\n```",
    "two thoughts": f"\n<think>a</think>\n<think>```python\n{BAD}```</think>\n```python\n{GOOD}```",
    "future import": f"```python\n'Sums.'\nfrom __future__ import annotations\n{GOOD}```",
    "future import in another block": "```python\nfrom __future__ import annotations\ndef add(xs: Missing):\n    return sum(xs)\n```\n```python\ndef total(xs: Missing):\n    return add(xs)\n```",
    "moved to the right": "```python\n    def total(xs):\n        return sum(xs)\n```",
    "moved to the right, no fence": "    def total(xs):\n        return sum(xs)\n",
    "under a condition": "```python\nif True:\n    def total(xs):\n        return sum(xs)\n```",
    "one of several assigned": "```python\ntotal, other = sum, 2\n```",
    "list item": "1. Write:\n\n   ```python\n   def total(xs):\n       return sum(xs)\n   ```\n2. Done.",
    "repeated signature": f"```python\n{PROMPT}    return sum(xs)\n```",
    "signature of the prompt's types, no import": "```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```",
    "body only": "```python\n    return sum(xs)\n```",
    "body only, in column 0": "```python\nn = sum(xs)\nreturn n\n```",
    "body only, no fence": "    n = sum(xs)\n    return n\n",
    "no fence": f"{GOOD}",
    "prose around, no fence": f"Sure, here is the code:\n\n{GOOD}\nThis function adds the numbers.",
    "imports, no fence": f"Sure:\nimport math\nfrom typing import List\n\n{GOOD}\nHope it helps!",
    "doctest": "```python\n>>> def total(xs):\n...     return sum(xs)\n...\n>>> total([1, 2])\n3\n```",
    "thoughts": f"<think>Perhaps\n```python\n{BAD}```\nNo.</think>\n```python\n{GOOD}```",
    "thoughts opened by the template": f"Perhaps\n```python\n{BAD}```\nNo.</think>\n```python\n{GOOD}```",
    "lambda": "```python\ntotal = lambda xs: sum(xs)\n```",
    "helper first": "```python\ndef add(a, b):\n    return a + b\n\ndef total(xs):\n    n = 0\n    for x in xs:\n        n = add(n, x)\n    return n\n```",
    "async elsewhere": f"```python\nasync def other():\n    pass\n\n{GOOD}```",
    "fence in a string": '```python\ndef total(xs):\n    """Like\n    ``sum``"""\n    return sum(xs)\n```',
    "byte-order mark": f"\ufeff```python\n{GOOD}```",
}


@pytest.mark.parametrize("form", ANSWERS)
def test_an_answer_becomes_a_program(form: str) -> None:
    assert solves(answered(ANSWERS[form], "total", PROMPT))


@pytest.mark.parametrize("form", [form for form in ANSWERS if "body" not in form and "import" not in form])
def test_the_same_without_code_in_the_prompt(form: str) -> None:
    assert solves("from typing import List\n" + answered(ANSWERS[form], "total"))


@pytest.mark.parametrize(
    "answer", ["", "I cannot do that.", "<think>def total(xs): return sum(xs)", "```python\n```", "```json\n{}\n```"]
)
def test_an_answer_without_a_program_is_no_solution(answer: str) -> None:
    program = answered(answer, "total", PROMPT)
    assert not parses(program) or "total" not in program or not defines(program.replace(PROMPT, ""), "total")


def test_of_two_solutions_the_last_counts() -> None:
    assert not solves(answered(f"```python\n{GOOD}```\nOr, worse:\n```python\n{BAD}```", "total", PROMPT))


@pytest.mark.parametrize("body", ["print(xs)", "raise ValueError(xs)", "xs.sort()"])
def test_a_function_that_returns_nothing_is_no_stub(body: str) -> None:
    code = f"def total(xs):\n    {body}\n"
    assert code in answered(f"```python\n{GOOD}```\nBetter:\n```python\n{code}```", "total", PROMPT)


def test_what_is_python_stays_as_it_was_written() -> None:
    code = "def total(xs):\n    return 'a\u00a0b'\n"
    assert code in answered(f"```python\n{code}```", "total", PROMPT)


def test_a_program_is_no_body_of_the_prompts_function() -> None:
    for code in ("class Solution:\n    def total(self, xs):\n        return sum(xs)\n", "print(total([1, 2]))\n"):
        assert answered(f"```python\n{code}```", "total", PROMPT).endswith("\n" + code)


def test_half_a_function_is_not_taken_for_a_whole_one() -> None:
    for tail in ("    if not xs:\n        return 0\n    return sum(", '    return 0\n    """\nfor x'):
        assert not parses(answered(f"```python\ndef total(xs):\n{tail}", "total", PROMPT))


def test_a_script_reads_standard_input() -> None:
    code = "n = int(input())\nprint(2 * n)\n"
    assert answered(f"For the input\n```\n3\n```\nrun\n```python\n{code}```\nIt prints\n```\n6\n```", "") == code
    torn = "n = int(input())\nprint(2 * n)\nprint("
    assert answered(f"```python\n{torn}", "") == torn + "\n"  # what is left might pass by chance


def test_helpers_of_the_prompt_are_kept_and_may_be_replaced() -> None:
    prompt = "import math\n\ndef twice(x):\n    return 2 * x\n\n\ndef total(xs):\n    '''Sum.'''\n"
    program = answered("```python\ndef total(xs):\n    return twice(sum(xs)) // 2\n```", "total", prompt)
    assert solves(program)


def test_a_program_that_reads_standard_input_has_no_name() -> None:
    code = "n = int(input())\nprint(2 * n)\n"
    assert answered(f"Read it:\n```python\n{code}```", "") == code
    assert answered(f"Solution:\n\n{code}", "").strip() == code.strip()
    assert code_in_prose(code, "") == code


@pytest.mark.parametrize("text", ["```python\na\n```", "~~~\na\n~~~~", "````\na\n````", "```\na", "So:\n~~~py\na\n"])
def test_fences(text: str) -> None:
    """The last two are never closed."""
    assert [block.code.rstrip("\n") for block in fenced_blocks(text)] == ["a"]


def test_a_shorter_fence_does_not_close_a_longer_one() -> None:
    [block] = fenced_blocks("````md\n```python\na\n```\n````\nafter")
    assert block.code == "```python\na\n```\n"
    assert fenced_blocks("```a``` inline") == []


def test_thoughts_leave() -> None:
    assert without_thoughts("<think>a</think>b<think>c</think>d") == "bd"
    assert without_thoughts("a</think>b") == "b"
    assert without_thoughts("<think>never closed") == ""


NUMBERS = {
    "She has 3 apples.\n#### 18": 18,
    "#### 1,234": 1234,
    "#### -5": -5,
    "#### $18": 18,
    "#### $1,234.50": Fraction(2469, 2),
    "#### 18.00": 18,
    "#### 18.": 18,
    "#### 12 hours a day for 7 days": 12,
    "#### 25%": 25,
    "#### 3/4": Fraction(3, 4),
    "#### 1 1/2": Fraction(3, 2),
    "####18": 18,
    "#### 5\n#### 6": 6,
    "####\n": None,
    "So \\boxed{42}.": 42,
    "So \\boxed{\\$1{,}234}.": 1234,
    "So \\boxed{\\frac{3}{4}} of 5.": Fraction(3, 4),
    "So \\boxed{-\\frac{1}{2}}": Fraction(-1, 2),
    "So \\boxed{18\\text{ dollars}} and 3 more.": 18,
    "\\boxed{5}, no, \\boxed{6}": 6,
    "The answer is 7 because 3 + 4 = 7, not 8.": 7,
    "The answer is: **$1,000**.": 1000,
    "Answer: 12 apples in 3 baskets": 12,
    "The final answer is -3.": -3,
    "the answer is −3": -3,
    "the answer is -$3": -3,
    "the answer is $-3": -3,
    "the answer is unknown, but 4 fits": 4,
    "She pays 2 * 3 = $6 in all.": 6,
    "It costs $18.00": 18,
    "That is 16-3 = 13": 13,
    "16-3": 3,
    "1 234 567": 1234567,
    "1\u202f234": 1234,
    "1,23": 23,
    "He runs .5 miles": Fraction(1, 2),
    "about 3.50 dollars": Fraction(7, 2),
    "In 2/0 there is none, 5 is": 5,
    "no number": None,
    "": None,
    "<think>so 5</think>It is 6": 6,
    "10_000": 10000,
    "It rose by 20 %": 20,
    "A half, 1/2": Fraction(1, 2),
    "three": None,
    "x = 5 y = 6.\r\n#### 7\r\n": 7,
    "The answer is 12 + 5 = 17": 17,
    "Answer: 3 * 6 = 18": 18,
    "The answer is 20-5=15": 15,
    "The answer is (3 + 4) * 2 = 7 * 2 = 14.": 14,
    "The answer is 3 apples * $6/apple = $18.": 18,
    "The answer is 17 = 12 + 5": 17,
    "the answer is x = 18": 18,
    "\\boxed{3 \\times 6 = 18}": 18,
    "#### 5 - 3 = 2": 2,
    "#### 2 - 5 = -3": -3,
    "#### 20/4=5": 5,
    "#### <<2*9=18>>18": 18,
    "#### <<2*9=18>>": 18,
    "she eats 54 / 3 = <<54/3=": 3,
    "The answer to question 3 is 18": 18,
    "The answer to the 2nd part is: 18": 18,
    "Answer (in dollars): 18 of 20": 18,
    "In 2 hours she can answer 15 questions": 15,
    "= $18\n\nI hope this answers your 2 questions, 19": 19,
    "It answers 2 or, in the answer of 3, 4": 4,
    "#### 18 #### 20": 20,
    "1,000,00": None,
    "It costs 7. 1,000,00": 7,
    "12,34,567": 1234567,
    "10/12/2020": None,
    "She was 7 on 10/12/2020": 7,
    "She was 7 on 2020-12-10 and 10.12.2020": 7,
    "5 200 g bags": 200,
    "The answer is 5 200 g bags": 5,
    "The answer is 4 100-dollar bills": 4,
    "#### 100 000": 100000,
    "#### 1 000 g": 1000,
    "The answer is 1.5e3": 1500,
    "1.5e-1": Fraction(3, 20),
    "3e99999999999": 99999999999,
    "3eggs": 3,
    "The answer is $5 million.": 5000000,
    "#### 2.5 Thousand": 2500,
    "He has 3 hundred thousand": 300000,
    "#### 2 million-dollar houses": 2,
    "It is 5. " + "9" * 6000: 5,
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:40])
def test_the_final_number(text: str) -> None:
    assert final_number(text) == NUMBERS[text]


def test_every_gold_answer_of_gsm8k_is_read(data: Path) -> None:
    answers = [json.loads(line)["answer"] for line in (data / "gsm8k_test.jsonl").read_text().splitlines()]
    assert all(str(final_number(text)) == text.rpartition("#### ")[2].replace(",", "") for text in answers)


def test_an_answer_that_repeats_itself_takes_no_long_time() -> None:
    begin = time.process_time()
    torn = "import math\n" * 300 + "def total(xs):\n    return (\n" * 60
    for answer in (torn, f"```python\n{torn}", "```python\nx```\n(\n" * 500, '```python\n"""\n' + "```\n" * 500):
        answered(answer, "total")
    for text in ("answer to " * 3000, "3 apples * 4 " * 2000, "1,1/1 " * 2000, "3" * 9000, "<think>" * 300):
        final_number("The answer is " + text)
    assert time.process_time() - begin < 5
