"""The command: every verb does its work, and a user's mistake is one line on standard error and exit code 2."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from conftest import tiny
from recipes import changed, content
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen3Config

import mull
from mull import ETDConfig, LayerRouterConfig, MTPConfig, wrap_transformer_with_etd
from mull.app import cli
from mull.data.route_labels import read_labels
from mull.data.tokenizer import train_tokenizer
from mull.decoding.generate import generate
from mull.evaluation.search.route_report import RouteReport
from mull.evaluation.search.routes import BestRoute
from mull.retrofit.native_heads import export_native_heads

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(200))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint with its tokenizer, as a user has it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer([TEXT], 300)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_an_error_shows_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = changed(content(tmp_path), tracking={"mlflow": True, "uri": "http://ann:s3cret@127.0.0.1:1"})
    for wrong in ({}, {"checkpoint": {"url": "ftpx://ann:s3cret@host/x"}}, {"tracking__uri": "nope://ann:s3cret@host"}):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(changed(recipe, **wrong)))
        monkeypatch.setattr(sys, "argv", ["mull", "train", str(tmp_path / "recipe.yaml")])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        shown = capsys.readouterr()
        assert "***@" in shown.err
        assert "s3cret" not in shown.err + shown.out


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mull", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_generate_continues_the_prompt_alike_at_any_time(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", checkpoint, "--prompt", "def f1(x):", "--max-new-tokens", 8, "--etd", "2,2,2"]
    outputs = []
    for more in (
        [],
        [],
        ["--think-iterations", 3],
        ["--temperature", 1.0, "--seed", 1],
        ["--temperature", 1.0, "--seed", 2],
        ["--temperature", 1.0, "--seed", 1],
    ):
        assert run(monkeypatch, *arguments, *more) == 0
        outputs.append(capsys.readouterr().out)
    assert all(output.startswith("def f1(x):") for output in outputs)
    assert outputs[0] == outputs[1]
    assert outputs[3] == outputs[5]
    assert len(set(outputs)) == 4


def test_generate_reads_a_prompt_as_training_did_and_ends_where_training_ends(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a template that begins and ends a text, and a generation config that ends texts elsewhere."""
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    special = [("begin", 5), ("<|endoftext|>", 0)]
    template = TemplateProcessing("begin $A <|endoftext|>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert AutoTokenizer.from_pretrained(tmp_path)("def").input_ids[-1] == 0, "the tokenizer should append an end"
    calls = []

    def observed(model: object, input_ids: torch.Tensor, **options: object) -> object:
        calls.append((input_ids.tolist(), options["eos_token_id"]))
        return generate(model, input_ids, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("mull.app.commands.generate.generate", observed)
    assert run(monkeypatch, "generate", tmp_path, "--prompt", "def<|endoftext|>", "--max-new-tokens", 4) == 0
    [([ids], ends)] = calls
    assert ids[0] == 5
    assert 0 not in ids
    assert tokenizer.decode(ids[1:]) == "def<|endoftext|>"
    assert ends == [0]


def test_generate_drafts_the_same_text_and_says_what_it_took(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    wrap_transformer_with_etd(base, None, MTPConfig(num_predict_tokens=2, mtp_head_type="mlp")).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    arguments = ["generate", tmp_path, "--prompt", "def f1(x):", "--max-new-tokens", 20, "--stats"]
    told = []
    for more in ([], ["--draft", "mtp", "--draft-length", 2], ["--draft", "mtp"], ["--draft", "mtp", "--compile"]):
        if more[-1:] == ["--compile"]:
            monkeypatch.setattr(torch, "compile", lambda run, **options: run)
        assert run(monkeypatch, *arguments, *more) == 0
        told.append(capsys.readouterr())
    assert len({each.out for each in told}) == 1, "drafts change the text"
    plain, fixed = told[0].err, told[1].err
    assert "position" not in plain
    assert re.search(r"^rounds +19 \(19 with 0 drafts\)$", plain, re.MULTILINE)
    rows = [
        [int(cell) for cell in row]
        for row in re.findall(r"^ +(\d) +(\d+) +(\d+) +(\d+) +[\d.]+%$", fixed, re.MULTILINE)
    ]
    assert [row[0] for row in rows] == [1, 2]
    rounds = re.search(r"^rounds +(\d+) ", fixed, re.MULTILINE)
    assert rounds is not None
    assert rows[1][1] >= int(rounds[1]) - 2, "only the end of the text leaves no room for two drafts"
    for _, drafted, tested, accepted in rows:
        assert drafted >= tested >= accepted
    assert rows[1][2] == rows[0][3], "the second draft is tested where the first was accepted"


def test_generate_drafts_with_the_native_heads_of_a_base_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    base = tiny("qwen3_5", vocab_size=len(tokenizer))
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    heads = MTPConfig(num_predict_tokens=1, mtp_head_type="native")
    export_native_heads(wrap_transformer_with_etd(base, None, heads), tmp_path)
    arguments = ["generate", tmp_path, "--prompt", "def f1(x):", "--max-new-tokens", 8]
    assert run(monkeypatch, *arguments) == 0
    plain = capsys.readouterr().out
    assert run(monkeypatch, *arguments, "--mtp", "native", "--draft", "mtp", "--draft-length", 2, "--stats") == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain
    assert re.search(r"^ +2 +\d+ +\d+ +\d+ +[\d.]+%$", drafted.err, re.MULTILINE)

    text = f"text={checkpoint / 'text.txt'}"
    measure = ["eval", tmp_path, "--suite", "per-head-analysis", "--data", text, "--length", 32, "--limit", 1]
    assert run(monkeypatch, *measure, "--out", tmp_path / "without") == 2
    assert "per-head-analysis needs extra heads" in capsys.readouterr().err
    arguments = [*measure, "--mtp", "native", "--max-new-tokens", 4, "--out", tmp_path / "with"]
    assert run(monkeypatch, *arguments) == 0
    assert "top-1, head 1" in capsys.readouterr().out


def test_calibrate_measures_and_stores_a_threshold(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    split = ETDConfig(n_encoder_layers=2, n_think_layers=2, n_decoder_layers=2, max_think_iterations=3)
    saved = tmp_path / "model"
    wrap_transformer_with_etd(base, split).save_pretrained(saved)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(saved)
    arguments = [
        "calibrate",
        saved,
        "--data",
        checkpoint / "text.txt",
        "--length",
        32,
        "--rows",
        4,
        "--out",
        tmp_path / "out",
    ]
    assert run(monkeypatch, *arguments) == 2
    assert "Give either" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--target-iterations", 2) == 0
    printed = capsys.readouterr().out
    stored = json.loads((saved / "config.json").read_text())["etd"]
    assert stored["adaptive_depth"] is True
    assert stored["halting"]["rule"] == "state"
    assert f"chosen: state at {stored['halting']['threshold']:.6g}" in printed
    found = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert found["halting"] == stored["halting"]
    assert "<svg" in (tmp_path / "out" / "calibration.html").read_text()
    call = ["generate", saved, "--prompt", "def f1(x):", "--max-new-tokens", 8, "--stats"]
    assert run(monkeypatch, *call) == 0
    assert "on average, at most 3 (tokens by iterations:" in capsys.readouterr().err
    assert run(monkeypatch, *call, "--no-adaptive") == 0
    assert "on average" not in capsys.readouterr().err


def test_split_measures_and_proposes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "split",
        checkpoint,
        "--data",
        checkpoint / "text.txt",
        "--out",
        tmp_path,
        "--length",
        32,
        "--batches",
        2,
        "--probe-batches",
        1,
        "--width",
        2,
    ]
    assert run(monkeypatch, *arguments) == 0
    printed, told = capsys.readouterr()
    assert told.startswith("split: at most ")
    assert "standard error" in printed
    report = json.loads((tmp_path / "split.json").read_text())
    assert len(report["distances"]) == 6
    assert {(window["stop"] - window["start"], window["n_rows"]) for window in report["probe"]} == {(2, 4)}
    etd = report["etd"]
    assert etd["n_encoder_layers"] + etd["n_think_layers"] + etd["n_decoder_layers"] == 6
    assert f"Proposed split {etd['n_encoder_layers']}-{etd['n_think_layers']}*k-{etd['n_decoder_layers']}" in printed
    parts = [etd[f"n_{part}_layers"] for part in ("encoder", "think", "decoder")]
    assert "{} layers encode, {} think, k times, and {} decode.".format(*parts) in printed
    assert "--etd {},{},{};".format(*parts) in printed
    recipe = re.search(r"model\.etd: (\{.*?\});", printed)
    assert recipe
    assert ETDConfig(**yaml.safe_load(recipe[1])) == ETDConfig(**etd)
    assert "<svg" in (tmp_path / "split.html").read_text()


def test_train_runs_a_recipe(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "run": {"name": "tiny", "out": str(tmp_path)},
        "model": {
            "checkpoint": str(checkpoint),
            "etd": {"n_encoder_layers": 2, "n_think_layers": 2, "n_decoder_layers": 2},
        },
        "data": {"paths": [str(checkpoint / "text.txt")], "length": 32, "batch_size": 2},
        "train": {"steps": 9, "precision": "fp32"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(monkeypatch, "train", tmp_path / "recipe.yaml", "--set", "train.steps=2") == 0
    first, *places = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"finished after 2 steps, .* loss \d\.\d{{4}}: {tmp_path / 'tiny'}", first)
    assert [Path(line.split(": ")[0].strip()).relative_to(tmp_path) for line in places] == [
        Path("tiny", name) for name in ("model", "trunk", "checkpoints")
    ]
    assert (tmp_path / "tiny" / "model" / "model.safetensors").exists()

    again = ["train", tmp_path / "recipe.yaml", "--set", "train.steps=2"]
    with monkeypatch.context() as stopped:
        stopped.setattr("mull.training.objectives.next_token.NextToken.loss", Mock(side_effect=KeyboardInterrupt))
        assert run(stopped, *again, "--set", "run.name=other") == 130
    assert (
        f"--resume continues from the newest checkpoint in {tmp_path / 'other' / 'checkpoints'}"
        in capsys.readouterr().out
    )
    assert run(monkeypatch, *again) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run(monkeypatch, *again, "--set", "train.peak_lr=1", "--resume") == 2
    error = capsys.readouterr().err
    assert "another configuration (train.peak_lr: 0.0003 stored, 1.0 given)" in error
    assert error.count("\n") == 1


def test_a_dry_run_prints_what_it_would_take_and_trains_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(checkpoint / "text.txt")
    recipe = {
        "run": {"name": "tiny", "out": str(tmp_path)},
        "model": {"checkpoint": str(checkpoint)},
        "data": {"paths": [text], "length": 32, "batch_size": 2},
        "train": {"steps": 9, "accumulate": 2, "precision": "fp32"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(monkeypatch, "train", tmp_path / "recipe.yaml", "--dry-run") == 0
    printed = capsys.readouterr().out
    n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    for line in (rf"^parameters +{n_parameters:,}$", "^tokens per step +128$", "^steps +9$", "^memory per rank +.*iB$"):
        assert re.search(line, printed, re.MULTILINE), printed
    assert not (tmp_path / "tiny").exists()
    wrong = ["train", tmp_path / "recipe.yaml", "--dry-run", "--set", "data.length=65"]
    assert run(monkeypatch, *wrong) == 2
    assert "data.length=65 exceeds the 64 positions of the model" in capsys.readouterr().err


def test_versions_are_printed_for_bug_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    assert re.fullmatch(rf"mull \S+, torch {re.escape(torch.__version__)}, transformers \S+\n", capsys.readouterr().out)


def test_the_schema_of_recipes_is_printed_for_editors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["anyOf"] == [{"required": ["train"]}, {"required": ["stages"]}]
    assert schema["additionalProperties"] is False


def test_of_several_ranks_the_first_one_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(monkeypatch, "train", tmp_path / "none.yaml") == 2
    assert capsys.readouterr().err.startswith("mull train (rank 1): There is no recipe at")
    monkeypatch.setattr("mull.app.commands.train.estimate_recipe", lambda recipe: "a table")
    (tmp_path / "recipe.yaml").write_text("run: {name: a}\nmodel: {checkpoint: b}\ntrain: {steps: 1}\n")
    assert run(monkeypatch, "train", tmp_path / "recipe.yaml", "--dry-run") == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert run(monkeypatch, "train", tmp_path / "recipe.yaml", "--dry-run") == 0
    assert capsys.readouterr().out == "a table\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{dir}/none", "--prompt", "x"], "none"),
        (["generate", "{dir}", "--prompt", ""], "The prompt is empty"),
        (["generate", "{bare}", "--prompt", "x"], "bare has no tokenizer: save the model's own beside it"),
        (["split", "{bare}", "--data", "{dir}/text.txt"], "bare has no tokenizer"),
        (
            ["generate", "out/none/model", "--prompt", "x"],
            "There is no model at out/none/model. The run none writes it",
        ),
        (["generate", "s3://bucket/model", "--prompt", "x"], "cannot be read as a model"),
        (["generate", "{dir}/text.txt", "--prompt", "x"], "is a file: give the folder that holds config.json"),
        (
            ["generate", "{dir}", "--prompt", "x", "--seed", "-1", "--temperature", "1"],
            "Invalid value for '--seed'",
        ),
        (
            ["split", "{dir}", "--data", "{dir}/text.txt", "--batches", "0"],
            "Invalid value for '--batches'",
        ),
        (["generate", "{dir}", "--prompt", "x", "--max-new-tokens", "100"], "exceed the model's 64 positions"),
        (
            ["generate", "{dir}", "--prompt", "x", "--etd", "7,4,5"],
            "covers 16 layers, but the model has 6. A split that fits is",
        ),
        (["generate", "{dir}", "--prompt", "x", "--etd", "7-4-5"], "must be three numbers of layers"),
        (
            ["generate", "{dir}", "--prompt", "x", "--max-new-tokens", "5", "--think-iterations", "2"],
            "think_iterations=2 needs a think block",
        ),
        (
            ["generate", "{dir}", "--prompt", "x", "--temperature", "-1"],
            "temperature=-1.0: Input should be greater than or equal to 0",
        ),
        (
            ["generate", "{dir}", "--prompt", "x", "--max-new-tokens", "5", "--top-k", "5"],
            "top_k would have no effect: temperature=0 is greedy",
        ),
        (
            ["generate", "{dir}", "--prompt", "x", "--max-new-tokens", "5", "--draft", "mtp"],
            "this model has none. Leave it out",
        ),
        (["generate", "{dir}", "--prompt", "x", "--max-new-tokens", "5", "--draft", "mtp"], "with --mtp native (mtp="),
        (
            ["generate", "{dir}", "--prompt", "x", "--max-new-tokens", "5", "--draft", "other"],
            "Invalid value for '--draft'",
        ),
        (
            ["generate", "{dir}", "--prompt", "x", "--max-new-tokens", "5", "--draft-length", "2"],
            "draft_length=2 needs draft='mtp' (--draft mtp)",
        ),
        (
            ["generate", "{dir}", "--prompt", "x", "--max-new-tokens", "5", "--mtp", "native"],
            "Leave --mtp out to decode",
        ),
        (["generate", "{dir}", "--prompt", "x", "--think-iteration", "2"], "No such option"),
        (["generate", "{dir}"], "Missing option"),
        (["generate", "{gpt2}", "--prompt", "x"], "Architecture 'gpt2' is not supported. Supported are llama"),
        (["generate", "{other}", "--prompt", "x"], "The tokenizer has 300 tokens, the model 97"),
        (["split", "{dir}", "--data", "{dir}/none.txt"], "none.txt does not exist"),
        (
            ["split", "{dir}", "--data", "{dir}/text.txt", "--length", "65"],
            "--length 65 exceeds the model's 64 positions",
        ),
        (["split", "{dir}", "--data", "{empty}"], "There is no text in"),
        (["split", "{other}", "--data", "{dir}/text.txt"], "outside the model's vocabulary of 97"),
        (["train", "{dir}/none.yaml"], "There is no recipe at"),
        (["train", "{typo}"], "unknown key train.peek_lr. Did you mean train.peak_lr?"),
        (["nonsense"], "No such command"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "dir": checkpoint,
        "gpt2": tmp_path / "gpt2",
        "empty": tmp_path / "empty.txt",
        "other": tmp_path / "other",
    }
    places["typo"] = tmp_path / "typo.yaml"
    places["empty"].write_text("  \n")
    places["typo"].write_text("run: {name: a}\nmodel: {checkpoint: b}\ntrain: {steps: 1, peek_lr: 1}\n")
    if "{gpt2}" in arguments:
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=17)).save_pretrained(places["gpt2"])
    places["bare"] = tmp_path / "bare"
    if "{bare}" in arguments:
        tiny("qwen3").save_pretrained(places["bare"])
    if "{other}" in arguments:
        tiny("qwen3").save_pretrained(places["other"])
        train_tokenizer([TEXT], 300).save_pretrained(places["other"])
    capsys.readouterr()  # bars of transformers, which the first command of a process turns off
    assert run(monkeypatch, *(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert "Traceback" not in error
    if not error.startswith("Usage"):
        assert error.startswith(f"mull {arguments[0]}: ")
        assert error.count("\n") == 1


def test_the_installed_command_refuses_without_a_traceback(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "mull"
    done = subprocess.run([command, "train", tmp_path / "none.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"mull train: There is no recipe at {tmp_path}/none.yaml.\n"


def test_routes_labels_questions_goes_on_where_it_stopped_and_finds_one_route_for_all(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task, labels, route = tmp_path / "task.jsonl", tmp_path / "new" / "labels.jsonl", tmp_path / "route.json"
    records = [
        {"prompt": f"def f{i}(x):\n    return x +", "choices": [" 1", " 2", " x"], "label": i % 3} for i in range(6)
    ]
    task.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["routes", checkpoint, "--task", task, "--simulations", 8, "--out", labels]
    assert run(monkeypatch, *arguments, "--max-examples", 4) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^ *questions +right +of these plain right +mean visits$", printed, re.MULTILINE)
    assert f"Written to {labels}." in printed
    first = labels.read_text()
    assert run(monkeypatch, *arguments) == 0
    assert labels.read_text().startswith(first), "finished questions stay as they are"
    capsys.readouterr()
    settings, found = read_labels(labels)
    assert settings["simulations"] == 8
    assert [label.index for label in found] == [*range(6)]
    assert all(len(label.route) == 6 and label.visits == sum(label.route) for label in found)
    assert [label.answer for label in found[:3]] == [" 1", " 2", " x"]
    assert run(monkeypatch, *arguments, "--seed", 1) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"mull routes: {labels} was written with other settings (seed): give them again, or another file."
    )
    elsewhere = tmp_path / "copy"
    shutil.copytree(checkpoint, elsewhere)
    assert run(monkeypatch, "routes", elsewhere, *arguments[2:]) == 2
    assert "other settings (model)" in capsys.readouterr().err
    for method in ("greedy", "evolution"):
        more = ["--corpus", method, "--max-visits", 5, "--simulations", 60]
        assert run(monkeypatch, "routes", checkpoint, "--task", task, "--out", route, *more) == 0
        printed = capsys.readouterr().out
        best = BestRoute.model_validate_json(route.read_text())
        assert sum(best.found.route) <= 5
        assert re.search(rf"^ *{method} +{sum(best.found.route)} +{best.found.loss:.4f} ", printed, re.MULTILINE)
        assert str(list(best.found.route)) in printed.splitlines()[-1]
    assert run(monkeypatch, "routes", checkpoint, "--task", tmp_path / "none.jsonl") == 2
    assert "does not exist" in capsys.readouterr().err
    assert run(monkeypatch, "routes", checkpoint, "--report", labels) == 2
    assert "no layer routers" in capsys.readouterr().err
    assert run(monkeypatch, "routes", checkpoint, "--report", labels, "--task", task) == 2
    assert "Give --task to search routes, or --report" in capsys.readouterr().err


def test_routes_reports_what_trained_routers_decide(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    router = LayerRouterConfig(hidden_size=8, scope="all")
    etd = ETDConfig(
        n_encoder_layers=2, n_think_layers=2, n_decoder_layers=2, layer_router=router, router_warmup_steps=0
    )
    mull.from_pretrained(checkpoint, etd=etd).save_pretrained(tmp_path / "routed")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "routed")
    task, labels, report = tmp_path / "task.jsonl", tmp_path / "labels.jsonl", tmp_path / "new" / "report.json"
    task.write_text("".join(json.dumps({"prompt": f"def f{i}(", "answer": "x):"}) + "\n" for i in range(4)))
    search = ["--labeller", "loss", "--scope", "all", "--simulations", 8, "--out", labels]
    assert run(monkeypatch, "routes", checkpoint, "--task", task, *search) == 0
    assert "train routers on the labels (train.algo: routing)" in capsys.readouterr().out
    more = ["--report", labels, "--max-examples", 3, "--out", report]
    assert run(monkeypatch, "routes", tmp_path / "routed", *more) == 0
    printed = capsys.readouterr().out
    found = RouteReport.model_validate_json(report.read_text())
    assert found.n_questions == 3
    assert f"3 questions: macro-F1 {found.agreement.macro_f1:.4f}, accuracy {found.agreement.accuracy:.4f}" in printed
    for name, cost in found.costs.items():
        assert re.search(rf"^ *{name} +{cost.visits:.4f} +{cost.loss:.4f} ", printed, re.MULTILINE)
    assert found.costs["routers"] == found.costs["plain"], "new routers execute"


def test_convert_says_what_became_of_the_tensors(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hybrid"
    assert run(monkeypatch, "convert", checkpoint, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "5 of 6 layers are Gated DeltaNet: 0, 1, 2, 4, 5." in shown
    counts = re.findall(r"^ *(copied|derived|fresh) +(\d+) ", shown, re.MULTILINE)
    assert sum(int(count) for _, count in counts) == len(AutoModelForCausalLM.from_pretrained(out).state_dict())
    assert "SGLang" not in shown
    assert run(monkeypatch, "generate", out, "--prompt", "def f1(x):", "--max-new-tokens", 4) == 0
    assert run(monkeypatch, "convert", checkpoint, "--out", out) == 2
    assert "exists: give a new folder" in capsys.readouterr().err


def test_convert_takes_patterns_and_layers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (arguments, said) in enumerate(
        {
            ("--pattern", "none"): "0 of 6 layers are Gated DeltaNet: none.",
            ("--pattern", "0/2"): "3 of 6 layers are Gated DeltaNet: 0, 2, 4.",
            ("--layers", "5,1", "--dtype", "bf16"): "SGLang would misread this layout",
            ("--layers", "0", "--gate", "ones"): "attention_bias is true",
        }.items()
    ):
        assert run(monkeypatch, "convert", checkpoint, "--out", tmp_path / str(number), *arguments) == 0
        assert said in capsys.readouterr().out
    for arguments, said in {
        ("--pattern", "0,1"): "must be places and a period, such as 0,1,2/4",
        ("--pattern", "0,4/4"): "must be different numbers from 0 to 3",
        ("--layers", "0,x"): "must be numbers of layers, such as 0,1,2,4",
        ("--layers", "6"): "layers has 6, and the source has layers 0 to 5",
        ("--layers", "0", "--pattern", "0/2"): "not both",
    }.items():
        assert run(monkeypatch, "convert", checkpoint, "--out", tmp_path / "none", *arguments) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_eval_measures_and_compares(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"text={checkpoint / 'text.txt'}"
    options = [
        "--suite",
        "token-accuracy",
        "--suite",
        "perplexity",
        "--data",
        text,
        "--length",
        32,
        "--layers",
        "0,1,1,2,3,4,5",
    ]
    for name in ("a", "b"):
        assert run(monkeypatch, "eval", checkpoint, *options, "--out", tmp_path / name) == 0
        assert f"report: {tmp_path / name / 'report.md'}" in capsys.readouterr().out
    settings = json.loads((tmp_path / "a" / "perplexity" / "results.json").read_text())["settings"]
    assert settings["path"] == [0, 1, 1, 2, 3, 4, 5]
    assert run(monkeypatch, "eval", "--compare", tmp_path / "a", tmp_path / "b") == 0
    assert "nats per token, main head" in capsys.readouterr().out
    with monkeypatch.context() as stopped:
        stopped.setattr("mull.evaluation.suites.table.text_losses", Mock(side_effect=KeyboardInterrupt))
        arguments = ["--suite", "perplexity", "--data", text, "--out", tmp_path / "c"]
        assert run(stopped, "eval", checkpoint, *arguments) == 130
    assert f"Interrupted. The same command continues in {tmp_path / 'c'}." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give MODEL and --suite to evaluate a model, or --compare A B for two results."),
        (["model", "--compare", "a", "b"], "or --compare A B for two results."),
        (["model", "--suite", "perplexity", "--data", "text.txt"], "--data text.txt must name a suite and a source"),
        (["model", "--suite", "perplexity", "--layers", "0,²"], "--layers 0,² must be numbers of layers"),
        (["model", "--suite", "perplexityy"], "There is no suite perplexityy. Did you mean"),
        (["model"], "No suite was given"),
    ],
)
def test_eval_refuses_in_one_sentence(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "eval", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("is_safe", [True, False])
def test_sandbox_doctor_has_an_exit_code(
    is_safe: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("mull.app.commands.evaluate.sandbox_doctor", lambda weak: asked.append(list(weak)) or is_safe)
    assert run(monkeypatch, "sandbox", "doctor", "--allow-weak-sandbox", "seccomp") == (0 if is_safe else 1)
    assert asked == [["seccomp"]]
