"""Limits that a process puts on itself before a stranger's first line runs, and that it cannot take off again.

* `setrlimit` (Linux and macOS): CPU time, address space, open files, core dumps; no file can be given a single byte.
* Namespaces (Linux, where the kernel lets a user have them): a network without a way out, and process numbers among
  which no other process is; all processes of the jail end with its first.
* Landlock (Linux 5.13): Python's own folders and the working one can be read, nothing else; no file is written, made,
  removed or executed. From its version 6 on it also stops signals to processes outside.
* seccomp (Linux, x86-64 and ARM64): only the system calls listed in `system_calls`.

None of it needs a privilege, all of it works in a container unless that forbids it; root drops its capabilities first.
This file needs the standard library alone: it is loaded in the children of `sandbox`.
"""

import contextlib
import ctypes
import os
import platform
import signal
import struct
import sys
import sysconfig

from coterie.grading.system_calls import filter_of

OPEN_FILES = 64

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_RULE_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 0b0100, 0b1000
_SIGNALLED = 128  # added to a signal's number in the status of a process that passes on how another ended


def _call(name: str, *arguments: bytes | int | None) -> int:
    """Call a function of the C library; -1 if it fails or is not there."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is None:
        return -1
    function.restype = ctypes.c_long
    return function(*(ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments))


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def enter_namespaces() -> bool:
    """Go on in a process that sees no other process and no network; False where the kernel gives no namespaces.

    Process numbers start anew in a child only, and the first process of a namespace ignores most signals, so the
    program becomes its second. Those above it wait, and end as it ended.
    """
    if _call("unshare", _CLONE_NEWUSER | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC) != 0:
        return False
    for is_first in (False, True):
        if child := os.fork():
            os.closerange(0, OPEN_FILES)  # the program alone holds its streams
            status = os.waitpid(child, 0)[1]
            ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status) - _SIGNALLED
            if ended_by > 0 and not is_first:
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(ended_by, signal.SIG_DFL)
                os.kill(os.getpid(), ended_by)
            os._exit(_SIGNALLED + ended_by if ended_by > 0 else os.WEXITSTATUS(status))
        die_with_parent()
    return True


def give_up_privileges() -> bool:
    """Drop root's capabilities, never win any by executing a file, and keep others of this user out of the memory."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    return _call("capset", header, bytes(24)) == 0 and _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0


def readable() -> list[str]:
    """List what a Python program reads to compute: its folder, the interpreter, libraries, time zones, noise."""
    places = [os.getcwd(), *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))]
    places += [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]
    places += [os.path.join(prefix, "lib") for prefix in (sys.prefix, sys.base_prefix)]
    places += ["/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/nix/store", "/usr/share/zoneinfo"]
    places += ["/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
    return list(dict.fromkeys(places))


def forbid_files() -> bool:
    """Forbid by Landlock all files but the readable ones; False where the kernel has no Landlock.

    The bits are those of `linux/landlock.h`; later versions of the interface know more of them.
    """
    version = _call("syscall", _LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    network = 0b11 if version >= 4 else None  # binding and connecting of TCP
    scoped = 0b11 if version >= 6 else None  # abstract sockets and signals
    ruleset = b"".join(struct.pack("=Q", part) for part in (files, network, scoped) if part is not None)
    descriptor = _call("syscall", _LANDLOCK_CREATE_RULESET, ruleset, len(ruleset), 0)
    if descriptor < 0:
        return False
    for place in readable():
        with contextlib.suppress(OSError):  # this machine has no such place
            opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
            access = _READ_FILE | _READ_DIR if os.path.isdir(place) else _READ_FILE
            rule = struct.pack("=Qi", access, opened)
            _call("syscall", _LANDLOCK_ADD_RULE, descriptor, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
            os.close(opened)
    return _call("syscall", _LANDLOCK_RESTRICT_SELF, descriptor, 0) == 0


def filter_system_calls() -> bool:
    """Allow the listed system calls alone; False where this is not to be had."""
    if (steps := filter_of(platform.machine())) is None:
        return False
    code = ctypes.create_string_buffer(steps)
    program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(code))  # struct sock_fprog
    return _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) == 0


def _limit(which: int, soft: int, hard: int) -> None:
    """Set a limit on resources, or keep a lower one that is there already."""
    import resource

    highest = resource.getrlimit(which)[1]
    if highest != resource.RLIM_INFINITY:
        soft, hard = min(soft, highest), min(hard, highest)
    resource.setrlimit(which, (soft, hard))


def confine(cpu_seconds: int, memory_bytes: int) -> list[str]:
    """Put on every limit this system has; return which of `namespaces`, `landlock` and `seccomp` stand."""
    import resource

    is_linux = sys.platform == "linux"
    if is_linux:
        die_with_parent()
    apart = is_linux and enter_namespaces()
    unprivileged = is_linux and give_up_privileges()
    _limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1)  # SIGXCPU, which tells what happened; then SIGKILL
    _limit(resource.RLIMIT_CORE, 0, 0)
    _limit(resource.RLIMIT_FSIZE, 0, 0)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
    if sys.platform != "darwin":  # which ignores this one
        _limit(resource.RLIMIT_AS, memory_bytes, memory_bytes)
    landlocked = unprivileged and forbid_files()
    filtered = unprivileged and filter_system_calls()
    if not filtered:  # then no new processes, on Linux no threads either, for whoever is not root
        _limit(resource.RLIMIT_NPROC, 1, 1)
    return ["namespaces"] * apart + ["landlock"] * landlocked + ["seccomp"] * filtered
