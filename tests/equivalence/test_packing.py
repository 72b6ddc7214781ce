"""Packed documents are the documents alone: neither attention nor a recurrent state crosses a boundary, forward and backward."""

import importlib
import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import EXACT, HYBRIDS, SPLIT, tiny
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

from mull import wrap_transformer_with_etd
from mull.model import families
from mull.model.inputs import find_documents

LENGTHS = [[5, 1, 9, 8], [23], [11, 12]]


def packed_positions() -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.latin(8, "family", "iterations")
def test_packed_is_separate(
    family: str, iterations: int, exact: Callable[..., PreTrainedModel], ids: Callable[..., Tensor]
) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    tokens = ids(3, 23)
    options = {"use_cache": False, "think_iterations": iterations}
    actual = model(tokens, position_ids=packed_positions(), **options).logits
    weights = torch.randn(actual.shape, dtype=actual.dtype)
    (actual * weights).sum().backward()
    packed_gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone = model(tokens[row : row + 1, part], **options).logits[0]
            torch.testing.assert_close(actual[row, part], alone, atol=EXACT, rtol=0)
            (alone * weights[row, part]).sum().backward()
            start += length
    for name, parameter in model.named_parameters():
        # transformers computes decay and norms in fp32 whatever the model's precision: 2e-7 of the largest entry, measured, or
        # 2e-7 where all entries are small.
        tolerance = 1e-6 * max(parameter.grad.abs().max().item(), 1)
        torch.testing.assert_close(
            packed_gradients[name], parameter.grad, atol=tolerance, rtol=0, msg=f"gradient of {name}"
        )


@torch.no_grad()
def test_packed_rows_are_apart_by_default_and_never_cached(family: str, ids: Callable[..., Tensor]) -> None:
    """The base model leaks here: its default use_cache=True switches its own detection of packed rows off."""
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    tokens = ids(3, 23)
    out = model(tokens, position_ids=packed_positions())
    assert out.past_key_values is None
    other = tokens.clone()
    other[0, :5] = ids(1, 5, seed=8)[0]
    changed = model(other, position_ids=packed_positions()).logits
    # Experts batch their tokens across documents, so sums may associate differently there.
    torch.testing.assert_close(changed[0, 5:], out.logits[0, 5:], atol=1e-5 if "moe" in family else 0.0, rtol=0)
    for options in ({"use_cache": True}, {"past_key_values": model.new_cache()}):
        with pytest.raises(ValueError, match="several packed documents, and these cannot continue from a cache"):
            model(tokens, position_ids=packed_positions(), **options)


def test_documents_are_located_by_restarts() -> None:
    documents = find_documents(packed_positions(), 3)
    assert documents is not None
    assert documents.index.shape == (7, 23)
    assert documents.index[2, :9].tolist() == list(range(6, 15))
    assert documents.index.flatten()[documents.inverse].tolist() == list(range(3 * 23))
    assert find_documents(torch.arange(23)[None], 3) is None


def bordered_delta_rule(reference: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """A stand-in for the kernel of flash-linear-attention: the reference on each document by itself."""

    def chunk_gated_delta_rule(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        calls.append(cu_seqlens)
        borders = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        parts = [slice(start, end) for start, end in pairwise(borders)]
        run = (
            reference(q[:, part], k[:, part], v[:, part], g=g[:, part], beta=beta[:, part], **options) for part in parts
        )
        return torch.cat([out for out, _ in run], dim=1), None

    return chunk_gated_delta_rule


def bordered_convolution(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A stand-in for the kernel of causal-conv1d."""

    def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        lengths = [x.shape[2]] if seq_idx is None else seq_idx[0].unique_consecutive(return_counts=True)[1].tolist()
        return torch.cat([reference(part, weight, bias, activation) for part in x.split(lengths, dim=2)], dim=2)

    return causal_conv1d_fn


@pytest.mark.parametrize("family_name", HYBRIDS)
def test_kernels_that_take_borders_get_all_documents_as_one_row(
    family_name: str, exact: Callable[..., PreTrainedModel], ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap_transformer_with_etd(exact(family_name), SPLIT)
    tokens = ids(3, 23)
    options = {"use_cache": False, "think_iterations": 2}
    apart = model(tokens, position_ids=packed_positions(), **options).logits
    weights = torch.randn_like(apart)
    expected = torch.autograd.grad((apart * weights).sum(), list(model.parameters()))

    modeling = importlib.import_module(type(model.model.layers[0]).__module__)
    calls: list[Any] = []
    delta = ModuleType("fla.ops.gated_delta_rule")
    delta.chunk_gated_delta_rule = bordered_delta_rule(modeling.torch_chunk_gated_delta_rule, calls)
    convolution = ModuleType("causal_conv1d")
    convolution.causal_conv1d_fn = bordered_convolution(inspect.unwrap(modeling.causal_conv1d_fn))
    for module in (ModuleType("fla"), ModuleType("fla.ops"), delta, convolution):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # As transformers chooses kernels where they are installed.
    for name, package in (("chunk_gated_delta_rule", "fla"), ("causal_conv1d_fn", "causal_conv1d")):
        ours = name if name in vars(modeling) else f"torch_{name}"
        chosen = use_kernel_func_from_hub_with_fallback(name, package)(inspect.unwrap(vars(modeling)[ours]))
        monkeypatch.setattr(modeling, ours, chosen)
    families.install_recurrent_hooks(families.require_supported(model.config.get_text_config()))
    monkeypatch.setattr(families, "runs_kernels", lambda _: True)
    families._kernels_take_borders.cache_clear()
    try:
        flat = model(tokens, position_ids=packed_positions(), **options).logits
        found = torch.autograd.grad((flat * weights).sum(), list(model.parameters()))
    finally:
        families._kernels_take_borders.cache_clear()
    assert calls
    assert all(borders.tolist() == [0, 5, 6, 15, 23, 46, 57, 69] for borders in calls)
    torch.testing.assert_close(flat, apart, atol=EXACT, rtol=0)
    for actual, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, gradient, atol=1e-6 * max(gradient.abs().max().item(), 1), rtol=0)


@pytest.mark.parametrize("keyword", ["cu_seqlens", "seq_idx"])
def test_torch_code_that_would_ignore_borders_is_not_given_any(keyword: str) -> None:
    """transformers refuses them without a kernel. The hooks that mull installs for the whole process keep that."""
    wrap_transformer_with_etd(tiny("qwen3_5"), SPLIT)
    x = torch.randn(1, 6, 2, 4)
    given = {"g": -torch.rand(1, 6, 2), "beta": torch.rand(1, 6, 2), keyword: torch.tensor([0, 3, 6])}
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        modeling_qwen3_5.torch_chunk_gated_delta_rule(x, x, x, **given)
