"""What outlives a call of `generate`: measured costs and acceptance, and decoders whose rounds were prepared."""

import weakref
from dataclasses import dataclass, replace

import torch

from mull.decoding.draft_length import DraftLength
from mull.decoding.rounds import Compilation, Decoder, Preparation, Size
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import HaltingConfig
from mull.model.path import Path
from mull.model.routing import Routed
from mull.ops.sampling import Sampling

KEPT_DECODERS = 2
"""Prepared decoders that a model keeps, with their buffers: the latest. Enough for calls with and without drafts in turns."""

CAPACITY_STEP = 256
"""Buffers of prepared decoders are rounded up to this many tokens, so that calls of similar lengths share them."""


@dataclass(frozen=True)
class DecoderKey:
    """Calls with equal keys cost the same per round; with equal `sampling` and `weights`, too, they share a decoder."""

    path: Path
    n_rows: int
    max_drafts: int
    dtype: torch.dtype
    compiled: Compilation | None
    halting: tuple[HaltingConfig, int] | None = None
    routed: Routed = "not"
    sampling: Sampling | None = None
    weights: tuple[int, ...] = ()
    """Addresses of the parameters, where compiled code and captured graphs read them; and where they are packed into the code,
    a hash of each."""


class DecoderCache:
    """Draft-length policies and prepared decoders of one model."""

    def __init__(self, model: MullForCausalLM | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self.policies: dict[DecoderKey, DraftLength] = {}
        self.decoders: dict[DecoderKey, Decoder] = {}

    def __reduce__(self) -> tuple[type["DecoderCache"], tuple[()]]:
        """Deep copies and pickles of a model begin with an empty cache: decoders would refer to the original."""
        return type(self), ()

    @classmethod
    def of(cls, model: MullForCausalLM) -> "DecoderCache":
        """The cache of a model, made at its first call."""
        # An attribute of the model, because decoders refer to the model: both are then freed together, which a table of models
        # would prevent. Set past nn.Module, whose attributes are tensors and modules. A shallow copy has the attributes of the
        # original, whose cache is not its own.
        cache = vars(model).get("_decoder_cache")
        if not isinstance(cache, DecoderCache) or cache._model is None or cache._model() is not model:
            cache = vars(model)["_decoder_cache"] = cls(model)
        return cache

    def policy(self, key: DecoderKey) -> DraftLength:
        """What earlier calls learned about drafts."""
        return self.policies.setdefault(key, DraftLength(key.max_drafts))

    def decoder(self, model: MullForCausalLM, key: DecoderKey, sampling: Sampling, n_tokens: int) -> Decoder:
        """A decoder for rows of up to `n_tokens`: a new one, or if rounds are prepared, one of an earlier call."""
        capacity = n_tokens + Size.slack(key.max_drafts)
        if not Preparation.of(model, key.compiled, key.halting is not None or key.routed != "not"):
            size = Size(key.n_rows, capacity, key.max_drafts)
            return Decoder(model, key.path, sampling, size, halting=key.halting, routed=key.routed)
        weights = tuple(parameter.data_ptr() for parameter in model.parameters())
        if key.compiled == "max":
            # An optimizer, or an adapter that is merged, changes weights in place.
            weights += tuple(
                int(torch.hash_tensor(parameter.detach()).view(torch.int64)) for parameter in model.parameters()
            )
        key = replace(key, sampling=sampling, weights=weights)
        kept = self.decoders.get(key)
        if kept is not None and kept.size.capacity >= capacity:
            return kept
        rounded = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        size = Size(key.n_rows, rounded, key.max_drafts)
        decoder = self.decoders[key] = Decoder(model, key.path, sampling, size, key.compiled, key.halting, key.routed)
        while len(self.decoders) > KEPT_DECODERS:
            del self.decoders[next(iter(self.decoders))]
        return decoder
