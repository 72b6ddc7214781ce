"""`mull.generate` around the tokens: what it refuses, streams, counts and keeps."""

import copy
import gc
import pickle
import re
import weakref
from typing import Any

import jaxtyping
import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor

from mull import generate as module_or_function
from mull.decoding.decoder_cache import DecoderCache
from mull.decoding.generate import GenerationStats, generate
from mull.decoding.rounds import Preparation
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import MTPConfig
from mull.retrofit.wrap import wrap_transformer_with_etd


def drafting_model(family: str = "qwen3", **options: Any) -> MullForCausalLM:
    config = MTPConfig(**{"num_predict_tokens": 2, "mtp_head_type": "sequential", **options})
    return wrap_transformer_with_etd(tiny(family, initializer_range=0.2), SPLIT, config).eval()


IDS = torch.tensor([[5, 6, 7]])


def test_generate_is_a_public_name() -> None:
    assert module_or_function is generate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"draft": "medusa"}, "draft='medusa' is not known"),
        ({"draft_length": 2}, "needs draft='mtp'"),
        (
            {"draft": "mtp", "draft_length": 3},
            "draft_length=3 is not possible: the model's heads draft 2 tokens at most",
        ),
        ({"draft": "mtp", "draft_length": -1}, "draft_length=-1 must be at least 0"),
        ({"top_k": 5}, "temperature=0 is greedy"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 254}, "exceed the model's 256 positions"),
        ({"attention_mask": torch.zeros(1, 3)}, "at least one row is empty or all padding"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask has shape (1, 4)"),
        ({"input_ids": torch.tensor([5, 6])}, "give [rows, tokens]"),
        ({"input_ids": torch.tensor([[5, 97]])}, "tokens outside 0 to 96"),
        ({"think_iterations": 0}, "must be at least 1"),
        ({"think_iterations": 2, "path": [(0, 0)]}, "not both"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(drafting_model(), **{"input_ids": IDS, "max_new_tokens": 4, **options})


def test_models_that_cannot_draft_or_are_in_training_are_refused() -> None:
    with pytest.raises(ValueError, match="this model has none"):
        generate(wrap_transformer_with_etd(tiny("qwen3"), None), IDS, max_new_tokens=4, draft="mtp")
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        generate(drafting_model().train(), IDS, max_new_tokens=4)
    flexible = drafting_model()
    flexible.model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="sdpa"):
        generate(flexible, IDS, max_new_tokens=4)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    unsteady = wrap_transformer_with_etd(tiny("llama", rope_parameters=rope), None).eval()
    with pytest.raises(ValueError, match="'dynamic'"):
        generate(unsteady, IDS, max_new_tokens=4)


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("options", [{}, {"draft": "mtp"}, {"draft": "mtp", "draft_length": 2}])
def test_a_streamer_gets_every_token_once(options: dict[str, Any]) -> None:
    recorder = Recorder()
    out = generate(drafting_model(), IDS, max_new_tokens=15, streamer=recorder, eos_token_id=[9, 10, 11, 12], **options)
    assert recorder.pieces[0] == IDS[0].tolist()
    assert [token for piece in recorder.pieces for token in piece] == out.sequences[0].tolist()
    assert all(recorder.pieces)
    assert recorder.ended


def test_a_streamer_takes_one_row() -> None:
    with pytest.raises(ValueError, match="takes one row"):
        generate(drafting_model(), IDS.expand(2, -1), max_new_tokens=3, streamer=Recorder())


def test_rows_that_end_are_padded() -> None:
    model = drafting_model()
    ids = torch.randint(3, 97, (6, 4), generator=torch.Generator().manual_seed(0))
    free = generate(model, ids, max_new_tokens=12, eos_token_id=[]).sequences[:, 4:]
    end = int(free[0, 3])
    out = generate(model, ids, max_new_tokens=12, eos_token_id=end, pad_token_id=96, draft="mtp").sequences[:, 4:]
    for row, tokens in zip(out.tolist(), free.tolist(), strict=True):
        n = tokens.index(end) + 1 if end in tokens else 12
        assert row == tokens[:n] + [96] * (12 - n)


def test_statistics_add_up() -> None:
    model = drafting_model()
    ids = torch.randint(3, 97, (4, 5), generator=torch.Generator().manual_seed(0))
    stats = generate(model, ids, max_new_tokens=20, draft="mtp", draft_length=2, eos_token_id=[]).stats
    assert stats.prompt_tokens == 20
    assert stats.new_tokens == 80
    assert sum(stats.draft_lengths.values()) == stats.rounds
    assert stats.verified[0] == stats.drafted[0]
    assert stats.verified[1] == stats.accepted[0]
    # Each row gains one token from its prompt, one from each of its rounds, and its accepted drafts; the last may overshoot.
    assert 80 <= 4 + stats.row_rounds + sum(stats.accepted) <= 80 + 4 * 2
    assert sum(stats.timed_tokens) == 76
    assert stats.decode_seconds > 0
    assert stats.warm_up_seconds == 0
    assert stats.think_iterations == 5


def test_statistics_of_a_made_up_call() -> None:
    stats = GenerationStats(prompt_tokens=3, think_iterations=1)
    stats.record(2, [3, 1, 2], [3, 1, 1], seconds=2.0, warm_up=False)
    assert stats.speedup is None, "no plain round was measured"
    stats.record(0, [1, 1, 0], [1, 1, 0], seconds=1.0, warm_up=False)
    stats.record(1, [2, 2, 0], [2, 2, 0], seconds=9.0, warm_up=True)
    assert stats.draft_lengths == {2: 1, 0: 1, 1: 1}
    assert (stats.drafted, stats.verified, stats.accepted) == ([5, 3], [5, 2], [4, 1])
    assert stats.acceptance == (0.8, 0.5)
    assert stats.mean_accepted_length == 1 + 5 / 7
    assert (stats.decode_seconds, stats.warm_up_seconds) == (3.0, 9.0)
    assert stats.tokens_per_second == 7 / 3
    stats.plain_seconds = 1.5
    assert stats.speedup == 4 * 1.5 / 3, "the longest row needs four plain rounds"


def test_adaptive_calls_measure_plain_rounds_and_remember() -> None:
    model = drafting_model()
    first = generate(model, IDS, max_new_tokens=60, draft="mtp", eos_token_id=[]).stats
    assert first.draft_lengths[0] >= 1
    assert first.plain_seconds is not None
    assert first.speedup is not None
    kept = DecoderCache.of(model)
    policies = kept.policies
    assert len(policies) == 1
    generate(model, IDS, max_new_tokens=5, draft="mtp", eos_token_id=[])
    assert DecoderCache.of(model) is kept
    assert len(policies) == 1
    assert not kept.decoders, "buffers outlive the call only where rounds were compiled"


@pytest.mark.parametrize("compiled", [False, True])
def test_the_decoder_cache_is_freed_with_the_model_and_not_copied(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    model = drafting_model()
    generate(model, IDS, max_new_tokens=5, draft="mtp", compile=compiled)
    assert len(DecoderCache.of(model).decoders) == compiled
    for copied in (copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):
        twin = copied(model)
        generate(twin, IDS, max_new_tokens=5)
        assert DecoderCache.of(twin) is not DecoderCache.of(model)
        assert not DecoderCache.of(twin).decoders, "they decode with the original"
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(("compiler", "n_decoders"), [("default", 1), ("max", 2)])
def test_weights_that_are_packed_into_compiled_rounds_are_packed_again_when_they_change(
    compiler: Any, n_decoders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, as an optimizer or an adapter that is merged changes them; ``.data`` leaves no trace in autograd's counter."""
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    model = drafting_model()
    for _ in range(2):
        generate(model, IDS, max_new_tokens=2, compile=compiler)
    assert len(DecoderCache.of(model).decoders) == 1
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    generate(model, IDS, max_new_tokens=2, compile=compiler)
    assert len(DecoderCache.of(model).decoders) == n_decoders


def test_only_known_ways_to_compile_are_taken() -> None:
    with pytest.raises(ValueError, match="compile='fast' is not known. Use 'default', 'max', True or False"):
        generate(drafting_model(), IDS, max_new_tokens=2, compile="fast")  # type: ignore[arg-type]


def test_nothing_is_drafted_after_the_last_token_that_is_wanted() -> None:
    stats = generate(drafting_model(), IDS, max_new_tokens=3, draft="mtp", draft_length=2, eos_token_id=[]).stats
    assert max(stats.draft_lengths) == 1


def test_recursive_heads_draft_further_than_they_were_trained() -> None:
    model = drafting_model(share_weights_across_steps=True, num_predict_tokens=1, speculation_lookahead=5)
    plain = generate(model, IDS, max_new_tokens=20, eos_token_id=[])
    out = generate(model, IDS, max_new_tokens=20, eos_token_id=[], draft="mtp", draft_length=6)
    assert torch.equal(out.sequences, plain.sequences)
    assert len(out.stats.drafted) == 6


@pytest.mark.slow
@pytest.mark.parametrize(("family", "compiler"), [("qwen3", "default"), ("qwen3", "max"), ("qwen3_5", "default")])
def test_compiled_rounds_write_the_same(family: str, compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks cannot be compiled
    model = drafting_model(family)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for options in ({"repetition_penalty": 1.2}, {"temperature": 0.8, "top_p": 0.9, "seed": 0}):
        common: dict[str, Any] = {
            "max_new_tokens": 20,
            "eos_token_id": [],
            "draft": "mtp",
            "draft_length": 2,
            **options,
        }
        eager = generate(model, ids, mask, **common)
        compiled = generate(model, ids, mask, compile=compiler, **common)
        again = generate(model, ids, mask, compile=compiler, **common)
        # Eager rounds draft less where the text is about to end, and sampling then uses other random numbers.
        assert torch.equal(compiled.sequences[:, :24], eager.sequences[:, :24])
        assert torch.equal(compiled.sequences, again.sequences)
        assert compiled.stats.warm_up_seconds > 0
        assert again.stats.warm_up_seconds == 0


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "olmo3"])
def test_captured_rounds_write_the_same(family: str) -> None:
    model = drafting_model(family).cuda()
    assert Preparation.of(model, None)
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0)).cuda()
    plain = generate(model, ids, max_new_tokens=40, eos_token_id=[]).sequences
    for length in (0, 1, 2, None):
        drafted = generate(model, ids, max_new_tokens=40, eos_token_id=[], draft="mtp", draft_length=length).sequences
        assert torch.equal(drafted, plain)
    theirs: Any = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    assert torch.equal(theirs, plain)
