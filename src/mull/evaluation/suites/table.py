"""The suites by name. A suite is a function from a model and what is asked to a `Prepared` run, and a row here.

What can be wrong with the settings or the data is told when it is prepared, so before any suite has run. All ranks call a suite
alike; what only one of them does, such as grading, is for the first.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed as dist

from mull.data.corpus import load_stdlib
from mull.data.packing import PackedDataset, pack_texts
from mull.data.sources import Document, load_documents
from mull.evaluation.sandbox import check_sandbox
from mull.evaluation.suites.grading import grade
from mull.evaluation.suites.harness import PREFIX, find_task, mull_lm, run_task, task_hashes
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

SHOTS, TEXT = "gsm8k-train", "text"
"""Sources beside those of the suites' problems: GSM8K's examples, and what the suites that read text read."""

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
NAMED = 5
"""Problems that a note names."""

SPEED_PROMPT, SPEED_TOKENS, SPEED_PROMPTS = 64, 64, 4
"""Tokens of a prompt and of its continuation, and number of prompts, of ``inference-speed``."""


class Place(NamedTuple):
    """Where a suite writes, and how its ranks wait for each other."""

    folder: Path
    group: dist.ProcessGroup | None = None
    """For waits that last as long as a rank needs to draw its share, or the first one to grade."""


class Prepared(NamedTuple):
    """A suite on a model, with its problems or texts read and its settings checked."""

    settings: dict[str, Any]
    """What the result depends on."""

    run: Callable[[Place], Result]


Prepare = Callable[[Subject, Request], Prepared]


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


def generative(suite: Suite, meta_mtp: bool = False) -> Prepare:
    """A suite whose answers are drawn, kept, and graded."""

    def prepare(subject: Subject, request: Request) -> Prepared:
        asked = _protocol(suite, request, meta_mtp)
        problems = load_problems(suite, request.data.get(suite), shots=request.data.get(SHOTS))
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
        if plan.max_new_tokens >= subject.positions:
            raise ValueError(
                f"max_new_tokens={plan.max_new_tokens} leaves no room for a prompt: the model has {subject.positions} positions."
            )
        if suite != "gsm8k":
            on_first_rank(lambda: check_sandbox(request.allow_weak))  # it grades
        settings = _settings(plan, asked, subject, request, reader.chat)
        writer = subject.writer(request)

        def run(place: Place) -> Result:
            folder = SampleFolder(place.folder)
            draw_samples(plan, writer, reader, folder)
            global_sum(torch.zeros(1), place.group)  # every rank has drawn its share
            return on_first_rank(lambda: _graded(folder, plan, asked, request, reader.chat, settings), place.group)

        return Prepared(settings, run)

    return prepare


def _settings(plan: SamplePlan, asked: _Protocol, subject: Subject, request: Request, chat: bool) -> dict[str, Any]:
    return {
        "suite": plan.problems.suite,
        "protocol": asked.name,
        "chat": chat,
        "problems": len(plan.problems.problems),
        "digest": plan.problems.digest,
        "examples": plan.problems.examples,
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
        notes=tuple(sample_notes(records, verdicts)),
    )


def sample_notes(records: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What scores do not say of samples: why they fail, how many were cut, and which passes are worth less."""
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
    passes = [verdict for verdict in verdicts if verdict["passed"]]
    if weak := [verdict["problem"] for verdict in passes if verdict.get("proof") == "inside"]:
        named, rest = ", ".join([*dict.fromkeys(weak)][:NAMED]), len({*weak}) - NAMED
        more = f" and {rest} more" if rest > 0 else ""
        have = "has" if len(weak) == 1 else "have"
        yield (
            f"{len(weak)} of {len(passes)} passes {have} the weaker proof: their tests had to run in "
            f"the program's own process, where a program can cheat. Read these before you trust them ({named}{more})."
        )


def _documents(request: Request) -> Sequence[Document]:
    source = request.data.get(TEXT)
    found = load_stdlib().held_out if source is None else load_documents([source])
    return found[: request.limit]


def _dataset(subject: Subject, request: Request, documents: Sequence[Document]) -> PackedDataset:
    length = min(request.length or ROW, subject.positions)
    vocabulary = subject.model.config.get_text_config().vocab_size
    texts = (document.text for document in documents)
    return pack_texts(texts, subject.tokenizer, length=length, vocab_size=vocabulary)


def _text_settings(
    subject: Subject, request: Request, documents: Sequence[Document], length: int, **others: Any
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{len(document.text)} {document.text}".encode("utf-8", "surrogatepass"))
    return {
        TEXT: request.data.get(TEXT, "Python's library"),
        "digest": digest.hexdigest()[:16],
        "limit": request.limit,
        "length": length,
        "seed": request.seed,
        **others,
        **subject.facts(request),
        "draft_length": 0,
    }


def token_accuracy(subject: Subject, request: Request) -> Prepared:
    """Accuracy and loss of every head on texts."""
    documents = _documents(request)
    dataset = _dataset(subject, request, documents)
    settings = _text_settings(subject, request, documents, dataset.input_ids.shape[1])

    def run(_: Place) -> Result:
        tallies = head_tallies(subject.model, dataset, subject.route, batch_size=request.batch_size)
        return _head_result("token-accuracy", subject, settings, tallies, request)

    return Prepared(settings, run)


def per_head_analysis(subject: Subject, request: Request) -> Prepared:
    """Accuracy, calibration and acceptance of every head, on texts and in decoding.

    Raises:
        ValueError: the model has no extra heads.
    """
    if not subject.n_heads:
        raise ValueError(f"per-head-analysis needs extra heads, and {subject.name} has none: take token-accuracy.")
    documents = _documents(request)
    dataset = _dataset(subject, request, documents)
    tokens, rows = request.max_new_tokens or ACCEPTANCE_TOKENS, dataset.input_ids
    settings = _text_settings(subject, request, documents, rows.shape[1], max_new_tokens=tokens)
    whole = rows[: max(1, len(rows) - 1)][: min(PROMPTS, request.limit or PROMPTS)]  # the last row is padded

    def run(_: Place) -> Result:
        tallies = head_tallies(subject.model, dataset, subject.route, batch_size=request.batch_size)
        drafts = draft_acceptance(
            subject.model,
            [row[:PROMPT_TOKENS].tolist() for row in whole],
            max_new_tokens=tokens,
            route=subject.route,
            seed=request.seed,
        )
        acceptance = {f"agreement, {head_name(k)}": tally.agreement_by_range for k, tally in enumerate(tallies) if k}
        acceptance["drafts after accepted ones"] = tuple(each.conditional for each in drafts)
        acceptance["drafts"] = tuple(each.cumulative for each in drafts)
        result = _head_result("per-head-analysis", subject, settings, tallies, request)
        return result.model_copy(update={"acceptance": acceptance})

    return Prepared(settings, run)


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


def perplexity(subject: Subject, request: Request) -> Prepared:
    """Perplexity of texts, as lm-eval defines it."""
    documents, length = _documents(request), min(request.length or subject.positions, subject.positions)
    settings = _text_settings(subject, request, documents, length)

    def run(_: Place) -> Result:
        losses = text_losses(
            lambda ids: subject.model(ids, use_cache=False, **subject.route.options()).logits,
            subject.tokenizer,
            documents,
            length=length,
            batch_size=request.batch_size,
            device=subject.model.device,
        )
        scores, values = perplexity_scores(losses, seed=request.seed)
        return Result(suite="perplexity", model=subject.name, settings=settings, scores=scores, values=values)

    return Prepared(settings, run)


def inference_speed(subject: Subject, request: Request) -> Prepared:
    """Tokens per second of all ways to decode, in turns, on beginnings of texts; the first rank measures.

    Raises:
        ValueError: fewer rows of text than a batch has.
    """
    n_rows = request.batch_size if "batch_size" in request.model_fields_set else 1
    tokens, limit = request.max_new_tokens or SPEED_TOKENS, request.limit or SPEED_PROMPTS
    documents = _documents(request.model_copy(update={"limit": None}))
    rows = _dataset(subject, request, documents).input_ids[:-1, :SPEED_PROMPT]  # the last row is padded
    prompts = [prompt for prompt in rows[: n_rows * limit].split(n_rows) if len(prompt) == n_rows]
    if not prompts:
        raise ValueError(f"The text has {len(rows)} whole rows, fewer than the {n_rows} of a batch: give more text.")
    settings = {
        **_text_settings(subject, request, documents, rows.shape[1], max_new_tokens=tokens, prompts=len(prompts)),
        "batch_size": n_rows,
        "compiled": request.compiled,
        "threads": torch.get_num_threads(),
    }

    def measure() -> Result:
        timings = measured_speed(subject, prompts, tokens, request.compiled)
        scores, values = speed_scores(timings, request.seed)
        notes = tuple(speed_notes(subject, timings, prompts))
        return Result(
            suite="inference-speed", model=subject.name, settings=settings, scores=scores, values=values, notes=notes
        )

    return Prepared(settings, lambda place: on_first_rank(measure, place.group))


def harness(task: str) -> Prepare:
    """A task of lm-eval, which the first rank runs."""

    def prepare(subject: Subject, request: Request) -> Prepared:
        found = find_task(task)
        settings = {
            "task": task,
            **task_hashes(found),
            "limit": request.limit,
            "seed": request.seed,
            **subject.facts(request),
            "generation": subject.generation,
            "draft_length": 0,
        }

        def evaluate() -> Result:
            options: dict[str, Any] = {
                "tokenizer": subject.tokenizer,
                "batch_size": request.batch_size,
                "think_iterations": request.think_iterations,
                "adaptive": request.adaptive,
                "layers": request.layers,
            }
            quiet = logging.getLogger("lm_eval.models.huggingface")
            quiet.setLevel(logging.ERROR)  # it warns that a model was given, and no name
            lm = mull_lm()(subject.model, **options)
            scores, values = run_task(lm, found, limit=request.limit, seed=request.seed)
            return Result(suite=PREFIX + task, model=subject.name, settings=settings, scores=scores, values=values)

        return Prepared(settings, lambda place: on_first_rank(evaluate, place.group))

    return prepare


SUITES: dict[str, Prepare] = {
    **{suite: generative(suite) for suite in PROTOCOLS},
    **{f"{META_MTP}:{suite}": generative(suite, meta_mtp=True) for suite in META_MTP_SUITES},
    "per-head-analysis": per_head_analysis,
    "token-accuracy": token_accuracy,
    "perplexity": perplexity,
    "inference-speed": inference_speed,
}
"""Name to suite. Beside these, ``lm_eval:TASK`` is any task of lm-eval, and ``meta-mtp`` all three of its suites."""


def find_suites(names: Sequence[str]) -> dict[str, Prepare]:
    """The suites that were asked for, each once.

    Raises:
        ValueError: an unknown name, or none.
    """
    if not names:
        raise ValueError(f"No suite was given: choose from {', '.join(SUITES)}, {META_MTP} and {PREFIX}TASK.")
    found: dict[str, Prepare] = {}
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
