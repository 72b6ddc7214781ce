"""What the README and the page on generation show is true: programs run and do what they say, commands and files exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny

from mull.app.recipe import load_recipe
from mull.data.tokenizer import train_tokenizer
from mull.model.configs import ETDConfig, MTPConfig
from mull.retrofit.wrap import wrap_transformer_with_etd

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_program_runs_and_does_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert program is not None
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(program[1], "README.md", "exec"), names)
    once, four = capsys.readouterr().out.strip().split("\n")
    base, prompt = names["base"], names["prompt"]
    assert once == str(base.generate(prompt, max_new_tokens=8))
    assert once != four
    etd = names["model"].etd_config
    assert (etd.n_encoder_layers, etd.n_think_layers, etd.n_decoder_layers) == (7, 4, 5)


def test_the_programs_about_generation_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "how-to" / "generate.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(programs) >= 7
    tokenizer = train_tokenizer(["def fib(n):\n    return n\n", "class Stack:\n    pass\n", "import os\n"], 270)
    model = wrap_transformer_with_etd(
        tiny("qwen3", vocab_size=len(tokenizer), num_hidden_layers=6, eos_token_id=0),
        ETDConfig(n_encoder_layers=2, n_think_layers=2, n_decoder_layers=2, max_think_iterations=4),
        MTPConfig(num_predict_tokens=3, mtp_head_type="mlp"),
    )
    names: dict[str, Any] = {"model": model, "tokenizer": tokenizer}
    monkeypatch.chdir(tmp_path)
    for program in programs:
        exec(compile(program, "generate.md", "exec"), names)
    assert tokenizer.decode(names["ids"][0]) in capsys.readouterr().out


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"`?((?:tests|runs|benchmarks|docs)/[\w/.-]+\.\w+)", README))
    assert len(named) >= 6
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("recipe", sorted((ROOT / "runs").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_valid(recipe: Path) -> None:
    assert load_recipe(recipe).run.name == recipe.stem
