"""Claim: exactly the chosen parameters are trained, by identity; the others keep every bit and cost no gradient memory."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import tiny
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mull import ETDConfig, MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.evaluation.cost.training import Schedule, estimate
from mull.runtime.checkpoint import latest, stored_tensors
from mull.training.loop import TrainConfig, train
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective
from mull.training.optimization import OptimizationConfig
from mull.training.trainable import frozen_except, summary

ETD = ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1)
HEADS = ("transformer", "mlp", "shared_lm_head", "sequential", "native")


def model_of(family: str = "qwen3", head: str | None = "mlp", seed: int = 0) -> MullForCausalLM:
    mtp = None if head is None else MTPConfig(num_predict_tokens=2, mtp_head_type=head)  # type: ignore[arg-type]
    model = wrap_transformer_with_etd(tiny(family, seed=seed, num_hidden_layers=4), ETD, mtp)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [] if model.mtp_heads is None else model.mtp_heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def rows(number: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def config(trainable: str | Sequence[str], **changes: object) -> TrainConfig:
    common = {"steps": 3, "peak_lr": 1e-2, "weight_decay": 0.5, "precision": "fp32", "log_every": 1}
    return TrainConfig(**{**common, "trainable": trainable, **changes})


def train_with(model: MullForCausalLM, settings: TrainConfig, out: Path | None = None, **options: object) -> None:
    resources = Resources(model=model, iterations=IterationSampling(maximum=2))
    train(model, make_objective("baseline-mtp", resources), rows, settings, out, **options)


def names_of(model: MullForCausalLM, choice: str | Sequence[str]) -> set[str]:
    with frozen_except(model, choice) as chosen:
        requiring = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert requiring == set(chosen)
    return requiring


def copies(model: MullForCausalLM) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "qwen3_5"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_and_new_are_what_a_model_without_them_lacks(family: str, head: str) -> None:
    model = model_of(family, head)
    backbone = {name for name, _ in model_of(family, None).named_parameters()}
    everything = {name for name, _ in model.named_parameters()}
    assert names_of(model, "new") == everything - backbone
    assert names_of(model, "heads") == everything - backbone
    assert names_of(model, "all") == everything


def test_all_leaves_what_requires_no_gradient() -> None:
    model = model_of()
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in names_of(model, "all")
    assert names_of(model, ["model.embed_tokens.*"]) == {"model.embed_tokens.weight"}


def test_patterns_choose_by_name_and_a_tied_tensor_has_two() -> None:
    model = model_of("qwen3-tied")
    assert names_of(model, ["model.layers.[12].mlp.up_proj.*", "model.norm.weight"]) == {
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.norm.weight",
    }
    assert names_of(model, ["lm_head.*"]) == {"model.embed_tokens.weight"}
    assert names_of(model_of("qwen3"), ["lm_head.*"]) == {"lm_head.weight"}


def test_what_matches_nothing_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(
        ValueError, match=r"matches 'model.layer.0.mlp.up_proj.weight'\. .*model\.layers\.0\.mlp\.up_proj\.weight"
    ):
        names_of(model_of(), ["model.norm.*", "model.layer.0.mlp.up_proj.weight"])
    for choice in ("heads", "new"):
        with pytest.raises(ValueError, match="no parameters beside its backbone"):
            names_of(model_of(head=None), choice)
    for choice in ("trunk", [], "model.layers.*"):
        with pytest.raises(ValueError, match="one of all, heads, new, or a list of patterns"):
            config(choice)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied"])
@pytest.mark.parametrize("choice", ["heads", ("model.layers.2.*", "mtp_heads.heads.0.*")])
def test_the_chosen_change_and_the_others_keep_every_bit(
    family: str, choice: str | Sequence[str], optimizer: str
) -> None:
    model = model_of(family, "transformer")
    before, chosen = copies(model), names_of(model, choice)
    train_with(model, config(choice, optimizer=optimizer))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in chosen), name
    assert all(parameter.requires_grad for parameter in model.parameters()), "freezing ends with the training"


@pytest.mark.parametrize("head", HEADS)
def test_every_chosen_parameter_has_a_gradient_and_no_other(head: str) -> None:
    model, seen = model_of(head=head), {}
    with frozen_except(model, "new") as chosen:
        objective = make_objective("baseline-mtp", Resources(model=model, iterations=IterationSampling(maximum=2)))
        objective(model.train(), rows(0)).sum.backward()
        seen = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert seen == set(chosen)


def test_recomputation_changes_nothing() -> None:
    stored, recomputed = (model_of(head="transformer") for _ in range(2))
    choice = ("model.layers.2.*", "mtp_heads.*")
    train_with(stored, config(choice))
    train_with(recomputed, config(choice, gradient_checkpointing=True))
    assert all(torch.equal(value, copies(recomputed)[name]) for name, value in copies(stored).items())


def kept(model: MullForCausalLM) -> int:
    """Bytes that autograd keeps of the states of one micro-batch, weights apart."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.train().hidden_states(rows(0)["input_ids"], think_iterations=2)
    del hidden
    return sum(size for storage, size in storages.items() if storage not in weights)


def test_layers_below_the_first_trainable_one_keep_no_activations() -> None:
    model = model_of()
    sizes = []
    for choice in ("all", ("model.layers.3.*",), "heads"):
        with frozen_except(model, choice):
            sizes.append(kept(model))
    everything, last_layer, heads = sizes
    assert heads == 0
    assert 0 < last_layer < everything / 3


def test_the_estimate_counts_what_is_trained() -> None:
    model = model_of()
    found = {}
    for choice in ("all", ("model.layers.3.*",), "heads"):
        with frozen_except(model, choice) as chosen:
            found[choice] = estimate(model, OptimizationConfig(), Schedule(rows=2, length=12, max_iterations=2))
        size = 4 * sum(parameter.numel() for parameter in chosen.values())
        assert (found[choice].memory.gradients, found[choice].memory.optimizer) == (size, 2 * size)
        assert found[choice].parameters.trainable * 4 == size
    everything, last_layer, heads = (estimate.memory.activations for estimate in found.values())
    assert heads < last_layer < everything
    with frozen_except(model, "heads"):
        deeper = estimate(model, OptimizationConfig(), Schedule(rows=2, length=12, max_iterations=5))
    assert deeper.memory.activations == heads, "a frozen trunk keeps nothing, however deep"


def test_only_the_trained_have_optimizer_state_and_a_run_resumes(tmp_path: Path) -> None:
    straight, stopped, resumed = (model_of(seed=seed) for seed in (0, 0, 1))
    settings = config("heads")
    train_with(straight, settings)
    train_with(stopped, settings, tmp_path, until=lambda record: record["step"] == 2)
    names = stored_tensors(latest(str(tmp_path / "checkpoints")))  # type: ignore[arg-type]
    own = {name.split(".", 2)[2].rsplit(".", 1)[0] for name in names if name.startswith("optimizer.")}
    assert own == names_of(straight, "heads")
    assert {name.removeprefix("model.model.") for name in names if name.startswith("model.model.")} == {
        *copies(straight)
    }
    with pytest.raises(ValueError, match=r"train\.trainable: 'heads' stored, None given"):
        train_with(model_of(), config("all"), tmp_path, resume=True)
    train_with(resumed, settings, tmp_path, resume=True)
    assert all(torch.equal(value, copies(resumed)[name]) for name, value in copies(straight).items())


def test_a_loss_without_a_trainable_parameter_is_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="does not depend on any trainable parameter"):
        train(model, NextToken(IterationSampling(maximum=1)), rows, config("new"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_summary_counts_by_kind() -> None:
    with frozen_except(model_of(), ["model.layers.*.mlp.up_proj.weight", "model.norm.weight"]) as chosen:
        assert summary(chosen) == {"model.layers.*.mlp.up_proj.weight": 4 * 32 * 48, "model.norm.weight": 32}
