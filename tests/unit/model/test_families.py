"""Recurrent layers on the CPU use transformers' torch code even where a GPU kernel is installed."""

import functools
import importlib
from typing import Any

import pytest
import torch
from conftest import HYBRIDS, SPLIT, tiny

from mull import wrap_transformer_with_etd
from mull.model.families import require_supported


@pytest.mark.parametrize("family_name", HYBRIDS)
def test_a_kernel_that_needs_a_gpu_is_not_called_on_the_cpu(family_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as transformers installs them: a function in the module's namespace that wraps the reference."""
    name = type(tiny(family_name)).__module__
    module = importlib.import_module(name)
    for function in (
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    ):

        @functools.wraps(getattr(module, function).__wrapped__)
        def kernel(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("0 active drivers")

        monkeypatch.setattr(module, function, kernel)
    tokens = torch.arange(3, 15)[None]
    with pytest.raises(RuntimeError, match="0 active drivers"):
        tiny(family_name)(tokens)
    model = wrap_transformer_with_etd(tiny(family_name), SPLIT)
    generated = model.generate(tokens, max_new_tokens=3, think_iterations=2, eos_token_id=None)
    assert generated.shape == (1, 15)


@pytest.mark.parametrize("pad_token_id", [97, -98])
def test_padding_without_an_embedding_is_refused(pad_token_id: int) -> None:
    config = tiny("qwen3").config
    config.pad_token_id = pad_token_id
    with pytest.raises(ValueError, match=f"pad_token_id={pad_token_id} is outside the model's vocabulary of 97"):
        require_supported(config)
