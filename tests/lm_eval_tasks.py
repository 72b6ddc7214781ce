"""Tasks of lm-eval for tests."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml


def rolling_task(folder: Path, texts: Sequence[str]) -> str:
    """Path of a task's YAML file: word and byte perplexity and bits per byte of texts."""
    (folder / "texts.json").write_text(json.dumps([{"page": text} for text in texts]))
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.json")}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }
    (folder / "texts.yaml").write_text(yaml.safe_dump(task))
    return str(folder / "texts.yaml")
