"""Build the documentation site from docs/ and the code: python docs/build.py, or make docs.

Pages of docs/ are taken as they are. A page for every method, every command and every public name is written from the
tables that the command line itself uses, so none of them can say something else. Everything lies below build/, and no
network is needed.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import coterie
from coterie.cli.table import COMMANDS, PANELS
from coterie.combiners.table import make_combiner
from coterie.methods import FAMILIES
from coterie.methods.family import Family, Method
from coterie.settings.reading import flag_of, flat_fields

PROJECT = Path(__file__).parents[1]
DOCS, BUILD = PROJECT / "docs", PROJECT / "build"
PAGES, CONFIG = BUILD / "docs", BUILD / "mkdocs.yml"
FITTED = {"elrea": "runs/elrea", "token-level": "runs/tle", "kshot-moe": "runs/task", "symbolic-moe": "runs/sym"}
"""Where the pages' commands have the mixture of a family."""


def main() -> None:
    """Write all pages, and let zensical make a site of them."""
    write_pages()
    arguments = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", str(CONFIG)]
    subprocess.run(arguments, cwd=BUILD, check=True)
    print(BUILD / "site" / "index.html")


def write_pages() -> None:
    """Write the site's pages and its configuration below build/."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(DOCS, PAGES, ignore=shutil.ignore_patterns("*.py", "mkdocs.yml", "__pycache__"))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = (PROJECT / name).read_text(encoding="utf-8")
        (PAGES / name.lower()).write_text(text.replace("](docs/", "]("), encoding="utf-8")
    config = yaml.safe_load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"))
    sections = {"Methods": method_pages(), "Commands": command_pages(), "Python": name_pages()}
    for section in config["nav"]:
        for title, entries in section.items():
            for name, text in sections.get(title, {}).items():
                place = f"{title.lower()}/{name.replace(' ', '-')}.md"
                (PAGES / place).parent.mkdir(exist_ok=True)
                (PAGES / place).write_text(text, encoding="utf-8")
                entries.append({name: place})
    config |= {"docs_dir": "docs", "site_dir": "site"}
    CONFIG.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- methods


def method_pages() -> dict[str, str]:
    """Return a page for every method, by name; one that several families have has a section for each."""
    names = dict.fromkeys(name for family in FAMILIES.values() for name in family.methods)
    return {name: _method_page(name) for name in names}


def _method_page(name: str) -> str:
    families = [family for family in FAMILIES.values() if name in family.methods]
    sections = [_of_family(name, family) for family in families]
    measured = list(_measured(name))
    fit = COMMANDS.get(f"fit {name}")
    told = f"{fit.function.__doc__} [Its settings](../commands/fit-{name}.md).\n\n" if fit else ""
    text = f"# {name}\n\n{told}" + "\n\n".join(sections)
    if chosen := [line for line in _table_rows("choosing.md") if f"`{name}`" in line or f" {name}`" in line]:
        rows = "\n".join("* " + " — ".join(_cells(line)) for line in chosen)
        text += f"\n\n## When\n\nFrom [which method for which situation](../choosing.md):\n\n{rows}"
    if measured:
        text += "\n\n## Measured\n\nFrom [the evidence](../evidence.md), where its terms are explained:\n\n"
        text += "\n\n".join(measured)
    return text + "\n"


def _of_family(name: str, family: Family[Any]) -> str:
    """Tell of a method on one kind of run: its three places, its source, what it trains, what to type."""
    method: Method = family.methods[name]
    papers = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", method.paper)
    heading = f"## After `coterie fit {family.name}`"
    places = [("experts", method.bank), ("router", method.router), ("combiner", method.combiner or "the mixture's own")]
    rows = [*places, ("source", papers), ("trained besides", ", ".join(method.needs) or "nothing")]
    table = "\n".join(["| place | what stands there |", "|---|---|", *(f"| {what} | {told} |" for what, told in rows)])
    return f"{heading}\n\n{table}\n\n{_depth(method)}```bash\n{chr(10).join(typed(name, family))}\n```"


def _depth(method: Method) -> str:
    """Say what the combiner does, in the words of the code."""
    try:
        kind = type(make_combiner(method.combiner.partition(": ")[0]))
    except coterie.CoterieError:  # such as a mixture's own
        return ""
    return f"{(kind.__doc__ or '').splitlines()[0]}\n\n"


def typed(name: str, family: Family[Any]) -> list[str]:
    """Return the commands with which a method is used on a run of its family."""
    run, method = FITTED[family.name], family.methods[name]
    lines = [f"coterie train-extras {run} --methods {name}"] if method.needs else []
    if method.by_prompt and method.make_router is not None:
        lines.append(f'coterie generate {run} "If 12 pens cost 18 dollars, what do 5 cost?" --method {name}')
    return [*lines, f"coterie eval {run} --data test.jsonl --methods {name} --output runs/eval"]


def _measured(name: str) -> Iterator[str]:
    """Yield a method's rows of the tables of evidence, each under the heading and the head of its table."""
    place, head = "", ""
    lines = (DOCS / "evidence.md").read_text(encoding="utf-8").splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("#"):
            place = line.lstrip("# ")
        elif line.startswith("|") and following.startswith("|---"):
            head = f"{line}\n{following}"
        elif line.startswith("|") and _cells(line)[0].strip("`*") == name:
            yield f"**{place}**\n\n{head}\n{line}"


def _table_rows(page: str) -> list[str]:
    return [line for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


# -------------------------------------------------------------------------------------------------------- commands


def command_pages() -> dict[str, str]:
    """Return a page for every command, in the order of help: what it does, and its flags with their defaults."""
    order = [first for panel in PANELS.values() for first in panel]
    names = sorted(COMMANDS, key=lambda name: order.index(name.partition(" ")[0]))
    return {name: _command_page(name) for name in names}


def _command_page(name: str) -> str:
    command = COMMANDS[name]
    text = f"# coterie {name}\n\n{command.function.__doc__}\n"
    groups: dict[str, list[str]] = {}
    for field, info, group in flat_fields(command.settings) if command.settings else ():
        default = "needed" if info.is_required() else f"`{info.default}`" if info.default not in (None, []) else ""
        told = (info.description or "").replace("|", "\\|")
        groups.setdefault(group or "", []).append(f"| `{flag_of(field)}` | {default} | {told} |")
    for group, rows in sorted(groups.items(), key=lambda pair: bool(pair[0])):
        title = f"## {group}\n\n" if group else ""
        text += f"\n{title}| setting | default | |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    return f"{text}\n`coterie {name} --help` prints the same, with what is given by place and an example.\n"


# ---------------------------------------------------------------------------------------------------------- names


def name_pages() -> dict[str, str]:
    """Return a page for every public class and function of `coterie` and of `coterie.methods`."""
    pages = {}
    for module in (coterie, coterie.methods):
        for name in module.__all__:
            found = getattr(module, name)
            home = getattr(found, "__module__", None)
            if callable(found) and home and home.startswith("coterie."):
                pages[f"{module.__name__}.{name}"] = f"::: {home}.{found.__name__}\n"
    return pages


if __name__ == "__main__":
    main()
