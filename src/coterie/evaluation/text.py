"""Numbers, lists and columns as plain text."""

from collections.abc import Iterable, Sequence

WIDTH = 100


def percent(share: float | None) -> str:
    """Write a share of 1 in percent, "-" where there is none."""
    return "-" if share is None else f"{100 * share:.1f}%"


def points(difference: float) -> str:
    """Write the difference of two shares in points."""
    return f"{100 * difference:+.1f}"


def nats(value: float | None) -> str:
    """Write an NLL, "-" where there is none; one that no working model has is cut to its magnitude."""
    return "-" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:.1e}"


def signed_nats(difference: float) -> str:
    """Write the difference of two NLLs."""
    return f"{difference:+.4f}" if abs(difference) < 100 else f"{difference:+.1e}"


def far_percent(share: float) -> str:
    """Write a share in percent that may lie far outside of 0 to 100."""
    return f"{round(100 * share)}%" if abs(share) < 9.99 else ">999%" if share > 0 else "<-999%"


def p_value(p: float | None) -> str:
    """Write a p-value, which is never 0, and nothing where there is none."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def listed(names: Sequence[str]) -> str:
    """Write names as a list in a sentence."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def grouped(findings: Iterable[tuple[str, str]]) -> str:
    """Write findings, each what was found and of which method, as in "higher accuracy of a and b; lower NLL of c"."""
    groups: dict[str, list[str]] = {}
    for what, method in findings:
        groups.setdefault(what, []).append(method)
    return "; ".join(f"{what} of {listed(methods)}" for what, methods in groups.items())


def aligned(lines: Sequence[Sequence[str]], sides: str) -> str:
    """Write lines of cells in columns, of at most `WIDTH` characters if need be by shortening the first column.

    Columns whose cells are all empty are left out.

    Args:
        lines: The heads of the columns, then the cells of every line.
        sides: "<" or ">" for every column: the side that its cells are set to.
    """
    columns = [
        (side, max(map(len, column)), column)
        for side, column in zip(sides, zip(*lines, strict=True), strict=True)
        if any(column[1:])
    ]
    room = WIDTH - sum(width + 2 for _, width, _ in columns[1:])
    side, width, names = columns[0]
    columns[0] = side, min(width, room), tuple(_shortened(name, room) for name in names)
    padded = [[f"{cell:{side}{width}}" for cell in column] for side, width, column in columns]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*padded, strict=True))


def _shortened(name: str, room: int) -> str:
    return name if len(name) <= room else name[: room - 1] + "…"
