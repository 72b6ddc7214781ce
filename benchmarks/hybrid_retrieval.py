"""What a hybrid loses of retrieval, before and after healing, by the layers that keep their attention.

The teacher is a small Qwen3 that this program trains on Python's library and, in every other batch, on rows with facts to find:
of each fact (marker, key, value) there are several copies, and the values of all but the first are targets. So small a model does
not learn to find them within minutes, so the two layers of an induction are written into its weights first: one copies the token
before, one looks for the place that the last token came before. Training changes both, like all others.

Each method then chooses layers with calibrated starts; the hybrids learn from the teacher on text alone, or on text and facts.
Tasks of `mull.data.retrieval` judge them, on held-out text: one fact in 256 tokens (needle), or several (multi-key).

    python benchmarks/hybrid_retrieval.py [--seeds 0 1] [--steps 800] [--healing-steps 80] [--folder out/hybrid_retrieval]
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from hybrid_start import BATCH, CALIBRATION_BYTES, HEAD_WIDTH, architecture
from race import header, machine
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mull.app.demo.chapter import Bench, DemoSize
from mull.app.demo.loops import Text
from mull.data.corpus import load_stdlib, subsample
from mull.data.packing import pack_texts
from mull.data.retrieval import FACT, Retrieval, retrieval_task
from mull.data.sampler import ShuffledBatches
from mull.evaluation.held_out import held_out_loss
from mull.evaluation.search.layer_choice import Method, choose_layers
from mull.model.causal_lm import MullForCausalLM
from mull.ops.targets import IGNORED
from mull.retrofit.calibrate import CalibrationConfig, calibrate_starts
from mull.retrofit.convert import create_hybrid_from_qwen3
from mull.retrofit.hybrid import CrossArchTransferConfig, HybridAttentionConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.loop import TrainConfig, train
from mull.training.objectives.distill import DistillConfig
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

RESULTS = Path(__file__).parent / "results"
FACTS_LENGTH, FACTS_BATCH = 128, 16
N_FACTS, COPIES = 8, 4
KEYS = (1, 4, 8)
EXAMPLES = 192
KEEP = 2
BEFORE, MATCH = 1, 5
"""Layers that start as the two of an induction."""

THETA = 1e6
"""Base of the rotary positions: half of a head's pairs hardly turn within a row."""

Batches = Callable[[int], dict[str, Tensor]]


def fact_rows(text: Text, seed: int, index: int) -> dict[str, Tensor]:
    """A batch of rows with copied facts; labels are the values of all copies but the first."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + index)
    n_rows, n_places = len(text.train), FACTS_LENGTH // FACT
    rows = text.train.input_ids[torch.randint(n_rows, (FACTS_BATCH,), generator=generator), :FACTS_LENGTH].clone()
    labels = torch.full_like(rows, IGNORED)
    for row, label in zip(rows, labels, strict=True):
        drawn = torch.randperm(len(text.tokenizer), generator=generator)[: 1 + 2 * N_FACTS]
        marker, keys, values = drawn[0], drawn[1 : 1 + N_FACTS], drawn[1 + N_FACTS :]
        seen: set[int] = set()
        places = torch.randperm(n_places, generator=generator)[: N_FACTS * COPIES].sort().values
        facts = torch.arange(N_FACTS).repeat(COPIES)[torch.randperm(N_FACTS * COPIES, generator=generator)]
        for place, fact in zip(places.tolist(), facts.tolist(), strict=True):
            row[FACT * place : FACT * place + FACT] = torch.stack([marker, keys[fact], values[fact]])
            if fact in seen:
                label[FACT * place + FACT - 1] = values[fact]
            seen.add(fact)
    return {"input_ids": rows, "labels": labels}


def mixed(text: Text, seed: int) -> Batches:
    """Text and facts in turns."""
    of_text = ShuffledBatches(text.train, BATCH, seed)
    return lambda index: fact_rows(text, seed, index) if index % 2 else of_text(index // 2)


@torch.no_grad()
def plant_induction(model: Any) -> None:
    """Write the two layers of an induction into the first heads of `BEFORE` and `MATCH`."""
    n = HEAD_WIDTH
    token, before, one = (
        slice(0, n),
        slice(n, 2 * n),
        2 * n,
    )  # places in the states: codes of two tokens, and a constant
    embedding, first = model.model.embed_tokens.weight, slice(0, n)
    embedding[:, token] = 0.1 * torch.randn(len(embedding), n)
    embedding[:, before] = 0
    embedding[:, one] = 0.2

    def write(
        layer: int, query: tuple[Any, Tensor], key: tuple[Any, Tensor], out: slice, gain: float, sharpness: float
    ) -> None:
        attention = model.model.layers[layer].self_attn
        for projection, (columns, weights) in ((attention.q_proj, query), (attention.k_proj, key)):
            projection.weight[first] = 0
            projection.weight[first, columns] = weights
        attention.q_norm.weight.fill_(sharpness)
        attention.k_norm.weight.fill_(sharpness)
        attention.v_proj.weight[first] = 0
        attention.v_proj.weight[first, token] = 0.03 * torch.eye(n)  # as small as the values of other heads
        attention.o_proj.weight[:, first] = 0
        attention.o_proj.weight[out, first] = gain * torch.eye(n)

    speed = THETA ** (-torch.arange(n // 2) / (n // 2))
    one_back = torch.cat([speed.cos(), -speed.sin()])
    here = torch.cat([torch.ones(n // 2), torch.zeros(n // 2)])
    write(BEFORE, (one, one_back), (one, here), out=before, gain=3.3, sharpness=12.0)
    slow = torch.arange(n) % (n // 2) >= 7
    code = torch.randn(n, n) * slow[:, None]
    write(MATCH, (token, code), (before, code), out=token, gain=13.2, sharpness=6.0)


def trained_teacher(bench: Bench, steps: int) -> tuple[PreTrainedModel, Text]:
    """The teacher of this seed, from its folder or trained now, and its text."""
    size, text = bench.size, Text.load(bench)
    folder = bench.out / "teacher"
    if not (folder / "model.safetensors").is_file():
        torch.manual_seed(bench.seed)
        rope = {"rope_type": "default", "rope_theta": THETA}
        teacher = AutoModelForCausalLM.from_config(architecture(text, size, rope_parameters=rope))
        plant_induction(teacher)
        wrapped = wrap_transformer_with_etd(teacher, None)
        objective = NextToken(IterationSampling(kind="fixed", maximum=1))
        # Adam, as Muon's large updates would wipe out what was written into the weights.
        rates: dict[str, Any] = {"optimizer": "adamw", "peak_lr": 4e-4, "precision": "fp32"}
        config = TrainConfig(steps=steps, warmup_steps=50, seed=bench.seed, log_every=1, **rates)
        train(wrapped, objective, mixed(text, bench.seed), config, bench.out / "training")
        teacher.save_pretrained(folder)
        text.tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), text


@torch.no_grad()
def accuracy(model: Any, tasks: Retrieval) -> float:
    """Share of tasks whose answer is the most probable token."""
    found = [model(rows).logits[:, -1].argmax(-1) for rows in tasks.input_ids.split(BATCH)]
    return (torch.cat(found) == tasks.answers).float().mean().item()


def judged(model: Any, text: Text, seed: int) -> dict[str, float]:
    """Held-out loss of a model of mull, and its accuracy by the number of facts."""
    rows = text.held_out.input_ids[:-1]  # the last row may be padded
    by_keys = {f"{n} keys": accuracy(model, retrieval_task(rows, EXAMPLES, n, seed=900 + seed)) for n in KEYS}
    return {"loss": held_out_loss(model, text.held_out, None), **by_keys}


def healed(source: PreTrainedModel, student: MullForCausalLM, batches: Batches, steps: int, seed: int) -> None:
    """Distil the teacher into the student, by the divergence of logits alone."""
    teacher = wrap_transformer_with_etd(source, None).eval().requires_grad_(False)
    resources = Resources(model=student, reference=teacher)
    objective = make_objective("distill", resources, DistillConfig(alpha=1.0, temperature=1.0))
    config = TrainConfig(steps=steps, warmup_steps=5, seed=seed, optimizer="adamw", peak_lr=1e-3, precision="fp32")
    with tempfile.TemporaryDirectory() as folder:
        train(student, objective, batches, config, Path(folder))
    student.eval()


def measure(bench: Bench, steps: int, healing_steps: int) -> dict[str, Any]:
    """The teacher, and the hybrids of every choice."""
    teacher, text = trained_teacher(bench, steps)
    seed, n_layers = bench.seed, bench.size.layers
    results: dict[str, Any] = {"teacher": judged(wrap_transformer_with_etd(teacher, None).eval(), text, seed)}
    print(f"seed {seed}, {teacher.num_parameters():,} parameters: teacher {results['teacher']}", flush=True)
    documents = subsample(load_stdlib().train, CALIBRATION_BYTES, 1000 + seed)
    packed = pack_texts((document.text for document in documents), text.tokenizer, length=bench.size.length)
    calibration = list(packed.input_ids[:64].split(BATCH))
    alone = calibrate_starts(teacher, calibration, range(n_layers), CalibrationConfig(sequential=False))
    rows = text.held_out.input_ids[:-1:2]
    tasks = retrieval_task(rows, len(rows), 4, seed=seed)
    keeps: dict[str, tuple[int, ...]] = {"last only": (n_layers - 1,)}
    for method in get_args(Method):
        found = choose_layers(teacher, KEEP, method, starts=alone, rows=rows, tasks=tasks, seed=seed)
        keeps[method] = found.keep
        print(f"  {method} keeps {found.keep}: {found.verdict}", flush=True)
    by_layers: dict[tuple[int, ...], dict[str, Any]] = {}  # methods may agree
    for method, keep in keeps.items():
        if keep not in by_layers:
            layers = tuple(number for number in range(n_layers) if number not in keep)
            starts = calibrate_starts(teacher, calibration, layers, progress=False)
            config = CrossArchTransferConfig(hybrid_attention=HybridAttentionConfig(layers=layers))
            found = {"keep": keep}
            for data in ("text", "text and facts"):
                student = create_hybrid_from_qwen3(teacher, config, starts=starts).eval()
                found.setdefault("before", judged(student, text, seed))
                batches = (
                    ShuffledBatches(text.train, BATCH, 3000 + seed) if data == "text" else mixed(text, 3000 + seed)
                )
                healed(teacher, student, batches, healing_steps, seed)
                found[f"after {data}"] = judged(student, text, seed)
            by_layers[keep] = found
        results[method] = by_layers[keep]
        print(f"  {method}: {results[method]}", flush=True)
    return results


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=800, help="of the teacher, if it is not there yet")
    parser.add_argument("--healing-steps", type=int, default=80)
    parser.add_argument("--folder", type=Path, default=Path("out/hybrid_retrieval"))
    parser.add_argument("--result", type=Path, default=RESULTS / "hybrid_retrieval-cpu.json")
    arguments = parser.parse_args(given)
    print(f"{machine()}, torch {torch.__version__}", flush=True)
    torch.set_num_threads(1)
    results = {}
    for seed in arguments.seeds:
        bench = Bench(arguments.folder / str(seed), seed, DemoSize())
        results[seed] = measure(bench, arguments.steps, arguments.healing_steps)
        fields = {"steps": arguments.steps, "healing_steps": arguments.healing_steps}
        arguments.result.write_text(json.dumps({**header("cpu", **fields), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
