"""Perplexity is lm-eval's, heads are measured as they are trained and drafted, and lm-eval's tasks take routes."""

import json
import shutil
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny
from lm_eval_tasks import rolling_task
from transformers import PreTrainedTokenizerBase

from mull import ETDConfig, HaltingConfig, MTPConfig, from_layers, generate, wrap_transformer_with_etd
from mull.data.packing import pack_texts
from mull.data.sources import Document
from mull.data.tokenizer import train_tokenizer
from mull.evaluation.held_out import held_out_losses
from mull.evaluation.suites.harness import find_task, mull_lm, run_task
from mull.evaluation.suites.heads import RANGES, draft_acceptance, head_scores, head_states, head_tallies
from mull.evaluation.suites.perplexity import perplexity_scores, text_losses, windows
from mull.evaluation.suites.subject import Request, Subject
from mull.evaluation.suites.table import harness
from mull.evaluation.suites.writers import Route

SPLIT = ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1, max_think_iterations=2)
TEXTS = [f"The number {i} is {i * i} when\nsquared, and  {i * 7} times seven.\n" * (1 + i % 4) for i in range(12)]
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 300)


def looped(tokenizer: PreTrainedTokenizerBase, mtp: MTPConfig | None = None, **options: Any) -> Any:
    base = tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=4, eos_token_id=0, **options)
    return wrap_transformer_with_etd(base, SPLIT, mtp).eval()


def documents() -> list[Document]:
    return [Document(f"text {i}", text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize(("n", "length"), [(1, 4), (4, 4), (5, 4), (8, 4), (9, 4), (11, 4), (3, 100)])
def test_windows_are_those_of_lm_eval(n: int, length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="needs the extra eval")
    tokens = list(range(100, 100 + n))
    theirs = [
        utils.make_disjoint_window(each)
        for each in utils.get_rolling_token_windows(tokens, prefix_token=7, max_seq_len=length, context_len=1)
    ]
    found = windows(tokens, 7, length)
    assert [(window.tokens[: -window.n_predicted], window.tokens[-window.n_predicted :]) for window in found] == theirs


@pytest.mark.parametrize("length", [8, 64])
def test_perplexity_equals_that_of_lm_eval(length: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Its own class on a task of the same texts; word and byte perplexity and bits per byte, at two iterations."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    model = looped(tokenizer)
    lm = mull_lm()(model, tokenizer=tokenizer, think_iterations=2, max_length=length, batch_size=3)
    theirs, _ = run_task(lm, find_task(rolling_task(tmp_path, TEXTS)))
    losses = text_losses(
        lambda ids: model(ids, think_iterations=2).logits,
        tokenizer,
        documents(),
        length=length,
        batch_size=4,
        device=torch.device("cpu"),
    )
    ours, values = perplexity_scores(losses)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert ours[name].value == pytest.approx(theirs[name].value, rel=1e-5)
        assert ours[name].low < ours[name].value < ours[name].high
    assert ours["token_perplexity"].value == pytest.approx(exp(ours["nats per token"].value))
    assert len(values["nats per token"]) == len(TEXTS)
    other, _ = perplexity_scores(
        text_losses(
            lambda ids: model(ids, think_iterations=1).logits,
            tokenizer,
            documents(),
            length=length,
            batch_size=4,
            device=torch.device("cpu"),
        )
    )
    assert other["bits_per_byte"].value != ours["bits_per_byte"].value, "iterations reach the model"


def test_one_text_has_an_interval_over_its_windows(tokenizer: PreTrainedTokenizerBase) -> None:
    model = looped(tokenizer)
    text = "".join(TEXTS)
    losses = text_losses(
        lambda ids: model(ids).logits,
        tokenizer,
        [Document("all", text)],
        length=16,
        batch_size=4,
        device=torch.device("cpu"),
    )
    scores, values = perplexity_scores(losses)
    whole = losses[0].nats / len(text.encode())
    assert scores["byte_perplexity"].value == pytest.approx(exp(whole))
    assert scores["bits_per_byte"].value == pytest.approx(whole / log(2))
    assert scores["bits_per_byte"].low < scores["bits_per_byte"].high
    assert len(values["nats per byte"]) == len(losses[0].windows) > 5


HEADS = {
    "mlp": MTPConfig(num_predict_tokens=2, mtp_head_type="mlp"),
    "transformer": MTPConfig(num_predict_tokens=2, mtp_head_type="transformer"),
    "sequential": MTPConfig(num_predict_tokens=3, mtp_head_type="sequential"),
    "recursive": MTPConfig(num_predict_tokens=2, mtp_head_type="sequential", share_weights_across_steps=True),
}


@pytest.mark.parametrize("kind", HEADS)
def test_losses_of_heads_are_the_held_out_ones(kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = looped(tokenizer, HEADS[kind])
    with torch.no_grad():
        for parameter in model.mtp_heads.parameters():  # new heads predict what the trunk does, whatever else they read
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    dataset = pack_texts(TEXTS, tokenizer, length=24)
    tallies = head_tallies(model, dataset, Route(think_iterations=2), batch_size=3)
    scores, values = head_scores(tallies)
    expected = held_out_losses(model, dataset, 2)
    found = {
        "loss" if k == 0 else f"head{k}_loss": scores[f"nats per token, {'head ' + str(k) if k else 'main head'}"].value
        for k in range(len(tallies))
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(values["top-1, head 1"]) == len(dataset)


def test_a_head_that_copies_the_main_one_agrees_and_calibration_counts_every_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """An mlp head starts as the main head's own prediction: its best token is the main head's of the same position."""
    model = looped(tokenizer, HEADS["mlp"])
    dataset = pack_texts(TEXTS, tokenizer, length=24)
    main, *extra = head_tallies(model, dataset)
    n = sum(sums["top-1"][1] for sums in main.rows.values())
    for tally in (main, *extra):
        total = sum(sums["top-1"][1] for sums in tally.rows.values())
        assert sum(each.n for each in tally.bins) == total
        assert sum(each.n * each.accuracy for each in tally.bins) == pytest.approx(
            sum(sums["top-1"][0] for sums in tally.rows.values())
        )
        assert 0 <= tally.calibration_error <= 1
        assert len(tally.agreement_by_range) <= RANGES
    assert main.agreement_by_range == (1.0,) * len(main.agreement_by_range)
    assert sum(sums["top-1"][1] for sums in extra[1].rows.values()) < n
    # By hand: what the main head says at i, compared with what it says one position later.
    batch = dataset.rows(torch.arange(len(dataset)))
    best = model(batch["input_ids"], position_ids=batch["position_ids"]).logits.argmax(-1)
    same = total = 0
    labels, positions = batch["labels"], batch["position_ids"]
    for row in range(len(dataset)):
        for i in range(labels.shape[1] - 2):
            if positions[row, i + 2] == positions[row, i] + 2 and labels[row, i + 2] != -100:
                same, total = same + int(best[row, i] == best[row, i + 1]), total + 1
    scores, _ = head_scores([main, *extra])
    assert scores["agreement, head 1"].value == pytest.approx(same / total)


def test_agreement_on_its_own_text_is_the_acceptance_of_drafts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Greedy decoding accepts draft k, after accepted ones, where head k agrees with the main head."""
    model = looped(tokenizer, HEADS["sequential"], initializer_range=0.5)
    prompts = [tokenizer.encode(text)[:6] for text in TEXTS[:4]]
    found = draft_acceptance(model, prompts, max_new_tokens=20)
    calls = [
        generate(model, torch.tensor([prompt]), max_new_tokens=20, draft="mtp", draft_length=3, eos_token_id=()).stats
        for prompt in prompts
    ]
    assert [each.accepted for each in found] == [
        sum(column) for column in zip(*(call.accepted for call in calls), strict=True)
    ]
    assert [each.drafted for each in found] == [
        sum(column) for column in zip(*(call.drafted for call in calls), strict=True)
    ]


def test_a_plain_model_has_a_main_head_only(tokenizer: PreTrainedTokenizerBase) -> None:
    base = tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=4)
    dataset = pack_texts(TEXTS, tokenizer, length=24)
    [plain] = head_tallies(base, dataset)
    [wrapped] = head_tallies(wrap_transformer_with_etd(base, SPLIT), dataset, Route(think_iterations=1))
    assert plain.rows.keys() == wrapped.rows.keys()
    for row, sums in plain.rows.items():
        for name, pair in sums.items():
            assert pair == pytest.approx(wrapped.rows[row][name], rel=1e-5), (row, name)


TASK = {
    "task": "toy",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["one", "two"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def toy(folder: Path) -> str:
    rows = [{"question": f"number {i}:", "answer": i % 2} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    (folder / "toy.yaml").write_text(yaml.safe_dump(task))
    return str(folder / "toy.yaml")


@torch.no_grad()
@pytest.mark.parametrize(
    "route", [{"think_iterations": 3}, {"layers": [0, 1, 1, 3]}, {"layers": "0,2, 3"}, {"layers": 1}, {}]
)
def test_lm_eval_takes_iterations_and_routes(
    route: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = looped(tokenizer, initializer_range=0.6)
    lm = mull_lm()(model, tokenizer=tokenizer, batch_size=2, **route)
    scores, values = run_task(lm, find_task(toy(tmp_path)))
    layers = route.get("layers")
    layers = {"0,2, 3": [0, 2, 3], 1: [1]}.get(layers, layers) if not isinstance(layers, list) else layers
    options: dict[str, Any] = {"think_iterations": route.get("think_iterations")}
    if layers is not None:
        options = {"path": from_layers(layers)}
    right = 0
    for i in range(8):
        question = tokenizer(f"number {i}:")["input_ids"]
        sums = []
        for choice in ("one", "two"):
            whole = tokenizer(f"number {i}: {choice}")["input_ids"]
            log_p = model(torch.tensor([whole]), use_cache=False, **options).logits[0].log_softmax(-1)
            sums.append(sum(log_p[t - 1, whole[t]].item() for t in range(len(question), len(whole))))
        right += sums[i % 2] > sums[1 - i % 2]
    assert scores["acc"].value == pytest.approx(right / 8)
    assert sum(value for value, _ in values["acc"].values()) == right
    assert scores["acc"].low < scores["acc"].value < scores["acc"].high or right in (0, 8)


def test_lm_eval_knows_the_class_by_name(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
    looped(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    mull_lm()
    arguments = {"pretrained": str(tmp_path / "model"), "think_iterations": 1, "device": "cpu"}
    from lm_eval.tasks import TaskManager

    toy(tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="mull", model_args=arguments, tasks=["toy"], task_manager=manager, bootstrap_iters=0
    )
    assert 0 <= found["results"]["toy"]["acc,none"] <= 1


def test_tasks_are_found_by_path(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    named, written = find_task("arc_easy"), find_task(toy(tmp_path))
    assert (named.name, named.file, written.name) == ("arc_easy", None, "toy")
    assert written.file == tmp_path / "toy.yaml"
    with pytest.raises(ValueError, match="lm-eval has no task arc_eazy"):
        find_task("arc_eazy")
    with pytest.raises(FileNotFoundError, match="does not exist: give the name of a task of lm-eval, or its YAML file"):
        find_task("no/such.yaml")
    (tmp_path / "empty.yaml").write_text("dataset_path: json\n")
    with pytest.raises(ValueError, match="has no task"):
        find_task(str(tmp_path / "empty.yaml"))


def replaced(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


OTHER_TASKS = {
    "a question": ("data.jsonl", "number 7", "number 70", "documents"),
    "an answer": ("data.jsonl", '"answer": 1', '"answer": 0', "documents"),
    "an example": ("shots.jsonl", "number 2", "number 20", "documents"),
    "the task": ("toy.yaml", "multiple_choice", "multiple_choice # ", "digest"),
    "what it includes": ("shared_yaml", "one", "won", "digest"),
    "what that includes": ("deeper.yaml", "1.0", "2.0", "digest"),
    "a helper": ("utils.py", "return text", "return text + ' '", "digest"),
}


@pytest.fixture
def included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task with examples, whose settings are in several files."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = Path(toy(tmp_path))
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "shots.jsonl")
    task = yaml.safe_load(file.read_text())
    task["dataset_kwargs"]["data_files"]["train"] = str(tmp_path / "shots.jsonl")
    shared = {name: task.pop(name) for name in ("doc_to_choice", "doc_to_target")}
    file.write_text(yaml.safe_dump({**task, "include": "shared_yaml", "fewshot_split": "train", "num_fewshot": 1}))
    (tmp_path / "shared_yaml").write_text(yaml.safe_dump({**shared, "include": ["deeper.yaml"]}))
    (tmp_path / "deeper.yaml").write_text("metadata: {version: 1.0}\nprocess_docs: !function utils.process\n")
    helper = "def helped(text):\n    return text\n"
    (tmp_path / "utils.py").write_text(f"{helper}def process(docs):\n    helped('')\n    return docs\n")
    return file


def test_the_hashes_of_a_task_see_all_that_it_asks(
    included: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject("one", looped(tokenizer), tokenizer)
    prepare = harness(str(included))
    before = prepare(subject, Request()).settings
    assert prepare(subject, Request()).settings == before
    (included.parent / "another.yaml").write_text("task: another\n")
    assert prepare(subject, Request()).settings == before, "of another task"
    for name, old, new, setting in OTHER_TASKS.values():
        file = included.parent / name
        kept = file.read_text()
        replaced(file, old, new)
        now = prepare(subject, Request()).settings
        assert [key for key in now if now[key] != before[key]] == [setting], name
        file.write_text(kept)
    assert prepare(subject, Request()).settings == before
    subject.model.generation_config.repetition_penalty = 9.0  # lm-eval leaves it on
    now = prepare(subject, Request()).settings
    assert [key for key in now if now[key] != before[key]] == ["generation"]
    subject.model.generation_config.repetition_penalty = None
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.0.1")
    now = prepare(subject, Request()).settings
    assert [key for key in now if now[key] != before[key]] == ["lm_eval"]


def test_lm_eval_s_arguments_are_refused_with_a_reason(tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    with pytest.raises(ValueError, match="layers='0 x' must be numbers of layers, such as '0 1 2 2 3'"):
        mull_lm()(looped(tokenizer), tokenizer=tokenizer, layers="0 x")
    with pytest.raises(ValueError, match="without its tokenizer was given"):
        mull_lm()(looped(tokenizer))


def test_routes_are_for_models_of_mull(tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    with pytest.raises(ValueError, match="think_iterations are for models of mull"):
        mull_lm()(tiny("llama", vocab_size=len(tokenizer)), tokenizer=tokenizer, think_iterations=2)


@torch.no_grad()
@pytest.mark.parametrize("route", [Route(), Route(think_iterations=1), Route(path=((0, 0), (1, 0), (1, 1), (3, 0)))])
def test_heads_read_what_a_forward_pass_computes(route: Route, tokenizer: PreTrainedTokenizerBase) -> None:
    """Also of a model that stores a halting rule, which a call follows unless it says otherwise."""
    base = tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=4, eos_token_id=0)
    halting = HaltingConfig(rule="confidence", threshold=0.001)
    model = wrap_transformer_with_etd(
        base, SPLIT.model_copy(update={"adaptive_depth": True, "halting": halting})
    ).eval()
    ids = torch.randint(3, 90, (2, 12))
    positions = torch.arange(12)[None]
    [states] = head_states(model, ids, positions, route, 0)
    expected = model(ids, use_cache=False, **route.options()).logits
    assert torch.equal(model.lm_head(states.tensor), expected)
    if route == Route():
        assert not torch.equal(expected, model(ids, use_cache=False, adaptive=False).logits), "some token stops early"
