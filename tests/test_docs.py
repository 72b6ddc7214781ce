"""Claim: what the README and the documentation show is true: their programs run, and what they name exists.

The programs of a page run one after the other in one namespace, in an empty folder. Where a page names a checkpoint or a folder
of texts, a tiny one lies there under that name, so nothing is downloaded.
"""

import ast
import doctest
import functools
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny
from test_floors import LAYOUT, read_sources
from transformers import PreTrainedTokenizerBase

import mull
from mull import ETDConfig, MTPConfig, MullForCausalLM, export_native_heads, wrap_transformer_with_etd
from mull.data.tokenizer import train_tokenizer
from mull.training import loop

ROOT = Path(__file__).parents[1]
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
PROSE = ["README.md", "CONTRIBUTING.md", *DOCS]

SPLIT = ETDConfig(n_encoder_layers=2, n_think_layers=2, n_decoder_layers=2, max_think_iterations=4)
TEXTS = ["def fib(n):\n    return n\n", "class Stack:\n    pass\n", "import os\n"]

Names = dict[str, Any]


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, 270)


def save_checkpoint(name: str, family: str = "qwen3", n_layers: int = 6) -> None:
    """A tiny checkpoint of transformers in the folder that has this name."""
    tiny(family, vocab_size=len(tokenizer()), num_hidden_layers=n_layers, eos_token_id=0).save_pretrained(name)
    tokenizer().save_pretrained(name)


def save_texts(name: str, n_bytes: int) -> None:
    Path(name).mkdir()
    Path(name, "text.txt").write_text("".join(TEXTS) * (n_bytes // sum(map(len, TEXTS))), encoding="utf-8")


def with_heads() -> MullForCausalLM:
    base = tiny("qwen3", vocab_size=len(tokenizer()), num_hidden_layers=6, eos_token_id=0)
    return wrap_transformer_with_etd(base, SPLIT, MTPConfig(num_predict_tokens=3, mtp_head_type="mlp"))


def readme(_: pytest.MonkeyPatch) -> Names:
    save_checkpoint("Qwen/Qwen3-0.6B", n_layers=28)
    return {}


def qwen3(_: pytest.MonkeyPatch) -> Names:
    save_checkpoint("Qwen/Qwen3-0.6B")
    return {}


def split(_: pytest.MonkeyPatch) -> Names:
    save_checkpoint("Qwen/Qwen3-0.6B")
    save_texts("my-texts", 3_000)
    return {}


def train(patch: pytest.MonkeyPatch) -> Names:
    save_checkpoint("Qwen/Qwen3-0.6B")
    save_checkpoint("a-model-trained-on-clean-data")
    save_texts("my-texts", 20_000)
    whole = loop.train

    def one_step(model: Any, objective: Any, batches: Any, config: loop.TrainConfig, *args: Any, **options: Any) -> Any:
        config = config.model_copy(update={"steps": 1, "warmup_steps": 0, "accumulate": 2})
        return whole(model, objective, batches, config, *args, **options)

    patch.setattr(loop, "train", one_step)
    return {}


def weights(_: pytest.MonkeyPatch) -> Names:
    save_checkpoint("out/base/model")
    save_checkpoint("out/clean/model")
    return {}


def native_heads(_: pytest.MonkeyPatch) -> Names:
    base = tiny("qwen3_5", vocab_size=len(tokenizer()))
    config = MTPConfig(mtp_head_type="native", num_predict_tokens=1)
    for name in ("Qwen/Qwen3.5-0.8B", "checkpoints/Qwen3.5-0.8B"):
        base.save_pretrained(name)
        export_native_heads(wrap_transformer_with_etd(base, None, config), name)
    return {}


def convert(_: pytest.MonkeyPatch) -> Names:
    save_checkpoint("Qwen/Qwen3-0.6B", n_layers=28)
    return {}


def short_hybrid(_: pytest.MonkeyPatch) -> Names:
    save_checkpoint("Qwen/Qwen3-0.6B", n_layers=4)
    return {}


def generate(_: pytest.MonkeyPatch) -> Names:
    return {"model": with_heads(), "tokenizer": tokenizer()}


def looped(_: pytest.MonkeyPatch) -> Names:
    save_checkpoint("Qwen/Qwen3-0.6B", n_layers=28)
    base = tiny("qwen3", vocab_size=len(tokenizer()), num_hidden_layers=6, eos_token_id=0)
    model = wrap_transformer_with_etd(base, SPLIT).eval()
    return {"model": model, "tokenizer": tokenizer(), "texts": TEXTS * 40}


def routes(_: pytest.MonkeyPatch) -> Names:
    save_checkpoint("Qwen/Qwen3-0.6B")
    questions = [f'{{"prompt": "def f{number}(x):", "answer": " return {number}"}}' for number in range(6)]
    Path("questions.jsonl").write_text("\n".join(questions), encoding="utf-8")
    return {}


def evaluated(patch: pytest.MonkeyPatch) -> Names:
    patch.setenv("HF_DATASETS_CACHE", str(Path("cache").absolute()))
    for name, seed in (("out/model", 0), ("out/other", 1)):
        base = tiny("qwen3", seed=seed, vocab_size=len(tokenizer()), num_hidden_layers=6, eos_token_id=0)
        wrap_transformer_with_etd(base, SPLIT).save_pretrained(name)
        tokenizer().save_pretrained(name)
    save_texts("my-texts", 3_000)
    task = {"task": "toy", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    files = {"data_files": {"test": str(Path("toy.jsonl").absolute())}}
    asked = {"doc_to_text": "{{question}}", "doc_to_choice": ["one", "two"], "doc_to_target": "{{answer}}"}
    Path("toy.jsonl").write_text('{"question": "n", "answer": 0}\n{"question": "m", "answer": 1}\n', encoding="utf-8")
    text = yaml.safe_dump({**task, **asked, "dataset_kwargs": files, "metric_list": [{"metric": "acc"}]})
    Path("toy.yaml").write_text(text, encoding="utf-8")
    return {}


def nothing(_: pytest.MonkeyPatch) -> Names:
    return {}


PAGES: dict[str, Callable[[pytest.MonkeyPatch], Names]] = {
    "README.md": readme,
    "docs/index.md": qwen3,
    "docs/concepts/forward-pass.md": nothing,
    "docs/concepts/halting.md": nothing,
    "docs/concepts/mixture-of-recursions.md": nothing,
    "docs/concepts/routing.md": nothing,
    "docs/concepts/experts.md": nothing,
    "docs/concepts/token-skipping.md": nothing,
    "docs/concepts/distillation.md": nothing,
    "docs/concepts/hybrid-start.md": short_hybrid,
    "docs/concepts/gated-attention.md": nothing,
    "docs/concepts/sandbox.md": nothing,
    "docs/how-to/depth.md": looped,
    "docs/concepts/paths-and-slots.md": nothing,
    "docs/how-to/split.md": split,
    "docs/how-to/routes.md": routes,
    "docs/how-to/train.md": train,
    "docs/how-to/weights.md": weights,
    "docs/how-to/native-heads.md": native_heads,
    "docs/how-to/convert.md": convert,
    "docs/how-to/generate.md": generate,
    "docs/how-to/evaluate.md": evaluated,
}
"""Pages with programs, and what prepares the folder and the names that their first program finds."""

NOT_RUN = {("docs/how-to/evaluate.md", "lm_eval.simple_evaluate"): "downloads a task from the Hub"}
"""Programs, by page and a part of their text, that are only compiled, and why."""


@dataclass(frozen=True)
class Program:
    page: str
    line: int
    source: str
    """File that the program is quoted from; empty for a program of its own."""
    code: str

    def reason_not_to_run(self) -> str | None:
        return next((why for (page, part), why in NOT_RUN.items() if page == self.page and part in self.code), None)

    def run(self, names: Names) -> None:
        name = f"{self.page}:{self.line}"
        if self.code.startswith(">>>"):
            example = doctest.DocTestParser().get_doctest(self.code, names, name, None, None)
            runner = doctest.DocTestRunner(verbose=False)
            runner.run(example, clear_globs=False)
            assert not runner.failures, f"{name}: another output than shown"
            names.update(example.globs)
            return
        code = compile(self.code, name, "exec")
        if self.reason_not_to_run() is None:
            exec(code, names)


PYTHON = re.compile(r'^```python(?: title="(?P<source>[^"]+)")?\n(?P<code>.*?)^```$', re.MULTILINE | re.DOTALL)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def programs(page: str) -> Iterator[Program]:
    text = read(page)
    for match in PYTHON.finditer(text):
        yield Program(page, text.count("\n", 0, match.start()) + 2, match["source"] or "", match["code"])


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run_one_after_the_other(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = PAGES[page](monkeypatch)
    torch.manual_seed(0)
    for program in programs(page):
        if not program.source:
            program.run(names)


def test_every_page_with_a_program_is_run_and_no_exception_is_left_over() -> None:
    shown = [program for page in PROSE for program in programs(page)]
    assert {program.page for program in shown} == PAGES.keys()
    assert sum(program.reason_not_to_run() is not None for program in shown) == len(NOT_RUN)
    for page in PROSE:
        assert len(re.findall(r"^\s*```(?:python|py)\b", read(page), re.MULTILINE)) == len([*programs(page)]), page


def test_quoted_sources_are_what_the_file_says() -> None:
    quoted = [program for page in PROSE for program in programs(page) if program.source]
    assert quoted
    for program in quoted:
        assert program.code in read(program.source), f"{program.page}:{program.line} is no longer in {program.source}"


def test_generated_text_is_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = generate(monkeypatch)
    first = next(programs("docs/how-to/generate.md"))
    first.run(names)
    assert tokenizer().decode(names["ids"][0]) in capsys.readouterr().out


FILE = re.compile(r"\b(?:src/mull|tests|runs|benchmarks|docs)/[\w/.-]+\.(?:py|md|yaml|json|txt|svg)\b")


@pytest.mark.parametrize("page", PROSE)
def test_files_that_are_named_exist(page: str) -> None:
    missing = {name for name in FILE.findall(read(page)) if not (ROOT / name).exists()}
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Links between pages of the documentation are checked when it is built."""
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", read(page)):
        file, _, anchor = link.partition("#")
        assert (ROOT / file).exists(), link
        headings = re.findall(r"^#+ (.+)$", read(file), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in headings}, (
            link
        )


NOT_NAMES = {"mull.objectives": "a group of entry points", "mull.halting": "another one"}


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for part in parts[depth:]:
            fields = getattr(found, "model_fields", {}) | getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


@pytest.mark.parametrize("page", PROSE)
def test_names_of_the_package_that_are_written_exist(page: str) -> None:
    named = set(re.findall(r"`(mull(?:\.[A-Za-z_]\w*)+)(?!\w)(?!\.\w)", read(page)))
    assert not {name for name in named - NOT_NAMES.keys() if not exists(name)}


def nav_pages(entries: Any) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values():
                yield from nav_pages([part] if isinstance(part, str) else part)


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load(read("mkdocs.yml"))
    assert sorted(f"docs/{page}" for page in nav_pages(config["nav"])) == DOCS


def has_public_names(source: str) -> bool:
    def names(node: ast.stmt) -> list[str]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            return [node.name]
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        return [target.id for target in targets if isinstance(target, ast.Name)]

    return any(not name.startswith("_") for node in ast.parse(source).body for name in names(node))


def documented_modules() -> Mapping[str, str]:
    """``module: page`` of the reference."""
    found: dict[str, str] = {}
    for page in DOCS:
        for module in re.findall(r"^::: (\S+)$", read(page), re.MULTILINE):
            assert module not in found, f"{module} is on {found[module]} and on {page}"
            found[module] = page
    return found


def test_every_public_module_is_on_one_reference_page_and_in_the_index() -> None:
    top = ("mull", "mull.__init__", "mull.__main__")
    modules = {name for name, source in read_sources().items() if name not in top and has_public_names(source)}
    documented = documented_modules()
    assert not modules - documented.keys(), (
        "add '::: module' to the page of its folder in docs/reference, and to the index"
    )
    assert not documented.keys() - modules
    listed = re.findall(r"^\| \[[^]]+\]\((\w+\.md)\) \| (.+) \|$", read("docs/reference/index.md"), re.MULTILINE)
    assert {module: f"docs/reference/{page}" for page, cell in listed for module in re.findall(r"`([^`]+)`", cell)} == (
        documented
    )


def test_every_name_of_the_top_is_in_the_index() -> None:
    index = read("docs/reference/index.md")
    assert {name for name in mull.__all__ if f"[`{name}`][" not in index} == set()


def test_contributing_has_the_floors_of_the_package() -> None:
    rows = re.findall(r"^\| (\d) \| ((?:`\w+` ?)+)\|$", read("CONTRIBUTING.md"), re.MULTILINE)
    told = {folder: int(floor) for floor, folders in rows for folder in re.findall(r"`(\w+)`", folders)}
    assert told == {folder: floor for folder, (floor, _) in LAYOUT.items() if "." not in folder}
