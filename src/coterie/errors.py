"""Errors that a user can fix. Everything else that is raised is a bug of ours."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

LONGEST_ERROR = 4000  # characters

# Control characters, text-direction overrides, separators of lines and halves of surrogate pairs.
_ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str, keep: str = "") -> str:
    """Write what would act on a terminal instead of showing there as escapes, which JSON reads as the same text."""
    return _ACTING.sub(lambda sign: sign[0] if sign[0] in keep else f"\\u{ord(sign[0]):04x}", text)


def shortened(text: str, limit: int) -> str:
    """Cut the middle out of a text that is longer than `limit` characters."""
    end = (limit - 3) // 3
    return text if len(text) <= limit else f"{text[: limit - 3 - end]}...{text[-end:]}"


class CoterieError(Exception):
    """Trouble the user can fix, told in one line: what is wrong, what was given, what to do next.

    The command line prints it bare and exits with 2; a server maps it to a 4xx answer. It quotes names and values that
    may come from a stranger, so it is one line of bounded length, and nothing in it acts on a terminal.
    """

    def __init__(self, message: str = "") -> None:
        """Make the message one line."""
        super().__init__(shown(shortened(re.sub(r"\s*[\r\n]+\s*", " ", message.strip()), LONGEST_ERROR)))


def unknown_name(kind: str, got: str, known: Iterable[str]) -> CoterieError:
    """Build the error for a name that stands in no table: suggest the nearest one and list all."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return CoterieError(f"no {kind} is called {got!r}.{hint} There are: {', '.join(names)}")


def check_known(kind: str, got: str, known: Collection[str]) -> None:
    """Refuse a name that stands in no table.

    Raises:
        CoterieError: as `unknown_name`.
    """
    if got not in known:
        raise unknown_name(kind, got, known)


NEEDS_CODE = (
    "it needs Python code of its own, and no stranger's code runs here: use a checkpoint of an architecture that "
    "transformers has built in, often published beside it with -hf in its name"
)


def first_line(error: object) -> str:
    """Return the first line of what another library's error says, or its kind where it says nothing.

    Where transformers would have a user allow a model's own code, what to do instead is said.
    """
    if "trust_remote_code" in str(error):
        return NEEDS_CODE
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def missing_extra(package: str, extra: str) -> CoterieError:
    """Build the error for an optional package that is not installed."""
    return CoterieError(
        f"this needs the package {package!r}, which is not installed; type: pip install 'coterie[{extra}]'"
    )


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Name the file or folder whose contents led to an error, where the error does not name it itself."""
    try:
        yield
    except CoterieError as error:
        if str(place) in str(error):
            raise
        raise CoterieError(f"{place}: {error}") from error
