"""Tiny random models of every supported family, on the CPU."""

import importlib
import os
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mull.model.configs import ETDConfig

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_BY_KIND = {"full_attention": ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "olmo3": ("olmo3", {"sliding_window": 6, "rope_parameters": ROPE_BY_KIND}),
    "qwen3_next-dense": ("qwen3_next", {**LINEAR, "num_experts": 0}),
    "qwen3_next-moe": ("qwen3_next", {**LINEAR, **MOE}),
    "qwen3_5": ("qwen3_5_text", LINEAR),
    "qwen3_5-moe": ("qwen3_5_moe_text", {**LINEAR, **MOE}),
    "olmo_hybrid": ("olmo_hybrid", {**LINEAR, "num_key_value_heads": 4, "rope_parameters": ROPE}),
    "olmo_hybrid-nope": ("olmo_hybrid", {**LINEAR, "num_key_value_heads": 4, "rope_parameters": {"rope_theta": None}}),
}
HYBRIDS = ["qwen3_next-dense", "qwen3_next-moe", "qwen3_5", "qwen3_5-moe", "olmo_hybrid", "olmo_hybrid-nope"]
MANY_FAMILIES = 6
EXACT = 1e-6
"""Tolerance of comparisons in fp64. Errors in bookkeeping are 1e-3 and more, rounding is 1e-15; but transformers' norms round to
fp32 on the way, and where 1e-15 crosses such a boundary it comes back as 5e-8 (measured)."""

SPLIT = ETDConfig(n_encoder_layers=2, n_think_layers=4, n_decoder_layers=2)


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of `family`: 8 layers, width 32."""
    model_type, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**{**COMMON, **options, **changes})
    # The grouped kernel of experts exists in fp32 and below only.
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    return AutoModelForCausalLM.from_config(config, **experts).to(dtype).eval()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Choose the quick tests among the combinations of a test's parameters; the rest is slow.

    ``latin(n, *names)``: of all combinations of these parameters (default: of all), every n-th diagonal is quick. As in a Latin
    square, any two of three parameters still meet in each pair of their values. A test of many families without this mark has
    every other diagonal; which of the two depends on the test, so that each family is in half of the tests.
    """
    functions: dict[Any, list[Any]] = {}
    for item in items:
        if hasattr(item, "callspec"):
            functions.setdefault(item.function, []).append(item)  # type: ignore[attr-defined]
    for function, cases in functions.items():
        mark = cases[0].get_closest_marker("latin")
        params = [case.callspec.params for case in cases]
        families = {value for of_case in params for value in of_case.values() if str(value) in FAMILIES}
        if mark is None and len(families) < MANY_FAMILIES:
            continue
        every, *names = (2,) if mark is None else mark.args
        names = names or list(params[0])
        start = 0 if mark is not None else zlib.crc32(function.__name__.encode())
        numbers: dict[str, dict[str, int]] = {name: {} for name in names}
        for case, of_case in zip(cases, params, strict=True):
            # pytest's own indices count combinations, not values.
            places = [numbers[name].setdefault(repr(of_case[name]), len(numbers[name])) for name in names]
            if (start + sum(places)) % every:
                case.add_marker("slow")


def delta_rule_reference(
    query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule token by token in fp64, written from the paper (arXiv:2412.06464, equation 10)."""

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()

    query, key, value, g, beta = (x.double() for x in (query, key, value, g, beta))
    groups = value.shape[2] // key.shape[2]
    query = unit(query).repeat_interleave(groups, 2) / query.shape[-1] ** 0.5
    key = unit(key).repeat_interleave(groups, 2)
    rows, tokens, heads, width = key.shape
    state = (
        torch.zeros(rows, heads, width, value.shape[-1], dtype=torch.float64)
        if initial_state is None
        else initial_state
    )
    eye = torch.eye(width, dtype=torch.float64)
    out = []
    for t in range(tokens):
        k, b = key[:, t, :, :, None], beta[:, t, :, None, None]
        state = g[:, t, :, None, None].exp() * (eye - b * k @ k.mT) @ state + b * k @ value[:, t, :, None, :]
        out.append((query[:, t, :, None, :] @ state)[:, :, 0])
    return torch.stack(out, 1), state


CONV1D = torch.nn.functional.conv1d


def conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """torch's, but depthwise in fp64 as a sum over the taps: with the backward pass, torch takes seven times as long."""
    if x.dtype != torch.float64 or groups != x.shape[-2] or {stride, dilation} - {1, (1,)}:
        return CONV1D(x, weight, bias, stride, padding, dilation, groups)
    n = padding if isinstance(padding, int) else padding[0]
    windows = torch.nn.functional.pad(x, (n, n)).unfold(-1, weight.shape[-1], 1)
    out = (windows * weight).sum(-1)  # [B, C, T, taps] * [C, 1, taps]
    return out if bias is None else out + bias[:, None]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PreTrainedModel]:
    """Tiny models in fp64 throughout: transformers' own delta rules compute in fp32, so the reference takes their place."""
    for module in ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid"):
        modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        for rule in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
            monkeypatch.setattr(modeling, rule, delta_rule_reference)
    monkeypatch.setattr(torch.nn.functional, "conv1d", conv1d)
    return lambda family, **changes: tiny(family, dtype=torch.float64, **changes)


@pytest.fixture(autouse=True)
def _one_thread_fixed_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Random token ids without the special ones."""

    def make(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def real_model() -> str:
    """Directory of a pretrained model of a few hundred million parameters, with its tokenizer."""
    directory = os.environ.get("MULL_REAL_MODEL")
    if directory is None:
        pytest.skip("MULL_REAL_MODEL names no directory with a pretrained model.")
    return directory
