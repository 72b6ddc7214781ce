"""Claim: inference-speed measures every way to decode a checkpoint on the same texts, and says what it left out."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from mull import ETDConfig, MTPConfig, wrap_transformer_with_etd
from mull.data.tokenizer import train_tokenizer
from mull.evaluation.cost.count import Machine
from mull.evaluation.suites.results import read_result
from mull.evaluation.suites.subject import Request, Subject
from mull.evaluation.suites.table import SUITES, Place
from mull.evaluation.suites.writers import OWN_ROUTE, Route

HEADS = MTPConfig(num_predict_tokens=2, mtp_head_type="sequential")
SPLIT = ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1)
TEXTS = [f"The number {i} is {i * i} when squared, and {i * 7} times seven.\n" * 4 for i in range(40)]
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def measured(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    machine = Machine(flops=1e12, bandwidth=1e9)
    monkeypatch.setattr("mull.evaluation.suites.inference_speed.measure_machine", lambda *_: machine)

    def run(model: Any, route: Route = OWN_ROUTE, **changes: Any) -> Any:
        given = {"data": {"text": str(tmp_path / "text.txt")}, "limit": 2, "max_new_tokens": 6, "compiled": False}
        request = Request.model_validate({**given, "length": 32, **changes})
        subject = Subject("tiny", model.eval(), tokenizer, route)
        return SUITES["inference-speed"](subject, request).run(Place(tmp_path))

    return run


def base(tokenizer: PreTrainedTokenizerBase) -> Any:
    return tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=4, eos_token_id=0)


def test_a_model_with_heads_is_measured_in_every_way(measured: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    result = measured(wrap_transformer_with_etd(base(tokenizer), None, HEADS))
    names = {name.removesuffix(", tokens/s") for name in result.scores}
    assert names == {"mull", "mull, 1 draft", "mull, 2 drafts", "transformers", "transformers, use_mtp"}
    assert all(score.value > 0 and score.low <= score.value <= score.high for score in result.scores.values())
    assert {len(of_prompts) for of_prompts in result.values.values()} == {2}
    assert {tokens for of_prompts in result.values.values() for tokens, _ in of_prompts.values()} == {3 * 6.0}
    notes = " ".join(result.notes)
    assert "Floor of the machine: " in notes
    assert "from 1.0 GB/s of weights read" in notes
    assert "predicted from the acceptance" in notes
    assert "otherwise" not in notes, "all texts are equal"
    assert result.settings["batch_size"] == 1
    assert result.settings["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("iterations", [1, 3])
def test_settings_of_a_checkpoint_change_no_text(
    iterations: int, measured: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = wrap_transformer_with_etd(base(tokenizer), SPLIT, HEADS)
    model.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=1, suppress_tokens=[*range(9, 200)])
    kept = model.generation_config.to_dict()
    assert "otherwise" not in " ".join(measured(model, Route(think_iterations=iterations)).notes)
    assert model.generation_config.to_dict() == kept


def test_loops_have_no_class_in_transformers(measured: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    model = wrap_transformer_with_etd(base(tokenizer), SPLIT)
    result = measured(model, Route(think_iterations=3), batch_size=2)
    assert set(result.scores) == {"mull, tokens/s", "transformers' loop on mull's layers, tokens/s"}
    assert {tokens for of_prompts in result.values.values() for tokens, _ in of_prompts.values()} == {3 * 2 * 6.0}
    same = measured(model, Route(think_iterations=1))
    assert set(same.scores) == {"mull, tokens/s", "transformers, tokens/s"}


def test_a_model_of_transformers_is_measured_alone(measured: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=128, eos_token_id=0)
    result = measured(GPT2LMHeadModel(config))
    assert set(result.scores) == {"transformers, tokens/s"}


@pytest.mark.slow
def test_compiled_decoding_writes_the_same_texts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """In a process of its own: the hook that checks shapes in tests cannot be compiled."""
    wrap_transformer_with_etd(base(tokenizer), None, HEADS).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    options = ["--limit", "1", "--max-new-tokens", "6", "--length", "32", "--data", f"text={tmp_path / 'text.txt'}"]
    command = [sys.executable, "-m", "mull", "eval", tmp_path / "model", "--suite", "inference-speed", *options]
    done = subprocess.run([*command, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path / "out" / "inference-speed")
    own = {"mull, tokens/s", "mull, 1 draft, tokens/s", "mull, 2 drafts, tokens/s"}
    theirs = {"transformers, tokens/s", "transformers, compiled, tokens/s", "transformers, use_mtp, tokens/s"}
    assert set(result.scores) == {*own, *(name.replace(", tokens", ", compiled, tokens") for name in own), *theirs}
    assert not [note for note in result.notes if "otherwise" in note]


def test_too_little_text_is_refused(measured: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="fewer than the 4096 of a batch: give more text"):
        measured(base(tokenizer), batch_size=4096)


@pytest.mark.parametrize("is_tie", [True, False])
def test_other_texts_are_judged(
    is_tie: bool, measured: Any, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock model gets other weights once it has passed for the same; ties are told by a model whose logits are all equal."""
    model = wrap_transformer_with_etd(base(tokenizer), None)
    if is_tie:
        model.lm_head.weight.data.zero_()
    other = base(tokenizer)
    with torch.no_grad():
        other.lm_head.weight.copy_(torch.randn_like(other.lm_head.weight))
    monkeypatch.setattr("mull.evaluation.suites.inference_speed._same_function", lambda *_: other)
    notes = " ".join(measured(model).notes)
    expected = "all by ties that rounding decides" if is_tie else "2 of them NOT by ties, so they are wrong"
    assert f"transformers wrote 2 of 2 texts otherwise than mull, {expected}." in notes
