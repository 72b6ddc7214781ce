"""Which layers of a softmax model should keep their attention, when the others become Gated DeltaNet.

Four methods, one result. *uniform* measures nothing. The others score each layer: *replace-one* by the divergence from the model
when this layer alone starts as calibrated DeltaNet; *retrieval* by what the right answer to a generated task loses in log
probability then; *gate* by a gate between attention and DeltaNet, trained jointly for all layers on frozen weights.

Published rankings contradict each other. So each score comes with a bootstrap interval over examples, and the result says whether
the last layer that stays can be told from the first that does not.

Shapes: E examples, R resamples, L layers, B rows of a batch, T tokens, D model width.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from mull.data.retrieval import Retrieval
from mull.evaluation.divergence import final_states, row_divergences
from mull.model.base_model import MullModel
from mull.retrofit.calibrate import advance, delta_mixer, evaluating, mixers_in_place, require_softmax_layers, trunk_of
from mull.retrofit.hybrid import DeltaStart, check_starts
from mull.runtime.arguments import Frozen, require, require_count, require_ids
from mull.runtime.progress import Progress

Method = Literal["uniform", "replace-one", "retrieval", "gate"]

RESAMPLES = 1000
"""Bootstrap resamples of examples, where a resample needs no new measurement."""

INTERVAL = (0.025, 0.975)
"""Quantiles over resamples that bound an interval."""

ENOUGH = 8
"""Different examples below which there is no verdict: too few resamples of them differ."""

ABLE = 0.5
"""Share of retrieval tasks below which a model is too weak for its layers to be judged by them."""

UNITS: dict[Method, str] = {
    "uniform": "",
    "replace-one": "nats per token",
    "retrieval": "nats per answer",
    "gate": "of 1",
}
"""What scores are measured in."""


class LayerScore(BaseModel):
    """How much one layer needs its attention."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    """Number of the layer."""

    score: float
    """The higher, the more is lost without its attention."""

    low: float
    """Lower end of the 95 % interval over resampled examples."""

    high: float
    """Upper end."""


class LayerChoice(BaseModel):
    """Which layers keep their attention, and how sure that is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_name: str
    """Where the model was loaded from; empty for a model that was never saved."""

    method: Method
    """How layers were scored."""

    keep: tuple[int, ...]
    """Layers that keep their attention, in order."""

    n_layers: int
    """Layers of the model."""

    scores: tuple[LayerScore, ...]
    """Every layer by falling score; empty for ``uniform``."""

    verdict: str
    """Whether the choice is more than noise, in words."""

    separated: bool | None
    """Whether the last layer that stays was told from the first that does not; None for ``uniform``, and for less than `ENOUGH`
    different examples."""

    n_examples: int
    """Rows of text or retrieval tasks that were measured."""

    accuracy: float | None = None
    """Share of retrieval tasks that the model itself answers right; None for other methods."""

    seconds: float
    """Wall time of the measurement, without calibration."""

    @property
    def deltanet(self) -> tuple[int, ...]:
        """The other layers, which become Gated DeltaNet."""
        return tuple(number for number in range(self.n_layers) if number not in self.keep)


class GateSearchConfig(Frozen):
    """How gates between attention and DeltaNet are trained."""

    steps: int = Field(default=40, ge=1)
    """Steps of Adam."""

    learning_rate: float = Field(default=0.1, gt=0)
    """Of the logits of the gates."""

    budget_weight: float = Field(default=10.0, ge=0)
    """Weight of ``(sum of gates / layers that stay - 1)^2`` beside the divergence, which is 1 before training."""

    batch_size: int = Field(default=4, ge=1)
    """Rows of a step."""

    resamples: int = Field(default=5, ge=2)
    """Trainings, each on rows that are drawn with replacement. Intervals are their range, so they are rough."""

    seed: int = Field(default=0, ge=0)
    """Of the drawn rows."""


def uniform_layers(n_layers: int, n_keep: int) -> tuple[int, ...]:
    """Layers that end equally long runs, the last included: 3, 7, 11, … for one in four."""
    return tuple((index + 1) * n_layers // n_keep - 1 for index in range(n_keep))


@torch.no_grad()
def replacement_divergences(
    teacher: PreTrainedModel, batches: Sequence[Tensor], starts: Mapping[int, DeltaStart], *, progress: bool = True
) -> Float[Tensor, "E L"]:
    """``KL(teacher || student)`` of each row when one layer alone is DeltaNet, in nats per token.

    Args:
        teacher: The softmax model.
        batches: Token numbers ``[B, T]`` of held-out text without padding.
        starts: By layer, for all layers; each measured as if it were the only one.
        progress: Show on stderr how far it is.
    """

    def measured(_: int, expected: Tensor, found: Tensor) -> Tensor:
        return row_divergences(expected, found, teacher.lm_head)

    return _each_replaced(teacher, batches, starts, measured, progress)


@torch.no_grad()
def retrieval_losses(
    teacher: PreTrainedModel,
    tasks: Retrieval,
    starts: Mapping[int, DeltaStart],
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> tuple[Float[Tensor, "E L"], float]:
    """What the right answer of each task loses in log probability when one layer alone is DeltaNet, in nats.

    Returns:
        The losses, and the share of tasks that the teacher answers right.
    """
    answers = tasks.answers.split(batch_size)
    right: dict[int, Tensor] = {}

    def measured(batch: int, expected: Tensor, found: Tensor) -> Tensor:
        target = answers[batch].to(expected.device)[:, None]
        before, after = (teacher.lm_head(states[:, -1]).float().log_softmax(-1) for states in (expected, found))
        right[batch] = before.argmax(-1) == target[:, 0]
        return (before.gather(1, target) - after.gather(1, target))[:, 0].cpu().double()

    losses = _each_replaced(teacher, tasks.input_ids.split(batch_size), starts, measured, progress)
    return losses, torch.cat(list(right.values())).float().mean().item()


def _each_replaced(
    teacher: PreTrainedModel,
    batches: Sequence[Tensor],
    starts: Mapping[int, DeltaStart],
    measured: Callable[[int, Tensor, Tensor], Tensor],
    progress: bool,
) -> Float[Tensor, "E L"]:
    """Values ``[B]`` that `measured` finds of a batch: of its number, the teacher's final states and those with a layer replaced.

    What comes before the replaced layer is run once.
    """
    trunk = trunk_of(teacher)
    _require_all(trunk, starts)
    n_layers = len(trunk.layers)
    mixers = {
        number: delta_mixer(trunk.layers[number], trunk.text_config, starts[number]) for number in range(n_layers)
    }
    rows = []
    with Progress(len(batches) * n_layers, "replacement", label="layers", shown=progress) as bar:
        for batch, ids in enumerate(batches):
            states = [trunk.embed_tokens(ids.to(teacher.device))]
            for number in range(n_layers):
                states.append(advance(trunk, number, states[-1]))
            expected, values = trunk.norm(states[-1]), []
            for number in range(n_layers):
                with mixers_in_place(trunk.layers, {number: mixers[number]}):
                    h = advance(trunk, number, states[number])
                for later in range(number + 1, n_layers):
                    h = advance(trunk, later, h)
                values.append(measured(batch, expected, trunk.norm(h)))
                bar.advance()
            rows.append(torch.stack(values, 1))
    return torch.cat(rows)


def _require_all(trunk: MullModel, starts: Mapping[int, DeltaStart]) -> None:
    require_softmax_layers(trunk, range(len(trunk.layers)))
    check_starts(starts, trunk.text_config)
    missing = sorted(set(range(len(trunk.layers))) - set(starts))
    if missing:
        raise ValueError(f"Layers {missing} have no calibrated start: calibrate every layer, each by itself.")


class _GatedMixer(nn.Module):
    """Attention and DeltaNet side by side, and a gate between them."""

    def __init__(self, attention: nn.Module, delta: nn.Module, logits: Tensor, number: int) -> None:
        super().__init__()
        self._branches = (attention, delta)  # a tuple hides them from torch: nothing here is trained or saved
        self._logits, self._number = logits, number

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        """The gated sum, and no attention weights."""
        softmax, delta = (branch(hidden_states=hidden_states, **options)[0] for branch in self._branches)
        return torch.lerp(delta, softmax, self._logits[self._number].sigmoid().to(delta.dtype)), None


@torch.enable_grad()
def trained_gates(
    teacher: PreTrainedModel,
    rows: Tensor,
    starts: Mapping[int, DeltaStart],
    n_keep: int,
    config: GateSearchConfig | None = None,
    *,
    progress: bool = True,
) -> Float[Tensor, "R L"]:
    """Openness of each layer's attention when all gates are trained together: one line for each resample of the rows.

    Gates start at ``n_keep / L``, so that they keep to the budget from the beginning and compete for it.

    Args:
        teacher: The softmax model; it stays as it is.
        rows: Token numbers ``[E, T]`` of text without padding.
        starts: By layer, for all layers; each measured as if it were the only one.
        n_keep: Layers that are to stay.
        config: How gates are trained.
        progress: Show on stderr how far it is.

    Source:
        FlashMorph (arXiv:2606.30562), of which we know the abstract: parallel branches, frozen weights, one gate per layer,
        trained on synthetic retrieval. We train on the divergence from the teacher, with calibrated branches.
    """
    config = config or GateSearchConfig()
    trunk = trunk_of(teacher)
    _require_all(trunk, starts)
    layers: Any = trunk.layers
    n_layers = len(trunk.layers)
    mixers = {
        number: delta_mixer(trunk.layers[number], trunk.text_config, starts[number]) for number in range(n_layers)
    }
    start = torch.tensor(n_keep / n_layers).logit()
    generator, found = torch.Generator().manual_seed(config.seed), []
    trained = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with Progress(config.resamples * config.steps, "step", label="gates", shown=progress) as bar:
            for _ in range(config.resamples):
                drawn = rows[torch.randint(len(rows), (len(rows),), generator=generator)]
                logits = start.repeat(n_layers).to(teacher.device).requires_grad_()
                gated = {
                    number: _GatedMixer(layers[number].self_attn, mixer, logits, number)
                    for number, mixer in mixers.items()
                }
                _train_gates(teacher, trunk, drawn, gated, logits, n_keep, config, bar)
                found.append(logits.detach().sigmoid().cpu().double())
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return torch.stack(found)


def _train_gates(
    teacher: PreTrainedModel,
    trunk: MullModel,
    rows: Tensor,
    gated: Mapping[int, nn.Module],
    logits: Tensor,
    n_keep: int,
    config: GateSearchConfig,
    bar: Progress,
) -> None:
    optimizer = torch.optim.Adam([logits], lr=config.learning_rate)
    batches = rows.split(config.batch_size)
    scale: Tensor | None = None
    for step in range(config.steps):
        batch = batches[step % len(batches)]
        with torch.no_grad():
            expected = final_states(teacher, batch)
        with mixers_in_place(trunk.layers, gated):
            divergence = row_divergences(expected, final_states(teacher, batch), teacher.lm_head).mean()
        scale = divergence.detach().clamp(min=1e-9) if scale is None else scale
        over = logits.sigmoid().sum() / n_keep - 1
        loss = divergence / scale + config.budget_weight * over.square().cpu()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.advance()


def resampled(values: Float[Tensor, "E L"], seed: int = 0) -> Float[Tensor, "R L"]:
    """Means over examples that are drawn with replacement; the same examples for all layers."""
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed))
    return torch.stack([values[examples].mean(0) for examples in drawn])


def judge(
    scores: Float[Tensor, " L"], resamples: Float[Tensor, "R L"], n_keep: int, unit: str
) -> tuple[tuple[int, ...], tuple[LayerScore, ...], bool, str]:
    """The layers of highest score, all scores with their intervals, and whether the choice is more than noise, also in words."""
    low, high = resamples.quantile(torch.tensor(INTERVAL, dtype=resamples.dtype), dim=0)
    order = scores.argsort(descending=True, stable=True).tolist()
    ranked = tuple(LayerScore(layer=n, score=scores[n].item(), low=low[n].item(), high=high[n].item()) for n in order)
    last, first = order[n_keep - 1], order[n_keep]
    gap = resamples[:, last] - resamples[:, first]
    least, most = gap.quantile(torch.tensor(INTERVAL, dtype=gap.dtype)).tolist()
    kept = resamples.topk(n_keep, dim=1).indices.sort(1).values
    same = (kept == torch.tensor(sorted(order[:n_keep]))).all(1).double().mean().item()
    separated = least > 0
    verdict = (
        f"Layer {last} is the last that stays and layer {first} the first that does not: they differ by "
        f"{scores[last] - scores[first]:.3g} {unit}, 95 % interval {least:.3g} to {most:.3g}. "
        + ("They can be told apart." if separated else "They cannot be told apart: this choice is within noise.")
        + f" {same:.0%} of the resamples keep the same {n_keep} layers."
    )
    return tuple(sorted(order[:n_keep])), ranked, separated, verdict


def choose_layers(
    teacher: PreTrainedModel,
    n_keep: int,
    method: Method,
    *,
    starts: Mapping[int, DeltaStart] | None = None,
    rows: Tensor | None = None,
    tasks: Retrieval | None = None,
    gates: GateSearchConfig | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> LayerChoice:
    """Choose the layers that keep their attention.

    Args:
        teacher: Qwen3, or a model of mull on it. It is not changed, and runs in evaluation mode.
        n_keep: How many layers keep it.
        method: ``uniform``, ``replace-one``, ``retrieval`` or ``gate``.
        starts: Calibrated starts of all layers, each fitted by itself (``sequential=False``); not for ``uniform``.
        rows: Token numbers ``[E, T]`` of held-out text, for ``replace-one`` and ``gate``.
        tasks: For ``retrieval``.
        gates: For ``gate``.
        batch_size: Rows of a pass.
        seed: Of resamples.
        progress: Show on stderr how far it is.

    Raises:
        TypeError: an argument of another type.
        ValueError: no such method, nothing to measure on, no layer would stay or become DeltaNet, or scores are not finite.
    """
    require("teacher", teacher, PreTrainedModel, "a causal language model")
    n_layers = teacher.config.get_text_config().num_hidden_layers
    require_count("n_keep", n_keep, 1, n_layers - 1)
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known. Choose one of {', '.join(get_args(Method))}.")
    began, name = time.perf_counter(), teacher.config.name_or_path or ""
    if method == "uniform":
        keep = uniform_layers(n_layers, n_keep)
        return LayerChoice(
            model_name=name,
            method=method,
            keep=keep,
            n_layers=n_layers,
            scores=(),
            verdict="Nothing was measured: every run of layers ends with one that stays.",
            separated=None,
            n_examples=0,
            seconds=0.0,
        )
    given, wanted = (tasks, "tasks") if method == "retrieval" else (rows, "rows")
    if given is None or starts is None:
        raise ValueError(f"method={method!r} measures: give {wanted} and starts.")
    ids = given.input_ids if isinstance(given, Retrieval) else given
    require_ids(wanted, ids)
    accuracy, separated = None, None
    with evaluating(teacher):
        if method == "gate":
            samples = trained_gates(teacher, ids, starts, n_keep, gates, progress=progress)
            scores = samples.mean(0)
        else:
            if isinstance(given, Retrieval):
                values, accuracy = retrieval_losses(teacher, given, starts, batch_size=batch_size, progress=progress)
            else:
                values = replacement_divergences(teacher, ids.split(batch_size), starts, progress=progress)
            scores, samples = values.mean(0), resampled(values, seed)
    if spoiled := (~scores.isfinite()).nonzero()[:, 0].tolist():
        raise ValueError(f"Layers {spoiled} have scores that are not finite: load the model in fp32 or bf16.")
    keep, ranked, told, verdict = judge(scores, samples, n_keep, UNITS[method])
    if (n_different := len(ids.unique(dim=0))) >= ENOUGH:
        separated = told
    else:
        verdict = f"{n_different} different {wanted} are too few to tell layers apart: measure on {ENOUGH} or more."
    if accuracy is not None and accuracy < ABLE:
        verdict += f" The model itself answers {accuracy:.0%} of the tasks: what layers do for retrieval hardly shows."
    return LayerChoice(
        model_name=name,
        method=method,
        keep=keep,
        n_layers=n_layers,
        scores=ranked,
        verdict=verdict,
        separated=separated,
        n_examples=len(ids),
        accuracy=accuracy,
        seconds=time.perf_counter() - began,
    )
