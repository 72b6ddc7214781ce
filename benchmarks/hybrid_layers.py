"""Layers that stay softmax, by how they are chosen, at equal budget: what the hybrid loses before any training.

The teacher is that of ``hybrid_start.py``. Each method keeps as many layers; the others start calibrated, one after another. What
counts is the divergence from the teacher on held-out rows that the choice has not seen, beside that of the uniform choice on the
same rows, and of random choices.

    python benchmarks/hybrid_layers.py [--seeds 0 1] [--keep 2] [--width 320] [--layers 8] [--folder out/hybrid_start]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from hybrid_start import BATCH, CALIBRATION_BYTES, trained_teacher
from race import header, machine
from torch import Tensor
from transformers import PreTrainedModel

from mull.app.demo.chapter import Bench, DemoSize
from mull.app.demo.loops import Text
from mull.data.corpus import load_stdlib, subsample
from mull.data.packing import pack_texts
from mull.data.retrieval import retrieval_task
from mull.evaluation.divergence import final_states, row_divergences
from mull.evaluation.search.layer_choice import Method, choose_layers
from mull.retrofit.calibrate import CalibrationConfig, calibrate_starts, delta_mixer, mixers_in_place

RESULTS = Path(__file__).parent / "results"
RANDOM_CHOICES = 4


@torch.no_grad()
def divergences(teacher: Any, keep: Sequence[int], calibration: Tensor, rows: Tensor) -> Tensor:
    """Of each row, when all other layers are DeltaNet with a sequential ridge start."""
    layers = teacher.model.layers
    converted = [number for number in range(len(layers)) if number not in keep]
    starts = calibrate_starts(teacher, list(calibration.split(BATCH)), converted, progress=False)
    mixers = {number: delta_mixer(layers[number], teacher.config, start) for number, start in starts.items()}
    found = []
    for batch in rows.split(BATCH):
        expected = final_states(teacher, batch)
        with mixers_in_place(layers, mixers):
            found.append(row_divergences(expected, final_states(teacher, batch), teacher.lm_head))
    return torch.cat(found)


def measure(teacher: PreTrainedModel, text: Text, n_keep: int, n_rows: int, seed: int) -> list[dict[str, Any]]:
    """The choice of each method, and what the hybrid loses with it."""
    length, n_layers = text.held_out.input_ids.shape[1], teacher.config.num_hidden_layers
    documents = subsample(load_stdlib().train, CALIBRATION_BYTES, 1000 + seed)
    packed = pack_texts((document.text for document in documents), text.tokenizer, length=length)
    calibration, held_out = packed.input_ids[:n_rows], text.held_out.input_ids[:-1]
    chosen_on, judged_on = held_out[::2], held_out[1::2]
    alone = CalibrationConfig(sequential=False)
    starts = calibrate_starts(teacher, list(calibration.split(BATCH)), range(n_layers), alone)
    tasks = retrieval_task(chosen_on, len(chosen_on), 4, seed=seed)
    choices: dict[str, tuple[int, ...]] = {}
    results: list[dict[str, Any]] = []
    for method in get_args(Method):
        found = choose_layers(teacher, n_keep, method, starts=starts, rows=chosen_on, tasks=tasks, seed=seed)
        choices[method] = found.keep
        results.append({"choice": method, **found.model_dump(exclude={"model_name", "method"})})
        print(f"  {method}: {found.verdict} ({found.seconds:.0f} s)", flush=True)
    generator = torch.Generator().manual_seed(seed)
    for number in range(RANDOM_CHOICES):
        drawn = torch.randperm(n_layers, generator=generator)[:n_keep].sort().values.tolist()
        choices[f"random {number}"] = tuple(drawn)
        results.append({"choice": f"random {number}", "keep": drawn})
    by_choice = {name: divergences(teacher, keep, calibration, judged_on) for name, keep in choices.items()}
    for result in results:
        rows = by_choice[result["choice"]]
        gap = rows - by_choice["uniform"]
        result["divergence"] = rows.mean().item()
        result["against_uniform"] = [gap.mean().item(), gap.std().item() / len(gap) ** 0.5]
    return results


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=320, help="of the teacher, if it is not there yet")
    parser.add_argument("--rows", type=int, default=64, help="rows of 256 tokens to calibrate on")
    parser.add_argument("--folder", type=Path, default=Path("out/hybrid_start"))
    parser.add_argument("--result", type=Path, default=RESULTS / "hybrid_layers-cpu.json")
    arguments = parser.parse_args(sys.argv[1:] if given is None else given)
    print(f"{machine()}, torch {torch.__version__}", flush=True)
    size = replace(DemoSize(), width=arguments.width, layers=arguments.layers)
    results = {}
    for seed in arguments.seeds:
        bench = Bench(arguments.folder / f"{arguments.width}x{arguments.layers}-{seed}", seed, size)
        teacher, text = trained_teacher(bench, arguments.steps)
        print(f"seed {seed}: {teacher.num_parameters():,} parameters", flush=True)
        results[seed] = measure(teacher, text, arguments.keep, arguments.rows, seed)
        for result in results[seed]:
            mean, error = result["against_uniform"]
            kept = ", ".join(map(str, result["keep"]))
            print(
                f"  {result['choice']:12} keeps {kept:8} {result['divergence']:.4f}, {mean:+.4f} ± {error:.4f}",
                flush=True,
            )
        fields = {"keep": arguments.keep, "steps": arguments.steps, "rows": arguments.rows}
        arguments.result.write_text(json.dumps({**header("cpu", **fields), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
