"""Tiny random models of every supported family, on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mull.configs import ETDConfig

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
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "olmo3": ("olmo3", {"sliding_window": 6}),
    "qwen3_next-dense": ("qwen3_next", {**LINEAR, "num_experts": 0}),
    "qwen3_next-moe": ("qwen3_next", {**LINEAR, **MOE}),
    "qwen3_5": ("qwen3_5_text", LINEAR),
    "olmo_hybrid": ("olmo_hybrid", {**LINEAR, "num_key_value_heads": 4}),
}
HYBRIDS = ["qwen3_next-dense", "qwen3_next-moe", "qwen3_5", "olmo_hybrid"]
SPLIT = ETDConfig(n_encoder_layers=2, n_think_layers=4, n_decoder_layers=2)


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of `family`: 8 layers, width 32."""
    model_type, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**{**COMMON, **options, **changes})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


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
