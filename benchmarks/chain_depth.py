"""Whether adaptive depth pays where depth is needed: following chains of edges, one edge per iteration.

Small looped models (0.1 million parameters) learn the chain task, and are asked questions that are deeper than those of their
training. In one of the two arms, the tokens of the prompt stop after the first iteration, in training and in use. Three ways of
deciding when a question is answered are compared on fresh prompts: a fixed number of iterations, the rule `state`, and the rule
`confidence`. The thresholds are chosen on other prompts: the one with the most right answers, and among equals the one with the
fewest iterations.

    python benchmarks/chain_depth.py
    python benchmarks/chain_depth.py --nodes 16 --hops 5 --most 12 --steps 600 --short 0 --arms all stopped
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from race import header, machine
from scipy.stats import spearmanr
from torch import Tensor

from mull import HaltingConfig, MullForCausalLM
from mull.app.demo.chain import chain_model
from mull.app.demo.chapter import Bench
from mull.data.chain import ChainTask
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.step_supervision import StepSupervision

RESULTS = Path(__file__).parent / "results"
THRESHOLDS = {
    "state": [0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.985, 0.99, 0.993, 0.995, 0.997, 0.998, 0.999, 0.9995],
    "confidence": [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999],
}
PROMPTS = 256
"""Prompts for choosing a threshold, and as many others for the test."""


def first_short(task: ChainTask, seed: int, n_short: int) -> Callable[[int], dict[str, Tensor]]:
    """Batches of which the first `n_short` have half of the nodes in their prompts.

    A prompt with all of them begins with a plateau of thousands of steps, in which no edge is found.
    """
    whole = task.batches(32, seed)
    if not n_short:
        return whole
    half = ChainTask(n_nodes=task.n_nodes // 2, n_chains=task.n_chains, max_train_hops=task.max_train_hops)
    short = half.batches(32, seed)

    def batch(index: int) -> dict[str, Tensor]:
        if index >= n_short:
            return whole(index)
        found = short(index)
        generator = torch.Generator().manual_seed(index)
        nodes = torch.stack([torch.randperm(task.n_nodes, generator=generator) for _ in found["input_ids"]])
        # The special tokens follow the nodes in both vocabularies.
        names = torch.cat(
            [nodes[:, : half.n_nodes], torch.tensor([[task.separator_id, task.end_id]]).expand(32, -1)], 1
        )
        for name in ("input_ids", "step_labels", "labels"):
            old = found[name]
            new = names.gather(1, old.clamp(min=0).flatten(1)).view_as(old)
            found[name] = torch.where(old < 0, old, new)
        return found

    return batch


def trained(task: ChainTask, stop_prompt: bool, arguments: argparse.Namespace, seed: int) -> MullForCausalLM:
    model = chain_model(task, seed)
    sampling = IterationSampling(kind="uniform", minimum=2, maximum=arguments.loops or task.max_train_hops)
    objective = StepSupervision(sampling, stop_unlabelled=stop_prompt)
    settings: dict[str, Any] = {"schedule": "wsd", "decay_share": 0.4, "weight_decay": 0.0, "precision": "fp32"}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), seed)
        bench.train(
            "chain",
            model,
            objective,
            first_short(task, seed, arguments.short),
            steps=arguments.steps,
            peak_lr=2e-3,
            **settings,
        )
    return model.eval()


class Questions:
    """Prompts with questions of every depth, and a model that answers them."""

    def __init__(self, model: MullForCausalLM, task: ChainTask, stop_prompt: bool, seed: int, most: int) -> None:
        self.model, self.most = model, most
        batch = task.batches(PROMPTS, seed, train=False)
        self.parts = [batch(0), batch(1)]
        """For choosing, and for the test."""
        self.stop_prompt = stop_prompt

    @torch.no_grad()
    def ask(self, part: int, iterations: int, halting: HaltingConfig | None = None) -> dict[str, Any]:
        """Right answers ``[Q]``, hops and iterations of each question, and the seconds it took."""
        batch = self.parts[part]
        asked = batch["hops"] > 0
        body, fixed = self.model.model, torch.full_like(batch["hops"], iterations)
        thinks = batch["hops"] >= 0 if self.stop_prompt else torch.ones_like(asked)
        started = time.perf_counter()
        if halting is None:
            policy: Any = body.given_depths(torch.where(thinks, fixed, 1)) if self.stop_prompt else None
        else:
            policy = body.halting(halting, iterations, thinks, self.model.lm_head)
        names = ("input_ids", "attention_mask", "position_ids")
        state = body.hidden_states(**{name: batch[name] for name in names}, think_iterations=iterations, policy=policy)
        seconds = time.perf_counter() - started
        answers = self.model.lm_head(state[asked]).argmax(-1)
        depths: Tensor = fixed if halting is None else policy.depth
        return {
            "right": answers == batch["step_labels"][..., -1][asked],
            "hops": batch["hops"][asked],
            "iterations": depths[asked],
            "of all tokens": torch.where(thinks, depths, 1),
            "seconds": seconds,
        }

    def score(self, part: int, iterations: int, halting: HaltingConfig | None = None) -> dict[str, Any]:
        """Accuracy and iterations over all questions, and by hops."""
        found = self.ask(part, iterations, halting)
        return {
            "threshold": None if halting is None else halting.threshold,
            "accuracy": float(found["right"].float().mean()),
            "iterations": float(found["iterations"].float().mean()),
            "iterations of all tokens": float(found["of all tokens"].float().mean()),
            "seconds": found["seconds"],
            "by_hops": {
                hops: [float(found[name][found["hops"] == hops].float().mean()) for name in ("right", "iterations")]
                for hops in found["hops"].unique().tolist()
            },
            "spearman": None if halting is None else correlation(found["hops"], found["iterations"]),
        }


def correlation(hops: Tensor, iterations: Tensor) -> float:
    """Spearman's; 0 where every question took equally many iterations."""
    return float(spearmanr(hops, iterations).statistic) if len(iterations.unique()) > 1 else 0.0


def best(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(points, key=lambda point: (point["accuracy"], -point["iterations"]))


def measure(task: ChainTask, stop_prompt: bool, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    started, most = time.perf_counter(), arguments.most
    model = trained(task, stop_prompt, arguments, seed)
    result: dict[str, Any] = {"training_seconds": time.perf_counter() - started}
    questions = Questions(model, task, stop_prompt, seed, most)
    ways: dict[str, list[tuple[int, HaltingConfig | None]]] = {"fixed": [(k, None) for k in range(1, most + 1)]}
    for rule, thresholds in THRESHOLDS.items():
        ways[rule] = [(most, HaltingConfig(rule=rule, threshold=value)) for value in thresholds]
    chosen = {}
    for name, of_name in ways.items():
        choices, points = ([questions.score(part, *way) for way in of_name] for part in (0, 1))
        place = choices.index(best(choices))
        chosen[name], result[name] = of_name[place], points[place]
        result[f"{name} curve"] = [[p["threshold"], p["accuracy"], p["iterations"]] for p in points]
    # In turns, because the speed of a machine drifts.
    turns = [{name: questions.ask(1, *chosen[name])["seconds"] for name in ("fixed", "state")} for _ in range(5)]
    result["seconds"] = {name: statistics.median(turn[name] for turn in turns) for name in ("fixed", "state")}
    return result


def show(name: str, result: dict[str, Any]) -> None:
    print(f"{name}: trained in {result['training_seconds']:.0f} s", flush=True)
    for way in ("fixed", *THRESHOLDS):
        point = result[way]
        hardest = max(point["by_hops"])
        threshold = "" if point["threshold"] is None else f"threshold {point['threshold']}, "
        rho = "" if point["spearman"] is None else f", Spearman {point['spearman']:.3f}"
        print(
            f"  {way:10} {threshold}{100 * point['accuracy']:.2f} % right at {point['iterations']:.2f} iterations "
            f"({point['iterations of all tokens']:.2f} of all tokens), "
            f"{hardest} hops {100 * point['by_hops'][hardest][0]:.1f} %{rho}",
            flush=True,
        )
    print(f"  seconds: {result['seconds']}", flush=True)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--hops", type=int, default=6, help="deepest question of the training")
    parser.add_argument("--most", type=int, default=18, help="largest number of iterations in the test")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--loops", type=int, help="most iterations in the training; default: the hops")
    parser.add_argument("--short", type=int, default=500, help="first steps, on prompts with half of the nodes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=["all", "stopped"], default=["stopped"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args(sys.argv[1:] if given is None else given)
    torch.set_num_threads(arguments.threads)
    print(f"{machine()}, torch {torch.__version__}", flush=True)
    task = ChainTask(n_nodes=arguments.nodes, max_train_hops=arguments.hops)
    results = {}
    for arm in arguments.arms:
        for seed in arguments.seeds:
            name = f"{'prompt stopped' if arm == 'stopped' else 'all tokens think'}, seed {seed}"
            results[name] = measure(task, arm == "stopped", arguments, seed)
            show(name, results[name])
    file = arguments.result or RESULTS / f"chain_depth-{arguments.nodes}-cpu.json"
    fields = {
        "nodes": arguments.nodes,
        "hops": arguments.hops,
        "steps": arguments.steps,
        "short": arguments.short,
        "loops": arguments.loops,
    }
    file.write_text(json.dumps({**header("cpu", **fields), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
