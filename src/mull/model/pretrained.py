"""What `MullModel` and `MullForCausalLM` share."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mull.model.configs import HaltingConfig, Stop, etd_from_dict, gates_from_dict, layer_kinds, mtp_from_dict
from mull.model.configuration import MullConfig
from mull.model.growing_cache import SlotCache
from mull.model.path import MAX_ITERATIONS, Path, check_path, from_layers
from mull.model.policy import Policy
from mull.runtime.arguments import require_count


class MullPreTrainedModel(PreTrainedModel):
    """A model of transformers with a `MullConfig`, and the paths that it allows."""

    config: MullConfig
    config_class = MullConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Recurrent states can be rolled back exactly (mull.model.growing_cache), so assisted generation is allowed on hybrids too.
    _is_stateful = False

    def __init__(self, config: MullConfig) -> None:
        super().__init__(config)
        assert isinstance(config.text_config, PreTrainedConfig), "transformers turns a dictionary into a configuration"
        self.text_config = config.text_config
        self.kinds = layer_kinds(self.text_config)
        self.etd_config = etd_from_dict(config.etd)
        self.mtp_config = mtp_from_dict(config.mtp)
        self.gated_config = gates_from_dict(config.gated_attention)
        if self.etd_config is not None:
            self.etd_config.check_depth(self.text_config.num_hidden_layers, self.kinds)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for its own decorators in this module's source; the backbone decides for itself.
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, device_map: Any = None) -> Any:
        """Refuse pipeline parallelism before any weight is loaded: every stage would loop over layers of its own.

        Raises:
            ValueError: ``pp_size`` above 1.
        """
        asked = distributed_config if isinstance(distributed_config, dict) else vars(distributed_config or cls)
        if (asked.get("pp_size") or 1) > 1:
            raise ValueError(
                "pp_size is not supported: the layers of a loop are on one device. Use tp_size or fsdp_size."
            )
        return super().prepare_distribute_model(distributed_config, device_map)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # In custom code transformers passes over modules without parameters of their own: the heads, and the experts' routers.
        super()._initialize_weights(module, is_custom_code=False)

    def new_cache(self, offloading: bool = False) -> SlotCache:
        """An empty cache for calls of this model that share a past."""
        return SlotCache(self.text_config, offloading)

    def get_layer_stats(self) -> dict[str, int]:
        """How many decoder layers are Gated DeltaNet, have attention, and there are; looped layers count once.

        Attention is gated in Qwen3-Next, in Qwen3.5 and so in converted models.
        """
        recurrent = self.kinds.count("linear_attention")
        attention = len(self.kinds) - recurrent
        return {"deltanet_layers": recurrent, "gated_attention_layers": attention, "total_layers": len(self.kinds)}

    def stop_of(self, decides: Policy | HaltingConfig | None) -> Stop | None:
        """What tokens leave behind in a call in which this decides who runs a visit; with None, in one in which all do."""
        if decides is not None:
            return decides.stop
        return None if self.etd_config is None else self.etd_config.stop

    def path(self, think_iterations: int | None = None, path: Sequence[Sequence[int]] | None = None) -> Path:
        """The path that a call with these arguments takes.

        Args:
            think_iterations: Passes through the think block; None is the configuration's number.
            path: Explicit visits ``(layer, occurrence)`` instead.

        Raises:
            TypeError: iterations that are no whole number, or a path that is no list of pairs.
            ValueError: both are given, iterations outside 1 to 1000 or without a think block, or a path that does not fit.
        """
        n_layers = self.text_config.num_hidden_layers
        if n_layers != len(self.kinds):
            raise ValueError(
                f"The model was built with {len(self.kinds)} layers and has {n_layers} now, as after layer_replication of PEFT. "
                "Leave that out: mull repeats layers by think_iterations or path."
            )
        if path is not None:
            if think_iterations is not None:
                raise ValueError(
                    "Give think_iterations or path, not both: a path already says how often each layer runs."
                )
            return check_path(path, n_layers)
        if self.etd_config is None:
            if think_iterations is not None:
                require_count("think_iterations", think_iterations, 1, MAX_ITERATIONS)
            if think_iterations not in (None, 1):
                raise ValueError(
                    f"think_iterations={think_iterations} needs a think block, and this model has none: load it with "
                    "etd=ETDConfig(...) (--etd 7,4,5 on the command line), or wrap it with wrap_transformer_with_etd."
                )
            return from_layers(range(n_layers))
        return self.etd_config.path(self.iterations(think_iterations))

    def iterations(self, think_iterations: int | None) -> int:
        """Passes through the think block of a call with this argument; 1 for a model without one.

        Raises:
            TypeError: no whole number.
            ValueError: iterations outside 1 to 1000.
        """
        if self.etd_config is None:
            return 1
        if think_iterations is None:
            return self.etd_config.max_think_iterations
        require_count("think_iterations", think_iterations, 1, MAX_ITERATIONS)
        return think_iterations
