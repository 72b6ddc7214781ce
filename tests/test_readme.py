"""Claim: the README is short, its program does what its comments say, its commands exist, and the recipes are valid.

That all programs in README and documentation run, and that files and names in them exist, is in test_docs.py.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mull.app.recipe import load_recipe, parse_recipe
from mull.app.yaml_text import read_yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_WORDS = 700


def test_it_is_short() -> None:
    assert len(README.split()) <= MAX_WORDS


def test_the_program_does_what_its_comments_say(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_the_recipe_is_valid() -> None:
    written = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert written is not None
    recipe = parse_recipe(read_yaml(written[1], "README.md", ()))
    assert f"mull train {recipe.run.name}.yaml" in README


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_the_tree_names_every_folder_of_the_source() -> None:
    named = re.findall(r"^  (\w+)/ ", README, re.MULTILINE)
    folders = {path.name for path in (ROOT / "src" / "mull").iterdir() if (path / "__init__.py").exists()}
    assert len(named) == len(set(named))
    assert set(named) == folders


@pytest.mark.parametrize("recipe", sorted((ROOT / "runs").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_valid(recipe: Path) -> None:
    assert load_recipe(recipe).run.name == recipe.stem
