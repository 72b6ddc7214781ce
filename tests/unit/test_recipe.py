"""A recipe is read strictly: what is wrong is one sentence that names the key; what is right trains, saves and resumes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import mull
from mull.recipe import load_recipe, parse_recipe, run_recipe


def content(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    text = tmp_path / "text"
    text.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (text / f"{name}.py").write_text("".join(f"def {name}{i}(x):\n    return x + {i}\n\n\n" for i in range(60)))
    return {
        "run": {"name": "tiny", "out": str(tmp_path)},
        "model": {
            "architecture": {
                "model_type": "qwen3",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "max_position_embeddings": 64,
            },
            "etd": {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 1, "max_think_iterations": 2},
        },
        "data": {
            "paths": [str(text / "a.py")],
            "held_out_paths": [str(text / "b.py")],
            "vocab_size": 280,
            "length": 32,
            "batch_size": 4,
        },
        "loss": {"iterations": {"kind": "uniform", "maximum": 3}},
        "train": {"steps": 6, "precision": "fp32", "log_every": 1},
        **sections,
    }


def changed(tmp_path: Path, key: str, value: Any) -> dict[str, Any]:
    recipe = content(tmp_path)
    *sections, last = key.split(".")
    place = recipe
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return recipe


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.peek_lr", 1e-4, "unknown key train.peek_lr. Did you mean train.peak_lr?"),
        ("data.lenght", 3, "unknown key data.lenght. Did you mean data.length?"),
        ("loss.iterations.maximun", 3, "unknown key loss.iterations.maximun. Did you mean loss.iterations.maximum?"),
        ("trian", {}, "unknown key trian. Did you mean train?"),
        ("run.zzz", 1, "unknown key run.zzz. Known are name, out."),
        ("train.steps", "many", "train.steps='many': Input should be a valid integer"),
        ("train.max_seconds", 3, "train: steps=6 and max_seconds=3.0: give exactly one"),
        ("model.checkpoint", "x", "model: give either checkpoint or architecture"),
        (
            "model.architecture",
            {"model_type": "gpt2"},
            "architecture.model_type='gpt2' is not supported; supported are llama",
        ),
        ("data.vocab_size", 10, "data.vocab_size=10: Input should be greater than or equal to 257"),
        ("model.etd.n_think_layers", 0, "model.etd.n_think_layers=0"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared below
        parse_recipe(changed(tmp_path, key, value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    recipe = content(tmp_path)
    del recipe["train"]
    with pytest.raises(ValueError, match="the key train is missing"):
        parse_recipe(recipe)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content(tmp_path)))
    recipe = load_recipe(file, ["train.peak_lr=1e-4", "data.length=16", "loss.iterations={kind: fixed, maximum: 2}"])
    assert recipe.train.peak_lr == 1e-4
    assert recipe.data.length == 16
    assert recipe.loss.iterations.kind == "fixed"
    for override, message in {
        "train.steps": "lacks a value",
        "train.steps.more=3": "goes through steps, which is a value",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_recipe(file, [override])


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no recipe at"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold sections such as run, model and train, but holds list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_a_recipe_trains_and_its_model_loads_everywhere(tmp_path: Path) -> None:
    result = run_recipe(parse_recipe(content(tmp_path)))
    assert result.step == 6
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["eval_loss"] > 0
    folder = tmp_path / "tiny" / "model"
    model = mull.from_pretrained(str(folder))
    assert model.etd_config is not None
    assert model.etd_config.max_think_iterations == 2
    tokens = AutoTokenizer.from_pretrained(folder)("def a1(x):", return_tensors="pt")["input_ids"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, model(tokens).logits)

    again = content(tmp_path, run={"name": "again", "out": str(tmp_path)}, model={"checkpoint": str(folder)})
    assert run_recipe(parse_recipe(again)).step == 6
    assert mull.from_pretrained(str(tmp_path / "again" / "model")).etd_config == model.etd_config


def test_a_recipe_resumes_where_it_stopped(tmp_path: Path) -> None:
    straight = content(tmp_path, run={"name": "straight", "out": str(tmp_path)})
    run_recipe(parse_recipe(straight))
    stopped = content(
        tmp_path, run={"name": "stopped", "out": str(tmp_path)}, train={**straight["train"], "save_every": 4}
    )
    run_recipe(parse_recipe(stopped))
    checkpoints = sorted((tmp_path / "stopped").glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-000004", "step-000006"]
    for file in checkpoints[1].iterdir():
        file.unlink()
    checkpoints[1].rmdir()
    run_recipe(parse_recipe(stopped), resume=True)
    one, two = (mull.from_pretrained(str(tmp_path / name / "model")) for name in ("straight", "stopped"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("data.paths", ["nowhere.txt"], FileNotFoundError, "nowhere.txt does not exist"),
        ("data.length", 65, ValueError, "data.length=65 exceeds the 64 positions of the model"),
        ("model.etd.n_decoder_layers", 2, ValueError, r"covers 5 layers, but the model has 4"),
        ("model.architecture.vocab_size", 100, ValueError, "outside the model's vocabulary of 100 tokens"),
        ("data.batch_size", 10_000, ValueError, "rows"),
    ],
)
def test_data_tokenizer_and_model_must_fit(
    tmp_path: Path, key: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_recipe(parse_recipe(changed(tmp_path, key, value)))
