"""Numbers, names and tables as plain text."""

from collections.abc import Iterable, Sequence

from coterie.errors import shortened, shown

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


def told_p(p: float | None) -> str:
    """Write a p-value in a sentence."""
    return f"p = {p_value(p)}".replace("= <", "< ")


def listed(names: Sequence[str]) -> str:
    """Join names with commas and an "and", or with semicolons where a name has a comma of its own."""
    between, last = ("; ", "; and ") if any("," in name for name in names) else (", ", " and ")
    return last.join(filter(None, (between.join(names[:-1]), *names[-1:])))


def grouped(findings: Iterable[tuple[str, str]]) -> str:
    """Write findings, each what was found and of which method, as in "higher accuracy of a and b; lower NLL of c"."""
    groups: dict[str, list[str]] = {}
    for what, method in findings:
        groups.setdefault(what, []).append(method)
    return "; ".join(f"{what} of {listed(methods)}" for what, methods in groups.items())


def columns(lines: Sequence[Sequence[str]], sides: str, width: int | None = None) -> str:
    """Write lines of cells in columns; columns whose cells are all empty are left out.

    Args:
        lines: the heads of the columns, then the cells of every line.
        sides: "<" or ">" for every column: the side that its cells are set to.
        width: most characters of a line, if need be by shortening the first column; None: as many as it takes.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = [[shown(cell) for cell in line] for line in lines]
    pairs = zip(sides, zip(*lines, strict=True), strict=True)
    kept = [(side, cells) for side, cells in pairs if len(lines) == 1 or any(cells[1:])]
    widths = [max(map(cell_len, cells)) for _, cells in kept]
    needed = sum(widths) + 2 * (len(widths) - 1)
    if width is not None and needed > width:
        widths[0] -= needed - width
    table = Table(box=None, show_header=False, show_edge=False, pad_edge=False, padding=(0, 1))
    for (side, _), room in zip(kept, widths, strict=True):
        table.add_column(justify="left" if side == "<" else "right", width=room, no_wrap=True, overflow="ellipsis")
    for line in zip(*(cells for _, cells in kept), strict=True):
        table.add_row(*map(Text, line))
    console = Console(width=sum(widths) + 2 * len(widths), color_system=None, legacy_windows=False)
    with console.capture() as text:
        console.print(table)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def printable(text: str, limit: int) -> str:
    """Make a stranger's text fit for a line on a terminal; what is too long loses its middle."""
    return shortened("".join(sign if sign.isprintable() else " " for sign in text), limit)
