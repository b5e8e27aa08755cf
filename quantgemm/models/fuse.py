# SPDX-License-Identifier: MIT
"""fuse_steps: what a model of transformers does in several small kernels, done in one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch

from quantgemm import ops
from quantgemm.later import Later, rotate
from quantgemm.models.loader import DTYPES
from quantgemm.nn import QuantLinear

__all__ = ["Fused", "fuse_steps"]

FEW_ROWS = 8  # of x, for which a product takes what is added to it inside, and the norm of x


class Fused(NamedTuple):
    """How many modules, and functions of transformers' modules, were given another forward.

    sums: products that add, for few tokens, what the layer would add to them.
    """

    norms: int
    gates: int
    heads: int
    rotations: int
    sums: int


def fuse_steps(model: torch.nn.Module) -> Fused:
    """Gives RMS norms, gated products, q, k and v, and rotary embeddings a kernel in place of many.

    Only where the result is the same but for roundings: the first norm and the first gated product
    of each class and size are compared, and rotations are the same bit for bit. Where gradients are
    asked for, all is as before. Products become one where their weights are packed and of one type;
    those of q, k and v then lie one behind the other. What a decoder layer adds to the product of
    o, and of down, is added before that is rounded, and norms of bfloat16 rows are part of the
    products behind them, for up to eight tokens. The rotary embedding is a function of
    transformers' module, so it is replaced for all models of that module.
    """
    agreed: dict[tuple[Any, ...], bool] = {}
    norms = gates = heads = 0
    for module in model.modules():
        heads += _fuse_heads(module)
        fused = None if "forward" in module.__dict__ else _fused_norm(module) or _fused_gate(module)
        if fused is None:
            continue
        if fused.kind not in agreed:
            agreed[fused.kind] = fused.agrees()
        if agreed[fused.kind]:
            module.forward = fused  # type: ignore[assignment]
            norms += isinstance(fused, _FusedNorm)
            gates += isinstance(fused, _FusedGate)
    sums = 0
    for module in model.modules():
        sums += _fuse_sums(module)
        _let_norms_wait(module)
    names = {type(module).__module__ for module in model.modules()}
    return Fused(norms, gates, heads, sum(_fuse_rotary(name) for name in names), sums)


@dataclass(frozen=True)
class _FusedNorm:
    """The forward of a norm. An object, so that copies and pickles of a model keep their own."""

    module: torch.nn.Module
    eps: float
    may_wait: bool = False  # what it makes is for products

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        same = hidden_states.dtype == weight.dtype and weight.dtype in DTYPES
        if torch.is_grad_enabled() or not same or weight.device.type not in ("cpu", "cuda"):
            return type(self.module).forward(self.module, hidden_states)  # type: ignore[no-any-return]
        if self.may_wait and _can_be_inside(hidden_states):
            return _Norm.make(hidden_states, self, len(weight))
        return self.compute(hidden_states)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.module.weight, self.eps)  # type: ignore[arg-type]

    @property
    def kind(self) -> tuple[Any, ...]:
        return type(self.module), self.module.weight.numel()  # type: ignore[operator]

    def agrees(self) -> bool:
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        x = _numbers(weight.numel(), weight.device, weight.dtype)
        with torch.no_grad():
            want, got = self.module(x).float(), self(x).float()
        return bool(((want - got).abs() <= 2 * torch.finfo(weight.dtype).eps * want.abs()).all())


def _fused_norm(module: torch.nn.Module) -> _FusedNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    is_row = isinstance(weight, torch.Tensor) and weight.dim() == 1
    return _FusedNorm(module, eps) if is_row else None


def _let_norms_wait(layer: torch.nn.Module) -> None:
    """Those of a decoder layer, whose rows products multiply. What else uses them has numbers."""
    if not (hasattr(layer, "self_attn") or hasattr(layer, "mlp")):
        return
    for norm in layer.children():
        forward = norm.__dict__.get("forward")
        if isinstance(forward, _FusedNorm):
            norm.forward = replace(forward, may_wait=True)  # type: ignore[assignment]


def _can_be_inside(x: torch.Tensor) -> bool:
    """Whether a product with packed weights may have the norm of these rows inside."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return False
    few = 0 < x.numel() <= FEW_ROWS * x.shape[-1]
    return few and x.dtype == torch.bfloat16 and _is_plain(x)


@dataclass(frozen=True)
class _FusedGate:
    """The forward of ``down(silu(gate(x)) · up(x))`` with packed weights of one type."""

    module: torch.nn.Module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.dtype not in DTYPES or not _is_gated(self.module):
            return type(self.module).forward(self.module, x)  # type: ignore[no-any-return]
        down: torch.nn.Module = self.module.down_proj  # type: ignore[assignment]
        return down(self.gated(x))  # type: ignore[no-any-return]

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = _gate_and_up(self.module)
        if not torch.compiler.is_compiling():
            gate._check_type()
            up._check_type()
        rows, norm = _without_norm(x)
        return ops.gemm_packed_gated(
            rows,
            gate.weight,
            up.weight,
            gate.qtype,
            gate.out_features,
            gate.in_features,
            gate.packed_algo,
            **norm,
        )

    @property
    def kind(self) -> tuple[Any, ...]:
        gate, act = _gate_and_up(self.module)[0], getattr(self.module, "act_fn", None)
        return type(self.module), type(act), gate.qtype, gate.weight_shape

    def agrees(self) -> bool:
        gate = _gate_and_up(self.module)[0]
        down: torch.nn.Module = self.module.down_proj  # type: ignore[assignment]
        dtype = getattr(getattr(down, "weight", None), "dtype", None)
        x = _numbers(gate.in_features, gate.weight.device, dtype if dtype in DTYPES else torch.half)
        seen: list[torch.Tensor] = []
        hook = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            with torch.no_grad():
                out = self.module(x)
        finally:
            hook.remove()
        with torch.no_grad():
            if len(seen) != 1 or not torch.equal(out, down(seen[0])):
                return False  # something comes behind the last product
            want, got = seen[0].float(), self.gated(x).float()
        close = 4 * torch.finfo(torch.bfloat16).eps * want.abs().amax(-1, keepdim=True)
        return bool(((want - got).abs() <= close).all())


Waiting = TypeVar("Waiting", bound="_Waiting")


class _Waiting(Later):
    """What a layer makes of x, for someone who can compute it inside of something else."""

    kind: str
    x: torch.Tensor
    of: Any
    version: int
    numbers: torch.Tensor | None

    @classmethod
    def make(cls: type[Waiting], x: torch.Tensor, of: Any, cols: int) -> Waiting:
        made = cls.like(x, [*x.shape[:-1], cols])
        made.x, made.of, made.version, made.numbers = x, of, x._version, None
        return made

    def compute(self) -> torch.Tensor:
        if self.numbers is None:
            self.numbers = self.run()
        return self.numbers

    def run(self, *more: torch.Tensor) -> torch.Tensor:
        self.check()
        with torch.no_grad(), torch.autocast(self.x.device.type, enabled=False):
            return self.of.compute(self.x, *more)  # type: ignore[no-any-return]

    def check(self) -> None:
        if self.x._version != self.version:
            raise RuntimeError(
                f"fuse_steps: x of a {self.kind} was written to before its output was used"
            )


class _Product(_Waiting):
    """A product, for the sum that it is part of."""

    kind = "product"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _ADDS and len(args) == 2 and not kwargs:
            for product, other in (args, args[::-1]):
                if isinstance(product, _Product) and product.can_add(other):
                    return product.run(other)
        return super().__torch_function__(func, types, args, kwargs)

    def can_add(self, other: Any) -> bool:
        alike = type(other) is torch.Tensor and other.shape == self.shape
        alike = alike and (other.dtype, other.device) == (self.dtype, self.device)
        return alike and self.numbers is None and _is_plain(other)


class _Norm(_Waiting):
    """An RMS norm, for the product that takes it inside."""

    kind = "norm"


def _without_norm(x: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Rows for a product with packed weights, and the norm that it is to take inside, if any."""
    if not isinstance(x, _Norm):
        return x, {}
    if x.numbers is not None:  # someone wanted them
        return x.numbers, {}
    x.check()
    return x.x, {"norm_weight": x.of.module.weight, "norm_eps": x.of.eps}


_ADDS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}


@dataclass(frozen=True)
class _Summand:
    """The forward of a product that a decoder layer adds to something."""

    layer: QuantLinear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        cols = self.layer.in_features
        if torch.compiler.is_compiling():
            return QuantLinear.forward(self.layer, x)
        few = type(x) is torch.Tensor and x.shape[-1:] == (cols,) and x.numel() <= FEW_ROWS * cols
        if few and _is_plain(x) and _is_bare(self.layer):
            return _Product.make(x, self, self.layer.out_features)
        return QuantLinear.forward(self.layer, x)

    def compute(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        layer = self.layer
        if residual is None:
            return QuantLinear.forward(layer, x)
        layer._check_type()
        sizes = layer.out_features, layer.in_features
        weights = layer.weight, layer.qtype, *sizes
        return ops.gemm_packed(x, *weights, algo=layer.packed_algo, residual=residual)


def _fuse_sums(layer: torch.nn.Module) -> int:
    """The last products of a decoder layer's two halves."""
    count = 0
    for half, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        product = getattr(getattr(layer, half, None), name, None)
        if not isinstance(product, QuantLinear) or not _is_bare(product):
            continue
        if "forward" not in product.__dict__:
            product.forward = _Summand(product)  # type: ignore[method-assign]
            count += 1
    return count


def _gate_and_up(module: torch.nn.Module) -> tuple[QuantLinear, QuantLinear]:
    return module.gate_proj, module.up_proj  # type: ignore[return-value]


def _is_gated(module: torch.nn.Module) -> bool:
    gate, up = (getattr(module, name, None) for name in ("gate_proj", "up_proj"))
    if not isinstance(gate, QuantLinear) or not isinstance(up, QuantLinear):
        return False
    alike = gate.qtype == up.qtype and gate.weight_shape == up.weight_shape
    alike = alike and gate.packed_algo == up.packed_algo
    return alike and all(_is_bare(layer) for layer in (gate, up))


def _is_bare(layer: QuantLinear) -> bool:
    """Whether its forward is the product with packed weights and nothing else."""
    own = layer.__dict__.get("forward")
    replaced = type(layer) is not QuantLinear or not (
        own is None or isinstance(own, (_Part, _Summand))
    )
    hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
    return layer.is_packed and layer.bias is None and not replaced and not hooked


def _fused_gate(module: torch.nn.Module) -> _FusedGate | None:
    named = type(module).__name__.endswith("MLP") and hasattr(module, "down_proj")
    return _FusedGate(module) if named and _is_gated(module) else None


@dataclass(eq=False)
class _Together:
    """Layers that are given the same x in turn: the first computes for all, in one product.

    layers: of one type, their bytes one behind the other; other: one of another type, whose product
    is part of the same launch where there is such a kernel; all_of_x: whether they are all
    who multiply that x.
    """

    layers: list[QuantLinear]
    other: QuantLinear | None = None
    all_of_x: bool = False
    seen: tuple[torch.Tensor, int, tuple[torch.Tensor, ...]] | None = None  # x, its version, y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": None}

    def serves(self) -> bool:
        """Whether the bytes still lie one behind the other, as `_fuse_heads` has put them."""
        weights = [layer.weight for layer in self.layers]
        at, whole = weights[0].data_ptr(), weights[0].untyped_storage().data_ptr()
        for layer, weight in zip(self.layers, weights, strict=True):
            inside = weight.untyped_storage().data_ptr() == whole and weight.data_ptr() == at
            alike = layer.packed_algo == self.layers[0].packed_algo
            if not inside or not alike or not _is_bare(layer):
                return False
            at += weight.numel()
        first, other = self.layers[0], self.other
        return other is None or (_is_bare(other) and other.packed_algo == first.packed_algo)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        first, rows = self.layers[0], [layer.out_features for layer in self.layers]
        other = self.other
        for layer in [*self.layers, *([] if other is None else [other])]:
            layer._check_type()
        strips = sum(len(layer.weight) for layer in self.layers)
        weights = first.weight.as_strided((strips, first.weight.shape[1]), first.weight.stride())
        sizes = sum(rows), first.in_features
        more: list[torch.Tensor] = []
        of, norm = _without_norm(x)
        if other is None:
            y = ops.gemm_packed(of, weights, first.qtype, *sizes, algo=first.packed_algo, **norm)
        else:
            own = weights, first.qtype, sizes[0]
            its = other.weight, other.qtype, other.out_features
            y, *more = ops.gemm_packed_pair(of, *own, *its, sizes[1], first.packed_algo, **norm)
        parts = (*torch.split(y, rows, -1), *more)
        self.seen = x, of._version, parts
        return parts[0]

    def take(self, x: torch.Tensor, index: int) -> torch.Tensor | None:
        seen = self.seen
        if seen is None or seen[0] is not x or seen[1] != _without_norm(x)[0]._version:
            return None
        if index == len(seen[2]) - 1:
            self.seen = None
        return seen[2][index]


@dataclass(frozen=True)
class _Part:
    """The forward of one of them."""

    together: _Together
    index: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        together = self.together
        if isinstance(x, _Norm) and not (x.numbers is None and together.all_of_x):
            x = x.compute()
        if not torch.compiler.is_compiling() and _is_plain(_without_norm(x)[0]):
            if self.index == 0 and together.serves():
                return together.compute(x)
            if self.index > 0 and (y := together.take(x, self.index)) is not None:
                return y
        own = [*together.layers, together.other][self.index]
        return QuantLinear.forward(own, x)  # type: ignore[arg-type]


def _is_plain(x: torch.Tensor) -> bool:
    """No gradients, no other dtype, and a version that tells whether x was written to."""
    special = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
    return not special and not x.is_inference() and x.dtype in DTYPES


def _fuse_heads(module: torch.nn.Module) -> int:
    """q with those of k and v that are of its type, and one of another. How many became one."""
    layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    first = layers[0]
    if not isinstance(first, QuantLinear) or not _is_bare(first):
        return 0
    before = first.__dict__.get("forward")
    if before is not None and before.together.serves():
        return 0
    same_x = [
        layer
        for layer in layers
        if isinstance(layer, QuantLinear)
        and _is_bare(layer)
        and (layer.in_features, layer.packed_algo) == (first.in_features, first.packed_algo)
        and layer.weight.device == first.weight.device
    ]
    alike = [
        layer
        for layer in same_x
        if layer.qtype == first.qtype
        and layer.out_features % 64 == 0  # a strip of the packed layout
    ]
    others = [layer for layer in same_x if layer.qtype != first.qtype]
    distinct = len({id(layer.weight) for layer in same_x}) == len(same_x)
    if alike[:1] != [first] or not distinct:
        return 0
    # Who is asked last ends it: v, where it is the only one of another type.
    other = others[0] if len(others) == 1 and others[0] is layers[-1] else None
    if len(alike) < 2 and other is None:
        return 0
    present = sum(layer is not None for layer in layers)
    together, at = _Together(alike, other, present == len(alike) + (other is not None)), 0
    weights = torch.cat([layer.weight for layer in alike])
    for index, layer in enumerate(alike):
        layer.weight.data = weights[at : at + len(layer.weight)]
        layer.forward = _Part(together, index)  # type: ignore[method-assign]
        at += len(layer.weight)
    if other is not None:
        other.forward = _Part(together, len(alike))  # type: ignore[method-assign]
    return len(alike) + (other is not None)


def _numbers(count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(4, count, device=device, generator=generator).to(dtype)


def _fuse_rotary(module_name: str) -> bool:
    """Replaces transformers' function in the module of an attention class."""
    module = sys.modules.get(module_name)
    plain = getattr(module, "apply_rotary_pos_emb", None)
    if not module_name.startswith("transformers.") or plain is None:
        return False
    if getattr(plain, "is_quantgemm", False) or not _is_known_rotation(plain):
        return False

    def apply_rotary_pos_emb(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *args: Any,
        **kw: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        alike = q.dtype == k.dtype == cos.dtype == sin.dtype and q.dtype in DTYPES
        fits = alike and q.device.type in ("cpu", "cuda") and cos.dim() == 3
        if not (args or kw or torch.is_grad_enabled()) and fits and q.shape[-1] == cos.shape[-1]:
            return rotate(q, k, cos, sin)
        return plain(q, k, cos, sin, *args, **kw)  # type: ignore[no-any-return]

    apply_rotary_pos_emb.is_quantgemm = True  # type: ignore[attr-defined]
    module.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[union-attr]
    return True


def _is_known_rotation(plain: Callable[..., Any]) -> bool:
    """Whether a function called so does what `ops.rotary` does; some models turn otherwise."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, angles = (
            torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
            for shape in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8))
        )
        cos, sin = angles.cos(), angles.sin()
        try:
            want_q, want_k = plain(q, k, cos, sin)
        except (TypeError, ValueError, RuntimeError):
            return False
        got_q, got_k = ops.rotary(q, k, cos, sin)
        if not (torch.equal(got_q, want_q) and torch.equal(got_k, want_k)):
            return False
    return True
