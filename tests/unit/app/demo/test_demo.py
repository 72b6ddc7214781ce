"""The demo, shrunk to seconds, is complete: every section, figure, folder and check that it promises."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import mull
from mull.app.demo.chain import Chain, chain_accuracy
from mull.app.demo.chapter import Bench, DemoSize
from mull.app.demo.demo import run_demo
from mull.app.demo.speculation import WAYS
from mull.data.chain import ChainTask
from mull.model.configs import ETDConfig

TINY = DemoSize(
    corpus_bytes=200_000,
    vocab_size=300,
    length=32,
    batch_size=4,
    width=64,
    layers=4,
    base_steps=3,
    continued_steps=2,
    max_iterations=2,
    held_out_rows=8,
    chain_steps=3,
    chain_prompts=4,
    depth_rows=2,
    new_tokens=4,
    weights_steps=4,
    own_rows=4,
    own_tokens=8,
    drafting_steps=2,
    drafting_prompts=2,
    drafting_tokens=6,
    calibration_rows=4,
    hybrid_steps=2,
)


class Headings(HTMLParser):
    """Collects the second-level headings of a page, and counts its figures."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.figures = 0
        self._inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._inside = tag == "h2"
        self.figures += tag == "svg"

    def handle_data(self, data: str) -> None:
        if self._inside and data.strip():
            self.headings.append(data.strip())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_demo_tells_the_whole_story(tmp_path: Path) -> None:
    report = run_demo(tmp_path, seed=0, size=TINY).read_text()
    page = Headings()
    page.feed(report)
    assert page.headings[:11] == [
        "What was trained",
        "Where to loop",
        "Loss against iterations",
        "Weighing tokens",
        "Drafting",
        "A task that needs depth: chain to root",
        "Adaptive depth",
        "Adaptive depth on text",
        "Conversion to a hybrid",
        "Samples",
        "Saved and loaded",
    ]
    assert page.figures == 9
    assert "the same logits, bit for bit" in report
    assert "OTHER logits" not in report
    assert "All calls wrote the same tokens." in report
    assert report.count("2 of 2") == len(WAYS)
    assert mull.from_pretrained(str(tmp_path / "model")).etd_config is not None
    drafting = mull.from_pretrained(str(tmp_path / "drafting" / "model"))
    assert drafting.mtp_config is not None
    assert torch.equal(drafting.lm_head.weight, mull.from_pretrained(str(tmp_path / "model")).lm_head.weight), (
        "not frozen"
    )
    Chain.train(Bench(tmp_path, 0, TINY))  # a second demo in the same folder replaces the first


def test_accuracy_is_counted_per_hop_and_iteration() -> None:
    """Random weights answer by chance; the share per number of hops is counted from plain forward passes."""
    task = ChainTask()
    config = Qwen3Config(
        vocab_size=task.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    etd = ETDConfig(n_encoder_layers=1, n_think_layers=1, n_decoder_layers=0)
    model = mull.wrap_transformer_with_etd(AutoModelForCausalLM.from_config(config), etd)
    overall, by_hops = chain_accuracy(model.eval(), task, 20, seed=0)
    batch = task.batches(20, 0, train=False)(0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    roots, hops = batch["step_labels"][..., -1], batch["hops"]
    for iterations in (1, 4):
        with torch.no_grad():
            queries = model.model.given_depths(torch.where(hops >= 0, iterations, 1))
            answers = model(**inputs, think_iterations=iterations, policy=queries, use_cache=False).logits.argmax(-1)
        right = (answers == roots).float()
        shares = [right[hops == distance].mean().item() for distance in range(1, 8)]
        assert len(set(shares)) > 1
        assert [by_hops[distance][iterations] for distance in range(1, 8)] == pytest.approx(shares)
        assert overall[iterations] == pytest.approx(right[hops >= 1].mean().item())
