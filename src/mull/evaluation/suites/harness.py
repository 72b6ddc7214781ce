"""lm-eval's tasks on models of mull: think iterations, adaptive depth and explicit routes become arguments of its model.

lm-eval is an extra, so its class is made when it is asked for.
"""

import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mull.evaluation.suites.statistics import Score, Sums, score
from mull.evaluation.suites.writers import Route
from mull.model.causal_lm import MullForCausalLM
from mull.model.path import from_layers
from mull.retrofit.source import load_tokenizer
from mull.retrofit.wrap import from_pretrained
from mull.runtime import storage
from mull.runtime.progress import tracked

PREFIX = "lm_eval:"
INCLUDES = re.compile(r"^include:(.*(?:\n\s*-.*)*)", re.MULTILINE)
"""One file that a YAML file of lm-eval builds on, or a list of them."""

NORMAL = 1.959963984540054
"""Quantile of the normal distribution that belongs to 95 %."""


def import_lm_eval() -> Any:
    """lm-eval.

    Raises:
        RuntimeError: it is not installed; names the extra.
    """
    try:
        import lm_eval  # here, because it is an extra, and takes seconds
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"Tasks of lm-eval need a package that is missing ({error.name}): pip install 'mull[eval]'."
        ) from None
    return lm_eval


@functools.cache
def mull_lm() -> type:
    """lm-eval's model class for checkpoints of mull, registered there as ``mull``.

    After a call, ``lm_eval.simple_evaluate(model="mull", model_args={"pretrained": "out/model", "think_iterations": 3})`` works.
    Arguments beside those of ``hf``: ``think_iterations``; ``adaptive``, true or false; ``layers``, numbers of the layers to
    run, in order, as a list or as text such as ``0 1 2 2 3`` (lm-eval's own command cuts at commas).

    Raises:
        RuntimeError: lm-eval is not installed.
    """
    import_lm_eval()
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    class MullLM(HFLM):  # type: ignore[misc]
        def __init__(
            self,
            pretrained: str | PreTrainedModel,
            tokenizer: PreTrainedTokenizerBase | None = None,
            think_iterations: int | None = None,
            adaptive: bool | None = None,
            layers: Sequence[int] | int | str | None = None,
            **options: Any,
        ) -> None:
            model: Any = pretrained
            if isinstance(pretrained, str):
                kept = {name: options.pop(name) for name in ("dtype", "revision") if name in options}
                model = from_pretrained(pretrained, allow_missing=False, **kept)
                tokenizer = tokenizer or load_tokenizer(pretrained)
            elif tokenizer is None:
                raise ValueError("A model without its tokenizer was given: give tokenizer, too.")
            path = None if layers is None else _path(layers)
            self.route = Route(think_iterations, adaptive, path)
            if self.route.options() and not isinstance(model, MullForCausalLM):
                raise ValueError(f"{', '.join(self.route.options())} are for models of mull: leave them out.")
            super().__init__(pretrained=model, tokenizer=tokenizer, **options)

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            if not self.route.options():
                return super()._model_call(inps, attn_mask, labels)
            return _logits(self.model, inps, self.route)

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            return super()._model_generate(context, max_length, stop, **options, **self.route.options())

    register_model("mull")(MullLM)
    return MullLM


def _path(layers: Sequence[int] | int | str) -> Any:
    """A path from what lm-eval makes of an argument: it turns the text ``1`` into a number."""
    written: Any = layers.replace(",", " ").split() if isinstance(layers, str) else layers
    numbers = [written] if isinstance(written, int) else [*written]
    if not all(str(number).isdecimal() for number in numbers):
        raise ValueError(f"layers={layers!r} must be numbers of layers, such as '0 1 2 2 3'.")
    return tuple((visit.layer, visit.occurrence) for visit in from_layers([int(number) for number in numbers]))


def _logits(model: Any, inputs: Any, route: Route) -> Any:
    with torch.no_grad():
        return model(inputs, use_cache=False, **route.options()).logits


class Task(NamedTuple):
    """A task or group of lm-eval."""

    name: str
    manager: Any
    """lm-eval's ``TaskManager`` that knows it."""

    file: Path | None
    """Its YAML file; None for tasks that come with lm-eval."""


def find_task(written: str) -> Task:
    """Look a task up.

    Args:
        written: A name that lm-eval knows, or the path of a task's YAML file.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a YAML file without a task, or no such task.
        RuntimeError: lm-eval is not installed.
    """
    import_lm_eval()
    from lm_eval.tasks import TaskManager

    if not written.endswith((".yaml", ".yml")) and "/" not in written:
        task = Task(written, TaskManager(), None)
    else:
        path = storage.local_path(written)
        if not path.is_file():
            raise FileNotFoundError(f"{written} does not exist: give the name of a task of lm-eval, or its YAML file.")
        text = path.read_text(encoding="utf-8")
        found = re.search(r"^(?:task|group):\s*['\"]?([\w.-]+)", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"{written} has no task: a task's file has a line such as 'task: name'.")
        task = Task(found[1], TaskManager(include_path=str(path.parent), include_defaults=False), path)
    if not task.manager.match_tasks([task.name]):
        raise ValueError(f"lm-eval has no task {task.name}: see lm_eval ls tasks, or give the YAML file of a task.")
    return task


def task_hashes(task: Task) -> dict[str, str | None]:
    """What the scores of a task depend on, and its name does not say; its documents are loaded for that.

    Returns:
        The version of lm-eval, and hashes: ``documents``, those that are asked and the pool of examples; ``digest`` of the YAML
        files and, where these name functions, the Python files beside them, None for tasks that come with lm-eval.
    """
    tasks = task.manager.load([task.name])["tasks"]
    documents = hashlib.sha256()
    for name, each in sorted(tasks.items()):
        examples = each.fewshot_docs() if each.config.num_fewshot else None
        for part in (each.eval_docs, examples or ()):
            documents.update(f"{name} {len(part)}\n".encode())
            for document in tracked(part, "document", f"reading {name}", len(part)):
                # Of what is no text, such as an image, only the kind: its name has an address.
                documents.update(
                    json.dumps(document, sort_keys=True, default=lambda value: type(value).__name__).encode()
                )
    digest = None
    if task.file is not None:
        index = task.manager.task_index
        members = [index[name].yaml_path for name in tasks if name in index and index[name].yaml_path is not None]
        texts = {path: path.read_bytes() for path in _files([task.file, *members])}
        whole = "".join(sorted(f"{path.name} {hashlib.sha256(text).hexdigest()}\n" for path, text in texts.items()))
        digest = hashlib.sha256(whole.encode()).hexdigest()[:16]
    return {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "documents": documents.hexdigest()[:16],
        "digest": digest,
    }


def _files(yaml_files: Sequence[Path]) -> set[Path]:
    """YAML files, those that they include, and the Python files beside one that names functions."""
    found: set[Path] = set()
    waiting = [*yaml_files]
    while waiting:
        path = waiting.pop().resolve()
        if path in found or not path.is_file():
            continue
        found.add(path)
        text = path.read_text(encoding="utf-8")
        for names in INCLUDES.findall(text):
            waiting += [path.parent / name for name in re.findall(r"[^\s,'\"\[\]]+", names)]
        if "!function" in text:
            found.update(file.resolve() for file in path.parent.glob("*.py"))
    return found


def run_task(
    lm: Any, task: Task, *, limit: int | None = None, seed: int = 0
) -> tuple[dict[str, Score], dict[str, dict[str, Sums]]]:
    """Run one task of lm-eval.

    Args:
        lm: An instance of `mull_lm`, or another model of lm-eval.
        task: What to run.
        limit: Only the first so many documents.
        seed: Of the bootstrap.

    Returns:
        Its scores, and the values of its documents. A score that is the mean of its documents' values has our interval, another
        one lm-eval's standard error, as a normal interval.
    """
    found = import_lm_eval().simple_evaluate(
        model=lm, tasks=[task.name], task_manager=task.manager, limit=limit, bootstrap_iters=1000, log_samples=True
    )
    if found is None:  # lm-eval gathers on its own rank 0
        return {}, {}
    return _scores(found["results"], found.get("samples", {}), seed)


def _scores(
    results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Sequence[Mapping[str, Any]]], seed: int
) -> tuple[dict[str, Score], dict[str, dict[str, Sums]]]:
    scores: dict[str, Score] = {}
    values: dict[str, dict[str, Sums]] = {}
    for task, metrics in results.items():
        for full, value in metrics.items():
            metric, _, kind = full.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            label = " ".join([task if len(results) > 1 else "", metric, "" if kind == "none" else kind]).strip()
            of_kind = [each for each in samples.get(task, ()) if each.get("filter", kind) == kind]
            sums = {f"{task}/{each['doc_id']}": each.get(metric) for each in of_kind}
            scores[label] = _score(float(value), metrics.get(f"{metric}_stderr,{kind}"), sums, seed)
            if _are_numbers(sums) and _is_mean(sums, float(value)):
                values[label] = {name: (float(number), 1.0) for name, number in sums.items() if number is not None}
    return scores, values


def _score(value: float, error: Any, sums: Mapping[str, Any], seed: int) -> Score:
    if _are_numbers(sums) and _is_mean(sums, value):
        numbers = {name: (float(number), 1.0) for name, number in sums.items()}
        return score(numbers, seed=seed, proportion=all(0 <= number <= 1 for number, _ in numbers.values()))
    half = NORMAL * float(error) if isinstance(error, int | float) else 0.0
    return Score(value, value - half, value + half, len(sums))


def _are_numbers(sums: Mapping[str, Any]) -> bool:
    return bool(sums) and all(isinstance(value, int | float) for value in sums.values())


def _is_mean(sums: Mapping[str, Any], value: float) -> bool:
    return abs(sum(float(number) for number in sums.values()) / len(sums) - value) < 1e-9
