"""Claim: what does not belong in an argument of a public function is a ValueError or TypeError with a sentence that names it.

Annotations of some packages are checked in tests as well, so the place of the error is not asserted, only its kind and text.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SPLIT, tiny

import mull
from mull import ETDConfig, MTPConfig, Sampling, from_actions, from_layers, recursion, wrap_transformer_with_etd
from mull.data.packing import pack_tokens
from mull.data.sources import load_documents
from mull.data.tasks import load_examples
from mull.evaluation.held_out import held_out_losses
from mull.evaluation.search.split import find_split
from mull.retrofit.native_heads import calibrate_hidden_state, export_native_heads
from mull.training.loop import TrainConfig, train
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

WRONG: list[Any] = [[], [[1, 2]], "x", 1.5, True, {"a": 1}, object(), b"x", torch.full((2, 3), 0.5)]
MODEL = wrap_transformer_with_etd(tiny("qwen3"), SPLIT, MTPConfig(num_predict_tokens=1, mtp_head_type="mlp")).eval()
BASE = tiny("qwen3")
IDS = torch.arange(1, 9).view(1, 8)
ROWS = pack_tokens([list(range(1, 60))], length=8, pad_id=0)
OBJECTIVE = make_objective("next-token", Resources(model=MODEL))


def batches(_number: int) -> dict[str, torch.Tensor]:
    return ROWS.rows(torch.tensor([0, 1]))


def entry(
    function: Callable[..., Any], arguments: dict[str, Any], *names: str, fits: tuple[Any, ...] = ()
) -> list[Any]:
    """`names` of the arguments to spoil; all if none are given. `fits`: types that belong there after all."""
    return [(function, arguments, name, fits) for name in names or arguments]


GENERATE = {"model": MODEL, "input_ids": IDS, "max_new_tokens": 2}
SPLIT_OF = {"model": BASE, "batches": batches, "n_batches": 1, "n_probe_batches": 0, "progress": False}
CASES = [
    *entry(mull.generate, GENERATE),
    *entry(
        mull.generate, GENERATE | {"temperature": 1.0}, "seed", "draft", "draft_length", "attention_mask", "streamer"
    ),
    *entry(mull.generate, GENERATE, "eos_token_id", fits=(list,)),
    *entry(mull.generate, GENERATE, "pad_token_id", "think_iterations", "path"),
    *entry(
        MODEL, {"input_ids": IDS}, "input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep", "path"
    ),
    *entry(MODEL.model, {"input_ids": IDS}, "input_ids", "think_iterations", "policy", "past_key_values"),
    *entry(MODEL.hidden_states, {"input_ids": IDS}, "input_ids", "attention_mask", "backprop_iterations"),
    *entry(wrap_transformer_with_etd, {"model": BASE, "config": SPLIT, "mtp": None}),
    *entry(mull.certify_identity, {"wrapped": MODEL, "model": BASE}),
    *entry(mull.from_pretrained, {"name_or_dir": "./none"}, "etd", "mtp"),
    *entry(mull.from_pretrained, {}, "name_or_dir", fits=(str,)),
    *entry(export_native_heads, {"directory": "./none"}, "model"),
    *entry(calibrate_hidden_state, {}, "model"),
    *entry(find_split, SPLIT_OF, "model", "batches", "n_batches", "n_probe_batches"),
    *entry(find_split, SPLIT_OF, "sensitivity", fits=(float,)),
    *entry(held_out_losses, {"model": MODEL, "dataset": ROWS, "iterations": 1}, "model", "dataset", "max_rows"),
    *entry(
        make_objective, {"name": "baseline-mtp", "resources": Resources(model=MODEL)}, "name", "resources", "settings"
    ),
    *entry(make_objective, {"name": "baseline-mtp", "resources": Resources(model=MODEL)}, "heads", "control", "seed"),
    *entry(
        Resources, {"model": MODEL}, "model", "iterations", "reference", "value_head", "held_out", "reward", "pad_id"
    ),
    *entry(ETDConfig, SPLIT.model_dump(), "n_encoder_layers", "n_think_layers", "max_think_iterations", "halting"),
    *entry(ETDConfig.for_model, {}, "model"),
    *entry(MTPConfig, {}, "num_predict_tokens", "mtp_head_type"),
    *entry(IterationSampling, {}, "maximum"),
    *entry(Sampling, {"temperature": 1.0}, "top_k"),
    *entry(Sampling, {}, "temperature", fits=(float,)),
    *entry(from_layers, {}, "layers"),
    *entry(from_actions, {}, "actions"),
    *entry(recursion, {"n_encoder_layers": 1, "n_think_layers": 1, "n_decoder_layers": 1, "iterations": 1}),
    *entry(TrainConfig, {"steps": 1}, "steps", "seed", "betas"),
    *entry(train, {"model": MODEL, "objective": OBJECTIVE, "batches": batches, "config": TrainConfig(steps=1)}),
    *entry(load_documents, {}, "sources", fits=(dict,)),
    *entry(load_examples, {"source": "./none"}, "schema"),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{getattr(case[0], '__name__', type(case[0]).__name__)}-{case[2]}"
)
def test_a_wrong_argument_is_a_sentence(case: Any) -> None:
    function, arguments, name, fits = case
    for wrong in WRONG:
        if isinstance(wrong, fits) and not isinstance(wrong, bool):
            continue
        with pytest.raises((ValueError, TypeError)) as error:
            function(**{**arguments, name: wrong})
        assert len(str(error.value)) > 15, f"{wrong!r}: {error.value}"


@pytest.mark.parametrize("iterations", [0, -1, 10**8, 1.5, True, "2"])
def test_iterations_are_whole_and_bounded(iterations: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="think_iterations"):
        MODEL(IDS, think_iterations=iterations)


TWO = IDS.repeat(2, 1)
HYBRID = wrap_transformer_with_etd(tiny("qwen3_5"), None).eval()
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "shift_labels-text": ({"shift_labels": "x"}, "shift_labels"),
    "shift_labels-shape": ({"shift_labels": IDS}, "shift_labels has shape"),
    "labels-shape": ({"labels": IDS}, "labels has shape"),
    "labels-vocabulary": ({"labels": TWO + 10_000}, "labels has 10001"),
    "labels-negative": ({"labels": TWO - 5}, "labels has -4"),
    "borders-list": ({"input_ids": IDS, "cu_seq_lens_q": [0, 8]}, "cu_seq_lens_q"),
    "borders-short": ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 4])}, "rise from 0 to 8"),
    "borders-late": ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([2, 8])}, "rise from 0 to 8"),
    "borders-falling": ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 5, 3, 8])}, "rise from 0 to 8"),
    "seq_idx-row": ({"seq_idx": torch.zeros(8, dtype=torch.int32)}, "seq_idx has shape"),
    "seq_idx-rows": ({"seq_idx": torch.zeros(3, 8, dtype=torch.int32)}, "seq_idx has shape"),
    "mask-rows": ({"attention_mask": torch.ones(1, 8)}, "attention_mask has 1 rows, and there are 2"),
    "mask-batch": ({"attention_mask": torch.ones(3, 1, 8, 8).bool()}, "attention_mask has shape"),
    "mask-heads": ({"attention_mask": torch.ones(2, 3, 8, 8).bool()}, "attention_mask has shape"),
    "mask-kind": ({"attention_mask": {"full_attention": "x"}}, "full_attention"),
    "positions-length": ({"position_ids": torch.arange(5)[None]}, "position_ids has shape"),
    "positions-rows": ({"position_ids": torch.arange(8).expand(3, 8)}, "position_ids has shape"),
    "no-tokens": ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "at least one token"),
    "ids-int8": ({"input_ids": TWO.to(torch.int8)}, "torch.int64"),
    "embeddings-width": ({"input_ids": None, "inputs_embeds": torch.zeros(2, 8, 5)}, "inputs_embeds has shape"),
    "embeddings-whole": ({"input_ids": None, "inputs_embeds": torch.zeros(2, 8, 32).long()}, "inputs_embeds"),
    "use_cache-text": ({"use_cache": "no"}, "use_cache"),
    "keep-bool": ({"logits_to_keep": torch.ones(8, dtype=torch.bool)}, "logits_to_keep"),
}


@pytest.mark.parametrize("model", [wrap_transformer_with_etd(BASE, None), HYBRID], ids=["attention", "hybrid"])
@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_the_tokens_is_a_sentence(model: Any, case: str) -> None:
    arguments, message = MISFITS[case]
    if model is HYBRID and case in ("mask-batch", "mask-heads"):
        message = "Recurrent layers cannot obey"
    with pytest.raises((ValueError, TypeError), match=message):
        model(**({"input_ids": TWO} | arguments))


def test_a_mask_by_kind_of_layer_may_leave_recurrent_layers_out() -> None:
    assert torch.equal(HYBRID(TWO, attention_mask={"full_attention": None}).logits, HYBRID(TWO).logits)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (
            MTPConfig,
            {"num_predict_token": 2},
            "MTPConfig has no field num_predict_token. Did you mean num_predict_tokens?",
        ),
        (MTPConfig, {"heads": 2}, "MTPConfig has no field heads. Known are num_predict_tokens, mtp_head_type"),
        (TrainConfig, {"steps": 2, "peek_lr": 1}, "TrainConfig has no field peek_lr. Did you mean peak_lr?"),
    ],
)
def test_an_unknown_field_of_settings_is_one_sentence_with_the_nearest(settings: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        settings(**given)
    assert "\n" not in str(error.value)
