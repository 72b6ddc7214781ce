"""Claim: a checkpoint brings data only. Its code does not run and nobody is asked; a damaged file is named in one sentence."""

import ast
import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file
from test_floors import ROOT

import mull
from mull.app import cli
from mull.app.recipe import parse_recipe
from mull.app.run import estimate_recipe
from mull.data.tokenizer import train_tokenizer
from mull.retrofit.native_heads import export_native_heads
from mull.retrofit.reading import read_config, read_tokenizer
from mull.retrofit.wrap import wrap_transformer_with_etd

CODE = """
from pathlib import Path
Path({witness!r}).touch()
from transformers import {base}
class Theirs({base}):
    model_type = "theirs"
"""


def save(folder: Path) -> Path:
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"], 270)
    base = tiny("qwen3", vocab_size=len(tokenizer), num_hidden_layers=2, eos_token_id=0)
    base.save_pretrained(folder / "base")
    wrap_transformer_with_etd(base, None).save_pretrained(folder / "mull")
    for name in ("base", "mull"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A pipe that says yes to every question."""
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr(sys, "stdin", answers)
    return answers


def with_code(folder: Path) -> tuple[Path, Path, Path]:
    """A checkpoint whose configuration is code, one whose tokenizer is, and the file that the code would make."""
    save(folder)
    witness = folder / "ran"
    for name, base in (("base", "Qwen3Config"), ("mull", "TokenizersBackend")):
        (folder / name / "theirs.py").write_text(CODE.format(witness=str(witness), base=base))
    theirs = {"AutoConfig": "theirs.Theirs", "AutoModelForCausalLM": "theirs.Theirs"}
    change(folder / "base" / "config.json", model_type="theirs", auto_map=theirs)
    change(
        folder / "mull" / "tokenizer_config.json",
        tokenizer_class="Theirs",
        auto_map={"AutoTokenizer": [None, "theirs.Theirs"]},
    )
    return folder / "base", folder / "mull", witness


CALLS: dict[str, Callable[[str], Any]] = {
    "from_pretrained": mull.from_pretrained,
    "read_config": read_config,
    "read_tokenizer": read_tokenizer,
    "recipe": lambda folder: estimate_recipe(
        parse_recipe({"run": {"name": "x"}, "model": {"checkpoint": folder}, "data": {}, "train": {"steps": 1}})
    ),
    "export": lambda folder: export_native_heads(
        wrap_transformer_with_etd(tiny("qwen3_5"), None, mull.MTPConfig(mtp_head_type="native", num_predict_tokens=1)),
        folder,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_code_of_a_checkpoint_does_not_run_and_nobody_is_asked(name, tmp_path, yes):
    configured, tokenizing, witness = with_code(tmp_path)
    message = r"base brings Python code of its own, which mull does not run.*trust_remote_code=True"
    with pytest.raises(ValueError, match=message) if name != "read_tokenizer" else contextlib.nullcontext():
        CALLS[name](str(configured))
    with contextlib.suppress(ValueError):  # transformers may have a class of its own that reads the tokenizer
        CALLS[name](str(tokenizing))
    assert yes.tell() == 0, "standard input was read"
    assert not witness.exists()


@pytest.mark.parametrize("command", [["split"], ["generate", "--prompt", "def"]])
def test_the_command_line_says_so_in_a_line(command, tmp_path, yes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mull", command[0], str(with_code(tmp_path)[0]), *command[1:]])
    capsys.readouterr()  # transformers shows how it saves
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "brings Python code of its own" in line
    assert yes.tell() == 0
    assert not (tmp_path / "ran").exists()


def test_code_runs_when_it_is_asked_for_by_name(tmp_path):
    configured, _, witness = with_code(tmp_path)
    with pytest.raises(ValueError, match="theirs"):
        mull.from_pretrained(str(configured), trust_remote_code=True)
    assert witness.exists()


def test_no_other_module_reads_a_checkpoint_without_saying_so():
    found = []
    for file in (ROOT / "src" / "mull").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                if node.func.attr == "from_pretrained" and owner.startswith("Auto"):
                    said = {keyword.arg for keyword in node.keywords} & {"trust_remote_code", None}
                    found += [] if said else [f"{file.name}:{node.lineno}"]
    assert found == []


@pytest.mark.parametrize("content", ["", "half", "[1]", "\0" * 3000, "nonsense"], ids=repr)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["base", "mull"])
def test_a_damaged_file_is_named_in_one_sentence(saved, tmp_path, kind, name, content):
    for file in (saved / kind).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content.encode())
    for call in (mull.from_pretrained, read_tokenizer) if name != "model.safetensors" else (mull.from_pretrained,):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: .*\. Fetch it again\.$") as error:
            call(str(tmp_path))
        assert "\n" not in str(error.value)


def test_a_foreign_file_is_said_in_one_sentence(saved, tmp_path):
    for file in (saved / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match=r"has a file that transformers cannot read: KeyError"):
        read_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["base", "mull"])
@pytest.mark.parametrize("change", ["foreign", "missing", "shapes"])
def test_weights_of_another_model_are_refused(saved, tmp_path, kind, change):
    for file in (saved / kind).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(saved / kind / "model.safetensors")
    wrong = {
        "foreign": {"theirs": torch.zeros(3)},
        "missing": {name: value for name, value in weights.items() if "layers.1.mlp.up" not in name},
        "shapes": {name: torch.cat([value, value]) for name, value in weights.items()},
    }[change]
    save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
    message = "weights of other shapes than its" if change == "shapes" else r"lacks \d+ of the weights .* such as \w+\."
    with pytest.raises(ValueError, match=rf"{message}.*[Ff]etch it again\.$"):
        mull.from_pretrained(str(tmp_path), allow_missing=False)


def test_whole_ones_load(saved):
    for kind in ("base", "mull"):
        assert mull.from_pretrained(str(saved / kind))(torch.tensor([[1, 2]])).logits.shape[:2] == (1, 2)
        assert read_tokenizer(str(saved / kind))("def")["input_ids"]
