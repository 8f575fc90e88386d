"""Errors that a user can fix. Everything else that is raised is a bug of ours."""

import difflib
from collections.abc import Iterable


class CoterieError(Exception):
    """Trouble the user can fix, told in one line: what is wrong, what was given, what to do next.

    The command line prints it bare and exits with 2; a server maps it to a 4xx answer.
    """


def unknown_name(kind: str, got: str, known: Iterable[str]) -> CoterieError:
    """Build the error for a name that stands in no table: suggest the nearest one and list all."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return CoterieError(f"no {kind} is called {got!r}.{hint} There are: {', '.join(names)}")


def first_line(error: object) -> str:
    """Return the first line of what another library's error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def missing_extra(package: str, extra: str) -> CoterieError:
    """Build the error for an optional package that is not installed."""
    return CoterieError(
        f"this needs the package {package!r}, which is not installed; type: pip install 'coterie[{extra}]'"
    )
