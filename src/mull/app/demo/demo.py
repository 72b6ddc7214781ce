"""The demo: a small model on real text that learns to think in loops, and what else mull does with it; minutes on one CPU.

Everything runs through the functions that a user calls: `wrap_transformer_with_etd`, `find_split`, `train`, `generate`.
"""

import time
from importlib.resources import files
from pathlib import Path

from mull.app.demo.chain import Chain
from mull.app.demo.chapter import Bench, Chapter, DemoSize
from mull.app.demo.depth import Depth
from mull.app.demo.hybrid import Hybrid
from mull.app.demo.loops import Loops, Samples
from mull.app.demo.speculation import Speculation
from mull.app.demo.weights import Weights
from mull.app.report.page import Report


def run_demo(out: Path, seed: int = 0, size: DemoSize | None = None) -> Path:
    """Run the whole demo and write its report.

    Args:
        out: Folder for ``report.html``, the metrics and the trained models.
        seed: Seed of weights, data order and sampled iterations.
        size: None for the size that `mull demo` runs.

    Returns:
        Path of the report.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(out, seed, size or DemoSize())
    loops, chain = Loops.train(bench), Chain.train(bench)
    chapters: dict[str, Chapter] = {
        "loops": loops,
        "weights": Weights.train(bench, loops),
        "speculation": Speculation.train(bench, loops),
        "chain": chain,
        "depth": Depth.train(bench, loops, chain),
        "hybrid": Hybrid.train(bench, loops),
        "samples": Samples.train(bench, loops),
    }
    report = Report(
        "mull demo: a pretrained model that thinks in loops",
        subtitle="A small Qwen3 on Python sources, and a task that needs depth. All of it was trained on this machine just now.",
        command="mull demo",
        seeds=(seed,),
        provenance={"wall time": f"{time.perf_counter() - started:.0f} s until the report was written"},
    )
    for name, chapter in chapters.items():
        words = files("mull.app.demo").joinpath("words", f"{name}.md.j2").read_text("utf-8")
        report.add(words, {"chapter": chapter, **chapter.tell()})
    return report.write(out / "report.html")
