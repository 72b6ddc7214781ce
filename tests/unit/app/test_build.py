"""Claim: what a recipe builds is what its checkpoint holds, in every tensor, buffers included."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import COMMON, FAMILIES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mull
from mull.app.build import load_model, meta_model
from mull.app.recipe import ModelSection
from mull.data.tokenizer import train_tokenizer
from mull.model.configs import ETDConfig, MTPConfig

SPLIT = ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers, also those that no checkpoint holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.latin(4, "family")
def test_a_built_model_is_the_one_that_its_checkpoint_loads(family: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a"], 257)
    model_type, options = FAMILIES[family]
    architecture = {**COMMON, **options, "model_type": model_type, "num_hidden_layers": 4, "vocab_size": 257}
    architecture["max_position_embeddings"] = 1024
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    architecture = {name: value for name, value in architecture.items() if name in known | {"model_type"}}
    mtp = MTPConfig(mtp_head_type="native" if family.startswith("qwen3_") else "mlp", num_predict_tokens=1)
    section = ModelSection(architecture=architecture, etd=SPLIT, mtp=mtp, dtype="bf16")
    built = load_model(section, tokenizer).eval()
    built.save_pretrained(tmp_path)
    loaded = mull.from_pretrained(str(tmp_path))
    expected, actual = tensors(built), tensors(loaded)
    assert {name: tensor.dtype for name, tensor in actual.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert {n: t.dtype for n, t in tensors(meta_model(section, tokenizer)).items()} == {
        n: t.dtype for n, t in expected.items()
    }
    # The last positions are where a rounded rotary embedding is off most.
    tokens = torch.arange(1024)[None] * 7919 % 257
    with torch.no_grad():
        assert torch.equal(loaded(tokens, use_cache=False).logits, built(tokens, use_cache=False).logits)
