"""The table of objectives: from a name to its settings and to the function that builds it.

To add an objective, write one file with its settings and a build function, and add one row to `OBJECTIVES`. Another package adds
a weighting by an entry point of the group ``mull.objectives``, whose value is a function from
`mull.training.objectives.evidence.Evidence` to scores ``[B, T]``.
"""

from collections.abc import Callable
from importlib.metadata import entry_points
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from mull.runtime.arguments import require, require_seed
from mull.training.objectives import align, critic, distill, exits, grpo, recursions, routing, weightings
from mull.training.objectives.base import Objective
from mull.training.objectives.evidence import Evidence, Scored, Scorer
from mull.training.objectives.next_token import NextToken
from mull.training.objectives.resources import Resources, Settings
from mull.training.objectives.weighted_mtp import Control, HeadTraining, WeightedMTP

ENTRY_POINTS = "mull.objectives"
NEXT_TOKEN = "next-token"


class Entry(NamedTuple):
    """How an objective is built."""

    build: Callable[[Any, Resources], Objective | Scorer]
    """From settings and resources; a scorer weights the tokens of `WeightedMTP`."""

    settings: type[Settings] | None = None
    """Class of the settings, if there are any."""

    section: tuple[str, type[Settings]] | None = None
    """Key of the settings in a recipe, and their class there, which adds where things come from."""

    data: Literal["rows", "outcomes", "prompts", "routes"] = "rows"
    """What its batches hold: rows to learn; right and wrong answers with their outcome; prompts to answer; questions with the
    route that answers them."""


def _function(score: Callable[[Evidence], Tensor | Scored]) -> Entry:
    """A weighting without settings or memory."""
    return Entry(lambda _settings, _resources: Scorer(score))


OBJECTIVES: dict[str, Entry] = {
    NEXT_TOKEN: Entry(lambda _, resources: NextToken(resources.iterations)),
    "distill": Entry(distill.distill, distill.DistillConfig, ("distill", distill.DistillSection)),
    "align": Entry(align.align, align.AlignConfig, ("align", align.AlignSection)),
    "exits": Entry(exits.exits, exits.ExitsConfig, ("exits", exits.ExitsConfig)),
    "mixture-of-recursions": Entry(
        recursions.recursions, recursions.RecursionsConfig, ("recursions", recursions.RecursionsConfig)
    ),
    "baseline-mtp": _function(weightings.baseline),
    "entropy": _function(weightings.entropy),
    "dft": _function(weightings.dft),
    "rho1-wmtp": Entry(weightings.rho1, weightings.Rho1Config, ("rho1", weightings.Rho1Section)),
    "gradient-wmtp": Entry(weightings.gradient, weightings.GradientConfig, ("gradient", weightings.GradientSection)),
    "value-head": Entry(
        critic.value_training, weightings.ReturnConfig, ("value_head", critic.ValueSection), data="outcomes"
    ),
    "critic-wmtp": Entry(weightings.critic, weightings.CriticConfig, ("critic", weightings.CriticSection)),
    "routing": Entry(routing.routing, routing.RoutingConfig, ("routing", routing.RoutingSection), data="routes"),
    "grpo-wmtp": Entry(grpo.group_relative, grpo.GRPOConfig, ("grpo", grpo.GRPOSection), data="prompts"),
}
"""Objectives of mull by name."""

MAIN_HEAD_ALONE = (NEXT_TOKEN, "distill", "align")
"""Objectives that keep extra heads as they are."""

OWN_CHOICE = {
    "routing": "routers: leave it out",
    "align": "the mixers of the aligned layers: leave it out, or give align.trainable",
}
"""Objectives that choose themselves what they train, and what to do instead of choosing it by ``train.trainable``."""


def objective_names() -> list[str]:
    """Names of all objectives, those of other packages included."""
    return sorted({*OBJECTIVES, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def find_entry(name: str) -> Entry:
    """The row of a name; mull's own names come before those of other packages.

    Raises:
        ValueError: unknown name.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return _function(point.load())
    raise ValueError(f"The objective {name!r} is not known. Known are {', '.join(objective_names())}.")


def make_objective(
    name: str,
    resources: Resources,
    settings: Settings | None = None,
    *,
    heads: HeadTraining | None = None,
    control: Control = "none",
    seed: int = 0,
) -> Objective:
    """Build an objective.

    Args:
        name: A row of `OBJECTIVES`, or an entry point of another package.
        resources: The model that will be trained, and what else the objective needs.
        settings: Of the class that the row names; None takes the defaults.
        heads: How weightings train the extra heads.
        control: Replaces the weights of a weighting by ones that do not depend on the tokens; see `WeightedMTP`.
        seed: Seed of the control, and of what the objective samples.

    Raises:
        TypeError: an argument of another type.
        ValueError: unknown name, or a resource that the objective needs is missing or does not fit.
    """
    require("name", name, str, f"one of {', '.join(objective_names())}")
    entry = find_entry(name)
    require("resources", resources, Resources, "Resources(model=…)")
    if settings is not None:
        wanted = "leave it out" if entry.settings is None else f"{entry.settings.__name__}(…)"
        require("settings", settings, entry.settings or NoneType, wanted)
    require("heads", heads, (HeadTraining, NoneType), "a HeadTraining, or None")
    if control not in get_args(Control):
        raise ValueError(f"control={control!r} is not known: give one of {', '.join(get_args(Control))}.")
    require_seed("seed", seed)
    if settings is None and entry.settings is not None:
        settings = entry.settings()
    built = entry.build(settings, resources)
    if isinstance(built, Objective):
        return built
    return WeightedMTP(built, resources.iterations, heads, control, seed)
