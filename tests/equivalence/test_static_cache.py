"""Decoding on a cache of fixed size equals the model's own uncached forward of each row alone, whatever is fed and taken back.

A small driver feeds calls as the decoder does; rows advance by different numbers of tokens. In fp64, where the errors of
bookkeeping stand out, unless a test says otherwise.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jaxtyping
import pytest
import torch
from conftest import EXACT, HYBRIDS, SPLIT, VOCAB, tiny
from torch import Tensor
from transformers import PreTrainedModel

from mull import wrap_transformer_with_etd
from mull.model.executor import run_layer
from mull.model.fixed_cache import LONGEST_SHORT_CALL, FixedMemory, FixedSlot, StaticCall, StaticSlotCache
from mull.model.path import Path, from_layers

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]

PATHS = {
    "one iteration": SPLIT.path(1),
    "two iterations": SPLIT.path(2),
    "three iterations": SPLIT.path(3),
    # Out of order, with repeats and gaps; layers 3 and 7 of every family have full attention.
    "arbitrary": from_layers([0, 3, 1, 1, 7, 3, 5, 0]),
}
CAPACITY = 64


@dataclass
class Driver:
    """A model, a cache, and how many tokens of each row are in it."""

    model: Any
    path: Path
    rows: int
    lengths: Tensor = field(init=False)
    cache: StaticSlotCache = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = torch.zeros(self.rows, dtype=torch.long)
        base = self.model.model
        weight = base.embed_tokens.weight
        self.cache = StaticSlotCache(
            base.text_config, self.path, self.rows, CAPACITY, dtype=weight.dtype, device=weight.device
        )

    def call(self, n_new: int, n_valid: Tensor | None, fresh: bool = False, n_keys: int | None = None) -> StaticCall:
        positions = self.lengths[:, None] + torch.arange(n_new)
        return StaticCall(positions, int(positions.max()) + 1 if n_keys is None else n_keys, n_valid, fresh)

    def logits(self, tokens: Tensor, call: StaticCall) -> Tensor:
        return self.model.lm_head(self.model.model.decode(tokens, self.cache, call))

    def extend(self, tokens: Tensor, n_valid: Sequence[int], fresh: bool = False, n_keys: int | None = None) -> Tensor:
        """Feed tokens of which each row keeps its first `n_valid`."""
        valid = torch.tensor(n_valid)
        logits = self.logits(tokens, self.call(tokens.shape[1], valid, fresh, n_keys))
        self.lengths = self.lengths + valid
        return logits

    def verify(self, tokens: Tensor, n_keep: Sequence[int], n_keys: int | None = None) -> Tensor:
        """Feed tokens first, and only then decide how many each row keeps."""
        logits = self.logits(tokens, self.call(tokens.shape[1], None, n_keys=n_keys))
        self.cache.commit(torch.tensor(n_keep))
        self.lengths = self.lengths + torch.tensor(n_keep)
        return logits

    def held(self) -> list[list[Tensor]]:
        """What each slot remembers of each row: keys and values up to the row's length, windows and states."""
        return [
            [
                buffer[row, :, : self.lengths[row]] if buffer.shape[-2] == CAPACITY else buffer[row]
                for buffer in slot.buffers
                for row in range(self.rows)
            ]
            for slot in self.cache.slots
        ]


def alone(model: Any, path: Path, tokens: Tensor) -> Tensor:
    """The model's own logits ``[T, V]`` of one row."""
    return model(tokens[None], use_cache=False, path=path).logits[0]


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0, check_dtype=False)


def padded(rows: Sequence[Tensor], seed: int = 9) -> Tensor:
    """Rows of different lengths with random tokens after them."""
    width = max(row.numel() for row in rows)
    out = torch.randint(3, VOCAB, (len(rows), width), generator=torch.Generator().manual_seed(seed))
    for row, tokens in enumerate(rows):
        out[row, : tokens.numel()] = tokens
    return out


@torch.no_grad()
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.latin(8, "family", "name")
def test_any_chunks_equal_the_uncached_forward(family: str, name: str, exact: Exact, ids: Ids) -> None:
    model, tokens = wrap_transformer_with_etd(exact(family), SPLIT), ids(2, 26)
    expected = torch.stack([alone(model, PATHS[name], row) for row in tokens])
    for fresh, chunks in ((False, [1] * 26), (True, [18, 1, 7]), (False, [18, 1, 7]), (True, [3, 18, 2, 3])):
        driver, logits = Driver(model, PATHS[name], 2), []
        for number, chunk in enumerate(tokens.split(chunks, 1)):
            logits.append(driver.extend(chunk, [chunk.shape[1]] * 2, fresh=fresh and number == 0))
        assert_same(torch.cat(logits, 1), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["two iterations", "arbitrary"])
@pytest.mark.parametrize("width", [1, 5, LONGEST_SHORT_CALL + 3])
@pytest.mark.latin(8, "family", "name", "width")
def test_every_number_of_tokens_can_be_kept(family: str, name: str, width: int, exact: Exact, ids: Ids) -> None:
    """Row r keeps r tokens of a verification, then all rows go on: logits and everything held are those of a fresh prefill."""
    model, rows = wrap_transformer_with_etd(exact(family), SPLIT), width + 1
    prompt, drafted, rest = ids(rows, 9), ids(rows, width, seed=1), ids(rows, 3, seed=2)
    driver = Driver(model, PATHS[name], rows)
    driver.extend(prompt, [9] * rows, fresh=True)
    verified = driver.verify(drafted, list(range(rows)))
    followed = driver.verify(rest, [3] * rows)
    texts = [torch.cat([prompt[row], drafted[row, :row], rest[row]]) for row in range(rows)]
    fresh = Driver(model, PATHS[name], rows)
    fresh.extend(padded(texts), [text.numel() for text in texts], fresh=True)
    assert_same(verified, model(torch.cat([prompt, drafted], 1), use_cache=False, path=PATHS[name]).logits[:, 9:])
    for row, text in enumerate(texts):
        assert_same(followed[row], alone(model, PATHS[name], text)[-3:])
    for actual, expected in zip(driver.held(), fresh.held(), strict=True):
        for mine, its in zip(actual, expected, strict=True):
            assert_same(mine, its)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.latin(3, "family", "seed")
def test_any_sequence_of_calls_equals_each_row_alone(family: str, seed: int, exact: Exact, ids: Ids) -> None:
    """Ragged prefill with padding on the right, then verifications and extensions at random; rows may stand still."""
    model, rows, chance = wrap_transformer_with_etd(exact(family), SPLIT), 4, random.Random(seed)
    texts = ids(rows, CAPACITY, seed=seed)
    driver = Driver(model, PATHS["two iterations"], rows)
    lengths = [chance.randint(1, 24) for _ in range(rows)]
    seen: list[list[Tensor]] = [[] for _ in range(rows)]

    def note(logits: Tensor, n_kept: list[int]) -> None:
        for row, n in enumerate(n_kept):
            seen[row].append(logits[row, :n])

    prompt = padded([texts[row, :n] for row, n in enumerate(lengths)], seed)
    note(driver.extend(prompt, lengths, fresh=chance.random() < 0.5), lengths)
    for _ in range(10):
        width = chance.choice([1, 1, 2, 5, 8])
        if int(driver.lengths.max()) + width > CAPACITY:
            break
        kept = [chance.randint(0, width) for _ in range(rows)]
        following = [
            texts[row, start : start + n] for row, (start, n) in enumerate(zip(driver.lengths, kept, strict=True))
        ]
        tokens = padded([*following, torch.zeros(width, dtype=torch.long)], chance.randint(0, 99))[:rows]
        n_keys = chance.choice([None, CAPACITY])
        step = chance.choice([driver.extend, driver.verify])
        note(step(tokens, kept, n_keys=n_keys), kept)
    for row in range(rows):
        actual = torch.cat(seen[row])
        assert_same(actual, alone(model, driver.path, texts[row, : actual.shape[0]]))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family_name", ["llama", "olmo3", "qwen3_5"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "masked"])
def test_both_attentions_see_no_future(family_name: str, attention: str, fresh: bool, exact: Exact, ids: Ids) -> None:
    plain = exact(family_name)
    model, tokens = wrap_transformer_with_etd(plain, SPLIT), ids(2, 14)
    # eager softmax in transformers is in fp32
    expected = torch.stack([alone(model, PATHS["two iterations"], row) for row in tokens])
    model.set_attn_implementation(attention)
    assert model.model.text_config._attn_implementation == attention
    driver = Driver(model, PATHS["two iterations"], 2)
    assert_same(driver.extend(tokens, [14] * 2, fresh=fresh), expected, EXACT if attention == "sdpa" else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("longer", [-1, 0, 1, 2])
def test_a_first_call_about_as_long_as_the_window(longer: int, exact: Exact, ids: Ids) -> None:
    """Up to the window's width no mask is needed, from there on one is."""
    model = wrap_transformer_with_etd(exact("olmo3"), SPLIT)
    tokens = ids(2, model.model.text_config.sliding_window + longer)
    expected = torch.stack([alone(model, PATHS["one iteration"], row) for row in tokens])
    driver = Driver(model, PATHS["one iteration"], 2)
    assert_same(driver.extend(tokens, [tokens.shape[1]] * 2, fresh=True), expected)


@torch.no_grad()
def test_an_attention_that_cannot_use_the_cache_is_named(exact: Exact, ids: Ids) -> None:
    model = wrap_transformer_with_etd(exact("llama"), SPLIT)
    model.model.text_config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"'flex_attention' .* attn_implementation='sdpa' \(or 'eager'\)"):
        Driver(model, PATHS["one iteration"], 2).extend(ids(2, 4), [4, 4])


@torch.no_grad()
@pytest.mark.parametrize("family_name", HYBRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_the_rules_of_transformers(family_name: str, dtype: torch.dtype, ids: Ids) -> None:
    """Long calls run transformers' chunked rule, short ones our own, in one precision: both continue each other."""
    model = wrap_transformer_with_etd(tiny(family_name, dtype=dtype, initializer_range=0.05), SPLIT)
    tokens = ids(2, 45)
    expected = torch.stack([alone(model, PATHS["two iterations"], row) for row in tokens])
    driver = Driver(model, PATHS["two iterations"], 2)
    logits = driver.extend(tokens[:, :20], [20, 18], fresh=True)
    assert_same(logits[0], expected[0, :20], tolerance_of(dtype))
    following = torch.stack([tokens[0, 20:40], tokens[1, 18:38]])
    logits = driver.verify(following[:, :4], [4, 2])
    assert_same(logits[1, :2], expected[1, 18:20], tolerance_of(dtype))
    logits = driver.extend(torch.stack([tokens[0, 24:44], tokens[1, 20:40]]), [20, 20])
    assert_same(logits[0], expected[0, 24:44], tolerance_of(dtype))
    assert_same(logits[1], expected[1, 20:40], tolerance_of(dtype))
    states = [slot.state for slot in driver.cache.slots if hasattr(slot, "state")]
    assert states
    assert {state.dtype for state in states} == {torch.float32}


def tolerance_of(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 3e-2


@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(family: str, exact: Exact, ids: Ids) -> None:
    model, tokens = wrap_transformer_with_etd(exact(family), SPLIT), ids(3, 12)
    rows = [tokens[0, :5], tokens[1], tokens[2, :8]]
    results = []
    for seed in (1, 2):
        driver = Driver(model, PATHS["two iterations"], 3)
        driver.extend(padded(rows, seed), [5, 12, 8], fresh=True)
        driver.extend(padded([tokens[0, :1], tokens[1, :4], tokens[2, :2]], seed), [1, 4, 2])
        results.append((driver.verify(ids(3, 2, seed=5), [2, 1, 0]), driver.held()))
    assert torch.equal(results[0][0], results[1][0])
    for first, second in zip(results[0][1], results[1][1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@torch.no_grad()
def test_a_reset_cache_is_as_new_and_stays_where_it_is(family: str, exact: Exact, ids: Ids) -> None:
    model, tokens = wrap_transformer_with_etd(exact(family), SPLIT), ids(2, LONGEST_SHORT_CALL + 2)
    driver = Driver(model, PATHS["two iterations"], 2)
    addresses = [buffer.data_ptr() for slot in driver.cache.slots for buffer in slot.buffers]
    size = driver.cache.n_bytes
    first = driver.extend(tokens, [tokens.shape[1], 7], fresh=True), driver.verify(tokens[:, :4], [4, 2])
    driver.logits(tokens[:, :4], driver.call(4, None))  # never committed
    for slot in driver.cache.slots:
        for buffer in slot.buffers:
            buffer.fill_(torch.nan)  # worse than anything that a call leaves
    driver.cache.reset()
    driver.lengths = torch.zeros(2, dtype=torch.long)
    second = driver.extend(tokens, [tokens.shape[1], 7], fresh=True), driver.verify(tokens[:, :4], [4, 2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [buffer.data_ptr() for slot in driver.cache.slots for buffer in slot.buffers] == addresses
    assert driver.cache.n_bytes == size


@torch.no_grad()
def test_blocks_of_heads_have_slots_of_their_own(exact: Exact, ids: Ids) -> None:
    """Two blocks and the trunk's layer, fed in turn, answer as each does on a cache of its own."""
    model, path = wrap_transformer_with_etd(exact("qwen3_5"), SPLIT), from_layers([3])
    base = model.model

    def new_cache(n_head_blocks: int) -> StaticSlotCache:
        options = {"dtype": torch.float64, "device": torch.device("cpu"), "n_head_blocks": n_head_blocks}
        return StaticSlotCache(base.text_config, path, 2, 16, **options)

    def feed(slot: Callable[[StaticCall], FixedSlot], h: Tensor, start: int) -> Tensor:
        call = StaticCall(torch.arange(start, start + 3).expand(2, -1), start + 3, torch.tensor([3, 3]))
        part = h[:, start : start + 3]
        return run_layer(base.layers[3], "full_attention", part, base.fixed_layer_inputs(part, call), slot(call))

    shared, texts = new_cache(2), [base.embed_tokens(ids(2, 6, seed=seed)) for seed in range(3)]
    users = [
        partial(shared.head_slot, 0),
        partial(shared.head_slot, 1),
        lambda call: FixedMemory(shared, call).slot(0, path[0], None),
    ]
    together = [[feed(user, h, start) for user, h in zip(users, texts, strict=True)] for start in (0, 3)]
    for number, h in enumerate(texts):
        cache = new_cache(0)
        assert shared.n_bytes == 3 * cache.n_bytes
        for start, outs in zip((0, 3), together, strict=True):
            alone = feed(lambda call, cache=cache: FixedMemory(cache, call).slot(0, path[0], None), h, start)
            assert torch.equal(alone, outs[number])


def test_the_cache_refuses_what_does_not_fit(exact: Exact, ids: Ids) -> None:
    driver = Driver(wrap_transformer_with_etd(exact("llama"), SPLIT), PATHS["one iteration"], 1)
    with pytest.raises(AssertionError, match="65 keys do not fit into 64 slots"), torch.no_grad():
        driver.extend(ids(1, CAPACITY + 1), [CAPACITY + 1])


def test_a_call_must_be_judged_before_the_next(exact: Exact, ids: Ids) -> None:
    driver = Driver(wrap_transformer_with_etd(exact("qwen3_5"), SPLIT), PATHS["one iteration"], 1)
    with torch.no_grad():
        driver.logits(ids(1, 2), driver.call(2, None))
        with pytest.raises(AssertionError, match="waits for its commit"):
            driver.logits(ids(1, 2), driver.call(2, None))
        driver.cache.commit(torch.tensor([1]))
        with pytest.raises(AssertionError, match="no call waits"):
            driver.cache.commit(torch.tensor([1]))


@torch.no_grad()
def test_a_layer_of_another_size_is_refused(exact: Exact, ids: Ids) -> None:
    """Sizes come from the configuration; where a layer's differ, nothing is written beside them silently."""
    driver = Driver(wrap_transformer_with_etd(exact("qwen3"), SPLIT), PATHS["one iteration"], 1)
    other = wrap_transformer_with_etd(exact("qwen3", num_key_value_heads=1), SPLIT)
    with pytest.raises(AssertionError, match="does not fit"):
        other.model.decode(ids(1, 2), driver.cache, driver.call(2, torch.tensor([2])))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family_name", "layers", "backend"),
    [
        ("olmo3", [0, 3, 0], "aot_eager"),
        pytest.param("qwen3_5", [0, 3, 0], "aot_eager", marks=pytest.mark.slow),
        pytest.param("qwen3_5", [0, 3, 0], "inductor", marks=pytest.mark.slow),
        pytest.param("qwen3", [0, 3, 0], "inductor", marks=pytest.mark.slow),
    ],
)
@pytest.mark.latin(2)
def test_calls_compile_to_one_graph_each(
    family_name: str, layers: list[int], backend: str, ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No break, no wait for the device, no second compilation: of an extension, of a verification, and of its commit."""
    # The checks of annotations, which only tests have, cannot be compiled.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = wrap_transformer_with_etd(tiny(family_name), SPLIT)
    driver = Driver(model, from_layers(layers), 3)

    def step(tokens: Tensor, start: Tensor, n_valid: Tensor | None) -> Tensor:
        positions = start[:, None] + torch.arange(tokens.shape[1])
        return driver.logits(tokens, StaticCall(positions, CAPACITY, n_valid))

    def decode(step: Callable[..., Tensor], commit: Callable[..., None]) -> Tensor:
        driver.cache.reset()
        lengths, seen = torch.zeros(3, dtype=torch.long), []
        for number in range(4):
            n_keep = torch.tensor([number, 4 - number, 2])
            tokens = ids(3, 4, seed=number)
            seen.append(step(tokens, lengths, n_keep if number % 2 else None))
            if not number % 2:
                commit(n_keep)
            lengths = lengths + n_keep
        return torch.stack(seen)

    torch._dynamo.reset()
    expected = decode(step, driver.cache.commit)
    compiled = [torch.compile(f, fullgraph=True, dynamic=False, backend=backend) for f in (step, driver.cache.commit)]
    assert_same(decode(*compiled), expected, 2e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(decode(*compiled), expected, 2e-5)
