"""Claim: a recipe is carried out as it says, whatever its algorithm; what cannot work is refused before any training."""

import itertools
import json
import math
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import transformers
import yaml
from conftest import tiny
from recipes import ARCHITECTURE, answers, changed, content
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.nn import functional as F
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

import mull
from mull.app import run
from mull.app.recipe import parse_recipe
from mull.app.run import estimate_recipe, run_recipe
from mull.data.arithmetic import CHARACTERS, ArithmeticTask, character_tokenizer
from mull.data.packing import pack_tokens
from mull.data.tokenizer import TextEncoder, train_tokenizer
from mull.evaluation.held_out import held_out_loss, held_out_losses
from mull.evaluation.search.route_scores import Question, RouteTask
from mull.evaluation.search.route_tree import RouteSearchConfig
from mull.evaluation.search.routes import label_questions
from mull.model.configs import ETDConfig, MTPConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.checkpoint import stored_tensors
from mull.runtime.storage import exclusive
from mull.runtime.tracking import MlflowLog, sqlite_uri
from mull.training.loop import train


def carry_out(recipe: dict[str, Any], resume: bool = False) -> Any:
    return run_recipe(parse_recipe(recipe), resume)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def named(tmp_path: Path, name: str, **values: Any) -> dict[str, Any]:
    return changed(content(tmp_path), run__name=name, **values)


def test_a_recipe_trains_and_its_model_loads_everywhere(tmp_path: Path) -> None:
    recipe = changed(content(tmp_path), train__algo="baseline-mtp", model__mtp={"num_predict_tokens": 2})
    result = carry_out(recipe)
    assert (result.step, result.stopped) == (6, "finished")
    log = records(tmp_path / "tiny")
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < log[0]["loss"]
    assert all(0 < log[-1][name] < 6 for name in ("eval_loss", "eval_head1_loss", "eval_head2_loss"))
    assert all(record["mfu"] > 0 for record in log)
    folder = tmp_path / "tiny" / "model"
    model = mull.from_pretrained(str(folder))
    assert model.etd_config is not None
    assert model.etd_config.max_think_iterations == 2
    assert model.mtp_config == MTPConfig(num_predict_tokens=2)
    tokens = AutoTokenizer.from_pretrained(folder)("def a1(x):", return_tensors="pt")["input_ids"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, model(tokens).logits)

    again = content(tmp_path, run={"name": "again", "out": str(tmp_path)}, model={"checkpoint": str(folder)})
    assert carry_out(changed(again, train__algo="baseline-mtp")).step == 6
    reloaded = mull.from_pretrained(str(tmp_path / "again" / "model"))
    assert (reloaded.etd_config, reloaded.mtp_config) == (model.etd_config, model.mtp_config)


@pytest.mark.parametrize(("tied", "heads"), [(False, "mlp"), (True, "mlp"), (False, "native")])
@pytest.mark.latin(3)
def test_the_trunk_is_a_checkpoint_of_transformers_alone(
    tmp_path: Path, tied: bool, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As from several ranks, where tied tensors are gathered one by one.
    monkeypatch.setattr(
        "mull.app.run.full_state_dict", lambda m: {name: t.clone() for name, t in m.state_dict().items()}
    )
    recipe = changed(content(tmp_path), train__algo="baseline-mtp", model__mtp={"mtp_head_type": heads})
    carry_out(changed(recipe, model__architecture__tie_word_embeddings=tied, train__steps=2))
    folder = tmp_path / "tiny"
    assert "mull" not in (folder / "trunk" / "config.json").read_text()
    trunk = AutoModelForCausalLM.from_pretrained(folder / "trunk")
    assert type(trunk).__module__.startswith("transformers.models.qwen3.")
    model = mull.from_pretrained(str(folder / "model"))
    tokens = AutoTokenizer.from_pretrained(folder / "trunk")("def a1(x):", return_tensors="pt")["input_ids"]
    assert torch.equal(trunk(tokens).logits, model(tokens, think_iterations=1).logits)
    assert ("lm_head.weight" in load_file(folder / "trunk" / "model.safetensors")) is not tied


def test_a_recipe_resumes_where_it_stopped(tmp_path: Path) -> None:
    carry_out(named(tmp_path, "straight"))
    stopped = named(tmp_path, "stopped", checkpoint={"every": 4})
    carry_out(stopped)
    checkpoints = sorted((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-000004", "step-000006"]
    shutil.rmtree(checkpoints[1])
    shutil.rmtree(tmp_path / "stopped" / "model")
    carry_out(stopped, resume=True)
    assert_same(tmp_path / "straight", tmp_path / "stopped")
    with pytest.raises(ValueError, match="already holds a run"):
        carry_out(stopped)


def test_evaluation_has_its_own_interval_and_does_not_disturb_training(tmp_path: Path) -> None:
    carry_out(named(tmp_path, "never", data__held_out_paths=None))
    carry_out(named(tmp_path, "often", eval={"every": 2, "rows": 5}, train__log_every=100))
    assert [record["step"] for record in records(tmp_path / "often") if "eval_loss" in record] == [2, 4, 6]
    assert not any("eval_loss" in record for record in records(tmp_path / "never"))
    assert_same(tmp_path / "never", tmp_path / "often")


@pytest.mark.parametrize(
    "values",
    [
        {"train__algo": "dft"},
        {"train__algo": "entropy", "loss__control": "shuffled"},
        {"train__algo": "gradient-wmtp", "gradient": {"mode": "norm"}},
        {"train__algo": "gradient-wmtp", "gradient": {"mode": "alignment", "paths": ["{folder}/text/b.py"]}},
        {"train__algo": "rho1-wmtp", "rho1": {"mode": "weighted", "reference": "{folder}/base/model"}},
    ],
    ids=lambda values: "-".join(map(str, values.values()))[:30],
)
@pytest.mark.latin(3)
def test_every_weighting_trains_all_heads(tmp_path: Path, values: dict[str, Any]) -> None:
    if "rho1" in values:
        carry_out(named(tmp_path, "base", train__steps=1))
    filled = json.loads(json.dumps(values).replace("{folder}", str(tmp_path)))
    training = {"train__steps": 4, "train__peak_lr": 0.05, "train__accumulate": 2}
    recipe = named(tmp_path, "tiny", model__mtp={"num_predict_tokens": 2}, **training, **filled)
    estimate_recipe(parse_recipe(recipe))
    assert not (tmp_path / "tiny").exists()
    carry_out(recipe)
    log = records(tmp_path / "tiny")
    assert [record["active_heads"] for record in log] == [2.0] * 4
    assert all(math.isfinite(value) for record in log for value in record.values())
    assert log[-1]["weights/ess"] < 1 - 1e-6, "all weights are equal"


@pytest.mark.parametrize("supervision", ["expected", "improvement"])
def test_exits_are_trained_and_used(tmp_path: Path, supervision: str) -> None:
    values: dict[str, Any] = {"train__algo": "exits", "exits": {"supervision": supervision}, "train__peak_lr": 0.05}
    if supervision == "improvement":
        values["train__trainable"] = ["model.exit_head.*"]
    recipe = named(tmp_path, "tiny", model__etd__halting={"rule": "learned"}, **values)
    estimate_recipe(parse_recipe(recipe))
    carry_out(recipe)
    log = records(tmp_path / "tiny")
    assert all(1 <= record["exit_iteration"] <= record["iterations"] for record in log)
    assert all(math.isfinite(value) for record in log for value in record.values())
    model = mull.from_pretrained(tmp_path / "tiny" / "model")
    assert model.model.exit_head is not None
    assert model.model.exit_head.weight.abs().max() > 0, "it starts at 0"
    assert model(torch.tensor([[1, 2, 3]]), adaptive=True).metrics is not None


def test_recursions_are_trained_and_used(tmp_path: Path) -> None:
    router = {"rule": "router", "stop": "share_first", "balance_rate": 0.1}
    training = {"train__algo": "mixture-of-recursions", "recursions": {"z_loss_weight": 0.01}, "train__peak_lr": 0.05}
    loss = {"iterations": {"kind": "fixed", "maximum": 3}}
    etd = {"model__etd__halting": router, "model__etd__adaptive_depth": True, "model__etd__max_think_iterations": 3}
    recipe = named(tmp_path, "tiny", loss=loss, **etd, **training)
    estimate_recipe(parse_recipe(recipe))
    carry_out(recipe)
    log = records(tmp_path / "tiny")
    assert all(math.isfinite(value) for record in log for value in record.values())
    assert log[0]["mean_iterations"] == 3
    assert log[-1]["mean_iterations"] < 3, "the bias evens the load"
    model = mull.from_pretrained(tmp_path / "tiny" / "model")
    assert model.etd is not None
    assert model.etd.depth_router is not None
    assert model.etd.depth_router.gate.out.weight.abs().max() > 0, "it starts at 0"
    assert model.etd.depth_router.bias[-1] < 0
    assert model(torch.tensor([[1, 2, 3]])).metrics is not None


def labelled(folder: Path) -> tuple[Path, Path]:
    """A tiny checkpoint, and routes that a search found for its questions."""
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 3, 270)
    tiny("qwen3", vocab_size=len(tokenizer), num_hidden_layers=4, eos_token_id=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    questions = [Question(f"def f{number}(x):", f" return {number}") for number in range(8)]
    task = RouteTask(mull.from_pretrained(folder / "base"), TextEncoder(tokenizer), questions)
    label_questions(task, folder / "labels.jsonl", RouteSearchConfig(labeller="loss", simulations=12))
    return folder / "base", folder / "labels.jsonl"


def routing(folder: Path, name: str, start: Path, labels: Path, **values: Any) -> dict[str, Any]:
    recipe = {
        "run": {"name": name, "out": str(folder)},
        "model": {
            "checkpoint": str(start),
            "etd": {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 1},
        },
        "data": {"paths": [str(labels)], "format": "routes", "length": 40, "batch_size": 2},
        "routing": {"held_out_share": 0.25},
        "train": {"algo": "routing", "steps": 12, "peak_lr": 0.02, "precision": "fp32", "log_every": 1},
        "eval": {"every": 3},
    }
    return changed(recipe, **{"model__etd__layer_router": {"hidden_size": 8, "scope": "all"}} | values)


def test_routers_learn_from_a_label_file_and_nothing_else_does(tmp_path: Path) -> None:
    checkpoint, labels = labelled(tmp_path)
    recipe = routing(tmp_path, "straight", checkpoint, labels)
    told = estimate_recipe(parse_recipe(recipe))
    assert re.search(r"^trains model.etd.layer_routers.by_layer.\*.inner.weight +1,024$", told, re.MULTILINE)
    assert "embed_tokens" not in told
    carry_out(recipe)
    log = records(tmp_path / "straight")
    assert log[-1]["loss"] < log[0]["loss"]
    assert {"accuracy", "eval_macro_f1", "eval_accuracy", "eval_visits", "eval_label_visits"} <= log[-1].keys()
    base, trained = load_file(checkpoint / "model.safetensors"), weights(tmp_path / "straight")
    assert all(torch.equal(trained[name], tensor) for name, tensor in base.items())
    model = mull.from_pretrained(tmp_path / "straight" / "model")
    assert model.etd is not None
    assert not model.etd.layer_routers.warms_up, "1000 steps of warm-up are left out"
    assert all(router.out.weight.any() for router in model.etd.layer_routers.by_layer.values())
    stopped = routing(tmp_path, "stopped", checkpoint, labels, checkpoint={"every": 5, "keep_last": 3})
    carry_out(stopped)
    for step in (10, 12):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step-{step:06}")
    shutil.rmtree(tmp_path / "stopped" / "model")
    carry_out(stopped, resume=True)
    assert_same(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__format": "examples"}, "routing and routes need each other"),
        ({"train__algo": "baseline-mtp", "routing": None}, "routing and routes need each other"),
        ({"train__trainable": "new"}, "train.trainable is not read by train.algo=routing"),
        ({"data__held_out_paths": ["x"]}, "both hold rows out"),
        ({"data__split": "train"}, "split are for datasets, and routes are files"),
        ({"model__etd__layer_router": None}, "the model has none"),
        ({"model__etd__layer_router": {"scope": "think"}}, "skip or repeat layers that have no router"),
        ({"data__length": 5}, "0 of these fit into length=5"),
        ({"data__paths": ["none.jsonl"]}, "none.jsonl"),
        ({"model__checkpoint": None, "model__architecture": dict(ARCHITECTURE)}, "start from model.checkpoint"),
    ],
)
def test_what_cannot_be_routed_is_refused(template_of_labels: Any, tmp_path: Path, values: Any, message: str) -> None:
    recipe = routing(tmp_path, "run", *template_of_labels, **values)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        carry_out(recipe)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("*.jsonl"))


@pytest.fixture(scope="module")
def template_of_labels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return labelled(tmp_path_factory.mktemp("labels"))


def test_iterations_can_be_drawn_per_token(tmp_path: Path) -> None:
    losses = {}
    for name, per in (("first", "token"), ("second", "token"), ("step", "step")):
        iterations = {"iterations": {"kind": "uniform", "maximum": 3, "per": per}}
        carry_out(named(tmp_path, name, loss=iterations))
        losses[name] = [record["loss"] for record in records(tmp_path / name)]
    assert losses["first"] == losses["second"]
    assert losses["first"] != losses["step"]
    per_token = {"iterations": {"kind": "uniform", "maximum": 3, "per": "token"}}
    resumed = named(tmp_path, "resumed", loss=per_token, checkpoint={"every": 4})
    carry_out(resumed)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000006")
    shutil.rmtree(tmp_path / "resumed" / "model")
    carry_out(resumed, resume=True)
    assert_same(tmp_path / "first", tmp_path / "resumed")


def test_a_reference_that_is_the_model_itself_weighs_all_tokens_alike(tmp_path: Path) -> None:
    carry_out(named(tmp_path, "base", train__steps=1))
    recipe = named(tmp_path, "tiny", train__algo="rho1-wmtp", train__steps=2, train__peak_lr=0.1)
    del recipe["model"]["architecture"]
    base = str(tmp_path / "base" / "model")
    one_pass = {"iterations": {"kind": "fixed", "maximum": 2}}
    carry_out(changed(recipe, model__checkpoint=base, rho1={"mode": "weighted", "reference": base}, loss=one_pass))
    first, second = records(tmp_path / "tiny")
    assert first["weights/ess"] == pytest.approx(1, abs=1e-6)
    assert second["weights/ess"] < 0.999, "after a step the model differs from its reference"


def rho1(tmp_path: Path, **values: Any) -> dict[str, Any]:
    for name, steps in (("base", 1), ("other", 2)):
        carry_out(named(tmp_path, name, train__steps=steps))
    reference = {"mode": "weighted", "reference": str(tmp_path / "base" / "model")}
    return named(tmp_path, "tiny", train__algo="rho1-wmtp", rho1=reference, **values)


def aligned(tmp_path: Path, **values: Any) -> dict[str, Any]:
    recipe = named(tmp_path, "tiny", train__algo="gradient-wmtp", **values)
    shutil.copy(tmp_path / "text" / "b.py", tmp_path / "aligned.py")
    return changed(recipe, gradient={"mode": "alignment", "paths": [str(tmp_path / "aligned.py")]})


def edit(file: Path) -> None:
    """Change one letter; the number of tokens stays."""
    file.write_text(file.read_text().replace("x + 7\n", "y + 7\n"))


def text(tmp_path: Path, **values: Any) -> dict[str, Any]:
    return named(tmp_path, "tiny", **values)


def sums(tmp_path: Path, **values: Any) -> dict[str, Any]:
    return arithmetic(tmp_path, "tiny", **values)


CHANGED: dict[str, tuple[Any, Any, str]] = {
    "paths": (text, lambda p, r: r["data"].update(paths=[str(p / "text" / "b.py")]), "content.tokenizer"),
    "more paths": (text, lambda _, r: r["data"].update(paths=r["data"]["paths"] * 2), "content.data.rows"),
    "letter": (text, lambda p, _: edit(p / "text" / "a.py"), r"content\.data\.rows: '\w+' stored, '\w+' given"),
    "length": (text, lambda _, r: r["data"].update(length=16), "content.data.rows"),
    "batch_size": (text, lambda _, r: r["data"].update(batch_size=2), "content.data.batch_size: 4 stored, 2 given"),
    "aligned": (aligned, lambda p, _: edit(p / "aligned.py"), "content.aligned.rows"),
    "reference": (rho1, lambda p, r: r["rho1"].update(reference=str(p / "other" / "model")), "content.reference"),
    "sums": (sums, lambda _, r: r["data"]["arithmetic"].update(operations="+-"), "content.data.rows"),
}


@pytest.mark.parametrize("what", CHANGED)
@pytest.mark.latin(4, "what")
def test_a_run_resumes_with_the_same_content_only(tmp_path: Path, what: str) -> None:
    make, change, message = CHANGED[what]
    recipe = make(tmp_path, train__steps=2)
    carry_out(recipe)
    assert carry_out(recipe, resume=True).step == 2
    change(tmp_path, recipe)
    with pytest.raises(ValueError, match=message):
        carry_out(recipe, resume=True)


def test_another_tokenizer_with_the_same_rows_is_another_run(tmp_path: Path) -> None:
    carry_out(named(tmp_path, "base", train__steps=1))
    recipe = named(tmp_path, "tiny", model={"checkpoint": str(tmp_path / "base" / "model")}, train__steps=1)
    carry_out(recipe)
    file = tmp_path / "base" / "model" / "tokenizer.json"
    other = {"type": "Replace", "pattern": {"String": "never in the text"}, "content": "x"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": other}))
    with pytest.raises(ValueError, match=r"content\.tokenizer: '\w+' stored, '\w+' given\)"):
        carry_out(recipe, resume=True)


def test_where_content_comes_from_may_change(tmp_path: Path) -> None:
    recipe = rho1(tmp_path, train__steps=2)
    carry_out(recipe)
    shutil.copytree(tmp_path / "base" / "model", tmp_path / "moved")
    shutil.copytree(tmp_path / "text", tmp_path / "texts")
    moved = changed(recipe, rho1__reference=str(tmp_path / "moved"), data__paths=[str(tmp_path / "texts" / "a.py")])
    changed(moved, data__held_out_paths=None, eval={"rows": 3}, train__log_every=2, checkpoint={"keep_last": 1})
    assert carry_out(moved, resume=True).step == 2


def test_a_checkpoint_of_earlier_versions_resumes_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = named(tmp_path, "tiny", train__steps=2)
    carry_out(recipe)
    marker = tmp_path / "tiny" / "checkpoints" / "step-000002" / "checkpoint.json"
    stored = json.loads(marker.read_text())
    settings = {k: v for k, v in stored["configuration"].items() if not k.startswith("content.")}
    # One had another default, one was not there yet, and one is gone.
    settings |= {"model.text_config.dtype": None, "model.pad_token_id": 0}
    del settings["model.etd.adaptive_depth"]
    stored = {k: v for k, v in stored.items() if k not in ("digest", "digests")}
    marker.write_text(json.dumps({**stored, "configuration": settings}))
    metadata = marker.with_name(".metadata")
    folder = pickle.loads(metadata.read_bytes())
    folder.storage_meta = StorageMeta(checkpoint_id=marker.parent)
    metadata.write_bytes(pickle.dumps(folder))
    assert carry_out(recipe, resume=True).step == 2
    assert "of an earlier version, so these are not compared: content.data.batch_size, content.data.rows" in caplog.text
    assert "model.etd.adaptive_depth" in caplog.text
    with pytest.raises(ValueError, match=r"another configuration \(train.peak_lr: 0.0003 stored, 0.02 given\)"):
        carry_out(changed(recipe, train__peak_lr=0.02), resume=True)


def test_a_second_process_is_refused_and_disturbs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mull.runtime.storage.LOCK_PATIENCE_SECONDS", 0.1)
    recipe = named(tmp_path, "tiny")
    for resume in (False, True):
        with exclusive(tmp_path / "tiny"), pytest.raises(RuntimeError, match=r"tiny is in use by process \d+\. Wait"):
            carry_out(recipe, resume)
        assert not (tmp_path / "tiny").exists()
    elsewhere = changed(recipe, checkpoint={"url": str(tmp_path / "elsewhere")})
    with exclusive(tmp_path / "elsewhere"), pytest.raises(RuntimeError, match="elsewhere is in use by process"):
        carry_out(elsewhere)
    assert carry_out(elsewhere).stopped == "finished"
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("bytes_left", [100, 3000, 20_000], ids=["configuration", "tokenizer", "weights"])
@pytest.mark.latin(3)
def test_a_full_disk_ends_an_export_in_a_sentence_and_leaves_nothing(tmp_path: Path, bytes_left: int) -> None:
    recipe = named(tmp_path, "tiny", checkpoint={"asynchronous": False})
    real = transformers.PreTrainedModel.save_pretrained
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self: Any, folder: Path, **options: Any) -> None:
        """The operating system refuses to grow files, as on a full disk; for the tokenizer, only once the model is saved."""
        if bytes_left == 3000:
            real(self, folder, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
        if bytes_left != 3000:
            real(self, folder, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        try:
            with pytest.raises(
                RuntimeError, match=r"tiny: .*File too large.*checkpoints are intact: make room.*resume"
            ) as error:
                carry_out(recipe)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in (tmp_path / "tiny").iterdir()) == ["checkpoints", "metrics.jsonl"]
    carry_out(recipe, resume=True)
    assert weights(tmp_path / "tiny")


def test_what_a_killed_export_left_goes_at_the_next_start_and_the_users_files_stay(tmp_path: Path) -> None:
    carry_out(named(tmp_path, "tiny"))
    folder = tmp_path / "tiny"
    whole = weights(folder)
    (folder / "model" / "model.safetensors").unlink()  # `whole` is mapped from it
    (folder / "model" / "model.safetensors").write_bytes(b"damaged")
    (folder / "model" / "README.md").write_text("mine")
    (folder / "model" / ".tmpAb12cd").write_bytes(b"half a model")
    (folder / ".export" / "model").mkdir(parents=True)
    (folder / ".export" / "model" / "model.safetensors").write_bytes(b"half a model")
    with pytest.raises(ValueError, match="already holds a run"):
        carry_out(named(tmp_path, "tiny"))
    assert not (folder / ".export").exists()
    assert not (folder / "model" / ".tmpAb12cd").exists()
    carry_out(named(tmp_path, "tiny"), resume=True)
    assert (folder / "model" / "README.md").read_text() == "mine"
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(folder).items())


def test_a_model_that_is_not_finite_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blow_up(optimizers: list[torch.optim.Optimizer], *_: Any) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(math.inf)

    monkeypatch.setattr("mull.training.loop.update", blow_up)
    recipe = named(tmp_path, "tiny", train__steps=1, checkpoint={"every": 1})
    with pytest.raises(RuntimeError, match=r"after step \d: .* is not finite, so nothing of this state is saved"):
        carry_out(recipe)
    assert not (tmp_path / "tiny" / "model").exists()


def critic(tmp_path: Path, name: str, **values: Any) -> dict[str, Any]:
    recipe = named(tmp_path, name, train__algo="critic-wmtp", train__accumulate=2, train__seed=3)
    recipe["data"] = {"paths": [str(answers(tmp_path))], "format": "examples", "vocab_size": 280, "length": 32}
    return changed(recipe, critic={"pretrain": {"steps": 4, "peak_lr": 0.01}}, data__batch_size=2, **values)


def test_a_critic_is_trained_first_and_saved_with_the_model(tmp_path: Path) -> None:
    assert "  beside" in estimate_recipe(parse_recipe(critic(tmp_path, "one")))
    carry_out(critic(tmp_path, "one"))
    first, second = records(tmp_path / "one" / "critic"), records(tmp_path / "one")
    assert [record["step"] for record in first] == [1, 2, 3, 4]
    assert 0.1 < sum(record["outcome"] for record in first) / 4 < 0.9, "right and wrong answers"
    assert first[0]["lr"] == pytest.approx(0.01)
    assert len(second) == 6
    assert any(record["weights/ess"] < 0.999 for record in second)
    head = load_file(tmp_path / "one" / "model" / "value_head.safetensors")
    assert set(head) == {"inner.weight", "inner.bias", "out.weight", "out.bias"}
    assert head["out.weight"].abs().sum() > 0, "the last layer starts at zero"


def test_a_critic_resumes_in_the_stage_where_it_stopped(tmp_path: Path) -> None:
    carry_out(critic(tmp_path, "straight"))
    stopped = critic(tmp_path, "stopped", checkpoint={"every": 3})
    carry_out(stopped)
    pretraining = records(tmp_path / "stopped" / "critic")
    for left_over in ("checkpoints/step-000006", "model"):
        shutil.rmtree(tmp_path / "stopped" / left_over)
    carry_out(stopped, resume=True)
    assert_same(tmp_path / "straight", tmp_path / "stopped")
    heads = [load_file(tmp_path / name / "model" / "value_head.safetensors") for name in ("straight", "stopped")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert records(tmp_path / "stopped" / "critic") == pretraining, "the first stage was repeated"

    # Killed in the first stage, nothing of the second exists.
    for left_over in ("checkpoints", "model", "trunk", "critic/checkpoints"):
        shutil.rmtree(tmp_path / "stopped" / left_over)
    (tmp_path / "stopped" / "metrics.jsonl").unlink()
    carry_out(stopped, resume=True)
    assert_same(tmp_path / "straight", tmp_path / "stopped")


def staged(tmp_path: Path, name: str, **values: Any) -> dict[str, Any]:
    """Heads first, then everything on other text, with a sampled number of iterations and dropout."""
    recipe = named(tmp_path, name, train__seed=3, model__mtp={"num_predict_tokens": 2}, **values)
    recipe["model"]["architecture"]["attention_dropout"] = 0.2
    recipe["train"] |= {"algo": "baseline-mtp", "accumulate": 2}
    recipe["stages"] = [
        {"name": "heads", "train": {"steps": 4, "trainable": "heads", "peak_lr": 1e-2}, "eval": {"every": 2}},
        {
            "train": {"algo": "entropy"},
            "data": {"paths": [str(tmp_path / "text" / "b.py")]},
            "loss": {"heads": {"warmup_steps": 3}, "control": "shuffled"},
        },
    ]
    return changed(recipe, data__batch_size=2)


def interrupted(recipe: dict[str, Any], place: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Carry a recipe out until SIGTERM in one step of a stage."""

    def terminating(*arguments: Any, **options: Any) -> Any:
        model, objective, batches, config, folder = arguments

        def until_then(number: int) -> Any:
            if folder.name == place and number == (step - 1) * config.accumulate:
                signal.raise_signal(signal.SIGTERM)
            return batches(number)

        return train(model, objective, until_then, config, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr("mull.app.run.train", terminating)
        assert carry_out(recipe).stopped == "sigterm"


def without_clock(folder: Path) -> list[dict[str, Any]]:
    clock = {"seconds", "tokens_per_second", "mfu"}
    return [{key: value for key, value in record.items() if key not in clock} for record in records(folder)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in stages that nothing interrupted."""
    folder = tmp_path_factory.mktemp("staged")
    carry_out(staged(folder, "straight"))
    return folder / "straight"


def test_stages_run_one_after_the_other_in_one_folder(tmp_path: Path) -> None:
    recipe = staged(tmp_path, "one")
    carry_out(changed(json.loads(json.dumps(recipe)), stages=recipe["stages"][:1], run__name="first"))
    carry_out(recipe)
    folder = tmp_path / "one"
    assert [record["step"] for record in records(folder / "heads")] == [1, 2, 3, 4]
    assert ["eval_loss" in record for record in records(folder / "heads")] == [False, True, False, True]
    assert [record["step"] for record in records(folder)] == [1, 2, 3, 4, 5, 6]
    assert without_clock(folder / "heads") == without_clock(tmp_path / "first"), "the only stage is in the run's folder"
    assert (folder / "trunk").is_dir()
    assert not (folder / "heads" / "model").exists()
    first, last = weights(tmp_path / "first"), weights(folder)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], last["model.layers.0.mlp.up_proj.weight"])
    assert records(folder)[0]["weights/ess"] < 1, "the last stage has its own objective"


@pytest.mark.parametrize(
    ("place", "step"), [("heads", 2), ("heads", 4), ("stopped", 1), ("stopped", 5)], ids=["1", "border", "2", "2 late"]
)
@pytest.mark.latin(4, "step")
def test_an_interrupted_stage_resumes_bit_for_bit(
    straight: Path, tmp_path: Path, place: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = staged(tmp_path, "stopped")
    interrupted(stopped, place, step, monkeypatch)
    folders = [tmp_path / "stopped" / name for name in ("heads", "")]
    done = [len(records(folder)) for folder in folders if (folder / "metrics.jsonl").exists()]
    assert done == ([step] if place == "heads" else [4, step])
    carry_out(stopped, resume=True)
    assert_same(straight, tmp_path / "stopped")
    for name in ("heads", ""):
        assert without_clock(tmp_path / "stopped" / name) == without_clock(straight / name)


def test_a_stage_that_was_killed_at_the_border_is_not_repeated(straight: Path, tmp_path: Path) -> None:
    """After the last checkpoint of the first stage nothing of the second exists."""
    carry_out(staged(tmp_path, "stopped"))
    first = (tmp_path / "stopped" / "heads" / "metrics.jsonl").read_text()
    for left_over in ("checkpoints", "model", "trunk"):
        shutil.rmtree(tmp_path / "stopped" / left_over)
    (tmp_path / "stopped" / "metrics.jsonl").unlink()
    carry_out(staged(tmp_path, "stopped"), resume=True)
    assert_same(straight, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "heads" / "metrics.jsonl").read_text() == first


def test_a_folder_with_another_run_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    carry_out(named(tmp_path, "one", train__steps=1))
    with pytest.raises(ValueError, match="one already holds a run"):
        carry_out(staged(tmp_path, "one"))
    assert not (tmp_path / "one" / "heads").exists()


def test_a_value_head_of_one_stage_serves_another(tmp_path: Path) -> None:
    """Written out with a stage between, and with the same first stage as `critic.pretrain` makes."""
    short = critic(tmp_path, "short")
    carry_out(short)
    written = json.loads(json.dumps(short))
    train = written.pop("train")
    del written["critic"]
    written["stages"] = [
        {"name": "critic", "train": {**train, "algo": "value-head", "steps": 4, "peak_lr": 0.01}, "value_head": {}},
        {"name": "between", "train": {**train, "algo": "baseline-mtp", "steps": 2}},
        {"train": train, "critic": {}},
    ]
    carry_out(changed(written, run__name="written"))
    assert without_clock(tmp_path / "written" / "critic") == without_clock(tmp_path / "short" / "critic")
    head = load_file(tmp_path / "written" / "model" / "value_head.safetensors")
    assert head["out.weight"].abs().sum() > 0
    assert all(record["weights/ess"] < 1 for record in records(tmp_path / "written"))


def test_a_dry_run_prints_every_stage_and_what_it_trains(tmp_path: Path) -> None:
    lines = [line.split() for line in estimate_recipe(parse_recipe(staged(tmp_path, "one"))).splitlines()]
    assert [line[1:] for line in lines if line[0] == "stage"] == [["heads,", "baseline-mtp"], ["stage-2,", "entropy"]]
    first, second = [int(line[1].replace(",", "")) for line in lines if line[0] == "trainable"]
    listed = {line[1]: int(line[2].replace(",", "")) for line in lines if line[0] == "trains"}
    assert sum(listed.values()) == first < second
    assert all(name.startswith("mtp_heads.heads.*.") for name in listed)


def test_the_utilisation_counts_what_a_stage_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mull.training.loop.peak_flops", lambda device, precision: 1.0)
    carry_out(staged(tmp_path, "one"))
    costs = []
    for folder in (tmp_path / "one" / "heads", tmp_path / "one"):
        record = records(folder)[-1]
        costs.append(record["mfu"] / record["tokens_per_second"])
    table = estimate_recipe(parse_recipe(staged(tmp_path, "two"))).splitlines()
    listed = [
        float(line.split()[-1].replace(",", "")) for line in table if line.startswith("FLOPs per token, training")
    ]
    assert costs == pytest.approx(listed, rel=1e-6)
    assert costs[0] < 0.8 * costs[1]


# --- a hybrid and its teacher ---


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained teacher, and a hybrid of random weights with its tokenizer in ``student``."""
    folder = tmp_path_factory.mktemp("hybrid")
    carry_out(changed(content(folder), run__name="base", train__steps=2))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base" / "trunk")
    sizes = {name: ARCHITECTURE[name] for name in ("num_hidden_layers", "max_position_embeddings")}
    tiny("qwen3_5", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes).save_pretrained(
        folder / "student"
    )
    tokenizer.save_pretrained(folder / "student")
    return folder


def healing(hybrid: Path, name: str, **distill: Any) -> dict[str, Any]:
    """Alignment, distillation by record and a fine-tune on longer rows."""
    teacher = str(hybrid / "base" / "trunk")
    train = {"steps": 2, "precision": "fp32", "log_every": 1}
    recorded = {"teacher": teacher, "top_k": 4, "cache": str(hybrid / "cache"), **distill}
    stages = [
        {"name": "align", "train": {"algo": "align", **train}, "align": {"teacher": teacher}},
        {"name": "distill", "train": {"algo": "distill", **train}, "distill": recorded},
        {"name": "long", "train": train, "data": {"length": 64, "batch_size": 1}},
    ]
    shared = {name: section for name, section in content(hybrid).items() if name not in ("train", "loss", "model")}
    return changed({**shared, "stages": stages}, run__name=name, model__checkpoint=str(hybrid / "student"))


def test_a_hybrid_is_healed_in_three_stages_and_its_trunk_is_one_of_transformers(
    hybrid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run finds the teacher's predictions, and loads the teacher for the alignment only."""
    loaded: list[str] = []
    load = run.load_model

    def counted(section: Any, tokenizer: Any) -> Any:
        loaded.append(Path(section.checkpoint).name)
        return load(section, tokenizer)

    monkeypatch.setattr(run, "load_model", counted)
    carry_out(healing(hybrid, "first"))
    assert loaded == ["student", "trunk", "trunk"]
    carry_out(healing(hybrid, "second"))
    assert loaded[3:] == ["student", "trunk"]
    assert_same(hybrid / "first", hybrid / "second")
    aligned, distilled, tuned = (records(hybrid / "first" / name) for name in ("align", "distill", "."))
    assert {"align/0", "align/1", "align/2"} <= aligned[0].keys()
    assert "align/3" not in aligned[0], "the last layer has attention, as its teacher does"
    assert distilled[-1]["divergence"] > 0
    assert "mfu" not in aligned[0]
    assert distilled[0]["mfu"] > 0
    assert tuned[-1]["tokens"] == 2 * 64
    trained = AutoModelForCausalLM.from_pretrained(hybrid / "first" / "trunk")
    assert type(trained).__name__ == "Qwen3_5ForCausalLM"
    written = json.loads((hybrid / "first" / "trunk" / "config.json").read_text())
    for name in ("partial_rotary_factor", "rope_theta"):  # engines look for them at the top
        assert written[name] == written["rope_parameters"][name]


def recorded(hybrid: Path) -> Path:
    """A folder with the teacher's predictions of all rows."""
    cache = hybrid / "refused"
    if not cache.exists():
        carry_out(changed(healing(hybrid, "recording"), stages=[healing(hybrid, "x", cache=str(cache))["stages"][1]]))
    return cache


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 5}, "holds predictions with another top_k, 4 instead of 5: choose another folder"),
        ({"temperature": 1.0}, "holds predictions with another temperature, 2.0 instead of 1.0"),
        ({"teacher": "{folder}/student"}, "holds predictions with another teacher"),
        ({"device": "cuda:7"}, "device=cuda:7 for .*: this machine has . GPUs"),
    ],
)
def test_a_record_of_another_teacher_is_refused(hybrid: Path, values: dict[str, Any], message: str) -> None:
    cache = recorded(hybrid)
    if "device" in values:
        cache = hybrid / "none"
    values = {key: str(value).format(folder=hybrid) if key == "teacher" else value for key, value in values.items()}
    recipe = healing(hybrid, "refused-run", cache=str(cache), **values)
    recipe["stages"] = [recipe["stages"][1]]
    with pytest.raises(ValueError, match=message):
        carry_out(recipe)


def test_a_dry_run_says_what_is_recorded_and_records_nothing(hybrid: Path, tmp_path: Path) -> None:
    said = estimate_recipe(parse_recipe(healing(hybrid, "dry", cache=str(tmp_path / "cache"))))
    assert re.search(r"teacher's predictions +0 of \d+ rows recorded, .* on the disk when complete", said)
    assert re.search(r"upper bound +the whole model is counted", said)
    assert re.search(r"trains model\.layers\.\*\.linear_attn\.in_proj_qkv\.weight", said)
    assert not (tmp_path / "cache").exists()
    said = estimate_recipe(parse_recipe(healing(hybrid, "dry", cache=str(recorded(hybrid)))))
    assert re.search(r"teacher's predictions +(\d+) of \1 rows recorded", said)


def test_wrong_answers_are_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = named(tmp_path, "tiny", train__algo="baseline-mtp", train__steps=1)
    recipe["data"] = {"paths": [str(answers(tmp_path))], "format": "examples", "vocab_size": 280, "length": 32}
    carry_out(recipe)
    assert "40 of 80 answers are wrong and not trained on." in caplog.text
    (tmp_path / "wrong.jsonl").write_text('{"prompt": "a", "completion": "bcd", "outcome": 0}\n')
    with pytest.raises(ValueError, match="None of the 1 answers is right"):
        estimate_recipe(parse_recipe(changed(recipe, data__paths=[str(tmp_path / "wrong.jsonl")])))


def arithmetic(tmp_path: Path, name: str, **values: Any) -> dict[str, Any]:
    recipe = {
        "run": {"name": name, "out": str(tmp_path)},
        "model": {"architecture": dict(ARCHITECTURE)},
        "data": {"format": "arithmetic", "arithmetic": {"digits": 1, "operations": "+", "questions": 200}},
        "train": {"steps": 3, "precision": "fp32", "log_every": 1},
    }
    return changed(recipe, data__length=32, data__batch_size=4, **values)


def test_arithmetic_is_learned_from_answers_and_then_from_rewards(tmp_path: Path) -> None:
    carry_out(arithmetic(tmp_path, "base"))
    base = tmp_path / "base" / "model"
    assert 0 <= records(tmp_path / "base")[-1]["eval_right_answers"] <= 1
    tokenizer, task = AutoTokenizer.from_pretrained(base), ArithmeticTask(digits=1)
    assert tokenizer("12*34=")["input_ids"] == task.encode("12*34=")
    assert tokenizer.decode(task.encode(CHARACTERS)) == CHARACTERS
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (task.eos_id, task.pad_id)

    grpo = {"reward": "arithmetic", "group_size": 2, "max_new_tokens": 3, "kl_coef": 0.1, "reference": str(base)}
    recipe = arithmetic(tmp_path, "grpo", train__algo="grpo-wmtp", grpo=grpo)
    carry_out(changed(recipe, model={"checkpoint": str(base)}))
    log = records(tmp_path / "grpo")
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(0 <= record["reward"] <= 1 and record["completion_length"] <= 3 for record in log)
    table = estimate_recipe(parse_recipe(changed(recipe, model={"checkpoint": str(base)})))
    assert re.search(rf"^tokens per step +{4 * 2 * (4 + 3)}$", table, re.MULTILINE)

    carry_out(named(tmp_path, "text", train__steps=1))
    changed(recipe, run__name="wrong", model={"checkpoint": str(tmp_path / "text" / "model")})
    wrong = changed(recipe, grpo={"reward": "arithmetic"})
    with pytest.raises(ValueError, match="does not read arithmetic character by character"):
        carry_out(wrong)


REFUSED = [
    ({"data__paths": ["nowhere.txt"]}, FileNotFoundError, "nowhere.txt does not exist"),
    ({"data__length": 65}, ValueError, "data.length=65 exceeds the 64 positions of the model"),
    ({"model__etd__n_decoder_layers": 2}, ValueError, r"covers 5 layers, but the model has 4"),
    ({"model__etd": None}, ValueError, "think_iterations=3 needs a think block"),
    ({"model__architecture__vocab_size": 100}, ValueError, "outside the model's vocabulary of 100 tokens"),
    ({"data__batch_size": 10_000}, ValueError, "rows"),
    ({"data__format": "mbpp"}, ValueError, "MBPP has the splits"),
    (
        {"train__algo": "rho1-wmtp", "rho1": {"reference": "{other}"}},
        ValueError,
        "The reference model has a vocabulary of 97 tokens, the model one of 280",
    ),
    (
        {"train__algo": "rho1-wmtp", "rho1": {"reference": "{empty}"}},
        OSError,
        ".*empty has no config.json: give the folder",
    ),
    ({"model": {"checkpoint": "{empty}"}}, OSError, ".*empty has no config.json: give the folder"),
    ({"model": {"checkpoint": "{other}"}, "loss": {}}, ValueError, ".*other has no tokenizer: save"),
    ({"model": {"checkpoint": "{unfinished}"}, "loss": {}}, OSError, "unfinished"),
]


@pytest.mark.parametrize(("values", "error", "message"), REFUSED)
@pytest.mark.parametrize("carried_out", [True, False], ids=["run", "dry-run"])
@pytest.mark.latin(3)
def test_data_tokenizer_and_models_must_fit(
    tmp_path: Path, values: dict[str, Any], error: type[Exception], message: str, carried_out: bool
) -> None:
    places = {name: str(tmp_path / name) for name in ("other", "empty", "unfinished")}
    (tmp_path / "empty").mkdir()
    if "{other}" in str(values):
        tiny("qwen3").save_pretrained(places["other"])
    if "{unfinished}" in str(values):
        carry_out(named(tmp_path, "base", train__steps=1))
        shutil.copytree(tmp_path / "base" / "model", places["unfinished"])
        (tmp_path / "unfinished" / "model.safetensors").unlink()
    text = json.dumps(values)
    for name, place in places.items():
        text = text.replace(f"{{{name}}}", place)
    recipe = parse_recipe(changed(content(tmp_path), **json.loads(text)))
    with pytest.raises(error, match=message):
        (run_recipe if carried_out else estimate_recipe)(recipe)
    assert not (tmp_path / "tiny").exists()


def save_checkpoint(folder: Path, tokenizer: Any = None, **changes: Any) -> Path:
    """A checkpoint of transformers whose tokenizer has 300 tokens and ends texts with token 0."""
    tokenizer = tokenizer or train_tokenizer([f"{i} {i + 1}" for i in range(100)], 300)
    sizes = {"vocab_size": 300, "num_hidden_layers": 4, "bos_token_id": None, "eos_token_id": 0}
    tiny("qwen3", **{**sizes, **changes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def continued(tmp_path: Path, checkpoint: Path, **values: Any) -> Any:
    """A run of two steps from a checkpoint."""
    recipe = changed(content(tmp_path), model={"checkpoint": str(checkpoint)}, train__steps=2, loss={}, **values)
    return parse_recipe(recipe)


@pytest.mark.parametrize(("stated", "expected"), [(50, 0), ([50, 299], [0, 299]), ([7, 0], [7, 0]), (None, 0)])
def test_the_trained_model_ends_texts_where_training_did(tmp_path: Path, stated: Any, expected: Any) -> None:
    tokenizer = train_tokenizer([f"{i} {i + 1}" for i in range(100)], 299)
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 299
    run_recipe(continued(tmp_path, save_checkpoint(tmp_path / "base", tokenizer, eos_token_id=stated)))
    for place in ("model", "trunk"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny" / place)
        assert model.generation_config.eos_token_id == model.config.eos_token_id == expected


def reference_of(kind: str, folder: Path) -> dict[str, Any]:
    """The section of an algorithm that compares with the model in `folder`."""
    return {"train__algo": "rho1-wmtp", "rho1": {"reference": str(folder), "mode": kind}}


@pytest.mark.parametrize("carried_out", [True, False], ids=["run", "dry-run"])
def test_a_reference_must_have_the_tokenizer_and_may_have_another_padding(tmp_path: Path, carried_out: bool) -> None:
    base = save_checkpoint(tmp_path / "base", vocab_size=310)
    act = run_recipe if carried_out else estimate_recipe
    for size in (300, 320):
        padded = save_checkpoint(tmp_path / str(size), vocab_size=size)
        act(continued(tmp_path, base, run__name=f"padded {size}", **reference_of("weighted", padded)))
    other = save_checkpoint(tmp_path / "other", train_tokenizer(["def f(x): return x"] * 9, 300), vocab_size=310)
    shorter = save_checkpoint(tmp_path / "shorter", vocab_size=299)
    for reference, message in ((other, "another tokenizer: '.*' is token"), (shorter, "vocabulary of 299 tokens")):
        with pytest.raises(ValueError, match=message):
            act(continued(tmp_path, base, run__name="refused", **reference_of("weighted", reference)))


def test_a_penalty_may_compare_with_another_padding(tmp_path: Path) -> None:
    tokenizer, size = character_tokenizer(), ArithmeticTask().vocab_size
    base = save_checkpoint(tmp_path / "base", tokenizer, vocab_size=size, eos_token_id=None)
    padded = save_checkpoint(tmp_path / "padded", tokenizer, vocab_size=32, eos_token_id=None)
    grpo = {"reward": "arithmetic", "group_size": 2, "max_new_tokens": 3, "kl_coef": 0.1, "reference": str(padded)}
    recipe = arithmetic(tmp_path, "grpo", train__algo="grpo-wmtp", grpo=grpo)
    carry_out(changed(recipe, model={"checkpoint": str(base)}))
    assert records(tmp_path / "grpo")[-1]["kl"] > 0


def unpadded(tmp_path: Path) -> Any:
    tokenizer = train_tokenizer([f"{i} {i + 1}" for i in range(100)], 300)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return continued(tmp_path, save_checkpoint(tmp_path / "base", tokenizer))


def unpadded_configuration(tmp_path: Path) -> Any:
    return parse_recipe(changed(content(tmp_path), model__architecture__pad_token_id=280))


def unpadded_checkpoint(tmp_path: Path) -> Any:
    base = save_checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": 300}))
    return continued(tmp_path, base)


def arithmetic_without_its_tokens(tmp_path: Path) -> Any:
    return parse_recipe(arithmetic(tmp_path, "tiny", model__architecture__vocab_size=15))


def arithmetic_in_long_rows(tmp_path: Path) -> Any:
    return parse_recipe(changed(arithmetic(tmp_path, "tiny"), data__length=65))


def unsaveable(tmp_path: Path) -> Any:
    base = save_checkpoint(tmp_path / "base")
    # transformers saves such a configuration only as long as nobody changes it, and the end of texts changes.
    generation = {"eos_token_id": 50, "do_sample": False, "temperature": 0.6}
    (base / "generation_config.json").write_text(json.dumps(generation))
    return continued(tmp_path, base)


def occupied(place: str) -> Any:
    def recipe(tmp_path: Path) -> Any:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("a file")
        return parse_recipe(content(tmp_path))

    return recipe


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (unpadded, "The padding token 300 is outside the model's vocabulary of 300 tokens"),
        (unpadded_configuration, "pad_token_id=280 is outside the vocabulary of 280"),
        (unpadded_checkpoint, "pad_token_id=300 is outside the model's vocabulary of 300"),
        (arithmetic_without_its_tokens, "eos_token_id=15 is outside the vocabulary of 15"),
        (arithmetic_in_long_rows, "data.length=65 exceeds the 64 positions"),
        (unsaveable, "The trained model could not be saved: .*temperature"),
        (occupied("tiny"), "could not be written to .*tiny/model"),
        (occupied("tiny/model"), "could not be written to .*tiny/model"),
        (occupied("tiny/trunk"), "could not be written to .*tiny/trunk"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("carried_out", [True, False], ids=["run", "dry-run"])
def test_what_would_fail_at_the_end_is_refused_before_the_first_step(
    tmp_path: Path, recipe: Any, message: str, carried_out: bool
) -> None:
    checked = recipe(tmp_path)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        (run_recipe if carried_out else estimate_recipe)(checked)
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_a_dry_run_says_what_the_run_then_takes_and_writes_nothing(tmp_path: Path) -> None:
    recipe = changed(
        content(tmp_path), train__algo="baseline-mtp", model__mtp={"num_predict_tokens": 1}, train__accumulate=2
    )
    before = sorted(tmp_path.rglob("*"))
    table = dict(
        line.split("  ", 1) for line in estimate_recipe(parse_recipe(recipe)).replace("\n  ", "\n").splitlines()
    )
    assert sorted(tmp_path.rglob("*")) == before
    result = carry_out(recipe)
    rows = {name.strip(): value.strip() for name, value in table.items()}
    n_parameters = sum(tensor.numel() for tensor in weights(tmp_path / "tiny").values())
    assert rows["parameters"] == f"{n_parameters:,}"
    assert rows["tokens per step"] == f"{result.tokens // 6:,}"
    assert rows["steps"] == "6"
    n_bytes = 4 * n_parameters
    stored = sum(file.stat().st_size for file in (tmp_path / "tiny").rglob("*.distcp"))
    exported = {name: (tmp_path / "tiny" / name / "model.safetensors").stat().st_size for name in ("model", "trunk")}
    listed = {name: float(rows[name].split()[-2].replace(",", "")) * 1024 for name in ("checkpoints", *exported)}
    assert rows["checkpoints"].startswith("1 of ")
    n_tensors = len(stored_tensors(str(tmp_path / "tiny" / "checkpoints" / "step-000006")))
    assert 0 < stored - listed.pop("checkpoints") < 4096 * n_tensors, "torch writes a header with each tensor"
    assert listed == pytest.approx(exported, rel=0.1)
    assert rows["weights"] in {f"{n_bytes / 1024:,.1f} KiB", f"{(n_bytes + 2 * 8 * 4) / 1024:,.1f} KiB"}
    assert "TFLOP/s per rank" in rows["time at full use of the peak"]


def test_what_a_user_may_not_expect_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mull.training.optimization.torch.cpu.get_capabilities", dict)
    carry_out(
        named(tmp_path, "base", train__algo="baseline-mtp", model__mtp={}, train__precision="bf16", train__steps=1)
    )
    base = {"checkpoint": str(tmp_path / "base" / "model")}
    carry_out(named(tmp_path, "plain", model=base, train__steps=1))
    carry_out(named(tmp_path, "bare", train__algo="baseline-mtp", train__steps=1))
    said = [record.getMessage() for record in caplog.records if record.name == "mull.app.run"]
    assert said == [
        "cpu emulates bf16, slower than it computes fp32: train.precision=auto would choose fp32.",
        "The model's 4 extra heads are kept and not trained: train.algo=next-token.",
        "The model has no extra heads (model.mtp), so baseline-mtp is next-token prediction.",
    ]


def test_weights_have_the_type_that_the_recipe_says(tmp_path: Path) -> None:
    carry_out(named(tmp_path, "half", model__dtype="bf16", train__steps=1))
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.bfloat16}
    recipe = named(tmp_path, "full", train__steps=1, model={"checkpoint": str(tmp_path / "half" / "model")})
    carry_out(recipe)
    assert {tensor.dtype for tensor in weights(tmp_path / "full").values()} == {torch.float32}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowLog(sqlite_uri(folder), "mull", "template", folder / "id", parameters={}, tags={}).close()
    return folder / "mlflow.db"


def test_mlflow_follows_a_run_through_its_end_and_its_resumption(template: Path, tmp_path: Path) -> None:
    shutil.copy(template, tmp_path / "mlflow.db")
    client = mlflow.MlflowClient(tracking_uri=sqlite_uri(tmp_path))
    recipe = changed(content(tmp_path), tracking={"mlflow": True}, run__tags={"team": "a"}, checkpoint={"every": 4})
    carry_out(recipe)
    run_id = (tmp_path / "tiny" / "mlflow-run-id").read_text().strip()
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["team"]) == ("FINISHED", "tiny", "a")
    assert run.data.params["train.steps"] == "6"
    assert run.data.params["model.architecture.hidden_size"] == "32"

    def history(name: str) -> list[int]:
        return sorted(metric.step for metric in client.get_metric_history(run_id, name))

    assert history("loss") == [1, 2, 3, 4, 5, 6]
    assert history("eval_loss") == [6]

    with pytest.raises(ValueError, match="already holds a run"):
        carry_out(recipe)
    assert client.get_run(run_id).info.status == "FINISHED", "a refused start is not part of the run"

    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / "step-000006")
    carry_out(recipe, resume=True)
    assert history("loss") == [1, 2, 3, 4, 5, 6]


def test_mlflow_notes_a_run_that_fails(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(template, tmp_path / "mlflow.db")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("mull.app.run.train", fail)
    with pytest.raises(RuntimeError, match="broken"):
        carry_out(changed(content(tmp_path), tracking={"mlflow": True}))
    run_id = (tmp_path / "tiny" / "mlflow-run-id").read_text().strip()
    assert mlflow.MlflowClient(tracking_uri=sqlite_uri(tmp_path)).get_run(run_id).info.status == "FAILED"


def test_mlflow_that_cannot_be_reached_stops_a_run_before_its_first_step(tmp_path: Path) -> None:
    recipe = changed(content(tmp_path), tracking={"mlflow": True, "uri": "http://127.0.0.1:1"})
    with pytest.raises(RuntimeError, match=r"MLflow at http://127\.0\.0\.1:1 cannot be used"):
        carry_out(recipe)
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_held_out_losses_are_those_of_every_head() -> None:
    etd = ETDConfig(n_encoder_layers=2, n_think_layers=4, n_decoder_layers=2)
    model = wrap_transformer_with_etd(tiny("qwen3"), etd, MTPConfig(num_predict_tokens=2, mtp_head_type="mlp"))
    assert model.mtp_heads is not None
    for head in model.mtp_heads.heads:
        torch.nn.init.normal_(head.proj.weight)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (5, 30, 2, 21, 9, 13)]
    packed = pack_tokens(documents, length=16, pad_id=0)
    sums, counts = [0.0] * 3, [0] * 3
    for document in _rows(packed):
        hidden = model.hidden_states(document[None], think_iterations=3)
        for k in range(3):
            states = hidden if k == 0 else model.mtp_heads(k, hidden, None, lambda _block, h, _k: h)
            targets = document[1 + k :]
            logits = model.lm_head(states)[0, : len(targets)]
            sums[k] += F.cross_entropy(logits, targets, reduction="sum").item()
            counts[k] += len(targets)
    found = held_out_losses(model, packed, 3, batch_size=2)
    expected = {"loss": 0, "head1_loss": 1, "head2_loss": 2}
    assert found == pytest.approx({name: sums[k] / counts[k] for name, k in expected.items()}, rel=1e-5)
    assert held_out_loss(model, packed, 3, batch_size=3) == pytest.approx(found["loss"], rel=1e-6)
    assert held_out_losses(model, packed, 3, max_rows=2) != found


def _rows(packed: Any) -> list[torch.Tensor]:
    """The documents of packed rows, one by one, padding left out."""
    found = []
    for ids, positions, labels in zip(packed.input_ids, packed.position_ids, packed.labels, strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        for first, last in itertools.pairwise(starts):
            if (labels[first:last] >= 0).any():
                found.append(ids[first:last])
    return found


@pytest.mark.slow
def test_torchrun_does_the_same_training_as_one_process(tmp_path: Path) -> None:
    etd = {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 1}
    recipe = critic(tmp_path, "one", model__mtp={"num_predict_tokens": 1}, model__etd=etd, train__steps=4)
    recipe["data"]["held_out_paths"] = recipe["data"]["paths"]
    recipe["eval"] = {"rows": 5}  # three batches: one rank has none in the last round
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    carry_out(recipe)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mull", "train"]
    overrides = ["--set", "run.name=two", "--set", "checkpoint.every=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "recipe.yaml"), *overrides], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 4 steps") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    names = ("loss", "eval_loss", "eval_head1_loss")
    for name in names:
        assert records(tmp_path / "two")[-1][name] == pytest.approx(records(tmp_path / "one")[-1][name], rel=1e-4)


@pytest.mark.slow
def test_torchrun_runs_stages_that_train_different_parts(tmp_path: Path) -> None:
    """A value head from the second stage on: ranks shard it with the model in the first."""
    recipe = critic(tmp_path, "one", model__mtp={"num_predict_tokens": 1})
    shared = recipe["train"]
    recipe["train"] = {**shared, "steps": 2}
    del recipe["critic"]
    recipe["stages"] = [
        {"name": "heads", "train": {"algo": "baseline-mtp", "trainable": "heads"}},
        {"name": "value", "train": {"algo": "value-head", "peak_lr": 0.01}, "value_head": {}},
        {"train": {"trainable": ["model.layers.[23].*", "mtp_heads.*"]}, "critic": {}},
    ]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    carry_out(recipe)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mull", "train"]
    overrides = ["--set", "run.name=two", "--set", "distributed.reshard_after_forward=false"]
    done = subprocess.run(
        [*command, str(tmp_path / "recipe.yaml"), *overrides], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    for place in ("heads", "value", ""):
        for here, there in zip(
            without_clock(tmp_path / "one" / place), without_clock(tmp_path / "two" / place), strict=True
        ):
            assert there == pytest.approx(here, rel=1e-3)
