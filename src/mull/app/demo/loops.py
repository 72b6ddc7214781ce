"""The demo's chapter on recursive depth: a small model learns real text, gets a think block, and learns to use it.

The text is the sources of the Python standard library. The control continues the same base model for the same number of seconds
without loops.
"""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config

from mull.app.demo.chapter import Bench, DemoSize, table_by_iterations
from mull.app.report.figures import angular_distance_figure, loss_against_iterations, loss_curves
from mull.app.report.page import Rows, Table
from mull.data.corpus import load_stdlib, subsample
from mull.data.packing import PackedDataset, pack_texts
from mull.data.sampler import ShuffledBatches
from mull.data.tokenizer import train_tokenizer
from mull.evaluation.held_out import held_out_loss
from mull.evaluation.search.split import SplitReport, find_split
from mull.model.causal_lm import MullForCausalLM
from mull.model.path import relative_cost
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.loop import TrainResult
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken

LOOPED = "trained with loops"
CONTROL = "control, no loops, equal time"
PROMPTS = ("def __init__(self, ", "import os\n\n\ndef ", "class ")


@dataclass(frozen=True)
class Text:
    """The standard library's sources, tokenized and packed."""

    tokenizer: PreTrainedTokenizerBase
    train: PackedDataset
    held_out: PackedDataset

    @classmethod
    def load(cls, bench: Bench) -> Self:
        """Train a tokenizer on the training files, and pack both parts."""
        size, corpus = bench.size, load_stdlib()
        texts = [document.text for document in subsample(corpus.train, size.corpus_bytes, bench.seed)]
        print(f"tokenizer: {size.vocab_size} byte-level BPE tokens on {len(texts)} files")
        tokenizer = train_tokenizer(texts, size.vocab_size)
        packed = pack_texts(texts, tokenizer, length=size.length)
        held_out = pack_texts((document.text for document in corpus.held_out), tokenizer, length=size.length)
        rows = held_out.rows(torch.arange(min(size.held_out_rows, len(held_out))))
        return cls(tokenizer, packed, PackedDataset(rows["input_ids"], rows["labels"], rows["position_ids"]))


@dataclass(frozen=True)
class Loops:
    """The base model, its split, and its two continuations."""

    text: Text
    base: PreTrainedModel
    """The base model before both continuations."""

    looped: MullForCausalLM
    split: SplitReport
    runs: dict[str, TrainResult]
    losses: dict[str, dict[int, float]]
    """Held-out loss by model and number of iterations."""

    @classmethod
    def train(cls, bench: Bench) -> Self:
        """Train on text, find the split, wrap, and continue with loops and, for the same time, without."""
        size, text = bench.size, Text.load(bench)
        torch.manual_seed(bench.seed)
        base = AutoModelForCausalLM.from_config(_architecture(text.tokenizer, size))
        batches = ShuffledBatches(text.train, size.batch_size, bench.seed)
        once = NextToken(IterationSampling(kind="fixed", maximum=1))
        sampled = NextToken(IterationSampling(kind="uniform", maximum=size.max_iterations))

        print(f"base model: {base.num_parameters():,} parameters, {size.base_steps} steps")
        plain = wrap_transformer_with_etd(base, None)
        schedule: dict[str, Any] = {"steps": size.base_steps, "schedule": "constant", "warmup_steps": 20}
        runs = {"base": bench.train("base", plain, once, batches, **schedule)}

        print("split: angular distance and loop probe")
        measured = list(text.held_out.in_order(size.batch_size))
        split = find_split(plain, measured.__getitem__, n_batches=len(measured), n_probe_batches=2)
        etd = split.etd.model_copy(update={"max_think_iterations": size.max_iterations})
        looped, snapshot = wrap_transformer_with_etd(base, etd), copy.deepcopy(base)
        control = wrap_transformer_with_etd(copy.deepcopy(base), None)
        losses = {"base, loops untrained": _losses(looped, text, size)}

        print(f"loops: {size.continued_steps} steps of 1 to {size.max_iterations} iterations, then the control")
        unseen = lambda index: batches(index + size.base_steps)  # noqa: E731 - data that the base model has not seen
        runs["looped"] = bench.train("looped", looped, sampled, unseen, steps=size.continued_steps)
        runs["control"] = bench.train("control", control, once, unseen, max_seconds=runs["looped"].seconds)
        losses[LOOPED] = _losses(looped, text, size)
        losses[CONTROL] = {1: held_out_loss(control, text.held_out, None)}
        looped.save_pretrained(bench.out / "model")
        text.tokenizer.save_pretrained(bench.out / "model")
        return cls(text, snapshot, looped, split, runs, losses)

    def tell(self) -> dict[str, Any]:
        """Training, split, and loss against iterations."""
        looped, control = self.losses[LOOPED], self.losses[CONTROL][1]
        curves = {name: {r["tokens"]: r["loss"] for r in run.history} for name, run in self.runs.items()}
        models = {name: losses for name, losses in self.losses.items() if name != CONTROL}
        costs = {k: relative_cost(self.looped.path(k), len(self.looped.model.layers)) for k in looped}
        parameters = self.looped.num_parameters()
        runs: Rows = [[name, parameters, r.step, r.tokens, r.seconds, r.precision] for name, r in self.runs.items()]
        return {
            "runs": Table(["run", "parameters", "steps", "tokens", "seconds", "precision"], runs),
            "training": loss_curves(curves),
            "distances": angular_distance_figure(self.split),
            "iterations": loss_against_iterations(models, {CONTROL: control}),
            "losses": table_by_iterations("model", {**self.losses, "layers run per token, relative to k=1": costs}),
            "looped": looped,
            "control": control,
            "best": min(looped, key=lambda k: looped[k]),
        }


@dataclass(frozen=True)
class Samples:
    """What the looped model writes, and whether a saved model is the same."""

    texts: list[str]
    rows: list[list[Any]]
    """Of each text: prompt, number of iterations, and whether decoding without a cache gives the same tokens."""

    reloads: bool
    """The saved model gives the same logits, bit for bit."""

    @classmethod
    @torch.no_grad()
    def train(cls, bench: Bench, loops: Loops) -> Self:
        """Continue some prompts greedily, and load the saved model."""
        texts, rows, tokenizer = [], [], loops.text.tokenizer
        looped: Any = loops.looped
        for prompt in PROMPTS:
            tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            for k in (1, bench.size.max_iterations):
                options = {"max_new_tokens": bench.size.new_tokens, "do_sample": False, "think_iterations": k}
                cached = looped.generate(**tokens, **options)
                same = torch.equal(cached, looped.generate(**tokens, use_cache=False, **options))
                rows.append([repr(prompt), k, "yes" if same else "no"])
                texts.append(str(tokenizer.decode(cached[0])))
        ids = loops.text.held_out.input_ids[:2]
        reloaded = AutoModelForCausalLM.from_pretrained(bench.out / "model", trust_remote_code=False)
        return cls(texts, rows, torch.equal(reloaded(ids).logits, looped(ids).logits))

    def tell(self) -> dict[str, Any]:
        """The texts, and the comparison of their tokens."""
        texts = {f"text{index}": text for index, text in enumerate(self.texts)}
        return {**texts, "same": Table(["prompt", "iterations", "same tokens without cache"], self.rows)}


def _losses(model: MullForCausalLM, text: Text, size: DemoSize) -> dict[int, float]:
    """Held-out loss by number of iterations."""
    return {k: held_out_loss(model, text.held_out, k) for k in range(1, size.max_iterations + 1)}


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
    )
