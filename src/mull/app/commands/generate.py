"""``mull generate``."""

import sys
from typing import Annotated, Any, Literal

import torch
from transformers import TextStreamer
from typer import Option

from mull.app.commands.shared import ModelArgument, SplitOption, parse_split
from mull.data.tokenizer import TextEncoder
from mull.decoding.generate import GenerationStats, generate
from mull.evaluation.acceptance import acceptance_by_position, describe_call
from mull.model.configs import MTPConfig
from mull.retrofit.source import load_tokenizer
from mull.retrofit.wrap import from_pretrained
from mull.runtime.distributed import device


def continue_prompt(
    model: ModelArgument,
    prompt: Annotated[str, Option(help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, Option(help="Largest number of tokens to generate.")] = 100,
    think_iterations: Annotated[int | None, Option(help="Passes through the think block.")] = None,
    etd: SplitOption = None,
    mtp: Annotated[Literal["native"] | None, Option(help="Use the heads that Qwen3-Next and Qwen3.5 have.")] = None,
    draft: Annotated[Literal["mtp"] | None, Option(help="Draft with the model's heads; same text.")] = None,
    draft_length: Annotated[int | None, Option(help="Tokens to draft per round; default: adaptive.")] = None,
    temperature: Annotated[float, Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, Option(help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, Option(help="Sample from the likeliest tokens of this total probability.")] = None,
    min_p: Annotated[float | None, Option(help="Least probability, relative to the likeliest token's.")] = None,
    repetition_penalty: Annotated[float, Option(help="Divides the logits of used tokens; 1 is off.")] = 1.0,
    seed: Annotated[int, Option(help="Seed for sampling.", min=0, max=2**63 - 1)] = 0,
    compile_: Annotated[bool, Option("--compile", help="Compile: a minute at first, then faster.")] = False,
    compile_max: Annotated[
        bool, Option("--compile-max", help="Compile with packed weights: minutes, then fastest.")
    ] = False,
    adaptive: Annotated[
        bool | None, Option(help="Let tokens stop thinking early; default: as the model is stored.")
    ] = None,
    stats: Annotated[bool, Option("--stats", help="Print time and acceptance to standard error.")] = False,
) -> None:
    """Continue a prompt, printing tokens as they come."""
    text = sys.stdin.read() if prompt == "-" else prompt
    heads = None if mtp is None else MTPConfig(mtp_head_type=mtp)
    loaded: Any = from_pretrained(model, etd=None if etd is None else parse_split(etd), mtp=heads, allow_missing=False)
    tokenizer = load_tokenizer(model)
    encoder = TextEncoder(tokenizer)
    tokens = encoder.prompts([text])
    if not tokens[0]:
        raise ValueError("The prompt is empty: give at least one token to continue.")
    known = loaded.lm_head.out_features
    if len(tokenizer) > known:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, the model {known}: it belongs to another model.")
    output = generate(
        loaded.to(device()),
        torch.tensor(tokens),
        max_new_tokens=max_new_tokens,
        draft=draft,
        draft_length=draft_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        eos_token_id=encoder.ends(loaded.generation_config.eos_token_id),
        think_iterations=think_iterations,
        streamer=TextStreamer(tokenizer),
        adaptive=adaptive,
        compile="max" if compile_max else compile_,
    )
    if stats:
        print(_stats_text(output.stats), file=sys.stderr)


def _stats_text(stats: GenerationStats) -> str:
    """A call's statistics as lines, and a table of acceptance by position if it drafted."""
    facts = describe_call(stats)
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {fact}" for name, fact in facts.items()]
    positions = acceptance_by_position([stats])
    if positions:
        lines += ["", f"{'position':>8}  {'drafted':>8}  {'tested':>8}  {'accepted':>8}  {'share':>6}"]
    for place, counts in enumerate(positions, start=1):
        drafted, verified, accepted = counts
        lines.append(f"{place:>8}  {drafted:>8}  {verified:>8}  {accepted:>8}  {counts.conditional:>6.1%}")
    return "\n".join(lines)
