"""Self-speculative decoding against plain decoding, in mull and in transformers, with the same weights.

Small models are trained once, trunk and three sequential heads together, and kept under `--out` (`speculation_models.py`).
Then all variants continue pieces of held-out files, taking turns in one process, so that a drifting machine affects all
alike:

- transformers' `generate`, plain and with `use_mtp=True`, which drafts with the very same heads;
- mull's, plain, with 1 to 3 drafts a round, and with the draft length that it chooses itself, also with random heads.

A second table has a batch of eight, which transformers cannot speculate on. The time of a call includes the prompt. The first
round over all prompts warms up; what mull compiles after that is left out. transformers reads the heads from disk at each
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
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from speculation_models import (
    DTYPES,
    N_HEADS,
    SPECS,
    Subject,
    draw_prompts,
    heads_loaded_once,
    load_stock,
    load_subject,
    trained,
)
from speculation_verify import measure_verify_cost
from torch import Tensor
from transformers.generation import CompileConfig
from transformers.utils import logging as transformers_logging

import mull
from mull.evaluation.acceptance import acceptance_by_position
from mull.evaluation.cost.count import STREAMED_BYTES, Machine, measure_machine
from mull.evaluation.cost.decoding import predicted_speedup
from mull.evaluation.lossless import Difference, differences

RESULTS = Path(__file__).parent / "results"
PAD = 0
PLAIN, STOCK, COMPILED = "mull plain", "transformers", ", compiled"
LENGTHS = {1: "mull, 1 draft", **{k: f"mull, {k} drafts" for k in range(2, 1 + N_HEADS)}}
TOY = {"size": ["toy"], "prompts": 3, "tokens": 16, "rounds": 1, "batch": 2, "compile": False}


@dataclass(frozen=True)
class Outcome:
    """What one call returned."""

    rows: list[list[int]]
    """The new tokens of each row."""

    stats: mull.GenerationStats | None = None
    """`mull.generate`'s account of the call."""


Variant = Callable[[Tensor, Tensor], Outcome]
"""Continues ``input_ids [B, T]`` under ``attention_mask [B, T]``."""


@dataclass
class Timing:
    """All calls of one variant."""

    seconds: list[float] = field(default_factory=list)
    """Of each round over all prompts, without the first, which warms up."""

    tokens: int = 0
    """New tokens of a round."""

    outcomes: list[list[Outcome]] = field(default_factory=list)
    """By round, the first included, and prompt."""

    @property
    def per_second(self) -> list[float]:
        """Tokens per second of each round."""
        return [self.tokens / value for value in self.seconds]

    @property
    def stats(self) -> list[mull.GenerationStats]:
        """Of the timed calls; none where the variant gives no account."""
        outcomes = [outcome for of_round in self.outcomes[1:] for outcome in of_round]
        return [outcome.stats for outcome in outcomes if outcome.stats is not None]

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens per row and forward pass after the prompt; None if the variant does not report it."""
        n_passes = sum(one.row_rounds for one in self.stats)
        return 1 + sum(sum(one.accepted) for one in self.stats) / n_passes if n_passes else None

    @property
    def acceptance(self) -> list[float]:
        """Share of accepted drafts by position, of those whose predecessors were accepted."""
        return [position.conditional for position in acceptance_by_position(self.stats)]


def mull_variant(model: Any, tokens: int, temperature: float, options: Mapping[str, Any]) -> Variant:
    # What mull learns of a model and prepares for it belongs to the object: with one per variant, none evicts another's.
    own = copy.copy(model)

    def run(ids: Tensor, mask: Tensor) -> Outcome:
        out = mull.generate(
            own,
            ids,
            mask,
            max_new_tokens=tokens,
            temperature=temperature,
            seed=0,
            eos_token_id=(),
            pad_token_id=PAD,
            **options,
        )
        return Outcome(out.sequences[:, ids.shape[1] :].tolist(), out.stats)

    return run


def stock_variant(model: Any, tokens: int, temperature: float, options: Mapping[str, Any]) -> Variant:
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def run(ids: Tensor, mask: Tensor) -> Outcome:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=PAD, **sampling, **options
        )  # fmt: skip
        return Outcome(out[:, ids.shape[1] :].tolist())

    return run


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


def measure(
    variants: Mapping[str, Variant], prompts: Sequence[tuple[Tensor, Tensor]], rounds: int, label: str
) -> dict[str, Timing]:
    """Run all variants in turns on each prompt: a round to warm up, then `rounds`. Each prompt begins with another variant."""
    timings = {name: Timing() for name in variants}
    names = list(variants)
    for number in range(rounds + 1):
        begin = time.perf_counter()
        spent = dict.fromkeys(names, 0.0)
        for timing in timings.values():
            timing.outcomes.append([])
        for place, (ids, mask) in enumerate(prompts):
            first = place % len(names)
            for name in names[first:] + names[:first]:
                synchronize(ids)
                started = time.perf_counter()
                outcome = variants[name](ids, mask)
                synchronize(ids)
                spent[name] += time.perf_counter() - started - getattr(outcome.stats, "warm_up_seconds", 0.0)
                timings[name].outcomes[-1].append(outcome)
        for name, timing in timings.items():
            timing.tokens = sum(len(row) for outcome in timing.outcomes[-1] for row in outcome.rows)
            timing.seconds += [spent[name]] if number else []
        done = "warmed up" if number == 0 else f"round {number} of {rounds}"
        print(f"  {label}: {done}, {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    return timings


def synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def passes_of_stock(subject: Subject, prompts: Sequence[tuple[Tensor, Tensor]], tokens: int) -> float | None:
    """Tokens per pass of transformers with the heads, prompts not counted: its own statistics do not say."""
    if not subject.use_mtp:
        return None
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = subject.stock.register_forward_hook(count)
    run = stock_variant(subject.stock, tokens, 0.0, {"use_mtp": True})
    gained = sum(len(run(ids, mask).rows[0]) - 1 for ids, mask in prompts)
    handle.remove()
    return gained / (calls[0] - len(prompts))


class Judge:
    """Finds where texts first differ, and whether the two tokens are tied there.

    Args:
        subject: Whose texts they are.
        device: Where to compute.
    """

    def __init__(self, subject: Subject, device: str) -> None:
        wider = {"bf16": torch.float32, "fp32": torch.float64}[subject.precision]
        dtype = DTYPES[subject.precision]
        self.own, exact = (load_stock(subject.folder / "stock", dtype, device) for _ in range(2))
        self.exact = exact.to(wider)

    def differences(
        self, prompts: Sequence[Tensor], reference: list[list[int]], rows: list[list[int]]
    ) -> list[Difference]:
        """The first difference of each row that has one."""
        return differences(self.own, self.exact, [prompt.tolist() for prompt in prompts], reference, rows)


def distinct_share(rows: Sequence[Sequence[int]], n: int = 8) -> float:
    """Share of distinct ones among all runs of `n` tokens."""
    runs = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(runs)) / max(len(runs), 1)


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


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def own_machine(subject: Subject, device: str) -> Machine:
    """Throughput of the device with weights of this model's size: those of a small one stay in the cache."""
    size = sum(p.numel() * p.element_size() for p in subject.stock.parameters())
    return measure_machine(device, DTYPES[subject.precision], min(size, STREAMED_BYTES))


def predictions(
    subject: Subject, timings: Mapping[str, Timing], prompts: Sequence[Tensor], batch: int, device: str
) -> dict[str, float]:
    """Speed-up over plain decoding with fixed draft lengths if all passes took the least time, by variant."""
    peak = own_machine(subject, device)
    n_new = next(iter(timings.values())).tokens / len(prompts)
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
    timings = measure(variants_of(subject, arguments, batch), batches, arguments.rounds, label)
    greedy = arguments.temperature == 0
    reference = rows_of(timings[STOCK].outcomes[0])
    per_pass = passes_of_stock(subject, batches, arguments.tokens) if batch == 1 and greedy else None
    predicted = predictions(subject, timings, prompts, batch, arguments.device)
    rows = []
    for name, timing in timings.items():
        plain = timings[PLAIN + COMPILED if name.startswith("mull") and name.endswith(COMPILED) else PLAIN]
        row = {
            "variant": name,
            "tokens_per_second": {**spread(timing.per_second), "rounds": timing.per_second},
            "times_plain": spread(ratios(timing, plain)),
            "predicted": predicted.get(name),
            "times_transformers": spread(ratios(timing, timings[STOCK])),
            "tokens_per_pass": per_pass if "use_mtp" in name else timing.tokens_per_pass,
            "acceptance": timing.acceptance,
        }
        rows.append(row | (equality(timing, prompts, reference, judge) if greedy else {}))
    distinct = distinct_share(reference)
    show(label, rows, distinct)
    setting = {"model": subject.name, "precision": subject.precision, "batch": batch, "distinct": distinct}
    return {**setting, "variants": rows}


def ratios(timing: Timing, base: Timing) -> list[float]:
    """Speed relative to another variant's, round by round."""
    return [a / b for a, b in zip(timing.per_second, base.per_second, strict=True)]


def equality(timing: Timing, prompts: list[Tensor], reference: list[list[int]], judge: Judge) -> dict[str, Any]:
    """Share of texts equal to the reference, over all rounds, and the first differences of the others."""
    texts = [rows_of(outcomes) for outcomes in timing.outcomes]
    found = [difference for text in texts for difference in judge.differences(prompts, reference, text)]
    return {
        "equal": 1 - len(found) / (len(texts) * len(prompts)),
        "ties": all(difference.is_tie for difference in found),
        "differences": [asdict(difference) for difference in dict.fromkeys(found)],
    }


def rows_of(outcomes: Sequence[Outcome]) -> list[list[int]]:
    return [row for outcome in outcomes for row in outcome.rows]


def show(label: str, rows: Sequence[Mapping[str, Any]], distinct: float) -> None:
    print(f"\n{label}; distinct {distinct:.0%}")
    print(
        f"{'variant':38} {'tokens/s':>9} {'min':>8} {'max':>8} {'x plain':>8} {'predicted':>9} {'x transf.':>9} "
        f"{'tok/pass':>8} {'equal':>15}"
    )
    for row in rows:
        speed = row["tokens_per_second"]
        per_pass, predicted = (
            "" if row[key] is None else f"{row[key]:.2f}" for key in ("tokens_per_pass", "predicted")
        )
        equal = f"{row['equal']:.0%}" if "equal" in row else ""
        if equal and row["equal"] < 1:
            equal += ", ties" if row["ties"] else ", DIFFERENT"
        print(
            f"{row['variant']:38} {speed['median']:9.1f} {speed['min']:8.1f} {speed['max']:8.1f} "
            f"{row['times_plain']['median']:8.2f} {predicted:>9} {row['times_transformers']['median']:9.2f} "
            f"{per_pass:>8} {equal:>15}"
        )
    sys.stdout.flush()


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


def machine(arguments: argparse.Namespace) -> str:
    if arguments.device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {arguments.threads} thread(s)"


def header(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "command": f"python {shlex.join(sys.argv)}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(arguments),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": arguments.rounds,
        "seed": arguments.seed,
    }


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
            judge = Judge(subject, arguments.device)
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
    print(f"{machine(arguments)}, torch {torch.__version__}, {arguments.rounds} rounds", flush=True)
    results = {"verify_cost": verify_cost(arguments)} if arguments.verify_cost else speculate(arguments)
    record = {**header(arguments), "seconds": round(time.perf_counter() - started, 1), **results}
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{record['seconds']} s; written to {arguments.result}")
    wrong = failures(results.get("tables", []))
    for failure in wrong:
        print(failure, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
