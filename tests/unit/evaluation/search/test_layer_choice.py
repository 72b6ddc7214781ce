"""Claim: the layers that a planted model retrieves with are ranked first, and a ranking that is noise is called so.

The planted model is a Qwen3 whose weights are written by hand. Its states hold the token, the token before it, and a prediction,
each as one number per token. One layer copies the token before into its place, which rotary positions can point at; another looks
for the place whose token before is the one that is read now, and predicts what stands there. The other layers do nothing much.
"""

import math
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from mull import wrap_transformer_with_etd
from mull.data.retrieval import Retrieval, retrieval_task
from mull.evaluation.divergence import model_divergences
from mull.evaluation.search.layer_choice import (
    GateSearchConfig,
    choose_layers,
    judge,
    replacement_divergences,
    resampled,
    retrieval_losses,
    uniform_layers,
)
from mull.retrofit.calibrate import CalibrationConfig, calibrate_starts, delta_mixer, mixers_in_place

V, WIDTH, HEAD, LAYERS = 24, 80, 32, 5
TOKEN, BEFORE, PREDICTED, ONE = range(V), range(V, 2 * V), range(2 * V, 3 * V), 3 * V
ALONE = CalibrationConfig(sequential=False)


@torch.no_grad()
def planted(match: int, before: int | None = None) -> Any:
    """Layer `match` retrieves. Layer `before` tells it the token before; without one, the embedding tells it of a class."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HEAD,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.02,
        pad_token_id=None,
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    embedding = torch.zeros(V, WIDTH)
    embedding[:, :V] = torch.eye(V)
    embedding[:, ONE] = 1
    if before is None:
        for value in range(6, V):  # tokens 0 to 5 name classes, the others are values of one
            embedding[value, BEFORE[value % 6]] = 1
        for name in range(6):  # without any, the norm of keys would blow noise up
            embedding[name, BEFORE[6 + name]] = 1
    model.model.embed_tokens.weight.copy_(embedding)
    model.lm_head.weight.zero_()
    model.lm_head.weight[:, PREDICTED] = 4 * torch.eye(V)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()
    # Two tokens share a direction, with opposite signs. Slow rotary pairs hardly turn over a row.
    code = torch.zeros(HEAD, V)
    slow = [*range(10, 16), *range(26, 32)]
    for token in range(V):
        code[slow[token // 2], token] = 1 - 2 * (token % 2)
    found = model.model.layers[match].self_attn
    write(found, query=(TOKEN, code), key=(BEFORE, code), value=TOKEN, out=PREDICTED, sharpness=2.0)
    if before is not None:
        speed = 10000.0 ** (-torch.arange(HEAD // 2) / (HEAD // 2))
        constant = torch.zeros(2, HEAD, 1)
        constant[0, :, 0] = torch.cat([speed.cos(), -speed.sin()])  # one place back
        constant[1, : HEAD // 2, 0] = 1
        attention = model.model.layers[before].self_attn
        write(attention, query=([ONE], constant[0]), key=([ONE], constant[1]), value=TOKEN, out=BEFORE, sharpness=12.0)
    return model


def write(attention: Any, *, query: Any, key: Any, value: range, out: range, sharpness: float) -> None:
    for projection, (columns, weights) in ((attention.q_proj, query), (attention.k_proj, key)):
        projection.weight.zero_()
        projection.weight[:, list(columns)] = weights
    attention.q_norm.weight.fill_(sharpness)
    attention.k_norm.weight.fill_(sharpness)
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[:V, list(value)] = torch.eye(V)
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[list(out), :V] = torch.eye(V)


def classes(rows: int = 48, tokens: int = 40) -> Retrieval:
    """In each row, each class has one value of three. The row ends with a class, and is asked for its value."""
    generator = torch.Generator().manual_seed(1)
    values = 6 + torch.arange(6) + 6 * torch.randint(3, (rows, 6), generator=generator)  # (E, 6)
    known = torch.cat([values, torch.arange(6).expand(rows, 6)], 1)
    ids = known.gather(1, torch.randint(12, (rows, tokens), generator=generator))
    ids[:, :6] = values
    asked = torch.randint(6, (rows, 1), generator=generator)
    ids[:, -1] = asked[:, 0]
    return Retrieval(ids, values.gather(1, asked)[:, 0])


def haystack(rows: int = 32, tokens: int = 40) -> Tensor:
    """Rows of half of the tokens each: the other half is free for facts."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(12, (rows, tokens), generator=generator) + 12 * (torch.arange(rows) % 2)[:, None]


def alone(model: Any, rows: Tensor) -> Any:
    return calibrate_starts(model, [rows], range(LAYERS), ALONE, progress=False)


@pytest.mark.parametrize("match", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_layer_that_retrieves_is_ranked_first(match):
    model, task = planted(match), classes()
    starts = alone(model, classes(64, 40).input_ids[48:])
    by_task = choose_layers(model, 1, "retrieval", starts=starts, tasks=task, progress=False)
    by_text = choose_layers(model, 1, "replace-one", starts=starts, rows=task.input_ids, progress=False)
    assert by_task.accuracy == 1.0
    for choice in (by_task, by_text):
        assert choice.keep == (match,)
        assert choice.separated
        assert choice.scores[0].low > max(score.high for score in choice.scores[1:])
        assert "can be told apart" in choice.verdict
        assert choice.n_examples == 48


@pytest.mark.parametrize("n_keys", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_both_layers_of_an_induction_are_ranked_first_by_generated_tasks(n_keys):
    model, task = planted(3, before=1), retrieval_task(haystack(), 48, n_keys)
    starts = alone(model, haystack())
    choice = choose_layers(model, 2, "retrieval", starts=starts, tasks=task, progress=False)
    assert choice.accuracy == 1.0, "the planted model solves the generated task"
    assert "hardly shows" not in choice.verdict
    assert choice.keep == (1, 3)
    assert choice.separated


def test_a_model_that_cannot_retrieve_is_no_judge_of_its_layers():
    model = planted(3)  # without a layer that tells it the token before
    choice = choose_layers(
        model, 2, "retrieval", starts=alone(model, haystack()), tasks=retrieval_task(haystack(), 24, 3), progress=False
    )
    assert choice.accuracy is not None
    assert choice.accuracy < 0.5
    assert f"The model itself answers {choice.accuracy:.0%} of the tasks" in choice.verdict


def test_gates_stay_open_where_the_model_retrieves():
    model, task = planted(3), classes(8, 16)
    starts = alone(model, classes(24, 16).input_ids)
    required = [parameter.requires_grad for parameter in model.parameters()]
    before = model(task.input_ids).logits
    config = GateSearchConfig(steps=6, learning_rate=0.4, resamples=2, batch_size=2)
    choice = choose_layers(model, 1, "gate", starts=starts, rows=task.input_ids, gates=config, progress=False)
    assert choice.keep == (3,)
    assert choice.scores[0].low > 1.2 * max(score.high for score in choice.scores[1:])
    assert sum(score.score for score in choice.scores) == pytest.approx(1, abs=0.3), "within the budget"
    assert torch.equal(model(task.input_ids).logits, before)
    assert required == [parameter.requires_grad for parameter in model.parameters()]
    assert choose_layers(model, 1, "gate", starts=starts, rows=task.input_ids, gates=config, progress=False).keep == (
        3,
    )


@torch.no_grad()
def test_a_replaced_layer_is_measured_as_a_whole_hybrid_would_be():
    # By hand: the model with one mixer in place, one layer after the other, of the whole rows at once.
    model: Any = tiny("qwen3", num_hidden_layers=3)
    ids = torch.randint(3, 97, (5, 24))
    starts = calibrate_starts(model, [ids], range(3), ALONE, progress=False)
    found = replacement_divergences(model, list(ids.split(2)), starts, progress=False)
    answers = torch.arange(10, 15)
    losses, accuracy = retrieval_losses(model, Retrieval(ids, answers), starts, batch_size=2, progress=False)
    plain = model(ids).logits.double().log_softmax(-1)
    for number in range(3):
        mixer = delta_mixer(model.model.layers[number], model.config, starts[number])
        with mixers_in_place(model.model.layers, {number: mixer}):
            logits = model(ids).logits.double().log_softmax(-1)
        expected = (plain.exp() * (plain - logits)).sum(-1).mean(1)
        torch.testing.assert_close(found[:, number], expected, rtol=1e-3, atol=1e-5)
        lost = (plain - logits)[torch.arange(5), -1, answers]
        torch.testing.assert_close(losses[:, number], lost, rtol=1e-3, atol=1e-5)
    assert accuracy == (plain[:, -1].argmax(-1) == answers).float().mean().item()
    assert model_divergences(model, model, [ids]).abs().max() == 0
    wrapped = wrap_transformer_with_etd(model, None)
    torch.testing.assert_close(
        replacement_divergences(wrapped, [ids], starts, progress=False), found, rtol=1e-3, atol=1e-6
    )


def test_intervals_are_those_of_a_mean():
    values = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.tensor(
        [5.0, 2.0, 1.9]
    )
    keep, scores, separated, _ = judge(values.mean(0), resampled(values), 1, "nats")
    assert keep == (0,)
    assert separated
    for score in scores:
        error = 1.96 * values[:, score.layer].std().item() / math.sqrt(400)
        assert score.high - score.score == pytest.approx(error, rel=0.15)
        assert score.score - score.low == pytest.approx(error, rel=0.15)
    assert [score.layer for score in scores] == values.mean(0).argsort(descending=True).tolist()


def test_noise_is_called_noise():
    # Three layers of equal worth, and one that is worth more: only the first can be told.
    values = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:, 2] += 3
    keep, _, separated, verdict = judge(values.mean(0), resampled(values), 2, "nats")
    assert 2 in keep
    assert not separated
    assert "They cannot be told apart: this choice is within noise." in verdict
    # Examples that are hard for all layers alike widen every interval, and do not hide a difference.
    values[:, 1] = values[:, 0] + 0.01
    shared = values + 10 * torch.randn(60, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values[:, 3] -= 50
    shared[:, 3] -= 50
    assert judge(shared.mean(0), resampled(shared), 2, "nats")[2]


def test_uniform_layers_end_runs():
    assert uniform_layers(8, 2) == (3, 7)
    assert uniform_layers(36, 9) == tuple(range(3, 36, 4))
    assert uniform_layers(10, 3) == (2, 5, 9)
    choice = choose_layers(tiny("qwen3"), 2, "uniform")
    assert (choice.keep, choice.separated, choice.scores) == ((3, 7), None, ())


def test_what_is_missing_is_named():
    model = tiny("qwen3", num_hidden_layers=3)
    ids = torch.randint(3, 97, (2, 8))
    starts = calibrate_starts(model, [ids], [1], ALONE, progress=False)
    with pytest.raises(ValueError, match="method='retrieval' measures: give tasks and starts"):
        choose_layers(model, 1, "retrieval", starts=starts, rows=ids)
    with pytest.raises(ValueError, match=r"Layers \[0, 2\] have no calibrated start"):
        choose_layers(model, 1, "replace-one", starts=starts, rows=ids)
    with pytest.raises(ValueError, match="n_keep=3 must be at least 1 and at most 2"):
        choose_layers(model, 3, "uniform")


@pytest.mark.parametrize("method", ["replace-one", "retrieval", "gate"])
def test_few_different_examples_give_no_verdict(method):
    model: Any = tiny("qwen3", num_hidden_layers=3, attention_dropout=0.5)
    ids = torch.randint(3, 97, (2, 8)).repeat(8, 1)
    starts = calibrate_starts(model, [ids], range(3), ALONE, progress=False)
    given: dict[str, Any] = {"tasks": Retrieval(ids, ids[:, 0])} if method == "retrieval" else {"rows": ids}
    gates = GateSearchConfig(steps=1, resamples=2)
    with torch.no_grad():  # gates are trained all the same
        choice = choose_layers(model, 1, method, starts=starts, gates=gates, progress=False, **given)
    assert choice.separated is None
    assert choice.n_examples == 16
    assert f"2 different {'tasks' if method == 'retrieval' else 'rows'} are too few" in choice.verdict
    assert "told apart." not in choice.verdict
    model.train()
    again = choose_layers(model, 1, method, starts=starts, gates=gates, progress=False, **given)
    assert again.scores == choice.scores, "dropout is off"
    assert model.training
    empty = {name: Retrieval(ids[:0], ids[:0, 0]) if name == "tasks" else ids[:0] for name in given}
    with pytest.raises(ValueError, match=r"has shape \(0, 8\): every row needs at least one token"):
        choose_layers(model, 1, method, starts=starts, **empty)
    wrapped = wrap_transformer_with_etd(model, None)
    model.lm_head.weight.data.fill_(torch.nan)
    if method != "gate":
        with pytest.raises(ValueError, match=r"Layers \[0, 1, 2\] have scores that are not finite"):
            choose_layers(wrapped, 1, method, starts=starts, progress=False, **given)
