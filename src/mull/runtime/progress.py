"""How far a long piece of work is, on standard error."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from tqdm import tqdm

from mull.runtime.distributed import rank

T = TypeVar("T")

PRINT_EVERY_SECONDS = 10.0
"""Pause between two lines without a terminal."""

PATIENCE_SECONDS = 2.0
"""How long work may take on a terminal before it has a bar, if it is often short."""


class Progress:
    """On a terminal, a bar; elsewhere a line every ten seconds, and one at the end. Only rank 0 shows anything.

    Args:
        total: Length of the work in units; None if it is not known.
        unit: What is counted, in the singular.
        label: What the work is, if the unit does not say it.
        done: Units that were done before.
        shown: False counts, and shows nothing.
        patient: Show nothing of work that ends before the first bar (two seconds) or line (ten) is due, and leave no bar.

    Attributes:
        done: Units done, those from before included.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        *,
        label: str = "",
        done: int = 0,
        shown: bool = True,
        patient: bool = False,
    ) -> None:
        self.done = done
        self._total, self._unit, self._label = total, unit, label
        self._shown = shown and rank() == 0
        self._interactive = self._shown and sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=label or None,
            initial=done,
            unit=unit,
            disable=not self._interactive,
            leave=not patient,
            delay=PATIENCE_SECONDS if patient else 0,
        )
        self._before, self._started = done, time.monotonic()
        self._silent = patient  # until the first line is due
        self._printed = self._started if patient else -math.inf

    def say(self, text: str) -> None:
        """Show a line of its own, such as what is about to begin and how long it will take."""
        if self._shown:
            self._printed = time.monotonic()
            tqdm.write(text, file=sys.stderr)

    def advance(self, units: int = 1, text: str = "", *, last: bool = False) -> None:
        """Count units that are done.

        Args:
            units: How many.
            text: What to show beside the count.
            last: Nothing follows, though the total may not be reached.
        """
        self.done += units
        if self._interactive:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(units)
        elif self._shown and (self._waited() or (not self._silent and (last or self.done == self._total))):
            self._silent, self._printed = False, time.monotonic()
            print(self._line(text), file=sys.stderr, flush=True)

    def expect(self, units: int) -> None:
        """So many units are still to come: fewer than were announced, or more."""
        self._total = self._bar.total = self.done + units

    def _waited(self) -> bool:
        return time.monotonic() - self._printed >= PRINT_EVERY_SECONDS

    def _line(self, text: str) -> str:
        name = f"{self._label}: {self._unit}" if self._label else self._unit
        if self._total is None:
            return ", ".join(filter(None, [f"{name} {self.done:,}", text]))
        passed = (time.monotonic() - self._started) / max(self.done - self._before, 1)
        left = tqdm.format_interval(passed * (self._total - self.done))
        return ", ".join(filter(None, [f"{name} {self.done:,} of {self._total:,}", text, f"{left} left"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def tracked(items: Iterable[T], unit: str, label: str, total: int | None = None) -> Iterator[T]:
    """The same items; if they take long, with their progress."""
    with Progress(total, unit, label=label, patient=True) as progress:
        for item in items:
            yield item
            progress.advance()
