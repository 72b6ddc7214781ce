"""Claim: benchmarks/speculation.py gives transformers the very heads of mull, and says "equal" and "tie" where that is so."""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.utils import logging as transformers_logging

from mull import MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.data.corpus import Corpus
from mull.data.sources import Document
from mull.data.tokenizer import train_tokenizer
from mull.evaluation.speed import Outcome, Timing
from mull.evaluation.stock import heads_loaded_once, load_stock, write_stock
from mull.ops.targets import targets_of

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
DENSE, HYBRID = "byte-toy", "hybrid-toy"
TOKENS = 24


@pytest.fixture(scope="module")
def models() -> Iterator[ModuleType]:
    """`speculation_models`, imported as the script imports it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import speculation_models

        yield speculation_models
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def speculation(models: ModuleType) -> ModuleType:
    import speculation

    return speculation


@pytest.fixture(scope="module")
def race(speculation: ModuleType) -> ModuleType:
    return sys.modules["race"]


@pytest.fixture(scope="module", autouse=True)
def _no_progress_bars() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def with_heads(models: ModuleType, name: str) -> MullForCausalLM:
    """A random trunk with random heads, all of their parts different from what they start as."""
    torch.manual_seed(0)
    config = models.SPECS[name].config()
    config.initializer_range = 0.3
    base = AutoModelForCausalLM.from_config(config)
    heads = MTPConfig(num_predict_tokens=models.N_HEADS, mtp_head_type="sequential")
    model = wrap_transformer_with_etd(base, None, heads).eval()
    assert model.mtp_heads is not None
    with torch.no_grad():
        for parameter in [*model.mtp_heads.parameters(), *model.model.norm.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def write(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Write a model to a folder, as training leaves it."""

    @functools.cache
    def written(name: str) -> Any:
        model, folder = with_heads(models, name), tmp_path_factory.mktemp("written")
        model.save_pretrained(folder / "mull")
        write_stock(model, folder / "stock")
        return SimpleNamespace(name=name, model=model, folder=folder)

    return written


@pytest.fixture(params=[DENSE, HYBRID])
def written(request: pytest.FixtureRequest, write: Callable[[str], Any]) -> Any:
    return write(request.param)


@pytest.fixture
def dense(write: Callable[[str], Any]) -> Any:
    """The one that transformers can draft for."""
    return write(DENSE)


def text(rows: int, tokens: int) -> Tensor:
    return torch.randint(1, 257, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_stock_checkpoint_gives_the_same_logits(written: Any, models: ModuleType) -> None:
    stock = load_stock(written.folder / "stock", torch.float32, "cpu")
    ids = text(2, 20)
    assert torch.equal(stock(ids, use_cache=False).logits, written.model(ids, use_cache=False).logits)


@torch.no_grad()
def test_the_heads_of_transformers_predict_what_ours_predict(dense: Any, models: ModuleType) -> None:
    stock = load_stock(dense.folder / "stock", torch.float64, "cpu")
    model = dense.model.to(torch.float64)
    theirs = MtpModel.from_pretrained(stock).double()
    ids = text(1, 30)
    hidden = model.hidden_states(ids)
    targets = targets_of(ids, None, 1 + models.N_HEADS)
    _, ours = model.head_losses(hidden, ids, targets, (targets >= 0).double())
    model.float()

    states, cache = hidden, MtpCache(config=stock.config.get_mtp_config())
    for k in range(1, 1 + models.N_HEADS):
        # Head k reads the token k ahead, so its last k positions have none.
        states, shifted = states[:, : ids.shape[1] - k], ids[:, k:]
        positions = torch.arange(k, ids.shape[1])[None]
        states = theirs.forward_layer(k - 1, states, positions, cache, input_ids=shifted)
        logits = theirs._project_to_logits(states)[0, :-1]
        expected = F.cross_entropy(logits, ids[0, k + 1 :], reduction="none")
        torch.testing.assert_close(ours[0, : len(expected), k], expected, atol=1e-6, rtol=0)
        assert expected.std() > 0.1


@torch.no_grad()
def test_transformers_speculates_without_changing_its_text(dense: Any, models: ModuleType) -> None:
    stock = load_stock(dense.folder / "stock", torch.float32, "cpu")
    ids, options = text(1, 12), {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(stock.generate(ids, **options), stock.generate(ids, use_mtp=True, **options))


def test_transformers_loads_the_heads_at_each_call_unless_they_are_kept(
    dense: Any, models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = load_stock(dense.folder / "stock", torch.float32, "cpu")
    load, calls = MtpModel.from_pretrained, []

    def counted(*given: Any, **options: Any) -> MtpModel:
        calls.append(given)
        return load(*given, **options)

    monkeypatch.setattr(MtpModel, "from_pretrained", counted)
    ids, options = text(1, 12), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "use_mtp": True}
    texts = [stock.generate(ids, **options) for _ in range(2)]
    assert len(calls) == 2
    heads: dict[int, MtpModel] = {}
    for _ in range(3):
        with heads_loaded_once(heads):
            texts.append(stock.generate(ids, **options))
    assert len(calls) == 3
    assert MtpModel.from_pretrained is counted
    assert all(torch.equal(other, texts[0]) for other in texts)


@torch.no_grad()
def test_random_heads_share_the_trunk_and_predict_something_else(written: Any, models: ModuleType) -> None:
    subject = models.load_subject(written.name, written.folder, "fp32", "cpu")
    assert subject.useless.model is subject.mull.model
    ids = text(1, 20)
    hidden = subject.mull.hidden_states(ids)
    targets = targets_of(ids, None, 1 + models.N_HEADS)
    losses = [
        model.head_losses(hidden, ids, targets, (targets >= 0).float())[1] for model in (subject.mull, subject.useless)
    ]
    assert torch.equal(losses[0][..., 0], losses[1][..., 0])
    assert not torch.isclose(losses[0][..., 1:], losses[1][..., 1:], atol=1e-3).all()
    assert subject.use_mtp is (written.name == DENSE)


def test_a_model_is_trained_once_and_again_for_other_settings(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = []

    def train(_name: str, spec: Any, folder: Path, _seed: int, _device: str) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        seconds.append(spec.seconds)
        return {"steps": len(seconds)}

    monkeypatch.setattr(models, "_train", train)
    for scale in (1.0, 1.0, 2.0):
        _, record = models.trained(DENSE, tmp_path, seed=0, scale=scale, device="cpu")
    budget = models.SPECS[DENSE].seconds
    assert seconds == [budget, 2 * budget]
    assert record["steps"] == 2


def test_a_failed_training_leaves_no_model_that_looks_complete(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def succeed(_name: str, _spec: Any, folder: Path, *_: Any) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        return {"steps": 1}

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("half of the new model is written over the old")

    monkeypatch.setattr(models, "_train", succeed)
    models.trained(DENSE, tmp_path, seed=0, scale=1, device="cpu")
    monkeypatch.setattr(models, "_train", fail)
    for scale in (2, 1):
        with pytest.raises(RuntimeError, match="half"):
            models.trained(DENSE, tmp_path, seed=0, scale=scale, device="cpu")


def test_prompts_are_pieces_of_held_out_files(models: ModuleType, tmp_path: Path) -> None:
    held_out = [Document(f"{n}.py", "".join(f"line {n} {i}\n" for i in range(200))) for n in range(4)]
    corpus = Corpus([], [*held_out, Document("short.py", "x\n")])
    with_heads(models, DENSE).save_pretrained(tmp_path / "stock")
    tokenizer = train_tokenizer([held_out[0].text], models.BYTES)
    tokenizer.save_pretrained(tmp_path / "stock")
    prompts = models.draw_prompts(tmp_path, 5, 0, corpus)
    assert [len(prompt) for prompt in prompts] == [128, 96, 64, 128, 96]
    for prompt in prompts:
        piece = tokenizer.decode(prompt)
        assert any(f"\n{piece}" in f"\n{document.text}" for document in held_out)
    assert len({tokenizer.decode(prompt).split()[1] for prompt in prompts[:4]}) == 4
    again, others = models.draw_prompts(tmp_path, 5, 0, corpus), models.draw_prompts(tmp_path, 5, 1, corpus)
    assert all(torch.equal(a, b) for a, b in zip(prompts, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(prompts, others, strict=True))


def test_acceptance_and_tokens_per_pass_are_those_of_the_timed_rounds() -> None:
    def outcome(accepted: list[int], verified: list[int], row_rounds: int) -> Any:
        stats = SimpleNamespace(accepted=accepted, verified=verified, drafted=verified, row_rounds=row_rounds)
        return Outcome([[0]], stats)

    warm_up, timed = (
        [outcome([9, 9], [9, 9], 9)],
        [outcome([3, 1], [4, 3], 4), outcome([0], [2], 2), outcome([], [], 4)],
    )
    timing = Timing([[0.0] * 3], [warm_up, timed])
    assert timing.acceptance == [3 / 6, 1 / 3]
    assert timing.tokens_per_pass == 1 + 4 / 10
    assert Timing([[0.0]], [[Outcome([[0]])]] * 2).tokens_per_pass is None


def test_a_prediction_takes_the_acceptance_that_was_measured(
    dense: Any, models: ModuleType, speculation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "own_machine", lambda *_: speculation.Machine(flops=1e30, bandwidth=1.0))
    subject = models.load_subject(dense.name, dense.folder, "fp32", "cpu")

    def timing(*accepted: int) -> Any:
        stats = SimpleNamespace(accepted=accepted, verified=[10] * len(accepted), drafted=[10] * len(accepted))
        return Timing([[1.0]], [[], [Outcome([[0] * 20], stats)]])

    timings = {"mull plain": timing(), "mull, 1 draft": timing(10), "mull, 2 drafts": timing(), "other": timing(5)}
    found = speculation.predictions(subject, timings, [torch.zeros(8)] * 2, 1, "cpu")
    assert set(found) == {"mull, 1 draft", "mull, 2 drafts"}
    assert 1 < found["mull, 1 draft"] < 2  # two tokens for two reads of the weights, one of them of a head alone
    assert found["mull, 2 drafts"] < 1


def test_batches_are_padded_on_the_left(speculation: ModuleType) -> None:
    (ids, mask), (last, _) = speculation.batches_of(
        [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5])], 2, "cpu"
    )
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert last.tolist() == [[5]]


@pytest.fixture
def judge(dense: Any, models: ModuleType, speculation: ModuleType) -> Any:
    return speculation.judge_of(models.load_subject(dense.name, dense.folder, "bf16", "cpu"), "cpu")


def test_another_token_is_a_tie_where_rounding_explains_it_and_only_there(judge: Any) -> None:
    prompts = list(text(2, 40))
    with torch.no_grad():
        logits = judge.exact(prompts[0][None]).logits[0, -1]
    order = logits.argsort(descending=True)
    best, worst = int(order[0]), int(order[-1])
    same = [[best, 5, 6], [7, 8, 9]]
    assert judge.differences(prompts, same, [list(row) for row in same]) == []
    (far,) = judge.differences(prompts, same, [[worst, 5, 6], same[1]])
    assert (far.row, far.position, far.is_tie) == (0, 0, False)
    assert far.gap == pytest.approx(float(logits[best] - logits[worst]), rel=1e-5)
    assert 0 < far.rounding < 0.1 * far.gap
    assert replace(far, gap=2 * far.rounding).is_tie
    (later,) = judge.differences(prompts, same, [same[0], [7, 8, 1]])
    assert (later.row, later.position) == (1, 2)
    with torch.no_grad():
        logits = judge.exact(torch.tensor([[*prompts[1].tolist(), 7, 8]])).logits[0, -1]
    assert later.gap == pytest.approx(float((logits[9] - logits[1]).abs()), rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "precision", "equal", "ties", "fails"),
    [
        ("mull, 1 draft", "fp32", 0.9, True, True),
        ("mull, 1 draft", "fp32", 1, True, False),
        ("mull plain", "bf16", 0.9, False, True),
        ("mull plain", "bf16", 0.9, True, False),
        ("transformers use_mtp", "fp32", 0.9, False, False),
    ],
)
def test_only_what_contradicts_losslessness_fails(
    speculation: ModuleType, variant: str, precision: str, equal: float, ties: bool, fails: bool
) -> None:
    row = {"variant": variant, "equal": equal, "ties": ties, "differences": ["here"]}
    table = {"model": DENSE, "precision": precision, "batch": 1, "variants": [row]}
    assert bool(speculation.failures([table])) is fails


def test_repetition_shows_in_the_share_of_distinct_runs(race: ModuleType) -> None:
    assert race.distinct_share([[1, 2] * 10]) == pytest.approx(2 / 13)
    assert race.distinct_share([list(range(20))]) == 1


def test_options_of_a_toy_give_way_to_what_is_asked_for(speculation: ModuleType, tmp_path: Path) -> None:
    arguments = speculation.parse(["--toy", "--tokens", "5", "--out", str(tmp_path)])
    assert (arguments.tokens, arguments.size, arguments.compile) == (5, ["toy"], False)
    assert arguments.result.parent == tmp_path
    arguments = speculation.parse(["--device", "cuda"])
    assert (arguments.precision, arguments.compile) == (["bf16"], True)
    assert arguments.result.name == "speculation-cuda.json"
    assert not speculation.parse(["--verify-cost"]).compile


def test_a_folder_is_no_place_for_the_record(
    speculation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        speculation.parse(["--result", str(tmp_path)])
    assert f"--result {tmp_path} is a folder; name a file." in capsys.readouterr().err


def test_the_cost_of_verifying_is_measured(speculation: ModuleType, tmp_path: Path) -> None:
    assert speculation.main(["--toy", "--verify-cost", "--threads", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "speculation-verify-cpu.json").read_text())
    assert [row["precision"] for row in record["verify_cost"]] == ["bf16", "fp32"]
    for row in record["verify_cost"]:
        assert row["ratio"]["1"] == row["predicted_ratio"]["1"] == 1
        assert row["ratio"]["8"] > 0
        assert row["predicted_ratio"]["8"] >= 1


@pytest.mark.slow
def test_the_whole_benchmark_runs_and_finds_equal_texts(speculation: ModuleType, tmp_path: Path) -> None:
    assert speculation.main(["--toy", "--threads", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "speculation-cpu.json").read_text())
    found = {(table["model"], table["precision"], table["batch"]): table["variants"] for table in record["tables"]}
    assert set(found) == {(m, p, b) for m in (DENSE, HYBRID) for p in ("bf16", "fp32") for b in (1, 2)}
    for (_, precision, _), rows in found.items():
        ours = [row for row in rows if row["variant"].startswith("mull")]
        assert len(ours) == 6
        assert precision != "fp32" or all(row["equal"] == 1 for row in ours)
        assert {row["variant"] for row in rows if row["predicted"]} == set(speculation.LENGTHS.values())
    by_name = {row["variant"]: row for row in found[DENSE, "fp32", 1]}
    # The same heads, so the same drafts: transformers and mull need equally many passes.
    theirs, ours = by_name["transformers use_mtp"], by_name["mull, 3 drafts"]
    assert ours["tokens_per_pass"] == pytest.approx(theirs["tokens_per_pass"], rel=0.1)
