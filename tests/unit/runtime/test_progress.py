"""Claim: progress is a bar on a terminal, and elsewhere a line every ten seconds with the time that is left."""

import io
import sys
import time

import pytest

from mull.runtime.progress import PRINT_EVERY_SECONDS, Progress, tracked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_a_line_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(1040, "step", done=1000) as progress:
        for _ in range(40):
            clock[0] += 2
            progress.advance(text="loss 3")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1,001 of 1,040, loss 3, 01:18 left", "the first one comes at once"
    assert lines[1] == "step 1,006 of 1,040, loss 3, 01:08 left"
    assert lines[-1] == "step 1,040 of 1,040, loss 3, 00:00 left", "the last one is always shown"
    assert len(lines) == 1 + 40 * 2 / PRINT_EVERY_SECONDS


def test_an_announcement_counts_as_a_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(8, "layer", label="split") as progress:
        progress.say("8 layers, about a minute")
        for _ in range(4):
            clock[0] += 4
            progress.advance()
        progress.expect(1)
        progress.advance()
    assert capsys.readouterr().err.splitlines() == [
        "8 layers, about a minute",
        "split: layer 3 of 8, 00:20 left",
        "split: layer 5 of 5, 00:00 left",
    ]


def test_work_of_unknown_length_has_no_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None, "step") as progress:
        progress.advance(text="loss 3")
        progress.advance(text="loss 2", last=True)
    assert capsys.readouterr().err == "step 1, loss 3\nstep 2, loss 2\n"


def test_a_terminal_gets_a_bar_and_announcements_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4, "layer", label="split") as progress:
        progress.say("four layers")
        progress.advance(4, "loss 3")
    shown = terminal.getvalue()
    assert "four layers\n" in shown
    assert "split: 100%" in shown
    assert "4/4" in shown
    assert "of 4" not in shown


def test_short_work_shows_nothing_and_long_work_its_lines(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in tracked(range(4), "text", "reading", 4):
        clock[0] += 2
    assert capsys.readouterr().err == ""
    for _ in tracked(range(8), "text", "reading"):
        clock[0] += 2
    for _ in tracked(range(8), "text", "reading", 8):
        clock[0] += 2
    assert capsys.readouterr().err.splitlines() == [
        "reading: text 5",
        "reading: text 5 of 8, 00:06 left",
        "reading: text 8 of 8, 00:00 left",
    ]


def test_on_a_terminal_short_work_has_no_bar_either(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(tracked(range(4), "text", "reading", 4)) == [0, 1, 2, 3]
    assert not terminal.getvalue().strip()
    monkeypatch.setattr("mull.runtime.progress.PATIENCE_SECONDS", 0.0)
    assert list(tracked(range(4), "text", "reading", 4)) == [0, 1, 2, 3]
    assert "reading:" in terminal.getvalue()


@pytest.mark.parametrize("hidden", ["not shown", "another rank"])
def test_silence(hidden: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if hidden == "another rank":
        monkeypatch.setattr("mull.runtime.progress.rank", lambda: 1)
    with Progress(2, "step", shown=hidden == "another rank") as progress:
        progress.say("two steps")
        progress.advance(2)
    assert progress.done == 2
    assert capsys.readouterr() == ("", "")
