"""`mull eval` in Python: suites on a tiny checkpoint, resumed, compared, reported, and refused with a reason."""

import copy
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    CanineTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mull import ETDConfig, MTPConfig, wrap_transformer_with_etd
from mull.app.evaluate import compare, run_evaluation
from mull.app.report.evaluation_page import markdown_table
from mull.data.tokenizer import TextEncoder, train_tokenizer
from mull.evaluation.sandbox import Verdict, check_sandbox
from mull.evaluation.suites.results import code_scores, compare_results, keep_settings, read_result
from mull.evaluation.suites.statistics import exact_interval
from mull.evaluation.suites.subject import Request, tokenizer_digest, weights_digest
from mull.evaluation.suites.table import sample_notes
from mull.runtime import storage

SPLIT = ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1)
TEXTS = ["def add(a, b):\n    return a + b\n", "class A:\n    pass\n", "import os\n"] * 30
PROMPTS = ["def add(a, b):\n", "def one():\n", "def two(x):\n    '''2 x'''\n"]
pytestmark = pytest.mark.filterwarnings("default")
pytest_plugins = ["s3_server"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 290)


class FakePool:
    """Programs of even length pass."""

    def __init__(self, workers: int, **_: Any) -> None:
        self.n = 0

    def __enter__(self) -> "FakePool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, program: str, tests: Any, *, timeout: float) -> Any:
        passed = len(program) % 2 == 0

        class Done:
            def result(self) -> Verdict:
                return Verdict(passed, "passed" if passed else "wrong answer", "", 0.0, int(passed), 1, float(passed))

        return Done()


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two checkpoints, and problems in the form of HumanEval."""
    monkeypatch.setattr("mull.evaluation.suites.grading.Pool", FakePool)
    monkeypatch.setattr("mull.evaluation.suites.table.check_sandbox", lambda _: None)
    for name, seed, mtp in (("one", 0, None), ("two", 1, MTPConfig(num_predict_tokens=2, mtp_head_type="mlp"))):
        base = tiny("llama", seed=seed, vocab_size=len(tokenizer), num_hidden_layers=4, eos_token_id=0)
        wrap_transformer_with_etd(base, SPLIT, mtp).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [
        {"task_id": f"HumanEval/{i}", "prompt": text, "entry_point": "f", "test": "def check(f): assert f\n"}
        for i, text in enumerate(PROMPTS)
    ]
    with gzip.open(tmp_path / "problems.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "text.txt").write_text("".join(TEXTS[:30]))
    return tmp_path


def request(folder: Path, **changes: Any) -> Request:
    data = {"humaneval": str(folder / "problems.jsonl.gz"), "text": str(folder / "text.txt")}
    return Request(**{"data": data, "max_new_tokens": 12, "batch_size": 4, "length": 32, **changes})


def test_several_suites_leave_results_a_report_and_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suites = ["humaneval", "token-accuracy", "per-head-analysis", "perplexity"]
    asked = request(folder, samples=4, temperatures=(0.6, 1.0), k=(1, 3))
    found = run_evaluation(str(folder / "two"), suites, folder / "out", asked, command="mull eval two")
    assert [*found] == suites
    code = found["humaneval"]
    assert [*code.scores] == [
        "pass@1 at T=0.6",
        "pass@1 at T=1",
        "pass@1, oracle over temperatures",
        "pass@3 at T=0.6",
        "pass@3 at T=1",
        "pass@3, oracle over temperatures",
    ]
    for k in (1, 3):
        rates = [code.scores[f"pass@{k} at T={t}"].value for t in ("0.6", "1")]
        assert code.scores[f"pass@{k}, oracle over temperatures"].value == max(rates)
    assert code.settings["draft_length"] == 1, "a model with heads drafts"
    assert code.settings["chat"] is False
    for name in suites:
        assert read_result(folder / "out" / name) == found[name]
    report = (folder / "out" / "report.md").read_text()
    assert "no model that is used has this score" in report
    for figure in ("humaneval-temperatures", "per-head-analysis-reliability", "per-head-analysis-acceptance"):
        assert f"({'figures'}/{figure}.svg)" in report
        assert (folder / "out" / "figures" / f"{figure}.svg").read_text().startswith("<svg")
    assert {"agreement, head 1", "agreement, head 2", "drafts"} <= found["per-head-analysis"].acceptance.keys()
    assert "bits_per_byte" in capsys.readouterr().out


def test_passes_with_the_weaker_proof_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Weak(FakePool):
        def submit(self, program: str, tests: Any, *, timeout: float) -> Any:
            self.n += 1
            verdict = Verdict(self.n > 1, "passed", "", 0.0, 1, 1, 1.0, "outside" if self.n == 2 else "inside")
            return type("Done", (), {"result": lambda _: verdict})()

    monkeypatch.setattr("mull.evaluation.suites.grading.Pool", Weak)
    for _ in range(2):  # the second time from the stored verdicts
        (folder / "out" / "humaneval" / "results.json").unlink(missing_ok=True)
        found = run_evaluation(str(folder / "one"), ["humaneval"], folder / "out", request(folder))["humaneval"]
        [note] = [note for note in found.notes if "proof" in note]
        assert note.startswith("1 of 2 passes has the weaker proof")
        assert note.endswith("(HumanEval/2).")
        assert note in (folder / "out" / "report.md").read_text()
    lines = (folder / "out" / "humaneval" / "verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line)["proof"] for line in lines] == ["inside", "outside", "inside"]


@pytest.mark.parametrize(
    ("n", "named"), [(0, None), (5, "(p0, p1, p2, p3, p4)"), (7, "(p0, p1, p2, p3, p4 and 2 more)")]
)
def test_only_the_first_problems_are_named(n: int, named: str | None) -> None:
    records = [{"problem": f"p{i}", "finish": "end"} for i in range(9) for _ in range(2)]
    verdicts = [
        {"problem": each["problem"], "reason": "passed", "passed": True, "proof": "inside" if i < 2 * n else "outside"}
        for i, each in enumerate(records)
    ]
    notes = [note for note in sample_notes(records, verdicts) if "proof" in note]
    assert [note.split(" have")[0] for note in notes] == ([f"{2 * n} of 18 passes"] if n else [])
    assert all(str(named) in note for note in notes)


def test_numbers_need_no_proof(folder: Path) -> None:
    asked = request(
        folder, data={"gsm8k": gsm8k(folder / "test.jsonl", 5), "gsm8k-train": gsm8k(folder / "train.jsonl", 5)}
    )
    [found] = run_evaluation(str(folder / "one"), ["gsm8k"], folder / "out", asked).values()
    assert not [note for note in found.notes if "proof" in note]


def test_a_run_that_was_interrupted_gives_the_same_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(folder, samples=4, temperatures=(0.6,))
    whole = run_evaluation(str(folder / "two"), ["humaneval"], folder / "whole", asked)
    # The second verdict is never written, and neither are the last samples.
    calls = 0

    class Dies(FakePool):
        def submit(self, program: str, tests: Any, *, timeout: float) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return super().submit(program, tests, timeout=timeout)

    monkeypatch.setattr("mull.evaluation.suites.grading.Pool", Dies)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(str(folder / "two"), ["humaneval"], folder / "killed", asked)
    samples = folder / "killed" / "humaneval" / "samples.jsonl"
    content = samples.read_bytes()
    samples.write_bytes(content[: len(content) // 2])
    monkeypatch.setattr("mull.evaluation.suites.grading.Pool", FakePool)
    again = run_evaluation(str(folder / "two"), ["humaneval"], folder / "killed", asked)
    assert samples.read_bytes() == content
    for name in ("results.json", "samples.jsonl", "settings.json"):
        one, other = (folder / run / "humaneval" / name for run in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes()
    assert again == whole


def test_problems_and_texts_may_lie_in_s3(folder: Path, bucket: str) -> None:
    local = request(folder)
    for source in local.data.values():
        file = Path(source)
        with storage.open_stream(storage.join(bucket, file.name), "wb") as copy:
            copy.write(file.read_bytes())
    remote = request(
        folder, data={suite: storage.join(bucket, Path(source).name) for suite, source in local.data.items()}
    )
    suites = ["humaneval", "token-accuracy"]
    here, there = (
        run_evaluation(str(folder / "one"), suites, folder / name, asked)
        for name, asked in (("here", local), ("there", remote))
    )
    assert [result.scores for result in here.values()] == [result.scores for result in there.values()]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    settings = {"suite": "mbpp", "temperatures": (0.2,), "seed": 0}
    keep_settings(tmp_path, {**settings, "seed": 1})
    keep_settings(tmp_path, settings)  # nothing has been made with the others
    (tmp_path / "samples-rank0.jsonl").touch()
    keep_settings(tmp_path, settings)
    with pytest.raises(
        ValueError, match=r"has samples with temperatures=\[0.2\], and now it is \[0.3\]: give the same"
    ):
        keep_settings(tmp_path, {**settings, "temperatures": (0.3,)})
    with pytest.raises(ValueError, match="seed=0, and now it is null"):
        keep_settings(tmp_path, {name: value for name, value in settings.items() if name != "seed"})


@pytest.mark.parametrize("content", [None, "[]", '{"torn'])
def test_samples_without_settings_are_refused(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").touch()
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings.json is missing or damaged, so nobody knows"):
        keep_settings(tmp_path, {"seed": 0})


def test_the_hash_of_weights_sees_each_element_and_its_place() -> None:
    layer = torch.nn.Linear(8, 8)
    layer.register_buffer("bias_of_experts", torch.zeros(3))
    found = {weights_digest(layer)}
    with torch.no_grad():
        for change in (layer.weight.neg_, lambda: layer.weight.copy_(layer.weight.flip(0)), layer.bias_of_experts.add_):
            change(*[1] * (change == layer.bias_of_experts.add_))
            found.add(weights_digest(layer))
    assert len(found) == 4


def test_a_finished_suite_is_not_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, suites = request(folder), ["perplexity", "token-accuracy"]
    first = run_evaluation(str(folder / "one"), suites[:1], folder / "out", asked, command="first")
    with monkeypatch.context() as patch:
        patch.setattr("mull.evaluation.suites.table.text_losses", lambda *_, **__: pytest.fail("it was measured again"))
        second = run_evaluation(str(folder / "one"), suites, folder / "out", asked, command="second")
    assert second["perplexity"] == first["perplexity"]
    report = (folder / "out" / "report.md").read_text()
    assert report.index("`first`") < report.index("`second`")
    (folder / "text.txt").write_text("other text\n" * 40)
    with pytest.raises(ValueError, match="has a result with digest="):
        run_evaluation(str(folder / "one"), suites, folder / "out", asked)


def test_a_missing_layer_is_told_before_anything_is_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mull.evaluation.suites.table.check_sandbox", check_sandbox)
    monkeypatch.setattr("mull.evaluation.sandbox.missing_layers", lambda: {"seccomp": "there is no libseccomp"})
    with pytest.raises(RuntimeError, match="The sandbox lacks seccomp on this machine"):
        run_evaluation(str(folder / "one"), ["humaneval"], folder / "out", request(folder))
    assert not (folder / "out" / "humaneval").exists()
    run_evaluation(str(folder / "one"), ["humaneval"], folder / "out", request(folder, allow_weak=("seccomp",)))


def test_all_suites_are_checked_before_the_first_one_runs(folder: Path) -> None:
    with pytest.raises(ValueError, match="per-head-analysis needs extra heads"):
        run_evaluation(str(folder / "one"), ["perplexity", "per-head-analysis"], folder / "out", request(folder))
    assert not (folder / "out" / "perplexity").exists()


def test_other_tests_of_the_same_prompts_are_refused(folder: Path) -> None:
    asked = request(folder, limit=2)
    run_evaluation(str(folder / "one"), ["humaneval"], folder / "out", asked)
    file = folder / "problems.jsonl.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b"assert f", b"assert 0")))
    with pytest.raises(ValueError, match="has samples with digest="):
        run_evaluation(str(folder / "one"), ["humaneval"], folder / "out", asked)


def gsm8k(file: Path, n: int, answer: str = "1 + 1 = 2\n#### 2") -> str:
    file.write_text("".join(json.dumps({"question": f"1 + {i}?", "answer": answer}) + "\n" for i in range(n)))
    return str(file)


def mbpp(file: Path, code: str) -> str:
    row = {"text": "One.", "test_list": ["assert f() == 1"], "code": code}
    file.write_text("".join(json.dumps({**row, "task_id": number}) + "\n" for number in (2, 3, 4, 11)))
    return str(file)


def test_other_examples_of_the_prompt_are_refused(folder: Path) -> None:
    model, test = str(folder / "one"), gsm8k(folder / "test.jsonl", 2)
    shown = [gsm8k(folder / f"train-{i}.jsonl", 5, f"It is 2.\n#### {i}") for i in range(2)]
    for suite, name, sources in (
        ("gsm8k", "examples", [{"gsm8k": test, "gsm8k-train": file} for file in shown]),
        ("mbpp", "digest", [{"mbpp": mbpp(folder / f"mbpp-{i}.jsonl", f"def f():\n    return {i}")} for i in range(2)]),
    ):
        one, other = (request(folder, data=data) for data in sources)
        run_evaluation(model, [suite], folder / "a", one)
        with pytest.raises(ValueError, match=f"has samples with {name}="):
            run_evaluation(model, [suite], folder / "a", other)
        run_evaluation(model, [suite], folder / "b", other)
        with pytest.raises(ValueError, match=f"The results have {name}="):
            compare(folder / "a" / suite, folder / "b" / suite)


def test_a_checkpoint_without_a_think_block_gets_one(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=4, eos_token_id=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    plain = run_evaluation(str(folder / "base"), ["perplexity"], folder / "plain", request(folder))
    once, twice = (
        run_evaluation(
            str(folder / "base"), ["perplexity"], folder / f"k{k}", request(folder, etd=SPLIT, think_iterations=k)
        )
        for k in (1, 2)
    )
    assert once["perplexity"].scores == plain["perplexity"].scores
    assert twice["perplexity"].scores != plain["perplexity"].scores
    [found] = compare(folder / "k1", folder / "k2").values()
    assert found["nats per token"].difference.value != 0
    for changes, message in (
        ({"think_iterations": 2}, "needs a think block, and this model has none"),
        ({"layers": (0, 99)}, "99"),
    ):
        with pytest.raises(ValueError, match=message):
            run_evaluation(str(folder / "base"), ["lm_eval:no-such-task"], folder / "no", request(folder, **changes))


def test_a_second_process_is_kept_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOCK_PATIENCE_SECONDS", 0.1)
    with storage.exclusive(folder / "out"), pytest.raises(RuntimeError, match="is in use by process"):
        run_evaluation(str(folder / "one"), ["perplexity"], folder / "out", request(folder))


def test_other_weights_under_the_same_name_are_refused(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    run_evaluation(str(folder / "one"), ["humaneval"], folder / "out", request(folder))
    base = tiny("llama", seed=7, vocab_size=len(tokenizer), num_hidden_layers=4, eos_token_id=0)
    wrap_transformer_with_etd(base, SPLIT).save_pretrained(folder / "one")
    with pytest.raises(ValueError, match="has samples with weights="):
        run_evaluation(str(folder / "one"), ["humaneval"], folder / "out", request(folder))


def edit(file: Path, **changes: Any) -> None:
    """Change fields of a JSON file; a dotted name is one inside another."""
    content = json.loads(file.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = content
        for each in outer:
            place = place[each]
        place[last] = value
    file.write_text(json.dumps(content))


def swap_tokens(file: Path) -> None:
    vocabulary = json.loads(file.read_text())["model"]["vocab"]
    edit(file, model__vocab=vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]})


OTHER_MODELS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "norm": ("config", lambda place: edit(place / "config.json", text_config__rms_norm_eps=0.1)),
    "split": ("config", lambda place: edit(place / "config.json", etd__max_think_iterations=3)),
    "vocabulary": ("tokenizer", lambda place: swap_tokens(place / "tokenizer.json")),
    "class": ("tokenizer", lambda place: edit(place / "tokenizer_config.json", add_prefix_space=True)),
    "template": (
        "tokenizer",
        lambda place: (place / "chat_template.jinja").write_text("{{ messages[0].content }}") and None,
    ),
    "end": ("end_tokens", lambda place: edit(place / "generation_config.json", eos_token_id=[0, 5])),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_another_model_with_the_same_weights_is_refused(case: str, folder: Path) -> None:
    name, change = OTHER_MODELS[case]
    asked = request(folder, chat=False)
    run_evaluation(str(folder / "one"), ["humaneval", "token-accuracy"], folder / "out", asked)
    change(folder / "one")
    for suite, there in (("humaneval", "samples"), ("token-accuracy", "a result")):
        with pytest.raises(ValueError, match=f"has {there} with {name}="):
            run_evaluation(str(folder / "one"), [suite], folder / "out", asked)


def test_models_that_differ_in_all_of_this_are_compared(folder: Path) -> None:
    asked = request(folder, chat=False)
    run_evaluation(str(folder / "one"), ["humaneval"], folder / "out", asked)
    for _, change in OTHER_MODELS.values():
        change(folder / "one")
    run_evaluation(str(folder / "one"), ["humaneval"], folder / "other", asked)
    assert compare(folder / "out", folder / "other")


def test_what_changes_no_sample_is_not_refused(folder: Path) -> None:
    first = run_evaluation(str(folder / "one"), ["humaneval"], folder / "out", request(folder))
    edit(folder / "one" / "generation_config.json", temperature=0.3, do_sample=True, repetition_penalty=9.0)
    edit(folder / "one" / "config.json", transformers_version="5.0.0")
    edit(folder / "one" / "tokenizer_config.json", name_or_path="elsewhere")
    assert run_evaluation(str(folder / "one"), ["humaneval"], folder / "out", request(folder)) == first
    for engine in ("mull", "transformers"):
        asked = request(folder, engine=engine, draft_length=0)
        run_evaluation(str(folder / "one"), ["humaneval"], folder / engine, asked)
    files = [folder / run / "humaneval" / "samples.jsonl" for run in ("out", "mull", "transformers")]
    assert len({file.read_bytes() for file in files}) == 1


def test_a_setting_that_was_given_explains_more_than_a_hash(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=4, eos_token_id=0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    run_evaluation(str(folder / "base"), ["perplexity"], folder / "out", request(folder))
    with pytest.raises(ValueError, match="has a result with etd="):
        run_evaluation(str(folder / "base"), ["perplexity"], folder / "out", request(folder, etd=SPLIT))


@pytest.mark.parametrize("kind", [ByT5Tokenizer, pytest.param(CanineTokenizer, marks=pytest.mark.slow), None])
def test_the_hash_of_a_tokenizer_is_that_of_what_it_does(
    kind: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    one: Any = copy.deepcopy(tokenizer) if kind is None else kind()
    one.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = (AutoTokenizer.from_pretrained(tmp_path / name) for name in "ab")
    before = tokenizer_digest(first)
    assert tokenizer_digest(second) == before
    TextEncoder(first).prompts(["<|endoftext|>"])
    assert tokenizer_digest(first) == before
    first("abc", padding="max_length", truncation=True, max_length=9)
    assert tokenizer_digest(first) == before, "whatever was asked last"
    first.chat_template = "{{ messages }}"
    changed = {before, tokenizer_digest(first)}
    first.chat_template = {"default": "{{ messages }}", "tool": "{{ tools }}"}
    changed.add(tokenizer_digest(first))
    first.add_tokens(["<new>"])
    changed.add(tokenizer_digest(first))
    first.add_tokens(["<newer>"], special_tokens=True)
    changed.add(tokenizer_digest(first))
    assert len(changed) == 5


@pytest.mark.slow
def test_the_hashes_are_the_same_in_every_process(folder: Path) -> None:
    program = (
        "import sys, torch; from mull.evaluation.suites.subject import Request, load_subject\n"
        "print(load_subject(sys.argv[1], Request(), torch.device('cpu')).facts(Request()))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program, str(folder / "two")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "01"
    }
    assert len(found) == 1
    assert "tokenizer" in found.pop()


def test_transformers_writes_the_same_samples(folder: Path) -> None:
    asked = {"samples": 3, "temperatures": (0.8,), "draft_length": 0}
    files = []
    for engine in ("mull", "transformers"):
        run_evaluation(str(folder / "two"), ["humaneval"], folder / engine, request(folder, engine=engine, **asked))
        files.append((folder / engine / "humaneval" / "samples.jsonl").read_bytes())
    assert files[0] == files[1]
    compared = compare(folder / "mull", folder / "transformers")
    [found] = compared.values()
    assert found["pass@1"].difference.value == 0


def test_an_architecture_that_mull_lacks_is_evaluated_by_transformers(
    folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = CONFIG_MAPPING["gpt2"](
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    asked = request(folder, samples=2, temperatures=(1.0,))
    found = run_evaluation(str(folder / "gpt2"), ["humaneval", "token-accuracy", "perplexity"], folder / "out", asked)
    assert found["humaneval"].settings["engine"] == "transformers"
    assert found["perplexity"].scores["token_perplexity"].value > 1
    with pytest.raises(ValueError, match="think_iterations is for models of mull, and it has none like"):
        run_evaluation(str(folder / "gpt2"), ["humaneval"], folder / "x", request(folder, think_iterations=2))
    with pytest.raises(ValueError, match="per-head-analysis needs extra heads, and .* has none: take token-accuracy"):
        run_evaluation(str(folder / "gpt2"), ["per-head-analysis"], folder / "x", asked)


def test_two_models_are_compared_on_the_same_problems(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        run_evaluation(str(folder / name), ["humaneval", "perplexity"], folder / f"out-{name}", request(folder))
    capsys.readouterr()
    found = compare(folder / "out-one", folder / "out-two")
    assert len(found) == 2
    shown = capsys.readouterr().out
    assert "McNemar p" in shown
    assert "A is" in shown
    loss = next(each for name, each in found.items() if "perplexity" in name)["nats per token"]
    results = [
        read_result(folder / f"out-{name}" / "perplexity").scores["nats per token"].value for name in ("one", "two")
    ]
    assert loss.difference.value == pytest.approx(results[1] - results[0])
    single = compare(folder / "out-one" / "humaneval", folder / "out-two" / "humaneval")
    assert [*single] == ["published-humaneval"]


def test_results_that_cannot_be_compared_are_refused(folder: Path) -> None:
    run_evaluation(str(folder / "one"), ["humaneval"], folder / "a", request(folder))
    run_evaluation(str(folder / "one"), ["humaneval"], folder / "b", request(folder, max_new_tokens=9))
    run_evaluation(str(folder / "one"), ["perplexity"], folder / "c", request(folder))
    with pytest.raises(
        ValueError, match="The results have max_new_tokens=12 and max_new_tokens=9: evaluate both models"
    ):
        compare(folder / "a", folder / "b")
    with pytest.raises(ValueError, match="evaluate both models on the same suite"):
        compare(folder / "a", folder / "c")
    with pytest.raises(FileNotFoundError, match=r"has no results\.json"):
        compare(folder / "a", folder / "nothing")
    (folder / "a" / "humaneval" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of mull eval"):
        compare(folder / "a", folder / "b")
    one, other = (read_result(folder / run / suite) for run, suite in (("b", "humaneval"), ("c", "perplexity")))
    with pytest.raises(ValueError, match="compare two of the same suite"):
        compare_results(one, other)


def test_two_folders_of_one_suite_are_not_compared(folder: Path) -> None:
    run_evaluation(str(folder / "one"), ["perplexity"], folder / "out", request(folder))
    shutil.copytree(folder / "out" / "perplexity", folder / "out" / "perplexity-old")
    with pytest.raises(
        ValueError, match=r"out/perplexity and .*out/perplexity-old both have .* of perplexity: give one"
    ):
        compare(folder / "out", folder / "out")
    assert compare(folder / "out" / "perplexity", folder / "out" / "perplexity-old")


@pytest.mark.parametrize("content", [b"{}", b'{"suite": "perplexity", "mod', b"\xff", b""])
def test_a_damaged_result_is_told_once(content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_evaluation(str(folder / "one"), ["perplexity"], folder / "out", request(folder))
    file = folder / "out" / "perplexity" / "results.json"
    kept = file.read_bytes()
    file.write_bytes(content)
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"perplexity/results.json is damaged: remove it to run the suite again\."):
        run_evaluation(str(folder / "one"), ["perplexity"], folder / "out", request(folder))
    assert "is not repeated" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"perplexity/results.json is damaged: remove it to run the suite again\."):
        run_evaluation(str(folder / "one"), ["token-accuracy"], folder / "out", request(folder))
    file.unlink()
    run_evaluation(str(folder / "one"), ["perplexity"], folder / "out", request(folder))
    assert file.read_bytes() == kept


REFUSED = {
    "room": ({"max_new_tokens": 10**9}, ["humaneval"], "max_new_tokens=1000000000 leaves no room for a prompt"),
    "data": ({"data": {"humanevall": "a"}}, ["humaneval"], "data names humanevall, which no suite reads. Did you mean"),
    "suite": ({}, ["humanevil"], "There is no suite humanevil. Did you mean humaneval?"),
    "no suite": ({}, [], "No suite was given: choose from humaneval, "),
    "k above n": (
        {"samples": 5, "temperatures": (1.0,), "k": (10,)},
        ["humaneval"],
        "pass@10 cannot be estimated from 5 samples",
    ),
    "greedy": ({"samples": 5}, ["humaneval"], "would write one answer 5 times"),
    "chat": ({"chat": True}, ["humaneval"], "The tokenizer has no chat template"),
    "routes": ({"layers": (0, 1), "think_iterations": 2}, ["humaneval"], "layers says which layers run"),
    "task": ({}, ["lm_eval:no/such.yaml"], "no/such.yaml does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_told_before_anything_is_drawn(case: str, folder: Path) -> None:
    changes, suites, message = REFUSED[case]
    if case == "task":
        pytest.importorskip("lm_eval", reason="needs the extra eval")
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        run_evaluation(str(folder / "one"), suites, folder / "out", request(folder, **changes))
    assert message in str(raised.value)
    assert not [*(folder / "out").glob("*/samples*")]


def test_meta_mtp_is_the_published_protocol(folder: Path) -> None:
    """Appendix F of arXiv:2404.19737: five temperatures, pass@1, 10 and 100 of 200 samples, and their maximum as an oracle."""
    found = run_evaluation(
        str(folder / "one"),
        ["meta-mtp:humaneval"],
        folder / "out",
        request(folder, limit=1, max_new_tokens=2, batch_size=100),
    )
    result = found["meta-mtp:humaneval"]
    assert result.settings["temperatures"] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert (result.settings["samples"], result.settings["top_p"]) == (200, 0.95)
    assert sum("oracle" in name for name in result.scores) == 3
    assert (folder / "out" / "meta-mtp-humaneval" / "results.json").exists()


def test_scores_go_to_mlflow(folder: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    run_evaluation(str(folder / "one"), ["perplexity"], folder / "out", request(folder), mlflow="")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'out' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mull-eval")
    [run] = client.search_runs([experiment.experiment_id])
    result = read_result(folder / "out" / "perplexity")
    assert run.data.metrics["perplexity/bits_per_byte"] == pytest.approx(result.scores["bits_per_byte"].value)
    assert run.info.status == "FINISHED"


def test_scores_of_all_wrong_and_all_right_answers() -> None:
    records = [{"temperature": 0.5, "problem": f"p{i}", "sample": j} for i in range(20) for j in range(5)]
    for passed in (False, True):
        scores, values = code_scores(records, [{"passed": passed}] * 100, (1, 5))
        assert scores["pass@1"].value == scores["pass@5"].value == float(passed)
        assert scores["pass@1"][1:3] == exact_interval(20.0 * passed, 20)
        assert len(values["first sample"]) == 20


def test_a_table_is_aligned() -> None:
    assert markdown_table(("a", "long head"), [("x|y", "1")]).splitlines() == [
        "| a    | long head |",
        "|------|-----------|",
        "| x\\|y | 1         |",
    ]
