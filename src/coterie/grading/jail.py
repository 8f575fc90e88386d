"""The program that runs inside the child process of `sandbox`: it limits itself, runs what it was given, and reports.

It is started by its path and imports the standard library alone. Every limit is put on by the process itself before
the first line of the tested program runs, and none can be taken off again:

* `setrlimit` (Linux and macOS): CPU time, address space, open files, core dumps; no file can be given a single byte.
* Landlock (Linux 5.13): no file is written, made, removed or executed, wherever it lies.
* seccomp (Linux, x86-64 and ARM64): no process is started, no socket opened, no other process signalled or traced,
  nothing left behind in the kernel. Both need no privilege and work in a container; root drops its capabilities first.
"""

import contextlib
import ctypes
import errno
import json
import os
import platform
import runpy
import signal
import struct
import sys
import traceback
from typing import NoReturn

PROGRAM = "program.py"
OPEN_FILES = 64
LONGEST_DETAIL = 500

# ---------------------------------------------------------------------------------------------- limits of Linux's own

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446


def _call(name: str, *arguments: bytes | int | None) -> int:
    """Call a function of the C library; -1 if it fails or is not there."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is None:
        return -1
    function.restype = ctypes.c_long
    return function(*(ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments))


def give_up_privileges() -> bool:
    """Die with the parent, drop root's capabilities, and never win any by executing a file."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return _call("capset", header, bytes(24)) == 0 and _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0


def forbid_writing() -> bool:
    """Forbid by Landlock whatever changes or executes a file; False where the kernel has no Landlock.

    The bits are those of `linux/landlock.h`; later versions of the interface know more of them.
    """
    version = _call("syscall", _LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    known = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    reading = 0b1100  # READ_FILE and READ_DIR stay free
    ruleset = struct.pack("=Q", ((1 << known) - 1) & ~reading)
    descriptor = _call("syscall", _LANDLOCK_CREATE_RULESET, ruleset, len(ruleset), 0)
    return descriptor >= 0 and _call("syscall", _LANDLOCK_RESTRICT_SELF, descriptor, 0) == 0


# ------------------------------------------------------------------------------------------- the filter of system calls

_FORBIDDEN = {  # number on x86-64 and on ARM64, None where there is none
    # processes
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "unshare": (272, 97),
    "setns": (308, 268),
    # network; io_uring could open sockets past this filter
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    # other processes, the parent above all
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    # what Landlock leaves open on files
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    # what outlives the process in the kernel
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "keyctl": (250, 219),
}
_CLONE, _PRLIMIT, _TGKILL = (56, 220), (302, 261), (234, 131)
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above; AUDIT_ARCH_*
_FIRST_X32_CALL = 0x40000000

# Offsets in struct seccomp_data, opcodes of classic BPF, answers of the filter.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_LOAD, _EQUALS, _AT_LEAST, _HAS_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000

Instruction = tuple[int, int, int, int]  # opcode, jump if true, jump if false, operand


def _refuse_if(test: int, operand: int, error: int = errno.EPERM) -> list[Instruction]:
    return [(test, 0, 1, operand), (_RETURN, 0, 0, _REFUSE | error)]


def _allow_only(call: int, test: int, operand: int) -> list[Instruction]:
    """Allow a call if its first argument passes the test."""
    return [
        (_EQUALS, 0, 4, call),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (test, 0, 1, operand),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE | errno.EPERM),
    ]


def _filter(column: int, architecture: int) -> list[Instruction]:
    """Write the filter: threads stay allowed, and limits and signals for the process itself."""
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUALS, 1, 0, architecture), (_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    steps += [(_LOAD, 0, 0, _NUMBER), *_refuse_if(_AT_LEAST, _FIRST_X32_CALL)]
    for numbers in _FORBIDDEN.values():
        number = numbers[column]
        steps += [] if number is None else _refuse_if(_EQUALS, number)
    steps += _refuse_if(_EQUALS, _CLONE3, errno.ENOSYS)  # its flags are out of reach; C libraries then take clone
    steps += _allow_only(_CLONE[column], _HAS_BIT, _CLONE_THREAD)
    steps += _allow_only(_PRLIMIT[column], _EQUALS, 0)
    steps += _allow_only(_TGKILL[column], _EQUALS, os.getpid())
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


def filter_system_calls() -> bool:
    """Forbid processes, sockets and reaching other processes by seccomp; False where this is not to be had."""
    if platform.machine() not in _ARCHITECTURES or sys.maxsize < 2**32:
        return False
    steps = _filter(*_ARCHITECTURES[platform.machine()])
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(code))  # struct sock_fprog
    return _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) == 0


# ---------------------------------------------------------------------------------------------------------- the run


def _limit(which: int, soft: int, hard: int) -> None:
    """Set a limit on resources, or keep a lower one that is there already."""
    import resource

    highest = resource.getrlimit(which)[1]
    if highest != resource.RLIM_INFINITY:
        soft, hard = min(soft, highest), min(hard, highest)
    resource.setrlimit(which, (soft, hard))


def confine(cpu_seconds: int, memory_bytes: int) -> list[str]:
    """Put on every limit this system has; return which of `landlock` and `seccomp` stand."""
    import resource

    unprivileged = sys.platform == "linux" and give_up_privileges()
    _limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)  # SIGXCPU, which tells what happened; then SIGKILL
    _limit(resource.RLIMIT_CORE, 0, 0)
    _limit(resource.RLIMIT_FSIZE, 0, 0)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
    if sys.platform != "darwin":  # which ignores this one
        _limit(resource.RLIMIT_AS, memory_bytes, memory_bytes)
    landlocked = unprivileged and forbid_writing()
    filtered = unprivileged and filter_system_calls()
    if not filtered:  # then no new processes, on Linux no threads either, for whoever is not root
        _limit(resource.RLIMIT_NPROC, 1, 1)
    return ["landlock"] * landlocked + ["seccomp"] * filtered


def _described(error: BaseException) -> str:
    """Return one line: the kind of error, and its message or else the line of the program that raised it."""
    with contextlib.suppress(Exception):  # whatever the error's own methods do
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.line or "" for frame in frames if frame.filename == PROGRAM]
        text = f"{type(error).__name__}: {str(error) or (lines or [''])[-1]}"
        return " ".join(text.split())[:LONGEST_DETAIL]
    return "an error that cannot be shown"


def main() -> NoReturn:
    """Read a request from standard input, run the program beside it, and report on standard output.

    The report is a line `started ...` and a line with the request's secret, or else the error. Only a program that ran
    to its end gets the secret told: leaving the process by any other way leaves the report without it.
    """
    request = json.loads(sys.stdin.buffer.read())
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # the three standard streams
        os.dup2(null, stream)
    os.close(null)
    os.environ.clear()
    standing = confine(request["cpu_seconds"], request["memory_bytes"])
    os.write(report, f"{' '.join(['started', *standing])}\n".encode())
    try:
        runpy.run_path(PROGRAM, run_name="program")
        verdict = request["secret"].encode()
    except MemoryError:
        verdict = b"MemoryError"  # there may be no room to build a text
    except BaseException as error:
        verdict = _described(error).encode(errors="replace")
    os.write(report, verdict)
    os._exit(0)


if __name__ == "__main__":
    main()
