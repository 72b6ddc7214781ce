"""How fast hybrids come back to their teacher, by start and by stages, at equal numbers of tokens.

The teachers are those of `hybrid_start.py`: small Qwen3 models on Python's library, of whose layers three of four become Gated
DeltaNet. Every arm sees the same rows. An arm with alignment spends the first half of its steps on it.

    python benchmarks/hybrid_healing.py [--seeds 0 1] [--width 128] [--steps 120] [--arms "ridge, KL"] [--folder out/hybrid_start]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hybrid_start import BATCH, CALIBRATION_BYTES, PERIOD, trained_teacher
from race import header

from mull.app.demo.chapter import Bench, DemoSize
from mull.data.corpus import load_stdlib, subsample
from mull.data.packing import pack_texts
from mull.data.sampler import ShuffledBatches
from mull.evaluation.held_out import held_out_loss
from mull.retrofit.calibrate import CalibrationConfig, calibrate_starts
from mull.retrofit.convert import create_hybrid_from_qwen3
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.loop import TrainConfig, train
from mull.training.objectives.align import AlignConfig
from mull.training.objectives.distill import DistillConfig
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

RIDGE, SCALE = CalibrationConfig(), CalibrationConfig(output="scale", sequential=False)
ARMS: dict[str, tuple[CalibrationConfig | None, bool]] = {
    "no calibration, KL": (None, False),
    "no calibration, align, KL": (None, True),
    "ridge, KL": (RIDGE, False),
    "ridge, align, KL": (RIDGE, True),
    "scale, align, KL": (SCALE, True),
}
"""Start, and whether half of the steps align."""

RATES = {"align": 1e-3, "distill": 1e-3}


def measure(bench: Bench, teacher_steps: int, steps: int, arms: Sequence[str]) -> dict[str, Any]:
    """Held-out losses of one seed's teacher and of its hybrids, before and after."""
    source, text = trained_teacher(bench, teacher_steps)
    teacher = wrap_transformer_with_etd(source, None).eval().requires_grad_(False)
    documents = subsample(load_stdlib().train, CALIBRATION_BYTES, 1000 + bench.seed)
    length = text.held_out.input_ids.shape[1]
    packed = pack_texts((document.text for document in documents), text.tokenizer, length=length)
    layers = [number for number in range(bench.size.layers) if (number + 1) % PERIOD]
    calibration = list(packed.input_ids[:128].split(BATCH))
    starts = {config: calibrate_starts(source, calibration, layers, config) for config in (RIDGE, SCALE)}
    losses: dict[str, Any] = {"teacher": held_out_loss(teacher, text.held_out, None)}
    for name in arms:
        config, aligned = ARMS[name]
        student = create_hybrid_from_qwen3(source, starts=None if config is None else starts[config])
        before, done = held_out_loss(student, text.held_out, None), 0
        stages = {"align": steps // 2, "distill": steps - steps // 2} if aligned else {"distill": steps}
        for algorithm, n in stages.items():
            resources = Resources(model=student, reference=teacher)
            settings: Any = AlignConfig() if algorithm == "align" else DistillConfig(alpha=1.0, temperature=1.0)
            batches = ShuffledBatches(text.train, BATCH, 3000 + bench.seed)
            rates: dict[str, Any] = {"optimizer": "adamw", "peak_lr": RATES[algorithm], "precision": "fp32"}
            with tempfile.TemporaryDirectory() as folder:
                train(
                    student,
                    make_objective(algorithm, resources, settings),
                    lambda index, done=done, batches=batches: batches(index + done),
                    TrainConfig(steps=n, warmup_steps=5, seed=bench.seed, **rates),
                    Path(folder),
                )
            done += n
        student.eval()
        losses[name] = {"before": before, "after": held_out_loss(student, text.held_out, None)}
        print(f"seed {bench.seed}, teacher {losses['teacher']:.4f}; {name}: {losses[name]}", flush=True)
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--folder", type=Path, default=Path("out/hybrid_start"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    size = replace(DemoSize(), width=given.width, layers=given.layers)
    found = {}
    for seed in given.seeds:
        bench = Bench(given.folder / f"{given.width}x{given.layers}-{seed}", seed, size)
        found[seed] = measure(bench, given.teacher_steps, given.steps, given.arms)
    if given.out is not None:
        facts = header(
            "cpu", seconds=time.perf_counter() - started, steps=given.steps, tokens=given.steps * BATCH * size.length
        )
        given.out.write_text(json.dumps(facts | {"losses": found}, indent=1))


if __name__ == "__main__":
    main()
