"""Claim: a model is found by folder, GGUF file or hub name, what is missing is named, and a GGUF file is the model in it."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny
from transformers import AutoModelForCausalLM

import mull
from mull import ETDConfig, wrap_transformer_with_etd
from mull.data.tokenizer import train_tokenizer
from mull.retrofit.source import Source, find_source, load_tokenizer
from mull.runtime.storage import local_path

WIDTH, LAYERS, INNER, HEADS, VOCABULARY = 32, 4, 48, 2, 260
TEXT = "def f(x): return x\n" * 9
SPLIT = ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a tokenizer of bytes, as llama.cpp stores it."""
    gguf = pytest.importorskip("gguf")
    file = tmp_path_factory.mktemp("gguf") / "M.GGUF"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    tokenizer = train_tokenizer([TEXT], VOCABULARY)
    vocabulary, model = tokenizer.get_vocab(), json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3, *[1] * (VOCABULARY - 1)])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    rng = np.random.default_rng(0)
    square, wide = (WIDTH, WIDTH), (INNER, WIDTH)
    shapes = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1]}
    shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), square)
    tensors = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    tensors |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in tensors.items():
        writer.add_tensor(f"{name}.weight", (0.1 * rng.standard_normal(shape)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_is_the_model_that_transformers_loads(gguf_file: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    ids = torch.arange(1, 9).view(1, 8)
    named = mull.from_pretrained(gguf_file, SPLIT, dtype=torch.float32)
    keyword = mull.from_pretrained(str(gguf_file.parent), SPLIT, gguf_file=gguf_file.name, dtype=torch.float32)
    for model in (named, keyword):
        assert torch.equal(model(ids, think_iterations=1).logits, base(ids).logits)
    named.save_pretrained(tmp_path)
    again = mull.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, named(ids).logits)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert load_tokenizer(gguf_file)(TEXT)["input_ids"] == train_tokenizer([TEXT], VOCABULARY)(TEXT)["input_ids"]


def test_a_gguf_file_is_read_once_for_configuration_weights_and_tokenizer(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    read, calls = module.load_gguf_checkpoint, []

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(options.get("return_tensors", False))
        return read(*given, **options)

    monkeypatch.setattr(module, "load_gguf_checkpoint", counted)
    monkeypatch.setattr("mull.retrofit.source.LARGE", 0)
    file = shutil.copy(gguf_file, tmp_path / "m.gguf")
    model = mull.from_pretrained(file, SPLIT, use_cache=False)
    load_tokenizer(file)
    assert calls.count(True) == 1
    assert calls.count(False) <= 2, "one for the configuration, and one that AutoTokenizer makes"
    assert capsys.readouterr().err.count(f"Reading {file} (0.0 GB)") == 1
    assert not model.config.get_text_config().use_cache
    assert mull.from_pretrained(file, SPLIT).config.get_text_config().use_cache, "a call does not change the next one's"


def test_without_the_package_the_extra_is_named(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    monkeypatch.setattr(module, "is_gguf_available", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"pip install 'mull\[gguf\]'"):
        mull.from_pretrained(shutil.copy(gguf_file, tmp_path / "new.gguf"))


def test_what_is_no_model_is_named(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "base.yaml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "done" / "model").mkdir(parents=True)
    (tmp_path / "done" / "model" / "config.json").write_text("{}")
    for written, message in {
        "out/base/model": r"There is no model at out/base/model. The run base writes it .*: mull train runs/base.yaml",
        "out/other/trunk": r"The run other writes it .*: mull train with the recipe of run.name=other",
        "./nothing": "There is no model at ./nothing. Check the path",
        "/no/such/place": "There is no model at /no/such/place",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            mull.from_pretrained(written)
    for written, message in {
        "s3://bucket/model": "cannot be read as a model",
        "done": "done is the folder of a run: give the model in it, .*done/model",
        "notes.txt": "notes.txt is a file: give the folder",
        "": "is empty or has a null character",
        "~no-such-user/x": "there is no such user",
        str(gguf_file.parent): "has no config.json, but GGUF files: give one of them, such as .*M.GGUF",
    }.items():
        with pytest.raises(ValueError, match=message):
            mull.from_pretrained(written)
    assert find_source("Qwen/Qwen3-0.6B") == Source("Qwen/Qwen3-0.6B", {})
    for family in FAMILIES:
        tiny(family).save_pretrained(tmp_path / "bare")
        with pytest.raises(ValueError, match="bare has no tokenizer: save the model's own beside it"):
            load_tokenizer("bare")


def test_a_folder_of_any_name_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a b", "[a]", "a?b", "50%", "a#b", "~a"):
        wrap_transformer_with_etd(tiny("qwen3"), None).save_pretrained(tmp_path / name)
        for written in (tmp_path / name, f"file://{tmp_path}/{name}", f"~/{name}"):
            assert mull.from_pretrained(written).config.model_type == "mull"


def test_paths_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        local_path("~/a?b") == local_path(f"file://{tmp_path}/a?b") == local_path(tmp_path / "a?b") == tmp_path / "a?b"
    )
    for written, kind in {
        "": ValueError,
        "a\0b": ValueError,
        "s3://x/y": ValueError,
        None: TypeError,
        3: TypeError,
    }.items():
        with pytest.raises(kind):
            local_path(written)  # type: ignore[arg-type]
