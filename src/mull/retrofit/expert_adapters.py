"""One LoRA expert as an adapter of PEFT, and the other way round.

The adapter belongs to the backbone: on the model that was retrofitted, PEFT gives what mull gives with one iteration if every
token chooses this expert.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mull.layers.experts import LoRABranches
from mull.model.causal_lm import MullForCausalLM
from mull.model.experts import Experts, LayerExperts
from mull.runtime.arguments import require, require_count
from mull.runtime.distributed import whole

PREFIX = "base_model.model."
"""Where PEFT keeps the model that it adapts."""

UNKNOWN = (
    "use_dora",
    "use_rslora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "fan_in_fan_out",
    "alora_invocation_tokens",
)
"""What an adapter may have and an expert cannot."""

STARTS = (True, False, "gaussian", "orthogonal")
"""Ways to begin an adapter (``init_lora_weights``) that leave the weights of the model as they are."""


def export_expert(model: MullForCausalLM, expert: int, folder: str | os.PathLike[str]) -> None:
    """Save one expert as an adapter that PEFT loads on the backbone.

    Args:
        model: A model with LoRA experts.
        expert: Its number, from 0.
        folder: Where to; missing folders are made.

    Raises:
        FileExistsError: `folder` is a file.
        ImportError: PEFT is not installed.
        TypeError: an argument of another type.
        ValueError: the model has no experts, or not so many.
    """
    peft = _peft()
    experts = _experts(model, expert)
    branches = dict(_branches(experts))
    tensors = {
        f"{PREFIX}{path}.{name}.weight": whole(weights)[expert].detach().cpu().contiguous()
        for path, part in branches.items()
        for name, weights in (("lora_A", part.lora_A), ("lora_B", part.lora_B))
    }
    settings = experts.config
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(branches),
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=getattr(model.config.get_text_config(), "_name_or_path", "") or None,
    )
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{place} is a file: give a folder for the adapter.")
    place.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(place))
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def load_expert(model: MullForCausalLM, expert: int, folder: str | os.PathLike[str]) -> None:
    """Replace one expert by a LoRA adapter of PEFT.

    A rank below the experts' is filled with zeros, another scale is multiplied into B, and maps that the adapter leaves alone get
    a B of zero.

    Args:
        model: A model with LoRA experts.
        expert: Its number, from 0.
        folder: The adapter's folder, or its name on the hub.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: PEFT is not installed.
        TypeError: an argument of another type.
        ValueError: the model has no experts, or not so many; or the adapter is of another kind, of a higher rank, or changes
            something that has no experts.
    """
    peft = _peft()
    experts = _experts(model, expert)
    if not Path(folder).is_dir() and str(folder).count("/") != 1:  # a name on the hub has one
        raise FileNotFoundError(f"There is no folder {folder}: give that of an adapter, or its name on the hub.")
    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    odd = [name for name in UNKNOWN if getattr(config, name, None)]
    if getattr(config, "init_lora_weights", True) not in STARTS:
        odd.append(f"init_lora_weights={config.init_lora_weights}")
    if config.peft_type != "LORA" or getattr(config, "bias", "none") != "none" or odd:
        raise ValueError(
            f"{folder} is no plain LoRA adapter ({', '.join(odd) or config.peft_type}, bias={getattr(config, 'bias', None)!r}): "
            "an expert has matrices A and B, and nothing else."
        )
    if config.r > experts.config.rank:
        raise ValueError(
            f"{folder} has rank {config.r}, and the experts have {experts.config.rank}: give lora_expert.rank={config.r}."
        )
    tensors = peft.utils.load_peft_weights(str(folder), device="cpu")
    found = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    branches = dict(_branches(experts))
    known = {f"{path}.{name}.weight" for path in branches for name in ("lora_A", "lora_B")}
    if others := sorted(found.keys() - known):
        raise ValueError(
            f"{folder} changes {re.sub(r'.lora_[AB].*', '', others[0])}, which has no experts here ({len(others)} tensors): they "
            f"are on {', '.join(experts.config.target_modules)} of layers {', '.join(experts.layers)}. Train the adapter with "
            f"layers_to_transform=[{', '.join(experts.layers)}]."
        )
    scale = config.lora_alpha / config.r / (experts.config.alpha / experts.config.rank)
    filling = experts.config.rank - config.r
    for path, part in branches.items():
        a, b = (found.get(f"{path}.{name}.weight") for name in ("lora_A", "lora_B"))
        if a is None or b is None:
            part.lora_B[expert] = 0
            continue
        _copy(part.lora_A[expert], F.pad(a, (0, 0, 0, filling)), f"{path}.lora_A")
        _copy(part.lora_B[expert], F.pad(b * scale, (0, filling)), f"{path}.lora_B")


def _copy(to: Tensor, values: Tensor, name: str) -> None:
    if to.shape != values.shape:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} and the expert's {tuple(to.shape)}: it is of another backbone."
        )
    to.copy_(values)


def _branches(experts: Experts) -> Iterator[tuple[str, LoRABranches]]:
    """By the name of the linear map in the backbone."""
    for layer, of_layer in experts.layers.items():
        assert isinstance(of_layer, LayerExperts)
        for name, path in of_layer.paths.items():
            branches = of_layer.maps[name]
            assert isinstance(branches, LoRABranches)
            yield f"model.layers.{layer}.{path}", branches


def _experts(model: MullForCausalLM, expert: int) -> Experts:
    require("model", model, MullForCausalLM, "a model with LoRA experts")
    if model.etd is None or model.etd.experts is None:
        raise ValueError("The model has no LoRA experts: load it with etd=ETDConfig(..., use_lora_experts=True).")
    require_count("expert", expert, 0, model.etd.experts.n_experts - 1)
    return model.etd.experts


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("Adapters of PEFT need PEFT: pip install peft.") from None
    return peft
