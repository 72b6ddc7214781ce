"""Reference for training recursive heads: decoding, one chain at a time."""

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mull import MullForCausalLM
from mull.model.executor import run_layer
from mull.model.inputs import LayerInputs


def decoded_states(model: MullForCausalLM, hidden: Tensor, embedded: Tensor, n_steps: int = 3) -> Tensor:
    """States of each step, drafting from each position in turn with a growing cache of transformers.

    Args:
        model: A model with recursive heads.
        hidden: ``[1, T, D]``: final-normed states of one document.
        embedded: ``[1, T + n_steps, D]``: embeddings of its tokens, then zeros.
        n_steps: Steps of each chain.

    Returns:
        ``[1, T, n_steps, D]``.
    """
    read = hidden
    if model.mtp_config.native_hidden_state == "stream":
        read = hidden / model.model.norm(torch.ones(hidden.shape[-1], dtype=hidden.dtype))
    chains = []
    for i in range(hidden.shape[1]):
        cache = DynamicCache()

        def run(block: nn.Module, h: Tensor, _k: int, cache: DynamicCache = cache) -> Tensor:
            first = cache.get_seq_length(block.self_attn.layer_idx)
            position_ids = torch.arange(first, first + h.shape[1])[None]
            rotary = model.model.rotary({"full_attention"}, h, position_ids)
            mask = None
            if model.config.text_config._attn_implementation == "eager" and h.shape[1] > 1:
                mask = torch.full((h.shape[1], h.shape[1]), torch.finfo(h.dtype).min, dtype=h.dtype).triu(1)[None, None]
            return run_layer(
                block, "full_attention", h, LayerInputs("sdpa", {"full_attention": mask}, rotary, position_ids), cache
            )

        state = model.mtp_heads(1, read[:, : i + 1], embedded[:, 1 : i + 2], run)[:, -1:]  # keys of true states up to i
        chain = [state]
        for k in range(2, 1 + n_steps):
            state = model.mtp_heads(k, state, embedded[:, i + k : i + k + 1], run)
            chain.append(state)
        chains.append(torch.stack(chain, 2))
    return torch.cat(chains, 1)
