"""What users bring works on a wrapped model: PEFT, lm-eval, transformers' Trainer, torch.compile, averaged weights."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SPLIT, tiny
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import mull
from mull import MullForCausalLM, wrap_transformer_with_etd
from mull.data.tokenizer import train_tokenizer

peft = pytest.importorskip("peft", reason="needs the extra eval")
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
Ids = Callable[..., Tensor]
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("family_name", ["qwen3", "qwen3_5"])
def test_lora_of_peft_trains_saves_and_merges(family_name: str, tmp_path: Path, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family_name), SPLIT)
    tokens = ids(2, 12)
    with torch.no_grad():
        before = model(tokens, think_iterations=3).logits
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(tokens, think_iterations=3).logits, before)
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=tokens, labels=tokens, think_iterations=3).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    with torch.no_grad():
        trained = adapted(tokens, think_iterations=3).logits
        generated = adapted.generate(input_ids=tokens, max_new_tokens=4, think_iterations=3, eos_token_id=None)
    assert not torch.equal(trained, before)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(wrap_transformer_with_etd(tiny(family_name), SPLIT), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens, think_iterations=3).logits, trained)
        merged = loaded.merge_and_unload()
        assert isinstance(merged, MullForCausalLM)
        torch.testing.assert_close(merged(tokens, think_iterations=3).logits, trained, atol=1e-5, rtol=0)
        assert torch.equal(merged.generate(tokens, max_new_tokens=4, think_iterations=3, eos_token_id=None), generated)


def test_an_adapter_names_the_saved_model_that_it_belongs_to(tmp_path: Path) -> None:
    """Not the base checkpoint of a model that was never saved: PEFT would load that, without its loops."""
    wrapped = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    wrapped.save_pretrained(tmp_path / "looped")
    model = mull.from_pretrained(tmp_path / "looped")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").base_model.model
    assert isinstance(loaded, MullForCausalLM)
    assert loaded.etd_config == SPLIT


TASK = {
    "task": "toy",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": ["one", "two"],
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def toy_task(folder: Path) -> Path:
    """A task on local data, in lm-eval's own format."""
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"question": f"number {i}:", "answer": i % 2}) + "\n" for i in range(6))
    )
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    (folder / "toy.yaml").write_text(yaml.safe_dump(task))
    return folder


def score_by_hand(model: MullForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Share of questions whose right choice has the larger log-likelihood, from plain uncached forward passes."""
    right = 0
    for i in range(6):
        scores = []
        for choice in ("one", "two"):
            question = tokenizer(f"number {i}:")["input_ids"]
            whole = tokenizer(f"number {i}: {choice}")["input_ids"]
            log_p = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
            scores.append(sum(log_p[t - 1, whole[t]].item() for t in range(len(question), len(whole))))
        right += scores[i % 2] > scores[1 - i % 2]
    return right / 6


@torch.no_grad()
@pytest.mark.parametrize("iterations", [1, 3])
def test_lm_eval_scores_a_looped_model(iterations: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer = train_tokenizer(["number one two 0 1 2 3 4 5: " * 20], 280)
    base = tiny("qwen3", vocab_size=len(tokenizer))
    model = wrap_transformer_with_etd(base, SPLIT.model_copy(update={"max_think_iterations": iterations}))
    manager = TaskManager(include_path=str(toy_task(tmp_path)), include_defaults=False)
    evaluated = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=["toy"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert evaluated["results"]["toy"]["acc,none"] == pytest.approx(score_by_hand(model, tokenizer))


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_trainer_of_transformers_accumulates_exactly(activation_checkpointing: bool, tmp_path: Path, ids: Ids) -> None:
    """Rows with 12, 3, 7 and 1 targets: two micro-batches of two rows are one batch of four."""
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids(4, 13)]
    for row, n_targets in zip(rows, (12, 3, 7, 1), strict=True):
        row["labels"][: 13 - n_targets] = -100
    trained = []
    for size, accumulate in ((4, 1), (2, 2)):
        model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            activation_checkpointing=activation_checkpointing,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        trained.append(model.lm_head.weight.detach())
    assert not torch.equal(trained[0], tiny("qwen3").lm_head.weight)
    torch.testing.assert_close(trained[1], trained[0], atol=1e-5, rtol=0)


def test_an_average_of_the_weights_is_a_model_of_its_own(ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3.0)
    average.update_parameters(model)
    average.update_parameters(other)
    torch.testing.assert_close(average.module.lm_head.weight, 2 * model.lm_head.weight)
    with torch.no_grad():
        assert not torch.equal(average.module(ids(1, 5)).logits, model(ids(1, 5)).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family_name", ["qwen3", "qwen3_5"])
def test_a_loop_compiles_into_one_graph(family_name: str, ids: Ids) -> None:
    model = wrap_transformer_with_etd(tiny(family_name), SPLIT)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids(2, 12), think_iterations=3, use_cache=False).logits
        actual = compiled(ids(2, 12), think_iterations=3, use_cache=False).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
