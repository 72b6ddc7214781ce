"""The layers that a model takes over from transformers, the parts of ours that work on them, and how both begin.

Shapes: B batch, T tokens, D model width.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init

from mull.layers.experts import ExpertGate, LoRABranches
from mull.layers.output_gate import OutputGate
from mull.layers.routers import DepthGate, LayerRouter
from mull.layers.skipping import ResidualGate, TokenScore
from mull.model.attention_gates import AttentionGates
from mull.model.configuration import MullConfig
from mull.model.families import install_recurrent_hooks, require_supported
from mull.model.fixed_cache import StaticCall
from mull.model.growing_cache import SlotCache
from mull.model.inputs import LayerInputs, fixed_layer_inputs, layer_inputs
from mull.model.pretrained import MullPreTrainedModel
from mull.model.routing import RoutedParts
from mull.model.warmup import WarmedUp


class ExitHead(nn.Linear):
    """How probably a token stops: a linear map of its think state to a logit. It starts undecided, at 0."""


class Trunk(MullPreTrainedModel):
    """Embeddings, decoder layers, final norm and rotary embeddings of a backbone, and what was added to them.

    Raises:
        ValueError: unsupported architecture, or parts that do not fit it.
    """

    def __init__(self, config: MullConfig) -> None:
        super().__init__(config)
        self._family = require_supported(self.text_config)
        # transformers looks the functions of recurrent layers up when a layer runs, so they are in place before any model runs.
        install_recurrent_hooks(self._family)
        self.adopt(AutoModel.from_config(self.text_config))
        width = self.text_config.hidden_size
        gates, etd = self.gated_config, self.etd_config
        self.attention_gates = None if gates is None else AttentionGates(gates, self.text_config)
        self.exit_head = ExitHead(width, 1) if etd and etd.halting and etd.halting.rule == "learned" else None
        self.etd = None if etd is None else RoutedParts(etd, self.layers, width)
        """Routers, token skipping and LoRA experts; None without a think block."""
        self._attach_parts()

    def adopt(self, backbone: Any) -> None:
        """Take over the layers of a backbone of transformers. The weights are shared, not copied."""
        self.embed_tokens: nn.Embedding = backbone.embed_tokens
        self.layers: nn.ModuleList = backbone.layers
        self.norm: nn.Module = backbone.norm
        self.rotary_emb: nn.Module | None = backbone.rotary_emb
        # The backbone without its parts: it knows how to initialise them, and transformers sets its implementation of attention.
        architecture: type[PreTrainedModel] = type(backbone)
        rules = architecture.__new__(architecture)
        rules.__dict__.update(backbone.__dict__)
        rules._modules = {}
        self.rules = rules
        self._attach_parts()

    def _attach_parts(self) -> None:
        gates, etd = (self._modules.get(name) for name in ("attention_gates", "etd"))  # not there yet while it is built
        if isinstance(gates, AttentionGates):
            self.layers = gates.on(self.layers)
        if isinstance(etd, RoutedParts):
            etd.attach(self.layers)

    def init_parallel_plans(self) -> None:
        """The plans of the backbone, for layers that are parts of this model now."""
        super().init_parallel_plans()
        self._pp_plan: dict[str, Any] = {}
        for name in ("_tp_plan", "_ep_plan", "_fsdp_plan"):
            setattr(self, name, {key.removeprefix("rules."): value for key, value in getattr(self, name).items()})

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in torch, with `rules` under the name of this model."""
        # By this name transformers finds how checkpoints name the weights: routed experts one by one, for example.
        yield prefix, self.rules
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if module is not self.rules:
                yield name, module

    def _init_weights(self, module: nn.Module) -> None:
        self.rules._init_weights(module)
        if isinstance(module, ExitHead):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LayerRouter):
            module.start_at_execute()
        elif isinstance(module, DepthGate):
            module.start_at_most()
        elif isinstance(module, LoRABranches):
            module.start_at_zero()
        elif isinstance(module, ExpertGate):
            module.start_at_random()
        elif isinstance(module, OutputGate):
            module.start_open()
        elif isinstance(module, (TokenScore, ResidualGate)):
            module.start()
        elif isinstance(module, WarmedUp):
            module.start_anew()

    def rotary(self, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
        """Position embeddings by kind of layer, for states ``[B, T, D]`` at `position_ids` ``[B, T]``."""
        return self._family.rotary(self.rotary_emb, kinds, h, position_ids)

    def layer_inputs(
        self,
        h: Tensor,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        cache: SlotCache | None = None,
    ) -> LayerInputs:
        """What the layers of a call share; see `mull.model.inputs.layer_inputs`."""
        return layer_inputs(self.text_config, self.rotary, h, attention_mask, position_ids, cache)

    def fixed_layer_inputs(self, h: Tensor, call: StaticCall) -> LayerInputs:
        """The same on a cache of fixed size; see `mull.model.inputs.fixed_layer_inputs`."""
        return fixed_layer_inputs(self.text_config, self.rotary, h, call)
