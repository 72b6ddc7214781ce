"""Claim: a token stops after the same iteration, and the model computes the same, however the tokens are divided into calls.

`test_active_tokens` has that for stops that are injected. Here the halting rules decide. All in fp64, where no two ways of
computing a state are far enough apart to change a decision.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import jaxtyping
import pytest
import torch
from conftest import EXACT, SPLIT, tiny
from torch import Tensor
from transformers import PreTrainedModel

import mull
from mull import ETDConfig, HaltingConfig, MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.model import halting
from mull.model.configs import Stop
from mull.model.halting import Evidence

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]

ROWS, TOKENS, ITERATIONS = 3, 12, 4
NINE: dict[str, Any] = {
    "adaptive": HaltingConfig(rule="scattered"),
    "think_iterations": ITERATIONS,
    "max_new_tokens": 9,
    "eos_token_id": (),
}
RULES = ["state", "confidence", "kl", "repeat", "learned"]
STOPS = get_args(Stop)
SOME = ["qwen3", "olmo3", "qwen3_next-moe", "qwen3_5", "olmo_hybrid"]


def wrapped(base: PreTrainedModel, rule: str = "state", mtp: MTPConfig | None = None, **fields: Any) -> MullForCausalLM:
    config = ETDConfig(**SPLIT.model_dump() | {"halting": HaltingConfig(rule=rule, **fields)})
    model = wrap_transformer_with_etd(base, config, mtp).eval()
    if model.model.exit_head is not None:
        torch.nn.init.normal_(model.model.exit_head.weight, generator=torch.Generator().manual_seed(0))
    return model


def mixed(model: MullForCausalLM, tokens: Tensor, rule: str, **fields: Any) -> HaltingConfig:
    """The rule with a threshold at which some tokens stop and others do not, found by bisection."""
    if rule == "repeat":
        return HaltingConfig(rule=rule, threshold=1, **fields)
    deep, shallow = (1e-9, 30.0) if rule == "kl" else (1.1, -1.1)
    for _ in range(16):
        threshold = (deep * shallow) ** 0.5 if rule == "kl" else (deep + shallow) / 2
        config = HaltingConfig(rule=rule, threshold=threshold, **fields)
        with torch.no_grad():
            depths = depths_of(model(tokens, think_iterations=ITERATIONS, adaptive=config))
        mean = depths.double().mean()
        if 1.7 < mean < ITERATIONS - 0.7 and len(depths.unique()) > 1:
            break
        deep, shallow = (threshold, shallow) if mean > 2.3 else (deep, threshold)
    return config


def depths_of(out: Any) -> Tensor:
    return out.metrics["think_iterations"]  # type: ignore[no-any-return]


def in_calls(
    model: MullForCausalLM, tokens: Tensor, config: HaltingConfig, lengths: list[int], **options: Any
) -> tuple[Tensor, Tensor]:
    """Logits and depths of tokens that are fed in parts."""
    cache, start, logits, depths = model.new_cache(), 0, [], []
    for length in lengths:
        out = model(
            tokens[:, start : start + length],
            past_key_values=cache,
            think_iterations=ITERATIONS,
            adaptive=config,
            use_cache=True,
            **{name: value[:, : start + length] for name, value in options.items()},
        )
        logits.append(out.logits)
        depths.append(depths_of(out))
        start += length
    return torch.cat(logits, 1), torch.cat(depths, 1)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.latin(16, "family", "rule", "stop")
@torch.no_grad()
def test_the_same_tokens_stop_in_one_call_and_in_many(
    family: str, rule: str, stop: Any, exact: Exact, ids: Ids
) -> None:
    model, tokens = wrapped(exact(family), rule, stop=stop), ids(ROWS, TOKENS)
    config = mixed(model, tokens, rule, stop=stop)
    whole = model(tokens, think_iterations=ITERATIONS, adaptive=config, use_cache=False)
    assert len(depths_of(whole).unique()) > 1, "some should stop and others not"
    for lengths in ([1] * TOKENS, [5, 1, 6], [TOKENS]):
        logits, depths = in_calls(model, tokens, config, lengths)
        assert torch.equal(depths, depths_of(whole))
        torch.testing.assert_close(logits, whole.logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("rule", ["state", "kl"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.latin(6, "family", "rule", "side")
@torch.no_grad()
def test_padded_rows_stop_where_they_do_alone(family: str, rule: str, side: str, exact: Exact, ids: Ids) -> None:
    model, tokens, padding = wrapped(exact(family), rule), ids(ROWS, TOKENS), 3
    config = mixed(model, tokens, rule)
    expected = model(tokens, think_iterations=ITERATIONS, adaptive=config, use_cache=False)
    filling = ids(ROWS, padding, seed=7)
    real = slice(padding, None) if side == "left" else slice(0, TOKENS)
    padded = torch.cat([filling, tokens] if side == "left" else [tokens, filling], 1)
    mask = torch.zeros_like(padded)
    mask[:, real] = 1
    for use_cache in (False, True):
        out = model(
            padded,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            think_iterations=ITERATIONS,
            adaptive=config,
            use_cache=use_cache,
        )
        assert torch.equal(depths_of(out)[:, real], depths_of(expected))
        torch.testing.assert_close(out.logits[:, real], expected.logits, atol=EXACT, rtol=0)
        assert not out.metrics["early_exit"][mask == 0].any(), "padding thinks once, and that is no early exit"


@pytest.mark.parametrize("family_name", SOME)
@torch.no_grad()
def test_packed_documents_stop_where_they_do_alone(family_name: str, exact: Exact, ids: Ids) -> None:
    model, tokens = wrapped(exact(family_name)), ids(ROWS, TOKENS)
    config = mixed(model, tokens, "state")
    positions = torch.cat([torch.arange(5), torch.arange(TOKENS - 5)]).expand(ROWS, -1)
    options = {"think_iterations": ITERATIONS, "adaptive": config, "use_cache": False}
    whole = model(tokens, position_ids=positions, **options)
    for part in (slice(0, 5), slice(5, None)):
        alone = model(tokens[:, part], **options)
        assert torch.equal(depths_of(whole)[:, part], depths_of(alone))
        torch.testing.assert_close(whole.logits[:, part], alone.logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_no_decision_looks_ahead_or_at_another_row(rule: str, exact: Exact, ids: Ids) -> None:
    model, tokens = wrapped(exact("qwen3_5"), rule), ids(ROWS, TOKENS)
    config = mixed(model, tokens, rule)
    options = {"think_iterations": ITERATIONS, "adaptive": config, "use_cache": False}
    expected = depths_of(model(tokens, **options))
    other = tokens.clone()
    other[:, -1] = ids(ROWS, 1, seed=3)[:, 0]
    other[2] = ids(1, TOKENS, seed=4)[0]
    changed = depths_of(model(other, **options))
    assert torch.equal(changed[:2, :-1], expected[:2, :-1])


def statistic(rule: str, model: MullForCausalLM, states: list[Tensor]) -> list[Tensor]:
    """After each iteration, what a rule compares, written out; the larger, the sooner a token stops. `states` begin before the
    first iteration."""
    logits = [model.lm_head(model.model.norm(state)) for state in states[1:]]
    log_p = [each.log_softmax(-1) for each in logits]
    never = torch.full(states[0].shape[:2], -torch.inf, dtype=torch.float64)
    if rule == "state":
        return [(a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt() for a, b in pairwise(states)]
    if rule == "confidence":
        return [each.exp().max(-1).values for each in log_p]
    if rule == "kl":
        return [never, *(-(b.exp() * (b - a)).sum(-1) for a, b in pairwise(log_p))]
    if rule == "repeat":
        same = [b.argmax(-1) == a.argmax(-1) for a, b in pairwise(logits)]
        return [
            never,
            *(torch.stack(same[:n]).flip(0).long().cumprod(0).sum(0).double() for n in range(1, 1 + len(same))),
        ]
    assert model.model.exit_head is not None
    stay = [1 - model.model.exit_head(state)[..., 0].sigmoid() for state in states[1:]]
    return [1 - torch.stack(stay[:n]).prod(0) for n in range(1, 1 + len(stay))]


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_tokens_stop_where_the_formula_of_their_rule_says(rule: str, exact: Exact, ids: Ids) -> None:
    model, tokens = wrapped(exact("qwen3"), rule), ids(ROWS, TOKENS)
    config = mixed(model, tokens, rule) if rule != "repeat" else HaltingConfig(rule=rule, threshold=2)
    policy = model.model.halting(config, ITERATIONS, unembed=model.lm_head)
    assert policy is not None
    states: list[Tensor] = []
    first, last = SPLIT.think_layers[0], SPLIT.think_layers[-1]

    def keep(visit: Any, before: Tensor, after: Tensor) -> None:
        if visit == (first, 0):
            states.append(before)
        if visit.layer == last:
            states.append(after)

    model.model(tokens, path=SPLIT.path(ITERATIONS), policy=policy, on_visit=keep, use_cache=False)
    depths = policy.metrics()["think_iterations"]
    found = statistic(rule, model, states)
    limit = -config.limit if rule == "kl" else config.limit
    expected = torch.full_like(depths, ITERATIONS)
    for iteration in range(ITERATIONS - 1, 0, -1):
        expected = torch.where(found[iteration - 1] >= limit, iteration, expected)
    assert torch.equal(depths, expected)
    assert len(depths.unique()) > 1


@pytest.mark.parametrize("family_name", SOME)
@torch.no_grad()
def test_never_is_the_fixed_path_and_always_is_one_iteration(family_name: str, ids: Ids) -> None:
    model, tokens = wrapped(tiny(family_name)), ids(ROWS, TOKENS)
    never, always = (HaltingConfig(rule="state", threshold=threshold) for threshold in (1.5, -1.5))
    for config, iterations in ((never, ITERATIONS), (HaltingConfig(rule="fixed"), ITERATIONS), (always, 1)):
        for use_cache in (False, True):
            expected = model(tokens, think_iterations=iterations, use_cache=use_cache).logits
            out = model(tokens, think_iterations=ITERATIONS, adaptive=config, use_cache=use_cache)
            assert torch.equal(out.logits, expected), "bit for bit"
            assert (depths_of(out) == iterations).all()
            assert (out.metrics["early_exit"] == (iterations < ITERATIONS)).all()
            assert model._etd_metrics is out.metrics
    assert model(tokens, think_iterations=3).metrics is None
    assert model._etd_metrics == {"think_iterations": 3, "early_exit": False}
    at_least_two = HaltingConfig(rule="state", threshold=-1.5, min_iterations=2)
    assert (depths_of(model(tokens, think_iterations=ITERATIONS, adaptive=at_least_two)) == 2).all()


@pytest.mark.parametrize(
    ("rule", "thresholds"),
    [
        ("state", torch.linspace(-1, 1.1, 12).tolist()),
        ("confidence", torch.linspace(0, 1.1, 12).tolist()),
        ("kl", torch.logspace(2, -9, 12).tolist()),
        ("repeat", [0, 1, 2, 3, 4]),
        ("learned", torch.linspace(0, 1.1, 12).tolist()),
    ],
)
@torch.no_grad()
def test_tokens_think_longer_the_stricter_the_threshold(
    rule: str, thresholds: list[float], exact: Exact, ids: Ids
) -> None:
    model, tokens = wrapped(exact("qwen3"), rule), ids(ROWS, TOKENS)
    means = []
    for threshold in thresholds:
        config = HaltingConfig(rule=rule, threshold=threshold)
        means.append(depths_of(model(tokens, think_iterations=ITERATIONS, adaptive=config)).double().mean())
    # A token that stops later sees other keys, so its own states differ: for single tokens, the order may break.
    assert all(after >= before - 0.1 for before, after in pairwise(means)), means
    assert means[0] < means[-1] == ITERATIONS


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampled"])
@pytest.mark.parametrize("family_name", SOME)
@pytest.mark.latin(3, "family_name", "options")
def test_generate_with_a_cache_is_generate_without(
    family_name: str, options: dict[str, Any], exact: Exact, ids: Ids
) -> None:
    model, tokens = wrapped(exact(family_name)), ids(ROWS, TOKENS)
    config = mixed(model, tokens, "state")
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        call = {"adaptive": config, "think_iterations": ITERATIONS, "use_cache": use_cache, "pad_token_id": 0}
        texts.append(
            model.generate(tokens, attention_mask=mask, max_new_tokens=6, **{"do_sample": False} | options, **call)
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("draft_length", [None, 0, 1, 3])
@pytest.mark.latin(13, "family", "stop", "draft_length")
def test_our_decoding_writes_the_text_of_transformers_with_and_without_drafts(
    family: str, stop: Any, draft_length: int | None, exact: Exact, ids: Ids
) -> None:
    heads = MTPConfig(num_predict_tokens=3, mtp_head_type="mlp")
    model, tokens = wrapped(exact(family), mtp=heads, stop=stop), ids(ROWS, TOKENS)
    config = mixed(model, tokens, "state", stop=stop)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    call = {"adaptive": config, "think_iterations": ITERATIONS, "max_new_tokens": 8, "eos_token_id": ()}
    expected = model.generate(
        tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **call | {"eos_token_id": None}
    )
    draft = {} if draft_length is None else {"draft": "mtp", "draft_length": draft_length}
    out = mull.generate(model, tokens, mask, pad_token_id=0, **draft, **call)
    assert torch.equal(out.sequences, expected)
    histogram = out.stats.think_histogram
    assert sum(histogram.values()) >= ROWS * 7
    assert set(histogram) <= set(range(1, 1 + ITERATIONS))
    assert out.stats.mean_think_iterations == pytest.approx(
        sum(depth * count for depth, count in histogram.items()) / sum(histogram.values())
    )


@pytest.fixture
def scattered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule by which about half of the tokens stop after each iteration, also in texts that repeat themselves."""
    monkeypatch.setitem(halting.RULES, "scattered", lambda _: lambda evidence: (1e3 * evidence.state[:, 0]).frac() > 0)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` runs the function as it is, but tells it that it is being compiled, so that no value is looked at."""

    def compiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("draft_length", [0, 3])
@pytest.mark.latin(13, "family", "stop", "draft_length")
@pytest.mark.usefixtures("traced", "scattered")
def test_rounds_of_fixed_shapes_write_the_same(
    family: str, stop: Any, draft_length: int, exact: Exact, ids: Ids
) -> None:
    model, tokens = wrapped(exact(family), mtp=MTPConfig(num_predict_tokens=3), stop=stop), ids(ROWS, TOKENS)
    call = NINE | {"adaptive": HaltingConfig(rule="scattered", stop=stop)}
    draft = {"draft": "mtp", "draft_length": draft_length}
    expected = mull.generate(model, tokens, pad_token_id=0, **draft, **call)
    for _ in range(2):  # the second time, on the buffers of the first
        out = mull.generate(model, tokens, pad_token_id=0, compile=True, **draft, **call)
        assert torch.equal(out.sequences, expected.sequences)
    assert len(expected.stats.think_histogram) > 1
    if not draft_length:  # drafts near the end differ: compiled rounds keep their length
        assert out.stats.think_histogram == expected.stats.think_histogram


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("family_name", ["qwen3", "qwen3_5"])
@pytest.mark.usefixtures("scattered")
def test_compiled_rounds_write_the_same(
    family_name: str, stop: Any, exact: Exact, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks cannot be compiled
    model, tokens = wrapped(exact(family_name), mtp=MTPConfig(num_predict_tokens=2), stop=stop), ids(ROWS, TOKENS)
    call = NINE | {"adaptive": HaltingConfig(rule="scattered", stop=stop)}
    for draft in ({}, {"draft": "mtp", "draft_length": 2}):
        expected = mull.generate(model, tokens, pad_token_id=0, **draft, **call)
        out = mull.generate(model, tokens, pad_token_id=0, compile=True, **draft, **call)
        again = mull.generate(model, tokens, pad_token_id=0, compile=True, **draft, **call)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(again.sequences, expected.sequences)
        assert again.stats.warm_up_seconds == 0


def test_rows_that_stopped_leave_the_batch_of_a_visit(ids: Ids) -> None:
    """Batched decoding: layers see the rows that still think, and are not called when there are none."""
    model, tokens = wrapped(tiny("qwen3")), ids(4, TOKENS)
    with torch.no_grad():
        cache = model(tokens[:, :-1], think_iterations=ITERATIONS, use_cache=True).past_key_values
    rows: list[int] = []
    model.model.layers[3].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    stops = iter([[True, False, True, False], [True, False], [True]])
    halting.RULES["given"] = lambda _config: lambda _evidence: torch.tensor(next(stops))
    try:
        with torch.no_grad():
            out = model(
                tokens[:, -1:],
                past_key_values=cache,
                think_iterations=ITERATIONS,
                adaptive=HaltingConfig(rule="given"),
                use_cache=True,
            )
    finally:
        del halting.RULES["given"]
    assert rows == [4, 2, 1]
    assert depths_of(out)[:, 0].tolist() == [1, 2, 1, 3]


@pytest.mark.parametrize("family_name", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("stop", STOPS)
def test_gradients_do_not_depend_on_checkpointing(family_name: str, stop: Any, exact: Exact, ids: Ids) -> None:
    model, tokens = wrapped(exact(family_name), stop=stop), ids(ROWS, TOKENS)
    config = mixed(model, tokens, "state", stop=stop)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(tokens, labels=tokens, think_iterations=ITERATIONS, adaptive=config, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-9, rtol=1e-9)


def test_while_everybody_thinks_no_token_is_gathered(ids: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = wrapped(tiny("qwen3")), ids(2, 6)
    never = HaltingConfig(rule="state", threshold=2.0)
    monkeypatch.setattr("mull.model.executor.ActiveTokens.of", lambda *_: pytest.fail("all tokens run"))
    with torch.no_grad():
        model(tokens, attention_mask=torch.ones_like(tokens), think_iterations=ITERATIONS, adaptive=never)
        mull.generate(model, tokens, max_new_tokens=3, think_iterations=ITERATIONS, adaptive=never, pad_token_id=0)


def test_a_saved_model_stops_as_before(tmp_path: Any, ids: Ids) -> None:
    for rule in ("learned", "state"):
        model, tokens = wrapped(tiny("qwen3"), rule, threshold=0.6), ids(ROWS, TOKENS)
        model.save_pretrained(tmp_path / rule)
        loaded = mull.from_pretrained(tmp_path / rule)
        with torch.no_grad():
            a, b = (each(tokens, think_iterations=ITERATIONS, adaptive=True) for each in (model, loaded))
        assert torch.equal(a.logits, b.logits)
        assert torch.equal(depths_of(a), depths_of(b))


@torch.no_grad()
def test_every_visit_has_its_hidden_states(ids: Ids) -> None:
    model, tokens = wrapped(tiny("qwen3")), ids(1, 5)
    options = {"think_iterations": ITERATIONS, "output_hidden_states": True}
    every = model(tokens, **options).hidden_states
    stopped = model(tokens, adaptive=HaltingConfig(threshold=-1.5), **options).hidden_states
    assert len(stopped) == len(every)
    after_one = 1 + SPLIT.n_encoder_layers + SPLIT.n_think_layers
    assert all(
        torch.equal(states, stopped[after_one - 1]) for states in stopped[after_one : -SPLIT.n_decoder_layers - 1]
    )


def test_what_does_not_fit_is_refused(ids: Ids) -> None:
    tokens = ids(1, 3)
    plain = wrap_transformer_with_etd(tiny("qwen3"), None)
    for call in (plain, lambda *args, **options: mull.generate(plain, *args, max_new_tokens=1, **options)):
        with pytest.raises(ValueError, match="adaptive needs a think block"):
            call(tokens, adaptive=True)
    model = wrapped(tiny("qwen3"), stop="own_state")
    with pytest.raises(ValueError, match="leave behind 'own_state'"):
        model(tokens, adaptive=HaltingConfig(stop="last_kv"))
    with pytest.raises(ValueError, match="'learned' needs a trained exit head"):
        model(tokens, adaptive=HaltingConfig(rule="learned", stop="own_state"))
    with pytest.raises(ValueError, match=r"rule 'stat' is not known. Did you mean state\?"):
        model(tokens, adaptive=HaltingConfig(rule="stat", stop="own_state"))
    with pytest.raises(ValueError, match="so does a path"):
        model(tokens, adaptive=True, path=[(0, 0)])
    with pytest.raises(TypeError, match="adaptive is str"):
        model(tokens, adaptive="yes")
    with pytest.raises(ValueError, match="which the bare MullModel lacks"):
        model.model(tokens, adaptive=HaltingConfig(rule="kl", stop="own_state"))
    with pytest.raises(ValueError, match="give one of them"):
        ETDConfig(**SPLIT.model_dump() | {"confidence_threshold": 0.5, "halting": HaltingConfig()})


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda n: torch.ones(n, dtype=torch.long), "gave torch.int64: give a tensor of booleans"),
        (lambda n: [True] * n, "gave list"),
        (lambda n: torch.ones(n, 3, dtype=torch.bool), "was asked about 6 tokens, and what it gave is (6, 3)"),
        (lambda n: torch.ones(n + 1, dtype=torch.bool), "and what it gave is (7,)"),
    ],
)
def test_what_a_foreign_rule_gives_is_checked(
    answer: Any, error: str, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(halting.RULES, "odd", lambda _: lambda evidence: answer(len(evidence.state)))
    model = wrapped(tiny("qwen3"))
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        model(ids(2, 3), think_iterations=2, adaptive=HaltingConfig(rule="odd"))


def test_what_a_rule_keeps_is_checked(ids: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(evidence: Evidence) -> Tensor:
        evidence.kept["sum"] = evidence.state.sum()
        return evidence.state[:, 0] > 0

    monkeypatch.setitem(halting.RULES, "odd", lambda _: rule)
    with pytest.raises(ValueError, match=r"kept\['sum'\] is Tensor"):
        wrapped(tiny("qwen3"))(ids(2, 3), think_iterations=2, adaptive=HaltingConfig(rule="odd"))


def test_reentrant_checkpointing_would_lose_gradients_and_is_refused(ids: Ids) -> None:
    model, tokens = wrapped(tiny("qwen3")), ids(2, 4)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    with pytest.raises(ValueError, match="Reentrant gradient checkpointing would lose"):
        model(tokens, labels=tokens, adaptive=True, use_cache=False)
    with pytest.raises(ValueError, match="Reentrant gradient checkpointing would lose"):
        model.model.hidden_states(tokens, policy=model.model.given_depths(torch.ones_like(tokens)))
    model(tokens, labels=tokens, use_cache=False).loss.backward()


def test_router_logits_of_tokens_that_stop_are_refused(ids: Ids) -> None:
    model, tokens = wrapped(tiny("qwen3_next-moe")), ids(2, 4)
    with pytest.raises(ValueError, match="have no router logits"):
        model(tokens, output_router_logits=True, adaptive=True)
    model(tokens, output_router_logits=True, adaptive=False)


@pytest.mark.usefixtures("scattered")
def test_a_compiled_model_takes_its_decisions_outside_of_the_graph(ids: Ids) -> None:
    model, tokens = wrapped(tiny("qwen3")), ids(ROWS, 9)
    call = {"think_iterations": 3, "adaptive": HaltingConfig(rule="scattered"), "use_cache": False}
    with torch.no_grad():
        expected, out = model(tokens, **call), torch.compile(model, backend="eager")(tokens, **call)
    assert len(depths_of(expected).unique()) > 1
    assert torch.equal(depths_of(out), depths_of(expected))
    assert torch.equal(out.logits, expected.logits)


@pytest.mark.usefixtures("traced", "scattered")
@pytest.mark.parametrize("mode", ["inference", "autocast"])
def test_modes_of_the_caller_change_no_text(mode: str, ids: Ids) -> None:
    model, tokens = wrapped(tiny("qwen3_5")), ids(ROWS, 5)
    expected = mull.generate(model, tokens, pad_token_id=0, **NINE)
    with torch.inference_mode() if mode == "inference" else torch.autocast("cpu", dtype=torch.bfloat16):
        texts = [mull.generate(model, tokens, pad_token_id=0, compile=mode, **NINE) for mode in (False, True)]
    texts.append(mull.generate(model, tokens, pad_token_id=0, compile=True, **NINE))
    assert all(torch.equal(text.sequences, expected.sequences) for text in texts)


@pytest.mark.usefixtures("traced", "scattered")
def test_depths_are_counted_up_to_the_end_of_a_text(ids: Ids) -> None:
    model, tokens = wrapped(tiny("qwen3"), mtp=MTPConfig(num_predict_tokens=3)), ids(ROWS, 9)
    call = {**NINE, "max_new_tokens": 2, "draft": "mtp", "draft_length": 3, "pad_token_id": 0}
    stats = mull.generate(model, tokens, compile=True, **call).stats
    assert sum(stats.think_histogram.values()) == ROWS, "the second token of each row"


def test_readouts_are_counted(ids: Ids) -> None:
    model, tokens = wrapped(tiny("qwen3")), ids(ROWS, TOKENS)
    for config, n_readouts in (
        (HaltingConfig(rule="confidence", threshold=1.5), 3 * ROWS * TOKENS),
        (HaltingConfig(rule="confidence", threshold=0.0), ROWS * TOKENS),
        (HaltingConfig(rule="state", threshold=1.5), 0),
    ):
        with torch.no_grad():
            metrics = model(tokens, think_iterations=ITERATIONS, adaptive=config).metrics
        assert metrics["readouts"] == n_readouts
        call = {"max_new_tokens": 3, "eos_token_id": (), "pad_token_id": 0, "think_iterations": ITERATIONS}
        stats = mull.generate(model, tokens, adaptive=config, **call).stats
        assert stats.readouts == n_readouts * 2 // TOKENS, "two tokens of each row ran in rounds"


def test_the_defaults_are_those_of_the_configuration(ids: Ids) -> None:
    tokens = ids(ROWS, TOKENS)
    split = SPLIT.model_dump()
    for fields, rule in (
        ({"adaptive_depth": True}, "state"),
        ({"adaptive_depth": True, "confidence_threshold": 0.3}, "confidence"),
        ({"adaptive_depth": True, "halting": HaltingConfig(rule="repeat")}, "repeat"),
    ):
        config = ETDConfig(**split | fields)
        resolved = config.halting_of(None)
        assert resolved is not None
        assert resolved.rule == rule
        model = wrap_transformer_with_etd(tiny("qwen3"), config)
        with torch.no_grad():
            assert model(tokens).metrics is not None
            assert model(tokens, adaptive=False).metrics is None
            assert mull.generate(model, tokens, max_new_tokens=2).stats.think_histogram
    assert ETDConfig(**split).halting_of(None) is None
    assert ETDConfig(**split).halting_of(True) == HaltingConfig()


def test_rules_see_only_tokens_that_still_think() -> None:
    seen: list[int] = []

    def rule(evidence: Evidence) -> Tensor:
        seen.append(len(evidence.state))
        return torch.arange(len(evidence.state)) % 2 == 0

    halting.RULES["odd"] = lambda _config: rule
    try:
        policy = halting.Halting(HaltingConfig(rule="odd"), range(2, 4), 3)
        for occurrence in range(3):
            for layer in (2, 3):
                policy.active(mull.model.path.Visit(layer, occurrence), torch.zeros(1, 8, 4))
    finally:
        del halting.RULES["odd"]
    assert seen == [8, 4]
    assert policy.metrics()["think_iterations"].tolist() == [[1, 2, 1, 3, 1, 2, 1, 3]]
