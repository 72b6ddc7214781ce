"""Recipes of a few seconds, as a user writes them."""

import json
from pathlib import Path
from typing import Any

ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def content(folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe for two files in `folder`, with some sections replaced."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (text / f"{name}.py").write_text("".join(f"def {name}{i}(x):\n    return x + {i}\n\n\n" for i in range(60)))
    return {
        "run": {"name": "tiny", "out": str(folder)},
        "model": {
            "architecture": dict(ARCHITECTURE),
            "etd": {"n_encoder_layers": 1, "n_think_layers": 2, "n_decoder_layers": 1, "max_think_iterations": 2},
        },
        "data": {
            "paths": [str(text / "a.py")],
            "held_out_paths": [str(text / "b.py")],
            "vocab_size": 280,
            "length": 32,
            "batch_size": 4,
        },
        "loss": {"iterations": {"kind": "uniform", "maximum": 3}},
        "train": {"steps": 6, "precision": "fp32", "log_every": 1},
        **sections,
    }


def changed(recipe: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Set keys, with ``__`` for the dot."""
    for key, value in values.items():
        *sections, last = key.split("__")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return recipe


def answers(folder: Path) -> Path:
    """Tasks with right and wrong answers."""
    file = folder / "answers.jsonl"
    records = [
        {"name": f"add {i}", "prompt": f"x + {i}?\n", "completion": f"x + {i + wrong}", "outcome": 1 - wrong}
        for i in range(40)
        for wrong in (0, 1)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
