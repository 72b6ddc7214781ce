"""What a user can get wrong in a call of the model is refused in one sentence, never answered with other numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor
from transformers import AutoModel, DynamicCache, GPT2Config, GPT2LMHeadModel

import mull
from mull import ETDConfig, MullConfig, MullForCausalLM, from_layers, wrap_transformer_with_etd

Ids = Callable[..., Tensor]


@pytest.fixture
def model() -> MullForCausalLM:
    return wrap_transformer_with_etd(tiny("qwen3"), SPLIT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think_iterations": 0}, "think_iterations=0 must be at least 1"),
        ({"think_iterations": 2, "path": from_layers([0])}, "think_iterations or path, not both"),
        ({"path": [(8, 0)]}, "visits layer 8, but the model has layers 0 to 7"),
        ({"output_attentions": True}, "output_attentions=True is not supported"),
        ({"inputs_embeds": torch.zeros(2, 5, 32)}, "exactly one of input_ids and inputs_embeds"),
        ({"past_key_values": DynamicCache()}, "DynamicCache, which has one slot per layer.*model.new_cache"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask covers 4 tokens, but there are 5"),
        ({"attention_mask": torch.ones(2, 1, 5)}, "attention_mask has 3 dimensions"),
    ],
)
def test_calls_that_contradict_themselves(
    model: MullForCausalLM, options: dict[str, object], message: str, ids: Ids
) -> None:
    with pytest.raises(ValueError, match=message):
        model(ids(2, 5), **options)


def test_unknown_keywords_are_refused(model: MullForCausalLM, ids: Ids) -> None:
    with pytest.raises(TypeError, match="think_iteratons"):
        model(ids(2, 5), think_iteratons=2)
    with pytest.raises(ValueError, match="think_iteratons"):
        model.generate(ids(2, 5), think_iteratons=2)


def test_iterations_need_a_think_block(ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny("qwen3"), None)
    with pytest.raises(ValueError, match="think_iterations=2 needs a think block"):
        model(ids(2, 5), think_iterations=2)


def test_a_mask_over_pairs_of_tokens_is_refused_where_layers_cannot_obey(ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny("qwen3_5"), SPLIT)
    with pytest.raises(ValueError, match="Recurrent layers cannot obey a 4-dimensional attention_mask"):
        model(ids(2, 5), attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))


def test_unknown_architectures_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=17))
    message = (
        "Architecture 'gpt2' is not supported. Supported are llama, olmo3, olmo_hybrid, qwen3, qwen3_5_moe_text, qwen3_5_text, "
        "qwen3_next"
    )
    with pytest.raises(ValueError, match=message):
        wrap_transformer_with_etd(other, SPLIT)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        mull.from_pretrained(str(tmp_path), etd=SPLIT)


def test_a_missing_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing-here"):
        mull.from_pretrained(str(tmp_path / "nothing-here"))


def test_wrapping_twice_and_wrapping_a_headless_model_are_refused(model: MullForCausalLM) -> None:
    with pytest.raises(ValueError, match="wrapped already"):
        wrap_transformer_with_etd(model, SPLIT)
    with pytest.raises(ValueError, match="Qwen3Model has no language-model head"):
        wrap_transformer_with_etd(AutoModel.from_config(tiny("qwen3").config), SPLIT)


def test_a_stored_configuration_with_unknown_fields_is_refused() -> None:
    config = MullConfig(text_config=tiny("qwen3").config, etd={**SPLIT.model_dump(), "n_thnk_layers": 3})
    with pytest.raises(ValueError, match="n_thnk_layers"):
        MullForCausalLM(config)


def test_random_weights_are_those_of_the_backbones_own_initialisation() -> None:
    """Qwen3-Next scales by 1 + w: a generic initialisation would set its norms to twice the identity."""
    model = MullForCausalLM(MullConfig(text_config=tiny("qwen3_next-dense").config, etd=SPLIT.model_dump()))
    assert not model.model.norm.weight.any()


def test_a_static_cache_is_refused(model: MullForCausalLM, ids: Ids) -> None:
    with pytest.raises(
        ValueError, match="cache_implementation='static' has one slot per layer. Use one of None, 'dynamic'"
    ):
        model.generate(ids(1, 5), cache_implementation="static", max_new_tokens=2)


def test_nothing_is_trained_without_an_iteration_to_go_back_through(model: MullForCausalLM, ids: Ids) -> None:
    with pytest.raises(ValueError, match="backprop_iterations=0 must be at least 1"):
        model.hidden_states(ids(1, 5), backprop_iterations=0)


def test_hidden_states_follow_the_path(model: MullForCausalLM, ids: Ids) -> None:
    out = model(ids(2, 5), path=from_layers([0, 3, 3]), output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids(2, 5)))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


def test_the_loss_is_the_mean_over_shifted_labels(model: MullForCausalLM, ids: Ids) -> None:
    tokens = ids(2, 7)
    labels = tokens.clone()
    labels[0, :4] = -100
    out = model(tokens, labels=labels, think_iterations=2)
    log_p = out.logits.log_softmax(-1)
    targets = [-log_p[row, t, labels[row, t + 1]] for row in range(2) for t in range(6) if labels[row, t + 1] != -100]
    torch.testing.assert_close(out.loss, torch.stack(targets).mean())
    total = model(tokens, labels=labels, think_iterations=2, num_items_in_batch=5).loss
    torch.testing.assert_close(total, torch.stack(targets).sum() / 5)


def test_labels_without_a_target_are_refused(model: MullForCausalLM, ids: Ids) -> None:
    labels = torch.full((2, 7), -100)
    labels[:, 0] = 5
    with pytest.raises(ValueError, match=r"No label of shape \(2, 7\) is a target"):
        model(ids(2, 7), labels=labels)
    assert model(ids(2, 7), labels=labels, num_items_in_batch=4).loss == 0


@pytest.mark.parametrize("logits_to_keep", [1, 3, torch.tensor([0, 4])], ids=["last", "last-three", "indices"])
def test_logits_are_computed_where_asked(model: MullForCausalLM, logits_to_keep: int | Tensor, ids: Ids) -> None:
    full = model(ids(2, 5)).logits
    kept = model(ids(2, 5), logits_to_keep=logits_to_keep).logits
    index = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
    torch.testing.assert_close(kept, full[:, index])


def test_resized_embeddings_change_the_backbone(model: MullForCausalLM) -> None:
    model.resize_token_embeddings(120)
    assert model.lm_head.weight.shape[0] == model.model.embed_tokens.weight.shape[0] == 120
    assert model(torch.tensor([[110]])).logits.shape[-1] == 120


def test_the_etd_configuration_is_readable_after_wrapping(model: MullForCausalLM) -> None:
    assert model.config.etd == SPLIT.model_dump()
    assert ETDConfig(**model.config.etd) == SPLIT
