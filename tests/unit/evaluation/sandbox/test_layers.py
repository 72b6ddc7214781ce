"""Claim: every layer of the sandbox is active on a machine that can have it, and each one that is switched off is noticed."""

import os

import pytest

from mull.app.sandbox import sandbox_doctor
from mull.evaluation.isolation import container, layers
from mull.evaluation.isolation.container import OF_BUBBLEWRAP
from mull.evaluation.sandbox import LAYERS, Asserts, SandboxError, doctor, run_program

IMPLIED = {
    "capabilities": {"user"} if os.geteuid() == 0 else set(),  # root stays root where it keeps its rights
    "pid": {"parent-death"},  # what has lost its parent was in its namespace
}


def test_all_layers_are_active_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert sandbox_doctor()
    printed = capsys.readouterr().out
    assert all(f"{name:<13}active" in printed for name in LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_is_switched_off_is_noticed(name: str) -> None:
    missing = {layer.name for layer in doctor([name]) if not layer.active}
    assert missing - IMPLIED.get(name, set()) == {name}


@pytest.mark.slow
def test_without_bubblewrap_its_layers_are_missing_and_programs_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(container, "find_bubblewrap", lambda: None)
    monkeypatch.setattr(layers, "find_bubblewrap", lambda: None)
    layers._missing.cache_clear()
    try:
        tests = Asserts("assert f() == 1", ("f",))
        with pytest.raises(SandboxError, match="lacks user, network, .*there is no bwrap: install bubblewrap"):
            run_program("def f():\n    return 1", tests)
        assert not sandbox_doctor()
        assert "user, network" in capsys.readouterr().out
        assert not sandbox_doctor(["network"])
        assert sandbox_doctor(OF_BUBBLEWRAP)
        assert run_program("def f():\n    return 1", tests, allow_weak=OF_BUBBLEWRAP).passed
        assert (
            run_program("def f():\n    while True: pass", tests, allow_weak=OF_BUBBLEWRAP, timeout=1).reason
            == "time-out"
        )
    finally:
        layers._missing.cache_clear()


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="netwrk is no layer of the sandbox"):
        sandbox_doctor(["netwrk"])
