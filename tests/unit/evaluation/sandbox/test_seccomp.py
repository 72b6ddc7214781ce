"""Claim: the filter has the right numbers, and the kernel obeys it."""

# ruff: noqa: E501 - programs in one line

import ctypes.util
import platform

import pytest

from mull.evaluation.isolation.seccomp import compile_filter, syscall_numbers
from mull.evaluation.sandbox import expected_values

LIBSECCOMP = ctypes.util.find_library("seccomp")
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


@pytest.mark.skipif(LIBSECCOMP is None, reason="libseccomp, the oracle, is not on this machine")
@pytest.mark.parametrize("machine", AUDIT)
def test_numbers_are_those_of_libseccomp(machine: str) -> None:
    library = ctypes.CDLL(LIBSECCOMP)
    library.seccomp_syscall_resolve_name_arch.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    numbers = syscall_numbers(machine)
    assert len(numbers) > 120
    wrong = {
        name: number
        for name, number in numbers.items()
        if library.seccomp_syscall_resolve_name_arch(AUDIT[machine], name.encode()) != number
    }
    assert not wrong


def test_there_is_no_filter_without_a_table() -> None:
    with pytest.raises(ValueError, match="no list of system calls for riscv64"):
        compile_filter(machine="riscv64")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers below are those of x86-64")
def test_the_kernel_refuses_every_call_that_is_not_listed() -> None:
    """Each number once, with arguments that no call takes. 335 and 336 (uretprobe, uprobe) are left out: the kernel answers those with
    SIGILL before any filter, unless they come from its own trampoline."""
    program = (
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(number):\n    ctypes.set_errno(0)\n    libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)\n"
        "    return ctypes.get_errno()\n"
    )
    listed = set(syscall_numbers("x86_64").values())
    others = [number for number in range(470) if number not in listed | {335, 336}]
    results = expected_values(program, "call", [(number,) for number in others])
    assert {number: result for number, result in zip(others, results, strict=True) if result != 1} == {}
