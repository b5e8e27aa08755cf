# SPDX-License-Identifier: MIT
"""Typed front doors of `torch.ops.quantgemm.*`, each beside its shape rule for tracing.

The C++ op checks its arguments and raises; what stands here adds nothing on the way in. The shape
rules (`register_fake`) let `torch.compile` and `torch.export` see through an op without running it.
`gemm` has its gradient and its rule under `torch.autocast` here too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

import quantgemm._C  # noqa: F401  registers the ops
from quantgemm.formats import Format, format_by_id
from quantgemm.read_ahead import following

__all__ = [
    "activation_row_bytes",
    "dequantize",
    "draft_sample",
    "embedding",
    "gemm",
    "gemm_fp32",
    "gemm_packed",
    "gemm_packed_gated",
    "gemm_packed_pair",
    "invert_vocabulary_map",
    "moe_gemm",
    "pack",
    "quantize",
    "quantize_activations",
    "rms_norm",
    "rotary",
    "sample",
    "spec_verify",
    "spec_verify_tree",
    "unpack",
]

Shape = TypeVar("Shape", bound=Callable[..., Any])

# Weights that a backward pass decodes at a time: less than a large matrix as floats, and enough
# columns of it that the product with each part still runs at full speed.
DECODED_BYTES = 128 << 20


def register_fake(op: str) -> Callable[[Shape], Shape]:
    """torch.library.register_fake, which has no type hints of its own."""
    return torch.library.register_fake(op)  # type: ignore[no-any-return]


def dequantize(
    blocks: torch.Tensor, qtype: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """GGUF rows to numbers, bit-exactly as ggml decodes them.

    blocks: uint8 ``[..., row_bytes]``, CPU or CUDA; qtype: a ggml type id such as
    ``QType.Q4_K``; dtype: float32, or float16/bfloat16 (the float32 value rounded to nearest even).
    Returns ``[..., cols]`` on the same device.
    """
    return torch.ops.quantgemm.dequantize(blocks, int(qtype), dtype)  # type: ignore[no-any-return]


@register_fake("quantgemm::dequantize")
def _(blocks: torch.Tensor, qtype: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    fmt = format_by_id(qtype)
    return blocks.new_empty([*blocks.shape[:-1], _cols(fmt, blocks.shape[-1])], dtype=dtype)


def quantize(x: torch.Tensor, qtype: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Numbers to GGUF rows; CPU and CUDA give the same bytes.

    x: float32/float16/bfloat16 ``[..., cols]``; importance: float32 ``[cols]``, a non-negative
    weight per column for the squared error, or None. Returns uint8 ``[..., row_bytes]``.
    """
    return torch.ops.quantgemm.quantize(x, int(qtype), importance)  # type: ignore[no-any-return]


@register_fake("quantgemm::quantize")
def _(x: torch.Tensor, qtype: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    fmt = format_by_id(qtype)
    row_bytes = x.shape[-1] // fmt.block_elems * fmt.block_bytes
    return x.new_empty([*x.shape[:-1], row_bytes], dtype=torch.uint8)


def quantize_activations(x: torch.Tensor) -> torch.Tensor:
    """Activations to int8 rows for integer dot products.

    x: float32/float16/bfloat16 ``[..., cols]``, cols a multiple of 32. Returns uint8
    ``[..., activation_row_bytes(cols)]``: cols int8 codes, then per 32 of them a float32 scale and
    the float32 sum ``scale · Σ code``, then zeros to a multiple of 16 bytes.
    """
    return torch.ops.quantgemm.quantize_activations(x)  # type: ignore[no-any-return]


@register_fake("quantgemm::quantize_activations")
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], activation_row_bytes(x.shape[-1])], dtype=torch.uint8)


def gemm(x: torch.Tensor, w: torch.Tensor, qtype: int, algo: str = "auto") -> torch.Tensor:
    """Product with quantised weights: ``y[..., n] = x[..., k] · dequantize(w)[n, k]ᵀ``.

    x: float32/float16/bfloat16 ``[..., k]``; w: GGUF rows, uint8 ``[n, row_bytes]``; qtype: their
    ggml type id. Sums are float32, y has x's dtype. algo: ``naive``, ``tiled``, ``dp4a``, ``mma``,
    ``mma_q8``, or ``auto``, which never rounds activations, or ``auto_q8``, which may round them to
    int8 with a scale per 32 (`explain_gemm` says what either chooses).

    Differentiable in x, also twice: the gradient is ``grad_y · dequantize(w)`` in x's dtype, as if
    no algorithm rounded activations. Under `torch.autocast` x is cast as `nn.Linear` casts it.
    """
    with _no_more_autograd_than_needed("gemm", x):
        return torch.ops.quantgemm.gemm(x, w, int(qtype), algo)  # type: ignore[no-any-return]


def _no_more_autograd_than_needed(
    name: str, *inputs: torch.Tensor | None
) -> contextlib.AbstractContextManager[Any]:
    """The autograd rules below are Python: without need of them, a call costs half as much."""
    given = [t for t in inputs if t is not None]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if torch.compiler.is_compiling() or differentiable:
        return contextlib.nullcontext()
    if forward_ad._current_level >= 0 and any(_tangent(t) is not None for t in given):
        # torch gives custom ops no place for this rule and would drop the tangent without a word.
        raise NotImplementedError(f"{name} has no forward-mode derivative: use torch.autograd.grad")
    return torch._C._AutoDispatchBelowAutograd()  # type: ignore[no-any-return]


def _without_gradients(name: str, *inputs: torch.Tensor | None) -> None:
    """Says so, where autograd would drop a gradient or a tangent with a warning or none."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise NotImplementedError(f"{name} has no gradient: call it under torch.no_grad()")
    _no_more_autograd_than_needed(name, *inputs)


@register_fake("quantgemm::gemm")
def _(x: torch.Tensor, w: torch.Tensor, qtype: int, algo: str = "auto") -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], w.shape[0]])


def _tangent(x: torch.Tensor) -> torch.Tensor | None:
    return forward_ad.unpack_dual(x).tangent  # type: ignore[no-any-return, no-untyped-call]


def _save_weights(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, w, ctx.qtype, _ = inputs
    ctx.save_for_backward(w)


def _gemm_backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    """grad_x ``[..., k]`` of grad_y ``[..., n]``, made of ops that autograd can follow again.

    Parts are columns of w, not rows: each column of grad_x is one finished sum of its own, so what
    is decoded at a time changes the memory, not the rounding.
    """
    (w,) = ctx.saved_tensors
    return _times_decoded(grad_y, w, ctx.qtype), None, None, None


def _times_decoded(grad_y: torch.Tensor, w: torch.Tensor, qtype: int) -> torch.Tensor:
    fmt = format_by_id(qtype)
    num_blocks = w.shape[1] // fmt.block_bytes
    decoded_bytes = max(1, w.shape[0] * fmt.block_elems * grad_y.element_size())
    step = max(1, DECODED_BYTES // decoded_bytes) * fmt.block_bytes
    if num_blocks * fmt.block_bytes <= step:
        return grad_y @ dequantize(w, qtype, grad_y.dtype)
    parts = [
        grad_y @ dequantize(w[:, i : i + step], qtype, grad_y.dtype)
        for i in range(0, w.shape[1], step)
    ]
    return torch.cat(parts, -1)


torch.library.register_autograd("quantgemm::gemm", _gemm_backward, setup_context=_save_weights)

# The rules live as long as this object does.
_autocast_rules = torch.library.Library("quantgemm", "FRAGMENT")  # type: ignore[no-untyped-call]


# Arguments that `torch.autocast` casts, of the ops that it has a rule for.
_CAST = {"x", "bias", "residual", "norm_weight"}
_IN_AUTOCAST = ("gemm", "gemm_packed", "gemm_packed_gated", "gemm_packed_pair", "moe_gemm")


def _register_autocast(device_type: str, key: str) -> None:
    """torch.library.register_autocast with the dtype of the region instead of a fixed one."""

    def cast(x: Any) -> Any:
        # float64 stays, as torch's own rule has it: the op then says what it takes.
        is_here = isinstance(x, torch.Tensor) and x.device.type == device_type
        if is_here and x.is_floating_point() and x.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(device_type))
        return x

    def rule_of(name: str) -> Callable[..., torch.Tensor]:
        op = getattr(torch.ops.quantgemm, name).default
        places = [i for i, a in enumerate(op._schema.arguments) if a.name in _CAST]

        def in_autocast(*args: Any) -> torch.Tensor:
            given = [cast(arg) if i in places else arg for i, arg in enumerate(args)]
            with torch.autocast(device_type, enabled=False):
                return op(*given)  # type: ignore[no-any-return]

        return in_autocast

    for name in _IN_AUTOCAST:
        _autocast_rules.impl(name, rule_of(name), key)  # type: ignore[no-untyped-call]


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")


def pack(w: torch.Tensor, qtype: int) -> torch.Tensor:
    """GGUF rows in the layout of `gemm_packed`: same bits, other order (csrc/formats/packed.h).

    w: uint8 ``[n, row_bytes]``; qtype: a type with ``can_pack`` in the format table. Returns uint8
    ``[strips, strip_bytes]``, n padded to 64 rows and k to 64 columns.
    """
    return torch.ops.quantgemm.pack(w, int(qtype))  # type: ignore[no-any-return]


@register_fake("quantgemm::pack")
def _(w: torch.Tensor, qtype: int) -> torch.Tensor:
    return w.new_empty(packed_shape(qtype, w.shape[0], _cols(format_by_id(qtype), w.shape[1])))


def unpack(packed: torch.Tensor, qtype: int, n: int, k: int) -> torch.Tensor:
    """The rows that `pack` was given, byte for byte: uint8 ``[n, row_bytes]``."""
    return torch.ops.quantgemm.unpack(packed, int(qtype), n, k)  # type: ignore[no-any-return]


@register_fake("quantgemm::unpack")
def _(packed: torch.Tensor, qtype: int, n: int, k: int) -> torch.Tensor:
    fmt = format_by_id(qtype)
    return packed.new_empty([n, k // fmt.block_elems * fmt.block_bytes])


def packed_shape(qtype: int, n: int, k: int) -> tuple[int, int]:
    """``[strips, strip_bytes]`` of packed weights ``[n, k]``: 16 rows to a strip."""
    fmt = format_by_id(qtype)
    blocks = (k + 63) // 64 * 64 // fmt.block_elems
    return (n + 63) // 64 * 4, 16 * blocks * fmt.block_bytes


def gemm_packed(
    x: torch.Tensor,
    packed: torch.Tensor,
    qtype: int,
    n: int,
    k: int,
    bias: torch.Tensor | None = None,
    algo: str = "auto",
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product with packed weights: ``y[..., n] = x[..., k] · wᵀ + bias`` for ``packed = pack(w)``.

    x: float32/float16/bfloat16, never rounded; bias: ``[n]`` of x's dtype; residual: ``[..., n]``
    of it, added too: before y is rounded with ``gemv``, ``few`` and ``mma``, after it, by a launch
    of its own, with ``wgmma``. Weights of one type that share x are one call: ``torch.cat`` of what
    `pack` made of each, where their rows are multiples of 64. algo: ``gemv``
    (weights are read once per 8 tokens), ``few`` (per 16; float16 and bfloat16 on compute
    capability 9.0), ``mma`` (per 16 or 32), ``wgmma`` (per 32 to 256; where ``few`` is, weights are
    rounded to x's dtype) or ``auto``; the CPU has ``auto`` alone. A row of y does not depend on the
    batch with ``gemv``, ``few`` and ``mma``; ``wgmma`` divides its work by the number of tokens,
    and gives the same bits for the same sizes.

    ``int8`` rounds x, and the weights anew, to int8 with a scale per row and 256 columns, about 1 %
    of y on gaussian numbers (docs/performance.md): compute capability 9.0, and the CPU to compare
    with. y is rounded before residual is added. ``auto_int8`` takes it from 2048 tokens and 1024
    outputs on, else what ``auto`` takes, and is an error where ``int8`` is one. A row of y does not
    depend on the batch; NaN or infinity in x makes its row NaN. ``auto`` never rounds.

    norm_weight: ``[k]`` of x's dtype; x is then ``rms_norm(x, norm_weight, norm_eps)``. That is a
    launch in front, but ``gemv`` has it inside for bfloat16 (`explain_gemm` says which): x ·
    norm_weight is rounded and multiplied, the norm's factor multiplies float32 sums. So numbers are
    those of two launches up to roundings, and a row of y still does not depend on the batch.

    ahead: packed weights that a later launch reads. ``gemv`` on sm_90 and newer, and ``few``,
    bring the first of them into the L2 while they end; others do not look at it. `ReadAhead`
    finds them by itself.

    On sm_90 and newer the kernel starts to read `packed` before the one launched right before it
    has ended. Bytes from `pack` or a memory copy are complete by then; where another kernel of
    yours writes them (a gather, a collective), let some other launch come in between.

    Differentiable in x, bias, residual and norm_weight; under `torch.autocast` all are cast.
    """
    with _no_more_autograd_than_needed("gemm_packed", x, bias, residual, norm_weight):
        if ahead is None:
            ahead = following(packed)
        return torch.ops.quantgemm.gemm_packed(  # type: ignore[no-any-return]
            x, packed, int(qtype), n, k, bias, algo, residual, norm_weight, norm_eps, ahead
        )


@register_fake("quantgemm::gemm_packed")
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    qtype: int,
    n: int,
    k: int,
    bias: torch.Tensor | None = None,
    algo: str = "auto",
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], n])


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, packed, ctx.qtype, ctx.n, ctx.k, *rest = inputs
    # torch leaves out arguments that have their defaults.
    norm_weight = rest[3] if len(rest) > 3 else None
    ctx.norm_eps = rest[4] if len(rest) > 4 else 0.0
    ctx.save_for_backward(packed, *([] if norm_weight is None else [x, norm_weight]))


def _gemm_packed_backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    packed, *norm = ctx.saved_tensors
    grad_x = grad_bias = grad_residual = grad_norm = None
    needed = [*ctx.needs_input_grad, *[False] * 6]
    if needed[0] or needed[8]:
        grad_x = _times_decoded(grad_y, unpack(packed, ctx.qtype, ctx.n, ctx.k), ctx.qtype)
    if norm and grad_x is not None:
        x, norm_weight = norm
        grad_x, grad_norm = _rms_norm_backward(grad_x, x, norm_weight, ctx.norm_eps)
    if needed[5]:
        grad_bias = grad_y.reshape(-1, ctx.n).sum(0)
    if needed[7]:
        grad_residual = grad_y
    return grad_x, None, None, None, None, grad_bias, None, grad_residual, grad_norm, None, None


def _rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In x and in weight, computed in float32 by ops that autograd can follow."""
    wide, grad = x.float(), grad.float()
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    even, scaled = wide * factor, grad * weight.float()
    grad_x = factor * (scaled - even * (scaled * even).mean(-1, keepdim=True))
    grad_weight = (grad * even).reshape(-1, len(weight)).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


torch.library.register_autograd(
    "quantgemm::gemm_packed", _gemm_packed_backward, setup_context=_save_packed
)


def gemm_packed_pair(
    x: torch.Tensor,
    packed: torch.Tensor,
    qtype: int,
    n: int,
    other: torch.Tensor,
    other_qtype: int,
    other_n: int,
    k: int,
    algo: str = "auto",
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0,
    ahead: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x · wᵀ`` and ``x · otherᵀ``, the same bits as of two calls of `gemm_packed`.

    Weights of two types that share x, as q and v of a mixed file: one launch with ``gemv``, up to
    eight tokens of float16 or bfloat16 and the types Q4_K and Q6_K, Q5_K and Q6_K, Q4_K and Q5_K,
    either first; else two. (Of one type, `gemm_packed` with their strips joined is one launch.) No
    gradients. norm_weight, ahead, when weights are first read, and `torch.autocast`: as for
    `gemm_packed`.
    """
    _without_gradients("gemm_packed_pair", x, norm_weight)
    if ahead is None:
        ahead = following(packed)
    return torch.ops.quantgemm.gemm_packed_pair(  # type: ignore[no-any-return]
        x,
        packed,
        int(qtype),
        n,
        other,
        int(other_qtype),
        other_n,
        k,
        algo,
        norm_weight,
        norm_eps,
        ahead,
    )


@register_fake("quantgemm::gemm_packed_pair")
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    qtype: int,
    n: int,
    other: torch.Tensor,
    other_qtype: int,
    other_n: int,
    k: int,
    algo: str = "auto",
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0,
    ahead: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty([*x.shape[:-1], n]), x.new_empty([*x.shape[:-1], other_n])


def gemm_packed_gated(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    qtype: int,
    n: int,
    k: int,
    algo: str = "auto",
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    """``silu(x · gateᵀ) · (x · upᵀ)`` for two packed weights ``[n, k]`` of one type.

    One launch with ``gemv``, ``few`` and ``mma``, rounded once; several with ``wgmma`` and
    ``int8``, which round the gate to x's dtype first (a float16 one below -65504 gives NaN). No
    gradients. When it starts to read the weights, norm_weight, ahead, and what `torch.autocast`
    does: as for `gemm_packed`.
    """
    _without_gradients("gemm_packed_gated", x, norm_weight)
    if ahead is None:
        ahead = following(gate)
    return torch.ops.quantgemm.gemm_packed_gated(  # type: ignore[no-any-return]
        x, gate, up, int(qtype), n, k, algo, norm_weight, norm_eps, ahead
    )


@register_fake("quantgemm::gemm_packed_gated")
def _(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    qtype: int,
    n: int,
    k: int,
    algo: str = "auto",
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0,
    ahead: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], n])


def moe_gemm(
    x: torch.Tensor,
    packed: torch.Tensor,
    qtype: int,
    n: int,
    k: int,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    algo: str = "auto",
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """Products of a mixture of experts: ``y[t, j] = weights[t, j] · (x · w[e]ᵀ + bias[e])``.

    packed: uint8 ``[experts, strips, strip_bytes]``, `pack` of each expert's rows, stacked; at most
    4096. expert_ids: int64 or int32 ``[tokens, top]``, e above; any other number, such as -1, gives
    a row of zeros. x: float32/float16/bfloat16 ``[tokens, k]``, or ``[tokens, top, k]`` where each
    (token, expert) has a row of its own, as the second product of an expert has. weights: float32
    ``[tokens, top]``, multiplied before y is rounded; bias: ``[experts, n]`` of x's dtype. up, like
    packed: ``weights · silu(x · w[e]ᵀ) · (x · up[e]ᵀ)`` as of `gemm_packed_gated`.
    Returns ``[tokens, top, n]``. algo: as for `gemm_packed`, without ``few`` and ``int8``.

    Tokens are put beside others of the same expert on the device: nothing waits for the GPU, and a
    CUDA graph can hold it. Sums may be added in another order for another batch. No gradients.
    """
    _without_gradients("moe_gemm", x, weights, bias)
    return torch.ops.quantgemm.moe_gemm(  # type: ignore[no-any-return]
        x, packed, int(qtype), n, k, expert_ids, weights, bias, algo, up
    )


@register_fake("quantgemm::moe_gemm")
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    qtype: int,
    n: int,
    k: int,
    expert_ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    algo: str = "auto",
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty([*expert_ids.shape, n])


def gemm_fp32(x: torch.Tensor, w: torch.Tensor, algo: str) -> torch.Tensor:
    """The ladder's first step: float32 ``[..., k]`` times float32 ``[n, k]``, naive or tiled."""
    return torch.ops.quantgemm.gemm_fp32(x, w, algo)  # type: ignore[no-any-return]


@register_fake("quantgemm::gemm_fp32")
def _(x: torch.Tensor, w: torch.Tensor, algo: str) -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], w.shape[0]])


def embedding(
    ids: torch.Tensor, w: torch.Tensor, qtype: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows of a quantised table, decoded: ids ``[...]``, w uint8 ``[rows, row_bytes]``.

    Returns ``[..., cols]``. An id outside the table is an IndexError on the CPU; on a GPU, which
    cannot raise without waiting for it, it gives a row of NaN.
    """
    return torch.ops.quantgemm.embedding(ids, w, int(qtype), dtype)  # type: ignore[no-any-return]


@register_fake("quantgemm::embedding")
def _(
    ids: torch.Tensor, w: torch.Tensor, qtype: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return w.new_empty([*ids.shape, _cols(format_by_id(qtype), w.shape[1])], dtype=dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x ``[..., cols]`` over the root of its mean square, times weight ``[cols]``; one launch.

    Rounded to x's dtype before and after the product with weight, as transformers' models do it.
    Without gradients.
    """
    return torch.ops.quantgemm.rms_norm(x, weight, eps)  # type: ignore[no-any-return]


@register_fake("quantgemm::rms_norm")
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x · cos + rotate_half(x) · sin`` of queries and of keys, bit for bit, in one launch.

    q, k ``[batch, heads, tokens, channels]``, each with heads of its own; cos, sin ``[batch or 1,
    tokens, channels]``, all of one dtype. rotate_half makes (a, b) to (-b, a), a and b the halves
    of the channels. Without gradients.
    """
    return torch.ops.quantgemm.rotary(q, k, cos, sin)  # type: ignore[no-any-return]


@register_fake("quantgemm::rotary")
def _(q: torch.Tensor, k: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def activation_row_bytes(cols: int) -> int:
    """Bytes of one row made by `quantize_activations`."""
    return (cols + cols // 32 * 8 + 15) // 16 * 16


def _cols(fmt: Format, row_bytes: int) -> int:
    return row_bytes // fmt.block_bytes * fmt.block_elems


def invert_vocabulary_map(draft_to_target: torch.Tensor, vocab: int) -> torch.Tensor:
    """int64 ``[vocab]``: each target id's place in the draft's vocabulary, -1 = not in it.

    draft_to_target: int64 ``[draft_vocab]``, the target id of each draft id; ids outside the
    target's vocabulary have no place. Make it once per model.
    """
    ids = draft_to_target
    ids = ids.where((ids >= 0) & (ids < vocab), vocab)
    inverse = torch.full((vocab + 1,), -1, dtype=torch.int64, device=ids.device)
    inverse[ids] = torch.arange(len(ids), device=ids.device)
    return inverse[:vocab]


def spec_verify(
    target: torch.Tensor,
    draft_tokens: torch.Tensor,
    cu_rows: torch.Tensor,
    draft: torch.Tensor | None = None,
    target_probs: bool = False,
    draft_probs: bool = False,
    draft_lse: torch.Tensor | None = None,
    draft_cutoff: torch.Tensor | None = None,
    target_to_draft: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    block: bool = False,
    draft_to_target: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept drafted tokens, replace the first refused one, or add a bonus token.

    target: ``[rows, vocab]`` logits (or probabilities), one row per drafted token and one more, of
    sequence b from row ``cu_rows[b]`` to ``cu_rows[b+1]``; draft_tokens: int64 ``[B, K]``, -1 = no
    more drafts; draft: ``[B, K, draft_vocab]`` logits or probabilities, None if the drafter put all
    mass on its token. Parameters are ``[B]`` tensors on the device; noise comes from seed and
    position, or from uniforms float64 ``[B, K+1]``. Logits of draft get the same temperature and
    truncation as the target's unless draft_lse (and draft_cutoff) of `draft_sample` say otherwise.

    block: judge the drafts as a whole (arXiv 2403.10444): on average at least as many are kept. It
    asks for drafts whose noise belongs to the step (``turn`` of `draft_sample`); K <= 256.

    A draft with another vocabulary passes target_to_draft ``[vocab]`` or, to have it inverted here
    at each call, draft_to_target ``[draft_vocab]``. draft_tokens are ids of the target either way.

    Returns tokens ``[B, K+1]`` (-1 after the last), count ``[B]``, logprobs and status bits
    (`quantgemm.reference` names them).
    """
    outputs: tuple[torch.Tensor, ...] = torch.ops.quantgemm.spec_verify(
        target,
        draft_tokens,
        cu_rows,
        draft,
        target_probs,
        draft_probs,
        draft_lse,
        draft_cutoff,
        _map_to_draft(target, target_to_draft, draft_to_target),
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        uniforms,
        None,
        block,
    )
    tokens, count, logprobs, status, _ = outputs
    return tokens, count, logprobs, status


def spec_verify_tree(
    target: torch.Tensor,
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    cu_rows: torch.Tensor,
    draft: torch.Tensor | None = None,
    target_probs: bool = False,
    draft_probs: bool = False,
    draft_lse: torch.Tensor | None = None,
    draft_cutoff: torch.Tensor | None = None,
    target_to_draft: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    draft_to_target: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`spec_verify` of a tree of drafts: siblings are tried one after the other.

    parents: int64 ``[B, K]``, K <= 256, the node that each drafted token follows, -1 = the text so
    far. Row ``cu_rows[b]`` of target is what follows the text, row ``cu_rows[b] + 1 + i`` what
    follows node i; ``draft[b, i]`` is the distribution that node i was drawn from. Siblings are
    tried in the order of their indices; nodes with the token -1 are skipped. Column i of uniforms
    is node i's.

    Returns tokens ``[B, K+1]``, count ``[B]``, logprobs, status and nodes: int64 ``[B, K]``, the
    accepted ones from the top down, then -1.
    """
    return torch.ops.quantgemm.spec_verify(  # type: ignore[no-any-return]
        target,
        draft_tokens,
        cu_rows,
        draft,
        target_probs,
        draft_probs,
        draft_lse,
        draft_cutoff,
        _map_to_draft(target, target_to_draft, draft_to_target),
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        uniforms,
        parents,
    )


def _map_to_draft(
    target: torch.Tensor,
    target_to_draft: torch.Tensor | None,
    draft_to_target: torch.Tensor | None,
) -> torch.Tensor | None:
    if draft_to_target is None:
        return target_to_draft
    if target_to_draft is not None:
        raise ValueError("draft_to_target: expected without target_to_draft")
    return invert_vocabulary_map(draft_to_target, target.shape[1])


@register_fake("quantgemm::spec_verify")
def _(
    target: torch.Tensor,
    draft_tokens: torch.Tensor,
    cu_rows: torch.Tensor,
    *rest: Any,
    **named: Any,
) -> tuple[torch.Tensor, ...]:
    batch, drafts = draft_tokens.shape
    parents = rest[13] if len(rest) > 13 else named.get("parents")
    return (
        target.new_empty([batch, drafts + 1], dtype=torch.int64),
        target.new_empty([batch], dtype=torch.int64),
        target.new_empty([batch, drafts + 1], dtype=torch.float32),
        target.new_empty([batch], dtype=torch.int32),
        target.new_empty([batch, 0 if parents is None else drafts], dtype=torch.int64),
    )


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token per row of logits ``[B, vocab]``: tokens, logprobs and status ``[B]``.

    The token is the one `spec_verify` gives for a sequence without drafts.
    """
    return torch.ops.quantgemm.sample(  # type: ignore[no-any-return]
        logits, temperature, top_k, top_p, min_p, seed, position, uniforms
    )


@register_fake("quantgemm::sample")
def _(logits: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    types = (torch.int64, torch.float32, torch.int32)
    return tuple(logits.new_empty([logits.shape[0]], dtype=t) for t in types)


def draft_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    return_probs: bool = False,
    turn: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A drafted token per row, with noise that `spec_verify` never uses for itself.

    turn: another draw at the same position. In a tree, which child of its parent the token becomes
    (position is where it would stand in the text); in a block, which of its drafts (position is
    that of the block's first).

    Returns tokens, lse and cutoff ``[B]`` (`spec_verify` takes the latter two with the same logits
    as draft_lse and draft_cutoff), probs float32 ``[B, vocab]`` or ``[B, 0]``, and status.
    """
    return torch.ops.quantgemm.draft_sample(  # type: ignore[no-any-return]
        logits, temperature, top_k, top_p, min_p, seed, position, uniforms, return_probs, turn
    )


@register_fake("quantgemm::draft_sample")
def _(logits: torch.Tensor, *rest: Any, **named: Any) -> tuple[torch.Tensor, ...]:
    rows, vocab = logits.shape
    return_probs = bool(rest[7]) if len(rest) > 7 else bool(named.get("return_probs", False))
    return (
        logits.new_empty([rows], dtype=torch.int64),
        logits.new_empty([rows], dtype=torch.float32),
        logits.new_empty([rows], dtype=torch.float32),
        logits.new_empty([rows, vocab if return_probs else 0], dtype=torch.float32),
        logits.new_empty([rows], dtype=torch.int32),
    )
