"""`mull eval` on a real pretrained model, held to other programs: texts to transformers' `generate`, perplexity to lm-eval.

1. The first problems of HumanEval, MBPP and GSM8K, greedily, written by mull and by transformers. Where two texts differ, the
   logits of the two tokens are computed in fp32: what exceeds the rounding of the precision that wrote them is an error.
2. Perplexity of a text in windows of the model's positions, and the same by lm-eval's own `hf` class.
3. With `--heads`, a table of each head on what the model itself answered to HumanEval (`real_model.py` trains such heads).

Each part continues in `--out`. Data are the published files.

    python benchmarks/evaluation.py MODEL --data DIR [--heads MODEL] [--limit 100] [--dtype bf16] [--out out/evaluation]
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from lm_eval.tasks import TaskManager
from race import header
from transformers import AutoModelForCausalLM

from mull.app.evaluate import compare, run_evaluation
from mull.evaluation.lossless import differences
from mull.evaluation.suites.problems import load_problems
from mull.evaluation.suites.prompts import PROTOCOLS
from mull.evaluation.suites.results import Result
from mull.evaluation.suites.subject import DTYPES, Request, load_subject
from mull.ops.sampling import Sampling
from mull.runtime.progress import tracked

RESULT = Path(__file__).parent / "results" / "evaluation-cpu.json"
SUITES = ("humaneval", "mbpp", "gsm8k")
ENGINES = ("mull", "transformers")
FILES = {
    "humaneval": "HumanEval.jsonl.gz",
    "mbpp": "mbpp.jsonl",
    "gsm8k": "gsm8k_test.jsonl",
    "gsm8k-train": "gsm8k_train.jsonl",
}
TEXT = "tinyshakespeare.txt"
MORE = 16
"""Tokens beyond a difference, when a text is written again."""

METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def scores_of(result: Result) -> dict[str, Any]:
    return {name: score._asdict() for name, score in result.scores.items()} | {"notes": result.notes}


def answers(folder: Path, suite: str) -> dict[str, str]:
    lines = (folder / suite / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["problem"]: record["text"] for record in map(json.loads, lines)}


def judged(model: str, suite: str, data: Mapping[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Which texts of the two engines differ, and whether rounding explains that."""
    requests = [Request(dtype=arguments.dtype, engine=engine) for engine in ENGINES]
    subjects = [load_subject(model, request, torch.device("cpu")) for request in requests]
    reader = subjects[0].reader(requests[0])
    writers = [subject.writer(request) for subject, request in zip(subjects, requests, strict=True)]
    problems = load_problems(suite, data[suite], shots=data["gsm8k-train"])  # type: ignore[arg-type]
    protocol = PROTOCOLS[suite]  # type: ignore[index]
    asked = (protocol.chats if reader.chat else protocol.prompts)(problems)[: arguments.limit]
    tokens = reader.prompts(asked)
    names = [problem.name for problem in problems.problems][: arguments.limit]
    texts = [answers(arguments.out / engine, suite) for engine in ENGINES]
    rows = [row for row, name in enumerate(names) if texts[0][name] != texts[1][name]]
    own = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[arguments.dtype]).eval()
    exact = copy.deepcopy(own).float()
    ties, wrong, again = 0, [], 0
    for row in tracked(rows, "text", f"{suite}: judging"):
        new = [subjects[0].tokenizer.encode(of[names[row]], add_special_tokens=False) for of in texts]
        found = differences(own, exact, [tokens[row]], new[:1], new[1:])
        if not all(each.is_tie for each in found):
            # Other tokens than those that were written may spell the same text, so both write it again, in the same batch.
            again += 1
            chunk = tokens[row - row % arguments.batch_size :][: arguments.batch_size]
            most = found[0].position + MORE
            new = [writer.write(chunk, [0] * len(chunk), Sampling(), most, None) for writer in writers]
            found = differences(own, exact, chunk, *new)
            found = [each for each in found if each.row == row % arguments.batch_size]
        ties += bool(found) and all(each.is_tie for each in found)
        wrong += [names[row]] * any(not each.is_tie for each in found)
    return {"differ": len(rows), "ties": ties, "written again to see the tokens": again, "no tie": wrong}


def written(model: str, data: Mapping[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for engine in ENGINES:
        request = Request(
            data=dict(data),
            limit=arguments.limit,
            dtype=arguments.dtype,
            batch_size=arguments.batch_size,
            engine=engine,
        )
        results[engine] = run_evaluation(model, SUITES, arguments.out / engine, request, command=shown())
    compared = compare(*(arguments.out / engine for engine in ENGINES))
    found: dict[str, Any] = {}
    for suite in SUITES:
        [both] = [of_suite for name, of_suite in compared.items() if name.endswith(suite)]
        found[suite] = {engine: scores_of(results[engine][suite]) for engine in ENGINES}
        found[suite]["transformers - mull"] = {name: each.difference._asdict() for name, each in both.items()}
        kept = arguments.out / f"texts-{suite}.json"
        if not kept.exists():
            kept.write_text(json.dumps(judged(model, suite, data, arguments)))
        found[suite]["texts"] = json.loads(kept.read_text())
        print(suite, found[suite]["texts"], flush=True)
    return found


def perplexity(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours, and that of lm-eval's own class for transformers."""
    text = arguments.out / TEXT
    text.write_text((arguments.data / TEXT).read_text(encoding="utf-8")[: arguments.characters], encoding="utf-8")
    request = Request(data={"text": str(text)}, batch_size=1, dtype="fp32", length=arguments.length)
    ours = run_evaluation(model, ["perplexity"], arguments.out / "perplexity", request, command=shown())["perplexity"]
    kept = arguments.out / "lm-eval.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "text.json").write_text(
                json.dumps([{"page": text.read_text(encoding="utf-8")}]), encoding="utf-8"
            )
            task = {
                "task": "one_text",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(folder / "text.json")}},
                "output_type": "loglikelihood_rolling",
                "test_split": "test",
                "doc_to_text": "",
                "doc_to_target": "{{page}}",
                "metric_list": [{"metric": metric} for metric in METRICS],
            }
            (folder / "task.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": model, "dtype": "float32", "max_length": arguments.length, "device": "cpu"},
                tasks=["one_text"],
                task_manager=TaskManager(include_path=str(folder), include_defaults=False),
                bootstrap_iters=0,
            )
            kept.write_text(json.dumps({metric: found["results"]["one_text"][f"{metric},none"] for metric in METRICS}))
    theirs = json.loads(kept.read_text())
    print("perplexity:", {metric: (ours.scores[metric].value, theirs[metric]) for metric in METRICS}, flush=True)
    return {
        "mull": scores_of(ours),
        "lm-eval": theirs,
        "version": lm_eval.__version__,
        "length": ours.settings["length"],
    }


def of_heads(arguments: argparse.Namespace) -> dict[str, Any]:
    """The heads on the model's own answers, which it writes again when it decodes greedily."""
    source = arguments.out / "mull" / "humaneval" / "samples.jsonl"
    text = arguments.out / "own-answers.jsonl"
    text.write_text("".join(f"{json.dumps({'text': json.loads(line)['text']})}\n" for line in source.open()))
    request = Request(data={"text": str(text)}, dtype=arguments.dtype, batch_size=4, length=256)
    result = run_evaluation(arguments.heads, ["per-head-analysis"], arguments.out / "heads", request, command=shown())
    found = result["per-head-analysis"]
    return scores_of(found) | {"acceptance": found.acceptance}


def shown() -> str:
    return "python benchmarks/evaluation.py MODEL --data DIR --heads HEADS"


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {', '.join([*FILES.values(), TEXT])}")
    parser.add_argument("--heads", help="the same model with extra heads")
    parser.add_argument("--limit", type=int, default=100, help="problems of each suite")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=8192, help="of the windows of text")
    parser.add_argument("--characters", type=int, help="only the first so many of the text")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"))
    parser.add_argument("--result", type=Path, default=RESULT)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    started = time.perf_counter()
    data = {name: str(arguments.data / file) for name, file in FILES.items()}
    settings = {name: getattr(arguments, name) for name in ("limit", "dtype", "batch_size", "length", "characters")}
    result = header("cpu", **settings)
    result["suites"] = written(arguments.model, data, arguments)
    result["perplexity"] = perplexity(arguments.model, arguments)
    if arguments.heads:
        result["heads"] = of_heads(arguments)
    result["seconds"] = round(time.perf_counter() - started, 1)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {arguments.result}")
    wrong = [name for suite in SUITES for name in result["suites"][suite]["texts"].get("no tie", ())]
    if wrong:
        print(f"{', '.join(wrong)}: the texts differ, and no tie explains it", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
