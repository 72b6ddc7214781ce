"""LoRA experts in the think block: several low-rank updates of its linear maps, of which each token takes one per iteration.

A gate chooses when the token enters the block. It adds a bias to its scores to choose, and only to choose, which keeps the load
even. The layers stay those of transformers: hooks add the chosen expert's update to what a linear map gives.

Shapes: B batch, T tokens of a call, D model width, E experts.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mull.layers.experts import ExpertGate, Gates, LoRABranches
from mull.layers.routers import Prompts
from mull.model.balance import BalancedChoice
from mull.model.configs import ETDConfig, LoRAExpertConfig, Stop
from mull.model.memory import Decision
from mull.model.path import Visit
from mull.model.policy import NOTHING, Extra, Policy
from mull.runtime.distributed import world_size


class LayerExperts(nn.Module):
    """The experts of one decoder layer.

    Args:
        layer: The decoder layer; only the shapes of its maps count.
        n_experts: E.
        config: Of the experts.
    """

    def __init__(self, layer: nn.Module, n_experts: int, config: LoRAExpertConfig) -> None:
        super().__init__()
        self.paths = {path.replace(".", "_"): path for path in target_maps(layer, config.target_modules)}
        """By the name of its branches, where a map is in the layer."""
        self.maps = nn.ModuleDict()
        for name, path in self.paths.items():
            linear: Any = layer.get_submodule(path)
            self.maps[name] = LoRABranches(
                linear.in_features,
                linear.out_features,
                n_experts,
                rank=config.rank,
                scale=config.alpha / config.rank,
                dropout=config.dropout,
            )
        self._gates: Gates | None = None
        self._checkpoint: Any = None

    @property
    def keyword(self) -> str:
        """With which the layer is handed gates ``[B, T, E]`` of these experts: other models may share the layer."""
        return f"expert_gates_{id(self)}"

    def attach(self, layer: nn.Module) -> None:
        """Add the experts to the maps of a layer, in calls that hand it gates."""
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        layer.register_forward_hook(self._end, always_call=True)
        for name, path in self.paths.items():
            layer.get_submodule(path).register_forward_hook(partial(self._add, name))

    def _begin(
        self, layer: Any, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        gates = options.pop(self.keyword, None)
        self._gates = None if gates is None else Gates(gates)
        if gates is not None and getattr(layer, "gradient_checkpointing", False):
            # The backward pass runs the layer's forward again, without its hooks: it gets these gates by itself.
            self._checkpoint = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = partial(self._checkpointed, self._checkpoint, self._gates)
        return arguments, options

    def _checkpointed(self, checkpoint: Any, gates: Gates | None, forward: Any, *arguments: Any) -> Any:
        def with_gates(*again: Any) -> Any:
            before, self._gates = self._gates, gates
            try:
                return forward(*again)
            finally:
                self._gates = before

        return checkpoint(with_gates, *arguments)

    def _end(self, layer: Any, *_: Any) -> None:
        self._gates = None
        if self._checkpoint is not None:
            layer._gradient_checkpointing_func, self._checkpoint = self._checkpoint, None

    def _add(self, name: str, linear: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._gates is None:
            return None  # a call of another model, which shares this layer
        x, branches = arguments[0], self.maps[name]
        added = branches(x, self._gates)
        if added.shape != output.shape:
            raise ValueError(
                f"LoRA experts need whole linear maps, and {self.paths[name]} gives {output.shape[-1]} of "
                f"{added.shape[-1]} values: do not use tensor parallelism."
            )
        return output + added


def target_maps(layer: nn.Module, targets: Sequence[str]) -> list[str]:
    """Where in a layer the linear maps of these names are."""
    return [path for path in _linear(layer) if path.rpartition(".")[2] in targets]


class Experts(BalancedChoice):
    """The experts of a think block, their gate and its bias.

    Args:
        config: Of the think block.
        layers: Decoder layers of the model.
        width: Model width D.

    Raises:
        ValueError: no layer of the block has a linear map of the names in ``target_modules``.
    """

    def __init__(self, config: ETDConfig, layers: nn.ModuleList, width: int) -> None:
        settings = config.experts
        assert settings is not None, "a model with experts"
        super().__init__(config.n_experts, settings.balance_rate, config.expert_warmup_steps)
        self.config, self.n_experts = settings, config.n_experts
        self.gate = ExpertGate(width, self.n_experts)
        think = {str(layer): layers[layer] for layer in config.think_layers}
        self.layers = nn.ModuleDict(
            {name: LayerExperts(layer, self.n_experts, settings) for name, layer in think.items()}
        )
        if not any(isinstance(module, LoRABranches) for module in self.modules()):
            maps = {path.rpartition(".")[2]: None for layer in think.values() for path in _linear(layer)}
            raise ValueError(
                f"lora_expert.target_modules={list(settings.target_modules)}: the think block has no such linear map. It has "
                f"{', '.join(maps)}."
            )

    def attach(self, layers: nn.ModuleList) -> None:
        """Add the experts to these layers."""
        for name, experts in self.layers.items():
            assert isinstance(experts, LayerExperts)
            experts.attach(layers[int(name)])


def _linear(layer: nn.Module) -> Iterator[str]:
    return (path for path, module in layer.named_modules() if isinstance(module, nn.Linear))


class ExpertRouting(Policy):
    """The policy of one call of a model with experts. Every token runs every visit, each with its expert.

    Args:
        config: Of the think block.
        experts: The experts and their gate.
        stop: What tokens that another policy stops leave behind.
        prompts: For gates of sequences, where the prompts are.
        tokens: ``[B, T]``, False for padding; None without.
        kept: For gates of sequences, what the cache remembers: ``[B]`` experts by decision. Filled by the call that holds the
            prompt. None without a cache.
    """

    traceable = True

    def __init__(
        self,
        config: ETDConfig,
        experts: Experts,
        stop: Stop,
        prompts: Prompts | None = None,
        tokens: Tensor | None = None,
        kept: dict[Decision, Tensor] | None = None,
    ) -> None:
        self.stop = stop
        self.selections: list[Tensor] = []
        """``[B, T]`` by iteration."""
        self._config, self._experts = config, experts
        self._prompts, self._tokens, self._kept = prompts, tokens, kept
        self._trains = experts.training and torch.is_grad_enabled()
        # Frozen experts take no steps, so their warm-up would never end.
        self._draws = self._trains and experts.warms_up and any(p.requires_grad for p in experts.parameters())
        self._last: Visit | None = None
        self._gates: Tensor | None = None

    def active(self, visit: Visit, h: Tensor) -> Tensor | bool:
        """All of them. Tokens that enter the block choose."""
        if visit.layer in self._config.think_layers:
            if self._enters(visit):
                self._gates = self._choose(h)
            self._last = visit
        return True

    def extra(self, visit: Visit) -> Extra:
        """In the think block the gates of the iteration."""
        if self._gates is None or visit.layer not in self._config.think_layers:
            return NOTHING
        layer = self._experts.layers[str(visit.layer)]
        assert isinstance(layer, LayerExperts)
        return {layer.keyword: self._gates}

    def _enters(self, visit: Visit) -> bool:
        last = self._last
        if last is None or visit.layer < last.layer:
            return True
        single = self._config.n_think_layers == 1
        return single and visit.occurrence % self._config.visits_per_iteration == 0

    def _choose(self, h: Tensor) -> Tensor:
        """Gates ``[B, T, E]``, at one expert of each token 1, elsewhere 0."""
        experts, shape, decision = self._experts, h.shape[:2], ("expert", len(self.selections))
        if self._kept is not None and decision in self._kept:
            chosen = self._kept[decision][:, None].expand(shape)
            self.selections.append(chosen)
            return F.one_hot(chosen, experts.n_experts).to(h.dtype)
        logits = experts.gate(h) if self._prompts is None else self._prompts.logits(experts.gate, h)
        if self._draws:
            chosen = torch.randint(experts.n_experts, logits.shape[:-1], device=logits.device)
        else:
            chosen = (logits.detach().sigmoid() + experts.bias).argmax(-1)
        if not torch.compiler.is_compiling():
            real = chosen if self._tokens is None or self._prompts is not None else chosen[self._tokens]
            experts.count(real.flatten(), self._trains)
        # The score over itself: 1, with the score's gradient. In logarithms it cannot become 0 / 0.
        score = F.logsigmoid(logits).gather(-1, chosen[..., None])
        weights = torch.zeros_like(logits).scatter(-1, chosen[..., None], (score - score.detach()).exp())
        if self._prompts is not None:
            if self._kept is not None:
                self._kept[decision] = chosen
            chosen, weights = chosen[self._prompts.sequences], weights[self._prompts.sequences]
        self.selections.append(chosen)
        return weights.to(h.dtype)

    def weigh(self, visit: Visit, before: Tensor, after: Tensor) -> Tensor:
        """The same states. Where ranks train together, every rank has a gradient for every expert: it may have run none."""
        if not self._trains or world_size() == 1 or visit.layer != self._config.think_layers[-1]:
            return after
        touched = torch.stack([parameter.sum() for parameter in self._experts.parameters()]).sum()
        return after + 0 * touched.to(after.dtype)

    def metrics(self) -> dict[str, Any]:
        """``expert_selections``: ``[B, T]`` numbers of experts for each iteration."""
        return {"expert_selections": self.selections}
