"""The page of `mull inspect`: a text whose tokens show how long they thought."""

from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

from mull.app.report.page import machine
from mull.evaluation.depth_trace import DepthTrace, TokenTrace
from mull.layers.routers import REPEAT, SKIP


def _shares(trace: DepthTrace) -> list[tuple[int, int]]:
    """How many tokens took each LoRA expert, over all iterations."""
    counts = Counter(step.expert for token in trace.tokens for step in token.iterations if step.expert is not None)
    return sorted(counts.items())


def _by_layer(trace: DepthTrace) -> list[tuple[int, list[int]]]:
    """How often tokens skipped, ran and repeated each layer that they were asked about, over all iterations."""
    counts = Counter((made.layer, made.action) for token in trace.tokens for made in token.actions)
    return [(layer, [counts[layer, action] for action in range(3)]) for layer in sorted({key[0] for key in counts})]


def _told(token: TokenTrace) -> str:
    """The layers that a token skipped and repeated; empty if it ran each once."""
    parts = []
    for verb, action in (("skips", SKIP), ("repeats", REPEAT)):
        layers = [made for made in token.actions if made.action == action]
        most = max((made.iteration for made in token.actions), default=1)
        names = [str(made.layer) if most == 1 else f"{made.layer} (iteration {made.iteration})" for made in layers]
        if names:
            parts.append(f"{verb} layer{'s' if len(names) > 1 else ''} {', '.join(names)}")
    return "; ".join(parts)


def write_inspection(
    trace: DepthTrace,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    title: str,
    command: str,
    n_prompt: int,
    drafted: Sequence[bool],
) -> None:
    """Write one self-contained page that fetches nothing.

    Args:
        trace: The text.
        tokenizer: Spells its tokens.
        path: File to write; missing folders are made.
        title: Heading of the page.
        command: What produced it.
        n_prompt: Tokens of the prompt; the others were written by the model.
        drafted: For each token, whether it was drafted by a head and accepted.
    """
    tokens = []
    for place, (token, was_drafted) in enumerate(zip(trace.tokens, drafted, strict=True)):
        tokens.append(
            {
                "text": tokenizer.decode([token.token]),
                "depth": len(token.iterations),
                "early": token.early_exit,
                "written": place >= n_prompt,
                "drafted": was_drafted,
                "loss": token.loss,
                "trace": [
                    (tokenizer.decode([step.token]), step.probability, step.cosine, step.expert)
                    for step in token.iterations
                ],
                "route": _told(token),
            }
        )
    counts = Counter(len(token.iterations) for token in trace.tokens)
    histogram = [(depth, counts[depth]) for depth in range(1, 1 + trace.iterations)]
    template = resources.files("mull.app.report").joinpath("inspect.html.j2").read_text("utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        page.render(
            title=title,
            trace=trace,
            tokens=tokens,
            histogram=histogram,
            routed=any(token.actions for token in trace.tokens),
            experts=_shares(trace),
            layers=_by_layer(trace),
            most=max(counts.values()),
            facts={"Command": command, **machine()},
        ),
        encoding="utf-8",
    )
