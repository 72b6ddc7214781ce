"""The same weights as transformers' own classes hold them, to compare mull with."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import layer_kinds
from mull.retrofit.reading import NO_CODE

HEAD_PARTS = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "shared_head.norm"}
"""Parts of mull's sequential head, and their names in DeepSeek's checkpoints, which transformers reads."""

BACKBONE = ("embed_tokens", "layers", "norm", "rotary_emb")


def stock_model(model: MullForCausalLM) -> PreTrainedModel:
    """The backbone as a model of transformers, which shares its weights. It has no heads, loops or routes.

    Raises:
        ValueError: the model has gates on its attention, which transformers' class would leave out.
    """
    if model.model.attention_gates is not None:
        raise ValueError("transformers has no class for this model: it has gates on its attention.")
    with torch.device("meta"):
        stock: Any = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.get_text_config()))
    for name in BACKBONE:
        setattr(stock.model, name, getattr(model.model, name))
    stock.lm_head = model.lm_head
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


def can_use_mtp(model: MullForCausalLM) -> bool:
    """Whether transformers can draft with the model's heads: several sequential ones, on a backbone without recurrent layers."""
    heads = model.mtp_heads
    if heads is None or not heads.sequential or heads.recursive:
        return False
    return "linear_attention" not in layer_kinds(model.config.get_text_config())


def write_stock(model: MullForCausalLM, folder: Path) -> None:
    """Write a checkpoint of transformers' own classes, with the heads under the names of DeepSeek's where `can_use_mtp`."""
    stock, heads = stock_model(model), {}
    if can_use_mtp(model):
        own: Any = model.mtp_heads
        heads = _stock_heads(own, stock.config.num_hidden_layers)
        stock.config.update({"num_mtp_layers": own.n_heads, "mtp_layer_types": ["full_attention"] * own.n_heads})
    stock.save_pretrained(folder, state_dict={**stock.state_dict(), **heads})


def _stock_heads(heads: Any, n_layers: int) -> dict[str, Tensor]:
    """Tensors of sequential heads under the names of decoder layers after the last."""
    tensors = {}
    for number, head in enumerate(heads.heads, start=n_layers):
        for name, tensor in head.state_dict().items():
            part, _, rest = name.partition(".")
            tensors[f"model.layers.{number}.{rest if part == 'block' else f'{HEAD_PARTS[part]}.{rest}'}"] = tensor
    return tensors


def load_stock(folder: Path, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """Load what `write_stock` wrote, for ``generate(use_mtp=True)`` where there are heads.

    transformers finds the tensors of the heads by a pattern that a model's class has, and most have none: a subclass gets it.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    n_layers, n_heads = config["num_hidden_layers"], config.get("num_mtp_layers", 0)
    cls: Any = AutoModelForCausalLM
    if n_heads:
        own: Any = AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder, **NO_CODE))]
        patterns = [rf"model\.layers\.{number}\..*" for number in range(n_layers, n_layers + n_heads)]
        cls = type(f"{own.__name__}WithHeads", (own,), {"_keys_to_ignore_on_load_unexpected": patterns})
    model: PreTrainedModel = cls.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval()  # type: ignore[arg-type]


@contextmanager
def heads_loaded_once(kept: dict[int, MtpModel]) -> Iterator[None]:
    """Let ``generate(use_mtp=True)`` load the heads of a model once; it loads them from disk at each call.

    Args:
        kept: Where they are kept, by ``id`` of their model.
    """
    load = MtpModel.from_pretrained

    def once(main_model: PreTrainedModel, **options: Any) -> MtpModel:
        if id(main_model) not in kept:
            kept[id(main_model)] = load(main_model, **options)
        return kept[id(main_model)]

    with mock.patch.object(MtpModel, "from_pretrained", once):
        yield
