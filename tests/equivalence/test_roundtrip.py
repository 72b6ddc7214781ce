"""A retrofitted model survives saving, loading in a fresh process, copying and pickling: same logits, bit for bit."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SPLIT, tiny
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import mull
from mull import ETDConfig, MullForCausalLM, wrap_transformer_with_etd

Ids = Callable[..., Tensor]

FRESH = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
import mull
torch.set_num_threads(1)  # as the parent: the order of summation depends on it
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.load(sys.argv[1] + "/tokens.pt")
with torch.no_grad():
    torch.save(model(tokens, think_iterations=3).logits, sys.argv[1] + "/logits.pt")
"""


def logits(model: MullForCausalLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, think_iterations=3).logits


@pytest.mark.parametrize("family_name", ["qwen3-tied", pytest.param("qwen3_next-moe", marks=pytest.mark.slow)])
def test_a_fresh_process_loads_the_same_model(family_name: str, tmp_path: Path, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family_name), SPLIT)
    model.save_pretrained(tmp_path)
    torch.save(ids(2, 12), tmp_path / "tokens.pt")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model, ids(2, 12)))


def test_saved_and_loaded(family: str, tmp_path: Path, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    expected = logits(model, ids(2, 12))
    model.save_pretrained(tmp_path)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        mull.from_pretrained(str(tmp_path)),
        MullForCausalLM.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded, MullForCausalLM)
        assert loaded.etd_config == SPLIT
        assert torch.equal(logits(loaded, ids(2, 12)), expected)
        if "tied" in family:
            assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_saved_weights_are_those_of_the_base_checkpoint(family: str, tmp_path: Path) -> None:
    """By name and value: transformers splits stacks of experts, for instance, and ours are saved as theirs."""
    base = tiny(family)
    base.save_pretrained(tmp_path / "base")
    expected = load_file(tmp_path / "base" / "model.safetensors")
    model = wrap_transformer_with_etd(base, SPLIT)
    for saved, prefix in ((model, ""), (model.model, "model.")):
        saved.save_pretrained(tmp_path / "saved")
        actual = load_file(tmp_path / "saved" / "model.safetensors")
        assert {prefix + name for name in actual} == {name for name in expected if name.startswith(prefix)}
        assert all(torch.equal(tensor, expected[prefix + name]) for name, tensor in actual.items())


def test_what_calls_the_base_model_and_the_head_by_itself_sees_the_loops(ids: Ids) -> None:
    """As trainers that compute their own loss do."""
    model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    assert isinstance(model.model, mull.MullModel)
    assert model.base_model is model.get_decoder() is model.model
    with torch.no_grad():
        states = model.base_model(ids(2, 12), think_iterations=3).last_hidden_state
    assert torch.equal(model.lm_head(states), logits(model, ids(2, 12)))
    assert not torch.equal(model.lm_head(states), model(ids(2, 12), think_iterations=1).logits)


def test_the_base_model_loads_alone(tmp_path: Path, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny("qwen3_5"), SPLIT)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, mull.MullModel)
    with torch.no_grad():
        assert torch.equal(
            model.lm_head(base(ids(2, 12), think_iterations=3).last_hidden_state), logits(model, ids(2, 12))
        )


@pytest.mark.latin(2, "family")
def test_a_base_checkpoint_loads_without_renaming(family: str, tmp_path: Path, ids: Ids) -> None:
    base = tiny(family)
    base.save_pretrained(tmp_path)
    model = mull.from_pretrained(str(tmp_path), etd=SPLIT)
    assert torch.equal(logits(model, ids(2, 12)), logits(wrap_transformer_with_etd(base, SPLIT), ids(2, 12)))
    bf16 = mull.from_pretrained(str(tmp_path), etd=SPLIT, dtype=torch.bfloat16)
    assert bf16.dtype == torch.bfloat16


def test_weights_on_disk_have_the_names_of_the_base_checkpoint(family: str, tmp_path: Path) -> None:
    base = tiny(family)
    base.save_pretrained(tmp_path / "base")
    wrap_transformer_with_etd(base, SPLIT).save_pretrained(tmp_path / "mull")
    expected = load_file(tmp_path / "base" / "model.safetensors")
    actual = load_file(tmp_path / "mull" / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_another_split_replaces_the_stored_one(tmp_path: Path) -> None:
    wrap_transformer_with_etd(tiny("qwen3"), SPLIT).save_pretrained(tmp_path)
    other = ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=5, max_think_iterations=2)
    model = mull.from_pretrained(str(tmp_path), etd=other)
    assert model.etd_config == other
    assert json.loads((tmp_path / "config.json").read_text())["etd"]["n_think_layers"] == 4
    model.save_pretrained(tmp_path / "again")
    assert mull.from_pretrained(str(tmp_path / "again")).etd_config == other


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.latin(2, "family", "clone")
def test_copies_are_independent(family: str, clone: Callable[[MullForCausalLM], MullForCausalLM], ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    expected = logits(model, ids(2, 12))
    copied = clone(model)
    assert torch.equal(logits(copied, ids(2, 12)), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, ids(2, 12)), expected)
    assert not torch.equal(logits(copied, ids(2, 12)), expected)


def test_a_used_cache_can_be_copied(family: str, ids: Ids) -> None:
    """Prompt caching: the prefix is computed once and continued twice."""
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    with torch.no_grad():
        prefix = model(ids(1, 9), think_iterations=3, use_cache=True).past_key_values
        first, second = (
            model(ids(1, 4, seed=1), think_iterations=3, past_key_values=copy.deepcopy(prefix)).logits for _ in range(2)
        )
    assert prefix.get_seq_length() == 9
    assert torch.equal(first, second)


def test_half_precision_stays_finite(family: str, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT).half()
    assert logits(model, ids(2, 12)).isfinite().all()
