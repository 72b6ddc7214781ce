"""Claim: next-token training computes the cross-entropy of the model's own logits, over exactly the targets there are."""

from collections.abc import Callable

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor, nn

from mull.model.causal_lm import MullForCausalLM
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken

Ids = Callable[..., Tensor]


@pytest.fixture
def model() -> MullForCausalLM:
    return wrap_transformer_with_etd(tiny("qwen3"), SPLIT)


def by_hand(logits: Tensor, labels: Tensor, skip: set[tuple[int, int]]) -> tuple[Tensor, int]:
    """Position by position; `skip` names targets (row, position) that are none."""
    terms = [
        nn.functional.cross_entropy(logits[b, t - 1], labels[b, t])
        for b in range(labels.shape[0])
        for t in range(1, labels.shape[1])
        if labels[b, t] != -100 and (b, t) not in skip
    ]
    return torch.stack(terms).sum(), len(terms)


@pytest.mark.parametrize("iterations", [1, 3])
def test_sum_and_weight_are_those_of_the_logits(model: MullForCausalLM, ids: Ids, iterations: int) -> None:
    tokens = ids(2, 7)
    labels = tokens.clone()
    labels[0, :4] = -100
    labels[1, 5] = -100
    expected, count = by_hand(model(tokens, think_iterations=iterations).logits, labels, set())
    output = NextToken(IterationSampling(maximum=iterations))(model, {"input_ids": tokens, "labels": labels})
    torch.testing.assert_close(output.sum, expected, atol=1e-4, rtol=0)
    assert output.weight == count == 8
    assert output.metrics == {"loss": pytest.approx(float(expected.detach()) / 8, abs=1e-5), "iterations": iterations}


def test_packed_documents_have_the_loss_of_separate_ones(model: MullForCausalLM, ids: Ids) -> None:
    objective = NextToken(IterationSampling(maximum=2))
    tokens = ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = objective(model, {"input_ids": tokens, "labels": tokens, "position_ids": positions})
    parts = [objective(model, {"input_ids": part, "labels": part}) for part in (tokens[:, :4], tokens[:, 4:])]
    torch.testing.assert_close(packed.sum, parts[0].sum + parts[1].sum, atol=1e-4, rtol=0)
    assert packed.weight == 7


def test_padding_does_not_change_the_loss(model: MullForCausalLM, ids: Ids) -> None:
    objective = NextToken(IterationSampling(maximum=2))
    tokens = ids(1, 6)
    alone = objective(model, {"input_ids": tokens, "labels": tokens})
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([pad, tokens], 1),
        "labels": torch.cat([pad - 100, torch.full((1, 1), -100), tokens[:, 1:]], 1),
        "attention_mask": torch.cat([pad, torch.ones_like(tokens)], 1),
        "position_ids": torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5]]),
    }
    torch.testing.assert_close(objective(model, padded).sum, alone.sum, atol=1e-4, rtol=0)


def test_positions_do_not_mark_documents_beside_a_mask(model: MullForCausalLM, ids: Ids) -> None:
    # Several queries at one position, kept apart by the mask: they are no documents.
    tokens = ids(1, 6)
    batch = {
        "input_ids": tokens,
        "labels": tokens,
        "position_ids": torch.tensor([[0, 1, 2, 3, 3, 3]]),
        "attention_mask": torch.ones(6, 6).tril().bool()[None, None],
    }
    assert NextToken(IterationSampling(maximum=1))(model, batch).weight == 5


def test_the_last_iterations_alone_back_propagate(model: MullForCausalLM, ids: Ids) -> None:
    tokens = ids(2, 6)
    batch = {"input_ids": tokens, "labels": tokens}

    def gradient(**options: int) -> tuple[Tensor, Tensor, Tensor | None]:
        model.zero_grad()
        output = NextToken(IterationSampling(maximum=4, **options))(model, batch)
        output.sum.backward()
        think, encode = (model.model.layers[layer].mlp.up_proj.weight.grad for layer in (3, 0))
        return output.sum.detach(), think, encode

    full, truncated, all_four = gradient(), gradient(backprop_iterations=1), gradient(backprop_iterations=4)
    assert torch.equal(full[0], truncated[0]), "truncation changes the gradient, not the loss"
    assert not torch.allclose(full[1], truncated[1], rtol=0.1)
    torch.testing.assert_close(full[1], all_four[1])
    assert full[2] is not None
    assert truncated[2] is None


def test_a_batch_without_targets_is_refused(model: MullForCausalLM, ids: Ids) -> None:
    tokens = ids(2, 5)
    labels = torch.full_like(tokens, -100)
    labels[:, 0] = 7
    with pytest.raises(ValueError, match="is a target"):
        NextToken(IterationSampling(maximum=1))(model, {"input_ids": tokens, "labels": labels})
