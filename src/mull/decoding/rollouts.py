"""Draw completions from a model's own distribution, for objectives that learn from its samples and for evaluations."""

from collections.abc import Sequence

from torch import Tensor

from mull.decoding.generate import generate
from mull.model.causal_lm import MullForCausalLM


def rollouts(
    model: MullForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    seeds: Sequence[int],
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    iterations: int | None = None,
    draft_length: int = 0,
    compiled: bool = False,
) -> Tensor:
    """Draw one completion per row from the model's whole distribution, with the decoder of `mull.generate`.

    The checkpoint's generation settings, such as top-k or a repetition penalty, are not read, and all tokens run all think
    iterations, as they do in training. A row depends on its prompt and its seed, not on the rows beside it (up to the rounding of
    the model's products, which may depend on the size of a batch), nor on the number of ranks. Drafts change which tokens
    a seed draws, not their distribution. With several ranks that share the weights, all must call this alike.

    Args:
        model: In evaluation mode.
        input_ids: Prompts ``[N, P]``.
        attention_mask: ``[N, P]``, 0 at padding.
        seeds: Of the draws, one for each row.
        end_ids: Tokens that end a completion.
        pad_id: Fills rows after their end.
        max_new_tokens: Longest completion.
        temperature: Divides the logits.
        iterations: Think iterations; default as in `ETDConfig`.
        draft_length: Tokens that the model's heads draft per round. It is fixed, because a length that follows measured times
            would make the draws depend on them.
        compiled: Compile a round, see `mull.generate`.

    Returns:
        Completions ``[N, L]``, their end included; L is the length of the longest.

    Raises:
        ValueError: as in `mull.generate`.
    """
    output = generate(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        draft="mtp" if draft_length else None,
        draft_length=draft_length or None,
        temperature=temperature,
        seed=list(seeds),
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
        think_iterations=iterations,
        adaptive=False,
        compile=compiled,
    )
    return output.sequences[:, input_ids.shape[1] :]
