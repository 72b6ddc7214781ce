"""The only loop over decoder layers. Training, prefill, decoding, verification and searches all go through `run`.

Four parts, each with one job: the *path* says which layers may run, the *policy* decides which tokens run a visit, the *memory*
keeps what a visit leaves, and the *layer inputs* hold what all layers share. The layers are those of transformers.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mull.model.families import keeps_documents_apart
from mull.model.inputs import LayerInputs, PartialInputs
from mull.model.memory import ActiveTokens, CallMemory, CallSlot, LayerKeys, LayerMemory, Memory, Merge
from mull.model.path import Visit
from mull.model.policy import NOTHING, Extra, Policy
from mull.runtime.distributed import global_sum

OnVisit = Callable[[Visit, Tensor, Tensor], None]
"""Called after a visit with the states ``[B, T, D]`` before and after it."""


def run(
    layers: Sequence[nn.Module] | nn.ModuleList,
    kinds: Sequence[str],
    path: Iterable[Visit],
    h: Tensor,
    inputs: LayerInputs,
    memory: Memory | None = None,
    policy: Policy | None = None,
    *,
    first: int = 0,
    on_visit: OnVisit | None = None,
) -> Tensor:
    """Run tokens along a path.

    Args:
        layers: Decoder layers of transformers.
        kinds: Kind of each of them.
        path: Visits, of the path that the memory's slots belong to. Without a memory, any part of one: visits leave nothing but
            `h`, so a pass can stop between two visits and go on from there, along several paths.
        h: States ``[B, T, D]`` that enter the first visit.
        inputs: What the layers share.
        memory: What the visits remember; None where nothing precedes or follows the call.
        policy: Which tokens run a visit; None runs all of them. A token that does not run keeps its state, and offers to other
            tokens what `Policy.stop` says.
        first: Number of the first visit, where `path` is a later part of the memory's.
        on_visit: Called after each visit, also after one that no token ran.

    Returns:
        States ``[B, T, D]``.

    Raises:
        ValueError: a policy, and an attention that cannot run a part of the tokens.
    """
    if policy is not None:
        inputs.require_masks()
        memory = memory or CallMemory(policy.stop)
    chosen = Chosen(inputs, True)
    for number, visit in enumerate(path, first):
        layer, kind, before = layers[visit.layer], kinds[visit.layer], h
        running = True if policy is None else policy.active(visit, h)
        if running is True and memory is not None and memory.has_gaps(number):
            running = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)  # gaps take a mask per row to hide
        if running is not chosen.running:
            chosen = Chosen(inputs, running)
        own, extra = None, NOTHING
        if policy is not None:
            extra = policy.extra(visit)
            if policy.stop == "own_state":
                own = keys_of_idle(layer, kind, h, inputs, chosen.others(), extra)
            h = _keep_pace(layer, kind, h, inputs, chosen.any(kind))
        if chosen.any(kind):
            part = chosen.part(kind)
            active = None if part is None else part.active
            slot = None if memory is None else memory.slot(number, visit, active, own)
            h = run_layer(layer, kind, h, inputs, slot, part, extra)
        else:
            assert memory is not None
            memory.pass_over(number, visit, h, own)
        if policy is not None:
            h = policy.weigh(visit, before, h)
        if on_visit is not None:
            on_visit(visit, before, h)
    return h


class Chosen:
    """The tokens that run a visit, looked up once for all visits that the same tokens run.

    Args:
        inputs: What the layers share.
        running: The answer of `Policy.active`.
    """

    def __init__(self, inputs: LayerInputs, running: Tensor | bool) -> None:
        self.running = running
        self._inputs = inputs
        self._parts: dict[bool, PartialInputs | None] = {}
        self._others: Chosen | None = None

    def others(self) -> "Chosen":
        """The tokens that do not run it."""
        if self._others is None:
            running = ~self.running if isinstance(self.running, Tensor) else not self.running
            self._others = Chosen(self._inputs, running)
        return self._others

    def any(self, kind: str) -> bool:
        """Whether a token runs a layer of this kind."""
        part = None if self.running is False else self.part(kind)
        return self.running is not False and (part is None or part.active.any)

    def part(self, kind: str) -> PartialInputs | None:
        """The inputs of a layer of this kind for these tokens; None if they are all tokens."""
        recurrent = kind == "linear_attention"
        if recurrent not in self._parts:
            active = None
            if isinstance(self.running, Tensor):
                active = ActiveTokens.of(self.running)
            if recurrent:
                active = self._inputs.recurrent_tokens(active)
            self._parts[recurrent] = None if active is None else PartialInputs(self._inputs, active)
        return self._parts[recurrent]


def _keep_pace(layer: nn.Module, kind: str, h: Tensor, inputs: LayerInputs, runs: bool) -> Tensor:
    """Run a sharded layer on one token, in vain, if no token of this rank runs it and one of another rank does.

    Ranks gather a sharded layer's weights together, and its gradients.
    """
    if not isinstance(layer, FSDPModule):
        return h
    anywhere = global_sum(torch.tensor(float(runs), device=h.device)) > 0
    if runs or not anywhere:
        return h
    rotary = inputs.rotary[kind]
    first = None if rotary is None else tuple(part[:1, :1] for part in rotary)
    out = layer(h[:1, :1], **_options(None, None, inputs.position_ids[:1, :1], first))
    return h + 0 * out.sum()


class _Taken(Exception):  # noqa: N818 - it ends a layer early, and is no error
    """The layer has handed over what was wanted of it."""


class KeyTaker(CallSlot):
    """Takes the keys and values of tokens that do not run a visit."""

    def __init__(self) -> None:
        self.taken: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """End the layer, unless gradients are wanted: sharded layers have to reach their own end then."""
        self.taken = key_states, value_states
        # Compiled code leaves out by itself what nothing reads.
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise _Taken
        return self.taken


def keys_of_idle(
    layer: nn.Module, kind: str, h: Tensor, inputs: LayerInputs, idle: Chosen, extra: Extra = NOTHING
) -> LayerKeys | None:
    """Keys and values that an attention layer projects from the states of tokens that do not run it.

    Args:
        layer: The decoder layer.
        kind: Its kind.
        h: States ``[B, T, D]``.
        inputs: What the call's layers share.
        idle: These tokens.
        extra: See `Policy.extra`.

    Returns:
        None if there are none, and for recurrent layers, which have no keys.

    Raises:
        ValueError: the layer is sharded over ranks.
    """
    if kind == "linear_attention" or not idle.any(kind):
        return None
    if isinstance(layer, FSDPModule):
        raise ValueError("stop='own_state' needs whole layers, and these are sharded over ranks: use 'last_kv'.")
    taker, part = KeyTaker(), idle.part(kind)
    if part is None:
        options = _options(taker, None, inputs.position_ids, inputs.rotary[kind], extra)
    else:
        options = _options(taker, None, part.position_ids, part.rotary(kind), _of(part.active, extra))
    with contextlib.suppress(_Taken):
        # Past gradient checkpointing, which would run the layer again.
        nn.Module.__call__(layer, h if part is None else part.active.gather(h), **options)
    assert taker.taken is not None, "attention layers store their keys"
    return LayerKeys(*taker.taken) if part is None else Merge(part.active, None)(*taker.taken)._replace(known=None)


def run_layer(
    layer: nn.Module,
    kind: str,
    h: Tensor,
    inputs: LayerInputs,
    slot: LayerMemory | None = None,
    part: PartialInputs | None = None,
    extra: Extra = NOTHING,
) -> Tensor:
    """Run one decoder layer of transformers, unmodified, for one visit.

    Args:
        layer: The decoder layer.
        kind: Its kind.
        h: States ``[B, T, D]``.
        inputs: What the call's layers share.
        slot: The visit's memory, or None.
        part: The inputs of the tokens that run, for a recurrent layer `LayerInputs.recurrent_tokens`; None for all of them.
        extra: See `Policy.extra`.

    Returns:
        States ``[B, T, D]``; those of tokens that do not run are what they were.
    """
    if isinstance(slot, CallSlot):
        # Gradient checkpointing would otherwise drop the slot; this one may be read again.
        layer._can_checkpoint_with_cache = True  # type: ignore[assignment]
    if kind == "linear_attention":
        return _run_recurrent(layer, h, inputs, slot, None if part is None else part.active, extra)
    if part is None:
        options = _options(slot, inputs.masks[kind], inputs.position_ids, inputs.rotary[kind], extra)
        # Positional: reentrant checkpointing only follows positional inputs.
        return layer(h, **options)
    assert slot is not None
    mask = part.mask(kind, slot.n_keys, slot.known)
    options = _options(slot, mask, part.position_ids, part.rotary(kind), _of(part.active, extra))
    return part.active.scatter(h, layer(part.active.gather(h), **options))


def _of(active: ActiveTokens, extra: Extra) -> Extra:
    return {name: active.gather(value) for name, value in extra.items()}


def _options(
    slot: LayerMemory | None, mask: Any, position_ids: Tensor, rotary: Any, extra: Extra = NOTHING
) -> dict[str, Any]:
    return {
        "attention_mask": mask,
        "position_ids": position_ids,
        "past_key_values": slot,
        "use_cache": slot is not None and not isinstance(slot, CallSlot),
        "position_embeddings": rotary,
        **extra,
    }


def _run_recurrent(
    layer: nn.Module,
    h: Tensor,
    inputs: LayerInputs,
    slot: LayerMemory | None,
    active: ActiveTokens | None,
    extra: Extra,
) -> Tensor:
    """Run a recurrent layer on the sequence of the tokens that run, of each document by itself."""
    documents = inputs.documents
    padding = inputs.masks["linear_attention"]
    if documents is not None and slot is None and active is None and keeps_documents_apart(h.device):
        # One row without padding; kernels start anew at each border.
        flat = {name: value.flatten(0, 1)[None] for name, value in extra.items()}
        options = _options(None, padding, inputs.position_ids, inputs.rotary["linear_attention"], flat)
        options |= {"cu_seq_lens_q": documents.borders, "seq_idx": documents.number}
        return layer(h.flatten(0, 1)[None], **options).view_as(h)
    if documents is not None:
        extra = {name: documents.split(value) for name, value in extra.items()}
    options = _options(slot, padding, inputs.position_ids, inputs.rotary["linear_attention"], extra)
    if slot is not None:
        options["cache_view"] = slot
    rows = h if documents is None else documents.split(h)
    if active is None:
        rows = layer(rows, **options)
    else:
        chosen = active if documents is None else ActiveTokens.of(documents.split(active.mask))
        # The tokens that run form a sequence without gaps; where a row ends before others, the slot keeps the rest out of its
        # states.
        options["attention_mask"] = None if padding is None else chosen.gather(padding)
        options.update(_of(chosen, extra))
        rows = chosen.scatter(rows, layer(chosen.gather(rows), **options))
    return rows if documents is None else documents.join(rows, h)
