"""Claim: code written for transformers' models gets what it asks for from a mull model, or a sentence that says why not."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from conftest import EXACT, SPLIT, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, DynamicCache, GenerationConfig
from transformers.distributed import configuration_utils as transformers_parallel

import mull
from mull import ETDConfig, MTPConfig, MullConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.ops.targets import targets_of
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.step import DistributedConfig, make_stage

Ids = Callable[..., Tensor]
Exact = Callable[..., Any]
HEADS = MTPConfig(num_predict_tokens=2, mtp_head_type="mlp")


def wrapped(family: str = "qwen3", mtp: MTPConfig | None = None, **changes: Any) -> MullForCausalLM:
    return wrap_transformer_with_etd(tiny(family, **changes), SPLIT, mtp)


# --- Configuration ----------------------------------------------------------------------------------------------------------

FIELDS = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "head_dim",
]


def test_fields_of_the_backbone_are_read_and_set_in_the_configuration(family: str, tmp_path: Path, ids: Ids) -> None:
    model = wrapped(family)
    for name in FIELDS:
        assert getattr(model.config, name, None) == getattr(model.config.text_config, name, None)
    model.config.use_cache = False
    assert model(ids(1, 5)).past_key_values is None
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not set(FIELDS) & set(saved), "stored once, in text_config"
    assert saved["text_config"]["use_cache"] is False
    assert MullConfig.from_pretrained(tmp_path).to_dict() == model.config.to_dict()
    with pytest.raises(AttributeError, match="n_layer"):
        _ = model.config.n_layer


@pytest.mark.parametrize("tied", [False, True])
def test_tying_in_the_configuration_is_kept(tied: bool, tmp_path: Path) -> None:
    config = wrapped(tie_word_embeddings=not tied).config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_the_configuration_asks_for_hidden_states(ids: Ids) -> None:
    model = wrapped()
    model.config.output_hidden_states = True
    assert len(model(ids(1, 5), think_iterations=1).hidden_states) == 9
    assert model(ids(1, 5), output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = False
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True
    for part in (model, model.model):
        with pytest.raises(ValueError, match="attention weights are not collected"):
            part(ids(1, 5))
        with pytest.raises(ValueError, match="attention weights are not collected"):
            part(ids(1, 5), output_attentions=True)


def test_some_of_the_hidden_states_may_be_asked_for(ids: Ids) -> None:
    model, tokens = wrapped(), ids(1, 5)
    every = model(tokens, think_iterations=2, output_hidden_states=True).hidden_states
    for asked, kept in (([0, 3, -1, 99], {0, 3, 12}), (-2, {11}), ((99,), set())):
        some = model(tokens, think_iterations=2, output_hidden_states=asked).hidden_states
        assert {number for number, state in enumerate(some) if state is not None} == kept
        assert all(torch.equal(some[number], every[number]) for number in kept)
        assert len(some) == len(every) == 13


@pytest.mark.parametrize(
    "load", [mull.from_pretrained, MullForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained]
)
def test_fields_may_be_given_while_loading(load: Callable[..., Any], tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    model = load(tmp_path, use_cache=False, dtype=torch.bfloat16)
    assert model.config.text_config.use_cache is False
    assert model.dtype == torch.bfloat16


def test_no_backbone_is_made_up(tmp_path: Path) -> None:
    tiny("qwen3").save_pretrained(tmp_path)
    for make in (
        MullConfig,
        lambda: MullConfig.from_pretrained(tmp_path),
        lambda: MullForCausalLM.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"needs text_config.*mull\.from_pretrained"):
            make()


def test_a_process_without_mull_finds_out_what_to_install(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    assert "pip install mull" in json.loads((tmp_path / "config.json").read_text())["requires"]
    code = f"from transformers import AutoModelForCausalLM as A; import mull; A.from_pretrained({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- Missing weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retrofitted", [False, True])
@pytest.mark.parametrize(
    ("family_name", "part"), [("qwen3", "layers.3."), ("qwen3_next-moe", "mlp.gate."), ("qwen3_5", "A_log")]
)
def test_missing_weights_are_initialised_or_refused(
    family_name: str, part: str, retrofitted: bool, tmp_path: Path
) -> None:
    (wrapped(family_name) if retrofitted else tiny(family_name)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if part not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for parameter in mull.from_pretrained(str(tmp_path)).parameters():
        assert parameter.abs().max() < 100
    with pytest.raises(ValueError, match=rf"lacks \d+ of the weights that .* such as model\.layers.*{part}"):
        mull.from_pretrained(str(tmp_path), allow_missing=False)


def test_heads_that_a_checkpoint_lacks_are_no_missing_weights(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    assert mull.from_pretrained(str(tmp_path), mtp=HEADS, allow_missing=False).mtp_heads is not None


# --- Training by others -----------------------------------------------------------------------------------------------------


def test_trainers_that_call_base_model_and_lm_head_train_the_looped_model(ids: Ids) -> None:
    """As SFT and DPO of TRL do."""
    model, tokens = wrapped().train(), ids(2, 12)
    for base in (model.base_model, model.get_decoder()):
        logits = model.get_output_embeddings()(base(tokens, use_cache=False).last_hidden_state[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        torch.testing.assert_close(loss, model(tokens, labels=tokens).loss)


def test_trainers_that_call_base_model_may_not_leave_heads_untrained(ids: Ids) -> None:
    model = wrapped(mtp=HEADS).train()
    with pytest.raises(ValueError, match="extra heads would stay untrained"):
        model.base_model(ids(2, 12))
    with torch.no_grad():
        model.base_model(ids(2, 12))
    assert model.mtp_heads is not None
    model.mtp_heads.requires_grad_(False)
    model.base_model(ids(2, 12))


@pytest.mark.parametrize(
    "extra",
    [
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_position_ids": False, "return_seq_idx": True},
    ],
    ids=str,
)
@pytest.mark.latin(3, "family", "extra")
def test_flattened_batches_are_documents_apart(family: str, extra: dict[str, bool], exact: Exact, ids: Ids) -> None:
    model = wrap_transformer_with_etd(exact(family), SPLIT)
    documents = [ids(1, n, seed=n)[0].tolist() for n in (5, 1, 9)]
    batch = DataCollatorWithFlattening(**extra)([{"input_ids": document} for document in documents])
    logits = model(**batch).logits[0]
    apart = [model(torch.tensor([document])).logits[0] for document in documents]
    torch.testing.assert_close(logits, torch.cat(apart), atol=EXACT, rtol=0)


def test_documents_that_are_described_twice_must_agree(ids: Ids) -> None:
    model, tokens = wrapped(), ids(1, 6)
    borders = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="restart at other tokens"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), cu_seq_lens_q=borders)
    with pytest.raises(ValueError, match="contradict each other"):
        model(tokens, attention_mask=torch.ones_like(tokens), cu_seq_lens_q=borders)
    with pytest.raises(ValueError, match="a batch of one row, and there are 2"):
        model(ids(2, 6), cu_seq_lens_q=borders)


def test_shifted_labels_are_labels(ids: Ids) -> None:
    tokens = ids(2, 9)
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    model = wrapped()
    assert torch.equal(model(tokens, shift_labels=shifted).loss, model(tokens, labels=tokens).loss)
    with pytest.raises(ValueError, match="is a target"):
        model(tokens, shift_labels=torch.full_like(tokens, -100))
    with pytest.raises(ValueError, match="Extra heads predict further tokens"):
        wrapped(mtp=HEADS)(tokens, shift_labels=shifted)


def test_keywords_are_obeyed_or_refused_by_name(ids: Ids) -> None:
    model, tokens = wrapped(), ids(2, 9)
    assert torch.equal(model(tokens, token_type_ids=torch.zeros_like(tokens)).logits, model(tokens).logits)
    for name in ("think_iteration", "is_causal", "output_attention"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            model(tokens, **{name: 2})
    with pytest.raises(ValueError, match="num_items_in_batch=-3 must be positive"):
        model(tokens, labels=tokens, num_items_in_batch=-3)
    with pytest.raises(NotImplementedError, match="Continuous batching"):
        model.generate_batch([[3, 4, 5]])


@pytest.mark.parametrize("family_name", ["qwen3_next-moe", "qwen3_5-moe"])
def test_the_balancing_loss_of_experts_is_that_of_transformers(family_name: str, ids: Ids) -> None:
    base = tiny(family_name, output_router_logits=True, router_aux_loss_coef=1.0).train()
    model, tokens = wrap_transformer_with_etd(base, SPLIT), ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    theirs = base(tokens, attention_mask=mask, labels=tokens)
    ours = model(tokens, attention_mask=mask, labels=tokens, think_iterations=1)
    assert torch.equal(ours.aux_loss, theirs.aux_loss)
    assert torch.equal(ours.loss, theirs.loss)
    assert len(model(tokens, think_iterations=3).router_logits) == len(theirs.router_logits) + 2 * SPLIT.n_think_layers
    without = model(tokens, attention_mask=mask, labels=tokens, think_iterations=1, output_router_logits=False)
    torch.testing.assert_close(without.loss + theirs.aux_loss, theirs.loss)
    ours.aux_loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_objectives_of_mull_balance_experts_too(ids: Ids) -> None:
    base = tiny("qwen3_next-moe", output_router_logits=True, router_aux_loss_coef=1.0)
    model, tokens = wrap_transformer_with_etd(base, None).train(), ids(2, 9)
    stage = make_stage(model, NextToken(IterationSampling(maximum=1)), DistributedConfig())
    output = stage(stage.plan_step([{"input_ids": tokens, "labels": tokens}]), 0)
    torch.testing.assert_close(output.sum / output.weight, model(tokens, labels=tokens).loss)
    assert output.metrics["balancing_loss"] > 1


# --- Several devices --------------------------------------------------------------------------------------------------------


def test_the_plans_of_the_backbone_place_the_unembedding_too(family: str) -> None:
    base = tiny(family)
    tp_plan, fsdp_plan = dict(base.tp_plan), dict(base.fsdp_plan)
    model = wrap_transformer_with_etd(base, SPLIT)
    assert (model.tp_plan, model.fsdp_plan) == (tp_plan, fsdp_plan)


def test_pipeline_stages_are_refused(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    assert not wrapped().supports_pp_plan
    for config in (transformers_parallel.DistributedConfig(pp_size=2), {"pp_size": 2}):
        with pytest.raises(ValueError, match="pp_size is not supported"):
            AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=config)


def test_extra_heads_read_a_sharded_unembedding(ids: Ids) -> None:
    model, tokens = wrapped(mtp=HEADS), ids(2, 9)
    expected = model(tokens, labels=tokens).mtp_loss
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(weight)
        hidden = model.hidden_states(tokens)
        targets = targets_of(tokens, None, 3)
        coefficients = (
            (targets >= 0) / (targets >= 0).sum((0, 1)).clamp(min=1) * torch.tensor([0.0, *HEADS.head_weights[1:]])
        )
        loss, _ = model.head_losses(hidden, tokens, targets, coefficients)
        loss.backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(loss, expected)
    assert model.lm_head.weight.grad.to_local().abs().sum() > 0


# --- Masks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_four_dimensions_are_obeyed_or_refused(attention: str, ids: Ids) -> None:
    model, tokens = wrapped(), ids(2, 8)
    model.set_attn_implementation(attention)
    visible = torch.ones(8, 8, dtype=torch.bool).tril()
    visible[4:, :4] = False
    visible = visible.expand(2, 1, 8, 8)
    positions = torch.arange(8).remainder(4)[None]
    expected = model(tokens, position_ids=positions).logits
    for mask in (visible, torch.zeros(2, 1, 8, 8).masked_fill(~visible, torch.finfo(torch.float32).min)):
        actual = model(tokens, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    for wrong in (visible.long(), visible.float(), visible.half()):
        with pytest.raises(ValueError, match=r"give attention_mask\.bool"):
            model(tokens, attention_mask=wrong)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(tokens, attention_mask=visible[..., :5])


@pytest.mark.parametrize("family_name", ["olmo3", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_a_cached_call_with_a_mask_is_exported(family_name: str, exact: Exact, ids: Ids) -> None:
    model = wrap_transformer_with_etd(exact(family_name), SPLIT)

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            logits: Tensor = self.model(tokens, attention_mask=mask, use_cache=True).logits
            return logits

    tokens, mask = ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    exported = torch.export.export(Call(), (tokens, mask), strict=False).module()
    mask[1, :4] = 0
    actual, expected = exported(tokens, mask), Call()(tokens, mask)
    torch.testing.assert_close(actual[mask == 1], expected[mask == 1], atol=EXACT, rtol=0)


# --- Generation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assistant", ["qwen3", "olmo3", "qwen3_5"])
def test_a_mull_model_drafts_for_another(assistant: str, ids: Ids) -> None:
    base, prompt = tiny("olmo3", seed=1), ids(1, 9)
    plain = base.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        base.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=wrapped(assistant)), plain
    )


@pytest.mark.parametrize("route", [{"think_iterations": 3}, {"path": [(layer, 0) for layer in range(8)]}], ids=str)
def test_a_model_that_does_not_loop_drafts_for_mull(route: dict[str, Any], ids: Ids) -> None:
    model, prompt = wrapped(), ids(1, 9)
    plain = model.generate(prompt, max_new_tokens=12, do_sample=False, **route)
    drafted = model.generate(prompt, max_new_tokens=12, do_sample=False, assistant_model=tiny("qwen3"), **route)
    assert torch.equal(drafted, plain)


@pytest.mark.parametrize("negative", [False, True])
def test_guidance_takes_the_path_of_the_call(negative: bool, ids: Ids) -> None:
    options: dict[str, Any] = {"negative_prompt_ids": ids(2, 5, seed=1)} if negative else {}
    options |= {"max_new_tokens": 6, "do_sample": False, "guidance_scale": 2.5}
    base, prompt = tiny("qwen3"), ids(2, 9)
    expected = base.generate(prompt, **options)
    assert torch.equal(wrap_transformer_with_etd(base, SPLIT).generate(prompt, think_iterations=1, **options), expected)


def test_generate_takes_the_tokenizer_that_stop_strings_need(ids: Ids) -> None:
    model, prompt = wrapped(), ids(1, 9)
    text = model.generate(prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False, tokenizer=object()), text)


def test_calls_that_fail_change_nothing(ids: Ids) -> None:
    model, prompt = wrapped(), ids(1, 9)
    before, text = model.config.to_dict(), model.generate(prompt, max_new_tokens=6, do_sample=False)
    with pytest.raises(ValueError, match="assistant_early_exit is not supported"):
        model.generate(prompt, max_new_tokens=6, assistant_early_exit=3)
    with pytest.raises(ValueError, match="use_mtp is not supported"):
        model.generate(prompt, max_new_tokens=6, use_mtp=True)
    with pytest.raises(ValueError, match="exceed the model's 256 positions"):
        model.generate(prompt, max_new_tokens=248, do_sample=False)
    assert model.config.to_dict() == before
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), text)
    limit = GenerationConfig(max_new_tokens=247, min_new_tokens=247, do_sample=False)
    assert model.generate(prompt, generation_config=limit).shape == (1, 256)


def test_a_cache_with_a_slot_per_layer_is_refused(ids: Ids) -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="Prefix tuning makes caches of this kind"):
        model(ids(1, 3), past_key_values=DynamicCache())


# --- Adapters and offloading ------------------------------------------------------------------------------------------------


def test_peft_knows_what_to_adapt() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra eval")
    adapted = peft.get_peft_model(wrapped(), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert {name.split(".")[-1] for name in adapted.targeted_module_names} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(wrapped("qwen3_5"), peft.LoraConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("etd", [None, SPLIT], ids=["no split", "split"])
def test_layers_that_peft_copies_are_refused(etd: ETDConfig | None, ids: Ids) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra eval")
    model = wrap_transformer_with_etd(tiny("qwen3"), etd)
    options = peft.LoraConfig(task_type="CAUSAL_LM", layer_replication=[[0, 2], [1, model.config.num_hidden_layers]])
    adapted = peft.get_peft_model(model, options)
    with pytest.raises(ValueError, match="Leave that out: mull repeats layers by"):
        adapted(ids(1, 3))


@pytest.mark.parametrize("mtp", [None, HEADS], ids=["no heads", "heads"])
def test_an_adapter_on_the_unembedding_is_in_every_loss(mtp: MTPConfig | None, ids: Ids) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra eval")
    model, tokens = wrapped(mtp=mtp), ids(2, 9)
    options = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, options)
    hidden = model.hidden_states(tokens)
    targets = targets_of(tokens, None, 1)
    valid = targets >= 0
    loss, _ = model.head_losses(hidden, tokens, targets, valid / valid.sum())
    loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad and "lora" in name}
    adapted.zero_grad()
    expected = F.cross_entropy(
        model.lm_head(model.hidden_states(tokens)[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected)
    expected.backward()
    assert gradients
    for name, p in adapted.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], p.grad, atol=1e-6, rtol=1e-4)


def test_weights_that_accelerate_offloaded_are_refused_too(ids: Ids) -> None:
    model = accelerate.cpu_offload(wrapped(), execution_device="cpu")
    with pytest.raises(ValueError, match="weights are offloaded"):
        mull.generate(model, ids(1, 5), max_new_tokens=2)


def test_offloaded_weights_are_refused_where_they_are_read_directly(tmp_path: Path, ids: Ids) -> None:
    wrapped(mtp=HEADS).save_pretrained(tmp_path / "model")
    places = {"model": "cpu", "lm_head": "cpu", "mtp_heads": "disk"}
    model = mull.from_pretrained(str(tmp_path / "model"), device_map=places, offload_folder=str(tmp_path / "disk"))
    assert model(ids(1, 5)).logits.isfinite().all()
    for call in (lambda: model(ids(1, 5), labels=ids(1, 5)), lambda: mull.generate(model, ids(1, 5), max_new_tokens=2)):
        with pytest.raises(ValueError, match="weights are offloaded"):
            call()
