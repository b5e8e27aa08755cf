# SPDX-License-Identifier: MIT
"""Later: tensors that nobody has computed yet, because who uses them may do it on the way.

`rotate` makes such of queries and keys, for a cache that takes them through their rotary embedding
while it stores the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

from quantgemm import ops

__all__ = ["Later", "Rotation", "computed", "rotate", "rotation_of", "rotations_wait"]

_Self = TypeVar("_Self", bound="Later")


class Later(torch.Tensor):
    """A tensor of known shape and kind whose numbers are made when somebody asks for them.

    Whoever uses it is given the numbers, by torch's rule for subclasses: a layer, a hook, a view.
    So it may wait without knowing who will come.
    """

    @classmethod
    def like(cls: type[_Self], x: torch.Tensor, shape: Any) -> _Self:
        made: _Self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=x.dtype, device=x.device
        )
        return made

    def compute(self) -> torch.Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _ASKS_ONLY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(Later, computed, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """For C++ that was handed one: it has no memory of its own."""
        args, kwargs = pytree.tree_map_only(Later, computed, (args, kwargs or {}))
        return func(*args, **kwargs)


# Of shape and kind, which are known.
_ASKS_ONLY = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}


def computed(x: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor that may be a `Later`."""
    return x.compute() if isinstance(x, Later) else x


class Rotation:
    """Queries and keys as they are, and the angles of their rotary embedding."""

    def __init__(self, *of: torch.Tensor) -> None:
        self._of, self._versions = of, [x._version for x in of]
        self.turned: tuple[torch.Tensor, torch.Tensor] | None = None

    def take(self) -> tuple[torch.Tensor, ...]:
        """Queries, keys, cosines and sines, as `ops.rotary` wants them."""
        if [x._version for x in self._of] != self._versions:
            raise RuntimeError(
                "rotary: queries, keys or angles were written to before the result was used"
            )
        return self._of

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.turned is None:
            with torch.no_grad():
                self.turned = ops.rotary(*self.take())
        return self.turned


class _Turned(Later):
    """Queries (side 0) or keys of a rotation."""

    rotation: Rotation
    side: int

    def compute(self) -> torch.Tensor:
        return self.rotation.compute()[self.side]


_WAITS: ContextVar[bool] = ContextVar("quantgemm_rotations_wait", default=False)


@contextmanager
def rotations_wait() -> Iterator[None]:
    """What `rotate` returns waits for who uses it: a cache may rotate as it stores."""
    token = _WAITS.set(True)
    try:
        yield
    finally:
        _WAITS.reset(token)


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.rotary`, now or later."""
    of = (q, k, cos, sin)
    if torch.compiler.is_compiling() or not _WAITS.get():
        return ops.rotary(*of)
    if any(type(x) is not torch.Tensor or x.is_inference() for x in of):
        return ops.rotary(*of)
    rotation, made = Rotation(*of), []
    for side, x in enumerate((q, k)):
        made.append(_Turned.like(x, x.shape))
        made[-1].rotation, made[-1].side = rotation, side
    return made[0], made[1]


def rotation_of(query: torch.Tensor, keys: torch.Tensor) -> Rotation | None:
    """Where both wait for the same rotation: that."""
    sides = [x for x in (query, keys) if isinstance(x, _Turned)]
    if [x.side for x in sides] != [0, 1] or sides[0].rotation is not sides[1].rotation:
        return None
    return sides[0].rotation if sides[0].rotation.turned is None else None
