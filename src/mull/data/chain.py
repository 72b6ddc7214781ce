"""Chain to root: a generated task whose questions need one step of thought per hop.

A prompt lists the edges of a few chains in random order, ``source destination ;``. Finding a node's successor takes one look-up,
finding its root as many look-ups as it has hops. The root of a chain points to itself, so thinking longer than needed keeps the
answer. Then every node is asked once::

    7 2 ; 0 7 ; 2 2 ; 5 0 ; ...   0 1 2 3 ... 15  end
    '------- edges -------'      '-- queries --'

A query is the node's own token. It sees the prompt and itself, and all queries have the same position, so that one prompt serves
all of them and they cannot help each other.

Training never sees held-out depth: its batches have no label at queries with more than `max_train_hops` hops, and the answers to
shallower questions never pass through such nodes.

Shapes: B batch, T tokens of the prompt, the queries and the end, N nodes, C chains, L nodes per chain, K = L - 1 hops.

Source:
    Variable chains as in arXiv:2502.17416 (depth-k variable assignment), reduced to pure look-up. Supervising every iteration
    with the node that it should have reached follows SIM-CoT (arXiv:2509.20317) and LOTUS (arXiv:2606.31779).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mull.ops.targets import IGNORED

TOKENS_PER_EDGE = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainTask:
    """The sizes of the task. Nodes are tokens ``0 .. n_nodes - 1``.

    A guess among all nodes is right with probability ``1 / n_nodes``, a guess among the roots with ``1 / n_chains``. A model that
    follows exactly ``j`` edges answers the questions with at most ``j`` hops. With the default sizes and one edge per iteration,
    that is 14.3 % of the questions with 1 to 7 hops at one iteration, and 71.4 % at five.

    Raises:
        ValueError: chains of fewer than two nodes or of unequal length, or no depth left to train on.
    """

    n_nodes: int = 16
    """Nodes of one prompt."""

    n_chains: int = 2
    """Chains of equal length that the nodes form; each has a root."""

    max_train_hops: int = 5
    """Hops of the deepest question that training supervises. Evaluation also asks deeper ones."""

    def __post_init__(self) -> None:
        if self.n_chains < 1 or self.n_nodes % self.n_chains or self.n_nodes < 2 * self.n_chains:
            raise ValueError(
                f"n_nodes={self.n_nodes} must be a multiple of n_chains={self.n_chains} with at least 2 nodes per "
                "chain: all chains have the same length, and a chain of one node has nothing to follow."
            )
        if not 1 <= self.max_train_hops <= self.max_hops:
            raise ValueError(
                f"max_train_hops={self.max_train_hops} must lie in [1, {self.max_hops}]: "
                f"a chain of {self.max_hops + 1} nodes has at most {self.max_hops} hops."
            )

    @property
    def max_hops(self) -> int:
        """Hops of the deepest question, from the far end of a chain to its root."""
        return self.n_nodes // self.n_chains - 1

    @property
    def separator_id(self) -> int:
        """Token between two edges."""
        return self.n_nodes

    @property
    def end_id(self) -> int:
        """Token that ends a row. Labels are not shifted, so the label of the last query is at this token."""
        return self.n_nodes + 1

    @property
    def vocab_size(self) -> int:
        """Node tokens, the separator and the end."""
        return self.n_nodes + 2

    @property
    def prompt_length(self) -> int:
        """Tokens of the edges, and the position of every query."""
        return TOKENS_PER_EDGE * self.n_nodes

    @property
    def length(self) -> int:
        """Tokens of a row: the edges, one query per node, the end."""
        return self.prompt_length + self.n_nodes + 1

    def batches(self, batch_size: int, seed: int, train: bool = True) -> Callable[[int], dict[str, Tensor]]:
        """Endless batches, each a pure function of its number.

        Args:
            batch_size: Prompts of a batch; each asks `n_nodes` questions.
            seed: Not negative. Training and evaluation batches of one seed are different prompts.
            train: Leave the questions with more than `max_train_hops` hops without labels.

        Returns:
            A function from a batch number to a dictionary of

            * ``input_ids [B, T]``, ``position_ids [B, T]``;
            * ``attention_mask [B, 1, T, T]`` boolean, True where a token may attend;
            * ``labels [B, T]``: the root, one position *after* each query, because labels are not shifted;
            * ``step_labels [B, T, K]``: *at* each query the node that is ``1 .. K`` hops away. Iteration ``j`` (from 1)
              is supervised with ``[..., j - 1]``; the last entry is the root;
            * ``hops [B, T]``: at each labelled query its distance to the root, 0 for the root itself; -1 elsewhere.

        Raises:
            ValueError: `batch_size` is not positive, or `seed` is negative.
        """
        if batch_size < 1 or seed < 0:
            raise ValueError(f"batch_size={batch_size} must be positive, and seed={seed} must not be negative.")
        position_ids, attention_mask = self._positions(), self._attention_mask()

        def batch(index: int) -> dict[str, Tensor]:
            chains, edge_order = self._draw(np.random.default_rng((seed, index, int(train))), batch_size)
            return {
                **self._encode(chains, edge_order, self.max_train_hops if train else self.max_hops),
                "position_ids": position_ids.expand(batch_size, -1),
                "attention_mask": attention_mask.expand(batch_size, -1, -1, -1),
            }

        return batch

    def _draw(self, rng: np.random.Generator, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Random chains [B, C, L], root first, and the order [B, N] in which the prompt lists the edges."""
        nodes = np.tile(np.arange(self.n_nodes), (2, batch_size, 1))
        chains, edge_order = rng.permuted(nodes, axis=-1)
        return chains.reshape(batch_size, self.n_chains, -1), edge_order

    def _encode(self, chains: np.ndarray, edge_order: np.ndarray, max_labelled_hops: int) -> dict[str, Tensor]:
        """Write the drawn chains as tokens and labels."""
        batch_size, n_nodes, start = len(chains), self.n_nodes, self.prompt_length
        depth = np.arange(self.max_hops + 1)
        reached = np.maximum(depth[:, None] - np.arange(1, self.max_hops + 1), 0)  # (L, K) depth after 1 .. K hops
        by_chain = chains[:, :, reached].reshape(batch_size, n_nodes, -1)  # (B, C * L, K)
        place = chains.reshape(batch_size, n_nodes).argsort(-1)  # (B, N) where in the chains a node is
        targets = np.take_along_axis(by_chain, place[..., None], axis=1)  # (B, N, K)
        hops = place % (self.max_hops + 1)
        labelled = hops <= max_labelled_hops

        input_ids = np.full((batch_size, self.length), self.end_id)
        edges = input_ids[:, :start].reshape(batch_size, n_nodes, TOKENS_PER_EDGE)
        edges[..., 0] = edge_order
        edges[..., 1] = np.take_along_axis(targets[..., 0], edge_order, axis=1)
        edges[..., 2] = self.separator_id
        input_ids[:, start:-1] = np.arange(n_nodes)

        step_labels = np.full((batch_size, self.length, self.max_hops), IGNORED)
        step_labels[:, start:-1] = np.where(labelled[..., None], targets, IGNORED)
        labels = np.full((batch_size, self.length), IGNORED)
        labels[:, start + 1 :] = step_labels[:, start:-1, -1]
        query_hops = np.full((batch_size, self.length), -1)
        query_hops[:, start:-1] = np.where(labelled, hops, -1)
        arrays = {"input_ids": input_ids, "labels": labels, "step_labels": step_labels, "hops": query_hops}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _positions(self) -> Tensor:
        """Position ids [1, T]: those of the prompt rise, every query has the next one, the end the one after."""
        prompt = torch.arange(self.prompt_length)
        queries = torch.full((self.n_nodes,), self.prompt_length)
        return torch.cat([prompt, queries, torch.tensor([self.prompt_length + 1])])[None]

    def _attention_mask(self) -> Tensor:
        """Boolean mask [1, 1, T, T]: the prompt is causal, every later token sees the prompt and itself."""
        prompt_mask = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        prompt_mask[:, self.prompt_length :] = False
        return (prompt_mask | torch.eye(self.length, dtype=torch.bool))[None, None]


def accuracy_by_hops(predictions: Tensor, batch: Mapping[str, Tensor]) -> dict[int, tuple[int, int]]:
    """Count right answers by the number of hops that a question needs.

    Args:
        predictions: Predicted token *at* each position [B, T]; only labelled queries count.
        batch: A batch of `ChainTask.batches`.

    Returns:
        Distance to the root -> (right answers, questions), for the distances that occur. Exclude 0 from averages: a model that
        copies its input answers the question for a root.
    """
    hops = batch["hops"]
    right = predictions == batch["step_labels"][..., -1]
    return {
        distance: (int(right[hops == distance].sum()), int((hops == distance).sum()))
        for distance in hops.unique().tolist()
        if distance >= 0
    }
