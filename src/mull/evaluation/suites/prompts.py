"""How each suite asks, where an answer ends, and which program it is. Prompts are the published ones, exactly.

A *completion* continues the text of the prompt, as base models are evaluated. A *chat* puts the task into one message of the
user, and the program is looked for in the answer. EvalPlus' own sentence asks for it there, because HumanEval and MBPP
published none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from mull.data.tasks import CODE_CONTESTS_PROMPT, MBPP_PROMPT
from mull.evaluation.suites.extract import answered, completed, cut, unix, without_thoughts
from mull.evaluation.suites.problems import GSM8K_SHOTS, Problem, Problems, Suite

GSM8K_SEED = 1234
"""Of the generator from which lm-eval draws training problems."""

ASK = "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n```\n{}\n```"
"""EvalPlus 0.3.1, ``instruction_prefix`` of its command."""

CONTEST = (
    "Please write a Python 3 program that reads standard input and writes standard output, in a markdown code block, for the "
    "following problem:\n\n{}"
)


@dataclass(frozen=True)
class Protocol:
    """How a suite is asked and read."""

    prompts: Callable[[Problems], list[str]]
    """The text before the answer of each problem."""

    chats: Callable[[Problems], list[str]]
    """The user's message for each problem."""

    stops: tuple[str, ...]
    """A completion ends before the first of these."""

    program: Callable[[Problem, str, bool], str]
    """The program (GSM8K: the answer) of a problem and what was written; the last argument says whether it is a chat."""

    max_new_tokens: int
    """Longest answer."""

    chat_stops: tuple[str, ...] = ()
    """An answer of a chat ends before the first of these."""


def _completion(stops: tuple[str, ...]) -> Callable[[Problem, str, bool], str]:
    def program(problem: Problem, text: str, chat: bool) -> str:
        if chat:
            return answered(text, problem.entry_point, problem.question)
        return completed(problem.question, text, stops)

    return program


def _free(stops: tuple[str, ...]) -> Callable[[Problem, str, bool], str]:
    """A whole program after a task in prose. Instructed models fence it even where the prompt does not ask for that."""

    def program(problem: Problem, text: str, chat: bool) -> str:
        text = unix(text) if chat else cut(unix(text), stops).removeprefix("[BEGIN]")
        fenced = text.lstrip().startswith(("```", "~~~"))
        return answered(text, problem.entry_point) if chat or fenced else text

    return program


def _mbpp_prompts(problems: Problems) -> list[str]:
    shots = "".join(f"{_mbpp_task(shot)}{shot.answer}\n[DONE]\n\n" for shot in problems.shots)
    return [shots + _mbpp_task(problem) for problem in problems.problems]


def _mbpp_task(problem: Problem) -> str:
    return MBPP_PROMPT.format(task=problem.question, tests="\n".join(problem.tests))


def _mbpp_chats(problems: Problems) -> list[str]:
    return [ASK.format("\n".join([problem.question, *problem.tests])) for problem in problems.problems]


def _gsm8k_prompts(problems: Problems) -> list[str]:
    draw, pool, found = Random(GSM8K_SEED), list(problems.shots), []
    for problem in problems.problems:
        shots = draw.sample(pool, GSM8K_SHOTS)
        told = [f"Question: {shot.question}\nAnswer: {shot.answer}" for shot in shots]
        found.append("\n\n".join([*told, f"Question: {problem.question}\nAnswer:"]))
    return found


def _evalplus(problem: Problem) -> str:
    return problem.question.strip() + "\n"


def _questions(template: str) -> Callable[[Problems], list[str]]:
    return lambda problems: [template.format(problem.question.strip()) for problem in problems.problems]


HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Chen et al. 2021, section 2.2."""

EVALPLUS_STOPS = ("\nif __name__", "\ndef main(", "\nprint(")
HUMANEVAL_PLUS_STOPS = (*EVALPLUS_STOPS, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")
MBPP_PLUS_STOPS = (*EVALPLUS_STOPS, '\n"""', "\nassert")
MBPP_STOPS = ("[DONE]",)
CONTEST_STOPS = ("\nQUESTION:",)
GSM8K_STOPS = ("Question:", "</s>", "<|im_end|>")

PROTOCOLS: dict[Suite, Protocol] = {
    "humaneval": Protocol(
        lambda problems: [problem.question for problem in problems.problems],
        _questions(ASK),
        HUMANEVAL_STOPS,
        _completion(HUMANEVAL_STOPS),
        512,
    ),
    "humaneval+": Protocol(
        lambda problems: [_evalplus(problem) for problem in problems.problems],
        _questions(ASK),
        HUMANEVAL_PLUS_STOPS,
        lambda problem, text, chat: (
            answered(text, problem.entry_point, problem.question)
            if chat
            else completed(_evalplus(problem), text, HUMANEVAL_PLUS_STOPS)
        ),
        768,
    ),
    "mbpp": Protocol(_mbpp_prompts, _mbpp_chats, MBPP_STOPS, _free(MBPP_STOPS), 512),
    "mbpp+": Protocol(
        lambda problems: [_evalplus(problem) for problem in problems.problems],
        _questions(ASK),
        MBPP_PLUS_STOPS,
        _free(MBPP_PLUS_STOPS),
        768,
    ),
    "codecontests": Protocol(
        lambda problems: [CODE_CONTESTS_PROMPT.format(description=problem.question) for problem in problems.problems],
        _questions(CONTEST),
        CONTEST_STOPS,
        _free(CONTEST_STOPS),
        1024,
    ),
    "gsm8k": Protocol(
        _gsm8k_prompts,
        _gsm8k_prompts,  # as lm-eval does with --apply_chat_template
        GSM8K_STOPS,
        lambda _, text, chat: cut(without_thoughts(text) if chat else text, GSM8K_STOPS),
        256,
        GSM8K_STOPS,  # lm-eval, too: after five examples, models go on with questions of their own
    ),
}
"""HumanEval: zero-shot completion. MBPP: three shots. HumanEval+ and MBPP+: as EvalPlus 0.3.1 asks base models. CodeContests: the
words of APPS, as `mull.data.tasks` trains on it. GSM8K: the five shots of lm-eval's ``gsm8k``, not the eight of Wei et al. 2022
(arXiv:2201.11903), so that numbers can be compared with lm-eval's."""
