"""Convert a Qwen3 model into a hybrid, one layer at a time: from safetensors to safetensors, or into memory.

What is written is a checkpoint of transformers. Nothing of mull is needed to load it. Every tensor is accounted for: where each
one of the hybrid comes from, and that each one of the source is used once.
"""

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from mull.model.causal_lm import MullForCausalLM
from mull.retrofit.hybrid import CrossArchTransferConfig, Target, convert_layer, hybrid_config, store_norm
from mull.retrofit.native_heads import fuse_experts, split_experts
from mull.retrofit.reading import explained, listed, opened, read_weight_map, tensors_in
from mull.retrofit.source import find_source, load_config
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime import storage
from mull.runtime.arguments import Frozen, require
from mull.runtime.progress import Progress

REPORT = "conversion.jsonl"
"""File of a converted checkpoint: what was converted, and a line for each weight file. It also says how far a conversion is."""

COMPANIONS = (
    *(
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "*.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
    ),
    *("additional_chat_templates", GENERATION_CONFIG_NAME, "LICENSE*", "NOTICE*"),
)
"""Files of a checkpoint that are copied as they are."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class TensorOrigin(Frozen):
    """Where a tensor of the hybrid comes from."""

    origin: Literal["copied", "derived", "fresh"]
    """``copied``: the source's values. ``derived``: computed from them. ``fresh``: the source has nothing like it."""

    sources: tuple[str, ...]
    """Names of the source's tensors that it is made from."""

    shape: tuple[int, ...]

    error: float = 0.0
    """Of a norm: largest relative error of its weights from storing ``w - 1``; 0 if all are exact."""


class Coverage(Frozen):
    """What became of every tensor."""

    tensors: dict[str, TensorOrigin]
    """By the name in the hybrid."""

    @property
    def used(self) -> dict[str, str]:
        """The tensor of the hybrid that each tensor of the source went into."""
        return {source: name for name, made in self.tensors.items() for source in made.sources}

    def counts(self) -> dict[str, tuple[int, int]]:
        """Tensors and parameters by origin."""
        counts = dict.fromkeys(("copied", "derived", "fresh"), (0, 0))
        for made in self.tensors.values():
            n, parameters = counts[made.origin]
            counts[made.origin] = (n + 1, parameters + torch.Size(made.shape).numel())
        return counts

    def rounded(self) -> dict[str, float]:
        """Norms with weights that the precision cannot hold as ``w - 1``, and their largest relative error."""
        return {name: made.error for name, made in self.tensors.items() if made.error}


class Weights(NamedTuple):
    """A source and its tensors, of which none has been read."""

    config: PreTrainedConfig
    tensors: dict[str, Tensor]
    """On the meta device."""

    read: Callable[[Sequence[str]], dict[str, Tensor]]
    generation_config: GenerationConfig | None
    folder: Path | None
    """None for a model in memory."""


class Part(NamedTuple):
    """What is read, converted and written at once: the embedding, one layer, or the rest."""

    tensors: list[str]
    """Names in the source."""

    layer: int | None = None


class Plan(NamedTuple):
    """A conversion that was checked and not yet begun."""

    weights: Weights
    settings: CrossArchTransferConfig
    config: PreTrainedConfig
    """Of the hybrid."""

    dtype: torch.dtype
    expected: dict[str, Tensor]
    """Tensors of the hybrid on the meta device, by their names in a file."""

    parts: list[Part]


def create_hybrid_from_qwen3(
    source: str | os.PathLike[str] | PreTrainedModel,
    config: CrossArchTransferConfig | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> MullForCausalLM:
    """Convert a model in memory.

    Args:
        source: Folder or hub name of a Qwen3 or Qwen3-MoE checkpoint in safetensors, or such a model. A model is not changed and
            shares no memory with the result.
        config: Which layers become DeltaNet; default: three of four.
        device: Device of the result; default: that of the source.
        dtype: Precision of the result; default: that of the source.

    Returns:
        The hybrid in evaluation mode. `mull.retrofit.convert.convert_checkpoint` writes it to a folder instead.

    Raises:
        OSError: no checkpoint there.
        TypeError: an argument of another type.
        ValueError: the source is no Qwen3, has something that the hybrid cannot express, or a tensor is missing, left over or of
            another shape; names it.
    """
    model, _ = convert_model(source, config, dtype)
    return wrap_transformer_with_etd(model if device is None else model.to(device), None)  # type: ignore[arg-type]


def convert_model(
    source: str | os.PathLike[str] | PreTrainedModel,
    config: CrossArchTransferConfig | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, Coverage]:
    """The hybrid as a model of transformers, and what became of every tensor; see `create_hybrid_from_qwen3`."""
    plan = _plan(open_weights(source), config, dtype)
    state: dict[str, Tensor] = {}
    made: dict[str, TensorOrigin] = {}
    with torch.no_grad(), Progress(len(plan.parts), "part", label="convert", patient=True) as progress:
        for part in plan.parts:
            targets = convert_part(plan, part)
            # Copied tensors are the source's own memory: another model's, or a file that is mapped.
            state |= {name: target.value.clone() for name, target in targets.items()}
            made |= _origins(targets)
            progress.advance()
    coverage = _account(plan, made)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(plan.config, dtype=plan.dtype)
    model.load_state_dict(fuse_experts(state), strict=not plan.config.tie_word_embeddings, assign=True)
    model.tie_weights()
    # Its frequencies are computed, not loaded.
    model.model.rotary_emb = type(model.model.rotary_emb)(plan.config).to(state[EMBEDDING].device)
    if plan.weights.generation_config is not None:
        model.generation_config = copy.deepcopy(plan.weights.generation_config)
    return model.eval(), coverage


def convert_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: CrossArchTransferConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Coverage:
    """Convert a checkpoint to a folder, with the memory of one layer.

    The folder appears when it is complete. Until then its files are in ``.NAME.partial`` beside it, and a conversion that was
    interrupted, however that was, continues from there when it is called again.

    Args:
        source: Folder or hub name of a Qwen3 or Qwen3-MoE checkpoint in safetensors.
        out: New folder. It gets the weights, a file for each layer; the configuration, with the keys that serving engines read;
            tokenizer, chat template and generation configuration of the source; and `REPORT`.
        config: Which layers become DeltaNet; default: three of four.
        dtype: Precision of the result; default: that of the source.

    Returns:
        What became of every tensor.

    Raises:
        OSError: no checkpoint there, or the disk is full.
        RuntimeError: another process writes to this folder.
        TypeError, ValueError: as in `create_hybrid_from_qwen3`, or `out` exists.
    """
    target = storage.local_path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} exists: give a new folder.")
    require("source", source, (str, os.PathLike), "a folder or a name on the hub")
    plan = _plan(open_weights(source), config, dtype)
    assert plan.weights.folder is not None
    staged = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with storage.exclusive(target):
        try:
            records = _write_parts(plan, staged)
            made = {name: TensorOrigin(**fields) for record in records for name, fields in record["tensors"].items()}
            coverage = _account(plan, made)
            _write_rest(plan, staged, records)
        except SafetensorError as error:
            raise OSError(f"{staged} could not be written: {error}. Make room and repeat the command.") from error
        if target.exists():
            target.rmdir()  # empty
        storage.publish(staged, target)
    return coverage


def engine_notes(config: PreTrainedConfig) -> list[str]:
    """What serving engines would make of a hybrid with this configuration, if that is something else."""
    notes = []
    if getattr(config, "full_attention_interval", None) is None:
        notes.append(
            "SGLang would misread this layout: it expects attention in the last layer of each period, and nowhere else. "
            "transformers and vLLM read layer_types and run it."
        )
    if config.attention_bias:
        notes.append(
            "attention_bias is true: transformers reads it, engines may ignore the biases of the gates. Use the strategy zero to "
            "serve the model."
        )
    return notes


def open_weights(source: str | os.PathLike[str] | PreTrainedModel) -> Weights:
    """Find a source's tensors, without reading them.

    Raises:
        OSError, ValueError: no checkpoint in safetensors there.
    """
    if isinstance(source, PreTrainedModel):
        state = source.state_dict()
        if any(tensor.is_meta for tensor in state.values()):
            raise ValueError("The source has weights on the meta device, which have no values: load it first.")
        specs = {name: tensor.to("meta") for name, tensor in state.items()}
        config = source.config.get_text_config()
        return Weights(config, specs, lambda names: {n: state[n] for n in names}, source.generation_config, None)
    require("source", source, (str, os.PathLike), "a folder, a name on the hub or a model of transformers")
    found = find_source(source)
    if "gguf_file" in found.options:
        raise ValueError(f"{source} is a GGUF file: give the checkpoint in safetensors that it was made from.")
    config = load_config(found, {})
    folder = Path(found.name)
    if not folder.is_dir():
        wanted = ["*.safetensors", SAFE_WEIGHTS_INDEX_NAME, "config.json", *COMPANIONS]
        folder = Path(snapshot_download(found.name, allow_patterns=wanted))
    with explained(str(folder), weights=True):
        files = read_weight_map(folder)
        headers = {file: tensors_in(folder / file) for file in sorted(set(files.values()))}
    specs = {}
    for name, file in files.items():
        if name in headers[file]:  # else it is reported as missing
            header = headers[file][name]
            if header.dtype not in DTYPES:
                raise ValueError(
                    f"{name} is in {header.dtype}: give a checkpoint in bf16 or fp32, not a quantized one."
                )
            specs[name] = torch.empty(tuple(header.shape), dtype=DTYPES[header.dtype], device="meta")

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in sorted({files[name] for name in names}):
            with opened(folder / file) as shard:
                tensors |= {name: shard.get_tensor(name) for name in names if files[name] == file}
        return tensors

    generation = folder / GENERATION_CONFIG_NAME
    return Weights(
        config.get_text_config(),
        specs,
        read,
        GenerationConfig.from_pretrained(str(folder)) if generation.is_file() else None,
        folder,
    )


def _plan(weights: Weights, config: CrossArchTransferConfig | None, dtype: torch.dtype | None) -> Plan:
    require("config", config, (CrossArchTransferConfig, NoneType), "a CrossArchTransferConfig, or None")
    require("dtype", dtype, (torch.dtype, NoneType), "a torch.dtype, or None")
    settings = config or CrossArchTransferConfig()
    hybrid = hybrid_config(weights.config, settings)
    _check_source(weights)
    dtypes = {tensor.dtype for tensor in weights.tensors.values()}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(
            f"The source has tensors in {', '.join(sorted(map(str, dtypes)))}: say which precision the hybrid gets (dtype)."
        )
    hybrid.dtype = dtype or dtypes.pop()
    expected = _tensors_of(hybrid)
    if any(".experts.0." in name for name in weights.tensors):
        expected = split_experts(expected)
    last = [NORM, HEAD]
    tied = weights.config.tie_word_embeddings
    parts = [Part([EMBEDDING, *([HEAD] if tied and HEAD in weights.tensors else [])])]
    for layer in range(weights.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        parts.append(Part([name for name in weights.tensors if name.startswith(prefix)], layer))
    parts.append(Part(last[:1] if tied else last))
    return Plan(weights, settings, hybrid, hybrid.dtype, expected, parts)


def _tensors_of(config: PreTrainedConfig) -> dict[str, Tensor]:
    """The tensors that a file of this model has, on the meta device; a tied head is the embedding."""
    with torch.device("meta"):
        tensors: dict[str, Tensor] = AutoModelForCausalLM.from_config(copy.deepcopy(config)).state_dict()
    return {name: value for name, value in tensors.items() if name != HEAD or not config.tie_word_embeddings}


def _check_source(weights: Weights) -> None:
    expected, found = _tensors_of(weights.config), weights.tensors
    if any(".experts.0." in name for name in found):
        expected = split_experts(expected)
    optional = {HEAD} if weights.config.tie_word_embeddings else set()
    shapes = {name: (tuple(found[name].shape), tuple(spec.shape)) for name, spec in expected.items() if name in found}
    faults = {
        "missing": expected.keys() - found.keys(),
        "left over": found.keys() - expected.keys() - optional,
        "of another shape": {
            f"{n} of shape {has} instead of {wants}" for n, (has, wants) in shapes.items() if has != wants
        },
    }
    if any(faults.values()):
        described = "; ".join(f"{what}: {listed(names)}" for what, names in faults.items() if names)
        raise ValueError(f"The source's tensors do not fit its configuration. {described}. Fetch it again.")


def convert_part(plan: Plan, part: Part) -> dict[str, Target]:
    """Tensors of the hybrid by their full names.

    Raises:
        ValueError: a value that the precision cannot hold, or a tied head that differs from the embedding.
    """
    weights, tied = plan.weights, plan.config.tie_word_embeddings
    read = {name: value.to(plan.dtype) for name, value in weights.read(part.tensors).items()}
    if part.layer is None:
        targets = {name: Target(value, "copied", (name,)) for name, value in read.items()}
        if tied and HEAD in targets:
            if not torch.equal(read[HEAD], read[EMBEDDING]):
                raise ValueError(
                    f"{HEAD} differs from {EMBEDDING}, and the configuration ties them: set tie_word_embeddings as it should be."
                )
            targets = {EMBEDDING: Target(read[EMBEDDING], "copied", (EMBEDDING, HEAD))}
        if NORM in read:
            # A tied head is the embedding, too, and cannot take over factors of the norm.
            targets |= store_norm(NORM, read[NORM], {name: target for name, target in targets.items() if name == HEAD})
    else:
        prefix = f"model.layers.{part.layer}."
        layer = convert_layer(
            {name.removeprefix(prefix): value for name, value in read.items()},
            weights.config,
            "full_attention" if plan.config.layer_types[part.layer] == "full_attention" else "linear_attention",
            gate=plan.settings.gate_init_strategy,
            half_life=plan.settings.hybrid_attention.half_life,
            seed=part.layer,
        )
        targets = {
            prefix + name: target._replace(sources=tuple(prefix + source for source in target.sources))
            for name, target in layer.items()
        }
    for name, target in targets.items():
        if target.origin == "derived" and not target.value.isfinite().all():
            raise ValueError(f"{name} has values that {plan.dtype} cannot hold: convert to bf16 or fp32.")
    return targets


def _origins(targets: Mapping[str, Target]) -> dict[str, TensorOrigin]:
    return {
        name: TensorOrigin(
            origin=target.origin, sources=target.sources, shape=tuple(target.value.shape), error=target.error
        )
        for name, target in targets.items()
    }


def _account(plan: Plan, made: Mapping[str, TensorOrigin]) -> Coverage:
    """Every tensor of the hybrid was made once in its shape, from every tensor of the source once.

    Raises:
        RuntimeError: one was not; names it.
    """
    uses = Counter(source for tensor in made.values() for source in tensor.sources)
    faults = {
        "not made": plan.expected.keys() - made.keys(),
        "made without need": made.keys() - plan.expected.keys(),
        "made in another shape": {
            name for name, spec in plan.expected.items() if name in made and made[name].shape != tuple(spec.shape)
        },
        "not used": plan.weights.tensors.keys() - uses.keys(),
        "used twice": {name for name, count in uses.items() if count > 1},
    }
    if any(faults.values()):
        described = "; ".join(f"{what}: {listed(names)}" for what, names in faults.items() if names)
        raise RuntimeError(f"The conversion does not account for every tensor. {described}.")
    return Coverage(tensors=dict(made))


def _write_parts(plan: Plan, staged: Path) -> list[dict[str, Any]]:
    """Write the weight files that are not there yet, and return what became of the tensors of all."""
    header = _header(plan)
    records = _records(staged / REPORT, header)
    if not records:
        # Nothing there, or something that was made from other files or with other settings.
        storage.remove_tree(str(staged))
        staged.mkdir()
    n_parts = len(plan.parts)
    with torch.no_grad(), Progress(n_parts, "file", label="convert", done=len(records)) as progress:
        for number, part in list(enumerate(plan.parts, 1))[len(records) :]:
            file = f"model-{number:05d}-of-{n_parts:05d}.safetensors"
            targets = convert_part(plan, part)
            save_file(
                {name: t.value.contiguous().cpu() for name, t in targets.items()}, staged / file, {"format": "pt"}
            )
            storage.flush_folder(str(staged))
            made = {name: tensor.model_dump(mode="json") for name, tensor in _origins(targets).items()}
            records.append({"file": file, "tensors": made})
            lines = "".join(json.dumps(record) + "\n" for record in (header, *records))
            storage.write_text_atomic(str(staged / REPORT), lines)
            del targets  # before the next part is read
            progress.advance()
    return records


def _header(plan: Plan) -> dict[str, Any]:
    folder = plan.weights.folder
    assert folder is not None
    stats = {file: (folder / file).stat() for file in sorted({*read_weight_map(folder).values(), "config.json"})}
    return {
        "source": str(folder),
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        "settings": plan.settings.model_dump(mode="json"),
        "dtype": str(plan.dtype).removeprefix("torch."),
    }


def _records(report: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Files that an interrupted conversion of the same source with the same settings has finished."""
    if not report.exists():
        return []
    found, *records = map(json.loads, report.read_text(encoding="utf-8").splitlines())
    return records if found == header else []


def _write_rest(plan: Plan, staged: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The index, the configuration, and what is copied."""
    folder = plan.weights.folder
    assert folder is not None
    sizes = [spec.numel() for spec in plan.expected.values()]
    index = {
        "metadata": {"total_parameters": sum(sizes), "total_size": sum(sizes) * plan.dtype.itemsize},
        "weight_map": {name: record["file"] for record in records for name in record["tensors"]},
    }
    (staged / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in sorted({file for pattern in COMPANIONS for file in folder.glob(pattern)}):
        if file.is_dir():
            shutil.copytree(file, staged / file.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(file, staged / file.name)
    config = json.loads(plan.config.to_json_string())
    # transformers has these in rope_parameters. Some engines look for them here, and would rotate a quarter of each head.
    config |= {name: config["rope_parameters"][name] for name in ("partial_rotary_factor", "rope_theta")}
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    (staged / "config.json").write_text(text, encoding="utf-8")
