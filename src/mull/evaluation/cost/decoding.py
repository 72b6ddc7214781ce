"""The least time that decoding can take on a machine.

A decoding step is a series of products of a few rows with large matrices. Each takes as long as reading its matrix or computing
the product, whichever is longer (the roofline of Williams et al., 2009). Drafting can pay because verifying several drafts
reads the same matrices as decoding one token.

Measured times are longer than predicted ones. The prediction leaves out kernel launches, the interpreter, norms, activations,
rotary embeddings, softmax and sampling, and it assumes that a matrix is read while its product is computed. Weights that fit
into a cache are read faster than `measure_machine` reports unless it is given their size.
"""

import functools
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from torch import nn

from mull.evaluation.cost.count import Machine, mixing_flops, products, visible_keys, whole_layer
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import layer_kinds
from mull.model.memory import head_width
from mull.model.path import Path

STATE_BYTES = 4
"""Bytes of an entry of a delta rule's state, which is kept in fp32."""


def step_seconds(
    model: MullForCausalLM,
    machine: Machine,
    *,
    context: int,
    n_rows: int = 1,
    n_tokens: int = 1,
    path: Path | None = None,
) -> float:
    """Least time of one pass of the trunk and the unembedding.

    ``Σ over visits (Σ over matrices max(bytes / bandwidth, FLOPs / flops) + mixing) + unembedding``

    * Every visit reads its layer's weights again.
    * If n tokens choose k of E routed experts evenly and independently, the layer reads ``E (1 - (1 - k / E)^n)`` experts and
      computes k per token.
    * Attention reads ``context`` keys and values of every row, or those of the window, and computes ``4 · heads · head width``
      FLOPs per key and token. A delta rule reads and writes its state once, and computes ``6 d_k d_v`` per value head and
      token.

    `n_tokens` is 1 to decode, and more to verify drafts. The model may be on the meta device. The dtype of its weights, in which
    the machine must be measured, decides how many bytes are read.
    """
    kinds = layer_kinds(model.config.get_text_config())

    @functools.cache
    def visit_seconds(layer: int) -> float:
        seconds = _product_seconds(model, whole_layer(model, layer), machine, n_rows * n_tokens)
        return seconds + _mixing_seconds(kinds[layer], model, machine, n_rows, n_tokens, context)

    unembedding = _product_seconds(model, model.lm_head, machine, n_rows * n_tokens)
    return sum((visit_seconds(layer) for layer, _ in model.path(path=path)), unembedding)


def draft_seconds(
    model: MullForCausalLM, machine: Machine, *, length: int, context: int, n_rows: int = 1, window: int | None = None
) -> float:
    """Least time to draft with the model's heads.

    * Pointwise heads run at one position each. All drafts share one pass of the unembedding.
    * Parallel heads with a decoder layer each run over the window. All drafts share one pass of the unembedding.
    * Sequential heads each run over the window. Every draft takes its own pass of the unembedding.
    * A recursive head runs over the window once and at one position in each further step. Every draft takes its own pass of the
      unembedding.

    `window` counts the positions that a head with a cache recomputes at the start of a round, because it saw drafts there. By
    default it is ``length + 1``, which a round leaves if all its drafts were accepted.

    Raises:
        ValueError: the model has no heads, or fewer than `length` and they are not recursive.
    """
    heads = model.mtp_heads
    if heads is None:
        raise ValueError("The model has no heads to draft with: load it with mtp=MTPConfig(...).")
    if not heads.recursive and length > heads.n_heads:
        raise ValueError(
            f"length={length} must not exceed the model's {heads.n_heads} heads, which draft one token each."
        )
    if length == 0:
        return 0.0
    n_window = 1 if heads.pointwise else (length + 1 if window is None else window)

    def run(module: nn.Module, n_tokens: int) -> float:
        seconds = _product_seconds(model, module, machine, n_rows * n_tokens)
        if heads.pointwise:
            return seconds
        return seconds + _mixing_seconds("full_attention", model, machine, n_rows, n_tokens, context)

    def unembed(n_tokens: int) -> float:
        return _product_seconds(model, model.lm_head, machine, n_rows * n_tokens)

    if heads.recursive:
        module = heads.heads[0]
        return run(module, n_window) + (length - 1) * run(module, 1) + length * unembed(1)
    modules = sum(run(module, n_window) for module in list(heads.heads)[:length])
    return modules + (length * unembed(1) if heads.sequential else unembed(length))


def expected_tokens(acceptance: Sequence[float], length: int) -> float:
    """Expected tokens per round and row: the accepted drafts and one more.

    ``1 + Σ_{k ≤ length} Π_{j ≤ k} α_j``. If all α are equal, this is ``(1 - α^(length + 1)) / (1 - α)``, equation 1 of
    arXiv:2211.17192.

    Args:
        acceptance: Probability that the draft at each position, from the first, is accepted given that all before it were.
        length: Tokens drafted.

    Raises:
        ValueError: `acceptance` has fewer than `length` positions.
    """
    if length > len(acceptance):
        raise ValueError(f"length={length} needs the acceptance of as many positions, but {len(acceptance)} are given.")
    return 1 + sum(accumulate(acceptance[:length], mul))


def predicted_speedup(
    model: MullForCausalLM,
    machine: Machine,
    acceptance: Sequence[float],
    *,
    length: int,
    context: int,
    n_rows: int = 1,
    path: Path | None = None,
) -> float:
    """Tokens per second with drafts relative to plain decoding, if both take the least time.

    ``expected_tokens · step(1) / (step(length + 1) + draft(length))``. Comparing a measured speed-up with it shows what the
    costs listed at the top of this file take. Arguments are those of `step_seconds`, `draft_seconds` and `expected_tokens`.
    """
    plain = step_seconds(model, machine, context=context, n_rows=n_rows, path=path)
    verify = step_seconds(model, machine, context=context, n_rows=n_rows, n_tokens=length + 1, path=path)
    draft = draft_seconds(model, machine, length=length, context=context, n_rows=n_rows)
    return expected_tokens(acceptance, length) * plain / (verify + draft)


def _product_seconds(model: MullForCausalLM, module: nn.Module, machine: Machine, n_tokens: int) -> float:
    """Least time to multiply `n_tokens` rows with the parameters of a module."""
    total = 0.0
    for _, parameter, share in products(module, model.config.get_text_config()):
        n_read = parameter.numel() * (1 - (1 - share) ** n_tokens)  # experts that no token chooses are not read
        total += machine.seconds(n_read * parameter.element_size(), 2 * parameter.numel() * share * n_tokens)
    return total


def _mixing_seconds(
    kind: str, model: MullForCausalLM, machine: Machine, n_rows: int, n_tokens: int, context: int
) -> float:
    """Least time to read keys and values, or a recurrent state, and to compute with them."""
    config = model.config.get_text_config()
    if kind == "linear_attention":
        # Decoding advances the state token by token, so the chunks of training do not apply.
        state = n_rows * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
        return machine.seconds(2 * state * STATE_BYTES, 6 * state * n_tokens)
    n_values = n_rows * visible_keys(kind, config, context) * config.num_key_value_heads * head_width(config)
    n_bytes = 2 * n_values * model.lm_head.weight.element_size()
    return machine.seconds(n_bytes, n_rows * n_tokens * mixing_flops(kind, config, context))
