"""What `record.py` does by the command: sections train and artifacts.

Every path is relative to a working directory with ``data``, ``recipes`` and ``runs``, so that a copy of it works elsewhere.
"""

import contextlib
import io
import json
import random
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from model_cases import CASES, HEADS, THOROUGH, Cases, Results, encoded, loaded, stored, with_heads

CLOCK = {"seconds", "tokens_per_second", "mfu"}
"""Metrics that depend on the time."""

WORDS = ["think", "loop", "head", "token", "path", "layer", "state", "the", "a", "of", "is", "x", "+", "="]
SAVED = [(family, head, "fp32") for family in THOROUGH for head in HEADS]
SAVED += [("qwen3-tied", "mlp", "fp32"), ("qwen3_next-moe", "native", "bf16"), ("olmo3", "sequential", "bf16")]
"""Models among the artifacts."""


def write_data() -> None:
    """Texts, answers and programs."""
    draw = random.Random(0)
    Path("data/text").mkdir(parents=True)
    for file, n_words in {**{f"text/{n}": 60 + 80 * n for n in range(6)}, "held-out": 400}.items():
        Path(f"data/{file}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(n_words)) + ".\n")
    answers = [
        {"name": f"{n}", "prompt": f"x + {n}?\n", "completion": f"x + {n + wrong}", "outcome": 1 - wrong}
        for n in range(40)
        for wrong in (0, 1)
    ]
    programs = [
        {"task_id": n, "text": f"Add {n}.", "code": f"def f(x):\n    return x + {n}\n", "test_list": ["assert f"]}
        for n in (*range(511, 516), *range(601, 621))
    ]
    for name, lines in {"answers": answers, "mbpp": programs}.items():
        Path(f"data/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_recipe(name: str, changes: Mapping[str, Any]) -> Path:
    recipe = deepcopy(CASES["recipe"])
    for key, value in {"run.name": name, **changes}.items():
        *sections, last = key.split(".")
        place = recipe
        for section in sections:
            place = place[section]
        place[last] = deepcopy(value)
    path = Path("recipes") / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(*arguments: object) -> str:
    """Run the command ``mull`` in this process, and return what it prints."""
    out, err, code = io.StringIO(), io.StringIO(), None
    argv = patch.object(sys, "argv", ["mull", *map(str, arguments)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module("mull", run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    if code:
        raise RuntimeError(f"mull {' '.join(map(str, arguments))}: {err.getvalue()}")
    return out.getvalue()


def left(run: Path, *models: str) -> Results:
    """What a run left: metrics, models, and what its checkpoints say; their tensors are read by those who continue."""
    for file in sorted(run.rglob("metrics.jsonl")):
        lines = map(json.loads, file.read_text().splitlines())
        steps = {line["step"]: {name: line[name] for name in line.keys() - CLOCK} for line in lines}
        yield str(file.relative_to(run)), steps
    for file in sorted(run.rglob("checkpoint.json")):
        content = json.loads(file.read_text())
        content["values"].pop("seconds")
        yield str(file.relative_to(run)), content
    for model in models:
        for name, value in stored(run / model):
            yield f"{model}/{name}", value
    names = sorted(str(file.relative_to(run)) for file in run.rglob("*"))
    yield "files", [name for name in names if name.split("/")[0] not in ("model", "trunk")]


# Section train


@contextlib.contextmanager
def working_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield Path(folder)


def train(_: Any) -> Cases:
    with working_directory():
        write_data()
        for name, changes in CASES["runs"].items():
            yield name, trained(name, changes)
        yield "set", trained("set", {}, "--set", "train.seed=1", "--set", "train.steps=3")
        for name, changes in CASES["native runs"].items():
            yield name, trained_until_export(name, changes)
        yield "commands", commands()


def trained(name: str, changes: Mapping[str, Any], *options: str) -> Results:
    recipe = write_recipe(name, changes)
    # The time depends on the measured speed of this machine.
    yield "estimate", [line for line in command("train", recipe, "--dry-run").splitlines() if line[:4] != "time"]
    command("train", recipe, *options)
    yield from left(Path("runs") / name, "model", "trunk")


def trained_until_export(name: str, changes: Mapping[str, Any]) -> Results:
    with contextlib.suppress(RuntimeError):
        command("train", write_recipe(name, changes))
    yield from left(Path("runs") / name, "model")


def commands() -> Results:
    """The other commands."""
    prompt = ("--prompt", "think loop", "--max-new-tokens", 12)
    for name, options in {
        "greedy": (),
        "deeper": ("--think-iterations", 3),
        "drafted": ("--draft", "mtp", "--draft-length", 2),
        "sampled": ("--temperature", 1.0, "--top-k", 9, "--seed", 4),
    }.items():
        yield name, command("generate", "runs/mtp mlp/model", *prompt, *options)
    yield "base", command("generate", "runs/tied/trunk", *prompt, "--etd", "1,2,1")
    for name in ("no loop", "hybrid"):
        rows = ("--data", "data/held-out.txt", "--length", 32, "--batches", 3, "--batch-size", 4)
        yield f"split {name}", command("split", f"runs/{name}/trunk", *rows, "--out", f"split/{name}").splitlines()
        yield f"split.json {name}", json.loads(Path(f"split/{name}/split.json").read_text())


# Section artifacts: what one version saved, another one continues and loads.


def artifacts(options: Any) -> Cases:
    with working_directory() as folder:
        kept = options.source or options.artifacts or folder / "kept"
        if options.source is None:
            make_artifacts(kept)
        with contextlib.chdir(shutil.copytree(kept, folder / "copy")):
            for name in CASES["interrupted"]:
                yield f"resumed/{name}", resumed(name)
            for family, head, _ in SAVED:
                yield f"loaded/{family}/{head}", loaded(Path("models") / f"{family} {head}")


def make_artifacts(folder: Path) -> None:
    """Runs that were interrupted after 5 of 10 steps, the same as they were at their end; and saved models."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        write_data()
        for name, changes in CASES["before them"].items():
            command("train", write_recipe(name, changes))
        for name, changes in CASES["interrupted"].items():
            command("train", write_recipe(name, changes))
            run = Path("runs") / name
            shutil.copytree(run, Path("whole") / name)
            for left_over in ("checkpoints/step-000010", "model", "trunk"):
                shutil.rmtree(run / left_over)
            lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            (run / "metrics.jsonl").write_text("".join(lines[:5]))
        for family, head, dtype in SAVED:
            with_heads(family, head, dtype).save_pretrained(Path("models") / f"{family} {head}")


def resumed(name: str) -> Results:
    run = Path("runs") / name
    before = (run / "metrics.jsonl").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000005"]
    command("train", Path("recipes") / f"{name}.yaml", "--resume")
    # Lines hold the time that their step took, so a run that began anew would have others.
    yield "kept its five lines", (run / "metrics.jsonl").read_text().startswith(before)
    whole, continued = (encoded(dict(left(folder, "model", "trunk"))) for folder in (Path("whole") / name, run))
    yield "equals the run without interruption", continued == whole
    yield from continued.items()
