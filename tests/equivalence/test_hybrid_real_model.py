"""Claim: gates and distillation run on the real model from a recipe to the saved result, and back in a fresh process.

Its architecture is Llama, which has no norm of queries and keys, so it cannot be converted to a hybrid, and is refused by name.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mull
from mull.app.recipe import parse_recipe
from mull.app.run import run_recipe

PROMPT = [[504, 3575, 282, 4649, 314]]

FRESH = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
import mull
folder, prompt = sys.argv[1], torch.tensor(PROMPT)
expected, text = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    assert torch.equal(model(prompt, use_cache=False).logits, expected)
    for trunk in (model.base_model, AutoModel.from_pretrained(folder).eval()):
        assert torch.equal(model.lm_head(trunk(prompt, use_cache=False).last_hidden_state), expected)
    assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=8), text)
    assert torch.equal(mull.generate(model, prompt, max_new_tokens=8).sequences, text)
"""


@pytest.mark.real
@pytest.mark.parametrize("granularity", ["head", "element"])
def test_a_gated_real_model_learns_from_itself_and_is_found_again(
    granularity: str, real_model: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"The capital of place {n} is town {n * n}." for n in range(400)))
    recipe = {
        "run": {"name": "gated", "out": str(tmp_path)},
        "model": {"checkpoint": real_model, "gated_attention": {"granularity": granularity, "layers": [0, 14, 29]}},
        "data": {"paths": [str(tmp_path / "text.txt")], "length": 64, "batch_size": 2},
        "train": {"algo": "distill", "steps": 6, "optimizer": "adamw", "peak_lr": 1e-4, "precision": "fp32"},
        "distill": {
            "teacher": real_model,
            "temperature": 1.0,
            "alpha": 0.5,
            "cache": str(tmp_path / "record"),
            "top_k": 16,
        },
    }
    recipe["data"]["max_bytes"] = 100_000
    losses = [record["loss"] for record in run_recipe(parse_recipe(recipe)).history]
    assert losses[-1] < losses[0]
    saved, prompt = tmp_path / "gated" / "model", torch.tensor(PROMPT)
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    gates = [value for name, value in model.named_parameters() if "gate" in name and "gate_proj" not in name]
    assert len(gates) == 3
    assert all(bool(gate.any()) for gate in gates), "zero at the start"
    with torch.no_grad():
        logits = model(prompt, use_cache=False).logits
    torch.save((logits, model.generate(prompt, do_sample=False, max_new_tokens=8)), tmp_path / "expected.pt")
    code = FRESH.replace("PROMPT", repr(PROMPT))
    subprocess.run([sys.executable, "-c", code, str(saved), str(tmp_path / "expected.pt")], check=True)


@pytest.mark.real
def test_the_real_model_is_refused_by_name(real_model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Architecture 'llama' cannot be converted, only qwen3 and qwen3_moe"):
        mull.convert_checkpoint(real_model, tmp_path / "hybrid")
    assert not any(tmp_path.iterdir())
