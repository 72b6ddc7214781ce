"""Self-speculative decoding against plain decoding, in mull and in transformers, with the same weights.

Small models are trained once, trunk and three sequential heads together, and kept under `--out` (`speculation_models.py`).
Then all variants continue pieces of held-out files, in turns (`race.py`):

- transformers' `generate`, plain and with `use_mtp=True`, which drafts with the very same heads;
- mull's, plain, with 1 to 3 drafts a round, and with the draft length that it chooses itself, also with random heads.

A second table has a batch of eight, which transformers cannot speculate on. transformers reads the heads from disk at each
call; "heads kept" is the same without that.

All outputs are compared with those of transformers' plain `generate` in the same precision. In fp32 mull must write the same
tokens. In bf16 kernels round differently for one token than for four, so a text may differ from the first tie on: two tokens
whose logits, computed from the same weights in the next wider precision, are no further apart than twice what rounding moves
a logit of this text. `distinct` is the share of distinct runs of eight tokens: small models repeat themselves when decoded
greedily, and repetition is easy to draft. `--temperature 1` samples instead, and compares no texts.

`predicted` is the speed-up over plain decoding at the measured acceptance if every pass took only as long as reading its
weights or computing its products, whichever is longer (`mull.evaluation.cost.decoding`).

`--verify-cost` measures something else, without training: the time of a pass over k + 1 tokens of one row relative to one
token, which bounds what speculation can gain, for random weights of given shapes.

    python benchmarks/speculation.py [--out out/speculation] [--size 5m 20m] [--models byte-5m …] [--precision bf16 fp32]
    python benchmarks/speculation.py --device cuda --size 100m
    python benchmarks/speculation.py --verify-cost [--device cuda]
    python benchmarks/speculation.py --toy
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from race import COMPILED, PAD, PLAIN, STOCK, Judge, distinct_share, header, machine, rows_of, show, table_rows
from speculation_models import (
    DTYPES,
    N_HEADS,
    SPECS,
    Subject,
    draw_prompts,
    load_subject,
    trained,
)
from speculation_verify import measure_verify_cost
from torch import Tensor
from transformers.generation import CompileConfig
from transformers.utils import logging as transformers_logging

from mull.evaluation.cost.count import STREAMED_BYTES, Machine, measure_machine
from mull.evaluation.cost.decoding import predicted_speedup
from mull.evaluation.speed import Outcome, Timing, Variant, measure_in_turns, mull_variant, stock_variant
from mull.evaluation.stock import heads_loaded_once, load_stock

RESULTS = Path(__file__).parent / "results"
LENGTHS = {1: "mull, 1 draft", **{k: f"mull, {k} drafts" for k in range(2, 1 + N_HEADS)}}
TOY = {"size": ["toy"], "prompts": 3, "tokens": 16, "rounds": 1, "batch": 2, "compile": False}


def kept(run: Variant) -> Variant:
    """The same with the heads loaded at the first call only."""
    heads: dict[int, Any] = {}

    def loaded(ids: Tensor, mask: Tensor) -> Outcome:
        with heads_loaded_once(heads):
            return run(ids, mask)

    return loaded


def variants_of(subject: Subject, arguments: argparse.Namespace, batch: int) -> dict[str, Variant]:
    """All variants that can continue `batch` rows, by name; compiled ones for a single row only."""
    ours = partial(mull_variant, tokens=arguments.tokens, temperature=arguments.temperature)
    theirs = partial(stock_variant, tokens=arguments.tokens, temperature=arguments.temperature)
    compile_too = arguments.compile and batch == 1
    variants: dict[str, Variant] = {STOCK: theirs(subject.stock, options={})}
    if subject.use_mtp and compile_too:
        compiled = CompileConfig(fullgraph=True, mode="reduce-overhead" if arguments.device == "cuda" else "default")
        compiled._compile_all_devices = True
        static = {"cache_implementation": "static", "compile_config": compiled}
        variants[f"{STOCK}, static cache, compiled"] = theirs(copy.copy(subject.stock), options=static)
    if subject.use_mtp and batch == 1:
        drafting = theirs(subject.stock, options={"use_mtp": True})
        variants |= {f"{STOCK} use_mtp": drafting, f"{STOCK} use_mtp, heads kept": kept(drafting)}
    drafted = {name: {"draft": "mtp", "draft_length": k} for k, name in LENGTHS.items()}
    drafted["mull, adaptive"] = {"draft": "mtp"}
    for name, options in {PLAIN: {}, **drafted}.items():
        variants[name] = ours(subject.mull, options=options)
    variants["mull, adaptive, random heads"] = ours(subject.useless, options={"draft": "mtp"})
    if compile_too:
        for name, options in {PLAIN: {}, **drafted}.items():
            variants[name + COMPILED] = ours(subject.mull, options={"compile": True, **options})
    return variants


def passes_of_stock(subject: Subject, prompts: Sequence[tuple[Tensor, Tensor]], tokens: int) -> float | None:
    """Tokens per pass of transformers with the heads, prompts not counted: its own statistics do not say."""
    if not subject.use_mtp:
        return None
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = subject.stock.register_forward_hook(count)
    run = stock_variant(subject.stock, tokens, {"use_mtp": True})
    gained = sum(len(run(ids, mask).rows[0]) - 1 for ids, mask in prompts)
    handle.remove()
    return gained / (calls[0] - len(prompts))


def judge_of(subject: Subject, device: str) -> Judge:
    wider = {"bf16": torch.float32, "fp32": torch.float64}[subject.precision]
    own, exact = (load_stock(subject.folder / "stock", DTYPES[subject.precision], device) for _ in range(2))
    return Judge(own, exact.to(wider))


def batches_of(prompts: Sequence[Tensor], size: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """The prompts in batches, padded on the left."""
    batches = []
    for first in range(0, len(prompts), size):
        rows = prompts[first : first + size]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), PAD)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = row
            mask[number, width - len(row) :] = 1
        batches.append((ids.to(device), mask.to(device)))
    return batches


def own_machine(subject: Subject, device: str) -> Machine:
    """Throughput of the device with weights of this model's size: those of a small one stay in the cache."""
    size = sum(p.numel() * p.element_size() for p in subject.stock.parameters())
    return measure_machine(device, DTYPES[subject.precision], min(size, STREAMED_BYTES))


def predictions(
    subject: Subject, timings: Mapping[str, Timing], prompts: Sequence[Tensor], batch: int, device: str
) -> dict[str, float]:
    """Speed-up over plain decoding with fixed draft lengths if all passes took the least time, by variant."""
    peak = own_machine(subject, device)
    n_new = sum(next(iter(timings.values())).tokens) / len(prompts)
    context = round(sum(map(len, prompts)) / len(prompts) + n_new / 2)
    found = {}
    for k, name in LENGTHS.items():
        for variant in {name, name + COMPILED} & set(timings):
            accepted = timings[variant].acceptance
            found[variant] = predicted_speedup(
                subject.mull, peak, [*accepted, *[0.0] * (k - len(accepted))], length=k, context=context, n_rows=batch
            )
    return found


def compare(
    subject: Subject, prompts: list[Tensor], batch: int, arguments: argparse.Namespace, judge: Judge
) -> dict[str, Any]:
    """Measure all variants at one batch size, and print the table."""
    label = f"{subject.name}, {subject.precision}, batch {batch}"
    torch.compiler.reset()  # dynamo refuses the ninth version of a function, whichever model it was for
    batches = batches_of(prompts, batch, arguments.device)
    timings = measure_in_turns(variants_of(subject, arguments, batch), batches, arguments.rounds, label)
    greedy = arguments.temperature == 0
    per_pass = passes_of_stock(subject, batches, arguments.tokens) if batch == 1 and greedy else None
    more: dict[str, dict[str, Any]] = {name: {"tokens_per_pass": per_pass} for name in timings if "use_mtp" in name}
    for name, speedup in predictions(subject, timings, prompts, batch, arguments.device).items():
        more[name] = {"predicted": speedup}
    rows = table_rows(timings, own_plain, prompts, judge if greedy else None, more)
    distinct = distinct_share(rows_of(timings[STOCK].outcomes[0]))
    show(label, rows, distinct)
    setting = {"model": subject.name, "precision": subject.precision, "batch": batch, "distinct": distinct}
    return {**setting, "variants": rows}


def own_plain(variant: str) -> str:
    """The variant without drafts to compare with, compiled like it."""
    return PLAIN + COMPILED if variant.startswith("mull") and variant.endswith(COMPILED) else PLAIN


def failures(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Violations of losslessness: a text of mull that differs in fp32, or in bf16 without a tie."""
    found = []
    for table in tables:
        for row in table["variants"]:
            differs = row.get("equal", 1) < 1 and (table["precision"] == "fp32" or not row["ties"])
            if differs and row["variant"].startswith("mull"):
                where = f"{table['model']}, {table['precision']}, batch {table['batch']}"
                found.append(f"{row['variant']} ({where}) wrote other tokens than plain decoding: {row['differences']}")
    return found


def verify_cost(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    shapes = "toy" if arguments.toy else arguments.device
    return measure_verify_cost(
        arguments.device,
        shapes,
        arguments.precision,
        context=32 if arguments.toy else 512,
        longest=8,
        repeats=3 * arguments.rounds,
        compile_too=arguments.compile,
    )


def speculate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train what is not there, then measure every model in every precision."""
    names = arguments.models or [name for name, spec in SPECS.items() if spec.size in arguments.size]
    training, folders = {}, {}
    for name in names:
        folders[name], training[name] = trained(
            name, arguments.out, seed=arguments.seed, scale=arguments.train_scale, device=arguments.device
        )
    tables = []
    for name in names:
        prompts = draw_prompts(folders[name], arguments.prompts, arguments.seed)
        for precision in arguments.precision:
            subject = load_subject(name, folders[name], precision, arguments.device)
            judge = judge_of(subject, arguments.device)
            sizes = dict.fromkeys([1, min(arguments.batch, len(prompts))])
            tables += [compare(subject, prompts, batch, arguments, judge) for batch in sizes]
    settings = {key: getattr(arguments, key) for key in ("prompts", "tokens", "temperature", "batch", "compile")}
    return {"settings": settings, "training": training, "tables": tables}


def parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/speculation"), help="folder of the models")
    parser.add_argument("--size", nargs="+", default=["5m", "20m"], choices=sorted({s.size for s in SPECS.values()}))
    parser.add_argument("--models", nargs="+", choices=SPECS, help="instead of all of a size")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, help="default: bf16 and fp32; bf16 on a GPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-scale", type=float, default=1.0, help="factor of the training times")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="size of the second table")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compiled variants, too; the default, but for --verify-cost on a CPU and --toy",
    )
    parser.add_argument("--verify-cost", action="store_true", help="cost of a pass over several tokens, nothing else")
    parser.add_argument("--toy", action="store_true", help="seconds; its numbers mean nothing")
    parser.add_argument("--result", type=Path, help="default: benchmarks/results; with --toy the folder of the models")
    if "--toy" in given:
        parser.set_defaults(**TOY)
    arguments = parser.parse_args(given)
    if arguments.precision is None:
        arguments.precision = ["bf16"] if arguments.device == "cuda" else ["bf16", "fp32"]
    if arguments.compile is None:
        arguments.compile = arguments.device == "cuda" or not arguments.verify_cost
    if arguments.result is None:
        part = "-verify" if arguments.verify_cost else ""
        arguments.result = (arguments.out if arguments.toy else RESULTS) / f"speculation{part}-{arguments.device}.json"
    if arguments.result.is_dir():
        parser.error(f"--result {arguments.result} is a folder; name a file.")
    return arguments


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(sys.argv[1:] if given is None else given)
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    print(f"{machine(arguments.device)}, torch {torch.__version__}, {arguments.rounds} rounds", flush=True)
    results = {"verify_cost": verify_cost(arguments)} if arguments.verify_cost else speculate(arguments)
    record = {
        **header(arguments.device, rounds=arguments.rounds, seed=arguments.seed),
        "seconds": round(time.perf_counter() - started, 1),
        **results,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{record['seconds']} s; written to {arguments.result}")
    wrong = failures(results.get("tables", []))
    for failure in wrong:
        print(failure, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
