"""Claim: a retrieval task states its facts once, in text that is otherwise as it was, and asks for one of them."""

import pytest
import torch

from mull.data.retrieval import FACT, retrieval_task

TEXT = torch.randint(0, 500, (5, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n_keys", [1, 4, 19])
def test_the_answer_follows_the_key_once(n_keys):
    task = retrieval_task(TEXT, 12, n_keys, seed=3)
    places = set()
    for number, (ids, answer) in enumerate(zip(task.input_ids.tolist(), task.answers.tolist(), strict=True)):
        marker, key = ids[-2:]
        starts = [at for at in range(58) if ids[at] == marker]
        facts = {ids[at + 1]: ids[at + 2] for at in starts}
        assert len(facts) == n_keys
        assert facts[key] == answer
        # Nothing but the facts and the question has changed, and what they are made of occurs nowhere else.
        inside = {at + offset for at in starts for offset in range(FACT)} | {58, 59}
        rest = [at for at in range(60) if at not in inside]
        row = TEXT[number % 5].tolist()
        assert [ids[at] for at in rest] == [row[at] for at in rest]
        assert ids.count(key) == 2
        assert ids.count(answer) == 1
        assert {marker, *facts, *facts.values()}.isdisjoint(row)
        assert len({marker, *facts, *facts.values()}) == 1 + 2 * n_keys
        places.add(starts[0])
    assert n_keys == 19 or len(places) > 3


def test_a_seed_determines_the_task():
    one, same, other = (retrieval_task(TEXT, 3, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.input_ids, same.input_ids)
    assert not torch.equal(one.input_ids, other.input_ids)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="n_keys=20 must be from 1 to 19, the facts that fit into rows of 60 tokens"):
        retrieval_task(TEXT, 1, 20)
    with pytest.raises(ValueError, match="leaves 0 for the 3 of 1 facts"):
        retrieval_task(TEXT[:1], 1, 1)
    with pytest.raises(ValueError, match="3 examples of 0 rows of text cannot be made: both must be at least 1"):
        retrieval_task(TEXT[:0], 3, 1)
    with pytest.raises(ValueError, match="0 examples of 5 rows"):
        retrieval_task(TEXT, 0, 1)
