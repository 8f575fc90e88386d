"""The sandbox: how each ending is told, that each danger is stopped, and that nothing is left behind."""

import ctypes
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coterie.errors import CoterieError
from coterie.grading import sandbox
from coterie.grading.sandbox import Limits, Outcome, Protection, protection, run_limited
from coterie.grading.wire import LONGEST_ERROR
from helpers import table

SHORT = Limits(seconds=20.0, cpu_seconds=1, memory_bytes=2**29)
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def processes():
    """Number, parent and state of every process of this machine."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        found[int(file.parent.name)] = (int(parent), state)
    return found


def is_alive(number):
    return processes().get(number, (0, "Z"))[1] not in "ZX"


def is_confined(number):
    try:
        return "Seccomp:\t2" in Path(f"/proc/{number}/status").read_text()
    except OSError:  # it has just ended
        return False


def becomes(truth, seconds=20):
    """Wait until something is true; tell whether it came to be."""
    deadline = time.monotonic() + seconds
    while not truth() and time.monotonic() < deadline:
        time.sleep(0.05)
    return truth()


@pytest.fixture
def start_with(monkeypatch):
    """Have the children run some lines, which may change the module `jail`, before their own program."""

    def change(lines):
        before, main = sandbox._START.rsplit("; ", 1)
        monkeypatch.setattr(sandbox, "_START", f"{before}\nfrom coterie.grading import jail\n{lines}\n{main}")

    return change


@pytest.fixture
def without_kernel_guards(start_with):
    """Make the children believe that the kernel has none of its guards."""
    start_with("jail.give_up_privileges = jail.enter_namespaces = lambda: False")


@pytest.fixture
def filtered():
    if not protection().processes:
        pytest.skip("this kernel cannot filter system calls")


@pytest.fixture
def landlocked():
    if not protection().files:
        pytest.skip("this kernel has no Landlock")


# ---------------------------------------------------------------------------------------------------------- endings


@pytest.mark.parametrize(
    "program",
    table(
        ("nothing", ""),
        ("output", "print('x' * 1000)\nassert 1 + 1 == 2"),
        ("thread", "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()"),
        ("event loop", "import asyncio\nasync def one():\n    return 1\nassert asyncio.run(one()) == 1"),
        (
            "files to read",
            "import json.tool, zoneinfo\nassert zoneinfo.ZoneInfo('UTC')\nopen('/dev/urandom', 'rb').read(1)",
        ),
        ("large package", "import numpy\nassert (numpy.eye(300) @ numpy.ones((300, 300))).sum() == 90_000"),
        ("timer", "import signal\nsignal.signal(signal.SIGALRM, print)\nsignal.setitimer(signal.ITIMER_REAL, 9)"),
        (
            "pool of threads",
            "from concurrent.futures import *\nassert list(ThreadPoolExecutor(4).map(abs, [-1])) == [1]",
        ),
        ("own class by name", "import sys\nclass A: pass\nassert sys.modules[A.__module__].A is A"),
        ("many lines", "x = 1\n" * 100_000),
    ),
)
def test_a_program_that_runs_to_its_end_passes(program):
    assert run_limited(program) == Outcome("passed", "")


WRITE_EVERYWHERE = """
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, {text!r})
    except OSError:
        pass
os._exit(0)
"""


@pytest.mark.parametrize(
    ("program", "detail"),
    table(
        ("assertion", "x = 1\nassert x == 2", "AssertionError: assert x == 2"),
        ("assertion with words", "assert 0, 'it is\\n0'", "AssertionError: it is 0"),
        ("error", "1 / 0", "ZeroDivisionError: division by zero"),
        ("no Python", "def (", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("sys.exit", "import sys; sys.exit(0)", "SystemExit: 0"),
        ("exit without the interpreter", "import os; os._exit(0)", "the program left with status 0 before its end"),
        ("exit with a status", "import os; os._exit(7)", "the program left with status 7 before its end"),
        ("exit at exit", "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit", "SystemExit"),
        ("question", "input()", "EOFError: EOF when reading a line"),
        ("forged report", WRITE_EVERYWHERE.format(text=b"passed\n" + b"0" * 32), "the program left with status 0"),
        ("terminal codes", WRITE_EVERYWHERE.format(text=b"\x1b[31mred"), "the program left with status 0"),
        ("deep recursion", "def f(n): return f(n + 1)\nf(0)", "RecursionError: maximum recursion depth exceeded"),
        ("unshowable error", "class E(Exception):\n    def __str__(self): raise E\nraise E", "E: an error that cannot"),
        ("lone surrogate", "x = '\ud800'", "UnicodeEncodeError: "),
    ),
)
def test_a_program_that_does_not_reach_its_end_fails_and_says_why(program, detail):
    outcome = run_limited(program)
    assert outcome.status == "failed"
    assert outcome.detail.startswith(detail)


def test_a_detail_is_one_short_line():
    outcome = run_limited("raise ValueError('a\\n' * 100_000)")
    assert outcome.status == "failed"
    assert len(outcome.detail) == LONGEST_ERROR
    assert outcome.detail.isprintable()


@pytest.mark.parametrize(
    "program",
    table(
        ("endless loop", "while True:\n    pass"),
        ("endless recursion", "import sys\nsys.setrecursionlimit(2**30)\ndef f(): f()\nf()"),
        ("flood of output", "while True:\n    print('x' * 10_000)"),
        ("endless error text", "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E"),
    ),
)
def test_what_never_ends_is_ended_by_its_cpu_time(program):
    outcome = run_limited(program, limits=SHORT)
    # The endless recursion may first use up its memory or its stack.
    assert outcome.status in ({"timeout", "out-of-memory", "killed"} if "recursion" in program else {"timeout"})


def test_what_waits_is_ended_by_the_wall_clock():
    start = time.monotonic()
    assert run_limited("import time; time.sleep(300)", limits=Limits(seconds=0.5)).status == "timeout"
    assert time.monotonic() - start < 60


def test_the_slow_start_of_an_interpreter_is_not_taken_from_the_programs_time(start_with):
    start_with("import time\ntime.sleep(3)")
    assert run_limited("", limits=Limits(seconds=2.5)).status == "passed"


def test_ignoring_signals_helps_a_program_for_a_second_only():
    ignoring = "import signal\nfor s in (signal.SIGTERM, signal.SIGXCPU, signal.SIGINT, signal.SIGHUP):\n"
    program = ignoring + "    signal.signal(s, signal.SIG_IGN)\nwhile True:\n    pass"
    assert run_limited(program, limits=SHORT) == Outcome("killed", "ended by the signal SIGKILL")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit memory")
@pytest.mark.parametrize("program", ["x = 'x' * 2**32", "x = []\nwhile True:\n    x.append(bytearray(2**20))"])
def test_a_memory_hog_runs_out_of_memory(program):
    patient = Limits(seconds=60.0, cpu_seconds=30, memory_bytes=2**28)  # the kernel clears its pages on its own time
    assert run_limited(program, limits=patient) == Outcome("out-of-memory", "MemoryError")


def test_a_crash_is_told_by_its_signal():
    outcome = run_limited("import signal; signal.raise_signal(signal.SIGSEGV)")
    assert outcome == Outcome("killed", "ended by the signal SIGSEGV")


def test_a_flood_of_the_report_is_cut_and_ended():
    program = WRITE_EVERYWHERE.format(text=b"x" * 5000).replace("os.write", "while True: os.write")
    outcome = run_limited(program, limits=SHORT)
    assert outcome.status != "passed"
    assert len(outcome.detail) <= LONGEST_ERROR


def test_closing_the_report_is_no_way_to_live_on():
    start = time.monotonic()
    outcome = run_limited("import os, time\nos.closerange(0, 64)\ntime.sleep(300)", limits=Limits(seconds=200.0))
    assert outcome.status == "killed"
    assert time.monotonic() - start < 60


# ------------------------------------------------------------------------------------------------- what a child sees


def test_environment_arguments_and_working_folder_are_empty():
    seen = run_limited("import os, sys\nraise ValueError(repr((dict(os.environ), sys.argv, os.listdir())))")
    assert seen.detail == "ValueError: ({}, ['program.py'], [])"


def test_hashes_are_the_same_in_every_run():
    first, second = (run_limited("raise ValueError(hash('coterie'))").detail for _ in range(2))
    assert first == second
    assert first.startswith("ValueError: ")


# ----------------------------------------------------------------------------------------------- what it cannot reach

REFUSED = """
import ctypes, fcntl, os, resource, signal, socket, subprocess, sys, threading
def call(number, *arguments):  # of the kernel, on x86-64
    if ctypes.CDLL(None).syscall(number, *map(ctypes.c_long, arguments)) < 0:
        raise OSError
victim = {victim!r}
try:
    {attempt}
except OSError:
    pass
else:
    raise RuntimeError("it was allowed")
"""


def refuses(attempt: str, victim: Path) -> None:
    """The sandbox refuses what a program attempts on a file, which stays as it was."""
    victim.write_text("untouched")
    assert run_limited(REFUSED.format(attempt=attempt, victim=str(victim))) == Outcome("passed", "")
    assert victim.read_text() == "untouched"


@pytest.mark.parametrize(
    "attempt",
    table(
        ("fork", "os.fork()"),
        ("spawn", "os.posix_spawn('/bin/true', ['true'], {})"),
        ("subprocess", "subprocess.run(['/bin/true'])"),
        ("execute", "os.execv('/bin/true', ['true'])"),
        ("internet socket", "socket.socket()"),
        ("local socket", "socket.socket(socket.AF_UNIX)"),
        ("signal to the parent", "os.kill(os.getppid(), 0)"),
        ("signal to the parent's group", "os.killpg(os.getpgid(os.getppid()), 0)"),
        ("signal by descriptor", "signal.pidfd_send_signal(os.open(f'/proc/{os.getppid()}', os.O_RDONLY), 0)"),
        ("limits of the parent", "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)"),
        ("priority of the parent", "os.setpriority(os.PRIO_PROCESS, os.getppid(), 0)"),
        ("mode of a file", "os.chmod(victim, 0o777)"),
        ("owner of a file", "os.chown(victim, -1, -1)"),
        ("times of a file", "os.utime(victim)"),
        ("attribute of a file", "os.setxattr(victim, 'user.a', b'')"),
        ("truncation", "os.truncate(victim, 0)"),
        ("truncation by reading", "os.open(victim, os.O_RDONLY | os.O_TRUNC)"),
        ("opening to write", "os.open(victim, os.O_WRONLY)"),
        ("pair of internet sockets", "socket.socketpair(socket.AF_INET)"),
        ("datagram", "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', '\\0away')"),
        ("datagram as a message", "socket.socketpair(type=socket.SOCK_DGRAM)[0].sendmsg([b'x'], [], 0, '\\0away')"),
        ("signals of a descriptor to the parent", "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())"),
        ("another signal of a descriptor", "fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, signal.SIGKILL)"),
        ("lease on a file", "fcntl.fcntl(0, fcntl.F_SETLEASE, fcntl.F_RDLCK)"),
        ("input for the terminal", "fcntl.ioctl(0, 0x5412, b'x')"),
        ("living on after the parent", "call(157, 1, 0)"),
        ("being traced", "call(157, 0x59616d61, -1)"),
        ("scheduling of the parent", "call(314, os.getppid(), 0, 0)"),
        ("priority of the parent's disk", "call(251, 1, os.getppid(), 0)"),
        ("memory without a file", "call(319, 0, 0)"),
        ("a call of tomorrow", "call(1000)"),
        ("a call of the x32 kind", "call(0x40000000 + 39)"),
        ("own group", "os.setpgid(0, 0)"),
    ),
)
def test_processes_network_and_others_are_out_of_reach(filtered, tmp_path, attempt):
    refuses(attempt, tmp_path / "victim")


@pytest.mark.parametrize(
    "attempt",
    table(
        ("write here", "open('note', 'w')"),
        ("write elsewhere", "open(victim + '2', 'w')"),
        ("append", "open(victim, 'a')"),
        ("rewrite itself", "open('program.py', 'r+')"),
        ("remove", "os.remove(victim)"),
        ("rename", "os.rename(victim, victim + '2')"),
        ("link", "os.link(victim, victim + '2')"),
        ("symbolic link", "os.symlink(victim, victim + '2')"),
        ("folder", "os.mkdir(victim + '2')"),
        ("pipe", "os.mkfifo(victim + '2')"),
        ("memory of the parent", "open(f'/proc/{os.getppid()}/mem', 'rb')"),
        ("reading a file", "open(victim)"),
        ("reading the user's folder", "os.listdir(os.path.dirname(victim))"),
        ("reading passwords", "open('/etc/passwd')"),
        ("environment of the parent", "open(f'/proc/{os.getppid()}/environ', 'rb')"),
    ),
)
def test_files_are_neither_made_nor_changed_nor_removed(landlocked, tmp_path, attempt):
    refuses(attempt, tmp_path / "victim")
    assert os.listdir(tmp_path) == ["victim"]


@linux_only
def test_other_processes_are_out_of_sight():
    if "namespaces" not in sandbox._run("", "", "", Limits()).standing:
        pytest.skip("this kernel gives no namespaces to users")
    assert run_limited("import os\nassert (os.getpid(), os.getppid()) == (2, 1)") == Outcome("passed", "")


@linux_only
def test_root_gives_up_its_powers(start_with):
    start_with("jail.forbid_files = lambda: False")  # or this could not be read
    held = "[line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapEff', 'CapPrm'))]"
    assert run_limited(f"assert set({held}) == {{'0' * 16}}") == Outcome("passed", "")


def test_limits_cannot_be_raised_again():
    program = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"
    assert run_limited(program).detail.startswith(("ValueError", "PermissionError"))


@linux_only
def test_a_fork_bomb_makes_no_process(filtered):
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n        made = True\n    except OSError:\n        pass"
    before = len(processes())
    assert run_limited(bomb, limits=SHORT).status == "timeout"
    assert len(processes()) < before + 50


def test_a_thread_bomb_ends_with_its_process():
    bomb = "import threading, time\nthreading.stack_size(2**16)\nwhile True:\n"
    bomb += "    threading.Thread(target=time.sleep, args=(300,)).start()"
    outcome = run_limited(bomb, limits=Limits(seconds=3.0, cpu_seconds=1, memory_bytes=2**29))
    assert outcome.status != "passed"
    assert run_limited("") == Outcome("passed", "")


# ------------------------------------------------------------------------------------------------- what is left behind


def test_the_working_folder_is_gone_afterwards():
    folder = run_limited("import os\nraise ValueError(os.getcwd())").detail.removeprefix("ValueError: ")
    assert "coterie-" in folder
    assert not os.path.exists(folder)


LEAVE_A_CHILD = """
import os, signal, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(os.path.join({folder!r}, str(os.getpid())), "w").close()
    time.sleep(300)
while len(os.listdir({folder!r})) < {count}:
    time.sleep(0.01)
"""


@linux_only
@pytest.mark.parametrize(
    ("program", "seconds", "status"), [("", 60.0, "passed"), ("import time; time.sleep(300)", 1.0, "timeout")]
)
def test_a_childs_children_die_with_it_where_it_can_have_any(start_with, tmp_path, program, seconds, status):
    start_with(LEAVE_A_CHILD.format(folder=str(tmp_path), count=1))
    assert run_limited(program, limits=Limits(seconds=seconds)).status == status
    numbers = [int(name) for name in os.listdir(tmp_path)]
    assert len(numbers) == 2  # of the answer's process and of the tests'
    assert becomes(lambda: not any(map(is_alive, numbers)))


@linux_only
def test_the_children_die_with_their_parent(filtered, tmp_path):
    code = "from coterie.grading.sandbox import *\nrun_limited('import time; time.sleep(300)', limits=Limits(300.0))"
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def confined():
        tree, found = processes(), {parent.pid}
        for _ in range(4):  # a child, the first of its namespace, the program
            found |= {number for number, (above, _) in tree.items() if above in found}
        return [number for number in found if is_confined(number)]

    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        assert becomes(lambda: len(confined()) == 2)
        children = confined()
        parent.send_signal(signal.SIGKILL)
    assert becomes(lambda: not any(map(is_alive, children)))


# --------------------------------------------------------------------------------------------------- other systems


def test_without_the_kernels_guards_this_is_said_and_the_limits_still_hold(without_kernel_guards):
    assert protection.__wrapped__() == Protection(processes=False, network=False, files=False)
    assert run_limited("x = 1") == Outcome("passed", "")
    assert run_limited("while True:\n    pass", limits=SHORT).status == "timeout"
    full = run_limited("open('note', 'w').write('x' * 100_000)")
    assert full == Outcome("failed", "OSError: [Errno 27] File too large")


@linux_only
def test_the_guards_that_this_kernel_has_are_on():
    has_filter = os.path.exists("/proc/sys/kernel/seccomp/actions_avail") and platform.machine() in {
        "x86_64",
        "aarch64",
    }
    has_landlock = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) >= 1
    assert protection() == Protection(processes=has_filter, network=has_filter, files=has_landlock)


def test_windows_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "win32")
    with pytest.raises(CoterieError, match="Linux and macOS only"):
        run_limited("")


def test_an_interpreter_that_does_not_start_is_no_verdict_on_the_program(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CoterieError, match=r"does not start \(status 1\)"):
        run_limited("")


@pytest.mark.parametrize(
    "limits", [{"seconds": 0.0}, {"seconds": float("nan")}, {"cpu_seconds": -1}, {"memory_bytes": 0}], ids=str
)
def test_a_limit_that_is_not_above_zero_is_refused(limits):
    ((name, value),) = limits.items()
    with pytest.raises(CoterieError, match=f"^the limit {name} must be a number above 0; got {value}$"):
        Limits(**limits)
