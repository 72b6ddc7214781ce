"""The names by which earlier documents decode with extra heads."""

import inspect
from typing import Any

from torch import Tensor

from mull.decoding.generate import GenerationStats, generate
from mull.model.causal_lm import MullForCausalLM

OPTIONS = frozenset(inspect.signature(generate).parameters) - {"model", "input_ids", "max_new_tokens", "draft"}


class MTPDecoder:
    """`mull.generate` under promised names: ``model.mtp_decoder``, and ``model.generate(..., use_speculative=...)``.

    The documents contradict each other about what decoding returns. Here each name returns what is promised where it is used:
    `generate` the tokens, and `decode`, which ``model.generate`` calls, the tokens and the statistics.

    Args:
        model: In evaluation mode.
    """

    def __init__(self, model: MullForCausalLM) -> None:
        self._model = model

    def generate(self, input_ids: Tensor, max_new_tokens: int = 100, **options: Any) -> Tensor:
        """Tokens ``[B, T + N]``, the prompts included; the options are those of `mull.generate`."""
        return self.decode(input_ids, max_new_tokens, **options)[0]

    def decode(
        self, input_ids: Tensor, max_new_tokens: int = 100, *, use_speculative: bool = True, **options: Any
    ) -> tuple[Tensor, GenerationStats]:
        """The same tokens, and how they came about. Without `use_speculative`, they are decoded one by one."""
        unknown = options.keys() - OPTIONS
        if unknown:
            raise TypeError(
                f"{', '.join(sorted(unknown))} is no option of mull.generate, which use_speculative calls: it has "
                f"{', '.join(sorted(OPTIONS))}; temperature above 0 samples. Leave use_speculative out for those of transformers."
            )
        draft: Any = "mtp" if use_speculative else None
        out = generate(self._model, input_ids, max_new_tokens=max_new_tokens, draft=draft, **options)
        return out.sequences, out.stats


MullForCausalLM.decoder_type = MTPDecoder
