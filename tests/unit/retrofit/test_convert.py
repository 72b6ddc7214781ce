"""Claim: a conversion is complete or has not happened, and says by name what it does not understand."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMMON, tiny
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from mull import (
    CrossArchTransferConfig,
    ETDConfig,
    GatedAttentionConfig,
    HybridAttentionConfig,
    MTPConfig,
    convert_checkpoint,
    create_hybrid_from_qwen3,
    wrap_transformer_with_etd,
)
from mull.retrofit import convert, weights
from mull.retrofit.convert import REPORT, convert_model
from mull.retrofit.hybrid import DeltaStart, attention_interval, hybrid_config
from mull.retrofit.reading import read_config
from mull.runtime import storage

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny("qwen3", num_hidden_layers=4).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "source" / "tokenizer.json").write_text('{"model": {}}')
    (tmp_path / "source" / "pytorch_model.bin").write_text("not copied")
    return tmp_path / "source"


def changed(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def hidden(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.name.startswith(".")]


K_NORM = "model.layers.2.self_attn.k_norm.weight"
FAULTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop(K_NORM), f"missing: {K_NORM}"),
    "extra": (lambda t: t.update({"model.layers.2.extra": torch.ones(2)}), "left over: model.layers.2.extra"),
    "a layer too many": (lambda t: t.update({"model.layers.4.x": torch.ones(2)}), "left over: model.layers.4.x"),
    "misshapen": (lambda t: t.update({K_NORM: torch.ones(8)}), rf"{K_NORM} of shape \(8,\) instead of \(16,\)"),
    "renamed": (lambda t: t.update({"model.k.weight": t.pop(K_NORM)}), f"missing: {K_NORM}; left over: model.k.weight"),
    "quantized": (lambda t: t.update({K_NORM: torch.ones(16, dtype=torch.int8)}), f"{K_NORM} is in I8"),
    "two precisions": (lambda t: t.update({K_NORM: t[K_NORM].half()}), "float16, torch.float32: say which"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_does_not_fit_is_named_before_anything_is_written(fault, source):
    change, message = FAULTS[fault]
    changed(source, change)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, source.parent / "out")
    assert sorted(file.name for file in source.parent.iterdir()) == ["source"]


def test_a_tensor_of_a_model_in_memory_that_does_not_fit_is_named():
    model = tiny("qwen3", num_hidden_layers=4)
    model.model.layers[1].mlp.extra = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="left over: model.layers.1.mlp.extra.weight"):
        create_hybrid_from_qwen3(model)


def test_an_index_that_lists_what_no_file_has(source):
    tensors = load_file(source / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    changed(source, lambda t: t.pop(K_NORM))
    with pytest.raises(ValueError, match=f"missing: {K_NORM}"):
        convert_checkpoint(source, source.parent / "out")


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_a_file_has_too_must_be_the_embedding(same, source):
    shutil.rmtree(source)
    tiny("qwen3", num_hidden_layers=4, tie_word_embeddings=True).save_pretrained(source)
    changed(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + (0 if same else 1)}))
    if not same:
        with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
            convert_model(source)
        return
    _, coverage = convert_model(source)
    assert coverage.used["lm_head.weight"] == "model.embed_tokens.weight"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "window": (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        r"layers \[3\] attend .* 8 tokens",
    ),
    "bias": ({"attention_bias": True}, "attention_bias is true, and DeltaNet has no biases"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hybrid_cannot_express_is_refused(case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        create_hybrid_from_qwen3(tiny("qwen3", num_hidden_layers=4, **changes))


def test_a_window_is_no_matter_where_its_layers_become_deltanet():
    model = tiny("qwen3", num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    config = CrossArchTransferConfig(hybrid_attention=HybridAttentionConfig(layers=(3,)))
    assert create_hybrid_from_qwen3(model, config).get_layer_stats()["deltanet_layers"] == 1


MOE_REFUSED = {
    "norm_topk_prob": ({"norm_topk_prob": False}, "norm_topk_prob is false"),
    "dense layers": ({"mlp_only_layers": [1]}, "some layers have no experts"),
    "every other": ({"decoder_sparse_step": 2}, "some layers have no experts"),
    "window": ({"use_sliding_window": True, "sliding_window": 8}, r"layers \[3\] attend"),
}


@pytest.mark.parametrize("case", MOE_REFUSED)
def test_what_the_hybrid_with_experts_cannot_express_is_refused(case):
    changes, message = MOE_REFUSED[case]
    fields = COMMON | {"num_hidden_layers": 4, "norm_topk_prob": True} | changes
    with pytest.raises(ValueError, match=message):
        hybrid_config(Qwen3MoeConfig(**fields), CrossArchTransferConfig())


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_other_architectures_are_refused_by_name(family):
    with pytest.raises(ValueError, match=f"Architecture '{family}.*' cannot be converted"):
        create_hybrid_from_qwen3(tiny(family))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (4,)}, "layers has 4, and the source has layers 0 to 3"),
        ({"layers": (0, 1, 2, 3)}, "All 4 layers would become DeltaNet"),
        ({"deltanet_layer_pattern": (0,), "pattern_period": 1}, "All 4 layers would become DeltaNet"),
        ({"deltanet_layer_pattern": (4,)}, "must be different numbers from 0 to 3"),
        ({"layers": (1, 1)}, "must be different numbers"),
        ({"layers": (-1,)}, "must be different numbers"),
    ],
)
def test_wrong_layers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HybridAttentionConfig(**fields).kinds(4)


def test_the_interval_of_engines_is_given_only_where_it_says_the_truth():
    full, linear = "full_attention", "linear_attention"
    assert attention_interval([linear, linear, linear, full] * 9) == 4
    assert attention_interval([full] * 3) == 1
    assert attention_interval([linear, full] * 2 + [linear]) == 2
    assert attention_interval([linear, full, full]) is None
    assert attention_interval([full, linear, linear, linear]) is None
    assert attention_interval([linear, linear, full, linear, full]) is None


def test_half_precision_that_cannot_hold_a_weight_is_refused(source):
    changed(source, lambda t: t["model.layers.1.self_attn.o_proj.weight"].fill_(4e4))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.o_proj.weight has values that torch.float16 cannot hold"):
        convert_model(source, CrossArchTransferConfig(hybrid_attention=HybridAttentionConfig(layers=())), torch.float16)


def test_companions_go_along_and_nothing_else(source):
    out = source.parent / "out"
    convert_checkpoint(source, out)
    names = files(out).keys()
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json", REPORT} <= names
    assert "pytorch_model.bin" not in names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(
        value.nbytes for file in out.glob("*.safetensors") for value in load_file(file).values()
    )
    assert hidden(source.parent) == []


def test_an_output_that_exists_is_left_alone(source):
    out = source.parent / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(ValueError, match="out exists: give a new folder"):
        convert_checkpoint(source, out)
    assert files(out) == {"precious": b"x"}


def killed_at(n_flushes: int, source: Path, out: Path) -> bool:
    """Convert in a process of its own that kills itself at its n-th flush to the disk. False if it had fewer."""
    process = os.fork()
    if process == 0:
        flush, count = os.fsync, 0

        def kill(descriptor: int) -> None:
            nonlocal count
            count += 1
            if count == n_flushes:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = kill
        convert_checkpoint(source, out)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def test_a_killed_conversion_leaves_nothing_and_continues(source):
    straight, out = source.parent / "straight", source.parent / "out"
    convert_checkpoint(source, straight)
    expected = files(straight)
    kills = 0
    for n_flushes in range(1, 200, 21):
        if not killed_at(n_flushes, source, out):
            break
        kills += 1
        if out.exists():
            assert files(out) == expected
        else:
            report = out.with_name(".out.partial") / REPORT
            done = report.read_text().count("\n") - 1 if report.exists() else 0
            written = {file: file.stat().st_mtime_ns for file in sorted(report.parent.glob("model-*"))[:done]}
            convert_checkpoint(source, out)
            assert {file: (out / file.name).stat().st_mtime_ns for file in written} == written
            assert files(out) == expected
        assert [name for name in hidden(source.parent) if name != ".out.lock"] == []
        shutil.rmtree(out)
    assert kills > 3


def test_a_conversion_with_other_settings_starts_anew(source):
    out = source.parent / "out"
    assert killed_at(30, source, out)
    report = out.with_name(".out.partial") / REPORT
    assert report.read_text().count("\n") > 1
    other = CrossArchTransferConfig(hybrid_attention=HybridAttentionConfig(layers=(3,)))
    convert_checkpoint(source, out, other)
    convert_checkpoint(source, source.parent / "straight", other)
    assert files(out) == files(source.parent / "straight")


def test_a_full_disk_is_told_and_what_was_written_is_kept(source, monkeypatch):
    def full(*_: Any) -> None:
        raise SafetensorError("No space left on device")

    out = source.parent / "out"
    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(OSError, match="No space left .* Make room and repeat"):
        convert_checkpoint(source, out)
    monkeypatch.undo()
    assert not out.exists()
    convert_checkpoint(source, out)


def test_only_one_process_writes_to_a_folder(source, monkeypatch):
    monkeypatch.setattr(storage, "LOCK_PATIENCE_SECONDS", 0)
    out = source.parent / "out"
    with storage.exclusive(out), pytest.raises(RuntimeError, match="in use"):
        convert_checkpoint(source, out)


def test_weights_are_drawn_without_the_global_generator():
    model = tiny("qwen3", num_hidden_layers=4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first: PreTrainedModel = convert_model(model)[0]
    assert torch.equal(torch.get_rng_state(), before)
    second = convert_model(model)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    gates = [layer.linear_attn.in_proj_z.weight for layer in first.model.layers[:2]]
    assert not torch.equal(*gates)


def test_a_precision_can_be_given(source):
    hybrid = create_hybrid_from_qwen3(source, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in hybrid.parameters()} == {torch.bfloat16}
    assert hybrid.generation_config.eos_token_id == 2
    convert_checkpoint(source, source.parent / "out", dtype=torch.bfloat16)
    written = AutoModelForCausalLM.from_pretrained(source.parent / "out", dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(written.parameters(), hybrid.parameters(), strict=True))
    with pytest.raises(TypeError, match="dtype is str 'bf16'"):
        create_hybrid_from_qwen3(source, dtype="bf16")


def test_of_a_name_on_the_hub_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
    """The files are asked for by patterns; a folder that has no other files converts like the whole one."""
    hub, fetched = tmp_path / "hub", tmp_path / "fetched"
    tiny("qwen3", num_hidden_layers=4).save_pretrained(hub, max_shard_size="20KB")
    (hub / "original.pth").write_text("large")

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert name == "Qwen/Qwen3-tiny"
        fetched.mkdir()
        for file in filter_repo_objects([file.name for file in hub.iterdir()], allow_patterns=allow_patterns):
            shutil.copy(hub / file, fetched)
        return str(fetched)

    monkeypatch.setattr(weights, "snapshot_download", fetch)
    monkeypatch.setattr(weights, "load_config", lambda found, _: read_config(str(hub)))
    convert_checkpoint("Qwen/Qwen3-tiny", tmp_path / "out")
    assert not (fetched / "original.pth").exists()
    convert_checkpoint(hub, tmp_path / "straight")
    ours, straight = files(tmp_path / "out"), files(tmp_path / "straight")
    assert ours.pop(REPORT) != straight.pop(REPORT)
    assert ours == straight


def test_wrong_sources_are_refused(tmp_path, source):
    with pytest.raises(TypeError, match="source is int 3"):
        create_hybrid_from_qwen3(3)
    with pytest.raises(FileNotFoundError, match="There is no model at"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="have to be in safetensors"):
        convert_checkpoint(source, tmp_path / "out")
    with torch.device("meta"):
        unloaded = AutoModelForCausalLM.from_config(tiny("qwen3").config)
    with pytest.raises(ValueError, match="meta device"):
        create_hybrid_from_qwen3(unloaded)


@pytest.mark.parametrize("kind", ["copied", "derived", "fresh", "start"])
def test_no_value_that_is_not_finite_is_written(kind, source):
    """Too large for fp16 in a tensor of each origin, and from a measured start."""
    name = "model.layers.1.mlp.up_proj.weight" if kind == "copied" else "model.layers.3.self_attn.o_proj.weight"
    if kind in ("copied", "derived"):
        changed(source, lambda t: t[name].fill_(7e4 if kind == "copied" else 4e4))
    start = {"fresh": DeltaStart(gate=torch.full((32,), 7e4)), "start": DeltaStart(out_scale=torch.full((4,), 1e9))}
    starts = {0: start[kind]} if kind in start else None
    out = source.parent / "out"
    with pytest.raises(ValueError, match=r"has values that torch.float16 cannot hold"):
        convert_checkpoint(source, out, dtype=torch.float16, starts=starts)
    with pytest.raises(ValueError, match=r"has values that torch.float16 cannot hold"):
        create_hybrid_from_qwen3(source, dtype=torch.float16, starts=starts)
    assert not out.exists()


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            DeltaStart(half_life=torch.full((4,), torch.nan)),
            "half_life of the start of layer 0 .* not finite and above 0",
        ),
        (DeltaStart(half_life=torch.zeros(4)), "half_life of the start of layer 0 .* not finite and above 0"),
        (DeltaStart(gate=torch.full((32,), torch.inf)), "gate of the start of layer 0 .* not finite"),
        (DeltaStart(half_life=torch.ones(3)), r"half_life of the start of layer 0 has shape \(3,\) instead of \(4,\)"),
        (DeltaStart(gate=torch.ones(31)), r"gate of the start of layer 0 has shape \(31,\) instead of \(32,\)"),
        (
            DeltaStart(out_scale=torch.tensor(1.0)),
            r"out_scale of the start of layer 0 has shape \(\) instead of \(4,\)",
        ),
        (DeltaStart(out_proj=torch.ones(64, 63)), r"out_proj of the start of layer 0 has shape \(64, 63\)"),
    ],
)
def test_starts_that_do_not_fit_are_refused(start, message, source):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, source.parent / "out", starts={0: start})


@pytest.mark.parametrize("names", [["model.norm.weight"], ["model.embed_tokens.weight", "lm_head.weight"]])
def test_nan_in_the_source_is_told(names, source):
    changed(source, lambda t: [t[name].view(-1)[3:4].fill_(torch.nan) for name in names if name in t])
    with pytest.raises(ValueError, match=f"The source has NaN or infinity in .*{names[0]}"):
        convert_model(source)


REPORTS: dict[str, Callable[[Path], Any]] = {
    "a missing file": lambda folder: (folder / "model-00002-of-00006.safetensors").unlink(),
    "a short file": lambda folder: os.truncate(folder / "model-00002-of-00006.safetensors", 1000),
    "an empty report": lambda folder: (folder / REPORT).write_text(""),
    "no report of ours": lambda folder: (folder / REPORT).write_text("[]\n[1]\n"),
    "half a line": lambda folder: os.truncate(folder / REPORT, 3000),
}


@pytest.mark.parametrize("damage", REPORTS)
def test_what_an_interrupted_conversion_lost_is_made_again(damage, source, monkeypatch):
    out, saved = source.parent / "out", []

    def save(tensors: Tensors, file: Path, metadata: dict[str, str]) -> None:
        if len(saved) == 4:
            raise SafetensorError("No space left on device")
        saved.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr(convert, "save_file", save)
    with pytest.raises(OSError, match="No space"):
        convert_checkpoint(source, out)
    monkeypatch.undo()
    REPORTS[damage](out.with_name(".out.partial"))
    convert_checkpoint(source, out)
    convert_checkpoint(source, source.parent / "straight")
    assert files(out) == files(source.parent / "straight")


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("part", ["etd", "mtp", "gated_attention"])
def test_parts_of_mull_in_the_source_are_refused(part, on_disk, tmp_path):
    parts: dict[str, Any] = {
        "etd": {"config": ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1)},
        "mtp": {"config": None, "mtp": MTPConfig()},
        "gated_attention": {"config": None, "gated_attention": GatedAttentionConfig()},
    }
    model = wrap_transformer_with_etd(tiny("qwen3", num_hidden_layers=4), **parts[part])
    if on_disk:
        model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=rf"would drop \({part}\): convert the backbone"):
        create_hybrid_from_qwen3(tmp_path / "source" if on_disk else model)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="Qwen3Model has no language-model head"):
        create_hybrid_from_qwen3(tiny("qwen3", num_hidden_layers=4).model)


def test_the_loser_of_two_conversions_stops_before_the_work(source, monkeypatch):
    out, plan = source.parent / "out", convert._plan

    def late(*given: Any) -> Any:
        out.mkdir()
        (out / "model.safetensors").write_text("the winner's")
        return plan(*given)

    monkeypatch.setattr(convert, "_plan", late)
    monkeypatch.setattr(convert, "save_file", None)
    with pytest.raises(ValueError, match="out exists: give a new folder"):
        convert_checkpoint(source, out)


@pytest.mark.parametrize("place", ["link to a folder", "dangling link", "mount", "here", "foreign"])
def test_places_that_cannot_be_replaced_are_refused_and_links_followed(place, source, monkeypatch):
    real, out = source.parent / "real", source.parent / "out"
    message = "cannot be replaced"
    if "link" in place:
        out.symlink_to(real)
        if place == "link to a folder":
            real.mkdir()
        convert_checkpoint(source, out)
        assert out.is_symlink()
        assert (real / "config.json").exists()
        return
    out.mkdir()
    if place == "mount":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    elif place == "here":
        monkeypatch.chdir(out)
    else:
        message = ".out.partial is no unfinished conversion"
        (source.parent / ".out.partial").mkdir()
        (source.parent / ".out.partial" / "precious").write_text("x")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, "." if place == "here" else out)
    assert place != "foreign" or files(source.parent / ".out.partial") == {"precious": b"x"}


def sharded(folder: Path, file: str, listed: bool, name: str, value: float = 1.0) -> Path:
    """The checkpoint as two files with an index; the second has another tensor, that the index lists or not."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / file)
    second = {K_NORM: tensors.pop(K_NORM), name: torch.full_like(tensors.get(name, torch.ones(2)), value)}
    save_file(tensors, folder / file, {"format": "pt"})
    save_file(second, folder / "b.safetensors", {"format": "pt"})
    weight_map = {
        **dict.fromkeys(tensors, file),
        K_NORM: "b.safetensors",
        **({name: "b.safetensors"} if listed else {}),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", ["model.layers.1.extra", "model.norm.weight"])
def test_a_tensor_that_the_index_does_not_list_is_named(name, source):
    with pytest.raises(ValueError, match=f"lists in no or another file: {name} in b.safetensors"):
        convert_model(sharded(source, "a.safetensors", False, name))


def test_an_index_of_another_model_is_refused(source):
    shutil.copy(source / "model.safetensors", source / "keep")
    sharded(source, "a.safetensors", False, "model.layers.1.extra")
    (source / "keep").rename(source / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors and .*index.json disagree where .*: delete the one"):
        convert_model(source)


def test_old_rotary_frequencies_are_ignored_and_reported(source):
    expected = convert_model(source)[0].state_dict()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    changed(source, lambda t: t.update({name: torch.full((8,), torch.nan)}))
    model, coverage = convert_model(source)
    assert coverage.ignored == (name,)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_a_broken_link_beside_the_weights_is_told_before_the_work(source, monkeypatch):
    (source / "merges.txt").symlink_to("nowhere")
    monkeypatch.setattr(convert, "save_file", None)
    for call in (convert_checkpoint, convert.check_conversion):
        with pytest.raises(FileNotFoundError, match="merges.txt is a link to a file that is not there"):
            call(source, source.parent / "out")
