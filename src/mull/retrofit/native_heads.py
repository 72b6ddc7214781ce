"""The multi-token module of released checkpoints: ``mtp.*``, which Qwen3-Next and Qwen3.5 carry and transformers drops.

It is read and checked tensor by tensor, given the hidden state that it was trained on, and written back where serving engines
look for it.

Shapes: B batch, T tokens, D model width, V vocabulary, E experts, I width of an expert.
"""

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, cached_files

from mull.layers.heads import MTPHeads, before_norm, shifted
from mull.model.causal_lm import MullForCausalLM
from mull.model.configuration import MullConfig
from mull.model.executor import run_layer
from mull.retrofit.reading import listed, opened, read_config, read_weight_map, tensors_in
from mull.retrofit.source import find_source
from mull.runtime import storage
from mull.runtime.arguments import require

logger = logging.getLogger(__name__)

HiddenState = Literal["normed", "stream"]

PREFIX = "mtp."
"""Prefix of the names of native heads, in checkpoints and in a `MullForCausalLM`."""

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Keywords of transformers' ``from_pretrained`` that say where to find the files of a checkpoint."""


LAYER_COUNT_FIELDS = {
    "qwen3_next": "num_nextn_predict_layers",
    "qwen3_5_text": "mtp_num_hidden_layers",
    "qwen3_5_moe_text": "mtp_num_hidden_layers",
}
"""Field of the text configuration from which engines read the module's number of layers, by ``model_type``. The heads of these
architectures were trained on the ``normed`` state, which engines give them. For others, `calibrate_hidden_state` measures it."""

_EXPERT = re.compile(r"(?P<stem>.*\bmlp\.experts)\.(?P<index>\d+)\.(?P<map>gate|up|down)_proj\.weight")
_FUSED = re.compile(r"(?P<stem>.*\bmlp\.experts)\.(?P<map>gate_up|down)_proj")
_LAYER = re.compile(rf"{re.escape(PREFIX)}layers\.(\d+)\.")
_IDENTITY = (
    "model_type",
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every expert's matrices names of their own, as Qwen3-Next's checkpoints do. Other tensors are not changed.

    ``mlp.experts.gate_up_proj`` ``[E, 2I, D]`` and ``mlp.experts.down_proj`` ``[E, D, I]`` become
    ``mlp.experts.N.gate_proj.weight`` ``[I, D]``, ``up_proj`` and ``down_proj`` ``[D, I]``, which are views.
    """
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fused = _FUSED.fullmatch(name)
        if fused is None:
            split[name] = tensor
            continue
        maps = fused["map"].split("_")
        for expert, matrix in enumerate(tensor):
            for kind, part in zip(maps, matrix.chunk(len(maps)), strict=True):
                split[f"{fused['stem']}.{expert}.{kind}_proj.weight"] = part
    return split


def fuse_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the matrices of all experts, as transformers does in memory: the inverse of `split_experts`."""
    fused: dict[str, Tensor] = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            fused[name] = tensor
        else:
            experts.setdefault(expert["stem"], {}).setdefault(int(expert["index"]), {})[expert["map"]] = tensor
    for stem, by_index in experts.items():
        in_order = [by_index[index] for index in sorted(by_index)]
        fused[f"{stem}.gate_up_proj"] = torch.stack([torch.cat([maps["gate"], maps["up"]]) for maps in in_order])
        fused[f"{stem}.down_proj"] = torch.stack([maps["down"] for maps in in_order])
    return fused


def read_native_heads(name_or_dir: str, **hub_options: Any) -> dict[str, Tensor]:
    """Read the ``mtp.*`` tensors of a checkpoint. Of a sharded one on the hub, only the files that contain them are fetched.

    Args:
        name_or_dir: Directory or hub name of a checkpoint in safetensors.
        hub_options: Some of `HUB_OPTIONS`.

    Returns:
        Tensors on the CPU by their names in the checkpoint.

    Raises:
        OSError: no checkpoint in safetensors at `name_or_dir`.
        ValueError: the checkpoint has no such tensors, more than one layer of them, or fewer than its index lists.
    """
    name_or_dir = find_source(name_or_dir, **hub_options).name
    tensors: dict[str, Tensor] = {}
    for file, names in _files_with_heads(name_or_dir, hub_options).items():
        with opened(file) as shard:
            missing = set(names) - set(shard.keys())
            if missing:
                raise ValueError(
                    f"The index of {name_or_dir} places {listed(missing)} in {Path(file).name}, which has no such tensor: the "
                    "checkpoint is damaged. Fetch it again."
                )
            tensors.update({name: shard.get_tensor(name) for name in names})
    if not tensors:
        raise ValueError(
            f"{name_or_dir} has no native heads: no tensor's name begins with {PREFIX!r}. Leave --mtp out to decode without "
            "them (mtp=None in Python). To train heads, choose another mtp_head_type (transformer, mlp, shared_lm_head or "
            "sequential) under model.mtp of a recipe, or add untrained native heads with wrap_transformer_with_etd."
        )
    layers = {int(found[1]) for name in tensors if (found := _LAYER.match(name))}
    if layers - {0}:
        raise ValueError(
            f"The native heads of {name_or_dir} have {len(layers)} layers (mtp.layers.{max(layers)} is one). Only heads of one "
            "layer, which is run recursively, are supported: all released Qwen3-Next and Qwen3.5 checkpoints have such heads."
        )
    return tensors


def _files_with_heads(name_or_dir: str, hub_options: Mapping[str, Any]) -> dict[str, list[str]]:
    """Files that contain native heads, and the names to read from each."""
    # The index comes first: `export_native_heads` adds one beside a single model.safetensors.
    index = cached_file(
        name_or_dir, SAFE_WEIGHTS_INDEX_NAME, **hub_options, _raise_exceptions_for_missing_entries=False
    )
    if index is None:
        file = cached_file(name_or_dir, SAFE_WEIGHTS_NAME, **hub_options)
        assert file is not None
        return {file: [name for name in tensors_in(Path(file)) if name.startswith(PREFIX)]}
    by_shard: dict[str, list[str]] = {}
    for name, shard in json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].items():
        if name.startswith(PREFIX):
            by_shard.setdefault(shard, []).append(name)
    if not by_shard:  # transformers does not accept an empty list of files
        return {}
    files = cached_files(name_or_dir, list(by_shard), **hub_options)
    assert files is not None
    return dict(zip(files, by_shard.values(), strict=True))


def load_native_heads(model: MullForCausalLM, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy the weights that `read_native_heads` found into a model with native heads; dtype and device remain the model's.

    Args:
        model: A model with heads of type ``native``; changed in place.
        tensors: Every tensor of the heads, with experts stacked or one by one.
        source: Name of the checkpoint in messages.

    Raises:
        ValueError: a tensor is missing, left over or of another shape, or the heads are on the meta device.
    """
    heads = _native_heads(model)
    expected = {f"{PREFIX}{name}": value.to("meta") for name, value in heads.state_dict().items()}
    if any(_EXPERT.fullmatch(name) for name in tensors):
        expected = split_experts(expected)
    reshaped = [
        f"{name} of shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    faults = {
        "missing": expected.keys() - tensors.keys(),
        "left over": tensors.keys() - expected.keys(),
        "of another shape": reshaped,
    }
    if any(faults.values()):
        found = "; ".join(f"{what}: {listed(names)}" for what, names in faults.items() if names)
        raise ValueError(
            f"The {PREFIX}* tensors of {source} do not fit native heads for a model of its configuration. {found}. "
            "Use a checkpoint that is complete and not quantized, or another mtp_head_type."
        )
    if model.lm_head.weight.is_meta:
        raise ValueError(
            f"The model of {source} has no memory for native heads: its lm_head is offloaded or on the meta device. Choose a "
            "device_map that keeps lm_head on a device."
        )
    heads.load_state_dict({name.removeprefix(PREFIX): value for name, value in fuse_experts(tensors).items()})


def _native_heads(model: MullForCausalLM) -> MTPHeads:
    require("model", model, MullForCausalLM, "a model of mull.from_pretrained")
    config, heads = model.mtp_config, model.mtp_heads
    if config is None or heads is None or config.mtp_head_type != "native":
        given = "no heads" if config is None else f"heads of type {config.mtp_head_type}"
        raise ValueError(f"The model has {given}, not native ones: load it with mtp=MTPConfig(mtp_head_type='native').")
    return heads


def pin_hidden_state(model: MullForCausalLM, hidden_state: HiddenState) -> None:
    """Let the heads read this state from now on. The choice is saved with the model."""
    assert model.mtp_config is not None
    model.mtp_config = model.mtp_config.model_copy(update={"native_hidden_state": hidden_state})
    model.config.mtp = model.mtp_config.model_dump()


def choose_hidden_state(model: MullForCausalLM, source: str) -> None:
    """Pin the state that the heads read: known for the architectures in `LAYER_COUNT_FIELDS`, measured for others."""
    if model.config.get_text_config().model_type in LAYER_COUNT_FIELDS:
        pin_hidden_state(model, "normed")
    else:
        calibrate_hidden_state(model, source)


@torch.no_grad()
def calibrate_hidden_state(model: MullForCausalLM, source: str = "the model") -> HiddenState:
    """Find out which state native heads were trained on, and pin it.

    The wrong state only lowers acceptance; nothing else would reveal it. The model samples some text with a fixed seed. On this
    text, step 1 of the heads predicts the token that the model itself finds most likely one position later. The state that gives
    the smaller cross-entropy is pinned. If with neither state the heads are right more often than a constant guess of the most
    frequent token, they predict nothing: a warning says so, and ``normed`` is pinned.

    Args:
        model: A model with native heads, in evaluation mode. It runs without think iterations, as the base model does that the
            heads were trained with.
        source: Name of the checkpoint in messages.

    Returns:
        The state that was pinned.

    Raises:
        ValueError: the model has no native heads.
    """
    _native_heads(model)
    tokens = _own_text(model, n_rows=4, n_tokens=64)
    normed = model.hidden_states(tokens, think_iterations=1)
    chosen = model.lm_head(normed)[:, 1:].argmax(-1).flatten()  # token i + 2, at positions 0 to T - 2
    read: dict[HiddenState, Tensor] = {"normed": normed, "stream": before_norm(normed, model.model.norm)}
    entropies: dict[HiddenState, float] = {}
    agreement: dict[HiddenState, float] = {}
    for hidden_state, states in read.items():
        logits = _step_one(model, states, tokens)[:, :-1].flatten(0, 1).float()  # (B (T - 1), V)
        entropies[hidden_state] = F.cross_entropy(logits, chosen).item()
        agreement[hidden_state] = (logits.argmax(-1) == chosen).float().mean().item()
    chance = chosen.unique(return_counts=True)[1].max().item() / len(chosen)
    report = " and ".join(f"{entropies[name]:.2f} nats, {agreement[name]:.0%} equal for {name!r}" for name in read)
    best = min(entropies, key=lambda name: entropies[name])
    if max(agreement.values()) > chance:
        logger.info("The native heads of %s read the %r state: %s on %d tokens.", source, best, report, len(chosen))
    else:
        best = "normed"
        warnings.warn(
            f"The native heads of {source} predict nothing of what the model writes ({report}; guessing always the most "
            f"frequent token: {chance:.0%}). They are untrained or belong to another model: drafting with them is slower than "
            "decoding without drafts.",
            stacklevel=2,
        )
    pin_hidden_state(model, best)
    return best


def _own_text(model: MullForCausalLM, n_rows: int, n_tokens: int) -> Tensor:
    """``[B, T]``: text that the model samples at temperature 1 without a prompt."""
    # `generate` would draw from torch's global generator, which loading a model must not advance.
    generator = torch.Generator().manual_seed(0)
    config = model.config
    starts = [config.bos_token_id, config.eos_token_id, 0]
    start: Any = next(start for start in starts if start is not None)
    first = start[0] if isinstance(start, list) else start
    tokens = torch.full((n_rows, 1), first, device=model.model.embed_tokens.weight.device)
    cache = model.new_cache()
    for _ in range(n_tokens - 1):
        step = model(tokens[:, -1:], past_key_values=cache, use_cache=True, think_iterations=1)
        probabilities = step.logits[:, -1].float().softmax(-1).cpu()
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator).to(tokens.device)], 1)
    return tokens


def _step_one(model: MullForCausalLM, states: Tensor, tokens: Tensor) -> Tensor:
    """``[B, T, V]``: logits of step 1, at position ``i`` for token ``i + 2``; those of the last position are meaningless."""
    inputs = model.model.layer_inputs(states)
    embedded = shifted(model.model.embed_tokens(tokens), 1)
    heads = _native_heads(model)
    return model.lm_head(heads(1, states, embedded, lambda block, h, _k: run_layer(block, "full_attention", h, inputs)))


def export_native_heads(model: MullForCausalLM, directory: str | Path) -> None:
    """Add the heads to the directory of the Hugging Face checkpoint that they belong to, for serving engines.

    vLLM, SGLang, llama.cpp and others then find base and heads in one place; transformers still loads the base and drops the
    heads. The trunk's files are not touched, except those that contain older heads: they are rewritten without them, so that no
    reader finds two sets. Heads keep their dtype. Their experts are stacked, or one by one, like those of the trunk.

    Replacing the index is atomic and switches to the new heads. A failure before it leaves the old checkpoint; a failure after it
    leaves, at worst, unused files. Engines run the base model without think iterations: heads that were trained with those, or
    on a changed trunk, will have fewer drafts accepted.

    Args:
        model: A model with native heads that read the final-normed state, as engines do.
        directory: Local directory of a safetensors checkpoint of the model's architecture.

    Raises:
        OSError: there is no such checkpoint, or the disk is full.
        ValueError: the model has no native heads, no engine reads them for this architecture, or the directory belongs to another
            model.
    """
    folder = storage.local_path(directory)
    field = _check_export(model, folder)
    weight_map = read_weight_map(folder)
    files = sorted(set(weight_map.values()))
    outdated = [file for file in files if any(name.startswith(PREFIX) for name in tensors_in(folder / file))]
    heads = {f"{PREFIX}{name}": value for name, value in _native_heads(model).state_dict().items()}
    if any(_EXPERT.fullmatch(name) for name in weight_map):
        heads = split_experts(heads)
    with contextlib.ExitStack() as undo:
        entries = {name: file for name, file in weight_map.items() if not name.startswith(PREFIX)}
        entries.update(dict.fromkeys(heads, _write_shard(undo, folder, "model-mtp", heads)))
        for file in outdated:
            kept = [name for name, place in entries.items() if place == file]
            if kept:
                with opened(folder / file) as shard:
                    tensors = {name: shard.get_tensor(name) for name in kept}
                entries.update(dict.fromkeys(kept, _write_shard(undo, folder, f"{Path(file).stem}-trunk", tensors)))
        storage.flush_folder(str(folder))
        _write_index(folder, entries)
        undo.pop_all()
    for file in outdated:
        (folder / file).unlink()
    _write_layer_count(folder, field)


def _check_export(model: MullForCausalLM, folder: Path) -> str:
    """Refuse an export that engines could not use. Returns the field of the configuration that tells engines about heads."""
    heads = _native_heads(model)
    config = model.config.get_text_config()
    field = LAYER_COUNT_FIELDS.get(config.model_type)
    if field is None:
        raise ValueError(
            f"No serving engine reads {PREFIX}* weights of {config.model_type!r}, only those of {', '.join(LAYER_COUNT_FIELDS)}. "
            "save_pretrained keeps the heads for mull."
        )
    assert model.mtp_config is not None
    if model.mtp_config.native_hidden_state != "normed":
        raise ValueError(
            f"These heads read native_hidden_state={model.mtp_config.native_hidden_state!r}, but serving engines give them the "
            "'normed' state. Train them with native_hidden_state='normed'."
        )
    if any(parameter.is_meta for parameter in heads.parameters()):
        raise ValueError("The heads are on the meta device and have no values to export. Load the model first.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not the directory of a checkpoint: it has no config.json.")
    there = read_config(str(folder))
    if isinstance(there, MullConfig):
        raise ValueError(
            f"{folder} is a model that mull saved, which serving engines cannot read. Give the directory of the Hugging Face "
            "checkpoint that the model was made from; for mull itself, use save_pretrained."
        )
    _check_same_model(config, there.get_text_config(), folder)
    return field


def _check_same_model(config: PreTrainedConfig, there: PreTrainedConfig, folder: Path) -> None:
    pairs = {name: (getattr(there, name, None), getattr(config, name, None)) for name in _IDENTITY}
    differences = [f"{name}={given!r} instead of {own!r}" for name, (given, own) in pairs.items() if given != own]
    if differences:
        raise ValueError(
            f"{folder} is not the model that these heads belong to: {', '.join(differences)}. Give the directory of the "
            "checkpoint that they were trained with."
        )


def _write_shard(undo: contextlib.ExitStack, folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> str:
    """Write a file under a new name, which is returned, and have it removed if a later step fails."""
    names = [f"{stem}.safetensors", *(f"{stem}-{number}.safetensors" for number in range(1, 1000))]
    name = next(name for name in names if not (folder / name).exists())
    undo.callback((folder / name).unlink, missing_ok=True)
    try:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / name} could not be written: {error}") from error
    return name


def _write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    tensors = {file: tensors_in(folder / file) for file in set(weight_map.values())}
    infos = [tensors[file][name] for name, file in weight_map.items()]
    metadata = {
        "total_parameters": sum(info.parameter_count for info in infos),
        "total_size": sum(info.data_offsets[1] - info.data_offsets[0] for info in infos),
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    storage.write_text_atomic(str(folder / SAFE_WEIGHTS_INDEX_NAME), json.dumps(index, indent=2) + "\n")


def _write_layer_count(folder: Path, field: str) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    text_config = config.get("text_config", config)
    if text_config.get(field) != 1:
        text_config[field] = 1
        storage.write_text_atomic(str(file), json.dumps(config, indent=2) + "\n")
