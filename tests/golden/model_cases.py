"""What `record.py` computes with models: sections forward, heads, generate and disk.

A section yields cases by name, and a case yields results by name. Nothing is computed before a case is iterated.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mull

Results = Iterator[tuple[str, Any]]
Cases = Iterator[tuple[str, Results]]

CASES = yaml.safe_load(Path(__file__).with_name("cases.yaml").read_text())
FAMILIES, HEADS = CASES["families"], CASES["heads"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
THOROUGH = ("qwen3", "qwen3_5")
"""A dense and a hybrid family, for which all heads are tried."""

SPLIT_FIELDS = {"n_encoder_layers": 2, "n_think_layers": 4, "n_decoder_layers": 2}
SPLIT = mull.ETDConfig(**SPLIT_FIELDS)
ODD = mull.from_layers([0, 1, 3, 3, 2, 4, 5, 3, 7])
PATHS = {
    "odd": ODD,
    "actions": mull.from_actions([0, 2, 1, 1, 2, 0, 1, 1]),
    "recursion": mull.recursion(1, 3, 4, 3),
    "written": [(0, 0), (4, 0), (0, 1), (7, 0)],
}
LOOPED = {"think_iterations": 2}
NEW = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
STATS = "prompt_tokens new_tokens rounds row_rounds draft_lengths drafted verified accepted mean_accepted_length"
"""What is told about a call of `mull.generate` and does not depend on the time."""


def encoded(value: Any) -> Any:
    """A result as JSON."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        sha = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:32]
        mean = flat.double().mean().item() if flat.numel() else 0.0
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} {sha} mean {mean:.9g}"
    if isinstance(value, Mapping):
        return {str(key): encoded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(entry) for entry in value]
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value


# Models and inputs


def tiny(family: str, dtype: str = "fp32", **changes: Any) -> PreTrainedModel:
    """A random model of transformers: 8 layers, width 32."""
    options = {**CASES["common"], **FAMILIES[family], **changes}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[options.pop("model_type")](**deepcopy(options))
    return AutoModelForCausalLM.from_config(config).to(DTYPES[dtype]).eval()


def looped(family: str, dtype: str = "fp32") -> mull.MullForCausalLM:
    return mull.wrap_transformer_with_etd(tiny(family, dtype), SPLIT)


def heads_of(name: str, number: int, **options: Any) -> mull.MTPConfig:
    return mull.MTPConfig(num_predict_tokens=number, **HEADS[name], **options)


def with_heads(family: str, head: str, dtype: str = "fp32") -> mull.MullForCausalLM:
    """A model that likes to repeat its last token, and heads that guess just that: often right, often wrong."""
    base = tiny(family, dtype, initializer_range=0.2)
    embeddings, out = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    if out is not embeddings:
        out.data += 2 * embeddings.data
    embeddings.data *= 6
    model = mull.wrap_transformer_with_etd(base, SPLIT, heads_of(head, 3, mtp_loss_weight=0.7))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.startswith(("mtp.", "mtp_heads.")):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


def ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Random tokens without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, CASES["common"]["vocab_size"], (rows, tokens), generator=generator)


def padded(lengths: list[int], left: bool) -> tuple[Tensor, Tensor]:
    """Random rows of these lengths, and their mask."""
    tokens, width = ids(len(lengths), max(lengths)), max(lengths)
    starts = torch.tensor([[width - n if left else 0] for n in lengths])
    place = torch.arange(width).expand_as(tokens)
    mask = (place >= starts) & (place < starts + torch.tensor(lengths)[:, None])
    return tokens * mask, mask.long()


def labelled() -> dict[str, Tensor]:
    """Three rows, some of whose labels are ignored."""
    labels = ids(3, 23)
    labels[0, :4] = labels[2, 9] = -100
    return {"input_ids": ids(3, 23), "labels": labels}


def packed() -> dict[str, Tensor]:
    """The same rows, of several documents each."""
    rows = [[5, 1, 9, 8], [23], [11, 12]]
    return {**labelled(), "position_ids": torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])}


def masked(left: bool) -> dict[str, Tensor]:
    """Rows with padding, which has no labels."""
    tokens, mask = padded([17, 6, 11], left)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def gradients(model: PreTrainedModel, batch: Mapping[str, Tensor], **options: Any) -> dict[str, Any]:
    """Loss and the gradient of every parameter."""
    model.zero_grad()
    out = model(**batch, use_cache=False, **options)
    out.loss.backward()
    return {"loss": out.loss.item(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def recomputed(model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    """The same with gradient checkpointing, which stays on."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return gradients(model, labelled(), **options)


# Section forward


def forward(_: Any) -> Cases:
    for family in FAMILIES:
        for dtype in DTYPES:
            yield f"{family}/{dtype}/call", called(family, dtype)
            yield f"{family}/{dtype}/cache", cached(family, dtype)
            yield f"{family}/{dtype}/gradient", differentiated(family, dtype)
            yield f"{family}/{dtype}/without loop", without_loop(family, dtype)


@torch.no_grad()
def called(family: str, dtype: str) -> Results:
    model = looped(family, dtype)
    for k in (1, 2, 3):
        out = model(**labelled(), use_cache=False, think_iterations=k)
        yield f"k{k}", {"logits": out.logits, "loss": out.loss.item()}
    yield "default iterations", model(ids(2, 9)).logits
    out = model(ids(2, 9), output_hidden_states=True, logits_to_keep=2, **LOOPED)
    yield "states", {"logits": out.logits, "hidden": out.hidden_states}
    yield "embedded", model(inputs_embeds=model.get_input_embeddings()(ids(2, 9)), **LOOPED).logits
    yield "loss of a larger step", model(**labelled(), num_items_in_batch=100, **LOOPED).loss.item()
    for name, path in PATHS.items():
        yield f"path {name}", model(ids(2, 9), path=path, use_cache=False).logits
    for side in ("left", "right"):
        batch = masked(side == "left")
        out = model(**batch, **LOOPED)
        yield f"{side} padding", {"logits": out.logits[batch["attention_mask"] == 1], "loss": out.loss.item()}
    out = model(**packed(), **LOOPED)
    yield "packed", {"logits": out.logits, "loss": out.loss.item(), "cached": out.past_key_values is not None}


@torch.no_grad()
def cached(family: str, dtype: str) -> Results:
    model, tokens, wrong = looped(family, dtype), ids(3, 20), ids(3, 5, seed=1)
    for name, options in {"k2": LOOPED, "k3": {"think_iterations": 3}, "odd path": {"path": ODD}}.items():
        out = model(tokens[:, :9], use_cache=True, **options)
        cache, parts = out.past_key_values, tokens[:, 9:16].split([1, 1, 3, 1, 1], 1)
        logits = [out.logits, *[model(part, past_key_values=cache, **options).logits for part in parts]]
        yield name, {"logits": torch.cat(logits, 1), "length": cache.get_seq_length()}
        cache.activate_past_recording()
        for part in wrong.split([2, 1, 2], 1):
            model(part, past_key_values=cache, **options)
        cache.crop(-3)
        logits = [model(part, past_key_values=cache, **options).logits for part in tokens[:, 16:].split(1, 1)]
        yield f"{name}, cropped", torch.cat(logits, 1)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        yield f"{name}, reordered", model(wrong[:, :1], past_key_values=cache, **options).logits
    cache = model.new_cache()
    cache.activate_past_recording()
    model(tokens[:, :9], past_key_values=cache, **LOOPED)
    cache.crop(-9)
    yield "from nothing again", model(wrong, past_key_values=cache, **LOOPED).logits
    tokens, mask = padded([17, 6, 11], left=True)
    cache = model(tokens[:, :9], attention_mask=mask[:, :9], use_cache=True, **LOOPED).past_key_values
    for end in range(10, 18):
        logits = model(tokens[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache, **LOOPED).logits
    yield "left padding", logits
    if family != "olmo3":  # sliding windows refuse it
        mask = torch.ones(3, 14, dtype=torch.long)
        mask[1, 7:10] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = model(ids(3, 4), use_cache=True, **LOOPED).past_key_values
        options = {"past_key_values": cache, **LOOPED}
        model(ids(3, 8, seed=2), attention_mask=mask[:, :12], position_ids=positions[:, 4:12], **options)
        out = model(wrong[:, :2], attention_mask=mask, position_ids=positions[:, 12:], **options)
        yield "behind a gap", out.logits


def differentiated(family: str, dtype: str) -> Results:
    model = looped(family, dtype)
    yield "rows", gradients(model, labelled(), **LOOPED)
    yield "packed", gradients(model, packed(), **LOOPED)
    yield "left padding", gradients(model, masked(left=True), think_iterations=3)
    yield "recomputed", recomputed(model, **LOOPED)


@torch.no_grad()
def without_loop(family: str, dtype: str) -> Results:
    base = tiny(family, dtype)
    model = mull.wrap_transformer_with_etd(base, None)
    mull.certify_identity(model, base)
    yield "logits", model(ids(2, 9)).logits
    yield "path", model(ids(2, 9), path=ODD).logits
    if "linear_attention" not in (getattr(base.config, "layer_types", None) or []):
        mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
        yield "four-dimensional mask", model(ids(2, 9), attention_mask=mask).logits


# Section heads


def heads(_: Any) -> Cases:
    for family in FAMILIES:
        for head in HEADS if family in THOROUGH else ("transformer", "sequential", "native"):
            for dtype in DTYPES if family in THOROUGH else ["fp32"]:
                yield f"{family}/{head}/{dtype}", head_losses(family, head, dtype)


def head_losses(family: str, head: str, dtype: str) -> Results:
    model = with_heads(family, head, dtype)
    batches = {"rows": labelled(), "packed": packed(), "right padding": masked(left=False)}
    for name in batches if family in THOROUGH else ["packed"]:
        with torch.no_grad():
            out = model(**batches[name], **LOOPED)
        steps = {step: loss.item() for step, loss in out.mtp_step_losses.items()}
        yield name, {"loss": out.loss.item(), "mtp_loss": out.mtp_loss.item(), **steps}
        yield f"{name}, gradient", gradients(model, batches[name], **LOOPED)
    yield "recomputed", recomputed(model, num_items_in_batch=100, think_iterations=1)


# Section generate


def generate(_: Any) -> Cases:
    for family in FAMILIES:
        yield f"{family}/transformers", by_transformers(family)
        yield f"{family}/plain", plain(family, "sequential", "fp32")
        for head in HEADS if family in THOROUGH else ("transformer", "native"):
            yield f"{family}/{head}", drafted(family, head, "fp32", (1, 2, 3) if family in THOROUGH else (2,))
    for family in THOROUGH:
        yield f"{family}/plain/bf16", plain(family, "native", "bf16")
        yield f"{family}/native/bf16", drafted(family, "native", "bf16", (2,))


def by_transformers(family: str) -> Results:
    """``generate`` of transformers."""
    model = with_heads(family, "mlp")
    tokens, mask = padded([10, 6, 2], left=True)
    batch = {"inputs": tokens, "attention_mask": mask, **LOOPED}
    yield "greedy", model.generate(**batch, do_sample=False, **NEW)
    yield "path", model.generate(ids(2, 9), do_sample=False, path=ODD, **NEW)
    yield "beams", model.generate(**batch, num_beams=3, do_sample=False, **NEW)
    yield "sampled", model.generate(**batch, do_sample=True, top_p=0.9, **NEW)
    yield "chunks", model.generate(ids(2, 9), do_sample=False, prefill_chunk_size=4, **LOOPED, **NEW)
    yield "ends", model.generate(**batch, do_sample=False, max_new_tokens=12, eos_token_id=[3, 4, 5])


def made(*arguments: Any, **options: Any) -> dict[str, Any]:
    """What `mull.generate` makes."""
    output = mull.generate(*arguments, **options)
    return {"text": output.sequences.tolist(), **{name: getattr(output.stats, name) for name in STATS.split()}}


def plain(family: str, head: str, dtype: str) -> Results:
    model = with_heads(family, head, dtype)
    for side in ("left", "right"):
        batch = padded([10, 6, 2], side == "left")
        yield f"{side} padding", made(model, *batch, max_new_tokens=12, **LOOPED)
    one, ends = ids(1, 7), {"eos_token_id": [3, 4, 5, 6], "repetition_penalty": 1.3}
    yield "penalty", made(model, one, max_new_tokens=16, think_iterations=1, **ends)
    yield "path", made(model, one, max_new_tokens=8, path=ODD)
    for name, sampling in CASES["sampling"].items():
        yield f"sampled {name}", made(model, *batch, max_new_tokens=10, seed=5, **sampling, **LOOPED)
    yield "global seed", made(model, one, max_new_tokens=8, temperature=1.0)


def drafted(family: str, head: str, dtype: str, lengths: tuple[int, ...]) -> Results:
    model = with_heads(family, head, dtype)
    batch, ragged = padded([10, 6, 2], left=True), padded([5, 9], left=False)
    options: dict[str, Any] = {"max_new_tokens": 14, "draft": "mtp", **LOOPED}
    for length in lengths:
        fixed = {"draft_length": length, **options}
        yield f"greedy {length}", made(model, *batch, **fixed)
        yield f"sampled {length}", made(model, *batch, seed=5, **CASES["sampling"]["all"], **fixed)
    yield "penalty", made(model, *ragged, repetition_penalty=1.3, eos_token_id=[3, 4, 5, 6], **fixed)
    shallow = {**fixed, "think_iterations": 1, "eos_token_id": []}
    yield "one iteration", made(model, *batch, **shallow)
    if dtype == "fp32":
        # How long the drafts are depends on the time here, the text does not.
        yield "adaptive", mull.generate(model, *batch, **options).sequences.tolist()


# Section disk


def disk(_: Any) -> Cases:
    for family in FAMILIES:
        yield f"saved/{family}", saved(family)
        yield f"started/{family}", started(family, None)
    for head in HEADS:
        for family in (*THOROUGH, "olmo3"):
            yield f"started/{family}/{head}", started(family, head)
    for head in ("mlp", "sequential", "transformer"):
        yield f"changed/{head}", changed(head)
    for family in ("qwen3_5", "qwen3_5-moe", "qwen3_next-dense", "qwen3_next-moe"):
        for size in ("5GB", "60KB"):
            yield f"exported/{family}/{size}", exported(family, size)
    yield "preset", preset()


def without_versions(value: Any) -> Any:
    """A stored configuration without what names the installed packages."""
    if isinstance(value, list):
        return [without_versions(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {name: without_versions(entry) for name, entry in value.items() if name != "transformers_version"}


def stored(folder: Path) -> Results:
    """The files of a saved model."""
    yield "files", sorted(file.name for file in folder.iterdir())
    for file in sorted(folder.glob("*.safetensors")):
        yield file.name, load_file(file)
    for file in sorted(folder.glob("*.json")):
        if "token" in file.name:
            yield file.name, hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            yield file.name, without_versions(json.loads(file.read_text()))


@torch.no_grad()
def loaded(folder: Path) -> Results:
    """What a saved model computes when it is loaded."""
    for name, load in {"mull": mull.from_pretrained, "transformers": AutoModelForCausalLM.from_pretrained}.items():
        model = load(str(folder))
        out = model(**labelled(), **LOOPED)
        fields = {"etd": model.config.etd, "mtp": model.config.mtp}
        yield (
            f"loaded by {name}",
            {"logits": out.logits, "loss": out.loss.item(), "state": model.state_dict(), **fields},
        )
        if model.config.mtp is not None:
            drafts = {"draft": "mtp", "draft_length": 2, "max_new_tokens": 8}
            yield f"text of {name}", made(model, ids(2, 7), **drafts, **LOOPED)


def saved(family: str) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        looped(family).save_pretrained(folder)
        yield from stored(Path(folder))
        yield from loaded(Path(folder))


def started(family: str, head: str | None) -> Results:
    """Weights that heads, or a whole model, start with."""
    fields = None if head is None else {"num_predict_tokens": 2, **HEADS[head]}
    base = tiny(family)
    set_seed(3)
    mtp = None if fields is None else mull.MTPConfig(**fields)
    yield "wrapped", mull.wrap_transformer_with_etd(base, SPLIT, mtp).state_dict()
    set_seed(3)
    config = mull.MullConfig(text_config=base.config, etd=SPLIT_FIELDS, mtp=fields)
    yield "from scratch", mull.MullForCausalLM(config).state_dict()


def changed(head: str) -> Results:
    """A base checkpoint is retrofitted, and the result gets more heads and another split."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        tiny("qwen3").save_pretrained(one)
        model = mull.from_pretrained(one, SPLIT, heads_of(head, 2), dtype=torch.bfloat16)
        yield "base", model.state_dict()
        model.save_pretrained(two)
        other = mull.ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=5, max_think_iterations=2)
        model = mull.from_pretrained(two, other, heads_of(head, 3))
        yield "more heads", model.state_dict()
        yield "other split", model(ids(2, 9)).logits


def exported(family: str, shard_size: str) -> Results:
    """Heads in the checkpoint of the base model, as serving engines read them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny(family, initializer_range=0.2).save_pretrained(folder, max_shard_size=shard_size)
        mull.export_native_heads(with_heads(family, "native"), folder)
        yield from stored(folder)
        yield "loaded", mull.from_pretrained(name, SPLIT, heads_of("native", 2)).state_dict()
        mull.export_native_heads(with_heads(family, "native"), folder)
        yield "files of a second export", sorted(file.name for file in folder.iterdir())


def preset() -> Results:
    """The named model, whose weights are never made; and proposed splits."""
    config = mull.TransformerConfig.olmo3_7B_etd(adaptive_depth=False, use_layer_router=False, use_lora_experts=False)
    yield "configuration", without_versions(config.base.to_dict())
    yield "shapes", {name: list(parameter.shape) for name, parameter in config.build("meta").named_parameters()}
    for split in ("published", "quarters"):
        for family in FAMILIES:
            etd = mull.ETDConfig.for_model(tiny(family), split)
            yield f"{split} split of {family}", [etd.n_encoder_layers, etd.n_think_layers, etd.n_decoder_layers]
