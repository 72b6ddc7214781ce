"""The suites by name. A suite is a function from a model and what is asked to a `Result`, and a row here.

All ranks call it alike; what only one of them does, such as grading, is for the first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from mull.data.corpus import load_stdlib
from mull.data.packing import PackedDataset, pack_texts
from mull.data.sources import Document, load_documents
from mull.evaluation.suites.grading import grade
from mull.evaluation.suites.harness import PREFIX, mull_lm, run_task
from mull.evaluation.suites.heads import HeadTally, draft_acceptance, head_name, head_scores, head_tallies
from mull.evaluation.suites.inference_speed import measured_speed, speed_notes, speed_scores
from mull.evaluation.suites.perplexity import perplexity_scores, text_losses
from mull.evaluation.suites.problems import Suite, load_problems
from mull.evaluation.suites.prompts import PROTOCOLS
from mull.evaluation.suites.results import Result, code_scores
from mull.evaluation.suites.samples import SampleFolder, SamplePlan, draw_samples
from mull.evaluation.suites.statistics import pass_at_k
from mull.evaluation.suites.subject import Request, Subject
from mull.runtime.arguments import nearest
from mull.runtime.distributed import global_sum, on_first_rank

META_MTP = "meta-mtp"
META_MTP_SUITES: tuple[Suite, ...] = ("humaneval", "mbpp", "codecontests")
META_MTP_TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Gloeckle et al. 2024 (arXiv:2404.19737), appendix F; there, too, the maximum over temperatures is reported."""

META_MTP_SAMPLES = {"humaneval": 200, "mbpp": 200, "codecontests": 1000}
META_MTP_TOP_P = 0.95
KS = (1, 10, 100)
ROW = 512
PROMPT_TOKENS = 32
PROMPTS = 16
"""Beginnings of rows that are continued to measure acceptance."""

ACCEPTANCE_TOKENS = 64
SPEED_PROMPT, SPEED_TOKENS, SPEED_PROMPTS = 64, 64, 4
"""Tokens of a prompt and of its continuation, and number of prompts, of ``inference-speed``."""


class Place(NamedTuple):
    """Where a suite writes, and how its ranks wait for each other."""

    folder: Path
    group: dist.ProcessGroup | None = None
    """For waits that last as long as a rank needs to draw its share, or the first one to grade."""


Run = Callable[[Subject, Request, Place], Result]


@dataclass(frozen=True)
class _Protocol:
    """Sampling of a generative suite."""

    name: str
    samples: int
    temperatures: tuple[float, ...]
    ks: tuple[int, ...]
    top_p: float | None


def _protocol(suite: Suite, request: Request, meta_mtp: bool) -> _Protocol:
    usual = META_MTP_SAMPLES[suite] if meta_mtp else 1
    samples = request.samples or usual
    temperatures = request.temperatures or (META_MTP_TEMPERATURES if meta_mtp else (0.0,))
    top_p = request.top_p or (META_MTP_TOP_P if meta_mtp else None)
    ks = request.k or tuple(k for k in KS if k <= samples)
    for k in ks:
        pass_at_k(samples, 0, k)  # refused before anything is drawn
    return _Protocol(META_MTP if meta_mtp else "published", samples, tuple(dict.fromkeys(temperatures)), ks, top_p)


def generative(suite: Suite, meta_mtp: bool = False) -> Run:
    """A suite whose answers are drawn, kept, and graded."""

    def run(subject: Subject, request: Request, place: Place) -> Result:
        asked = _protocol(suite, request, meta_mtp)
        problems = load_problems(suite, request.data.get(suite), shots=request.data.get("gsm8k-train"))
        # Base models complete: the protocol was published for them.
        reader = subject.reader(request, False if meta_mtp else None)
        texts = PROTOCOLS[suite].chats(problems) if reader.chat else PROTOCOLS[suite].prompts(problems)
        n = min(request.limit or len(texts), len(texts))
        problems = replace(problems, problems=problems.problems[:n])
        plan = SamplePlan(
            problems,
            tuple(texts[:n]),
            asked.temperatures,
            asked.samples,
            request.batch_size,
            request.max_new_tokens or PROTOCOLS[suite].max_new_tokens,
            request.seed,
            asked.top_p,
            request.top_k,
            request.min_p,
            request.repetition_penalty,
        )
        settings = _settings(plan, asked, subject, request, reader.chat)
        folder = SampleFolder(place.folder, settings)
        on_first_rank(folder.open, place.group)
        draw_samples(plan, subject.writer(request, reader), reader, folder)
        global_sum(torch.zeros(1), place.group)  # every rank has drawn its share
        return on_first_rank(lambda: _graded(folder, plan, asked, request, reader.chat, settings), place.group)

    return run


def _settings(plan: SamplePlan, asked: _Protocol, subject: Subject, request: Request, chat: bool) -> dict[str, Any]:
    return {
        "suite": plan.problems.suite,
        "protocol": asked.name,
        "chat": chat,
        "problems": len(plan.problems.problems),
        "temperatures": list(plan.temperatures),
        "samples": plan.n_samples,
        "max_new_tokens": plan.max_new_tokens,
        **{name: getattr(plan, name) for name in ("seed", "top_p", "top_k", "min_p", "repetition_penalty")},
        **subject.facts(request),
    }


def _graded(
    folder: SampleFolder, plan: SamplePlan, asked: _Protocol, request: Request, chat: bool, settings: Mapping[str, Any]
) -> Result:
    records = folder.join(plan.keys())
    options: dict[str, Any] = {"chat": chat, "workers": request.workers, "allow_weak": request.allow_weak}
    verdicts = grade(records, plan.problems, folder.folder, **options)
    scores, values = code_scores(records, verdicts, asked.ks, seed=request.seed)
    if plan.problems.suite == "gsm8k":
        for name in ("strict_match", "flexible_extract"):
            theirs = [{"passed": verdict[name]} for verdict in verdicts]
            found, sums = code_scores(records, theirs, asked.ks[:1], seed=request.seed)
            scores |= {f"{name}, {label}": value for label, value in found.items()}
            values |= {f"{name}, {label}": value for label, value in sums.items() if label != "first sample"}
    return Result(
        suite=plan.problems.suite,
        model=str(settings["model"]),
        settings=dict(settings),
        scores=scores,
        values=values,
        notes=tuple(_notes(records, verdicts)),
    )


def _notes(records: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    reasons: dict[str, int] = {}
    for verdict in verdicts:
        reasons[verdict["reason"]] = reasons.get(verdict["reason"], 0) + 1
    yield "Verdicts: " + ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) + "."
    for finish, meaning in (
        ("length", "were cut at max_new_tokens"),
        (
            "no room",
            "were not drawn, because prompt and max_new_tokens exceed the model's positions; they count as wrong",
        ),
    ):
        n = sum(record["finish"] == finish for record in records)
        if n:
            yield f"{n} of {len(records)} answers {meaning}."


def _documents(request: Request) -> Sequence[Document]:
    source = request.data.get("text")
    found = load_stdlib().held_out if source is None else load_documents([source])
    return found[: request.limit]


def _dataset(subject: Subject, request: Request) -> PackedDataset:
    length = min(request.length or ROW, subject.positions)
    vocabulary = subject.model.config.get_text_config().vocab_size
    texts = (document.text for document in _documents(request))
    return pack_texts(texts, subject.tokenizer, length=length, vocab_size=vocabulary)


def _text_settings(subject: Subject, request: Request, length: int) -> dict[str, Any]:
    facts = {**subject.facts(request), "draft_length": 0}
    return {"text": request.data.get("text", "Python's library"), "limit": request.limit, "length": length, **facts}


def token_accuracy(subject: Subject, request: Request, _place: Place) -> Result:
    """Accuracy and loss of every head on texts."""
    tallies, settings = _tallies(subject, request)
    return _head_result("token-accuracy", subject, settings, tallies, request)


def per_head_analysis(subject: Subject, request: Request, _place: Place) -> Result:
    """Accuracy, calibration and acceptance of every head, on texts and in decoding.

    Raises:
        ValueError: the model has no extra heads.
    """
    if not subject.n_heads:
        raise ValueError(f"per-head-analysis needs extra heads, and {subject.name} has none: take token-accuracy.")
    tallies, settings = _tallies(subject, request)
    result = _head_result("per-head-analysis", subject, settings, tallies, request)
    rows = _dataset(subject, request).input_ids
    whole = rows[: max(1, len(rows) - 1)][:PROMPTS]  # the last row is padded
    drafts = draft_acceptance(
        subject.model,
        [row[:PROMPT_TOKENS].tolist() for row in whole],
        max_new_tokens=ACCEPTANCE_TOKENS,
        route=subject.route,
        seed=request.seed,
    )
    acceptance = {f"agreement, {head_name(k)}": tally.agreement_by_range for k, tally in enumerate(tallies) if k}
    acceptance["drafts after accepted ones"] = tuple(each.conditional for each in drafts)
    acceptance["drafts"] = tuple(each.cumulative for each in drafts)
    return result.model_copy(update={"acceptance": acceptance})


def _tallies(subject: Subject, request: Request) -> tuple[list[HeadTally], dict[str, Any]]:
    dataset = _dataset(subject, request)
    tallies = head_tallies(subject.model, dataset, subject.route, batch_size=request.batch_size)
    return tallies, _text_settings(subject, request, dataset.input_ids.shape[1])


def _head_result(
    suite: str, subject: Subject, settings: dict[str, Any], tallies: Sequence[HeadTally], request: Request
) -> Result:
    scores, values = head_scores(tallies, seed=request.seed)
    errors = ", ".join(f"{tally.calibration_error:.4f} ({head_name(k)})" for k, tally in enumerate(tallies))
    return Result(
        suite=suite,
        model=subject.name,
        settings=settings,
        scores=scores,
        values=values,
        notes=(f"Expected calibration error: {errors}.",),
        reliability={head_name(k): tally.bins for k, tally in enumerate(tallies)},
    )


def perplexity(subject: Subject, request: Request, _place: Place) -> Result:
    """Perplexity of texts, as lm-eval defines it."""
    length = min(request.length or subject.positions, subject.positions)
    losses = text_losses(
        lambda ids: subject.model(ids, use_cache=False, **subject.route.options()).logits,
        subject.tokenizer,
        _documents(request),
        length=length,
        batch_size=request.batch_size,
        device=subject.model.device,
    )
    scores, values = perplexity_scores(losses, seed=request.seed)
    settings = _text_settings(subject, request, length)
    return Result(suite="perplexity", model=subject.name, settings=settings, scores=scores, values=values)


def inference_speed(subject: Subject, request: Request, place: Place) -> Result:
    """Tokens per second of all ways to decode, in turns, on beginnings of texts; the first rank measures."""

    def measure() -> Result:
        n_rows = request.batch_size if "batch_size" in request.model_fields_set else 1
        tokens, limit = request.max_new_tokens or SPEED_TOKENS, request.limit or SPEED_PROMPTS
        request_of_text = request.model_copy(update={"limit": None})
        rows = _dataset(subject, request_of_text).input_ids[:-1, :SPEED_PROMPT]  # the last row is padded
        prompts = list(rows[: n_rows * limit].split(n_rows))
        prompts = [prompt for prompt in prompts if len(prompt) == n_rows]
        if not prompts:
            raise ValueError(
                f"The text has {len(rows)} whole rows, fewer than the {n_rows} of a batch: give more text."
            )
        timings = measured_speed(subject, prompts, tokens, request.compiled)
        scores, values = speed_scores(timings, request.seed)
        settings = {
            **_text_settings(subject, request, rows.shape[1]),
            "batch_size": n_rows,
            "max_new_tokens": tokens,
            "prompts": len(prompts),
            "threads": torch.get_num_threads(),
        }
        notes = tuple(speed_notes(subject, timings, prompts))
        return Result(
            suite="inference-speed", model=subject.name, settings=settings, scores=scores, values=values, notes=notes
        )

    return on_first_rank(measure, place.group)


def harness(task: str) -> Run:
    """A task of lm-eval, which the first rank runs."""

    def run(subject: Subject, request: Request, place: Place) -> Result:
        def evaluate() -> Result:
            options: dict[str, Any] = {
                "tokenizer": subject.tokenizer,
                "batch_size": request.batch_size,
                "think_iterations": request.think_iterations,
                "adaptive": request.adaptive,
                "layers": request.layers,
            }
            lm = mull_lm()(subject.model, **options)
            scores, values = run_task(lm, task, limit=request.limit, seed=request.seed)
            settings = {"task": task, "limit": request.limit, **subject.facts(request), "draft_length": 0}
            return Result(suite=PREFIX + task, model=subject.name, settings=settings, scores=scores, values=values)

        return on_first_rank(evaluate, place.group)

    return run


SUITES: dict[str, Run] = {
    **{suite: generative(suite) for suite in PROTOCOLS},
    **{f"{META_MTP}:{suite}": generative(suite, meta_mtp=True) for suite in META_MTP_SUITES},
    "per-head-analysis": per_head_analysis,
    "token-accuracy": token_accuracy,
    "perplexity": perplexity,
    "inference-speed": inference_speed,
}
"""Name to suite. Beside these, ``lm_eval:TASK`` is any task of lm-eval, and ``meta-mtp`` all three of its suites."""


def find_suites(names: Sequence[str]) -> dict[str, Run]:
    """The suites that were asked for, each once.

    Raises:
        ValueError: an unknown name, or none.
    """
    if not names:
        raise ValueError(f"No suite was given: choose from {', '.join(SUITES)}, {META_MTP} and {PREFIX}TASK.")
    found: dict[str, Run] = {}
    for name in names:
        if name == META_MTP:
            found |= {f"{META_MTP}:{suite}": SUITES[f"{META_MTP}:{suite}"] for suite in META_MTP_SUITES}
        elif name.startswith(PREFIX) and name != PREFIX:
            found[name] = harness(name.removeprefix(PREFIX))
        elif name in SUITES:
            found[name] = SUITES[name]
        else:
            raise ValueError(f"There is no suite {name}. {nearest(name, [*SUITES, META_MTP, PREFIX + 'TASK'])}")
    return found
