"""A pretend GPU: tensors on it have shapes but no numbers, on a build of torch for the CPU alone.

Tensors of the host stay what they are. Whatever would go wrong on a GPU goes wrong here: an operation on tensors of
both, a decision of the host on what stands on the device (`.item()`, `bool()`, `nonzero()`). What the host has to wait
for is noted: copies to the host, and copies to the device that are not made with `non_blocking`, for which torch waits
until all that was asked of the device before is done. The device is called "pretend", since a build for the CPU cannot
index tensors on "cuda". `set_up` tells all of torch of it, so that only a process of its own should call it.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

PRETENDED = "pretend"
DEVICE = "pretend:0"
COMPOSITE = "CompositeImplicitAutograd"
aten = torch.ops.aten
CAST, COPY = aten._to_copy.default, aten.copy_.default
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations whose second argument, the indices, is copied to the device where it is on the host."""


class PretendGpu(FakeTensorMode):
    """Lets tensors be on "pretend:0", and notes what the host waits for."""

    avoid_device_init = True  # or constants would be made on the device in earnest

    def __init__(self) -> None:
        """Begin without any copy."""
        super().__init__(allow_non_fake_inputs=True)
        self._waits: list[str] = []

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        """Context manager: the list of what the host waits for meanwhile, filled at the end, in order."""
        found: list[str] = []
        before = len(self._waits)
        yield found
        found += self._waits[before:]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the device where its tensors or its result are there, and on the host otherwise."""
        kwargs = kwargs or {}
        given = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)), None)
        device = "" if given is None else given.type
        on_gpu = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if on_gpu and func is COPY and not isinstance(args[0], FakeTensor):
            self._note("to host")
            return args[0]
        if on_gpu and func is CAST and device == "cpu":
            self._note("to host")
            with unset_fake_temporarily():
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.full(args[0].shape, float(dtype.is_floating_point), dtype=dtype)
        if on_gpu or device == PRETENDED:
            if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
                with self:  # under inference mode it comes whole
                    return func.decompose(*args, **kwargs)
            self._note_uploads(func, args, kwargs)
            return super().__torch_dispatch__(func, types, args, kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _note_uploads(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is CAST and not isinstance(args[0], FakeTensor) and not kwargs.get("non_blocking"):
            self._note("to device")
        if func is COPY and not isinstance(args[1], FakeTensor) and args[1].dim() and not (*args, False)[2]:
            self._note("to device")
        if func in INDEXED:
            own = [leaf for leaf in args[1] if isinstance(leaf, torch.Tensor)]
            for _ in [leaf for leaf in own if not isinstance(leaf, FakeTensor)]:
                self._note("to device")

    def _note(self, way: str) -> None:
        """Note the file and function of this project that asked for it."""
        own = [frame for frame in traceback.extract_stack() if "/coterie/" in frame.filename]
        place = f"{own[-1].filename.rpartition('/coterie/')[2]}:{own[-1].name}" if own else "elsewhere"
        self._waits.append(f"{way} {place}")


def set_up() -> None:
    """Tell torch that the device exists; modules that are there already are not moved there again, which it cannot."""
    _setup_privateuseone_for_python_backend(PRETENDED)
    torch.get_device_module(PRETENDED).get_amp_supported_dtype = list  # or autocast could not be turned off there
    move = torch.nn.Module.to

    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        parameters = list(module.parameters())
        there = bool(parameters) and all(isinstance(own, FakeTensor) for own in parameters)
        return module if there else move(module, *args, **kwargs)

    torch.nn.Module.to = to
