"""How a process of the command line ends: its exit code, one line on stderr, and what signals do to it."""

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from coterie import ranks
from coterie.artifacts import is_full
from coterie.cli.table import echo
from coterie.errors import CoterieError, shown
from coterie.settings.old_spellings import current_words

TROUBLE = 2  # something that the user can fix
OF_SIGNAL = 128  # what a signal ends exits with this and the signal's number
INTERRUPTED = OF_SIGNAL + signal.SIGINT
READER_GONE = OF_SIGNAL + 13  # SIGPIPE, which not every system has
IN_A_LOG = {
    "TQDM_DELAY": "10",
    "TQDM_MININTERVAL": "30",
    "TQDM_MINITERS": "0",
    "TQDM_BAR_FORMAT": "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left\n",
}
"""How tqdm, which reads this when it is first imported, writes to what is no terminal: after 10 s, then every 30 s."""
SPINS = "10000"
"""How often a thread of GNU OpenMP looks for others before it sleeps: a thirtieth of its default, with which any busy
neighbour makes steps 25 times slower. This costs a fifth at most where nobody else works."""
MOMENT = 0.05  # seconds
STOPPED = "stopped; the same command goes on where it stopped"


def finish(run: Callable[[list[str]], object]) -> None:
    """Run the words of the command line and exit; trouble that the user can fix is one line and exit code 2.

    Ctrl-C and SIGTERM stop the work as an error would, so that what can be resumed is kept, and a second one ends the
    process at once. A reader of stdout that is gone, such as `head`, ends it quietly.
    """
    with _signals_stop() as received:
        try:
            code, trouble = _outcome(run)
        except (Exception, KeyboardInterrupt):  # a library may have made another error of it
            if not received:
                raise
            code, trouble = INTERRUPTED, ""
        if code == INTERRUPTED or (code and received):
            code, trouble = OF_SIGNAL + (received or [signal.SIGINT])[0], STOPPED
        if trouble:
            with suppress(OSError):
                echo(trouble, err=True)
    sys.exit(code)


def bound_spinning() -> None:
    """Say how long threads wait actively, unless the user has; it is read when torch is loaded."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


class _BesideBars(logging.StreamHandler[TextIO]):
    def emit(self, record: logging.LogRecord) -> None:
        """Write a line where no bar stands; in a log there is none."""
        if not self.stream.isatty():
            super().emit(record)
            return
        from tqdm import tqdm  # which reads when it is imported how it writes

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), keep="\n\t")


@contextmanager
def _signals_stop() -> Iterator[list[int]]:
    """Let the first signal raise KeyboardInterrupt and the second end the process; give the numbers received.

    In a callback whose errors Python ignores, as that of an object's end, the interrupt would be lost: it is raised
    anew a moment later.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(OF_SIGNAL + number)
        received.append(number)
        raise KeyboardInterrupt

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def ignored(error: Any) -> None:  # noqa: ANN401 - sys.UnraisableHookArgs, which only type checkers know
        if received and issubclass(error.exc_type, KeyboardInterrupt):
            before.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, interrupt))
            signal.setitimer(signal.ITIMER_REAL, MOMENT)
        else:
            hook(error)

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    wanted = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield received
    finally:
        sys.unraisablehook = hook
        if signal.SIGALRM in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(run: Callable[[list[str]], object]) -> tuple[int, str]:
    """Return the exit code, and the line that tells why."""
    try:
        handler = _BesideBars(sys.stderr)
        handler.setFormatter(_Shown("%(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        warnings.filterwarnings("ignore", category=FutureWarning)  # libraries talking to each other, not to the user
        logging.getLogger("coterie").setLevel(logging.ERROR if ranks.is_quiet() else logging.INFO)
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it misses a kernel of no use here
        bound_spinning()
        if not sys.stderr.isatty():
            os.environ |= {name: value for name, value in IN_A_LOG.items() if name not in os.environ}
        for word in sys.argv[1:]:
            word.encode()
        code = run(current_words(sys.argv[1:], lambda line: echo(line, err=True)))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED, ""
    except SystemExit:  # typer's, when a pipe is broken
        return READER_GONE, ""
    except CoterieError as error:
        return TROUBLE, f"error: {error}"
    except UnicodeEncodeError as error:
        return TROUBLE, f"error: {error.object!r} is no text in UTF-8; write it in other characters"
    except OSError as error:
        return _disk_trouble(error)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # empty where no command was given: the help stands there already
        command = getattr(getattr(error, "ctx", None), "command_path", "coterie")
        return TROUBLE, _usage_trouble(message, command) if message else "type one of the commands above"
    return code if isinstance(code, int) else 0, ""


def _usage_trouble(message: str, command: str) -> str:
    """Return the line for what typer says of the words, ending with the help that shows the right ones."""
    ends = " Or type:" if message.endswith("?") else "; type:"
    told = message.replace(": Value error, ", ": ").rstrip(".")  # pydantic's words, which typer passes on
    return f"error: {told}{ends} {command} --help"


def _disk_trouble(error: OSError) -> tuple[int, str]:
    """Return the exit code and the line for an error of a stream, a disk or a name; any other one is a bug."""
    if error.errno == errno.EPIPE or is_full(error):
        with suppress(OSError):  # what is left in the buffer of stdout would fail again at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif error.errno not in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS):
        raise error
    if error.errno == errno.EPIPE:
        return READER_GONE, ""
    where = f"{str(error.filename)[:80]!r} " if error.filename else "what was to be printed or written "
    return TROUBLE, f"error: {where}cannot be had: {error.strerror}; give another name, or make room"
