"""Gates on the output of attention, in layers that other models may share."""

import copy
from functools import partial
from types import MethodType

from torch import nn
from transformers import PreTrainedConfig

from mull.layers.output_gate import OutputGate
from mull.model.configs import GatedAttentionConfig, layer_kinds
from mull.model.families import require_supported
from mull.model.memory import head_width

ATTENTION, OUTPUT_MAP = "self_attn", "o_proj"


class AttentionGates(nn.ModuleDict):
    """The gates of a model, by the number of their layer.

    Args:
        config: Which layers have gates, and how many.
        text_config: Of the backbone.

    Raises:
        ValueError: the architecture has gates of its own, or a layer has no softmax attention.
    """

    def __init__(self, config: GatedAttentionConfig, text_config: PreTrainedConfig) -> None:
        sizes = text_config.hidden_size, text_config.num_attention_heads, head_width(text_config)
        per_element = config.granularity == "element"
        super().__init__({str(layer): OutputGate(*sizes, per_element) for layer in gated_layers(config, text_config)})

    def on(self, layers: nn.ModuleList) -> nn.ModuleList:
        """Decoder layers with these gates. The weights are shared; the given layers stay as they are."""
        gated = list(layers)
        for name, gate in self.items():
            assert isinstance(gate, OutputGate)
            layer = gated[int(name)] = _twin(gated[int(name)])
            attention = _twin(layer.get_submodule(ATTENTION))
            setattr(layer, ATTENTION, attention)
            setattr(attention, OUTPUT_MAP, _twin(attention.get_submodule(OUTPUT_MAP)))
            gate.attach(attention, OUTPUT_MAP)
        return nn.ModuleList(gated)


def gated_layers(config: GatedAttentionConfig, text_config: PreTrainedConfig) -> list[int]:
    """Numbers of the layers that have gates.

    Raises:
        ValueError: as in `AttentionGates`.
    """
    if require_supported(text_config).gated_attention:
        raise ValueError(
            f"gated_attention: the attention of {text_config.model_type} gates each element of its output already, and a second "
            "gate would multiply the first. Leave gated_attention out."
        )
    softmax = [layer for layer, kind in enumerate(layer_kinds(text_config)) if kind != "linear_attention"]
    layers = softmax if config.layers is None else sorted(config.layers)
    if others := [layer for layer in layers if layer not in softmax]:
        raise ValueError(
            f"gated_attention.layers names {others[0]}, which is no layer with softmax attention. Those of this model are "
            f"{', '.join(map(str, softmax)) or 'none'}."
        )
    return layers


def _twin(module: nn.Module) -> nn.Module:
    """A module with the parameters of another, and with submodules and hooks of its own: those of the other, to begin with."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if name == "_modules" or name.endswith("_hooks") or "_hooks_" in name:
            vars(twin)[name] = copy.copy(value)
        elif isinstance(value, MethodType) and value.__self__ is module:
            vars(twin)[name] = MethodType(value.__func__, twin)
        elif isinstance(value, partial) and value.args[:1] == (module,):
            # accelerate replaces `forward` by one that is bound to the module.
            vars(twin)[name] = partial(value.func, twin, *value.args[1:], **value.keywords)
    return twin
