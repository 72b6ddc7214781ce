"""What token skipping costs and saves: Mixture-of-Depths, GateSkip and A-MoD at half of the tokens in every other layer.

Two parts. *Time*: a model of 11 million parameters, in which half of the tokens skip each second layer, in turns with the plain
model: training (forward and backward), prefill, and decoding of one row and of eight. A-MoD reads attention weights, so the plain
model is measured with eager attention, too. *Loss*: the demo's model of Python sources, trained plainly, and continued for as
many steps by each method and without one. Held-out loss is measured with the rule of use and with ranks, which look at later
tokens; and how often the two agree.

    OMP_NUM_THREADS=1 python benchmarks/token_skip.py [--part time loss]
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from race import header, machine, spread
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

import mull
from mull import ETDConfig, MullForCausalLM, TokenSkipConfig, wrap_transformer_with_etd
from mull.app.demo.chapter import Bench, DemoSize
from mull.app.demo.loops import Text
from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches
from mull.ops.targets import label_positions, targets_of
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken

RESULTS = Path(__file__).parent / "results"
SKIPS: dict[str, TokenSkipConfig] = {
    "mod": TokenSkipConfig(method="mod", scope="all"),
    "gate-skip": TokenSkipConfig(method="gate-skip", scope="all"),
    "a-mod": TokenSkipConfig(method="a-mod", scope="all"),
    "a-mod, received": TokenSkipConfig(method="a-mod", score="received", scope="all"),
}
PREDICTOR_STEPS = 30


def wrapped(base: Any, skip: TokenSkipConfig | None, warmup: int) -> MullForCausalLM:
    """A copy of the base model, with token skipping; eager where A-MoD reads the weights."""
    own, n_layers = copy.deepcopy(base), base.config.num_hidden_layers
    if skip is not None and skip.method == "a-mod":
        own.set_attn_implementation("eager")
    split = ETDConfig(
        n_encoder_layers=0,
        n_think_layers=n_layers,
        n_decoder_layers=0,
        max_think_iterations=1,
        token_skip=skip,
        token_skip_warmup_steps=warmup,
    )
    return wrap_transformer_with_etd(own, split)


def parts_of(model: MullForCausalLM) -> Any:
    return None if model.etd is None else model.etd.token_skip


def base_of_time() -> Any:
    """Ten layers, 11 million parameters."""
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def settle(model: MullForCausalLM, ids: Tensor) -> None:
    """Let what decides in use come to let half of these tokens run."""
    parts = parts_of(model)
    for name, parameter in parts.named_parameters():
        if name.startswith("gates"):
            torch.nn.init.normal_(parameter, std=0.02)  # new ones are all equal, and let all tokens run
    model.train().requires_grad_(False)
    parts.requires_grad_(True)
    optimizer = torch.optim.Adam([*parts.parameters(), *model.model.norm.parameters()], lr=3e-3)
    for _ in range(PREDICTOR_STEPS if parts.settings.method == "mod" else 1):
        with model.auxiliary_losses() as terms:
            model.model(ids, use_cache=False)
        if parts.settings.method == "mod":
            optimizer.zero_grad()
            torch.stack(terms).mean().backward()
            optimizer.step()
        else:
            parts.end_step()  # thresholds follow the scores, and gates stay
    model.requires_grad_(True)


def forward(ids: Tensor, train: bool) -> Callable[[MullForCausalLM], float]:
    def run(model: MullForCausalLM) -> float:
        model.train(train)
        started = time.perf_counter()
        with torch.set_grad_enabled(train):
            out = model(ids, labels=ids if train else None, logits_to_keep=0 if train else 1, use_cache=not train)
        if train:
            assert out.loss is not None
            out.loss.backward()
            model.zero_grad()
        return time.perf_counter() - started

    return run


def decoding(ids: Tensor, tokens: int) -> Callable[[MullForCausalLM], float]:
    def run(model: MullForCausalLM) -> float:
        stats = mull.generate(model.eval(), ids, max_new_tokens=tokens, pad_token_id=0, eos_token_id=()).stats
        return stats.decode_seconds / stats.rounds

    return run


def time_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time of each way of running, relative to the plain model, round by round."""
    base = base_of_time()
    eager = copy.deepcopy(base)
    eager.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 4096, (8, 1024), generator=generator)
    models = {"plain": wrapped(base, None, 0), "plain, eager": wrapped(eager, None, 0)}
    for name in ("mod", "gate-skip", "a-mod"):
        models[name] = wrapped(base, SKIPS[name], 0)
        settle(models[name], ids[6:])
    ways = {
        "training, 4 x 256": forward(ids[:4, :256], train=True),
        "prefill, 1 x 1024": forward(ids[:1], train=False),
        "decoding, 1 row": decoding(ids[:1, :128], arguments.tokens),
        "decoding, 8 rows": decoding(ids[:, :128], arguments.tokens),
    }
    results: dict[str, Any] = {"parameters": base.num_parameters()}
    names = list(models)
    for label, way in ways.items():
        seconds: dict[str, list[float]] = {name: [] for name in models}
        skipping = {name: parts for name, model in models.items() if (parts := parts_of(model)) is not None}
        for parts in skipping.values():
            parts.reset_stats()
        for number in range(arguments.rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                spent = way(models[name])
                if number:
                    seconds[name].append(spent)
        plain = seconds["plain"]
        relative = {
            name: spread([a / b for a, b in zip(of_model, plain, strict=True)]) for name, of_model in seconds.items()
        }
        shares = {name: statistics.mean(parts.stats()["executed_share"].values()) for name, parts in skipping.items()}
        results[label] = {"seconds of plain": statistics.median(plain), "relative": relative, "executed_share": shares}
        ran = ", ".join(f"{name} {value['median']:.2f}" for name, value in relative.items())
        print(f"{label}: {ran}; shares " + ", ".join(f"{share:.2f}" for share in shares.values()), flush=True)
    return results


@torch.no_grad()
def losses(model: MullForCausalLM, data: PackedDataset, by_rank: bool) -> dict[str, Any]:
    """Held-out loss, share of the tokens that ran the layers which they may skip, and agreement of ranks and rule of use."""
    parts = parts_of(model.eval())
    if parts is not None:
        parts.train(by_rank)  # ranks decide in training
        parts.reset_stats()
    total, count = 0.0, 0
    for batch in data.in_order(8):
        positions = batch["position_ids"]
        hidden = model.hidden_states(batch["input_ids"], position_ids=positions)
        targets = targets_of(batch["labels"], label_positions(None, positions), 1)
        valid = targets >= 0
        _, found = model.head_losses(hidden, batch["input_ids"], targets, valid.float(), position_ids=positions)
        total, count = total + float(found.double().sum()), count + int(valid.sum())
    stats = {} if parts is None else parts.stats()
    share = stats.get("executed_share", {})
    return {"loss": total / count, "executed_share": share, "rank_agreement": stats.get("rank_agreement")}


def loss_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the plain model, and continue it by each method."""
    results: dict[str, Any] = {}
    size = DemoSize(base_steps=arguments.steps, continued_steps=arguments.steps // 2)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.seed, size)
        text = Text.load(bench)
        torch.manual_seed(arguments.seed)
        config = Qwen3Config(
            vocab_size=len(text.tokenizer),
            hidden_size=size.width,
            intermediate_size=3 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
        base = AutoModelForCausalLM.from_config(config)
        batches = ShuffledBatches(text.train, size.batch_size, bench.seed)
        objective = NextToken(IterationSampling(kind="fixed", maximum=1))
        plain = wrap_transformer_with_etd(base, None)
        bench.train(
            "base",
            plain,
            objective,
            batches,
            steps=size.base_steps,
            schedule="constant",
            warmup_steps=20,
            precision="fp32",
        )
        results["base"] = losses(plain, text.held_out, by_rank=False)
        print(f"base: {results['base']['loss']:.4f}", flush=True)
        for name, skip in {"plain": None, **SKIPS}.items():
            model = wrapped(base, skip, size.continued_steps // 2)
            unseen = lambda index: batches(index + size.base_steps)  # noqa: E731
            result = bench.train(
                name.replace(", ", "-"), model, objective, unseen, steps=size.continued_steps, precision="fp32"
            )
            use, ranks = (losses(model, text.held_out, by_rank) for by_rank in (False, True))
            results[name] = {"use": use, "ranks": ranks, "seconds": result.seconds}
            ran = {
                key: list(value["executed_share"].values()) for key, value in results[name].items() if key != "seconds"
            }
            shares = {key: round(statistics.mean(values), 3) for key, values in ran.items() if values}
            print(
                f"{name}: in use {use['loss']:.4f}, by rank {ranks['loss']:.4f}, shares {shares}, "
                f"agreement {ranks['rank_agreement']}",
                flush=True,
            )
    return results


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("time", "loss"), default=["time", "loss"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each row")
    parser.add_argument("--steps", type=int, default=160, help="of the plain model; methods continue for half as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of token_skip-PART-cpu.json")
    arguments = parser.parse_args(sys.argv[1:] if given is None else given)
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}", flush=True)
    for part in arguments.part:
        results = {"time": time_part, "loss": loss_part}[part](arguments)
        settings = {name: value for name, value in vars(arguments).items() if name not in ("part", "results")}
        file = arguments.results / f"token_skip-{part}-cpu.json"
        file.write_text(json.dumps({**header("cpu", **settings), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
