"""Draw completions from a model's whole distribution, for objectives that learn from its own samples."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mull.ops.cross_entropy import accurate
from mull.runtime.distributed import global_sum

if TYPE_CHECKING:
    from mull.model.causal_lm import MullForCausalLM


@torch.no_grad()
def sample(
    model: "MullForCausalLM",
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    end_ids: Tensor,
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one completion per row from the model's whole distribution.

    ``model.generate`` would apply the checkpoint's generation settings, such as top-k or a repetition penalty, and the loop of
    `mull.generate` does not wait for other ranks. All ranks must call this, and all draw until the last row of any rank has
    ended: ranks that share weights have to run equally many layers.

    Args:
        model: In evaluation mode.
        input_ids: Prompts ``[N, P]``, padded on the left.
        attention_mask: ``[N, P]``, 0 at padding.
        end_ids: Tokens that end a completion.
        pad_id: Fills rows after their end.
        max_new_tokens: Longest completion.
        temperature: Divides the logits.
        iterations: Think iterations; default as in `ETDConfig`.
        generator: Source of the draws, on the model's device; None is torch's global one.

    Returns:
        Completions ``[N, L]``; L is the length of this rank's longest.
    """
    cache = model.new_cache()
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    tokens, columns = input_ids, []
    for _ in range(max_new_tokens):
        logits = model(
            tokens, attention_mask=attention_mask, past_key_values=cache, logits_to_keep=1, think_iterations=iterations
        ).logits[:, -1]
        p = torch.softmax(logits.to(accurate(logits.dtype)) / temperature, -1)
        tokens = torch.where(ended[:, None], pad_id, torch.multinomial(p, 1, generator=generator))
        if not bool(ended.all()):
            columns.append(tokens)
        attention_mask = torch.cat([attention_mask, torch.ones_like(tokens)], 1)
        ended |= torch.isin(tokens[:, 0], end_ids)
        if not bool(global_sum((~ended).sum())):
            break
    return torch.cat(columns, 1)
