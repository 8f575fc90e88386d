"""A pretend GPU: tensors on it have shapes but no numbers, on a build of torch for the CPU alone.

Tensors of the host stay what they are. Whatever would go wrong on a GPU goes wrong here: an operation on tensors of
both, a decision of the host on what stands on the device (`.item()`, `bool()`, `nonzero()`); and what is copied to the
host, which the host has to wait for, is counted. The device is called "pretend", since a build for the CPU cannot index
tensors on "cuda". `set_up` tells all of torch of it, so that only a process of its own should call it.
"""

import traceback
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

PRETENDED = "pretend"
COMPOSITE = "CompositeImplicitAutograd"
CAST, COPY = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


class PretendGpu(FakeTensorMode):
    """Lets tensors be on "pretend:0", and lists the lines of code that copied one to the host."""

    avoid_device_init = True  # or constants would be made on the device in earnest

    def __init__(self) -> None:
        """Begin without any copy."""
        super().__init__(allow_non_fake_inputs=True)
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the device where its tensors or its result are there, and on the host otherwise."""
        kwargs = kwargs or {}
        given = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)), None)
        device = "" if given is None else given.type
        on_gpu = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if on_gpu and func is COPY and not isinstance(args[0], FakeTensor):
            self.copies.append(_line())
            return args[0]
        if on_gpu and func is CAST and device == "cpu":
            self.copies.append(_line())
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if on_gpu or device == PRETENDED:
            if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
                with self:  # under inference mode it comes whole
                    return func.decompose(*args, **kwargs)
            return super().__torch_dispatch__(func, types, args, kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def set_up() -> None:
    """Tell torch that the device exists."""
    _setup_privateuseone_for_python_backend(PRETENDED)


def _line() -> str:
    """Return the file and function of this project that asked for it."""
    own = [frame for frame in traceback.extract_stack() if "/coterie/" in frame.filename]
    return f"{own[-1].filename.rpartition('/coterie/')[2]}:{own[-1].name}" if own else "elsewhere"
