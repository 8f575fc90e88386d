"""Records as a stranger may have changed them: one thing at a time, in every place."""

import json
import os
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from coterie.errors import CoterieError, shown

EVERY = os.environ.get("COTERIE_MUTATIONS") == "all"  # by hand; otherwise a sample, the same in every run
ACTING = "a\nb\r\x1b[2J\x9b1m\x07\u202e"
RAW = {"@NaN@": "NaN", "@-Infinity@": "-Infinity", "@1e999@": "1e999", "@half@": '"\\ud83d"', "@digits@": "9" * 5000}
DEEP = json.loads("[" * 300 + "]" * 300)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.5, 10**6, 10**18, -(10**18), 10**30, 1e300, 1e-300),
    *("", "x", "1", "base", ACTING, "../../x", "/etc/hostname", "..", "a\0b", "x" * 5000, "[bold]x[/bold]", "(a+)+$"),
    *([], {}, [None], [[]], [1], ["x"], ["x", "x"], {"x": 1}, {"x": None}, {"kind": "x"}, DEEP),
    *RAW,
)
Change = tuple[str, str]
"""What was changed, and the text that the file then has."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value; of lists the first and the last."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number in {0, len(value) - 1} if value else ():
            yield from places(value[number], (*path, number))


def text_of(value: Any) -> str:
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text


def json_changes(value: Any) -> Iterator[Change]:
    """Every change of one place of a JSON value."""
    for path in places(value):
        for number, new in enumerate(VALUES):
            if not path:
                yield f"all is value {number}", text_of(new)
                continue
            changed = deepcopy(value)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = new
            yield f"{path} is value {number}, {str(new)[:30]!r}", text_of(changed)
        if path:
            changed = deepcopy(value)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            own = holder[path[-1]]
            del holder[path[-1]]
            yield f"{path} is missing", text_of(changed)
            if isinstance(holder, dict):
                holder[ACTING] = own
                yield f"{path} has another name", text_of(changed)
            else:
                holder += [own, own]
                yield f"{path} stands twice", text_of(changed)


def text_changes(text: str) -> Iterator[tuple[str, bytes]]:
    """Changes of a file as a whole."""
    content = text.encode()
    yield from {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "not text": b"\xff\xfe" + content,
        "twice": content + content,
        "deep": b"[" * 100_000,
        "deep object": b'{"a":' * 100_000,
        "zeros": b"\0" * 100,
        "a number": b"1",
    }.items()


def sample(changes: list[Any], count: int, seed: str) -> list[Any]:
    return changes if EVERY or len(changes) <= count else random.Random(seed).sample(changes, count)


def file_changes(file: Path, count: int) -> list[tuple[str, bytes]]:
    """Changes of a JSON or JSONL file: a sample of `count`, or all."""
    text = file.read_text()
    if file.suffix == ".jsonl":
        first, *others = text.splitlines()
        found = [(name, "\n".join([new, *others, ""]).encode()) for name, new in json_changes(json.loads(first))]
    else:
        found = [(name, new.encode()) for name, new in json_changes(json.loads(text))]
    return sample([*found], count, file.name) + [*text_changes(text)]


def tensor_changes(file: Path) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Changes of tensors: of each one its values, its shape, its type, its name."""
    tensors = load_file(file)
    yield "nothing", {}
    for name, tensor in tensors.items():
        one = tensor.flatten()[:1]
        for what, new in {
            "NaN": torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else None,
            "infinite": torch.full_like(tensor, float("inf")) if tensor.is_floating_point() else None,
            "1e20": torch.full_like(tensor, 1e20) if tensor.is_floating_point() else None,
            "1e300": torch.full_like(tensor, 1e300, dtype=torch.float64),
            "empty": tensor[:0],
            "a number": one.reshape(()) if len(one) else None,
            "longer": torch.cat([tensor, tensor]) if tensor.dim() else None,
            "flat": tensor.flatten(),
            "deeper": tensor[None, None],
            "narrow": tensor[..., :1] if tensor.dim() else None,
            "integers": tensor.to(torch.int64),
            "flags": tensor.to(torch.bool),
        }.items():
            if new is not None:
                yield f"{name} is {what}", {**tensors, name: new.contiguous()}
        others = {key: value for key, value in tensors.items() if key != name}
        yield f"{name} is missing", others
        yield f"{name} has another name", {**others, ACTING: tensor}


def told(error: CoterieError) -> str:
    """What an error says, which is one line that does nothing to a terminal."""
    text = str(error)
    assert text == shown(text) and len(text.splitlines()) == 1, text
    assert len(text) < 10_000 and "Type-check error" not in text, text
    return text


def survivors(file: Path, changes: list[tuple[str, Any]], read: Callable[[], object], *, is_refused: bool) -> list[str]:
    """Read a file under every change and return what else happened than reading, or an error that names the file."""
    whole, failures, refused = file.read_bytes(), [], 0
    for what, new in changes:
        if isinstance(new, bytes):
            file.write_bytes(new)
        else:
            save_file(new, file)
        try:
            read()
        except CoterieError as error:
            refused += 1
            if not any(name in told(error) for name in (file.name, str(file.parent))):
                failures.append(f"{what}: the file is not named: {str(error)[:160]}")
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            failures.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
        finally:
            file.write_bytes(whole)
    if is_refused and not refused:
        failures.append("nothing was refused")
    return failures
