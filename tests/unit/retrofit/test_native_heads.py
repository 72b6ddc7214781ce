"""Claim: native heads are read whole or not at all, read the state they were trained on, and are written as engines read them.

The checkpoints are written here, name by name as the released ones are, and not by the code under test.
"""

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import COMMON, LINEAR, SPLIT, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3_5ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mull
from mull import ETDConfig, MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.retrofit import native_heads as native
from mull.retrofit.native_heads import (
    calibrate_hidden_state,
    export_native_heads,
    fuse_experts,
    read_native_heads,
    split_experts,
)
from mull.runtime import storage

Ids = Callable[..., Tensor]

NATIVE = MTPConfig(mtp_head_type="native", num_predict_tokens=2)
SPLIT_OF_TWO = ETDConfig(n_encoder_layers=0, n_think_layers=1, n_decoder_layers=1)
COMMON_SHAPES = {
    "mtp.fc.weight": (32, 64),
    "mtp.pre_fc_norm_embedding.weight": (32,),
    "mtp.pre_fc_norm_hidden.weight": (32,),
    "mtp.norm.weight": (32,),
    "mtp.layers.0.input_layernorm.weight": (32,),
    "mtp.layers.0.post_attention_layernorm.weight": (32,),
    "mtp.layers.0.self_attn.q_proj.weight": (128, 32),  # with the gate of the output
    "mtp.layers.0.self_attn.k_proj.weight": (32, 32),
    "mtp.layers.0.self_attn.v_proj.weight": (32, 32),
    "mtp.layers.0.self_attn.o_proj.weight": (32, 64),
    "mtp.layers.0.self_attn.q_norm.weight": (16,),
    "mtp.layers.0.self_attn.k_norm.weight": (16,),
}
DENSE_SHAPES = {
    **COMMON_SHAPES,
    "mtp.layers.0.mlp.gate_proj.weight": (48, 32),
    "mtp.layers.0.mlp.up_proj.weight": (48, 32),
    "mtp.layers.0.mlp.down_proj.weight": (32, 48),
}
ROUTED_SHAPES = {
    **COMMON_SHAPES,
    "mtp.layers.0.mlp.gate.weight": (4, 32),
    "mtp.layers.0.mlp.shared_expert.gate_proj.weight": (16, 32),
    "mtp.layers.0.mlp.shared_expert.up_proj.weight": (16, 32),
    "mtp.layers.0.mlp.shared_expert.down_proj.weight": (32, 16),
    "mtp.layers.0.mlp.shared_expert_gate.weight": (1, 32),
}
FUSED_SHAPES = {
    **ROUTED_SHAPES,
    "mtp.layers.0.mlp.experts.gate_up_proj": (4, 32, 32),
    "mtp.layers.0.mlp.experts.down_proj": (4, 32, 16),
}
PER_EXPERT_SHAPES = {
    **ROUTED_SHAPES,
    **{
        f"mtp.layers.0.mlp.experts.{expert}.{name}.weight": (32, 16) if name == "down_proj" else (16, 32)
        for expert in range(4)
        for name in ("gate_proj", "up_proj", "down_proj")
    },
}
LAYOUTS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "qwen3_next-dense": ("qwen3_next-dense", DENSE_SHAPES),
    "qwen3_next-moe": ("qwen3_next-moe", PER_EXPERT_SHAPES),
    "qwen3_5": ("qwen3_5", DENSE_SHAPES),
    "qwen3_5-moe": ("qwen3_5-moe", FUSED_SHAPES),
    "qwen3_5-moe, per expert": ("qwen3_5-moe", PER_EXPERT_SHAPES),
}
COUNT_FIELDS = {"qwen3_next": "num_nextn_predict_layers", "qwen3_5": "mtp_num_hidden_layers"}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def head_tensors(layout: str, seed: int = 1) -> dict[str, Tensor]:
    """The heads of a checkpoint, every tensor random."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in LAYOUTS[layout][1].items()}


def trunk_tensors(base: PreTrainedModel, per_expert: bool) -> dict[str, Tensor]:
    """The trunk as the release of that layout has it."""
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in [name for name in tensors if per_expert and ".mlp.experts." in name]:
        for expert, matrix in enumerate(tensors.pop(name)):
            stem = f"{name.rsplit('.', 1)[0]}.{expert}"
            if name.endswith("down_proj"):
                tensors[f"{stem}.down_proj.weight"] = matrix.clone()
            else:
                half = len(matrix) // 2
                tensors[f"{stem}.gate_proj.weight"] = matrix[:half].clone()
                tensors[f"{stem}.up_proj.weight"] = matrix[half:].clone()
    return tensors


def write(folder: Path, config: Any, *shards: Mapping[str, Tensor]) -> Path:
    """A checkpoint: one file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    if len(shards) == 1:
        save_file(dict(shards[0]), folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save_file(dict(tensors), folder / name, {"format": "pt"})
    weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def released(folder: Path, layout: str, *, sharded: bool = False, heads: Mapping[str, Tensor] | None = None) -> Path:
    """A checkpoint as it was released; the second of three shards has trunk and heads."""
    base = tiny(LAYOUTS[layout][0])
    heads = head_tensors(layout) if heads is None else heads
    trunk = trunk_tensors(base, per_expert=LAYOUTS[layout][1] is PER_EXPERT_SHAPES)
    if not sharded:
        return write(folder, base.config, {**trunk, **heads})
    names = sorted(trunk)
    thirds = [{name: trunk[name] for name in names[start::3]} for start in range(3)]
    return write(folder, base.config, thirds[0], {**thirds[1], **heads}, thirds[2])


def on_disk(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every file in a folder; none may stand in two files."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = load_file(file)
        assert not content.keys() & tensors.keys(), "a reader of all files would find two versions"
        tensors.update(content)
    return tensors


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack experts, written out by hand for the four of the tests."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name or "weight" not in name}
    stem = "mtp.layers.0.mlp.experts"
    if f"{stem}.0.down_proj.weight" in tensors:
        rest[f"{stem}.down_proj"] = torch.stack([tensors[f"{stem}.{e}.down_proj.weight"] for e in range(4)])
        gates = torch.stack([tensors[f"{stem}.{e}.gate_proj.weight"] for e in range(4)])
        ups = torch.stack([tensors[f"{stem}.{e}.up_proj.weight"] for e in range(4)])
        rest[f"{stem}.gate_up_proj"] = torch.cat([gates, ups], 1)
    return rest


def heads_of(model: MullForCausalLM) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.startswith("mtp.")}


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.latin(3)
def test_every_tensor_of_a_released_checkpoint_arrives(layout: str, sharded: bool, tmp_path: Path, ids: Ids) -> None:
    heads = head_tensors(layout)
    assert len(fused(heads)) == (15 if LAYOUTS[layout][1] is DENSE_SHAPES else 19)
    model = mull.from_pretrained(str(released(tmp_path, layout, sharded=sharded)), SPLIT, NATIVE)
    assert_equal(heads_of(model), fused(heads))
    base = tiny(LAYOUTS[layout][0])
    assert_equal({name: value for name, value in model.state_dict().items() if "mtp" not in name}, base.state_dict())
    with torch.no_grad():
        logits = model(ids(2, 9), think_iterations=1).logits
        # Experts sum in an order that depends on where their weights lie in memory.
        torch.testing.assert_close(logits, base(ids(2, 9)).logits, atol=1e-5 if "moe" in layout else 0.0, rtol=0)
    assert model.mtp_config == NATIVE
    assert not model.training


def composite(folder: Path, heads: Mapping[str, Tensor]) -> PreTrainedModel:
    """A multimodal Qwen3.5, whose trunk is called ``model.language_model`` and whose heads stand beside it."""
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = CONFIG_MAPPING["qwen3_5"](text_config={**COMMON, **LINEAR}, vision_config=vision)
    model = Qwen3_5ForConditionalGeneration(config).eval()
    write(folder, config, {**{name: value.clone() for name, value in model.state_dict().items()}, **heads})
    assert any(name.startswith("model.language_model.layers.0.") for name in on_disk(folder))
    return model


@torch.no_grad()
def test_a_multimodal_checkpoint_gives_its_text_model_and_heads(tmp_path: Path, ids: Ids) -> None:
    multimodal = composite(tmp_path, head_tensors("qwen3_5"))
    model = mull.from_pretrained(str(tmp_path), SPLIT, NATIVE)
    assert_equal(heads_of(model), head_tensors("qwen3_5"))
    assert torch.equal(model(ids(2, 9), think_iterations=1).logits, multimodal(ids(2, 9)).logits)


def test_heads_take_the_precision_and_device_of_the_trunk(tmp_path: Path) -> None:
    folder = released(tmp_path, "qwen3_next-moe")
    model = mull.from_pretrained(str(folder), mtp=NATIVE, dtype=torch.bfloat16, device_map="cpu")
    expected = {name: value.bfloat16() for name, value in fused(head_tensors("qwen3_next-moe")).items()}
    assert_equal(heads_of(model), expected)
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    with pytest.raises(ValueError, match="no memory for native heads: its lm_head is offloaded or on the meta device"):
        mull.from_pretrained(str(folder), mtp=NATIVE, device_map="meta")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub, without a network, in which a sharded checkpoint has two revisions with different heads."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--tiny"
    for revision, commit, seed in (("main", "a" * 40, 1), ("tuned", "b" * 40, 2)):
        released(repository / "snapshots" / commit, "qwen3_5", sharded=True, heads=head_tensors("qwen3_5", seed))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return tmp_path / "hub"


def test_the_hub_is_asked_for_the_same_revision_as_the_trunk_and_only_for_files_with_heads(hub: Path) -> None:
    options: dict[str, Any] = {"cache_dir": str(hub), "local_files_only": True}
    for revision, seed in (("main", 1), ("tuned", 2)):
        model = mull.from_pretrained("someone/tiny", mtp=NATIVE, revision=revision, **options)
        assert_equal(heads_of(model), head_tensors("qwen3_5", seed))
    for file in (hub / "models--someone--tiny").rglob("model-0000[13]-*.safetensors"):
        file.unlink()  # asking for one of these would fail
    assert_equal(read_native_heads("someone/tiny", **options), head_tensors("qwen3_5", 1))


def test_a_checkpoint_in_a_subfolder_is_found(tmp_path: Path) -> None:
    released(tmp_path / "inner", "qwen3_5")
    model = mull.from_pretrained(str(tmp_path), mtp=NATIVE, subfolder="inner")
    assert_equal(heads_of(model), head_tensors("qwen3_5"))


FAULTS: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("qwen3_5", lambda t: t.pop("mtp.norm.weight"), r"missing: mtp\.norm\.weight\."),
    ("qwen3_5", lambda t: t.update({"mtp.bias": torch.ones(2)}), r"left over: mtp\.bias\."),
    ("qwen3_5", lambda t: t.update({"mtp.embed_tokens.weight": torch.ones(97, 32)}), r"left over: mtp\.embed_tokens"),
    (
        "qwen3_5",
        lambda t: t.update({"mtp.fc.weight": torch.ones(32, 32)}),
        r"another shape: mtp\.fc\.weight of shape \(32, 32\) instead of \(32, 64\)",
    ),
    (
        "qwen3_next-moe",
        lambda t: t.pop("mtp.layers.0.mlp.experts.2.up_proj.weight"),
        r"missing: mtp\.layers\.0\.mlp\.experts\.2\.up_proj\.weight\.",
    ),
    (
        "qwen3_next-moe",
        lambda t: t.update({"mtp.layers.0.mlp.experts.4.up_proj.weight": torch.ones(16, 32)}),
        r"left over: mtp\.layers\.0\.mlp\.experts\.4\.up_proj\.weight\.",
    ),
    (
        "qwen3_5-moe",
        lambda t: t.update({"mtp.layers.0.mlp.experts.down_proj": torch.ones(3, 32, 16)}),
        r"experts\.down_proj of shape \(3, 32, 16\) instead of \(4, 32, 16\)",
    ),
    ("qwen3_5", lambda t: t.clear(), "has no native heads.*transformer, mlp, shared_lm_head or sequential"),
    (
        "qwen3_5",
        lambda t: t.update({"mtp.layers.1.input_layernorm.weight": torch.ones(32)}),
        r"have 2 layers \(mtp\.layers\.1 is one\)\. Only heads of one layer",
    ),
]


@pytest.mark.parametrize(("layout", "spoil", "message"), FAULTS)
def test_heads_that_do_not_fit_are_refused_with_what_is_wrong(
    layout: str, spoil: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    heads = head_tensors(layout)
    spoil(heads)
    with pytest.raises(ValueError, match=message):
        mull.from_pretrained(str(released(tmp_path, layout, heads=heads)), mtp=NATIVE)


def test_a_damaged_checkpoint_is_called_damaged(tmp_path: Path) -> None:
    folder = released(tmp_path / "index", "qwen3_5", sharded=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"mtp.norm.weight"', '"mtp.norm.wait"'))
    with pytest.raises(
        ValueError, match=r"places mtp\.norm\.wait in model-00002-of-00003\.safetensors, which has no such"
    ):
        mull.from_pretrained(str(folder), mtp=NATIVE)
    folder = released(tmp_path / "file", "qwen3_5")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*Fetch it again"):
        mull.from_pretrained(str(folder), mtp=NATIVE)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        mull.from_pretrained(str(folder), mtp=NATIVE)


def test_experts_are_split_and_stacked_without_loss() -> None:
    stem = "a.mlp.experts"
    many = {f"{stem}.gate_up_proj": torch.randn(11, 6, 5), f"{stem}.down_proj": torch.randn(11, 5, 3)}
    tensors = {**head_tensors("qwen3_5-moe"), **many}
    split = split_experts(tensors)
    assert "a.mlp.experts.10.up_proj.weight" in split  # sorted as text it would come before 2
    assert_equal(fuse_experts(dict(reversed(split.items()))), tensors)


# What the heads read


def own_text(model: MullForCausalLM, rows: int, tokens: int) -> Tensor:
    start = torch.full((rows, 1), 5)
    return model.generate(
        start, do_sample=True, top_k=0, max_new_tokens=tokens - 1, min_new_tokens=tokens - 1, pad_token_id=0
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stock checkpoints of an architecture without a table entry, with heads that were trained on either state, or in vain.

    The factors of the final norm are uneven, also in sign, so that the two states differ. ``nothing``: heads that were given the
    targets of other rows, and learned which tokens are frequent.
    """
    folders = {}
    torch.set_num_threads(1)
    for truth in ("normed", "stream", "nothing"):
        base = tiny("llama", num_hidden_layers=2)
        torch.manual_seed(1)
        base.lm_head.weight.data[20:] = 0  # hardly ever chosen
        base.model.norm.weight.data = torch.randn(32).exp() * torch.randn(32).sign()
        read = "stream" if truth == "stream" else "normed"
        mtp = MTPConfig(mtp_head_type="native", num_predict_tokens=1, native_hidden_state=read)
        model = wrap_transformer_with_etd(base, None, mtp)
        text = own_text(model, 96, 32)
        states = model.hidden_states(text)
        targets = model.lm_head(states).argmax(-1).roll(-1, 1).unsqueeze(-1).expand(-1, -1, 2)
        if truth == "nothing":
            targets = targets.flip(0)
            torch.nn.init.normal_(
                model.mtp.fc.weight, std=0.1
            )  # fresh heads predict as the trunk does, which is something
        coefficients = torch.zeros(targets.shape)
        coefficients[:, :-1, 1] = 1 / targets[:, :-1, 1].numel()
        optimizer = torch.optim.Adam(model.mtp.parameters(), lr=5e-3)
        for _ in range(12 if truth == "nothing" else 40):
            loss, _ = model.head_losses(states.detach(), text, targets, coefficients, trunk_gradient=0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        folders[truth] = write(tmp_path_factory.mktemp(truth), base.config, tensors)
    return folders


@pytest.mark.parametrize("truth", ["normed", "stream"])
@pytest.mark.latin(2)
def test_the_state_that_heads_were_trained_on_is_found_pinned_and_saved(
    truth: str, fitted: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mull.retrofit.native_heads"):
        model = mull.from_pretrained(str(fitted[truth]), SPLIT_OF_TWO, NATIVE)
    assert f"read the '{truth}' state" in caplog.text
    entropy = re.search(rf"([\d.]+) nats, \d+% equal for '{truth}'", caplog.text)
    assert entropy is not None
    with torch.no_grad():
        text = native._own_text(model, 4, 64)
        states = model.hidden_states(text, think_iterations=1)
        targets = model.lm_head(states).argmax(-1).roll(-1, 1).unsqueeze(-1).expand(-1, -1, 2)
        _, losses = model.head_losses(states, text, targets, torch.ones(targets.shape))
    assert float(entropy[1]) == pytest.approx(losses[:, :-1, 1].mean().item(), abs=0.006)
    assert model.mtp_config == NATIVE.model_copy(update={"native_hidden_state": truth})
    model.save_pretrained(tmp_path)
    for again in (mull.from_pretrained(str(tmp_path)), mull.from_pretrained(str(tmp_path), mtp=NATIVE)):
        assert again.mtp_config == model.mtp_config
    generator = torch.get_rng_state()
    native.pin_hidden_state(model, "stream" if truth == "normed" else "normed")
    assert calibrate_hidden_state(model) == truth, "the state pinned before must not matter"
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("pinned", ["normed", "stream"])
def test_what_the_user_pins_is_not_measured(
    pinned: str, fitted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "calibrate_hidden_state", lambda *_: pytest.fail("it was given"))
    mtp = MTPConfig(mtp_head_type="native", native_hidden_state=pinned)
    assert mull.from_pretrained(str(fitted["stream"]), mtp=mtp).mtp_config == mtp


def test_known_architectures_are_not_measured(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "calibrate_hidden_state", lambda *_: pytest.fail("it is known"))
    model = mull.from_pretrained(str(released(tmp_path, layout)), mtp=NATIVE)
    assert model.mtp_config == NATIVE


@pytest.mark.parametrize("seed", range(4))
def test_heads_that_predict_nothing_are_reported(seed: int, fitted: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(fitted["stream"] / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if name.startswith("mtp.") and "norm" not in name]:
        tensors[name] = 0.1 * torch.randn(tensors[name].shape, generator=generator)
    folder = write(tmp_path, AutoConfig.from_pretrained(fitted["stream"]), tensors)
    assert_reported(folder)


def assert_reported(folder: Path) -> None:
    with pytest.warns(UserWarning, match="predict nothing of what the model writes"):
        model = mull.from_pretrained(str(folder), mtp=NATIVE)
    assert model.mtp_config == NATIVE


def test_heads_that_know_only_how_frequent_tokens_are_predict_nothing(fitted: dict[str, Path]) -> None:
    assert_reported(fitted["nothing"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mull.from_pretrained(str(fitted["stream"]), mtp=NATIVE)


def test_only_native_heads_are_calibrated() -> None:
    model = wrap_transformer_with_etd(tiny("qwen3"), None, MTPConfig(mtp_head_type="mlp"))
    with pytest.raises(ValueError, match="has heads of type mlp, not native ones"):
        calibrate_hidden_state(model)


# Saving, training, exporting


@pytest.mark.latin(3)
def test_a_saved_model_keeps_the_names_and_comes_back_bit_for_bit(layout: str, tmp_path: Path, ids: Ids) -> None:
    model = mull.from_pretrained(str(released(tmp_path / "base", layout)), SPLIT, NATIVE)
    model.save_pretrained(tmp_path / "mull")
    per_expert = LAYOUTS[layout][1] in (PER_EXPERT_SHAPES, FUSED_SHAPES)  # transformers writes trunks of both like this
    names = {name for name in on_disk(tmp_path / "mull") if name.startswith("mtp")}
    assert names == (PER_EXPERT_SHAPES if per_expert else DENSE_SHAPES).keys()
    for loaded in (
        mull.from_pretrained(str(tmp_path / "mull")),
        mull.from_pretrained(str(tmp_path / "mull"), mtp=NATIVE),
        AutoModelForCausalLM.from_pretrained(tmp_path / "mull"),
    ):
        assert isinstance(loaded, MullForCausalLM)
        assert_equal(loaded.state_dict(), model.state_dict())
        with torch.no_grad():
            assert torch.equal(
                loaded(ids(2, 9), labels=ids(2, 9)).mtp_loss, model(ids(2, 9), labels=ids(2, 9)).mtp_loss
            )


def train_heads(model: MullForCausalLM, tokens: Tensor) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mtp."))
    optimizer = torch.optim.AdamW(model.mtp.parameters(), lr=1e-2)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.latin(3)
def test_training_the_heads_leaves_the_trunk_alone(layout: str, tmp_path: Path, ids: Ids) -> None:
    model = mull.from_pretrained(str(released(tmp_path, layout)), SPLIT, NATIVE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        loss = model(ids(2, 20), labels=ids(2, 20)).mtp_loss
    train_heads(model, ids(2, 20))
    with torch.no_grad():
        assert model(ids(2, 20), labels=ids(2, 20)).mtp_loss < loss
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("mtp."), name


def stock(folder: Path, layout: str, state: str) -> Path:
    """Directories that heads are exported to."""
    if state == "without heads":
        return released(folder, layout, heads={})
    if state == "sharded, without heads":
        return released(folder, layout, sharded=True, heads={})
    if state == "saved by transformers":
        tiny(LAYOUTS[layout][0]).save_pretrained(folder)
        return folder
    return released(folder, layout, sharded=state.startswith("sharded"), heads=head_tensors(layout, seed=9))


STATES = ["without heads", "sharded, without heads", "with heads", "sharded, with heads", "saved by transformers"]


@pytest.mark.parametrize(
    ("layout", "state"),
    [(layout, state) for layout in LAYOUTS for state in (STATES if layout == "qwen3_5-moe" else STATES[2:4])],
)
@pytest.mark.latin(4, "layout", "state")
def test_exported_heads_are_what_engines_and_mull_read(layout: str, state: str, tmp_path: Path) -> None:
    model = mull.from_pretrained(str(released(tmp_path / "source", layout)), SPLIT, NATIVE)
    folder = stock(tmp_path / "stock", layout, state)
    trunk = {name: value for name, value in on_disk(folder).items() if not name.startswith("mtp.")}
    for _ in range(2):  # the second export replaces the first
        for parameter in model.mtp.parameters():
            torch.nn.init.normal_(parameter)
        export_native_heads(model, folder)
        tensors = on_disk(folder)
        heads = {name: value for name, value in tensors.items() if name.startswith("mtp.")}
        stacked = LAYOUTS[layout][1] is FUSED_SHAPES and state != "saved by transformers"
        per_expert = "moe" in layout and not stacked
        assert heads.keys() == (PER_EXPERT_SHAPES if per_expert else LAYOUTS[layout][1]).keys()
        assert_equal(fused(heads), heads_of(model))
        assert_equal({name: value for name, value in tensors.items() if not name.startswith("mtp.")}, trunk)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"] == {
            "total_parameters": sum(value.numel() for value in tensors.values()),
            "total_size": sum(value.nbytes for value in tensors.values()),
        }
        for name, file in index["weight_map"].items():
            with safe_open(folder / file, "pt") as shard:
                assert name in shard.keys()  # noqa: SIM118
        field = COUNT_FIELDS[LAYOUTS[layout][0].split("-")[0]]
        assert json.loads((folder / "config.json").read_text())[field] == 1
        assert_equal(mull.from_pretrained(str(folder), SPLIT, NATIVE).state_dict(), model.state_dict())
        base = AutoModelForCausalLM.from_pretrained(folder)
        assert_equal(base.state_dict(), tiny(LAYOUTS[layout][0]).state_dict())


def test_the_trunks_files_are_not_copied(tmp_path: Path) -> None:
    model = mull.from_pretrained(str(released(tmp_path / "source", "qwen3_5")), mtp=NATIVE)
    folder = released(tmp_path / "stock", "qwen3_5", sharded=True)
    before = {file.name: file.stat().st_ino for file in folder.glob("*.safetensors")}
    export_native_heads(model, folder)
    after = {file.name: file.stat().st_ino for file in folder.glob("*.safetensors")}
    kept = ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    # Engines that look for files instead of reading the index look for this beginning.
    assert all(name.startswith("model") for name in after)
    assert "model-00002-of-00003.safetensors" not in after


def test_a_multimodal_configuration_is_told_in_its_text_part(tmp_path: Path) -> None:
    composite(tmp_path, {})
    model = wrap_transformer_with_etd(AutoModelForCausalLM.from_pretrained(tmp_path), None, NATIVE)
    export_native_heads(model, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["mtp_num_hidden_layers"] == 1
    assert "mtp_num_hidden_layers" not in config
    assert_equal(heads_of(mull.from_pretrained(str(tmp_path), mtp=NATIVE)), heads_of(model))
    Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def failing_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    remaining: Iterator[int] = iter(range(calls))

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(remaining, None) is None:
            raise OSError("No space left on device")
        return function(*args, **kwargs)

    return fail


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        (native, "save_file", 0),
        (native, "save_file", 1),
        (storage, "flush_folder", 0),
        (storage, "write_text_atomic", 0),
    ],
)
def test_a_failed_export_leaves_the_checkpoint_as_it_was(
    module: Any, name: str, calls: int, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mull.from_pretrained(str(released(tmp_path / "source", "qwen3_5")), mtp=NATIVE)
    folder = released(tmp_path / "stock", "qwen3_5", sharded=sharded)
    before = contents(folder)
    monkeypatch.setattr(module, name, failing_after(calls, getattr(module, name)))
    with pytest.raises(OSError, match="No space left"):
        export_native_heads(model, folder)
    assert contents(folder) == before


@pytest.mark.parametrize("sharded", [False, True])
def test_an_export_that_dies_after_the_index_is_in_effect(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mull.from_pretrained(str(released(tmp_path / "source", "qwen3_5")), mtp=NATIVE)
    folder = released(tmp_path / "stock", "qwen3_5", sharded=sharded, heads=head_tensors("qwen3_5", seed=9))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing_after(0, Path.unlink))
        with pytest.raises(OSError, match="No space left"):
            export_native_heads(model, folder)
    assert_equal(mull.from_pretrained(str(folder), mtp=NATIVE).state_dict(), model.state_dict())


def test_an_export_that_engines_could_not_use_is_refused(tmp_path: Path) -> None:
    folder = released(tmp_path / "stock", "qwen3_5", heads={})
    base = tiny("qwen3_5")
    with pytest.raises(ValueError, match="has no heads, not native ones"):
        export_native_heads(wrap_transformer_with_etd(base, SPLIT), folder)
    with pytest.raises(
        ValueError, match="No serving engine reads .* of 'llama', only those of qwen3_next, qwen3_5_text"
    ):
        export_native_heads(wrap_transformer_with_etd(tiny("llama"), None, NATIVE), folder)
    stream = MTPConfig(mtp_head_type="native", native_hidden_state="stream")
    with pytest.raises(
        ValueError, match="read native_hidden_state='stream', but serving engines give them the 'normed'"
    ):
        export_native_heads(wrap_transformer_with_etd(base, None, stream), folder)
    model = wrap_transformer_with_etd(base, SPLIT, NATIVE)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        export_native_heads(model, tmp_path / "nowhere")
    model.save_pretrained(tmp_path / "mull")
    with pytest.raises(ValueError, match="is a model that mull saved"):
        export_native_heads(model, tmp_path / "mull")
    other = released(tmp_path / "other", "qwen3_next-dense", heads={})
    with pytest.raises(ValueError, match="model_type='qwen3_next' instead of 'qwen3_5_text'"):
        export_native_heads(model, other)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        export_native_heads(model, folder)
    with pytest.raises(ValueError, match="on the meta device"):
        export_native_heads(model.to("meta"), folder)
