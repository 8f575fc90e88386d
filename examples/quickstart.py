"""Write docs/quickstart.ipynb from docs/quickstart.md, so that page and notebook cannot differ.

    python examples/quickstart.py

Blocks of commands become cells, and what is printed under a block is its cell's output; all else is text.
"""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = "%cd -q ..\n"  # the commands are of the project's folder, the notebook lies in docs/


def commands(block: str) -> list[str]:
    """Return the commands of a block; where one is long, all of its lines but the last end in a backslash."""
    return re.split(r"(?<!\\)\n", block.strip())


def notebook(page: str) -> dict[str, Any]:
    """Return the notebook of a page, as its JSON."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, source: str, **more: Any) -> None:  # noqa: ANN401 - JSON
        if source.strip():
            lines = source.strip().splitlines(keepends=True)
            cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines, **more})

    first, *rest = re.split(r"^```(bash|text)\n(.*?)^```\n", page, flags=re.MULTILINE | re.DOTALL)
    add("markdown", first)
    add("code", FOLDER, execution_count=None, outputs=[])
    for kind, block, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        if kind == "bash":
            typed = "\n".join(f"!{command}" for command in commands(block))
            add("code", typed, execution_count=None, outputs=[])
        else:
            stream = {"output_type": "stream", "name": "stdout", "text": block.splitlines(keepends=True)}
            cells[-1]["outputs"].append(stream)
        add("markdown", text)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def written(page: str) -> str:
    """Return the notebook's file."""
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8")
    (DOCS / "quickstart.ipynb").write_text(written(text), encoding="utf-8")
