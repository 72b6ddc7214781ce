"""Claim: drafts change how long generation takes, never what comes out; and every round leaves the state of a fresh start.

The reference of speculative decoding is plain decoding; that of plain decoding is ``generate`` of transformers, which has no
drafts, another loop and another cache. What the heads draft is held against their own training pass.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import EXACT, HYBRIDS, SPLIT, VOCAB, tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig

from mull.decoding.drafting import Proposal
from mull.decoding.generate import generate
from mull.decoding.rounds import Decoder, Size
from mull.evaluation.lossless import differences
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import MTPConfig
from mull.ops.sampling import Sampling
from mull.retrofit.wrap import wrap_transformer_with_etd

HEADS: dict[str, dict[str, Any]] = {
    "transformer": {"mtp_head_type": "transformer"},
    "mlp": {"mtp_head_type": "mlp"},
    "shared_lm_head": {"mtp_head_type": "shared_lm_head"},
    "sequential": {"mtp_head_type": "sequential"},
    "recursive": {"mtp_head_type": "sequential", "share_weights_across_steps": True},
    "native": {"mtp_head_type": "native"},
}
ODD_PATH = [(0, 0), (1, 0), (3, 0), (3, 1), (2, 0), (4, 0), (5, 0), (3, 2), (7, 0)]
"""Skips, repeats and goes back."""


def with_heads(family: str, head: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> MullForCausalLM:
    """A random model that likes to repeat its last token, and heads that guess just that: often right, often wrong."""
    base = tiny(family, dtype=dtype, initializer_range=0.2, **changes)
    embeddings, out = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    if out is not embeddings:
        out.data += 2 * embeddings.data
    embeddings.data *= 6
    model = wrap_transformer_with_etd(base, SPLIT, MTPConfig(num_predict_tokens=3, **HEADS[head]))
    assert model.mtp_heads is not None
    generator = torch.Generator().manual_seed(1)
    for parameter in model.mtp_heads.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model.eval()


def ragged(lengths: Sequence[int], seed: int = 0, left: bool = True) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        place = slice(width - n, width) if left else slice(0, n)
        ids[row, place] = torch.randint(3, VOCAB, (n,), generator=generator)
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.latin(12, "family", "head")
def test_drafts_do_not_change_greedy_text(family: str, head: str) -> None:
    model = with_heads(family, head)
    accepted = 0
    for n_rows, iterations in ((1, 1), (8, 2), (1, 3)):
        ids, mask = ragged([5, 1, 17, 9, 2, 12, 7, 3][-n_rows:], seed=iterations)
        options: dict[str, Any] = {"max_new_tokens": 14, "think_iterations": iterations, "eos_token_id": [3, 4, 5]}
        plain = generate(model, ids, mask, **options)
        drafted = generate(model, ids, mask, draft="mtp", draft_length=3, **options)
        assert drafted.sequences.tolist() == plain.sequences.tolist()
        assert drafted.stats.new_tokens == plain.stats.new_tokens
        accepted += sum(drafted.stats.accepted)
    assert accepted >= 5, "hardly a draft was accepted, so nothing was tested"


@pytest.mark.latin(6, "family")
def test_plain_text_is_that_of_transformers(family: str) -> None:
    model = with_heads(family, "mlp")
    ids, mask = ragged([5, 1, 17, 9])
    for iterations, penalty in ((1, 1.0), (3, 1.0), (2, 1.5)):
        options: dict[str, Any] = {
            "max_new_tokens": 16,
            "think_iterations": iterations,
            "repetition_penalty": penalty,
            "eos_token_id": [3, 4, 5, 6, 7],
        }
        ours = generate(model, ids, mask, **options)
        theirs: Any = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, do_sample=False, **options
        )
        assert ours.sequences.tolist() == theirs.tolist()


@pytest.mark.parametrize("family", ["qwen3", "olmo3", "qwen3_5"])
def test_any_path_can_be_drafted_for(family: str) -> None:
    model = with_heads(family, "sequential")
    ids, mask = ragged([6, 2, 11])
    plain = generate(model, ids, mask, max_new_tokens=12, path=ODD_PATH)
    drafted = generate(model, ids, mask, max_new_tokens=12, path=ODD_PATH, draft="mtp", draft_length=2)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    theirs: Any = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, path=ODD_PATH
    )
    assert plain.sequences.tolist() == theirs.tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.latin(2)
def test_draft_length_is_free_to_change(penalty: float) -> None:
    model = with_heads("qwen3_next-dense", "sequential")
    ids, mask = ragged([6, 2, 11])
    options: dict[str, Any] = {"max_new_tokens": 40, "repetition_penalty": penalty}
    plain = generate(model, ids, mask, **options)
    drafted = generate(model, ids, mask, draft="mtp", **options)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    assert len(drafted.stats.draft_lengths) > 1, "only one length was tried"


def test_padding_side_and_company_do_not_matter() -> None:
    model = with_heads("qwen3_5", "native")
    lengths = [5, 1, 17]
    options: dict[str, Any] = {"max_new_tokens": 10, "draft": "mtp", "draft_length": 2, "eos_token_id": []}
    left, right = ragged(lengths), ragged(lengths, left=False)
    of_left = generate(model, *left, **options).sequences[:, 17:]
    of_right = generate(model, *right, **options).sequences[:, 17:]
    assert torch.equal(of_left, of_right)
    for row, n in enumerate(lengths):
        alone = generate(model, right[0][row : row + 1, :n], **options).sequences[:, n:]
        assert torch.equal(alone[0], of_left[row])


class Driver:
    """Drives a decoder by hand, with a given draft length each round, and keeps what the heads proposed."""

    def __init__(self, model: MullForCausalLM, prompts: list[list[int]], sampling: Sampling | None = None) -> None:
        capacity = max(map(len, prompts)) + 80
        self.decoder = Decoder(model, model.path(2), sampling or Sampling(), Size(len(prompts), capacity, 3))
        self.generator = None if sampling is None else torch.Generator().manual_seed(0)
        self.rows = [
            [*prompt, token] for prompt, token in zip(prompts, self.decoder.start(prompts, self.generator), strict=True)
        ]
        self.proposal: Proposal | None = None
        assert self.decoder.drafter is not None
        draft: Callable[..., Proposal] = self.decoder.drafter.draft

        def keeping(*args: Any) -> Proposal:
            self.proposal = draft(*args)
            return self.proposal

        self.decoder.drafter.draft = keeping  # type: ignore[method-assign]

    def round(self, length: int) -> list[list[int]]:
        """Run a round; return the rows as they were before it."""
        before = [list(row) for row in self.rows]
        for row, gained in zip(self.rows, self.decoder.round(length, self.generator), strict=True):
            row += gained
        return before


LENGTHS = [3, 3, 1, 0, 0, 2, 3, 0, 1, 3, 2, 3]
"""Draft lengths of a session in which heads pause and fall behind."""


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["qwen3", "olmo3", *HYBRIDS[:3]])
@pytest.mark.latin(12, "family", "head")
def test_after_every_round_the_state_is_that_of_a_fresh_start(
    family: str, head: str, exact: Callable[..., Any]
) -> None:
    model = with_heads(family, head, dtype=torch.float64)
    driver = Driver(model, [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]])
    for length in LENGTHS[:6]:
        driver.round(length)
        cache, text = driver.decoder.cache, driver.decoder.text
        assert text.states is not None
        for row, tokens in enumerate(driver.rows):
            n = len(tokens) - 1  # the newest has not been through the trunk
            fresh = Driver(model, [tokens[:-1]]).decoder
            assert fresh.text.states is not None
            torch.testing.assert_close(text.states[row, :n], fresh.text.states[0, :n], rtol=0, atol=EXACT)
            assert text.tokens[row, : n + 1].tolist() == tokens
            for slot, fresh_slot in zip(cache.slots, fresh.cache.slots, strict=True):
                for buffer, fresh_buffer in zip(slot.buffers, fresh_slot.buffers, strict=True):
                    ours, theirs = buffer[row], fresh_buffer[0]
                    if ours.shape[1] == cache.capacity:
                        ours, theirs = ours[:, :n], theirs[:, :n]
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("family", "piece"), [*((family, 1024) for family in ("qwen3", "olmo3", *HYBRIDS[:3])), ("qwen3", 3)]
)
@pytest.mark.latin(12, "family", "head")
def test_heads_draft_what_their_training_pass_says(
    family: str, piece: int, head: str, exact: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distribution of draft k is that of head k at the last true position, when the tokens in between are the drafts."""
    monkeypatch.setattr("mull.decoding.rounds.PREFILL_TOKENS", piece + 1)
    monkeypatch.setattr("mull.decoding.drafting.CATCH_UP_TOKENS", piece)
    model = with_heads(family, head, dtype=torch.float64)
    driver = Driver(model, [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]], Sampling(temperature=1.0))
    for length in LENGTHS:
        before = driver.round(length)
        if not length:
            continue
        assert driver.proposal is not None
        assert driver.proposal.distribution is not None
        for row, tokens in enumerate(before):
            drafts = driver.proposal.tokens[row].tolist()
            ids = torch.tensor([[*tokens, *drafts]])
            last = len(tokens) - 2  # the last position whose state the round began with
            targets = torch.full((1, ids.shape[1], 1 + length), -100)
            targets[0, last, 1:] = torch.tensor(drafts)
            hidden = model.hidden_states(ids, think_iterations=2)
            _, losses = model.head_losses(hidden, ids, targets, torch.ones(targets.shape, dtype=torch.float64))
            p = driver.proposal.distribution[row].gather(1, driver.proposal.tokens[row][:, None])[:, 0]
            torch.testing.assert_close(-p.log(), losses[0, last, 1:].to(p.dtype), rtol=0, atol=1e-5)


def counting_model(head: str, period: int = 7) -> MullForCausalLM:
    """A model, heads included, that has learned to count round and round."""
    base = tiny("qwen3", num_hidden_layers=2, initializer_range=0.1)
    model = wrap_transformer_with_etd(base, None, MTPConfig(num_predict_tokens=3, mtp_loss_weight=3.0, **HEADS[head]))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    offsets = torch.arange(period)[:, None] + torch.arange(3 * period)
    ids = 3 + offsets % period
    for _ in range(150):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.latin(8, "head")
def test_heads_that_know_the_sequence_gain_lookahead_and_one_tokens_per_pass(head: str) -> None:
    model = counting_model(head)
    ids = 3 + (torch.arange(4)[:, None] + torch.arange(8)) % 7
    out = generate(model, ids, max_new_tokens=1 + 5 * 4, draft="mtp", draft_length=3, eos_token_id=[])
    assert torch.equal(out.sequences, 3 + (torch.arange(4)[:, None] + torch.arange(29)) % 7)
    assert out.stats.rounds == 5
    assert out.stats.accepted == out.stats.verified == out.stats.drafted == [20, 20, 20]
    assert out.stats.mean_accepted_length == 4
    ends = generate(model, ids[:1], max_new_tokens=20, draft="mtp", draft_length=3, eos_token_id=[6, 7])
    assert ends.sequences[0, 8:].tolist() == [4, 5, 6], "the round gave 5, 6, 7 and 8, and the first end counts"


def test_drafts_from_the_model_s_own_distribution_are_all_accepted() -> None:
    """A model whose distribution never changes: identity heads then draft from it, and p = q."""
    base = tiny("qwen3", num_hidden_layers=2, initializer_range=0.3)
    base.get_input_embeddings().weight.data[:] = base.get_input_embeddings().weight.data[5]
    model = wrap_transformer_with_etd(base, None, MTPConfig(num_predict_tokens=3, mtp_head_type="mlp")).eval()
    ids, mask = ragged([5, 1, 17, 9] * 8)
    warpers: list[dict[str, Any]] = [
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"repetition_penalty": 1.5},
        {},
        {"top_k": 9},
        {"top_p": 0.7},
        {"min_p": 0.05},
        {"top_k": 30, "top_p": 0.9},
    ]
    for warper in warpers:
        options = {"temperature": 0.8, "seed": 0, **warper}
        out = generate(model, ids, mask, max_new_tokens=21, draft="mtp", draft_length=3, eos_token_id=[], **options)
        assert out.stats.rounds == 5
        assert out.stats.accepted == out.stats.drafted
    assert len(set(out.sequences[0].tolist())) > 5


WARPERS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "temperature": {"temperature": 0.6},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.2},
    "penalty": {"temperature": 1.0, "repetition_penalty": 2.0},
    "all": {"temperature": 0.9, "top_k": 5, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("warper", WARPERS)
@pytest.mark.parametrize("head", ["sequential", "mlp", "native"])
@pytest.mark.latin(9, "head", "warper")
def test_sampled_text_has_the_distribution_of_the_model(head: str, warper: str) -> None:
    """Joint distribution of three tokens, over all 6 x 6 x 6: the prompt's, and two that rounds with badly wrong drafts make."""
    size, n_rows = 6, 8000
    base = tiny(
        "qwen3", vocab_size=size, num_hidden_layers=2, pad_token_id=0, eos_token_id=None, initializer_range=0.15
    )
    model = wrap_transformer_with_etd(base, None, MTPConfig(num_predict_tokens=2, **HEADS[head])).eval()
    assert model.mtp_heads is not None
    for parameter in model.mtp_heads.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape)
    prompt = torch.tensor([[1, 4, 2]])
    expected = joint_distribution(model, prompt, Sampling(**WARPERS[warper])).flatten()
    assert (expected > 0.001).sum() > 10, "next to nothing is left to chance"
    samples = torch.distributions.Multinomial(n_rows, expected).sample((200,)) / n_rows
    distances = 0.5 * (samples - expected).abs().sum(1)
    limit = distances.mean() + 3 * distances.std()
    for options in ({}, {"draft": "mtp", "draft_length": 2}):
        out = generate(
            model, prompt.expand(n_rows, -1), max_new_tokens=4, eos_token_id=[], seed=1000, **options, **WARPERS[warper]
        )  # fmt: skip
        found = torch.bincount(out.sequences[:, 3:6] @ torch.tensor([size * size, size, 1]), minlength=size**3)
        assert 0.5 * (found / n_rows - expected).abs().sum() < limit, options
        assert not found[expected == 0].any(), options
    assert 0.05 < out.stats.acceptance[0] < 0.95


def joint_distribution(model: MullForCausalLM, prompt: Tensor, sampling: Sampling) -> Tensor:
    """``[V, V, V]``: probability of every continuation by three tokens, with transformers' own processors."""
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **sampling.model_dump(exclude_none=True)})
    processors = model._get_logits_processor(config, input_ids_seq_length=prompt.shape[1])
    size = model.lm_head.out_features

    def next_token(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, -1].float()
        return F.softmax(processors(ids, logits), -1)

    first = next_token(prompt)[0]
    joint = torch.zeros(size, size, size)
    for a in range(size):
        second = next_token(torch.cat([prompt, torch.tensor([[a]])], 1))[0]
        for b in range(size):
            third = next_token(torch.cat([prompt, torch.tensor([[a, b]])], 1))[0]
            joint[a, b] = first[a] * second[b] * third
    return joint


def test_seeds_decide_the_draws() -> None:
    model = with_heads("qwen3", "sequential")
    ids, mask = ragged([5, 1, 17])
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "draft": "mtp", "draft_length": 2}
    first = generate(model, ids, mask, seed=3, **options).sequences
    assert torch.equal(first, generate(model, ids, mask, seed=3, **options).sequences)
    assert not torch.equal(first, generate(model, ids, mask, seed=4, **options).sequences)
    torch.manual_seed(0)
    unseeded = generate(model, ids, mask, **options).sequences
    assert not torch.equal(unseeded, generate(model, ids, mask, **options).sequences)
    torch.manual_seed(0)
    assert torch.equal(unseeded, generate(model, ids, mask, **options).sequences)


def test_long_prompts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_heads("qwen3_5", "sequential")
    ids, mask = ragged([40, 7, 33])
    options: dict[str, Any] = {"max_new_tokens": 10, "draft": "mtp", "draft_length": 3}
    whole = generate(model, ids, mask, **options)
    monkeypatch.setattr("mull.decoding.rounds.PREFILL_TOKENS", 16)
    monkeypatch.setattr("mull.decoding.drafting.CATCH_UP_TOKENS", 8)
    pieces = generate(model, ids, mask, **options)
    assert pieces.sequences.tolist() == whole.sequences.tolist()
    assert pieces.stats.accepted == whole.stats.accepted


@pytest.mark.slow
def test_five_hundred_prompts(family: str) -> None:
    models = [with_heads(family, head) for head in HEADS]
    generator = torch.Generator().manual_seed(0)
    for batch in range(70):  # 8 of one row, 62 of eight: 504 prompts
        n_rows = 8 if batch % 9 else 1
        lengths = torch.randint(1, 24, (n_rows,), generator=generator).tolist()
        ids, mask = ragged(lengths, seed=batch)
        model, iterations, length = models[batch % 6], 1 + batch // 6 % 3, 1 + batch // 18 % 3
        options: dict[str, Any] = {"max_new_tokens": 24, "think_iterations": iterations, "eos_token_id": [3, 4]}
        plain = generate(model, ids, mask, **options)
        drafted = generate(model, ids, mask, draft="mtp", draft_length=length, **options)
        assert drafted.sequences.tolist() == plain.sequences.tolist(), f"batch {batch}"


def test_differences_are_found_and_judged() -> None:
    model = with_heads("qwen3", "mlp")
    ids, _ = ragged([9, 9])
    prompts = ids.tolist()
    reference = generate(model, ids, max_new_tokens=8, eos_token_id=[]).sequences[:, 9:].tolist()
    wider = deepcopy(model).double()
    assert differences(model, wider, prompts, reference, reference) == []
    other = [list(row) for row in reference]
    other[1][3:] = [(token + 1) % VOCAB for token in other[1][3:]]
    (found,) = differences(model, wider, prompts, reference, other)
    assert (found.row, found.position) == (1, 3)
    assert 0 < found.rounding < 1e-4
    assert found.gap > 1e-3
    assert not found.is_tie


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "olmo3", "qwen3_5", "qwen3_next-moe"])
def test_bf16_texts_part_at_ties_only(family: str, record_property: Callable[[str, object], None]) -> None:
    model = with_heads(family, "sequential").bfloat16()
    wider = deepcopy(model).float()
    ids, _ = ragged([12] * 64)
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": [], "think_iterations": 1}
    plain = generate(model, ids, **options).sequences[:, 12:].tolist()
    drafted = generate(model, ids, draft="mtp", draft_length=3, **options).sequences[:, 12:].tolist()
    found = differences(model, wider, ids.tolist(), plain, drafted, think_iterations=1)
    for difference in found:
        print(f"{family}: {difference}")
    record_property("differences", len(found))
    assert all(difference.is_tie for difference in found)
