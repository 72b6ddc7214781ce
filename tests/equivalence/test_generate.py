"""``generate`` of transformers on a looped model: greedy, sampled, beams, batches, left padding, chunked prefill."""

from collections.abc import Callable

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor
from transformers import set_seed

from mull import MullForCausalLM, from_actions, wrap_transformer_with_etd

Ids = Callable[..., Tensor]
NEW = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def uncached_greedy(model: MullForCausalLM, tokens: Tensor, **options: object) -> Tensor:
    for _ in range(12):
        logits = model(tokens, use_cache=False, **options).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens


@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.latin(3, "family", "iterations")
def test_greedy_is_the_uncached_loop(family: str, iterations: int, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    expected = uncached_greedy(model, ids(2, 9), think_iterations=iterations)
    assert torch.equal(model.generate(ids(2, 9), do_sample=False, think_iterations=iterations, **NEW), expected)


def test_greedy_along_a_path_that_skips_the_first_layer(family: str, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), None)
    path = from_actions([0, 2, 1, 1, 2, 0, 1, 1])
    expected = uncached_greedy(model, ids(2, 9), path=path)
    assert torch.equal(model.generate(ids(2, 9), do_sample=False, path=path, **NEW), expected)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.latin(2, "family", "chunk")
def test_chunked_prefill_generates_the_same(family: str, chunk: int, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    options = {"do_sample": False, "think_iterations": 3, **NEW}
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :6] = 0
    expected = model.generate(ids(2, 10), attention_mask=mask, **options)
    actual = model.generate(ids(2, 10), attention_mask=mask, prefill_chunk_size=chunk, **options)
    assert torch.equal(actual, expected)


@pytest.mark.latin(2, "family")
def test_left_padded_rows_generate_what_they_do_alone(family: str, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    options = {"do_sample": False, "think_iterations": 3, **NEW}
    tokens, lengths = ids(3, 10), [10, 6, 2]
    mask = torch.stack([torch.arange(10) >= 10 - length for length in lengths]).long()
    actual = model.generate(tokens, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, 10 - length :], **options)
        assert torch.equal(actual[row, 10:], alone[0, length:])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
    ],
    ids=["sampled", "beams", "beams-returned", "penalty"],
)
@pytest.mark.latin(4, "family", "options")
def test_one_iteration_generates_what_the_base_model_does(family: str, options: dict[str, object], ids: Ids) -> None:
    base = tiny(family)
    set_seed(0)
    expected = base.generate(ids(2, 9), **options, **NEW)
    model = wrap_transformer_with_etd(base, SPLIT)
    set_seed(0)
    assert torch.equal(model.generate(ids(2, 9), think_iterations=1, **options, **NEW), expected)


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.latin(4, "family", "num_beams")
def test_beams_with_cache_are_beams_without(family: str, num_beams: int, ids: Ids) -> None:
    """Every slot is reordered with its beam, recurrent states included."""
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    options = {"do_sample": False, "num_beams": num_beams, "think_iterations": 3, **NEW}
    expected = model.generate(ids(2, 9), use_cache=False, **options)
    assert torch.equal(model.generate(ids(2, 9), **options), expected)


def test_sampling_is_reproducible_and_uses_the_iterations(ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    outputs = []
    for iterations in (2, 2, 3):
        set_seed(7)
        outputs.append(model.generate(ids(2, 9), do_sample=True, think_iterations=iterations, **NEW))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_configured_number_of_iterations_is_the_default(ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT.model_copy(update={"max_think_iterations": 3}))
    with torch.no_grad():
        default, three = model(ids(2, 9)).logits, model(ids(2, 9), think_iterations=3).logits
    assert torch.equal(default, three)
    assert model(ids(2, 9), use_cache=True).past_key_values.path == SPLIT.path(3)


def test_a_conversation_continues_with_its_cache(family: str, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family), SPLIT)
    options = {"do_sample": False, "think_iterations": 2, "eos_token_id": None, "pad_token_id": 0}

    def generate(tokens: Tensor, n_new: int, **more: object) -> Tensor:
        # A mask of our own: transformers takes generated tokens for padding where they have its id.
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n_new, **options, **more)

    expected = generate(ids(2, 9), 10)
    cache = model.new_cache()
    first = generate(ids(2, 9), 4, past_key_values=cache)
    assert torch.equal(generate(first, 6, past_key_values=cache), expected)
    embedded = model.generate(inputs_embeds=model.model.embed_tokens(ids(2, 9)), max_new_tokens=10, **options)
    assert torch.equal(embedded, expected[:, 9:])
