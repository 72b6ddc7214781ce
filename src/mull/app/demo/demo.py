"""The demo: a small model on real text, made to think in loops, and a task that needs the loops; minutes on one CPU.

Everything runs through the same functions that a user calls: `wrap_transformer_with_etd`, `find_split`, `train`. The text is the
Python standard library's sources, the second task is generated.
"""

import copy
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config

from mull.app.demo.speculation import SpeculationSize, SpeculationStory, speculation_story, tell_speculation
from mull.app.demo.weights import ARMS, WeightsStory, tell_weights, weights_story
from mull.app.report.figures import (
    Series,
    accuracy_against_iterations,
    angular_distance_figure,
    loss_against_iterations,
    loss_curves,
)
from mull.app.report.page import Report
from mull.data.chain import ChainTask, accuracy_by_hops
from mull.data.corpus import Corpus, load_stdlib, subsample
from mull.data.packing import PackedDataset, pack_texts
from mull.data.sampler import ShuffledBatches
from mull.data.tokenizer import train_tokenizer
from mull.evaluation.held_out import held_out_loss
from mull.evaluation.search.split import SplitReport, find_split
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig
from mull.model.path import relative_cost
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.loop import Batches, Evaluation, TrainConfig, TrainResult, train
from mull.training.objectives.base import Batch, Objective
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.objectives.step_supervision import StepSupervision

PROMPTS = ("def __init__(self, ", "import os\n\n\ndef ", "class ")


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How large the demo is. The defaults fit ten minutes on two cores; tests shrink them."""

    corpus_bytes: int = 6_000_000
    vocab_size: int = 2048
    length: int = 256
    batch_size: int = 16
    width: int = 128
    layers: int = 8
    base_steps: int = 240
    continued_steps: int = 100
    max_iterations: int = 4
    held_out_rows: int = 96
    chain_steps: int = 600
    chain_prompts: int = 256
    new_tokens: int = 60
    weights_steps: int = 24
    speculation: SpeculationSize = field(default_factory=SpeculationSize)


@dataclass(frozen=True)
class TextStory:
    """What happened on text."""

    tokenizer: PreTrainedTokenizerBase
    held_out: PackedDataset
    split: SplitReport
    looped: MullForCausalLM
    base: PreTrainedModel
    """The base model before it was continued in any way."""

    packed: PackedDataset
    runs: dict[str, TrainResult]
    losses: dict[str, dict[int, float]]
    """Held-out loss by model and number of iterations."""


@dataclass(frozen=True)
class ChainStory:
    """What happened on the chain task."""

    model: MullForCausalLM
    run: TrainResult
    overall: dict[int, float]
    """Accuracy over questions of 1 to 7 hops, by number of iterations."""

    by_hops: dict[int, dict[int, float]]
    """Accuracy by number of hops and number of iterations."""

    single_pass: float
    """Accuracy of the control, over questions of 1 to 7 hops."""


def run_demo(out: Path, seed: int = 0, size: DemoSize | None = None) -> Path:
    """Run the whole demo and write its report.

    Args:
        out: Folder for ``report.html``, the metrics and the trained models.
        seed: Seed of weights, data order and sampled iterations.
        size: How large it is.

    Returns:
        Path of the report.
    """
    size = size or DemoSize()
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    text = text_story(out, seed, size)
    weights = _weights_story(text, out, seed, size)
    speculation = _speculation_story(text, out, seed, size)
    chain = chain_story(out, seed, size)
    report = Report(
        "mull demo: a pretrained model that thinks in loops",
        subtitle="A small Qwen3 on Python sources, and a task that needs depth. All of it was trained on this machine just now.",
        command="mull demo",
        seeds=(seed,),
        provenance={"wall time": f"{time.perf_counter() - started:.0f} s until the report was written"},
    )
    _tell_training(report, text)
    _tell_split(report, text)
    _tell_iterations(report, text)
    tell_weights(report, weights)
    tell_speculation(report, speculation, text.tokenizer)
    _tell_chain(report, chain, size)
    _tell_samples(report, text, size)
    _tell_reload(report, out / "model", text)
    return report.write(out / "report.html")


def text_story(out: Path, seed: int, size: DemoSize) -> TextStory:
    """Train on text, find the split, wrap, continue with loops and, for the same time, without."""
    corpus = load_stdlib()
    documents = subsample(corpus.train, size.corpus_bytes, seed)
    print(f"tokenizer: {size.vocab_size} byte-level BPE tokens on {len(documents)} files")
    tokenizer = train_tokenizer((document.text for document in documents), size.vocab_size)
    packed = pack_texts((document.text for document in documents), tokenizer, length=size.length)
    held_out = _held_out(corpus, tokenizer, size)
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(_architecture(tokenizer, size))
    batches = ShuffledBatches(packed, size.batch_size, seed)
    common: dict[str, Any] = {"optimizer": "muon", "muon_lr": 0.02, "peak_lr": 3e-3, "log_every": 1, "seed": seed}

    print(f"base model: {base.num_parameters():,} parameters, {size.base_steps} steps")
    plain = wrap_transformer_with_etd(base, None)
    config = TrainConfig(steps=size.base_steps, schedule="constant", warmup_steps=20, **common)
    once = NextToken(IterationSampling(kind="fixed", maximum=1))
    runs = {"base": _train(plain, once, batches, config, out / "base")}

    print("split: angular distance and loop probe")
    measured = list(held_out.in_order(size.batch_size))
    split = find_split(plain, measured.__getitem__, n_batches=len(measured), n_probe_batches=2)
    etd = split.etd.model_copy(update={"max_think_iterations": size.max_iterations})
    looped = wrap_transformer_with_etd(base, etd)
    snapshot = copy.deepcopy(base)
    control = wrap_transformer_with_etd(copy.deepcopy(base), None)
    iterations = range(1, size.max_iterations + 1)
    losses = {"base, loops untrained": {k: held_out_loss(looped, held_out, k) for k in iterations}}

    later = lambda index: batches(index + size.base_steps)  # noqa: E731 - data that the base model has not seen
    print(
        f"loops: {size.continued_steps} steps with 1 to {size.max_iterations} iterations; then the control for the same time"
    )
    sampled = NextToken(IterationSampling(kind="uniform", maximum=size.max_iterations))
    config = TrainConfig(steps=size.continued_steps, **common)
    runs["looped"] = _train(looped, sampled, later, config, out / "looped")
    config = TrainConfig(max_seconds=runs["looped"].seconds, **common)
    runs["control"] = _train(control, once, later, config, out / "control")
    losses["trained with loops"] = {k: held_out_loss(looped, held_out, k) for k in iterations}
    losses["control, no loops, equal time"] = {1: held_out_loss(control, held_out, None)}
    looped.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return TextStory(tokenizer, held_out, split, looped, snapshot, packed, runs, losses)


def _weights_story(text: TextStory, out: Path, seed: int, size: DemoSize) -> WeightsStory:
    print(f"weights: {size.weights_steps} steps under each of {len(ARMS)} weightings, on text with planted noise")
    rows = text.held_out.rows(torch.arange(min(size.held_out_rows // 3, len(text.held_out))))
    clean = PackedDataset(rows["input_ids"], rows["labels"], rows["position_ids"])
    return weights_story(
        text.base,
        text.packed,
        lambda model: held_out_loss(model, clean, None),
        _train,
        out / "weights",
        steps=size.weights_steps,
        batch_size=size.batch_size // 2,
        seed=seed,
    )


def _speculation_story(text: TextStory, out: Path, seed: int, size: DemoSize) -> SpeculationStory:
    drafting = size.speculation
    print(
        f"drafting: {drafting.own_rows} rows of the looped model's own text, {drafting.steps} steps for its heads; then timings"
    )
    story = speculation_story(
        out / "model", text.packed, text.held_out, _train, out / "drafting", size=drafting, seed=seed
    )
    text.tokenizer.save_pretrained(out / "drafting" / "model")
    return story


def _architecture(tokenizer: PreTrainedTokenizerBase, size: DemoSize) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.width * 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 32,
        num_key_value_heads=size.width // 64,
        head_dim=32,
        max_position_embeddings=4 * size.length,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def _held_out(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, size: DemoSize) -> PackedDataset:
    packed = pack_texts((document.text for document in corpus.held_out), tokenizer, length=size.length)
    rows = packed.rows(torch.arange(min(size.held_out_rows, len(packed))))
    return PackedDataset(rows["input_ids"], rows["labels"], rows["position_ids"], packed.bytes_per_token)


def _train(
    model: MullForCausalLM,
    objective: Objective,
    batches: Batches,
    config: TrainConfig,
    folder: Path,
    evaluate: Callable[[MullForCausalLM], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
) -> TrainResult:
    """Train from scratch in an emptied folder; a request to terminate ends the demo, not only this run."""
    if folder.is_dir():
        shutil.rmtree(folder)
    evaluation = None if evaluate is None else Evaluation(evaluate, eval_every)
    result = train(model, objective, batches, config, folder, evaluation=evaluation)
    if result.stopped == "sigterm":
        raise SystemExit(128 + signal.SIGTERM)
    model.eval()
    return result


def chain_story(out: Path, seed: int, size: DemoSize) -> ChainStory:
    """Train about 0.1 million parameters to follow chains, one edge per iteration, and count right answers.

    The control has the same parameters and steps, one pass, and is trained on the answers alone.
    """
    task = ChainTask()
    model, control = (_chain_model(task, seed) for _ in range(2))
    config = TrainConfig(
        steps=size.chain_steps,
        optimizer="muon",
        muon_lr=0.02,
        peak_lr=2e-3,
        weight_decay=0.0,
        schedule="wsd",
        decay_share=0.5,
        log_every=1,
        precision="fp32",  # matrices of width 64: bf16 is 1.6 times slower
        seed=seed,
    )
    print(f"chain task: {model.num_parameters():,} parameters, {size.chain_steps} steps; then the control in one pass")
    batches = task.batches(32, seed)
    sampled = StepSupervision(IterationSampling(kind="uniform", minimum=2, maximum=task.max_train_hops))
    run = _train(model, sampled, batches, config, out / "chain")

    def answers(index: int) -> Batch:
        batch = batches(index)
        return {**batch, "step_labels": batch["step_labels"][..., -1:]}

    once = StepSupervision(IterationSampling(kind="fixed", maximum=1))
    _train(control, once, answers, config, out / "chain-control")
    model.save_pretrained(out / "chain-model")
    overall, by_hops = chain_accuracy(model, task, size.chain_prompts, seed)
    single_pass, _ = chain_accuracy(control, task, size.chain_prompts, seed)
    return ChainStory(model, run, overall, by_hops, single_pass[1])


def _chain_model(task: ChainTask, seed: int) -> MullForCausalLM:
    config = Qwen3Config(
        vocab_size=task.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=task.length,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    etd = ETDConfig(n_encoder_layers=1, n_think_layers=1, n_decoder_layers=0, max_think_iterations=task.max_train_hops)
    return wrap_transformer_with_etd(AutoModelForCausalLM.from_config(config), etd)


@torch.no_grad()
def chain_accuracy(
    model: MullForCausalLM, task: ChainTask, n_prompts: int, seed: int
) -> tuple[dict[int, float], dict[int, dict[int, float]]]:
    """Share of right answers after 1 to 9 iterations, on fresh prompts with every number of hops.

    Returns:
        Over all questions of at least one hop by number of iterations; and by number of hops and of iterations.
    """
    batch = task.batches(n_prompts, seed, train=False)(0)
    states = model.early_decoded(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        think_iterations=9,
        every_iteration=True,
    )
    overall: dict[int, float] = {}
    by_hops: dict[int, dict[int, float]] = {hops: {} for hops in range(1, task.max_hops + 1)}
    for iterations, state in enumerate(states, start=1):
        counts = accuracy_by_hops(model.lm_head(state).argmax(-1), batch)
        for hops, results in by_hops.items():
            results[iterations] = counts[hops][0] / counts[hops][1]
        asked = [counts[hops] for hops in by_hops]
        overall[iterations] = sum(right for right, _ in asked) / sum(total for _, total in asked)
    return overall, by_hops


def _tell_training(report: Report, text: TextStory) -> None:
    section = report.section("What was trained")
    section.prose(
        "A Qwen3 with random weights learnt Python sources. Then it was wrapped, and two continuations started from the same "
        "weights on the same data: one with a random number of think iterations per step, one without loops for the same number "
        "of seconds. Training sees the running interpreter's standard library; the held-out files are never trained on."
    )
    rows: list[list[Any]] = [
        [name, text.looped.num_parameters(), run.step, run.tokens, run.seconds, run.precision]
        for name, run in text.runs.items()
    ]
    section.table(["run", "parameters", "steps", "tokens", "seconds", "precision"], rows)
    curves = [
        Series(label=name, x=[record["tokens"] for record in run.history], y=[record["loss"] for record in run.history])
        for name, run in text.runs.items()
    ]
    section.figure(loss_curves(curves), "Training loss. The looped run's loss is that of the iterations it drew.")


def _tell_split(report: Report, text: TextStory) -> None:
    etd = text.split.etd
    section = report.section("Where to loop")
    section.prose(
        f"`mull split` proposes {etd.n_encoder_layers}-{etd.n_think_layers}*k-{etd.n_decoder_layers} ({text.split.method}). "
        + " ".join(text.split.notes)
    )
    section.figure(
        angular_distance_figure(text.split),
        "Above: angle between the stream before and behind each layer. Below: what looping a window once more costs the model "
        "that was never trained to loop.",
    )


def _tell_iterations(report: Report, text: TextStory) -> None:
    section = report.section("Loss against iterations")
    section.prose(
        "One iteration of the wrapped model is the base model: `wrap_transformer_with_etd` compared their logits bit for bit "
        "before it returned, and would have refused otherwise. The honest control is the dashed line: the same seconds of "
        "training, spent without loops."
    )
    models = [
        Series(label=name, x=list(losses), y=list(losses.values()))
        for name, losses in text.losses.items()
        if not name.startswith("control")
    ]
    controls = {name: losses[1] for name, losses in text.losses.items() if name.startswith("control")}
    section.figure(loss_against_iterations(models, controls), "Held-out loss in nats per token.")
    counts = sorted({k for losses in text.losses.values() for k in losses})
    layers = len(text.looped.model.layers)
    section.table(
        ["model", *(f"k={k}" for k in counts)],
        [[name, *(losses.get(k) for k in counts)] for name, losses in text.losses.items()]
        + [["layers run per token, relative to k=1", *(relative_cost(text.looped.path(k), layers) for k in counts)]],
        caption="Held-out loss in nats per token, and what an iteration costs.",
    )
    section.prose(_verdict(text))


def _verdict(text: TextStory) -> str:
    """What the numbers say, whichever way they fall."""
    looped = text.losses["trained with loops"]
    control = text.losses["control, no loops, equal time"][1]
    best = min(looped, key=lambda k: looped[k])
    gain = looped[1] - looped[best]
    against = control - looped[best]
    inside = (
        f"Inside the looped model the best number of iterations is {best}, {gain:.3f} nats better than one."
        if gain > 0
        else "Inside the looped model more iterations do not help."
    )
    outside = "better" if against > 0 else "worse"
    return f"{inside} At its best it is {abs(against):.3f} nats {outside} than the control of equal training time."


def _tell_chain(report: Report, chain: ChainStory, size: DemoSize) -> None:
    task = ChainTask()
    section = report.section("A task that needs depth: chain to root")
    section.prose(
        f"A prompt lists 16 shuffled edges of two chains; each node is asked for the root of its chain, up to {task.max_hops} "
        f"hops away. {chain.model.num_parameters():,} parameters, one encoder layer and one think layer, trained on questions "
        f"of at most {task.max_train_hops} hops with a loss on every iteration. Questions of more hops were never supervised. "
        "Below the iterations that a question needs, the model names a node on the way, so accuracy is 0 and not the 50 % of "
        f"guessing between the two roots. The control, the same parameters trained in a single pass on the answers alone, is "
        f"right in {100 * chain.single_pass:.1f} %."
    )
    held_out = [hops for hops in chain.by_hops if hops > task.max_train_hops]
    section.figure(
        accuracy_against_iterations(
            [Series(label="questions of 1 to 7 hops", x=list(chain.overall), y=list(chain.overall.values()))],
            chain.by_hops,
            held_out_hops=held_out,
            trained_iterations=task.max_train_hops,
        ),
        f"Share of right answers on {size.chain_prompts} fresh prompts.",
    )
    by_hops = {"1 to 7": chain.overall, **{str(hops): row for hops, row in chain.by_hops.items()}}
    section.table(
        ["hops", *(f"k={k}" for k in chain.overall)],
        [[hops, *(100 * share for share in row.values())] for hops, row in by_hops.items()],
        caption="Right answers in per cent.",
    )


def _tell_samples(report: Report, text: TextStory, size: DemoSize) -> None:
    section = report.section("Samples")
    section.prose(
        "Greedy continuations through `generate` of transformers, with the cache: one slot per visit of a layer. The table says "
        "whether decoding without a cache gives the same tokens."
    )
    rows: list[list[Any]] = []
    looped: Any = text.looped
    for prompt in PROMPTS:
        tokens = text.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        for k in (1, size.max_iterations):
            options = {"max_new_tokens": size.new_tokens, "do_sample": False, "think_iterations": k}
            cached = looped.generate(**tokens, **options)
            same = torch.equal(cached, looped.generate(**tokens, use_cache=False, **options))
            rows.append([repr(prompt), k, "yes" if same else "no"])
            section.sample(
                f"{prompt!r}, {k} {'iteration' if k == 1 else 'iterations'}", str(text.tokenizer.decode(cached[0]))
            )
    section.table(["prompt", "iterations", "same tokens without cache"], rows)


@torch.no_grad()
def _tell_reload(report: Report, folder: Path, text: TextStory) -> None:
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    tokens = text.held_out.input_ids[:2]
    equal = torch.equal(reloaded(tokens).logits, text.looped(tokens).logits)
    report.section("Saved and loaded").prose(
        f"`AutoModelForCausalLM.from_pretrained` on the saved folder gives {'the same' if equal else 'OTHER'} logits"
        f"{', bit for bit' if equal else ''}. The weights have the names of the base checkpoint."
    )
