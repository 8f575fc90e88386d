"""Calls between two processes that do not trust each other: plain data goes by value, anything else by a handle.

One side runs an answer's code, the other the tests of it. What crosses is lines of JSON that are read back as exact
built-in values, so that no object of one side ever runs in the other: an answer whose objects claim to be equal to
everything sends such an object as a handle, and a handle is equal to itself alone. An argument that the other side
changed in place is changed here too, in place.

This file needs the standard library alone: it is loaded in the children of `sandbox`.
"""

import builtins
import contextlib
import json
import operator
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from io import BufferedIOBase
from typing import Any

LONGEST_MESSAGE = 2**24  # bytes
LONGEST_ERROR = 500  # characters
_EXACT = 2**53  # JSON's larger numbers are read slowly, or not at all

Form = Any  # what `json` writes and reads


class WireError(Exception):
    """The other side ended, or sent what cannot be read; nothing more is to be had from it."""


class RemoteError(Exception):
    """The other side raised an error that is not one of Python's own exceptions."""


# ------------------------------------------------------------------------------------------------------- plain values

_WRITTEN: dict[type, Callable[[Any], Form]] = {
    complex: lambda value: [value.real, value.imag],
    bytes: lambda value: bytes.hex(value),
    bytearray: lambda value: bytes(value).hex(),
    range: lambda value: [value.start, value.stop, value.step],
    Decimal: str,
    Fraction: lambda value: [value.numerator, value.denominator],
}
_TYPES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and kind.__name__ == name}
_READ: dict[str, Callable[[Form], Any]] = {
    "int": lambda form: int(form, 16),
    "complex": lambda form: complex(*form),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda form: range(*form),
    "Decimal": Decimal,
    "Fraction": lambda form: Fraction(*form),
    "type": _TYPES.__getitem__,
}
_MANY: dict[type, Callable[[Any], Any]] = {kind: kind for kind in (list, tuple, set, frozenset, deque)}


def _write(value: Any, handle: Callable[[Any], Form]) -> Form:
    """Write a value as JSON; an instance of a subclass, such as a Counter, is written as the built-in that it is."""
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return {"type": value.__name__}
    for kind in type(value).__mro__:
        if value is None or kind is bool:
            return value
        if kind is int:
            return int(value) if abs(value) < _EXACT else {"int": hex(value)}
        if kind is float or kind is str:
            return kind(value)
        if kind is dict:
            return {"dict": [[_write(key, handle), _write(item, handle)] for key, item in dict.items(value)]}
        if kind in _MANY:
            return {kind.__name__: [_write(item, handle) for item in kind.__iter__(value)]}
        if kind in _WRITTEN:
            return {kind.__name__: _WRITTEN[kind](value)}
    return handle(value)


def _read(form: Form, handle: Callable[[str, int], Any]) -> Any:
    if not isinstance(form, dict):
        if isinstance(form, list):
            raise WireError("a message holds a list without its kind")
        return form
    ((kind, inner),) = form.items()
    if kind == "dict":
        return {_read(key, handle): _read(item, handle) for key, item in inner}
    for collection in _MANY:
        if kind == collection.__name__:
            return collection([_read(item, handle) for item in inner])
    return _READ[kind](inner) if kind in _READ else handle(kind, inner)


def restore(old: Any, new: Any) -> bool:
    """Give an argument the content that it has on the other side, in place as far down as it has the same parts."""
    match old, new:
        case list(), list():
            old[:] = [mine if restore(mine, its) else its for mine, its in zip(old, new, strict=False)] + new[
                len(old) :
            ]
        case dict(), dict():
            merged = {key: old[key] if key in old and restore(old[key], its) else its for key, its in new.items()}
            old.clear()
            old.update(merged)
        case (set(), set()) | (deque(), deque()):
            old.clear()
            (old.update if isinstance(old, set) else old.extend)(new)
        case _:
            return False
    return True


# ------------------------------------------------------------------------------------------------------------- handles


class Handle:
    """An object of the other side. It is equal to itself alone, since any other answer would be that side's word."""

    __slots__ = ("_number", "_wire")

    def __init__(self, wire: "Wire", number: int) -> None:
        object.__setattr__(self, "_wire", wire)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:  # noqa: D102
        return self._wire.ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._wire.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._wire.ask("set", self, name, value)

    def __iter__(self) -> Any:
        return self._wire.ask("iterate", self)

    def __next__(self) -> Any:
        return self._wire.ask("next", self)

    def __len__(self) -> int:
        return self._wire.ask("length", self)

    def __getitem__(self, key: Any) -> Any:
        return self._wire.ask("item", self, key)

    def __bool__(self) -> bool:
        return self._wire.ask("truth", self) is True

    def __str__(self) -> str:
        return str(self._wire.ask("text", self))


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, arguments, named: target(*arguments, **named),
    "get": getattr,
    "set": setattr,
    "iterate": iter,
    "next": next,
    "length": len,
    "item": operator.getitem,
    "truth": bool,
    "text": str,
}


class Wire:
    """One side of the conversation: asks for operations on the other's objects and serves its own.

    Args:
        reader, writer: binary streams.
        may: whether the other side may have an operation done on an object of this side that crossed as a handle.
    """

    def __init__(self, reader: BufferedIOBase, writer: BufferedIOBase, may: Callable[..., bool]) -> None:
        self._reader, self._writer, self._may = reader, writer, may
        self._lent: list[Any] = []
        self._numbers: dict[int, int] = {}  # of a lent object by its id; the list keeps it alive
        self._held: dict[int, Handle] = {}
        self.broken = False

    def send(self, message: dict[str, Form]) -> None:
        """Send one message.

        Raises:
            WireError: the other side has ended, or the message is too long.
        """
        line = json.dumps(message).encode() + b"\n"
        if len(line) > LONGEST_MESSAGE:
            raise WireError("a value is too large to be handed on")
        try:
            self._writer.write(line)
            self._writer.flush()
        except OSError as error:
            self.broken = True
            raise WireError("the process of the code has ended") from error

    def receive(self) -> dict[str, Form]:
        """Wait for the next message.

        Raises:
            WireError: the other side has ended, or sent no message.
        """
        if self.broken:
            raise WireError("the process of the code has ended")
        self.broken = True  # until there is a whole message
        line = self._reader.readline(LONGEST_MESSAGE + 1)
        if not line.endswith(b"\n"):
            raise WireError("a message is too long" if line else "the process of the code has ended")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WireError("a message is no JSON") from error
        if not isinstance(message, dict):
            raise WireError("a message is no object")
        self.broken = False
        return message

    def ask(self, operation: str, target: Any, *values: Any) -> Any:
        """Have an operation done by the other side, and serve what it asks for meanwhile.

        Raises:
            WireError: the other side has ended, or sent what cannot be read.
            Exception: what the operation raised there, if it is one of Python's own; RemoteError otherwise.
        """
        self.send({"ask": operation, "of": [self.write(value) for value in (target, *values)]})
        reply = self.result()
        for old, new in zip(values[0] if operation == "call" else (), reply[1], strict=False):
            restore(old, new)
        return reply[0]

    def result(self) -> tuple[Any, list[Any]]:
        """Wait for the value of what was asked, and for the arguments that the other side changed."""
        while "ask" in (message := self.receive()):
            self.serve(message)
        if "error" in message:
            raise _raised(message["error"])
        try:
            return self.read(message.get("value")), [self.read(form) for form in message.get("arguments", [])]
        except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, AttributeError, RecursionError) as error:
            raise WireError(f"a value cannot be read: {type(error).__name__}") from error

    def serve(self, message: dict[str, Form]) -> None:
        """Do what the other side asks for, and send the value or the error."""
        reply = self.outcome(lambda: self._perform(message))
        self.send(reply)

    def outcome(self, action: Callable[[], dict[str, Form]]) -> dict[str, Form]:
        """Return the reply to send for an action: its value, or its error in two words."""
        try:
            return action()
        except WireError:
            raise
        except BaseException as error:
            return {"error": [type(error).__name__, _text(error)]}

    def _perform(self, message: dict[str, Form]) -> dict[str, Form]:
        operation, forms = message["ask"], message["of"]
        if list(forms[0]) != ["yours"]:  # calling Python's own `type` would make a class here, equal to everything
            raise PermissionError("operations are open on lent objects only")
        target, *values = map(self.read, forms)
        if not self._may(operation, target, *values):
            raise PermissionError(f"{operation} is not open to the code")
        result = self.write(_OPERATIONS[operation](target, *values))
        after = [self.write(value) for value in values[0]] if operation == "call" else []
        changed = operation == "call" and after != forms[1].get("tuple")
        return {"value": result, "arguments": after} if changed else {"value": result}

    def write(self, value: Any) -> Form:
        """Write a value for the other side, lending it the objects that are no plain data."""
        return _write(value, self._lend)

    def read(self, form: Form) -> Any:
        """Read a value of the other side."""
        return _read(form, self._handle)

    def _lend(self, value: Any) -> Form:
        if isinstance(value, Handle):
            return {"yours": object.__getattribute__(value, "_number")}
        number = self._numbers.setdefault(id(value), len(self._lent))
        if number == len(self._lent):
            self._lent.append(value)
        return {"mine": number}

    def _handle(self, kind: str, number: int) -> Any:
        if type(number) is not int or number < 0:
            raise ValueError("no number of an object")
        if kind == "yours":
            return self._lent[number]
        if kind != "mine":
            raise KeyError(kind)
        return self._held.setdefault(number, Handle(self, number))


def _text(error: BaseException) -> str:
    try:
        return str(error)[:LONGEST_ERROR]
    except Exception:  # whatever the error's own methods do
        return "an error that cannot be shown"


def _raised(form: Form) -> Exception:
    """Return the error that the other side told, as Python's own exception of that name where there is one."""
    match form:
        case [str(name), str(text)]:
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                with contextlib.suppress(TypeError):  # it takes more than a text
                    return kind(text)
            return RemoteError(f"{name}: {text}" if text else name)
    return WireError("an error cannot be read")
