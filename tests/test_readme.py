"""What the README shows is true: its program runs, one iteration prints the base model's text, its commands and files exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mull.recipe import load_recipe

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
