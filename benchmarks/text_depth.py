"""What halting rules give on text: each at the same mean depth, beside fixed depths, random stops and the oracle.

The model is the demo's looped model of Python sources. Its exit head, for the rule `learned`, is trained afterwards, with the
rest frozen. Every rule runs with several thresholds, and is compared with fixed depths at the same mean iterations, on the line
between the nearest points: what counts is which tokens it picks at equal cost. *random* are the depths of `state`, shuffled.

    python benchmarks/text_depth.py [--seeds 0 1 2]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from race import header, machine

import mull
from mull import HaltingConfig
from mull.app.demo.chapter import Bench
from mull.app.demo.loops import Loops
from mull.data.sampler import ShuffledBatches
from mull.evaluation.search.calibration import calibrate
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
        found = calibrate(
            model.eval(), loops.text.held_out, rule="state", target_iterations=target, max_rows=rows, seed=seed
        )
        points = [point.model_dump() for point in found.curve]
        return {"points": points, "targets": found.n_targets, "split": split.model_dump()}


def at_depth(points: Sequence[dict[str, Any]], iterations: float) -> float | None:
    """Loss at a mean depth, on the line between the nearest points below and above; None where there are none."""
    known = sorted((point["iterations"], point["loss"]) for point in points)
    depths, losses = zip(*known, strict=True)
    if not depths[0] <= iterations <= depths[-1]:
        return None
    return float(np.interp(iterations, depths, losses))


def gains(result: dict[str, Any], iterations: float) -> dict[str, float]:
    """By how many nats each way is better than fixed depths at the same mean depth."""
    by_rule: dict[str, list[dict[str, Any]]] = {}
    for point in result["points"]:
        by_rule.setdefault(point["rule"], []).append(point)
    fixed = at_depth(by_rule["fixed"], iterations)
    assert fixed is not None, "inside of what was measured"
    found = {rule: at_depth(points, iterations) for rule, points in by_rule.items()}
    return {rule: fixed - loss for rule, loss in found.items() if loss is not None}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=2.0, help="mean iterations of a token, of at most 4")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of 256 tokens")
    parser.add_argument("--result", type=Path, default=RESULTS / "text_depth-cpu.json")
    arguments = parser.parse_args(sys.argv[1:] if given is None else given)
    print(f"{machine()}, torch {torch.__version__}", flush=True)
    results = {}
    for seed in arguments.seeds:
        results[seed] = measure(seed, arguments.target, arguments.rows)
        fields = {"target": arguments.target, "rows": arguments.rows}
        arguments.result.write_text(json.dumps({**header("cpu", **fields), "results": results}, indent=1) + "\n")
        fixed = [f"{p['loss']:.4f}" for p in results[seed]["points"] if p["rule"] == "fixed"]
        oracle = [
            (round(p["iterations"], 2), round(p["loss"], 4)) for p in results[seed]["points"] if p["rule"] == "oracle"
        ]
        print(f"seed {seed}: fixed {', '.join(fixed)}; oracle {oracle[0]}", flush=True)
        for depth in (1.5, 2.0, 2.5, 3.0):
            gained = ", ".join(f"{rule} {gain:+.4f}" for rule, gain in gains(results[seed], depth).items())
            print(f"  better than fixed at {depth} iterations: {gained}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
