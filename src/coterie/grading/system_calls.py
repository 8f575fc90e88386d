"""The filter of system calls (seccomp, x86-64 and ARM64): what a Python program needs to compute, and nothing else.

A call that is not listed is refused, so a kernel's new ones are too. Reading stays possible, threads, timers and pipes
between them; starting a process, opening a file for writing, a socket to anywhere, and whatever reaches another process
(signals, priorities, owners of descriptors, tracing) do not.

This file needs the standard library alone: it is loaded in the children of `sandbox`.
"""

import errno
import os
import struct
import sys

Numbers = dict[str, tuple[int | None, int | None]]
"""Of system calls by name, on x86-64 and on ARM64; None where there is none."""


def _numbers(*tables: str) -> Numbers:
    """Read tables of names, each with its two numbers, or - in place of one."""
    entries = (entry.split() for table in tables for entry in table.split(","))
    return {
        name: (None if first == "-" else int(first), None if second == "-" else int(second))
        for name, first, second in entries
    }


ALLOWED = _numbers(
    # what is open, and reading what Landlock leaves open (recvfrom: from a socketpair, the only sockets there are)
    "read 0 63, pread64 17 67, readv 19 65, preadv 295 69, write 1 64, writev 20 66, close 3 57, "
    "close_range 436 436, lseek 8 62, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, "
    "statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, readlink 89 -, "
    "readlinkat 267 78, getdents64 217 61, getcwd 79 17, fadvise64 221 223, dup 32 23, dup2 33 -, dup3 292 24, "
    "pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -, "
    "epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, "
    "eventfd2 290 19, recvfrom 45 207, shutdown 48 210, getsockopt 55 209",
    # memory
    "mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, brk 12 214, mincore 27 232",
    # threads of its own
    "set_robust_list 273 99, set_tid_address 218 96, rseq 334 293, futex 202 98, futex_waitv 449 449, "
    "sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121, sched_getscheduler 145 120, "
    "arch_prctl 158 -, restart_syscall 219 128, exit 60 93, exit_group 231 94",
    # signals to itself
    "rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, "
    "rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, alarm 37 -, "
    "setitimer 38 103, getitimer 36 102",
    # clocks
    "clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, "
    "gettimeofday 96 169, time 201 -, times 100 153",
    # who and where it is
    "getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, "
    "getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, getpgrp 111 -, getpgid 121 155, "
    "getsid 124 156, uname 63 160, sysinfo 99 179, getrandom 318 278, getrusage 98 165, getrlimit 97 163, "
    "setrlimit 160 164, getcpu 309 168, umask 95 166",
)
ALLOWED_IF = _numbers(
    "clone 56 220, prlimit64 302 261, tgkill 234 131, prctl 157 167, fcntl 72 25, ioctl 16 29, open 2 -, "
    "openat 257 56, socketpair 53 199, sendto 44 206",
)
"""Calls that are allowed where one argument says so."""
_CLONE3 = 435
_CLONE_THREAD = 0x10000
# Naming a thread. PR_SET_PDEATHSIG, with which a child would outlive the process that limits it, is none of them.
_PRCTL = (15, 16)
# Duplicating a descriptor and its flags. F_SETOWN and F_SETSIG, which send signals to any process, are none of them.
_FCNTL = (0, 1, 2, 3, 4, 1030)
# Is it a terminal, how large, pass it on or not, wait or not, how much is there to read.
_IOCTL = (0x5401, 0x5413, 0x5450, 0x5451, 0x5421, 0x541B)
_AF_UNIX = 1

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above; AUDIT_ARCH_*

# Offsets in struct seccomp_data, opcodes of classic BPF, answers of the filter.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_LOAD, _EQUALS, _HAS_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000

Instruction = tuple[int, int, int, int]  # opcode, jump if true, jump if false, operand
_ALLOWS: Instruction = (_RETURN, 0, 0, _ALLOW)
_REFUSES: Instruction = (_RETURN, 0, 0, _REFUSE | errno.EPERM)


def _argument(index: int, half: int = 0) -> Instruction:
    """Load 32 bits of an argument, the lower ones first: both architectures are little-endian."""
    return _LOAD, 0, 0, _ARGUMENTS + 8 * index + 4 * half


def _is_one_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow a call whose argument is one of some values."""
    tests = [step for value in values for step in ((_EQUALS, 0, 1, value), _ALLOWS)]
    return [_argument(index), *tests, _REFUSES]


def _has_none_of(index: int, bits: int) -> list[Instruction]:
    return [_argument(index), (_HAS_BIT, 0, 1, bits), _REFUSES, _ALLOWS]


def _conditions() -> dict[str, list[Instruction]]:
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)
    nowhere = [_argument(4), (_EQUALS, 1, 0, 0), _REFUSES, _argument(4, half=1), (_EQUALS, 1, 0, 0), _REFUSES, _ALLOWS]
    return {
        "clone": [_argument(0), (_HAS_BIT, 1, 0, _CLONE_THREAD), _REFUSES, _ALLOWS],
        "prlimit64": _is_one_of(0, (0,)),  # of itself
        "tgkill": _is_one_of(0, (os.getpid(),)),
        "prctl": _is_one_of(0, _PRCTL),
        "fcntl": _is_one_of(1, _FCNTL),
        "ioctl": _is_one_of(1, _IOCTL),
        "open": _has_none_of(1, changing),
        "openat": _has_none_of(2, changing),
        "socketpair": _is_one_of(0, (_AF_UNIX,)),
        "sendto": nowhere,  # no address: what is written stays within a socketpair
    }


def filter_of(machine: str) -> bytes | None:
    """Write the filter for this process as an array of struct sock_filter; None for other machines than the two."""
    if machine not in _ARCHITECTURES or sys.maxsize < 2**32:
        return None
    column, architecture = _ARCHITECTURES[machine]
    steps: list[Instruction] = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUALS, 1, 0, architecture), _REFUSES]
    steps.append((_LOAD, 0, 0, _NUMBER))  # of the x32 kind are large, and so none of those below
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            steps += [(_EQUALS, 0, 1, number), _ALLOWS]
    for name, condition in _conditions().items():
        if (number := ALLOWED_IF[name][column]) is not None:
            steps += [(_EQUALS, 0, len(condition), number), *condition]
    # Its flags are out of reach; C libraries then take clone.
    steps += [(_EQUALS, 0, 1, _CLONE3), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS), _REFUSES]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
