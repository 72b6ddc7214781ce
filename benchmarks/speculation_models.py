"""Models for `speculation.py`: trained once, kept in a folder, and written a second time as transformers itself reads them.

The text is the standard library's sources. Trunk and heads are trained together by mull's trainer, with Muon and AdamW.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mull import MTPConfig, MullForCausalLM, from_pretrained, wrap_transformer_with_etd
from mull.data.corpus import Corpus, load_stdlib, subsample
from mull.data.packing import pack_texts
from mull.data.sampler import ShuffledBatches
from mull.data.tokenizer import train_tokenizer
from mull.evaluation.held_out import held_out_losses
from mull.evaluation.stock import load_stock, write_stock
from mull.training.loop import TrainConfig, train
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

N_HEADS = 3
LENGTH = 256
BYTES, BPE = 257, 4096
RECORD = "training.json"
"""Written last into a model's folder: what is there without it is not complete."""

PROMPT_LENGTHS = (128, 96, 64)
"""In turns. Few, and the longest first: what is compiled for it serves the others, or else dynamo's limit of eight is near."""


@dataclass(frozen=True)
class Spec:
    """A model, and how long it is trained."""

    size: str
    family: str
    vocab_size: int
    width: int
    layers: int
    seconds: float
    batch_size: int = 8
    corpus_bytes: int = 6_000_000

    def config(self) -> PreTrainedConfig:
        """Shapes of Qwen3, or of Qwen3.5 with three recurrent layers before each attention layer.

        There is no end-of-text token: every run writes equally many tokens.
        """
        head_dim = 64 if self.width >= 512 else min(32, self.width // 4)
        n_heads = self.width // head_dim
        shapes: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.width * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": n_heads,
            "num_key_value_heads": n_heads // (3 if n_heads % 2 else 2),
            "head_dim": head_dim,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if self.family == "qwen3_5_text":
            shapes |= {"linear_num_key_heads": n_heads // 2, "linear_num_value_heads": n_heads}
            shapes |= {"linear_key_head_dim": head_dim, "linear_value_head_dim": head_dim}
        return CONFIG_MAPPING[self.family](**shapes)


SPECS = {
    "byte-5m": Spec("5m", "qwen3", BYTES, 192, 12, seconds=150),
    "bpe-5m": Spec("5m", "qwen3", BPE, 192, 12, seconds=150),
    "hybrid-5m": Spec("5m", "qwen3_5_text", BYTES, 192, 12, seconds=120),
    "byte-20m": Spec("20m", "qwen3", BYTES, 320, 16, seconds=240),
    "bpe-20m": Spec("20m", "qwen3", BPE, 320, 16, seconds=240),
    "byte-100m": Spec("100m", "qwen3", BYTES, 576, 28, seconds=300, batch_size=64, corpus_bytes=20_000_000),
    "bpe-100m": Spec("100m", "qwen3", BPE, 576, 28, seconds=300, batch_size=64, corpus_bytes=20_000_000),
    "byte-toy": Spec("toy", "qwen3", BYTES, 32, 2, seconds=1.5, corpus_bytes=200_000),
    "hybrid-toy": Spec("toy", "qwen3_5_text", BYTES, 32, 4, seconds=1.5, corpus_bytes=200_000),
}
"""Deep and narrow, as far as a CPU allows: each head is a decoder layer, so with a shallow trunk drafts would be more
expensive than
in real models (28 layers in Qwen3-0.6B)."""


def training_of(spec: Spec, seed: int) -> TrainConfig:
    return TrainConfig(
        max_seconds=spec.seconds,
        optimizer="muon",
        muon_lr=0.02,
        peak_lr=3e-3,
        warmup_steps=20,
        seed=seed,
    )


def trained(name: str, out: Path, *, seed: int, scale: float, device: str) -> tuple[Path, dict[str, Any]]:
    """Train a model, or find it where an earlier call of the same settings left it.

    Args:
        name: Row of `SPECS`.
        out: Folder of all models.
        seed: Of weights and data order.
        scale: Factor of the training time.
        device: Where to train.

    Returns:
        The model's folder, with the model in ``mull`` and in ``stock``; and its record.
    """
    spec = SPECS[name]
    spec = Spec(**{**asdict(spec), "seconds": spec.seconds * scale})
    settings = {**asdict(spec), "seed": seed, "device": device, "threads": torch.get_num_threads()}
    folder = out / name
    record = folder / RECORD
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text())
        if found["settings"] == settings:
            print(f"{name}: found in {folder}, trained for {found['steps']} steps", flush=True)
            return folder, found
        print(f"{name}: {folder} was trained with other settings", flush=True)
        record.unlink()
    result = {"settings": settings, **_train(name, spec, folder, seed, device)}
    record.write_text(json.dumps(result, indent=1) + "\n")
    return folder, result


def _train(name: str, spec: Spec, folder: Path, seed: int, device: str) -> dict[str, Any]:
    corpus = load_stdlib()
    documents = subsample(corpus.train, spec.corpus_bytes, seed)
    tokenizer = train_tokenizer((document.text for document in documents), spec.vocab_size)
    packed = pack_texts((document.text for document in documents), tokenizer, length=LENGTH, vocab_size=spec.vocab_size)
    held_out = pack_texts((document.text for document in corpus.held_out), tokenizer, length=LENGTH)
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(spec.config())
    mtp = MTPConfig(num_predict_tokens=N_HEADS, mtp_head_type="sequential")
    model = wrap_transformer_with_etd(base, None, mtp).to(device)
    n_trunk, n_all = base.num_parameters(), model.num_parameters()
    print(f"{name}: {n_trunk:,} parameters and {n_all - n_trunk:,} in {N_HEADS} heads, {spec.seconds:g} s", flush=True)
    objective = make_objective("baseline-mtp", Resources(model=model))
    started = time.perf_counter()
    batches = ShuffledBatches(packed, spec.batch_size, seed)
    run = train(model, objective, batches, training_of(spec, seed))
    model.eval()
    losses = held_out_losses(model, held_out, None, batch_size=8, max_rows=64)
    print(f"{name}: held-out nats per token " + ", ".join(f"{key} {value:.3f}" for key, value in losses.items()))
    model.save_pretrained(folder / "mull")
    write_stock(model, folder / "stock")
    tokenizer.save_pretrained(folder / "stock")
    return {
        "parameters": n_trunk,
        "parameters_of_heads": n_all - n_trunk,
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": round(time.perf_counter() - started, 1),
        "precision": run.precision,
        "held_out": losses,
    }


@dataclass(frozen=True)
class Subject:
    """One trained model in one precision, as mull and as transformers hold it."""

    name: str
    precision: str
    mull: MullForCausalLM
    useless: MullForCausalLM
    """The same trunk with random heads."""

    stock: PreTrainedModel
    folder: Path

    @property
    def use_mtp(self) -> bool:
        """Whether transformers can draft with the heads."""
        return hasattr(self.stock.config, "num_mtp_layers")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_subject(name: str, folder: Path, precision: str, device: str) -> Subject:
    dtype = DTYPES[precision]
    model, useless = (from_pretrained(str(folder / "mull"), dtype=dtype).to(device) for _ in range(2))
    useless.model, useless.lm_head = model.model, model.lm_head
    randomise(useless.mtp_heads)
    return Subject(name, precision, model, useless, load_stock(folder / "stock", dtype, device), folder)


@torch.no_grad()
def randomise(heads: nn.Module | None) -> None:
    """Draw all matrices anew."""
    assert heads is not None
    generator = torch.Generator().manual_seed(0)
    for parameter in heads.parameters():
        if parameter.ndim > 1:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def draw_prompts(folder: Path, n_prompts: int, seed: int, corpus: Corpus | None = None) -> list[Tensor]:
    """Pieces of held-out files, each from the start of a line on.

    Args:
        folder: Of a trained model.
        n_prompts: How many; no two from the same file while there are enough.
        seed: Chooses files and lines.
        corpus: The text; None for the standard library.

    Returns:
        Token ids ``[T]``, with T in turns of `PROMPT_LENGTHS`.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "stock")
    rng = np.random.default_rng((seed, 77))
    held_out = (corpus or load_stdlib()).held_out
    order = rng.permutation(len(held_out)).tolist()
    prompts: list[Tensor] = []
    while len(prompts) < n_prompts:
        text = held_out[order[0]].text
        order = [*order[1:], order[0]]
        lines = text.splitlines(keepends=True)
        start = int(rng.integers(len(lines)))
        length = PROMPT_LENGTHS[len(prompts) % len(PROMPT_LENGTHS)]
        ids = tokenizer("".join(lines[start:])[: 16 * length])["input_ids"]
        if len(ids) >= length:
            prompts.append(torch.tensor(ids[:length]))
    return prompts
