"""What a user sees while a model is trained."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from mull.runtime.distributed import rank

PRINT_EVERY_SECONDS = 10.0
"""Pause between the progress lines of a run without a terminal."""


class Progress:
    """On rank 0, a progress bar on a terminal; elsewhere a line every ten seconds, and one for the last step.

    Args:
        steps: Length of the run; None if it is a time.
        done: Steps that were done before.
    """

    def __init__(self, steps: int | None, done: int) -> None:
        self._interactive = sys.stderr.isatty() and rank() == 0
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=not self._interactive)
        self._printed = -math.inf

    def show(self, record: Mapping[str, Any], tokens_per_second: float, last: bool) -> None:
        """Show a step; the speed is that of the whole run."""
        if rank() > 0:
            return
        speed = f"{tokens_per_second:,.0f} tokens/s"
        if "mfu" in record:
            speed += f", MFU {record['mfu']:.1%}"
        if self._interactive:
            self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed}", refresh=False)
            self._bar.update()
        elif last or time.monotonic() - self._printed >= PRINT_EVERY_SECONDS:
            self._printed = time.monotonic()
            print(f"step {record['step']}, loss {record['loss']:.4f}, {speed}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
