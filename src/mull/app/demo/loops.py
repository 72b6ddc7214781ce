"""The demo's chapter on recursive depth: a small model learns real text, gets a think block, and learns to use it.

The text is the sources of the Python standard library. The control continues the same base model for the same number of seconds
without loops.
"""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config

from mull.app.demo.chapter import Bench, DemoSize
from mull.app.report.figures import angular_distance_figure, loss_against_iterations, loss_curves
from mull.app.report.page import Report
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
        rates: dict[str, Any] = {"muon_lr": 0.02, "peak_lr": 3e-3}
        once = NextToken(IterationSampling(kind="fixed", maximum=1))
        sampled = NextToken(IterationSampling(kind="uniform", maximum=size.max_iterations))

        print(f"base model: {base.num_parameters():,} parameters, {size.base_steps} steps")
        plain = wrap_transformer_with_etd(base, None)
        base_run = bench.train(
            "base", plain, once, batches, steps=size.base_steps, schedule="constant", warmup_steps=20, **rates
        )
        runs = {"base": base_run}

        print("split: angular distance and loop probe")
        measured = list(text.held_out.in_order(size.batch_size))
        split = find_split(plain, measured.__getitem__, n_batches=len(measured), n_probe_batches=2)
        etd = split.etd.model_copy(update={"max_think_iterations": size.max_iterations})
        looped, snapshot = wrap_transformer_with_etd(base, etd), copy.deepcopy(base)
        control = wrap_transformer_with_etd(copy.deepcopy(base), None)
        losses = {"base, loops untrained": _losses(looped, text, size)}

        print(
            f"loops: {size.continued_steps} steps of 1 to {size.max_iterations} iterations, and the control for the same time"
        )
        unseen = lambda index: batches(index + size.base_steps)  # noqa: E731 - data that the base model has not seen
        runs["looped"] = bench.train("looped", looped, sampled, unseen, steps=size.continued_steps, **rates)
        seconds = runs["looped"].seconds
        runs["control"] = bench.train("control", control, once, unseen, max_seconds=seconds, **rates)
        losses[LOOPED] = _losses(looped, text, size)
        losses[CONTROL] = {1: held_out_loss(control, text.held_out, None)}
        looped.save_pretrained(bench.out / "model")
        text.tokenizer.save_pretrained(bench.out / "model")
        return cls(text, snapshot, looped, split, runs, losses)

    def tell(self, report: Report) -> None:
        """Training, split, and loss against iterations."""
        self._tell_training(report)
        self._tell_split(report)
        section = report.section("Loss against iterations")
        section.prose("""
            With one iteration, the wrapped model is the base model: `wrap_transformer_with_etd` compares their logits bit for bit
            and refuses to return a model that differs. The fair control is the dashed line: the same seconds of training, spent
            without loops.
        """)
        models = {name: losses for name, losses in self.losses.items() if name != CONTROL}
        section.figure(
            loss_against_iterations(models, {CONTROL: self.losses[CONTROL][1]}), "Held-out loss in nats per token."
        )
        counts = list(self.losses[LOOPED])
        costs = [relative_cost(self.looped.path(k), len(self.looped.model.layers)) for k in counts]
        section.table(
            ["model", *(f"k={k}" for k in counts)],
            [
                *([name, *(losses.get(k) for k in counts)] for name, losses in self.losses.items()),
                ["layers run per token, relative to k=1", *costs],
            ],
            caption="Held-out loss in nats per token, and the cost of k iterations.",
        )

    def _tell_training(self, report: Report) -> None:
        section = report.section("What was trained")
        section.prose("""
            A Qwen3 with random weights learned Python sources. It was then wrapped, and two continuations started from the same
            weights on the same data: one with a random number of think iterations per step, and one without loops for the same
            number of seconds. The training text is the running interpreter's standard library; held-out files are never
            trained on.
        """)
        parameters = self.looped.num_parameters()
        section.table(
            ["run", "parameters", "steps", "tokens", "seconds", "precision"],
            [[name, parameters, r.step, r.tokens, r.seconds, r.precision] for name, r in self.runs.items()],
        )
        curves = {name: {r["tokens"]: r["loss"] for r in run.history} for name, run in self.runs.items()}
        section.figure(loss_curves(curves), "Training loss. The looped run's is measured at the iterations it drew.")

    def _tell_split(self, report: Report) -> None:
        etd, section = self.split.etd, report.section("Where to loop")
        proposal = f"{etd.n_encoder_layers}-{etd.n_think_layers}*k-{etd.n_decoder_layers}"
        section.prose(f"`mull split` proposes {proposal} ({self.split.method}). {' '.join(self.split.notes)}")
        section.figure(
            angular_distance_figure(self.split),
            "Top: angle between the residual stream before and after each layer. Bottom: how much loss it costs to run a window "
            "twice in a model that was never trained to loop.",
        )

    def verdict(self) -> list[str]:
        """Compare with one iteration, and with the control."""
        looped = self.losses[LOOPED]
        best = min(looped, key=lambda k: looped[k])
        gain, against = looped[1] - looped[best], self.losses[CONTROL][1] - looped[best]
        inside = (
            f"In the looped model {best} iterations are best, {gain:.3f} nats better than one."
            if gain > 0
            else "In the looped model more iterations do not help."
        )
        outside = "better" if against > 0 else "worse"
        return [inside, f"At its best it is {abs(against):.3f} nats {outside} than the control of equal training time."]


@dataclass(frozen=True)
class Samples:
    """What the looped model writes, and whether a saved model is the same."""

    texts: dict[str, str]
    rows: list[list[Any]]
    """Prompt, number of iterations, and whether decoding without a cache gives the same tokens."""

    reloads: bool
    """The saved model gives the same logits, bit for bit."""

    @classmethod
    @torch.no_grad()
    def train(cls, bench: Bench, loops: Loops) -> Self:
        """Continue some prompts greedily, and load the saved model."""
        texts, rows, tokenizer = {}, [], loops.text.tokenizer
        looped: Any = loops.looped
        for prompt in PROMPTS:
            tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            for k in (1, bench.size.max_iterations):
                options = {"max_new_tokens": bench.size.new_tokens, "do_sample": False, "think_iterations": k}
                cached = looped.generate(**tokens, **options)
                same = torch.equal(cached, looped.generate(**tokens, use_cache=False, **options))
                rows.append([repr(prompt), k, "yes" if same else "no"])
                name = f"{prompt!r}, {k} {'iteration' if k == 1 else 'iterations'}"
                texts[name] = str(tokenizer.decode(cached[0]))
        ids = loops.text.held_out.input_ids[:2]
        reloaded = AutoModelForCausalLM.from_pretrained(bench.out / "model")
        return cls(texts, rows, torch.equal(reloaded(ids).logits, looped(ids).logits))

    def tell(self, report: Report) -> None:
        """Show the texts."""
        section = report.section("Samples")
        section.prose("""
            Greedy continuations by `generate` of transformers. The cache has one slot per visit of a layer; the table compares
            the tokens with those of decoding without a cache.
        """)
        for name, text in self.texts.items():
            section.sample(name, text)
        section.table(["prompt", "iterations", "same tokens without cache"], self.rows)
        report.section("Saved and loaded")

    def verdict(self) -> list[str]:
        """Compare logits."""
        same = "the same logits, bit for bit" if self.reloads else "OTHER logits"
        return [
            f"`AutoModelForCausalLM.from_pretrained` on the saved folder gives {same}.",
            "The weights have the names of the base checkpoint.",
        ]


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
        bos_token_id=None,
    )
