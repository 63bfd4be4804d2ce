"""A fake accelerator on the CPU, `FakeDevice`, that computes real values and records where the host would wait for a GPU.

Tensors on `DEVICE` are wrappers around tensors on the host that report the `meta` device. Inside `FakeDevice()` every operation is
seen: a copy between host and device that blocks, a read of a value, and a result whose shape depends on values are recorded
with their place in `workloads`; mixing tensors of both devices in one operation raises, as on a GPU.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
HOST = torch.device("cpu")
ROOT = str(Path(__file__).parents[2])

M = TypeVar("M", bound=nn.Module)

aten = torch.ops.aten
_READS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
"""Operations that return to the host what only the device knows: a value, or the size of a result."""
_TAKES_HOST_TENSORS = {aten._to_copy.default, aten.copy_.default}
_INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnDevice(torch.Tensor):
    """A tensor on the fake device; `elem` is the tensor on the host that holds its values."""

    elem: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor, requires_grad: bool = False) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=DEVICE,
            requires_grad=requires_grad,
        )
        made.elem = elem.detach()
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.elem!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, lambda _: None)


def on_device(value: Tensor) -> Tensor:
    """A copy of a host tensor on the fake device, as after an upload."""
    return OnDevice(value.detach().clone())


def on_host(value: Tensor) -> Tensor:
    """The values of a tensor of the fake device, without being recorded."""
    return value.elem if isinstance(value, OnDevice) else value.detach()


def module_on_device(module: M) -> M:
    """Move the parameters and buffers of `module` to the fake device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = on_device(parameter)
                part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_device(buffer)
    return module


def _run(func: Any, args: Any, kwargs: dict[str, Any], record: Callable[[str], None]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    inputs_on_device = any(isinstance(x, OnDevice) for x in tensors)
    named = kwargs.get("device")
    target = torch.device(named) if named is not None else None
    to_device = target == DEVICE or (target is None and inputs_on_device)
    if func is aten._to_copy.default:
        from_device = isinstance(args[0], OnDevice)
        if from_device != to_device and not kwargs.get("non_blocking"):
            record("device to host" if from_device else "host to device")
    elif func is aten.copy_.default:
        here, there = isinstance(args[1], OnDevice), isinstance(args[0], OnDevice)
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        # A number is an argument of the kernel that fills the target.
        if here != there and blocking and (here or args[1].ndim):
            record("device to host" if here else "host to device")
        to_device = there
    elif inputs_on_device:
        host = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
        if host and func not in _INDEXES:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found {[x.shape for x in host]} on the host"
            )
        if func in _READS or "nms" in str(func):
            record(f"read by {func}")
            to_device = func not in (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
        if func in _INDEXES:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                record("index by a mask")
            if any(not isinstance(i, OnDevice) for i in args[1] if i is not None):
                record("index from the host")
    if target == DEVICE:
        kwargs = {**kwargs, "device": HOST}
    plain_args, plain_kwargs = tree_map_only(OnDevice, lambda x: x.elem, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if not to_device:
        return out
    out = tree_map_only(Tensor, lambda x: x if isinstance(x, OnDevice) else OnDevice(x), out)
    return return_and_correct_aliasing(func, args, kwargs, out) if inputs_on_device else out


class _Factories(TorchFunctionMode):
    """Tensors made of Python numbers on the device: made on the host, and copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or HOST) == DEVICE:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            kwargs.setdefault("dtype", args[0].dtype)
            return torch.tensor(*args[1:], **kwargs).to(DEVICE)
        return func(*args, **kwargs)


class FakeDevice(TorchDispatchMode):
    """Runs what is inside it with `DEVICE` as its accelerator, and counts in `waits` where the host would wait for it.

    Keys of `waits` are (place, what), as ("workloads/models/heads.py:30", "host to device").
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "FakeDevice":
        self._stack.enter_context(_Factories())
        self._stack.enter_context(_autocast_without_effect())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self._record)

    def _record(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        last = frames[-1]
        place = f"{last.filename.removeprefix(ROOT).lstrip('/')}:{last.lineno}"
        self.waits[place, what] += 1


@contextlib.contextmanager
def _autocast_without_effect() -> Iterator[None]:
    """torch has no autocast for this device; float32 is what is run here."""
    autocast = torch.autocast

    def on_any_device(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device_type == DEVICE.type else autocast(device_type, *args, **kwargs)

    torch.autocast = on_any_device  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]
