"""The filter of system calls, run by an interpreter of its instructions on both architectures."""

import errno
import os
import re
import struct
from pathlib import Path

import pytest

from coterie.grading.system_calls import ALLOWED, ALLOWED_IF, filter_of
from helpers import table

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
ALLOWS, REFUSES, MISSING = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def judged(machine, number, *arguments, architecture=None):
    """What the kernel would make of a call: the classic BPF machine, as far as filters use it."""
    arguments = [value % 2**64 for value in (*arguments, *[0] * (6 - len(arguments)))]
    data = struct.pack("=IIQ6Q", number, architecture or ARCHITECTURES[machine][1], 0, *arguments)
    steps = list(struct.iter_unpack("=HBBI", filter_of(machine)))
    place = value = 0
    while True:
        code, if_true, if_false, operand = steps[place]
        place += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            value = struct.unpack_from("=I", data, operand)[0]
        else:
            holds = {0x15: value == operand, 0x45: value & operand != 0}[code]
            place += if_true if holds else if_false


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_every_call_that_is_not_listed_is_refused(machine):
    column = ARCHITECTURES[machine][0]
    listed = {numbers[column] for numbers in ALLOWED.values()}
    conditional = {numbers[column] for numbers in ALLOWED_IF.values()}
    for number in [*range(600), 2**30 + 39, 2**31, 2**32 - 1]:
        if number not in conditional:
            expected = ALLOWS if number in listed else MISSING if number == 435 else REFUSES
            assert judged(machine, number) == expected, number


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    table(
        ("thread", "clone", (0x3D0F00,), True),
        ("process", "clone", (17,), False),
        ("own limits", "prlimit64", (0, 7), True),
        ("limits of another", "prlimit64", (1, 7), False),
        ("signal to itself", "tgkill", (os.getpid(), 5, 6), True),
        ("signal to another", "tgkill", (1, 1, 9), False),
        ("name of a thread", "prctl", (15,), True),
        ("death of the parent", "prctl", (1,), False),
        ("flags of a descriptor", "fcntl", (3, 4, 0), True),
        ("owner of a descriptor", "fcntl", (3, 8, 1), False),
        ("signal of a descriptor", "fcntl", (3, 10, 9), False),
        ("whether a terminal", "ioctl", (0, 0x5401), True),
        ("typing into a terminal", "ioctl", (0, 0x5412), False),
        ("reading a file", "openat", (-100, 0x1000, os.O_RDONLY | os.O_CLOEXEC), True),
        ("reading a folder", "openat", (-100, 0x1000, os.O_DIRECTORY), True),
        ("writing a file", "openat", (-100, 0x1000, os.O_WRONLY), False),
        ("both", "openat", (-100, 0x1000, os.O_RDWR), False),
        ("making a file", "openat", (-100, 0x1000, os.O_CREAT), False),
        ("emptying a file", "openat", (-100, 0x1000, os.O_TRUNC), False),
        ("file without a name", "openat", (-100, 0x1000, os.O_TMPFILE), False),
        ("pair of local sockets", "socketpair", (1, 1), True),
        ("pair of others", "socketpair", (2, 1), False),
        ("within a pair", "sendto", (3, 0x1000, 1, 0, 0, 0), True),
        ("to an address", "sendto", (3, 0x1000, 1, 0, 0x7F0000001000, 16), False),
        ("to an address of round number", "sendto", (3, 0x1000, 1, 0, 2**32, 16), False),
    ),
)
def test_some_calls_are_allowed_by_their_arguments(machine, name, arguments, allowed):
    number = ALLOWED_IF[name][ARCHITECTURES[machine][0]]
    assert judged(machine, number, *arguments) == (ALLOWS if allowed else REFUSES)


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_calls_of_another_architecture_are_refused(machine):
    assert judged(machine, 0, architecture=0x40000003) == REFUSES  # reading, on i386 another call


def test_other_machines_have_no_filter():
    assert filter_of("riscv64") is None


@pytest.mark.parametrize(
    ("header", "column"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
)
def test_the_numbers_are_those_of_the_kernels_headers(header, column):
    if not Path(header).exists():
        pytest.skip("this machine has no headers of the kernel")
    known = {
        name: int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    }
    known.setdefault("newfstatat", known.get("fstatat"))
    if column == 1 and "prlimit64" not in known:
        pytest.skip("these headers name calls in another way")
    for name, numbers in (ALLOWED | ALLOWED_IF).items():
        if numbers[column] is not None and name in known:
            assert known[name] == numbers[column], name
    assert len(known) > 250
