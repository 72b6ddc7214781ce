"""Labels of the chain task agree with walking the edges that its prompt writes, and held-out depth is never supervised."""

import pytest
import torch

from mull.data.chain import ChainTask, accuracy_by_hops

SIZES = [
    ChainTask(),
    ChainTask(n_nodes=12, n_chains=3, max_train_hops=2),
    ChainTask(n_nodes=4, n_chains=2, max_train_hops=1),
]


def successors(task: ChainTask, row: list[int]) -> dict[int, int]:
    """Read the edges back from the tokens of one prompt."""
    prompt = row[: task.prompt_length]
    assert set(prompt[2::3]) == {task.separator_id}
    return dict(zip(prompt[0::3], prompt[1::3], strict=True))


def walk(edges: dict[int, int], node: int, hops: int) -> int:
    for _ in range(hops):
        node = edges[node]
    return node


@pytest.mark.parametrize("task", SIZES, ids=lambda task: f"{task.n_chains}x{task.max_hops + 1}")
@pytest.mark.parametrize("train", [True, False])
def test_labels_are_what_walking_the_edges_finds(task: ChainTask, train: bool) -> None:
    batch = task.batches(5, seed=3, train=train)(7)
    for row, steps, labels, hops in zip(
        *(batch[k].tolist() for k in ("input_ids", "step_labels", "labels", "hops")), strict=True
    ):
        edges = successors(task, row)
        assert sorted(edges) == list(range(task.n_nodes)), "every node has one edge"
        assert len({walk(edges, node, task.max_hops) for node in edges}) == task.n_chains
        for position in range(task.prompt_length, task.length - 1):
            node = row[position]
            distance = next(n for n in range(task.n_nodes) if walk(edges, node, n) == walk(edges, node, n + 1))
            if train and distance > task.max_train_hops:
                assert hops[position] == -1
                assert set(steps[position]) == {-100}
                assert labels[position + 1] == -100
            else:
                assert hops[position] == distance
                assert steps[position] == [walk(edges, node, n) for n in range(1, task.max_hops + 1)]
                assert labels[position + 1] == walk(edges, node, task.max_hops), (
                    "unshifted: the target of i stands at i + 1"
                )
        unasked = [*range(task.prompt_length), task.length - 1]
        assert {hops[i] for i in unasked} == {-1}
        assert {label for i in unasked for label in steps[i]} == {-100}
        assert set(labels[: task.prompt_length + 1]) == {-100}


def test_all_depths_are_asked_in_evaluation_and_only_shallow_ones_in_training() -> None:
    task = ChainTask()
    train, evaluation = (task.batches(3, seed=0, train=train)(0)["hops"].unique().tolist() for train in (True, False))
    assert train == [-1, 0, 1, 2, 3, 4, 5]
    assert evaluation == [-1, 0, 1, 2, 3, 4, 5, 6, 7]


def test_supervision_of_a_shallow_question_never_names_a_deeper_node() -> None:
    task = ChainTask()
    train, full = (task.batches(8, seed=1, train=False)(0)["hops"], task.batches(8, seed=1, train=False)(0))
    depth = train[:, task.prompt_length : -1]  # (B, N) depth of each node
    targets = full["step_labels"][:, task.prompt_length : -1]
    reached = depth.gather(1, targets.flatten(1)).view_as(targets)
    assert (reached <= (depth[..., None] - 1).clamp(min=0)).all()


def test_a_batch_is_a_pure_function_of_its_number() -> None:
    first, second = ChainTask().batches(4, seed=5), ChainTask().batches(4, seed=5)
    forwards = [first(n)["input_ids"] for n in range(4)]
    backwards = [second(n)["input_ids"] for n in reversed(range(4))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    others = [ChainTask().batches(4, seed=6)(0), ChainTask().batches(4, seed=5, train=False)(0), first(1)]
    assert not any(torch.equal(forwards[0], other["input_ids"]) for other in others)


def test_a_query_sees_the_prompt_and_itself_only() -> None:
    task = ChainTask(n_nodes=4, max_train_hops=1)
    batch = task.batches(2, seed=0)(0)
    mask, positions = batch["attention_mask"], batch["position_ids"]
    assert mask.shape == (2, 1, task.length, task.length)
    assert mask.dtype == torch.bool
    for i in range(task.length):
        visible = set(mask[1, 0, i].nonzero().flatten().tolist())
        assert visible == (set(range(i + 1)) if i < task.prompt_length else {*range(task.prompt_length), i})
    assert positions[1].tolist() == [*range(12), 12, 12, 12, 12, 13]


def test_orders_carry_no_information_about_the_answer() -> None:
    # In 4,000 prompts each of the 16 places of the prompt holds each root equally often: 500 +- 22.
    task = ChainTask()
    batch = task.batches(4000, seed=2, train=False)(0)
    edges = batch["input_ids"][:, : task.prompt_length].view(-1, task.n_nodes, 3)
    roots_by_place = (edges[..., 0] == edges[..., 1]).sum(0)
    assert roots_by_place.sum() == 2 * 4000
    assert (roots_by_place - 500).abs().max() < 5 * 22
    roots_by_name = torch.bincount(edges[..., 0][edges[..., 0] == edges[..., 1]], minlength=task.n_nodes)
    assert (roots_by_name - 500).abs().max() < 5 * 22


def test_accuracy_counts_roots_by_distance() -> None:
    task = ChainTask()
    batch = task.batches(6, seed=0, train=False)(0)
    roots = batch["step_labels"][..., -1]
    assert accuracy_by_hops(roots, batch) == dict.fromkeys(range(8), (12, 12))
    two_hops = batch["step_labels"][..., 1]  # a model that follows two edges
    assert accuracy_by_hops(two_hops, batch) == {hops: (12 if hops <= 2 else 0, 12) for hops in range(8)}
    trained = task.batches(6, seed=0)(0)
    assert set(accuracy_by_hops(trained["step_labels"][..., -1], trained)) == set(range(6))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_nodes": 15}, "multiple of n_chains=2"),
        ({"n_nodes": 2}, "at least 2 nodes"),
        ({"max_train_hops": 8}, r"\[1, 7\]"),
        ({"max_train_hops": 0}, r"\[1, 7\]"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChainTask(**sizes)


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        ChainTask().batches(0, seed=0)
