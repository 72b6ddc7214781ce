"""What distillation takes and what a record of the teacher loses.

Three parts. *Memory*: peak of a process that computes the divergence and its gradient, chunk by chunk and from the logits of
both models. *Temperature*: norm of the gradient at T = 1, 2, 4, for small logits. *Bias*: divergence from a teacher's top-k
record with one bucket for the rest, and without the bucket, beside that from all of its predictions, on held-out files of the
standard library.

    OMP_NUM_THREADS=1 python benchmarks/distillation.py --teacher out/stdlib-base/trunk --student out/hybrid-align/trunk
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any, get_args

import torch
from race import machine
from torch import Tensor

import mull
from mull.data.corpus import load_stdlib
from mull.data.packing import pack_texts
from mull.ops.divergence import Kind, Predictor, TopK, divergence, top_k
from mull.retrofit.source import load_tokenizer
from mull.training.objectives.base import batch_states

RESULTS = Path(__file__).parent / "results"
ROWS, WIDTH, VOCABULARY = 1024, 1024, 151_936
KEPT = (8, 32, 128)


def operands(scale: float = 1.0, rows: int = ROWS, width: int = WIDTH, vocabulary: int = VOCABULARY) -> list[Tensor]:
    """States and unembedding of student and teacher."""
    torch.manual_seed(0)
    sizes = ((rows, width), (vocabulary, width)) * 2
    return [torch.randn(size) * (scale if size[0] == vocabulary else 1.0) / width**0.25 for size in sizes]


def naive(hidden: Tensor, weight: Tensor, teacher: Predictor) -> Tensor:
    """From the logits of all rows."""
    log_q, log_p = (hidden @ weight.T).log_softmax(-1), (teacher.hidden @ teacher.weight.T).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")


def peak(chunked: bool, results: Any) -> None:
    """Bytes above those of the operands, and seconds."""
    hidden, weight, *rest = operands()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    loss = divergence(*inputs, Predictor(*rest))[0] if chunked else naive(*inputs, Predictor(*rest))
    torch.autograd.grad(loss, inputs)
    seconds = time.perf_counter() - started
    results.put(((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, seconds))


def memory() -> dict[str, Any]:
    """Each form in a process of its own."""
    context, found = multiprocessing.get_context("spawn"), {}
    for name, chunked in (("chunked", True), ("all logits", False)):
        results = context.Queue()
        process = context.Process(target=peak, args=(chunked, results))
        process.start()
        found[name] = dict(zip(("bytes", "seconds"), results.get(), strict=True))
        process.join()
        print(f"{name}: {found[name]['bytes'] / 1e9:.2f} GB, {found[name]['seconds']:.1f} s", flush=True)
    return found


def norms() -> dict[str, list[float]]:
    """Norm of the gradient of the states at T = 1, 2, 4 over that at 1, with the factor T²."""
    found = {}
    for kind in get_args(Kind):
        hidden, weight, *rest = operands(0.05, 64, 64, 2048)
        hidden.requires_grad_()
        at = []
        for temperature in (1.0, 2.0, 4.0):
            total, _ = divergence(hidden, weight, Predictor(*rest), kind=kind, temperature=temperature)
            at.append(float(torch.autograd.grad(total, hidden)[0].norm()))
        found[kind] = [norm / at[0] for norm in at]
        print(kind, [round(norm, 3) for norm in found[kind]], flush=True)
    return found


def without_bucket(record: TopK, hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """``Σ p (ln p - ln q)`` over the kept tokens alone, times T²."""
    log_q = (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, record.tokens.long())
    log_p = record.log_p[:, :-1]
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def bias(teacher_name: str, student_name: str, rows: int) -> list[dict[str, Any]]:
    """Divergence in nats per token, and how far the gradient of a record is from that of all predictions."""
    teacher, student = mull.from_pretrained(teacher_name), mull.from_pretrained(student_name)
    packed = pack_texts((file.text for file in load_stdlib().held_out), load_tokenizer(teacher_name), length=256)
    batch = packed.rows(torch.arange(rows))
    valid = batch["labels"][:, 1:] != -100
    ours, theirs = (batch_states(model, batch)[:, :-1][valid] for model in (student, teacher))
    predictor, found = Predictor(theirs, teacher.unembedding()), []

    def measure(given: Predictor | TopK, temperature: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            hidden = ours.detach().requires_grad_()
            total, terms = divergence(hidden, student.unembedding(), given, temperature=temperature)
            (gradient,) = torch.autograd.grad(total, hidden)
        return terms, gradient

    for temperature in (1.0, 2.0):
        whole, gradient = measure(predictor, temperature)
        for k in KEPT:
            record = top_k(predictor, k, temperature=temperature)
            terms, own = measure(record, temperature)
            with torch.enable_grad():
                hidden = ours.detach().requires_grad_()
                cut = without_bucket(record, hidden, student.unembedding(), temperature)
                (cut_gradient,) = torch.autograd.grad(cut.sum(), hidden)
            row = {
                "temperature": temperature,
                "k": k,
                "full": float(whole.mean()),
                "record": float(terms.mean()),
                "without the bucket": float(cut.detach().mean()),
                "mass in the bucket": float(record.log_p[:, -1].exp().mean()),
                "error of the gradient": float((own - gradient).norm() / gradient.norm()),
                "error without the bucket": float((cut_gradient - gradient).norm() / gradient.norm()),
            }
            found.append(row)
            print({name: round(value, 4) for name, value in row.items()}, flush=True)
    return found


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", nargs="+", choices=("memory", "temperature", "bias"), default=["memory", "temperature", "bias"]
    )
    parser.add_argument("--teacher", default="out/stdlib-base/trunk")
    parser.add_argument("--student", default="out/hybrid-align/trunk")
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of 256 tokens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine()}
    if "memory" in arguments.part:
        found["memory"] = memory()
    if "temperature" in arguments.part:
        found["temperature"] = norms()
    if "bias" in arguments.part:
        found["bias"] = bias(arguments.teacher, arguments.student, arguments.rows)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "distillation-cpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
