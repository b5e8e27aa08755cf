# SPDX-License-Identifier: MIT
"""Mixtures of experts whose weights stay quantised: QuantExperts and its stacks.

    experts = QuantExperts.from_gguf(gate, up, down)  # blk.N.ffn_{gate,up,down}_exps.weight
    y = experts.cuda().pack()(x, ids, weights)  # what a router chose for each token

A stack is one tensor with a matrix for each expert. Packed ones are multiplied by `ops.moe_gemm`,
which asks nothing of the host; others, and all where gradients are wanted, expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch.nn import Parameter
from torch.nn.functional import linear, silu

from quantgemm import ops
from quantgemm.gguf.tensor import GGUFTensor
from quantgemm.nn import Device, PackedModule, check_blocks, check_sizes
from quantgemm.plan import GemmPlan, as_format, can_pack, check_algo, check_packed, explain_gemm

__all__ = ["ExpertLinear", "QuantExpertLinear", "QuantExperts"]

# Pairs of a token and an expert that are multiplied one by one, without looking at the device.
FEW_PAIRS = 64


def multiply_each(
    x: torch.Tensor,
    stack: torch.Tensor,
    ids: torch.Tensor,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Each token by the experts chosen for it, with any product of rows and an expert's weights.

    x ``[tokens, k]`` or ``[tokens, chosen, k]``; stack ``[experts, ...]``; ids int ``[tokens,
    chosen]``, each that of an expert. Returns ``[tokens, chosen, n]``. On a GPU a few tokens fetch
    their experts one by one and the host never looks at ids, so that can be captured in a CUDA
    graph; many are sorted by expert first, for which the host must know how many each has.
    """
    flat = ids.reshape(-1)
    rows = x.reshape(-1, x.shape[-1])
    share = 1 if x.dim() == 3 else max(1, ids.shape[1])  # pairs that have one row of x
    parts = []
    if flat.numel() <= FEW_PAIRS and (x.is_cuda or torch.compiler.is_compiling()):
        for pair in range(flat.numel()):
            row = pair // share
            weights = stack.index_select(0, flat[pair : pair + 1])[0]
            parts.append(product(rows[row : row + 1], weights))
        order = None
    else:
        order, first = flat.argsort(stable=True), 0
        for expert, count in enumerate(torch.bincount(flat, minlength=len(stack)).tolist()):
            if count:
                pairs = order[first : first + count]
                parts.append(product(rows[pairs // share], stack[expert]))
                first += count
    y = torch.cat(parts) if parts else product(rows[:0], stack[0])
    y = y if order is None else y[order.argsort()]
    return y.reshape(*ids.shape, y.shape[-1])


class ExpertLinear(torch.nn.Module):
    """A stack of numbers, ``[experts, out_features, in_features]``, of files without blocks."""

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = experts, out_features, in_features
        self.weight = Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """As `QuantExpertLinear`, for ids that are those of experts."""
        return multiply_each(x, self.weight, ids, linear)

    def extra_repr(self) -> str:
        experts, out_features, in_features = self.weight.shape
        return f"experts={experts}, in_features={in_features}, out_features={out_features}"


class QuantExpertLinear(PackedModule):
    """A matrix of GGUF rows for each expert: ``y[t, j] = x · dequantize(weight[ids[t, j]])ᵀ``.

    weight: uint8 ``[experts, out_features, row_bytes]``, frozen. x: ``[tokens, in_features]``, or
    ``[tokens, top, in_features]`` where each of a token's experts has a row of its own; ids: int64
    or int32 ``[tokens, top]``. Returns ``[tokens, top, out_features]`` in x's dtype, and gradients
    flow to x. algo: as in `ops.gemm`, for rows that are not packed. `pack`: as of `QuantLinear`.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        qtype: int | str,
        device: Device = None,
        algo: str = "auto",
    ) -> None:
        fmt = as_format(qtype)
        check_sizes(fmt, "in_features", in_features, "out_features", out_features)
        if experts < 1:
            raise ValueError(f"experts: expected at least 1, got {experts}")
        super().__init__(experts * out_features, in_features, fmt, device)
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.algo = check_algo(algo)
        self._set_blocks(self.weight.view(experts, out_features, -1))

    @classmethod
    def from_blocks(
        cls, blocks: torch.Tensor, qtype: int | str, algo: str = "auto"
    ) -> QuantExpertLinear:
        """Of GGUF rows, uint8 ``[experts, out_features, row_bytes]``, used without a copy."""
        fmt = as_format(qtype)
        experts, rows, cols = check_blocks(blocks, fmt, "[experts, rows, row_bytes]")
        stack = cls(experts, cols, rows, fmt.type_id, "meta", algo)
        stack._set_blocks(blocks)
        return stack

    @classmethod
    def from_gguf(
        cls, tensor: GGUFTensor, device: Device = None, algo: str = "auto"
    ) -> QuantExpertLinear:
        """Of a tensor ``[experts, out_features, in_features]``; the mapped file on the CPU."""
        if len(tensor.shape) != 3:
            raise ValueError(
                "tensor: expected three dimensions [experts, out_features, in_features], "
                f"got {tensor.name!r} of shape {list(tensor.shape)}"
            )
        blocks = tensor.blocks if device is None else tensor.blocks.to(device)
        return cls.from_blocks(blocks, tensor.qtype, algo)

    @property
    def weight_shape(self) -> torch.Size:
        """Of the numbers, not of the bytes: ``[experts, out_features, in_features]``."""
        return torch.Size((self.experts, self.out_features, self.in_features))

    def forward(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """weights: float32 ``[tokens, top]``, by which y is multiplied: before it is rounded where
        the stack is packed and no gradients are wanted, else after.

        An id that is no expert's gives zeros.
        """
        if not torch.compiler.is_compiling():
            self._check_type()
        if self.is_packed and self.algo != "auto":
            check_packed(self.format, self.algo)
        sizes = self._type_id, self.out_features, self.in_features
        if self.is_packed and not needs_gradient(x, weights):
            return ops.moe_gemm(x, self.weight, *sizes, ids, weights)
        check_routes(x, ids, weights)

        def product(rows: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
            if self.is_packed:
                # The copy is a launch between the one that gathered the expert and its reader.
                return ops.gemm_packed(rows.clone(), expert, *sizes)
            return ops.gemm(rows, expert, self._type_id, self.algo)

        known = (ids >= 0) & (ids < self.experts)
        y = multiply_each(x, self.weight, ids.clamp(0, self.experts - 1), product)
        y = y.masked_fill(~known[..., None], 0)
        return y if weights is None else (y * weights[..., None]).to(y.dtype)

    def explain(self, tokens: int, top: int, dtype: torch.dtype = torch.bfloat16) -> GemmPlan:
        """The plan of one expert's product, if tokens are spread over them evenly."""
        pairs = tokens * top
        each = pairs // max(1, min(pairs, self.experts))
        sizes = each, self.out_features, self.in_features
        place, packed = self.weight.device, self.is_packed
        plan = explain_gemm(*sizes, self._type_id, place, dtype, self.algo, packed)
        if not packed:
            return plan
        available = tuple(algo for algo in plan.available if algo != "int8")
        obstacles = {**plan.obstacles, "int8": "experts have no int8 products"}
        return replace(plan, available=available, obstacles=obstacles)

    def _pack(self, blocks: torch.Tensor) -> torch.Tensor:
        if self.out_features % 64 == 0:  # whole groups of strips: one expert behind the other
            packed = ops.pack(blocks.flatten(0, 1), self._type_id)
            return packed.view(self.experts, -1, packed.shape[1])
        return torch.stack([ops.pack(expert, self._type_id) for expert in blocks])

    def _unpack(self, packed: torch.Tensor) -> torch.Tensor:
        sizes = self._type_id, self.out_features, self.in_features
        return torch.stack([ops.unpack(expert, *sizes) for expert in packed])

    def extra_repr(self) -> str:
        text = f"experts={self.experts}, in_features={self.in_features}, "
        text += f"out_features={self.out_features}, {self._size_repr()}"
        text += ", packed" if self.is_packed else ""
        return text if self.algo == "auto" else f"{text}, algo={self.algo}"


Stack: TypeAlias = ExpertLinear | QuantExpertLinear


class QuantExperts(torch.nn.Module):
    """``Σ_j weights[t, j] · down[e](silu(gate[e] x) · (up[e] x))``, e = ids[t, j].

    gate_proj, up_proj ``[experts, inner, hidden]`` and down_proj ``[experts, hidden, inner]`` are
    three stacks. It is called as the experts of transformers' models are. Packed gate and up of one
    type are one launch, and a step of one token is three: that, down with its weights, their sum.
    """

    def __init__(self, gate_proj: Stack, up_proj: Stack, down_proj: Stack) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        gate, up, down = (stack_shape(stack) for stack in (gate_proj, up_proj, down_proj))
        if up != gate:
            raise ValueError(f"up_proj: expected {list(gate)} as gate_proj, got {list(up)}")
        if down != (wanted := (gate[0], gate[2], gate[1])):
            raise ValueError(f"down_proj: expected {list(wanted)}, got {list(down)}")

    @classmethod
    def from_gguf(
        cls, gate: GGUFTensor, up: GGUFTensor, down: GGUFTensor, device: Device = None
    ) -> QuantExperts:
        """Of tensors ``ffn_gate_exps``, ``ffn_up_exps`` and ``ffn_down_exps`` of a file."""
        return cls(*(QuantExpertLinear.from_gguf(t, device) for t in (gate, up, down)))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """x ``[tokens, hidden]``, ids and weights ``[tokens, top]`` to ``[tokens, hidden]``."""
        x, weights = hidden_states, top_k_weights.float()
        inner = self._gated(x, top_k_index)
        if isinstance(self.down_proj, QuantExpertLinear):
            y = self.down_proj(inner, top_k_index, weights)
        else:
            y = self.down_proj(inner, top_k_index) * weights[..., None]
        total: torch.Tensor = y.sum(1)
        return total.to(x.dtype)

    def _gated(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj, self.up_proj
        packed = [s for s in (gate, up) if isinstance(s, QuantExpertLinear) and s.is_packed]
        if len(packed) == 2 and packed[0].qtype == packed[1].qtype and not needs_gradient(x):
            first, second = packed
            if not torch.compiler.is_compiling():
                first._check_type()
                second._check_type()
            sizes = first.qtype, first.out_features, first.in_features
            return ops.moe_gemm(x, first.weight, *sizes, ids, up=second.weight)
        return silu(gate(x, ids)) * up(x, ids)  # type: ignore[no-any-return]

    def pack(self) -> QuantExperts:
        """Packs those stacks whose type has a packed form; see `QuantLinear.pack`."""
        for stack in (self.gate_proj, self.up_proj, self.down_proj):
            if isinstance(stack, QuantExpertLinear) and can_pack(stack.format):
                stack.pack()
        return self

    def unpack(self) -> QuantExperts:
        """Puts the rows back."""
        for stack in (self.gate_proj, self.up_proj, self.down_proj):
            if isinstance(stack, QuantExpertLinear):
                stack.unpack()
        return self


def stack_shape(stack: Stack) -> tuple[int, ...]:
    """``[experts, out_features, in_features]``."""
    return tuple(stack.weight_shape if isinstance(stack, QuantExpertLinear) else stack.weight.shape)


def check_routes(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor | None) -> None:
    """As `ops.moe_gemm` checks what it is given."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected int32 or int64, got {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"ids: expected [tokens, top], got {list(ids.shape)}")
    if x.shape[:-1] not in (ids.shape, ids.shape[:1]):
        tokens, top = ids.shape
        raise ValueError(
            f"x: expected [{tokens}, k] or [{tokens}, {top}, k] as ids has it, got {list(x.shape)}"
        )
    if weights is not None and weights.shape != ids.shape:
        raise ValueError(f"weights: expected {list(ids.shape)}, got {list(weights.shape)}")


def needs_gradient(*tensors: Any) -> bool:
    """Whether autograd must see what is done with these; moe_gemm has no gradient."""
    given = [t for t in tensors if t is not None]
    return torch.is_grad_enabled() and any(t.requires_grad for t in given)
