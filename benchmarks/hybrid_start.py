"""Step-0 divergence of a softmax model turned into a hybrid, by how its DeltaNet layers start.

The teacher is a small Qwen3 that this program trains on the sources of the Python library, and keeps in its folder. Of every
four layers, the first three become Gated DeltaNet. The starts are measured on held-out files; the calibrated ones read files of
the training part.

    python benchmarks/hybrid_start.py [--seeds 0 1] [--width 320] [--layers 8] [--steps 320] [--folder out/hybrid_start]
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from race import header, machine
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from mull.app.demo.chapter import Bench, DemoSize
from mull.app.demo.loops import Text
from mull.data.corpus import load_stdlib, subsample
from mull.data.packing import pack_texts
from mull.data.sampler import ShuffledBatches
from mull.evaluation.divergence import StartDivergence, step_zero
from mull.evaluation.held_out import held_out_loss
from mull.retrofit.calibrate import CalibrationConfig, calibrate_starts
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken

RESULTS = Path(__file__).parent / "results"
HEAD_WIDTH = 32
PERIOD = 4
CALIBRATION_BYTES = 600_000
BATCH = 8

CONFIGS = {
    "ridge, sequential (default)": CalibrationConfig(),
    "ridge": CalibrationConfig(sequential=False),
    "scale, sequential": CalibrationConfig(output="scale"),
    "scale": CalibrationConfig(output="scale", sequential=False),
}


def architecture(text: Text, size: DemoSize, **changes: Any) -> Qwen3Config:
    """A small Qwen3 for this text."""
    sizes = {
        "vocab_size": len(text.tokenizer),
        "hidden_size": size.width,
        "intermediate_size": 3 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // HEAD_WIDTH,
        "num_key_value_heads": size.width // (2 * HEAD_WIDTH),
        "head_dim": HEAD_WIDTH,
        "max_position_embeddings": 4 * size.length,
        "tie_word_embeddings": True,
        "eos_token_id": text.tokenizer.eos_token_id,
        "pad_token_id": text.tokenizer.pad_token_id,
    }
    return Qwen3Config(**sizes | changes)


def trained_teacher(bench: Bench, steps: int) -> tuple[PreTrainedModel, Text]:
    """The teacher of this seed and size, from its folder or trained now, and its text."""
    size, text = bench.size, Text.load(bench)
    folder = bench.out / "teacher"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(bench.seed)
        teacher = AutoModelForCausalLM.from_config(architecture(text, size))
        print(f"teacher: {teacher.num_parameters():,} parameters, {steps} steps", flush=True)
        wrapped = wrap_transformer_with_etd(teacher, None)
        batches = ShuffledBatches(text.train, size.batch_size, bench.seed)
        objective = NextToken(IterationSampling(kind="fixed", maximum=1))
        bench.train("training", wrapped, objective, batches, steps=steps, warmup_steps=20)
        print(f"held-out loss {held_out_loss(wrapped, text.held_out, None):.4f}", flush=True)
        teacher.save_pretrained(folder)
        text.tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), text


def measure(teacher: PreTrainedModel, text: Text, rows: int, seed: int) -> tuple[list[StartDivergence], float]:
    """The step-0 table, and the seconds of the default calibration."""
    documents = subsample(load_stdlib().train, CALIBRATION_BYTES, 1000 + seed)
    length = text.held_out.input_ids.shape[1]
    packed = pack_texts((document.text for document in documents), text.tokenizer, length=length)
    batches = list(packed.input_ids[:rows].split(BATCH))
    held_out = list(text.held_out.input_ids[:-1].split(BATCH))  # the last row may be padded
    n_layers = teacher.config.num_hidden_layers
    layers = [number for number in range(n_layers) if (number + 1) % PERIOD]
    starts, seconds = {}, []
    for name, config in CONFIGS.items():
        started = time.perf_counter()
        starts[name] = calibrate_starts(teacher, batches, layers, config)
        seconds.append(time.perf_counter() - started)
    # What the parts of a start are worth.
    starts["scale, half-life 128"] = {
        number: start._replace(half_life=None) for number, start in starts["scale"].items()
    }
    starts["scale 1"] = {number: start._replace(out_scale=None) for number, start in starts["scale"].items()}
    return step_zero(teacher, held_out, starts), seconds[0]


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--rows", type=int, default=128, help="rows of 256 tokens to calibrate on")
    parser.add_argument("--folder", type=Path, default=Path("out/hybrid_start"))
    parser.add_argument("--result", type=Path, default=RESULTS / "hybrid_start-cpu.json")
    arguments = parser.parse_args(sys.argv[1:] if given is None else given)
    print(f"{machine()}, torch {torch.__version__}", flush=True)
    size = replace(DemoSize(), width=arguments.width, layers=arguments.layers)
    results = {}
    for seed in arguments.seeds:
        bench = Bench(arguments.folder / f"{arguments.width}x{arguments.layers}-{seed}", seed, size)
        teacher, text = trained_teacher(bench, arguments.steps)
        loss = held_out_loss(wrap_transformer_with_etd(teacher, None), text.held_out, None)
        table, seconds = measure(teacher, text, arguments.rows, seed)
        silent = next(row.divergence for row in table if row.start == "zero output")
        print(
            f"seed {seed}: {teacher.num_parameters():,} parameters, held-out loss {loss:.4f}, {seconds:.0f} s",
            flush=True,
        )
        for row in table:
            print(f"  {row.start:34} {row.divergence:.4f} ± {row.standard_error:.4f}  {row.divergence / silent:.3f}")
        results[seed] = {
            "parameters": teacher.num_parameters(),
            "teacher_loss": loss,
            "calibration_seconds": seconds,
            "table": [row.model_dump() for row in table],
        }
        fields = {"steps": arguments.steps, "rows": arguments.rows}
        arguments.result.write_text(json.dumps({**header("cpu", **fields), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
