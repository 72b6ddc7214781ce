"""Planted noise is where the mask says, nowhere else, uniform, and of the share that was asked for."""

import pytest
import torch

from mull.data.noise import plant_noise
from mull.data.packing import PackedDataset, TokenizedExample, pack_tokenized_examples, pack_tokens

PAD, EOS, VOCAB = 0, 1, 12
SPECIAL = {"vocab_size": VOCAB, "special_ids": {PAD, EOS}}


@pytest.fixture
def dataset() -> PackedDataset:
    generator = torch.Generator().manual_seed(0)
    documents = [[*torch.randint(2, VOCAB, (n,), generator=generator).tolist(), EOS] for n in range(3, 90)]
    return pack_tokens(documents, length=16, pad_id=PAD, bytes_per_token=1.5)


@pytest.mark.parametrize("where", ["labels", "tokens"])
def test_the_mask_is_where_the_labels_differ(dataset: PackedDataset, where: str) -> None:
    before = dataset.labels.clone(), dataset.input_ids.clone()
    noisy, mask = plant_noise(dataset, 0.3, **SPECIAL, where=where)
    assert torch.equal(noisy.labels != dataset.labels, mask)
    assert torch.equal(noisy.input_ids != dataset.input_ids, mask if where == "tokens" else torch.zeros_like(mask))
    assert torch.equal(noisy.position_ids, dataset.position_ids)
    if where == "tokens":
        assert torch.equal(noisy.input_ids[mask], noisy.labels[mask])
    assert torch.equal(dataset.labels, before[0])
    assert torch.equal(dataset.input_ids, before[1])
    assert noisy.bytes_per_token is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_share_is_of_the_targets_that_are_not_special(dataset: PackedDataset, share: float) -> None:
    plain = (dataset.labels != -100) & (dataset.labels != EOS)
    _, mask = plant_noise(dataset, share, **SPECIAL)
    assert not (mask & ~plain).any()
    assert int(mask.sum()) == round(share * int(plain.sum()))


def test_replacements_are_uniform_over_the_other_tokens() -> None:
    token, n = 5, 20_000
    dataset = pack_tokens([[token] * (n + 1)], length=n + 1, pad_id=PAD)
    noisy, mask = plant_noise(dataset, 1.0, **SPECIAL)
    counts = noisy.labels[mask].bincount(minlength=VOCAB)
    others = [id_ for id_ in range(VOCAB) if id_ not in (PAD, EOS, token)]
    assert int(counts[others].sum()) == n
    expected = n / len(others)
    chi_square = float(((counts[others] - expected) ** 2 / expected).sum())
    assert chi_square < 26.1, "99.9th percentile of chi-square with 8 degrees of freedom; the seed is fixed"


def test_noise_is_a_function_of_the_seed(dataset: PackedDataset) -> None:
    one, again, other = (plant_noise(dataset, 0.3, **SPECIAL, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one[0].labels, again[0].labels)
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[1], other[1])


def test_rewards_stay() -> None:
    dataset = pack_tokenized_examples([TokenizedExample([2], [3, 4], 0.5)], length=4, pad_id=PAD)
    noisy, _ = plant_noise(dataset, 1.0, **SPECIAL)
    assert noisy.rewards is dataset.rewards


def test_mistakes_are_named(dataset: PackedDataset) -> None:
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"share={share} must lie in \[0, 1\]"):
            plant_noise(dataset, share, **SPECIAL)
    with pytest.raises(ValueError, match="seed=-1"):
        plant_noise(dataset, 0.1, **SPECIAL, seed=-1)
    with pytest.raises(ValueError, match="vocab_size=3 leaves 1 tokens"):
        plant_noise(dataset, 0.1, vocab_size=3, special_ids=[0, 1])
