"""The stages of a run: each is made once, and again only where something that it is made from has changed.

`stages.jsonl` of a run folder tells of every stage what it was made from, so that a run may go on with other settings,
and a run that replaces a finished one takes over what would become the same.
"""

import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie import ranks
from coterie.artifacts.files import append_text, disk_errors, hash_json, write_json, write_jsonl
from coterie.artifacts.folders import check_tree, real_folder
from coterie.artifacts.reading import open_regular, parse_json, read_json, read_text
from coterie.errors import CoterieError

logger = logging.getLogger(__name__)

STAGES_FILE = "stages.jsonl"
WORKING, CACHED = "working", "cached"
MAX_KEPT = 2**32  # bytes
ANY = "*"
"""Stands in `stages.jsonl` for all stages of a run that was begun before stages were recorded."""

JsonCache = Callable[[str, Callable[[], Any]], Any]
"""Gives a JSON value by name, computing it where it is not known yet; see `RunFolder.cache`."""


@dataclass
class _Seen:
    """How many bytes of `stages.jsonl` were read, and what they tell."""

    size: int = 0
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """A run folder under construction; all of it is real folders and files.

    Attributes:
        path: the folder.
        inputs: content hash of everything that the run reads, by name.
        earlier: a finished run of the same command; its stages are taken over where they would become the same.
        wanted: the stages that were asked for so far.
        inside: the stages that are being made; those that are asked for meanwhile belong to the last of them.
        seen: what was read of its stages so far.
    """

    path: Path
    inputs: Mapping[str, str] = field(default_factory=dict)
    earlier: Path | None = None
    wanted: set[str] = field(default_factory=set)
    inside: list[str] = field(default_factory=list)
    seen: _Seen = field(default_factory=_Seen)

    def stage(
        self,
        name: str,
        make: Callable[[Path], object],
        made_from: Mapping[str, Any],
        *,
        inputs: Iterable[str] | None = None,
        together: bool = False,
    ) -> Path:
        """Make the folder `name` once: `make` fills a working folder, which gets its name when it is complete.

        A stage that was interrupted starts again with what it left in its working folder; one that was made from
        something else starts afresh. Of several processes the first one makes it, or all of them `together`.

        Args:
            name: of the stage.
            make: what makes it.
            made_from: settings and hashes that decide what it becomes, as JSON holds them.
            inputs: those of the run's inputs that decide it, too; default: all.
            together: whether all processes make it.
        """
        key = ranks.by_first(lambda: self.claim(name, made_from, inputs=inputs))
        done, working = self.path / name, self.path / WORKING / name
        if ranks.by_first(done.exists):
            return done
        before = self._earlier(name, key)
        started = time.perf_counter()

        def begin() -> None:
            check_tree(real_folder(self.path, f"{WORKING}/{name}"))

        def fill() -> None:
            with disk_errors(working):
                if before is not None:
                    self._take_over(name, working)
                    return
                self.inside.append(name)
                try:
                    make(working)
                finally:
                    self.inside.pop()

        def finish() -> None:
            with disk_errors(working):
                real_folder(self.path, str(Path(name).parent))
                working.rename(done)
            seconds = round(time.perf_counter() - started, 1) if before is None else before[1]
            self._record(name, {"from": key, "seconds": seconds})
            for other, one in self.recorded().items():
                if one.get("within") == name and other not in self.wanted:  # it was made for other settings
                    shutil.rmtree(self.path / other, ignore_errors=True)

        ranks.by_first(begin)
        fill() if together and before is None else ranks.by_first(fill)
        ranks.by_first(finish)
        return done

    def _earlier(self, name: str, key: Mapping[str, Any]) -> tuple[Path, float] | None:
        """Return the finished stage that may be taken over, and the seconds that it took."""
        if self.earlier is None or not (self.earlier / name).is_dir():
            return None
        stage = read_stages(self.earlier).get(name, {})
        return (self.earlier / name, stage.get("seconds", 0.0)) if stage.get("from") == key else None

    def _take_over(self, name: str, working: Path) -> None:
        """Take a finished stage over, and those that were made for it."""
        assert self.earlier is not None  # or else there would be none
        _link(self.earlier / name, working)
        for other, one in read_stages(self.earlier).items():
            if one.get("within") == name and (self.earlier / other).is_dir():
                self.wanted.add(other)
                _link(self.earlier / other, real_folder(self.path, other))
                self._record(other, one)

    def claim(self, name: str, made_from: Mapping[str, Any], *, inputs: Iterable[str] | None = None) -> dict[str, Any]:
        """Say from what the stage `name` is made, and drop what is there of it if that was made from something else.

        Returns:
            What decides it, as it is recorded.
        """
        self.wanted.add(name)
        own = {one: self.inputs[one] for one in (self.inputs if inputs is None else inputs)}
        key = json.loads(json.dumps({**own, **made_from}))
        stages = self.recorded()
        known = stages.get(name) or stages.get(ANY)
        if known is None or known["from"] not in (None, key):
            left = [place for place in (name, f"{WORKING}/{name}") if (self.path / place).exists()]
            if left and known is not None:
                logger.info("%s is made again: %s", name, difference(known["from"], key))
            for place in left:
                dropped = real_folder(self.path, WORKING) / f"{secrets.token_hex(8)}.dropped"
                real_folder(self.path, place).rename(dropped)  # at once, so that no part is ever taken for the whole
                shutil.rmtree(dropped)
        if known is None or known["from"] != key:
            self._record(name, {"from": key})
        return key

    def renamed(self, before: str, name: str) -> None:
        """Give a stage its name of today in a run that was begun before stages were recorded."""

        def rename() -> None:
            for place in (self.path, self.path / WORKING) if ANY in self.recorded() else ():
                if (place / before).exists():
                    shutil.rmtree(place / name, ignore_errors=True)
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                    (place / before).rename(place / name)
                    with suppress(OSError):  # other stages may be in there
                        (place / before).parent.rmdir()

        ranks.by_first(rename)

    def key(self, name: str) -> str:
        """Hash what a stage was made from, for the stages that are made from it."""
        return hash_json(self.recorded()[name]["from"])

    def cache(self, made_from: Mapping[str, Any], *, inputs: Iterable[str] | None = None) -> JsonCache:
        """Return what computes JSON values once, each a small stage."""

        def cached(name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever JSON holds
            stage = f"{CACHED}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}"
            before = self.path / WORKING / f"{Path(stage).name}.json"  # where such values were kept until version 0.2

            def write(folder: Path) -> None:
                if before.is_file() and ANY in self.recorded():
                    before.rename(folder / "value.json")
                else:
                    write_json(folder / "value.json", {"value": make()})

            file = self.stage(stage, write, made_from, inputs=inputs) / "value.json"
            kept = read_json(file, MAX_KEPT)
            if "value" not in kept:
                raise CoterieError(f"{file} lacks its 'value'; delete its folder, it is made again")
            return kept["value"]

        return cached

    def finish(self) -> None:
        """Drop the stages that this try has not asked for, which are of other settings, and what is only for work."""
        stages, kept = self.recorded(), {}
        for name in sorted(stages):
            if self.wanted.isdisjoint((name, stages[name].get("within"), *map(str, Path(name).parents))):
                shutil.rmtree(self.path / name, ignore_errors=True)
            elif (self.path / name).is_dir():
                kept[name] = stages[name]
        file = self.path / STAGES_FILE
        write_jsonl(file, [{"stage": name, **one} for name, one in kept.items()])
        if not kept:
            file.unlink()
        working, dropped = self.path / WORKING, self.path / f"{WORKING}.dropped"
        shutil.rmtree(dropped, ignore_errors=True)
        if working.exists():
            working.rename(dropped)  # at once, so that no half of a stage in there is ever taken for the whole
            shutil.rmtree(dropped, ignore_errors=True)

    def recorded(self) -> dict[str, dict[str, Any]]:
        """Return what `read_stages` does, reading what was added since the last look: a run may have thousands."""
        file = self.path / STAGES_FILE
        if file.exists():
            with open_regular(file) as opened:
                opened.seek(self.seen.size)
                whole = opened.read().rpartition(b"\n")[0]
            self.seen.size += len(whole)
            self.seen.stages.update(_told(whole.decode(errors="replace")))
        return self.seen.stages

    def _record(self, name: str, stage: Mapping[str, Any]) -> None:
        """Add a line, which several processes may do at a time; what a kill left of the last one ends before it."""
        within = {"within": self.inside[-1]} if self.inside else {}
        line = json.dumps({"stage": name, **within, **stage}, ensure_ascii=False)
        append_text(self.path / STAGES_FILE, f"\n{line}\n")


def read_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """Read of every stage of a run from what it was made, and how long that took; nothing where none was recorded.

    A line that was cut off by a kill, or is none of ours, is skipped: its stage is made again.
    """
    return dict(_told(read_text(folder / STAGES_FILE))) if (folder / STAGES_FILE).exists() else {}


def _told(lines: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read lines of `stages.jsonl`; a stage may have several, of which the last counts."""
    for line in lines.split("\n"):
        with suppress(CoterieError):
            read = parse_json(line, STAGES_FILE)
            record = read if isinstance(read, dict) else {}
            name = record.pop("stage", None)
            is_inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
            if is_inside and isinstance(record.get("from"), dict | None):
                yield name, {"from": record.get("from"), **record}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Tell in what two records of what a stage is made from differ; hashes are told as changed."""
    told = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            told += [difference(old, new)] if old != new else []
        elif old != new:
            is_hash = any(isinstance(one, str) and len(one) == 64 for one in (old, new))
            told.append(f"{name} changed" if is_hash else f"{name} {_shown(old)} -> {_shown(new)}")
    return ", ".join(told)


def _shown(value: object) -> str:
    return "default" if value is None else value if isinstance(value, str) else json.dumps(value)


def _link(folder: Path, working: Path) -> None:
    """Fill a working folder with the files of a finished stage, as they are: on most disks without copying them."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copyfile(source, target, follow_symlinks=False)

    shutil.rmtree(working)
    shutil.copytree(folder, working, copy_function=link, symlinks=True)
    check_tree(working)
