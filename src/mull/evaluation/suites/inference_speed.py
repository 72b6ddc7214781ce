"""Decoding speed of one checkpoint: plain, with drafts, compiled, through transformers, and the floor of the machine."""

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import CompileConfig
from transformers.modeling_layers import MtpModel

from mull.evaluation.cost.count import STREAMED_BYTES, Machine, measure_machine
from mull.evaluation.cost.decoding import predicted_speedup, step_seconds
from mull.evaluation.lossless import differences
from mull.evaluation.speed import Timing, Variant, measure_in_turns, mull_variant, stock_variant
from mull.evaluation.stock import can_use_mtp, heads_loaded_once, load_stock, stock_model, write_stock
from mull.evaluation.suites.statistics import Score, Sums, score
from mull.evaluation.suites.subject import Subject
from mull.evaluation.suites.writers import OwnSettings

PLAIN, STOCK, LOOP, COMPILED = "mull", "transformers", "transformers' loop on mull's layers", ", compiled"
ROUNDS = 3
MAX_DRAFTS = 3


def drafting(k: int) -> str:
    """Name of the variant with k drafts a round."""
    return f"{PLAIN}, {k} draft{'s' * (k > 1)}"


def decoding_variants(
    subject: Subject, prompt: Tensor, tokens: int, compiled: bool, kept: ExitStack
) -> dict[str, Variant]:
    """All variants that can continue rows like `prompt` ``[B, T]``, by name.

    Args:
        subject: The model, and which layers run.
        prompt: Finds whether transformers' own class computes the same.
        tokens: New tokens of a row.
        compiled: Compile, too.
        kept: Holds what variants need until they have run.
    """
    endless = {"eos_token_id": None}
    static = {"cache_implementation": "static", "compile_config": _compile_config(subject), **endless}
    if not subject.is_mull:
        return _stock_variants(subject.model, tokens, static if compiled else None)
    options = subject.route.options()
    n_drafts = min(MAX_DRAFTS, subject.n_heads)
    drafts = {drafting(k): {"draft": "mtp", "draft_length": k} for k in range(1, n_drafts + 1)}
    own: dict[str, dict[str, Any]] = {PLAIN: {}, **drafts}
    if compiled:
        own |= {name + COMPILED: {"compile": True, **given} for name, given in own.items()}
    variants = {name: mull_variant(subject.model, tokens, {**options, **given}) for name, given in own.items()}
    stock = _same_function(subject, prompt)
    if stock is None:
        return variants | {LOOP: stock_variant(subject.model, tokens, {**options, **endless})}
    variants |= _stock_variants(stock, tokens, static if compiled else None)
    if len(prompt) == 1 and can_use_mtp(subject.model):
        folder = Path(kept.enter_context(tempfile.TemporaryDirectory()))
        write_stock(subject.model, folder)
        loaded = load_stock(folder, subject.model.dtype, subject.model.device)
        heads: dict[int, MtpModel] = {}
        kept.enter_context(heads_loaded_once(heads))  # or else each call would read them from the disk
        variants[f"{STOCK}, use_mtp"] = stock_variant(loaded, tokens, {"use_mtp": True, **endless})
    return variants


def _stock_variants(model: Any, tokens: int, static: dict[str, Any] | None) -> dict[str, Variant]:
    """Transformers' ``generate``, and with these options for a compiled static cache."""
    found = {STOCK: stock_variant(model, tokens, {"eos_token_id": None})}
    return found if static is None else found | {STOCK + COMPILED: stock_variant(copy.copy(model), tokens, static)}


def _compile_config(subject: Subject) -> CompileConfig:
    config = CompileConfig(
        fullgraph=False, mode="reduce-overhead" if subject.model.device.type == "cuda" else "default"
    )
    config._compile_all_devices = True  # type: ignore[assignment]  # transformers compiles on GPUs only
    return config


@torch.no_grad()
def _same_function(subject: Subject, prompt: Tensor) -> Any:
    """The backbone as transformers' own class, or None if the model computes something else: loops, routes, gates, experts."""
    try:
        stock = stock_model(subject.model)
    except ValueError:
        return None
    own = subject.model(prompt, use_cache=False, **subject.route.options()).logits
    return stock if torch.equal(own, stock(prompt, use_cache=False).logits) else None


def speed_scores(timings: Mapping[str, Timing], seed: int) -> tuple[dict[str, Score], dict[str, dict[str, Sums]]]:
    """Tokens per second of each variant, with the bootstrap over prompts, and what each prompt adds."""
    values = {}
    for name, timing in timings.items():
        seconds = [sum(of_prompt) for of_prompt in zip(*timing.seconds, strict=True)]
        new = [float(n * len(timing.seconds)) for n in timing.tokens]
        values[f"{name}, tokens/s"] = {str(i): pair for i, pair in enumerate(zip(new, seconds, strict=True))}
    return {name: score(sums, seed=seed, proportion=False) for name, sums in values.items()}, values


def speed_notes(subject: Subject, timings: Mapping[str, Timing], prompts: Sequence[Tensor]) -> Iterator[str]:
    """The floor of the machine, measured and predicted speed-ups, and whether all texts are equal."""
    base = PLAIN if subject.is_mull else STOCK
    rates = {
        name: sum(timing.tokens) * len(timing.seconds) / sum(map(sum, timing.seconds))
        for name, timing in timings.items()
    }
    if subject.is_mull:
        machine = _machine(subject)
        n_rows, n_new = len(prompts[0]), timings[base].tokens[0] // len(prompts[0])
        context = prompts[0].shape[1] + n_new // 2
        seconds = step_seconds(subject.model, machine, context=context, n_rows=n_rows, path=_path(subject))
        yield (
            f"Floor of the machine: {n_rows / seconds:.1f} tokens/s without drafts, from {machine.bandwidth / 1e9:.1f} GB/s of "
            f"weights read and {machine.flops / 1e9:.0f} GFLOP/s; mull reaches {rates[base] * seconds / n_rows:.0%} of it."
        )
        for k in range(1, MAX_DRAFTS + 1):
            for suffix in ("", COMPILED):
                name, plain = drafting(k) + suffix, base + suffix
                if name not in timings:
                    continue
                accepted = [*timings[name].acceptance, *[0.0] * k][:k]
                predicted = predicted_speedup(
                    subject.model, machine, accepted, length=k, context=context, n_rows=n_rows, path=_path(subject)
                )
                shares = ", ".join(f"{share:.0%}" for share in accepted)
                yield (
                    f"{name}: {rates[name] / rates[plain]:.2f} times {plain}, {predicted:.2f} predicted from the acceptance "
                    f"({shares})."
                )
    if len(prompts) > 1:
        yield f"Intervals are over {len(prompts)} batches of prompts; the {ROUNDS} rounds of each are added up."
    else:
        yield "One batch of prompts says nothing of the spread: there are no intervals."
    others = [name for name in rates if name != base]
    yield f"Beside {base}: " + ", ".join(f"{name} {rates[name] / rates[base]:.2f} times" for name in others) + "."
    yield from _different_texts(subject, timings, prompts, base)


def _different_texts(
    subject: Subject, timings: Mapping[str, Timing], prompts: Sequence[Tensor], base: str
) -> Iterator[str]:
    """Of each variant that wrote other texts than `base`: how many, and whether rounding explains them."""
    texts = {name: [row for outcome in timing.outcomes[-1] for row in outcome.rows] for name, timing in timings.items()}
    different = [name for name, rows in texts.items() if rows != texts[base]]
    if not different:
        return
    wider = copy.deepcopy(subject.model).to(torch.float64 if subject.model.dtype == torch.float32 else torch.float32)
    rows = [row.tolist() for prompt in prompts for row in prompt]
    for name in different:
        found = differences(subject.model, wider, rows, texts[base], texts[name], **subject.route.options())
        n = sum(not difference.is_tie for difference in found)
        verdict = f"{n} of them NOT by ties, so they are wrong" if n else "all by ties that rounding decides"
        yield f"{name} wrote {len(found)} of {len(rows)} texts otherwise than {base}, {verdict}."


def _path(subject: Subject) -> Any:
    return subject.model.path(**{name: value for name, value in subject.route.options().items() if name != "adaptive"})


def _machine(subject: Subject) -> Machine:
    """Throughput of the device with weights of this model's size: those of a small one stay in the cache."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in subject.model.parameters())
    return measure_machine(subject.model.device, subject.model.dtype, min(size, STREAMED_BYTES))


def measured_speed(subject: Subject, prompts: Sequence[Tensor], tokens: int, compiled: bool) -> dict[str, Timing]:
    """Run all variants in turns on prompts ``[B, T]``, each for `tokens` tokens; compiled, too, or not."""
    device = subject.model.device
    batches = [(prompt.to(device), torch.ones_like(prompt, device=device)) for prompt in prompts]
    with ExitStack() as kept:
        # All ways write by the same rules: only transformers' own would obey a repetition penalty that the checkpoint brings.
        kept.enter_context(OwnSettings(subject.model))
        variants = decoding_variants(subject, batches[0][0], tokens, compiled, kept)
        return measure_in_turns(variants, batches, ROUNDS, "speed")
