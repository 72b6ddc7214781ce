"""What halting rules give on text: each at the same mean depth, beside fixed depths, random stops and the oracle.

The model is the demo's looped model of Python sources. Its exit head, for the rule `learned`, is trained afterwards, with the
rest frozen. Every rule is calibrated to the same mean iterations on the held-out rows on which it is measured: what is compared
is which tokens it picks at equal cost, not how well a threshold carries over to other text.

    python benchmarks/text_depth.py [--seeds 0 1 2]
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from race import header, machine

import mull
from mull import HaltingConfig
from mull.app.demo.chapter import Bench
from mull.app.demo.loops import Loops
from mull.data.sampler import ShuffledBatches
from mull.evaluation.search.calibration import SCALES, calibrate
from mull.training.objectives.exits import ExitsConfig
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

RESULTS = Path(__file__).parent / "results"
HEAD_STEPS = 60


def measure(seed: int, target: float, rows: int) -> dict[str, Any]:
    """Loss by way of stopping: at fixed depths, and at the target depth."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), seed)
        loops = Loops.train(bench)
        split = loops.looped.etd_config
        assert split is not None, "the demo's model loops"
        learned = split.model_copy(update={"halting": HaltingConfig(rule="learned")})
        torch.manual_seed(seed)
        model = mull.from_pretrained(str(bench.out / "model"), etd=learned)
        iterations = bench.size.max_iterations
        resources = Resources(model=model, iterations=IterationSampling(maximum=iterations))
        exits = make_objective("exits", resources, ExitsConfig(supervision="improvement"))
        batches = ShuffledBatches(loops.text.train, bench.size.batch_size, 1000 + seed)
        bench.train("exits", model, exits, batches, steps=HEAD_STEPS, trainable=("*exit_head*",))
        points = {}
        for rule in SCALES:
            found = calibrate(
                model.eval(), loops.text.held_out, rule=rule, target_iterations=target, max_rows=rows, seed=seed
            )
            near = [point for point in found.curve if point.rule == "random"]
            points[rule] = {
                **found.chosen.model_dump(),
                "random": min(near, key=lambda point: abs(point.iterations - target)).model_dump(),
            }
        named = {"fixed": [point.model_dump() for point in found.curve if point.rule == "fixed"]}
        named["oracle"] = [point.model_dump() for point in found.curve if point.rule == "oracle"]
        return {"rules": points, **named, "targets": found.n_targets, "split": split.model_dump()}


def between(fixed: Sequence[dict[str, Any]], iterations: float) -> float:
    """Loss of a mixture of two fixed depths, interpolated between them."""
    low, high = fixed[int(iterations) - 1], fixed[min(int(iterations), len(fixed) - 1)]
    share = iterations - int(iterations)
    return float((1 - share) * low["loss"] + share * high["loss"])


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=2.0, help="mean iterations of a token, of at most 4")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of 256 tokens")
    parser.add_argument("--result", type=Path, default=RESULTS / "text_depth-cpu.json")
    arguments = parser.parse_args(sys.argv[1:] if given is None else given)
    print(f"{machine()}, torch {torch.__version__}", flush=True)
    results = {seed: measure(seed, arguments.target, arguments.rows) for seed in arguments.seeds}
    fields = {"target": arguments.target, "rows": arguments.rows}
    arguments.result.write_text(json.dumps({**header("cpu", **fields), "results": results}, indent=1) + "\n")
    first = next(iter(results.values()))
    print("fixed", [[round(point["loss"], 4) for point in result["fixed"]] for result in results.values()])
    print("oracle", [[(round(p["loss"], 4), round(p["iterations"], 2)) for p in r["oracle"]] for r in results.values()])
    for rule in first["rules"]:
        gains, chance = [], []
        for result in results.values():
            point = result["rules"][rule]
            shuffled = point["random"]
            gains.append(between(result["fixed"], point["iterations"]) - point["loss"])
            chance.append(between(result["fixed"], shuffled["iterations"]) - shuffled["loss"])
        print(
            f"{rule:10} better than a fixed depth by {statistics.mean(gains):.4f} nats ({min(gains):.4f} to {max(gains):.4f}), "
            f"random by {statistics.mean(chance):.4f} ({min(chance):.4f} to {max(chance):.4f})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
