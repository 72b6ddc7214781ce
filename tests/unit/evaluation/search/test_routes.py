"""Claim: routes that share their beginnings give what passes of their own give, a search can be stopped anywhere, and it finds
the layer that has to be skipped or repeated.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SPLIT, tiny
from torch.nn import functional as F

from mull.data.arithmetic import character_tokenizer
from mull.data.route_labels import read_labels
from mull.data.tokenizer import TextEncoder
from mull.evaluation.search import routes as routes_module
from mull.evaluation.search.route_scores import Question, RouteTask, Score, SharedRuns, load_questions
from mull.evaluation.search.route_tree import RouteSearchConfig, is_allowed
from mull.evaluation.search.routes import best_route, judged, label_questions, routed_layers
from mull.model.causal_lm import MullForCausalLM
from mull.model.path import from_actions, from_layers
from mull.retrofit.wrap import wrap_transformer_with_etd

EXACT_QUESTIONS = [Question("12+3=", "15"), Question("7*8=", "56"), Question("40-2=", "38")]
CHOICES = [Question("12+3=", "15", ("1", "999")), Question("7*8=", "56", ("5",))]
ROUTES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 0, 1, 1, 1, 1),
    (1, 1, 1, 2, 1, 1, 1, 1),
    (1, 1, 1, 2, 1, 0, 0, 1),
    (0, 1, 1, 2, 1, 1, 1, 2),
]


def task_of(model: MullForCausalLM, questions: Sequence[Question] = EXACT_QUESTIONS, end: bool = False) -> RouteTask:
    return RouteTask(model, TextEncoder(character_tokenizer()), questions, end)


def wrapped(family: str = "qwen3", seed: int = 0, **changes: Any) -> MullForCausalLM:
    return wrap_transformer_with_etd(tiny(family, seed=seed, **changes), None).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_beginnings_are_bit_for_bit_passes_of_their_own(family: str) -> None:
    model = wrapped(family)
    for questions in (EXACT_QUESTIONS[:1], CHOICES[:1], CHOICES):
        task = task_of(model, questions)
        rows = task.rows(range(len(questions)))
        runs = SharedRuns(model, rows, batch_size=1)
        found = runs.states(ROUTES) + runs.states(ROUTES[::-1])[::-1]  # the second time, all of it is known
        for route, state in zip(ROUTES * 2, found, strict=True):
            with torch.no_grad():
                whole = model.model(rows.input_ids, rows.attention_mask, path=from_actions(route), use_cache=False)
            assert torch.equal(model.model.norm(state), whole.last_hidden_state)
    assert rows.attention_mask is not None, "options of several lengths should be padded"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "qwen3_next-moe", "olmo_hybrid"])
def test_routes_in_one_batch_give_the_same_up_to_rounding(family: str, exact: Any) -> None:
    model = wrap_transformer_with_etd(exact(family), None)
    rows = task_of(model, CHOICES).rows(range(2))
    together, alone = SharedRuns(model, rows, batch_size=8), SharedRuns(model, rows, batch_size=1)
    for one, other in zip(together.states(ROUTES), alone.states(ROUTES), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert together.layers == alone.layers


def test_what_routes_have_in_common_runs_once() -> None:
    model = wrapped()
    calls: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    runs = SharedRuns(model, task_of(model).rows([0]), batch_size=1)
    runs.states(ROUTES[:4])
    # By hand: 0 1 2 for all; of those, 3 for three; from then on the plain route, the skip, and the repeat each by itself.
    plain, skip, repeat, both = [3, 4, 5, 6, 7], [4, 5, 6, 7], [3, 4, 5, 6, 7], [7]
    assert sorted(calls) == sorted([0, 1, 2, *plain, *skip, *repeat, *both])
    assert runs.layers == len(calls) == 18
    assert runs.layers_unshared == sum(map(sum, ROUTES[:4])) == 8 + 7 + 9 + 7


@pytest.mark.parametrize("n_kept", [0, 1, 3])
def test_a_small_cache_costs_layers_and_changes_nothing(n_kept: int) -> None:
    model = wrapped()
    rows = task_of(model).rows([0])
    nbytes = model.model.embed_tokens(rows.input_ids).nbytes
    small, large = SharedRuns(model, rows, 1, cache_bytes=n_kept * nbytes), SharedRuns(model, rows, 1)
    for route in ROUTES:
        assert torch.equal(small.states([route])[0], large.states([route])[0])
        assert len(small._cache) <= n_kept
    assert small.layers > large.layers


@pytest.mark.parametrize("end", [False, True])
def test_an_exact_answer_is_what_greedy_decoding_writes(end: bool) -> None:
    model = wrapped(seed=3, vocab_size=16, eos_token_id=15, pad_token_id=14)
    encoder = TextEncoder(character_tokenizer())
    [prompt] = encoder.prompts(["12+3="])
    ids = torch.tensor([prompt])
    for _ in range(4):  # token by token, without a cache
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, think_iterations=1, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    written = ids[0, len(prompt) :].tolist()
    answer = encoder.tokenizer.decode(written[:2])
    assert encoder.examples([("12+3=", answer)])[0][1][:-1] == written[:2], "the model should write characters"
    other = "0" if answer[1] != "0" else "1"
    for text, expected in ((answer, not end or written[2] == 15), (answer[0] + other, False), (answer[0], not end)):
        task = task_of(model, [Question("12+3=", text)], end)
        [[score]] = SharedRuns(model, task.rows([0])).scores([(1,) * 8])
        assert score.correct == expected


def test_scores_are_log_likelihoods_of_options_one_by_one() -> None:
    model = wrapped()
    encoder = TextEncoder(character_tokenizer())
    sums = []
    options = ["15", "1", "999"]
    for prompt, answer in encoder.examples([("12+3=", option) for option in options]):
        ids, n = torch.tensor([prompt + answer[:-1]]), len(answer) - 1
        with torch.no_grad():
            h = model.model(ids, path=from_layers([0, 1, 2, 3, 3, 4, 7]), use_cache=False).last_hidden_state
        logits = model.lm_head(h)[0, -n - 1 : -1]
        sums.append(F.cross_entropy(logits, ids[0, -n:], reduction="sum").item())
    for label in range(3):
        question = Question("12+3=", options[label], tuple(options[:label] + options[label + 1 :]))
        [[score]] = SharedRuns(model, task_of(model, [question]).rows([0])).scores([ROUTES[3]])
        assert score.loss == pytest.approx(sums[label] / score.n_tokens, abs=1e-5)
        assert score.correct == (sums[label] == min(sums))


def test_rewards_are_as_documented() -> None:
    checker, loss = RouteSearchConfig(), RouteSearchConfig(labeller="loss")
    base = Score(False, 1.5, 3)
    assert judged(checker, Score(True, 9.0, 3), base) == (True, 1.0)
    assert judged(checker, Score(False, 0.1, 3), base) == (False, 0.0)
    p, p0 = 2.718281828459045**-0.7, 2.718281828459045**-1.5
    assert judged(loss, Score(False, 0.7, 3), base) == (True, pytest.approx(p / (p + p0)))
    assert judged(loss, base, base) == (True, 0.5)
    assert judged(loss, Score(True, 1e6, 3), base) == (False, 0.0)


def test_no_route_is_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    whole = SharedRuns.scores

    def watched(self: SharedRuns, routes: Any) -> Any:
        asked.extend((id(self), route) for route in routes)
        keep.append(self)
        return whole(self, routes)

    keep: list[SharedRuns] = []
    monkeypatch.setattr(SharedRuns, "scores", watched)
    model = wrapped()
    labels = label_questions(task_of(model), tmp_path / "labels.jsonl", RouteSearchConfig(simulations=60))
    assert len(asked) == len(set(asked)) == sum(label.evaluated for label in labels)
    assert all(label.evaluated <= 61 and label.simulations == 60 for label in labels)
    assert all(label.layers < label.layers_unshared for label in labels)


@pytest.mark.parametrize("labeller", ["checker", "loss"])
def test_a_stopped_search_goes_on_as_if_nothing_had_happened(
    labeller: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(wrapped(), [*EXACT_QUESTIONS, *CHOICES])
    config = RouteSearchConfig(simulations=12, labeller=labeller, seed=5)
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    label_questions(task, whole, config)
    search, n_left = routes_module._label, 2

    def dies(*arguments: Any) -> Any:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise KeyboardInterrupt
        return search(*arguments)

    monkeypatch.setattr(routes_module, "_label", dies)
    with pytest.raises(KeyboardInterrupt):
        label_questions(task, stopped, config)
    assert len(stopped.read_text().splitlines()) == 3
    with stopped.open("a") as file:
        file.write('{"index": 2, "prompt": "40')  # a crash inside a line
    assert len(read_labels(stopped)[1]) == 2
    n_left = 100
    label_questions(task, stopped, config)
    assert 100 - n_left == 3, "finished questions are not searched again"
    assert stopped.read_bytes() == whole.read_bytes()


def test_a_crash_inside_the_first_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"settings": {"mod')
    label_questions(task_of(wrapped()), path, RouteSearchConfig(simulations=2))
    assert len(read_labels(path)[1]) == 3


def test_another_search_is_refused_and_the_file_is_left_alone(tmp_path: Path) -> None:
    path, model = tmp_path / "labels.jsonl", wrapped()
    label_questions(task_of(model), path, RouteSearchConfig(simulations=2))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"written with other settings \(seed, simulations\)"):
        label_questions(task_of(model), path, RouteSearchConfig(simulations=3, seed=1))
    with pytest.raises(ValueError, match=r"other settings \(task\)"):
        label_questions(task_of(model, EXACT_QUESTIONS[1:]), path, RouteSearchConfig(simulations=2))
    assert path.read_bytes() == before
    more = [*EXACT_QUESTIONS, Question("1+1=", "2")]
    assert len(label_questions(task_of(model, more), path, RouteSearchConfig(simulations=2))) == 4
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match="no route labels"):
        read_labels(tmp_path / "other.jsonl")


def test_only_the_think_block_is_routed_where_there_is_one(tmp_path: Path) -> None:
    model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT).eval()
    for label in label_questions(task_of(model), tmp_path / "a.jsonl", RouteSearchConfig(labeller="loss")):
        assert set(label.route[:2] + label.route[6:]) == {1}
    assert routed_layers(model, "all") == range(8)
    assert routed_layers(model, "think") == range(2, 6)
    assert routed_layers(wrapped(), "think") == range(8)


THE_LAYER = 3


def with_a_layer_to_edit(action: int, seed: int) -> tuple[MullForCausalLM, list[Question]]:
    """A model, and answers that it gives if layer 3 is skipped, or runs twice, and not otherwise. Other layers do nothing."""
    model = wrapped(seed=seed, vocab_size=16, eos_token_id=15, pad_token_id=14, initializer_range=0.3)
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            factor = 3.0 if number == THE_LAYER else 0.0
            block.self_attn.o_proj.weight *= factor
            block.mlp.down_proj.weight *= factor
    encoder, questions = TextEncoder(character_tokenizer()), []
    for text in (f"{left}{sign}{right}=" for left in range(4) for right in (1, 5, 20) for sign in "+-*"):
        ids = torch.tensor(encoder.prompts([text]))
        with torch.no_grad():
            paths = [from_layers([0, 1, 2, *[THE_LAYER] * times, 4, 5, 6, 7]) for times in range(3)]
            likeliest = [int(model(ids, path=path, use_cache=False).logits[0, -1].argmax()) for path in paths]
        if likeliest.count(likeliest[action]) == 1 and likeliest[action] < 14:
            questions.append(Question(text, encoder.tokenizer.decode([likeliest[action]])))
    assert len(questions) >= 4, "the layer should matter"
    return model, questions[:5]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("action", [0, 2], ids=["skip", "repeat"])
def test_the_layer_to_skip_or_repeat_is_found(action: int, seed: int, tmp_path: Path) -> None:
    model, questions = with_a_layer_to_edit(action, seed)
    config = RouteSearchConfig(seed=seed)
    for label in label_questions(task_of(model, questions), tmp_path / "labels.jsonl", config):
        assert not label.base_correct
        assert label.correct
        assert label.route[THE_LAYER] == action
        assert label.visits == sum(label.route)


@pytest.mark.latin(3)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("action", [0, 2], ids=["skip", "repeat"])
@pytest.mark.parametrize("method", ["greedy", "evolution"])
def test_the_route_of_a_data_set_has_that_layer(method: Any, action: int, seed: int) -> None:
    model, questions = with_a_layer_to_edit(action, seed)
    found = best_route(
        task_of(model, questions * 2), method, RouteSearchConfig(seed=seed, simulations=100), max_visits=9
    )
    assert found.found.route[THE_LAYER] == action
    assert found.found.change < 0
    assert found.found.correct > found.plain.correct
    assert found.found.change == pytest.approx(found.found.loss - found.plain.loss)
    assert found.evaluated <= 100
    assert found.layers < found.layers_unshared
    assert found.controls
    for control in found.controls:
        assert sorted(control.route) == sorted(found.found.route)
        assert control.route != found.found.route
        assert is_allowed(control.route)
    assert min(control.change for control in found.controls) >= found.found.change
    assert max(control.change for control in found.controls) > found.found.change


@pytest.mark.parametrize("method", ["greedy", "evolution"])
def test_a_route_for_all_keeps_the_budget_and_the_half_that_is_reported_is_not_searched(method: Any) -> None:
    model, questions = wrapped(), [Question(f"{number}+1=", str(number + 1)) for number in range(9)]
    config = RouteSearchConfig(simulations=80, batch_size=3)
    found = best_route(task_of(model, questions), method, config, max_visits=5)
    assert found == best_route(task_of(model, questions), method, config, max_visits=5)
    assert sum(found.found.route) <= 5
    assert is_allowed(found.found.route)
    assert found.n_questions == 4
    # The reported change, from whole passes over single questions of the other half.
    order = np.random.default_rng(0).permutation(9).tolist()
    task, losses = task_of(model, questions), {}
    for route in (found.plain.route, found.found.route):
        scores = [SharedRuns(model, task.rows([number])).scores([route])[0][0] for number in order[1::2]]
        losses[route] = sum(s.loss * s.n_tokens for s in scores) / sum(s.n_tokens for s in scores)
    assert found.found.loss == pytest.approx(losses[found.found.route], abs=1e-5)
    assert found.found.change == pytest.approx(losses[found.found.route] - losses[found.plain.route], abs=1e-5)


def test_a_budget_that_cannot_be_reached_is_refused() -> None:
    task = task_of(wrapped(), EXACT_QUESTIONS * 2)
    with pytest.raises(ValueError, match="and 4 visits, which single edits always reach"):
        best_route(task, "greedy", RouteSearchConfig(), max_visits=3)
    with pytest.raises(ValueError, match="None of 3 routes has at most 4 visits"):
        best_route(task, "greedy", RouteSearchConfig(simulations=3), max_visits=4)
    with pytest.raises(ValueError, match="There are 3 questions"):
        best_route(task_of(wrapped()), "greedy", RouteSearchConfig())


def test_questions_are_read_and_mistakes_named(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    records = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "choices": ["b", "c"], "label": 1}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert load_questions(str(path)) == [Question("a", "b"), Question("a", "c", ("b",))]
    assert len(load_questions(str(path), 1)) == 1
    for wrong in ({"choices": ["b"], "label": 0}, {"choices": ["b", "c"], "label": 2}, {"choices": ["b", "c"]}):
        path.write_text(json.dumps({"prompt": "a"} | wrong))
        with pytest.raises(ValueError, match="the right one"):
            load_questions(str(path))
    path.write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match="'answer'"):
        load_questions(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match="has no questions"):
        load_questions(str(path))


def test_generated_questions_have_right_answers() -> None:
    questions = load_questions("arithmetic", 20, seed=1)
    assert len(questions) == 20
    for question in questions:
        assert question.answer == str(eval(question.prompt.rstrip("=")))  # digits and an operation
    assert questions != load_questions("arithmetic", 20, seed=2)


def test_what_does_not_fit_the_model_is_named() -> None:
    task = task_of(wrapped(max_position_embeddings=8), [Question("12+3=", "15"), Question("1234567+3=", "15")])
    with pytest.raises(ValueError, match="Question 1 has 10 tokens and an answer 2: .* at most 8"):
        task.rows([0, 1])
    with pytest.raises(ValueError, match="Question 0 has 0 tokens"):
        task_of(wrapped(), [Question("", "15")]).rows([0])
