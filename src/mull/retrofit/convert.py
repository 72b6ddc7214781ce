"""Convert a Qwen3 model into a hybrid, one layer at a time: from safetensors to safetensors, or into memory.

What is written is a checkpoint of transformers. Nothing of mull is needed to load it. Every tensor is accounted for: where each
one of the hybrid comes from, and that each one of the source is used once.
"""

import copy
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mull.model.causal_lm import MullForCausalLM
from mull.retrofit.hybrid import (
    NOTHING_MEASURED,
    CrossArchTransferConfig,
    DeltaStart,
    Target,
    check_starts,
    convert_layer,
    hybrid_config,
    is_finite,
    store_norm,
)
from mull.retrofit.native_heads import fuse_experts, split_experts
from mull.retrofit.reading import listed, read_weight_map
from mull.retrofit.weights import Weights, companions, open_weights
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime import storage
from mull.runtime.arguments import Frozen, require
from mull.runtime.progress import Progress

REPORT = "conversion.jsonl"
"""File of a converted checkpoint: what was converted, and a line for each weight file. It also says how far a conversion is."""

HYBRID_TYPES = ("qwen3_5_text", "qwen3_5_moe_text")
"""``model_type`` of hybrids."""

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

    ignored: tuple[str, ...] = ()
    """Tensors of the source that are not used, because they follow from its configuration: rotary frequencies."""

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
        """Norms with weights that the precision cannot hold as ``w - 1``, and their largest relative error.

        What a conversion to another precision (``dtype``) rounds is not counted.
        """
        return {name: made.error for name, made in self.tensors.items() if made.error}


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
    starts: Mapping[int, DeltaStart]
    """Measured starts of DeltaNet layers."""


def create_hybrid_from_qwen3(
    source: str | os.PathLike[str] | PreTrainedModel,
    config: CrossArchTransferConfig | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    starts: Mapping[int, DeltaStart] | None = None,
) -> MullForCausalLM:
    """Convert a model in memory.

    Args:
        source: Folder or hub name of a Qwen3 or Qwen3-MoE checkpoint in safetensors, or such a model. A model is not changed and
            shares no memory with the result.
        config: Which layers become DeltaNet; default: three of four.
        device: Device of the result; default: that of the source.
        dtype: Precision of the result; default: that of the source.
        starts: Of DeltaNet layers, from `mull.retrofit.calibrate.calibrate_starts`.

    Returns:
        The hybrid in evaluation mode. `mull.retrofit.convert.convert_checkpoint` writes it to a folder instead.

    Raises:
        OSError: no checkpoint there.
        TypeError: an argument of another type.
        ValueError: the source is no Qwen3, has something that the hybrid cannot express, or a tensor is missing, left over or of
            another shape; names it.
    """
    model, _ = convert_model(source, config, dtype, starts)
    return wrap_transformer_with_etd(model if device is None else model.to(device), None)  # type: ignore[arg-type]


def convert_model(
    source: str | os.PathLike[str] | PreTrainedModel,
    config: CrossArchTransferConfig | None = None,
    dtype: torch.dtype | None = None,
    starts: Mapping[int, DeltaStart] | None = None,
) -> tuple[PreTrainedModel, Coverage]:
    """The hybrid as a model of transformers, and what became of every tensor; see `create_hybrid_from_qwen3`."""
    plan = _plan(open_weights(source), config, dtype, starts)
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
    starts: Mapping[int, DeltaStart] | None = None,
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
        starts: Of DeltaNet layers, from `mull.retrofit.calibrate.calibrate_starts`.

    Returns:
        What became of every tensor.

    Raises:
        OSError: no checkpoint there, or the disk is full.
        RuntimeError: another process writes to this folder.
        TypeError, ValueError: as in `create_hybrid_from_qwen3`, or `out` exists.
    """
    target = _new_folder(out)
    require("source", source, (str, os.PathLike), "a folder or a name on the hub")
    plan = _plan(open_weights(source), config, dtype, starts)
    assert plan.weights.folder is not None
    companions(plan.weights.folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with storage.exclusive(target):
        _new_folder(out)  # another process may have written it meanwhile
        staged = _staged(target)
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


def _new_folder(out: str | os.PathLike[str]) -> Path:
    """Where a link leads to, if that is new or empty, and can be replaced by the finished folder.

    Raises:
        ValueError: it is not; or what is beside it under the name of our unfinished folder is something else.
    """
    target = storage.local_path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} exists: give a new folder.")
    if target == Path.cwd() or target.is_mount():
        raise ValueError(
            f"{out} is the working folder or a mount point, which cannot be replaced: give a new folder in it."
        )
    staged = _staged(target)
    names = {file.name for file in staged.iterdir()} if staged.is_dir() else set()
    if (
        staged.is_symlink()
        or (staged.exists() and not staged.is_dir())
        or (names and not names & {REPORT, REPORT + ".partial"})
    ):
        raise ValueError(f"{staged} is no unfinished conversion: move it away, or give another folder than {out}.")
    return target


def _staged(target: Path) -> Path:
    """Where files are until all are there."""
    return target.with_name(f".{target.name}.partial")


def check_conversion(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: CrossArchTransferConfig | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """What each layer would become. What `convert_checkpoint` would refuse is refused here, before calibration takes its time."""
    _new_folder(out)
    plan = _plan(open_weights(source), config, dtype, None)
    if plan.weights.folder is not None:
        companions(plan.weights.folder)
    return list(plan.config.layer_types)


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


def _plan(
    weights: Weights,
    config: CrossArchTransferConfig | None,
    dtype: torch.dtype | None,
    starts: Mapping[int, DeltaStart] | None,
) -> Plan:
    require("config", config, (CrossArchTransferConfig, NoneType), "a CrossArchTransferConfig, or None")
    require("dtype", dtype, (torch.dtype, NoneType), "a torch.dtype, or None")
    settings = config or CrossArchTransferConfig()
    hybrid = hybrid_config(weights.config, settings)
    linear = {number for number, kind in enumerate(hybrid.layer_types) if kind == "linear_attention"}
    if foreign := sorted((starts or {}).keys() - linear):
        raise ValueError(f"starts has the layers {foreign}, which keep their attention: DeltaNet are {sorted(linear)}.")
    check_starts(starts or {}, weights.config)
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
    return Plan(weights, settings, hybrid, hybrid.dtype, expected, parts, starts or {})


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
        ValueError: NaN or infinity in the source, a value that the precision cannot hold, or a tied head that differs from the
            embedding.
    """
    weights, tied = plan.weights, plan.config.tie_word_embeddings
    read = weights.read(part.tensors)
    if spoiled := [name for name, value in read.items() if not is_finite(value)]:
        raise ValueError(f"The source has NaN or infinity in {listed(spoiled)}: fetch it again, or train it anew.")
    read = {name: value.to(plan.dtype) for name, value in read.items()}
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
            start=plan.starts.get(part.layer, NOTHING_MEASURED),
            half_life=plan.settings.hybrid_attention.half_life,
            seed=part.layer,
        )
        targets = {
            prefix + name: target._replace(sources=tuple(prefix + source for source in target.sources))
            for name, target in layer.items()
        }
    for name, target in targets.items():
        if not is_finite(target.value):
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
    return Coverage(tensors=dict(made), ignored=plan.weights.ignored)


def _write_parts(plan: Plan, staged: Path) -> list[dict[str, Any]]:
    """Write the weight files that are not there yet, and return what became of the tensors of all."""
    header = _header(plan)
    records = _records(staged, header)
    if not records:
        # Nothing there, or something that was made from other files or with other settings.
        storage.remove_tree(str(staged))
        staged.mkdir()
        _write_report(staged, header, [])  # from here on the folder is known as ours
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
            records.append({"file": file, "bytes": (staged / file).stat().st_size, "tensors": made})
            _write_report(staged, header, records)
            del targets  # before the next part is read
            progress.advance()
    return records


def _write_report(staged: Path, header: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in (header, *records))
    storage.write_text_atomic(str(staged / REPORT), lines)


def _header(plan: Plan) -> dict[str, Any]:
    folder = plan.weights.folder
    assert folder is not None
    stats = {file: (folder / file).stat() for file in sorted({*read_weight_map(folder).values(), "config.json"})}
    return {
        "source": str(folder),
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        "settings": plan.settings.model_dump(mode="json"),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "starts": _digest(plan.starts),
    }


def _digest(starts: Mapping[int, DeltaStart]) -> str | None:
    """What tells measured starts from others; None if there are none."""
    found = hashlib.sha256()
    for number, start in sorted(starts.items()):
        for name, value in start._asdict().items():
            if value is not None:
                found.update(f"{number} {name}".encode() + value.detach().cpu().float().numpy().tobytes())
    return found.hexdigest() if starts else None


def _records(staged: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Files that an interrupted conversion of the same source with the same settings has finished, up to one that is damaged."""
    try:
        found, *records = map(json.loads, (staged / REPORT).read_text(encoding="utf-8").splitlines())
        sizes = {file.name: file.stat().st_size for file in staged.iterdir()}
        done = list(itertools.takewhile(lambda record: sizes.get(record["file"], -1) == record["bytes"], records))
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return done if found == header else []


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
    for file in companions(folder):
        if file.is_dir():
            shutil.copytree(file, staged / file.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(file, staged / file.name)
    (staged / "config.json").write_text(plan.config.to_json_string(), encoding="utf-8")
    add_engine_keys(staged)


def add_engine_keys(folder: Path) -> None:
    """Add to a hybrid's ``config.json`` what some engines look for in other places than transformers does.

    transformers has the rotary embedding in ``rope_parameters``, and drops these keys when it saves a model. An engine that does
    not find them rotates a quarter of each head. Other architectures than that of hybrids are left alone.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["model_type"] not in HYBRID_TYPES:
        return
    rotary = config.get("rope_parameters") or {}
    config |= {name: rotary[name] for name in ("partial_rotary_factor", "rope_theta") if name in rotary}
    file.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")
