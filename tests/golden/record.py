"""Claim: a refactoring changes no result by a single bit. This script records what a checkout computes, and compares records.

    python tests/golden/record.py OLD.json --artifacts DIR      # on the old checkout; DIR keeps runs and models that it saved
    python tests/golden/record.py NEW.json --from DIR           # on the new one, which continues and loads what the old one saved
    python tests/golden/record.py --compare OLD.json NEW.json   # prints the values that differ; exit code 1 if there are any

``--only forward,heads`` restricts both to some of the sections. It runs unchanged on both checkouts, so it uses only what stays:
the names of `mull` itself, methods of the model, and the command. What it computes is in ``model_cases.py`` and ``run_cases.py``;
what it builds and trains in ``cases.yaml``.

A record is plain JSON, with tensors as a digest of dtype, shape and bytes beside their mean, by which a difference can be judged.
Records are those of one machine: another CPU, or another number of threads, sums in another order.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import model_cases
import run_cases
import torch
from model_cases import Results, encoded
from transformers import set_seed
from transformers.utils import logging as transformers_logging

import mull

SECTIONS = {
    "forward": model_cases.forward,
    "heads": model_cases.heads,
    "generate": model_cases.generate,
    "disk": model_cases.disk,
    "train": run_cases.train,
    "artifacts": run_cases.artifacts,
}
FAILURES = (ValueError, TypeError, RuntimeError, OSError, LookupError, AttributeError, AssertionError, ImportError)


def record(name: str, case: Results) -> dict[str, Any]:
    """Run a case from fixed seeds; one that fails is recorded as failed, and the others go on."""
    records: dict[str, Any] = {}
    set_seed(0)
    try:
        for key, value in case:
            assert f"{name}/{key}" not in records, f"{name}/{key} is recorded twice"
            records[f"{name}/{key}"] = encoded(value)
    except FAILURES as error:
        traceback.print_exc()
        records[f"{name}/FAILED"] = f"{type(error).__name__}: {error}"
    return records


def leaves(value: Any, name: str) -> dict[str, Any]:
    """Nested records by one name each."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {place: leaf for key, entry in value.items() for place, leaf in leaves(entry, f"{name}/{key}").items()}


def read(path: Path, sections: list[str]) -> dict[str, Any]:
    records = json.loads(path.read_text())
    chosen = {name: value for name, value in records.items() if name.split("/")[0] in sections}
    return {place: leaf for name, value in chosen.items() for place, leaf in leaves(value, name).items()}


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """Print what differs."""
    names = sorted(old.keys() | new.keys())
    different = [name for name in names if name not in old or name not in new or old[name] != new[name]]
    for name in different:
        print(f"{name}\n    {old.get(name, '(missing)')}\n    {new.get(name, '(missing)')}")
    n_failed = sum(name.endswith("/FAILED") for name in names)
    print(f"{len(different)} of {len(names)} values differ, {n_failed} cases failed.")
    return int(bool(different or n_failed or not names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="where the records go")
    parser.add_argument("--artifacts", type=Path, help="folder to make, which keeps runs and models")
    parser.add_argument("--from", type=Path, dest="source", help="such a folder, made by another version")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas; default: all")
    parser.add_argument("--compare", type=Path, nargs=2, help="two records")
    options = parser.parse_args()
    sections = options.only.split(",")
    if unknown := set(sections) - SECTIONS.keys():
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    if options.compare:
        return compare(*(read(path, sections) for path in options.compare))
    if options.out is None:
        parser.error("name the file that the records go to")
    options.source, options.artifacts = (path and path.resolve() for path in (options.source, options.artifacts))
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(f"recording {mull.__file__}", flush=True)
    records: dict[str, Any] = {}
    for section in sections:
        started = time.perf_counter()
        for name, case in SECTIONS[section](options):
            records |= record(f"{section}/{name}", case)
        print(f"{section}: {time.perf_counter() - started:.0f} s, {len(records)} records so far", flush=True)
    options.out.write_text(json.dumps(records, indent=1) + "\n")
    failed = [name for name in records if name.endswith("/FAILED")]
    print("\n".join([f"{len(records)} records in {options.out}", *(f"{name}: {records[name]}" for name in failed)]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
