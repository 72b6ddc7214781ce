"""What decoding must cost, from what a machine computes and reads per second.

A decoding step is a series of products of few rows with large matrices. Each takes as long as reading its matrix, or as computing
the product, whichever is longer (the roofline of Williams et al., 2009). Verifying some drafts reads the same matrices as one
token does; that is why drafting can pay.

What is left out makes the measured time longer than the predicted one: launching kernels and the work of the interpreter, norms,
activations, rotary embeddings, softmax, sampling, and that one product cannot be read while another is computed. Weights that fit
into a cache are read faster than `measure_machine` finds, unless it is told their size.

The matrices are those that `mull.evaluation.cost.training` counts. Attention here reads the keys that are there, and delta
rules advance their
state token by token, as decoding does.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from torch import nn

from mull.evaluation.cost.count import Machine
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import layer_kinds
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
    """Least time of a pass of the trunk and the unembedding: of decoding with one token per row, of verifying with more.

    ``Σ over visits (Σ over matrices max(bytes / bandwidth, FLOPs / flops) + mixing) + unembedding``

    * Every visit reads its layer's weights again.
    * Of routed experts, n tokens that choose k of E evenly and independently read ``E (1 - (1 - k / E)^n)``, and compute k each.
    * Attention reads ``context`` keys and values of every row, or those of the window, and computes ``4 · heads · head width``
      FLOPs per key and token. A delta rule reads and writes its state once, and computes ``6 d_k d_v`` per value head and token.

    Args:
        model: Its weights are not read; the meta device will do. Their dtype counts.
        machine: Measured in the same dtype.
        context: Tokens of a row that attention looks at.
        n_rows: Rows.
        n_tokens: Tokens per row.
        path: Visits; None for those that the model is configured for.
    """
    config = model.config.get_text_config()
    kinds = layer_kinds(config)
    total = _matrices_seconds([model.lm_head], machine, n_rows * n_tokens, config)
    per_layer: dict[int, float] = {}
    for layer, _ in model.path(path=path):
        if layer not in per_layer:
            matrices = _matrices_seconds([model.model.layers[layer]], machine, n_rows * n_tokens, config)
            per_layer[layer] = matrices + _mixing_seconds(kinds[layer], model, machine, n_rows, n_tokens, context)
        total += per_layer[layer]
    return total


def draft_seconds(
    model: MullForCausalLM,
    machine: Machine,
    *,
    length: int,
    context: int,
    n_rows: int = 1,
    window: int | None = None,
) -> float:
    """Least time to draft with the model's heads.

    * Pointwise heads run at one position each, and one pass of the unembedding serves all drafts.
    * Parallel heads with a decoder layer run over the window, each; one pass of the unembedding serves all drafts.
    * Sequential heads run over the window, each; every draft takes a pass of the unembedding of its own.
    * A recursive head runs over the window once and at one position in each further step; unembedding as before.

    Args:
        model: With heads; its weights are not read.
        machine: Measured in the dtype of the weights.
        length: Tokens to draft; 0 costs nothing.
        context: Tokens of a row that attention looks at.
        n_rows: Rows.
        window: Positions that a head with a cache runs over again at the start of a round, to replace what it made of drafts;
            None for ``length + 1``, those that a round in which all drafts were accepted has made known.

    Raises:
        ValueError: the model has no heads, or fewer than `length` that are not recursive.
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
    config = model.config.get_text_config()
    n_window = 1 if heads.pointwise else (length + 1 if window is None else window)

    def run(module: nn.Module, n_tokens: int) -> float:
        matrices = _matrices_seconds([module], machine, n_rows * n_tokens, config)
        if heads.pointwise:
            return matrices
        return matrices + _mixing_seconds("full_attention", model, machine, n_rows, n_tokens, context)

    def unembed(n_tokens: int) -> float:
        return _matrices_seconds([model.lm_head], machine, n_rows * n_tokens, config)

    if heads.recursive:
        module = heads.heads[0]
        return run(module, n_window) + (length - 1) * run(module, 1) + length * unembed(1)
    modules = sum(run(module, n_window) for module in list(heads.heads)[:length])
    return modules + (length * unembed(1) if heads.sequential else unembed(length))


def expected_tokens(acceptance: Sequence[float], length: int) -> float:
    """Tokens that a round emits per row on average: the accepted drafts and one more.

    ``1 + Σ_{k ≤ length} Π_{j ≤ k} α_j``; with one α for all, ``(1 - α^(length + 1)) / (1 - α)``, equation 1 of arXiv:2211.17192.

    Args:
        acceptance: Chance that the draft at each position, from the first, is accepted if all before it were.
        length: Tokens drafted.

    Raises:
        ValueError: acceptance of fewer positions than are drafted.
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
    """Tokens per second with drafts over those of plain decoding, if both take the least time.

    ``expected_tokens · step(1) / (step(length + 1) + draft(length))``. Divided by a measured speed-up it says how much is lost to
    what the module's docstring lists.

    Args:
        model: With heads; its weights are not read.
        machine: Measured in the dtype of the weights.
        acceptance: See `expected_tokens`.
        length: Tokens to draft per round.
        context: Tokens of a row that attention looks at.
        n_rows: Rows, which are assumed to accept independently of what a round costs.
        path: Visits; None for those that the model is configured for.
    """
    plain = step_seconds(model, machine, context=context, n_rows=n_rows, path=path)
    verify = step_seconds(model, machine, context=context, n_rows=n_rows, n_tokens=length + 1, path=path)
    draft = draft_seconds(model, machine, length=length, context=context, n_rows=n_rows)
    return expected_tokens(acceptance, length) * plain / (verify + draft)


def _matrices_seconds(modules: Iterable[nn.Module], machine: Machine, n_tokens: int, config: Any) -> float:
    """Products of `n_tokens` rows with all matrices, convolution kernels and the experts that they choose."""
    total = 0.0
    for part in (part for module in modules for part in module.modules()):
        for parameter in part.parameters(recurse=False):
            size = parameter.numel()
            if parameter.ndim == 2 or isinstance(part, nn.Conv1d):
                total += machine.seconds(size * parameter.element_size(), 2 * size * n_tokens)
            elif parameter.ndim == 3:
                chosen = config.num_experts_per_tok / parameter.shape[0]
                read = size * (1 - (1 - chosen) ** n_tokens)
                total += machine.seconds(read * parameter.element_size(), 2 * size * chosen * n_tokens)
    return total


def _mixing_seconds(
    kind: str, model: MullForCausalLM, machine: Machine, n_rows: int, n_tokens: int, context: int
) -> float:
    """Reading of keys and values, or of a recurrent state, and the products with it."""
    config = model.config.get_text_config()
    if kind == "linear_attention":
        state = n_rows * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
        return machine.seconds(2 * state * STATE_BYTES, 6 * state * n_tokens)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_keys = min(context, config.sliding_window) if kind == "sliding_attention" else context
    n_bytes = 2 * n_rows * n_keys * config.num_key_value_heads * width * model.lm_head.weight.element_size()
    return machine.seconds(n_bytes, 4 * n_rows * n_tokens * n_keys * config.num_attention_heads * width)
