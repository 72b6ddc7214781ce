"""Claim: the page of `mull inspect` shows for each token the iterations that it ran, to a mouse and to a keyboard."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SPLIT, tiny

from mull import (
    ETDConfig,
    HaltingConfig,
    LayerRouterConfig,
    LoRAExpertConfig,
    MTPConfig,
    wrap_transformer_with_etd,
)
from mull.app import cli
from mull.app.report.inspect_page import write_inspection
from mull.data.tokenizer import train_tokenizer
from mull.evaluation.depth_trace import trace_depth
from mull.retrofit.wrap import from_pretrained

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(200))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A looped model with heads whose tokens stop after different iterations."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], 300)
    base = tiny("qwen3", vocab_size=len(tokenizer), eos_token_id=None)
    halting = HaltingConfig(rule="state", threshold=0.9)
    etd = ETDConfig(**SPLIT.model_dump() | {"max_think_iterations": 3, "halting": halting})
    heads = MTPConfig(num_predict_tokens=2, mtp_head_type="mlp")
    wrap_transformer_with_etd(base, etd, heads).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def inspect(checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    command = ["mull", "inspect", str(checkpoint), "--max-new-tokens", "8", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def data_of(page: Path) -> Any:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(html.unescape(found[1]))


def test_a_trace_is_what_the_model_does(checkpoint: Path) -> None:
    model = from_pretrained(checkpoint)
    tokens = torch.randint(3, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    trace = trace_depth(model, tokens)
    with torch.no_grad():
        out = model(tokens, labels=tokens, adaptive=True, use_cache=False)
        fixed = model(tokens, labels=tokens, think_iterations=2, use_cache=False)
        first = model(tokens, adaptive=HaltingConfig(rule="state", threshold=-2.0)).metrics
    depths = out.metrics["think_iterations"][0].tolist()
    assert [len(token.iterations) for token in trace.tokens] == depths
    assert [token.early_exit for token in trace.tokens] == out.metrics["early_exit"][0].tolist()
    assert set(depths) == {2, 3}, "some tokens stop, and others reach the maximum"
    assert first["think_iterations"].max() == 1
    assert trace.loss == pytest.approx(float(out.loss - out.mtp_loss), rel=1e-5)
    assert trace.fixed[2] == pytest.approx(float(fixed.loss - fixed.mtp_loss), rel=1e-5)
    for token in trace.tokens:
        # The rule is not asked after the last possible iteration.
        over = [step.cosine >= 0.9 for step in token.iterations[:2]]
        assert over == [False] * (len(over) - 1) + [token.early_exit]


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_actions_and_experts_are_those_of_the_call(granularity: Any, tmp_path: Path) -> None:
    router = LayerRouterConfig(granularity=granularity, scope="all")
    experts = LoRAExpertConfig(granularity=granularity)
    fields = {"layer_router": router, "lora_expert": experts, "router_warmup_steps": 0, "expert_warmup_steps": 0}
    etd = ETDConfig(**SPLIT.model_dump() | {"max_think_iterations": 2} | fields)
    model = wrap_transformer_with_etd(tiny("qwen3"), etd).eval()
    for name, parameter in model.named_parameters():
        if ".layer_routers." in name and ".out." in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    tokens, n_prompt = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(0)), 12
    halting = HaltingConfig(rule="fixed", stop="active_only")
    trace = trace_depth(model, tokens, halting, n_prompt=n_prompt)
    metrics = model(tokens, prompt_mask=torch.arange(20)[None] < n_prompt, use_cache=False).metrics
    layers = [(0, 1), (1, 1), *((layer, j) for j in (1, 2) for layer in (2, 3, 4, 5)), (6, 1), (7, 1)]
    for place, token in enumerate(trace.tokens):
        assert [(made.layer, made.iteration) for made in token.actions] == layers
        assert [made.action for made in token.actions] == [int(made[0, place]) for made in metrics["router_actions"]]
        assert [step.expert for step in token.iterations] == [int(e[0, place]) for e in metrics["expert_selections"]]
    assert len({made.action for token in trace.tokens for made in token.actions}) > 1
    tokenizer, page = train_tokenizer([TEXT], 300), tmp_path / "page.html"
    write_inspection(trace, tokenizer, page, title="", command="", n_prompt=n_prompt, drafted=[False] * 20)
    first, shown = trace.tokens[0], data_of(page)[0]
    skipped = [f"{made.layer} (iteration {made.iteration})" for made in first.actions if made.action == 0]
    assert not skipped or f"skips layer{'s' * (len(skipped) > 1)} {', '.join(skipped)}" in shown["route"]
    assert [step[3] for step in shown["trace"]] == [step.expert for step in first.iterations]
    assert "LoRA experts" in page.read_text()


def test_a_page_for_each_prompt(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect(checkpoint, tmp_path, monkeypatch, "--prompt", "def f1(x):", "--prompt", "<b>&</b>", "--draft", "mtp")
    first, second = (data_of(tmp_path / f"{number}.html") for number in (1, 2))
    assert "".join(token["text"] for token in first).startswith("def f1(x):")
    assert sum(token["written"] for token in first) == sum(token["written"] for token in second) == 8
    assert not any(token["drafted"] for token in first if not token["written"])
    assert all(len(token["trace"]) == token["depth"] for token in first)
    text = (tmp_path / "2.html").read_text()
    assert "<b>" not in text.split("<script")[0], "what a text spells is no markup"
    assert "http" not in re.sub(r"https?://www\.w3\.org\S*", "", text), "the page fetches nothing"


def test_the_page_works_in_a_browser(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("There is no Chromium here: apt-get install chromium.")
    inspect(checkpoint, tmp_path, monkeypatch, "--prompt", "def f1(x):")
    tokens = data_of(tmp_path / "1.html")
    # A click on the third token, then the arrow keys: one to the right, two to the left.
    script = """
    const say = name => document.body.setAttribute(name, document.getElementById("chosen").textContent);
    const press = key => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    buttons[2].click(); buttons[2].focus(); say("data-click");
    press("ArrowRight"); say("data-right");
    press("ArrowLeft"); press("ArrowLeft"); say("data-left");
    document.body.setAttribute("data-pressed", buttons.map(b => b.getAttribute("aria-pressed")).join());
    """
    page = tmp_path / "driven.html"
    page.write_text((tmp_path / "1.html").read_text().replace("</body>", f"<script>{script}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run(
        [browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    for name, place in (("click", 2), ("right", 3), ("left", 1)):
        found = re.search(rf'data-{name}="([^"]*)"', shown)
        assert found is not None, shown[:500]
        told = html.unescape(found[1])
        assert told.startswith(f"Token {place + 1}, {json.dumps(tokens[place]['text'])}, of the prompt")
        assert f"{tokens[place]['depth']} iterations" in told
        for text, probability, cosine, _ in tokens[place]["trace"]:
            assert json.dumps(text, ensure_ascii=False) in told
            assert f"{probability:.3f}" in told
            assert f"{cosine:.4f}" in told
    assert 'data-pressed="false,true,false' in shown
