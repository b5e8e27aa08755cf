# SPDX-License-Identifier: MIT
"""Layers whose weights stay quantised: QuantLinear, QuantEmbedding, and replace_linear.

    model, report = replace_linear(model, "Q4_K")
    print(report)

The packed bytes are an ordinary frozen uint8 Parameter `weight`, so that `.to(device)`, offloading
and `state_dict` treat them as they treat any weight; a scalar buffer `weight_type` carries the ggml
type id into checkpoints. `.half()`, `.to(dtype)` and the like never touch the bytes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

import torch
from torch.nn import Parameter
from tqdm import tqdm

from quantgemm import ops
from quantgemm.formats import FORMATS, Format, QType
from quantgemm.gguf.tensor import GGUFTensor
from quantgemm.plan import GemmPlan, as_format, check_algo, check_packed, explain_gemm

__all__ = ["QuantEmbedding", "QuantLinear", "ReplaceReport", "Replaced", "replace_linear"]

Device: TypeAlias = torch.device | str | None
Filter: TypeAlias = str | re.Pattern[str] | Callable[[str, torch.nn.Linear], bool]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


_ALIKE: ContextVar[bool] = ContextVar("quantgemm_alike_rows", default=False)


@contextmanager
def alike_rows() -> Iterator[None]:
    """Inside, packed products on a GPU are ``gemv``'s: a row has the same bits in any number.

    For up to eight rows; more are passes of eight. ``auto`` takes another kernel for two than for
    one where x is long.
    """
    token = _ALIKE.set(True)
    try:
        yield
    finally:
        _ALIKE.reset(token)


class QuantModule(torch.nn.Module):
    """A matrix of GGUF rows that stands for numbers ``[rows, cols]``: what both layers share.

    weight: uint8 ``[rows, row_bytes]``, frozen; weight_type: its ggml type id, an int32 scalar that
    exists for checkpoints: nothing computes with it.
    """

    weight: Parameter
    weight_type: torch.Tensor

    def __init__(self, rows: int, cols: int, fmt: Format, device: Device) -> None:
        super().__init__()
        self._type_id, self._rows, self._cols = fmt.type_id, rows, cols
        # Zero bytes are zero weights in every format: a fresh layer has no NaN in it.
        blocks = torch.zeros(rows, fmt.row_bytes(cols), dtype=torch.uint8, device=device)
        self.weight = _frozen(blocks)
        self.register_buffer("weight_type", None)
        self._mark_type()

    @property
    def qtype(self) -> QType:
        """The ggml type of the weights, an int."""
        return QType(self._type_id)

    @property
    def format(self) -> Format:
        return FORMATS[self._type_id]

    @property
    def weight_shape(self) -> torch.Size:
        """Of the numbers, not of the bytes: ``[rows, cols]``."""
        return torch.Size((self._rows, self._cols))

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self._rows * self.format.row_bytes(self._cols)

    @property
    def bits_per_weight(self) -> float:
        return self.format.bits_per_weight

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights as numbers ``[rows, cols]``, as ggml decodes them; default float32."""
        return ops.dequantize(self.weight, self._type_id, dtype or torch.float32)

    def _set_blocks(self, blocks: torch.Tensor) -> None:
        """Uses these bytes, without a copy; a Parameter stays the object it is, and so shared."""
        self.weight = blocks if isinstance(blocks, Parameter) else _frozen(blocks)
        self._mark_type()

    def _mark_type(self) -> None:
        """Makes weight_type beside the weight, and remembers that it is right."""
        place = self.weight.device
        self.weight_type = torch.full((), self._type_id, dtype=torch.int32, device=place)
        self._seen_type = self.weight_type  # the object: copies and pickles keep the relation

    def _check_type(self) -> None:
        """Loaders that put tensors into modules one by one, as accelerate's, ask nobody.

        So a weight_type that was not made here is looked at once, when the layer is first used:
        Q4_0 and Q4_K rows have as many bytes, and the other's numbers would be noise.
        """
        kind = self.weight_type
        if kind is self._seen_type or type(kind) is not torch.Tensor or kind.is_meta:
            return
        if kind.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if problem := self._unfit({"weight_type": kind}, ""):
            raise ValueError(f"{type(self).__name__}: {problem}")
        self._seen_type = kind

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            # Module.type(dtype), unlike .to(dtype), would convert bytes as if they were numbers.
            moved = fn(tensor)
            keep = not tensor.is_floating_point() and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if keep else moved

        ours = self.weight_type is self._seen_type
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if ours:
            self._mark_type()  # to_empty() has just made it garbage
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = self._unfit(state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        assign = bool(local_metadata.get("assign_to_params_buffers"))
        kept = self._as_kept(state_dict, prefix, assign)
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            kept, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._mark_type()  # beside the weight also where a checkpoint came without the type

    def _as_kept(
        self, state_dict: Mapping[str, Any], prefix: str, assign: bool
    ) -> Mapping[str, Any]:
        """A checkpoint's entries with the weight's bytes in the order that the layer has them.

        assign: the entry itself becomes the weight, where it lies.
        """
        return state_dict

    def _unfit(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why the entries of a checkpoint cannot be this layer's weights; None if they can."""
        weight, kind = state_dict.get(prefix + "weight"), state_dict.get(prefix + "weight_type")
        name = self.format.name
        if isinstance(kind, torch.Tensor) and not kind.is_meta:
            got = int(kind) if kind.numel() == 1 else -1
            if got != self._type_id:
                other = FORMATS[got].name if got in FORMATS else "no GGUF type"
                return (
                    f"{prefix}weight_type: expected {self._type_id} ({name}), got {got} ({other}): "
                    f"the layer must be built with the type of the checkpoint"
                )
        shape = [*self.weight_shape[:-1], self.format.row_bytes(self._cols)]
        if isinstance(weight, torch.Tensor) and weight.dtype != torch.uint8:
            return (
                f"{prefix}weight: expected torch.uint8 {shape}, rows of {name}, got {weight.dtype} "
                f"{list(weight.shape)}: load numbers into torch.nn layers and quantise those"
            )
        if isinstance(weight, torch.Tensor) and list(weight.shape) != shape:
            return (
                f"{prefix}weight: expected {shape}, rows of {self._cols} weights of {name}, "
                f"got {list(weight.shape)}"
            )
        return None

    def _size_repr(self) -> str:
        return (
            f"{self.format.name}, {self.nbytes:_} bytes, {self.bits_per_weight:g} bits per weight"
        )


Layer = TypeVar("Layer", bound="PackedModule")


class PackedModule(QuantModule):
    """Rows that may lie in the order of tensor cores instead; checkpoints keep the file's rows."""

    algo: str
    is_packed = False

    def pack(self: Layer) -> Layer:
        """Puts the bytes in place into the layout of `ops.gemm_packed`; only that copy is kept.

        Not every type has one, and algo must be ``"auto"``. `.to()` and the like unpack a layer on
        the CPU; `state_dict` has the rows as they were, unpacked for it. A weight that is shared
        with an embedding stays one there: this layer then has bytes of its own. accelerate's
        offloading puts rows where packed bytes are expected: unpack first.
        """
        if not self.is_packed:
            check_packed(self.format, self.algo)
            self._set_blocks(_frozen(self._pack(self.weight)))
            self.is_packed = True
        return self

    def unpack(self: Layer) -> Layer:
        """Puts the rows back."""
        if self.is_packed:
            self._set_blocks(_frozen(self.blocks))
            self.is_packed = False
        return self

    @property
    def blocks(self) -> torch.Tensor:
        """The rows, uint8 ``[out_features, row_bytes]``; a copy where they are packed."""
        return self._unpack(self.weight) if self.is_packed else self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights as numbers ``[rows, cols]``, as ggml decodes them; default float32."""
        return ops.dequantize(self.blocks, self._type_id, dtype or torch.float32)

    def _pack(self, blocks: torch.Tensor) -> torch.Tensor:
        return ops.pack(blocks, self._type_id)

    def _unpack(self, packed: torch.Tensor) -> torch.Tensor:
        return ops.unpack(packed, self._type_id, self._rows, self._cols)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.weight.device.type == "cpu":
            self.unpack()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        if self.is_packed:
            destination[prefix + "weight"] = self.blocks

    def _as_kept(
        self, state_dict: Mapping[str, Any], prefix: str, assign: bool
    ) -> Mapping[str, Any]:
        blocks = state_dict.get(prefix + "weight")
        if not self.is_packed or not isinstance(blocks, torch.Tensor):
            return state_dict
        if not assign and not self.weight.is_meta:
            blocks = blocks.to(self.weight.device)
        return {**state_dict, prefix + "weight": self._pack(blocks)}


class QuantLinear(PackedModule):
    """``y[..., out] = x[..., in] · dequantize(weight)[out, in]ᵀ + bias[out]``.

    weight: uint8 ``[out_features, row_bytes]``, a Parameter that does not require gradients; bias:
    ``[out_features]``, one that does. x: float32, float16 or bfloat16 ``[..., in_features]``; y has
    its dtype whatever that of bias, and under `torch.autocast` the region's. Gradients flow to x
    and to bias. algo is passed to `ops.gemm`. A fresh layer's weights are zero.

    `pack` puts the bytes into the order of tensor cores, which is faster on a GPU; checkpoints keep
    the file's rows either way.
    """

    bias: Parameter | None
    precision: str | None = None  # of packed products, as `pack` was told

    def __init__(
        self,
        in_features: int,
        out_features: int,
        qtype: int | str,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        algo: str = "auto",
    ) -> None:
        fmt = as_format(qtype)
        check_sizes(fmt, "in_features", in_features, "out_features", out_features)
        super().__init__(out_features, in_features, fmt, device)
        self.in_features, self.out_features = in_features, out_features
        self.algo = check_algo(algo)
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if zeros is None else Parameter(zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[..., in_features]`` to y ``[..., out_features]``."""
        if not torch.compiler.is_compiling():
            self._check_type()
        bias = self.bias
        if self.is_packed:
            if self.algo != "auto":
                check_packed(self.format, self.algo)
            sizes = self.out_features, self.in_features
            inside = bias if bias is not None and bias.dtype == x.dtype else None
            y = ops.gemm_packed(x, self.weight, self._type_id, *sizes, inside, self.packed_algo)
            bias = bias if inside is None else None
        else:
            y = ops.gemm(x, self.weight, self._type_id, self.algo)
        # In place: y is nobody else's, keeps its dtype, and is rounded once where bias is wider.
        return y if bias is None else y.add_(bias)

    @classmethod
    def from_blocks(
        cls,
        blocks: torch.Tensor,
        qtype: int | str,
        bias: torch.Tensor | None = None,
        algo: str = "auto",
    ) -> QuantLinear:
        """Of GGUF rows, uint8 ``[out_features, row_bytes]``, which are used without a copy."""
        fmt = as_format(qtype)
        rows, cols = check_blocks(blocks, fmt)
        layer = cls(cols, rows, fmt.type_id, bias=False, device="meta", algo=algo)
        layer._set_blocks(blocks)
        if bias is not None:
            if bias.shape != (rows,):
                raise ValueError(f"bias: expected shape [{rows}], got {list(bias.shape)}")
            layer.bias = bias if isinstance(bias, Parameter) else Parameter(bias.detach())
        return layer

    @classmethod
    def from_gguf(
        cls,
        tensor: GGUFTensor,
        bias: GGUFTensor | torch.Tensor | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        algo: str = "auto",
    ) -> QuantLinear:
        """Of a tensor ``[out_features, in_features]`` of a file.

        On the CPU the weights are the mapped file itself: nothing is read until it is used, and the
        mapping lives as long as the layer. dtype: of bias; default that of a torch.Tensor, and
        torch's default dtype for one of a file.
        """
        blocks = _file_blocks(tensor, "[out_features, in_features]", device)
        if isinstance(bias, GGUFTensor):
            bias = bias.dequantize(dtype or torch.get_default_dtype(), device or "cpu")
        elif bias is not None:
            bias = bias.to(device=blocks.device, dtype=dtype)
        return cls.from_blocks(blocks, tensor.qtype, bias, algo)

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        qtype: int | str,
        importance: torch.Tensor | None = None,
        algo: str = "auto",
    ) -> QuantLinear:
        """Quantises a layer where it is; bias is not copied but the same Parameter.

        importance: float32 ``[in_features]``, how much an error in each column matters.
        """
        fmt = as_format(qtype)
        check_sizes(fmt, "in_features", linear.in_features, "out_features", linear.out_features)
        blocks = _quantize("linear", linear.weight, fmt, importance)
        layer = cls.from_blocks(blocks, fmt.type_id, linear.bias, algo)
        return layer.train(linear.training)

    def pack(self, precision: str | None = None) -> QuantLinear:
        """As of every layer that can be packed: `PackedModule.pack`.

        precision: ``"int8"`` lets products of many tokens round x and the weights to int8
        (``auto_int8`` of `ops.gemm_packed`), an error on a GPU that has no such products; None does
        not, also where an earlier call did. `unpack`, and so `.cpu()`, forgets it.
        """
        if precision not in (None, "int8"):
            raise ValueError(f"precision: expected 'int8' or None, got {precision!r}")
        super().pack()
        self.precision = precision
        return self

    def unpack(self) -> QuantLinear:
        """Puts the rows back."""
        super().unpack()
        self.precision = None
        return self

    @property
    def packed_algo(self) -> str:
        """What packed products ask `ops.gemm_packed` for."""
        if not torch.compiler.is_compiling() and _ALIKE.get() and self.weight.is_cuda:
            return "gemv"
        return "auto" if self.precision is None else f"auto_{self.precision}"

    def explain(self, m: int, dtype: torch.dtype = torch.bfloat16) -> GemmPlan:
        """Which algorithm multiplies m rows of this dtype on the layer's device, and why."""
        shape = (m, self.out_features, self.in_features)
        place, packed = self.weight.device, self.is_packed
        algo = self.packed_algo if packed and self.algo == "auto" else self.algo
        return explain_gemm(*shape, self._type_id, place, dtype, algo, packed)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, "
        text += f"bias={self.bias is not None}, {self._size_repr()}"
        text += ", packed" if self.is_packed else ""
        text += f", precision={self.precision}" if self.precision else ""
        return text if self.algo == "auto" else f"{text}, algo={self.algo}"


class QuantEmbedding(QuantModule):
    """Rows of a quantised table, decoded: ids ``[...]`` to ``[..., embedding_dim]`` of `dtype`.

    weight: uint8 ``[num_embeddings, row_bytes]``, frozen. dtype: of the result; default torch's;
    `.half()`, `.to(dtype)` and the like change it as they change that of nn.Embedding. padding_idx
    is kept for those who ask; it has meaning only for gradients, which a frozen table has not.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        qtype: int | str,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        fmt = as_format(qtype)
        check_sizes(fmt, "embedding_dim", embedding_dim, "num_embeddings", num_embeddings)
        super().__init__(num_embeddings, embedding_dim, fmt, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx: expected one of {num_embeddings} rows, got {padding_idx}"
            )
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.dtype = dtype or torch.get_default_dtype()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 or int32 ``[...]`` to ``[..., embedding_dim]``."""
        if not torch.compiler.is_compiling():
            self._check_type()
        return ops.embedding(ids, self.weight, self._type_id, self.dtype)

    @classmethod
    def from_blocks(
        cls,
        blocks: torch.Tensor,
        qtype: int | str,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantEmbedding:
        """Of GGUF rows, uint8 ``[num_embeddings, row_bytes]``, which are used without a copy."""
        fmt = as_format(qtype)
        rows, cols = check_blocks(blocks, fmt)
        table = cls(rows, cols, fmt.type_id, padding_idx, "meta", dtype)
        table._set_blocks(blocks)
        return table

    @classmethod
    def from_gguf(
        cls,
        tensor: GGUFTensor,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> QuantEmbedding:
        """Of a tensor ``[num_embeddings, embedding_dim]`` of a file, on the CPU without a copy."""
        blocks = _file_blocks(tensor, "[num_embeddings, embedding_dim]", device)
        return cls.from_blocks(blocks, tensor.qtype, padding_idx, dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: torch.nn.Embedding,
        qtype: int | str,
        importance: torch.Tensor | None = None,
    ) -> QuantEmbedding:
        """Quantises a table where it is; importance as for `QuantLinear.from_linear`."""
        if embedding.max_norm is not None:
            raise ValueError("embedding: expected max_norm None: it rewrites rows as they are read")
        fmt, rows = as_format(qtype), embedding.num_embeddings
        check_sizes(fmt, "embedding_dim", embedding.embedding_dim, "num_embeddings", rows)
        blocks = _quantize("embedding", embedding.weight, fmt, importance)
        dtype = embedding.weight.dtype
        table = cls.from_blocks(blocks, fmt.type_id, embedding.padding_idx, dtype)
        return table.train(embedding.training)

    def as_linear(self, bias: torch.Tensor | None = None, algo: str = "auto") -> QuantLinear:
        """An output head ``[..., embedding_dim]`` to ``[..., num_embeddings]`` on the same bytes.

        Both layers hold one Parameter: it is moved, counted and offloaded once.
        """
        return QuantLinear.from_blocks(self.weight, self._type_id, bias, algo)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # There is no floating-point tensor here to follow .half() or .to(dtype): ask an empty one.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}, {self._size_repr()}, {self.dtype}"
        return text if self.padding_idx is None else f"{text}, padding_idx={self.padding_idx}"


# ------------------------------------------------------------------------------ checks


def check_sizes(fmt: Format, cols_name: str, cols: int, rows_name: str, rows: int) -> None:
    for name, size in ((rows_name, rows), (cols_name, cols)):
        if size < 0:
            raise ValueError(f"{name}: expected a size of 0 or more, got {size}")
    if cols % fmt.block_elems:
        raise ValueError(f"{cols_name}: {_misfit(cols, fmt)}")


def _misfit(cols: int, fmt: Format) -> str:
    return f"{cols} is not a multiple of the {fmt.block_elems}-weight {fmt.name} block"


def check_blocks(
    blocks: torch.Tensor, fmt: Format, expected: str = "[rows, row_bytes]"
) -> tuple[int, ...]:
    """Rows and weights per row, and before them what else is expected."""
    if blocks.dtype != torch.uint8:
        raise TypeError(f"blocks: expected torch.uint8, got {blocks.dtype}")
    if blocks.dim() != expected.count(",") + 1:
        raise ValueError(f"blocks: expected {expected}, got shape {list(blocks.shape)}")
    try:
        return *blocks.shape[:-1], fmt.cols(blocks.shape[-1])
    except ValueError as error:
        raise ValueError(f"blocks: {error}") from None


def _frozen(blocks: torch.Tensor) -> Parameter:
    return Parameter(blocks, requires_grad=False)


def _file_blocks(tensor: GGUFTensor, expected: str, device: Device) -> torch.Tensor:
    if len(tensor.shape) != 2:
        raise ValueError(
            f"tensor: expected two dimensions {expected}, "
            f"got {tensor.name!r} of shape {list(tensor.shape)}"
        )
    return tensor.blocks if device is None else tensor.blocks.to(device)


def _quantize(
    owner: str, weight: torch.Tensor, fmt: Format, importance: torch.Tensor | None
) -> torch.Tensor:
    if weight.dtype not in _FLOATS:
        expected = "torch.float32, torch.float16 or torch.bfloat16"
        raise TypeError(f"{owner}: expected a weight of {expected}, got {weight.dtype}")
    if importance is not None:
        importance = importance.to(weight.device, torch.float32)
    return ops.quantize(weight.detach(), fmt.type_id, importance)


# ------------------------------------------------------------------------------ replacing


@dataclass(frozen=True)
class Replaced:
    """One layer: its name, the shape of its weight and the bytes of it before and after.

    shared_with: the layer whose bytes these are, which counts them; this one then has 0.
    """

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    shared_with: str | None = None


@dataclass(frozen=True)
class ReplaceReport:
    """What `replace_linear` did. skipped: ``{name: why not}``; total bytes: of the whole module."""

    qtype: str
    replaced: tuple[Replaced, ...]
    skipped: dict[str, str]
    total_bytes_before: int
    total_bytes_after: int

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.replaced)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.replaced)

    def __str__(self) -> str:
        """Layers that differ only in a number of their names are one line."""
        done: dict[str, list[Replaced]] = defaultdict(list)
        for layer in self.replaced:
            shared = f", the bytes of {layer.shared_with}" if layer.shared_with else ""
            done[f"{_pattern(layer.name)} {list(layer.shape)}{shared}"].append(layer)
        kept: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, why in self.skipped.items():
            kept[_pattern(name), why].append(name)

        lines = [
            f"{self.qtype}: {len(self.replaced)} layers replaced, {len(self.skipped)} not",
            f"  weights {_size(self.bytes_before)} -> {_size(self.bytes_after)}, the whole module "
            f"{_size(self.total_bytes_before)} -> {_size(self.total_bytes_after)}",
        ]
        for what, layers in done.items():
            before = _size(sum(layer.bytes_before for layer in layers))
            after = _size(sum(layer.bytes_after for layer in layers))
            lines.append(f"  {what}{_times(layers)}: {before} -> {after}")
        for (pattern, why), names in kept.items():
            lines.append(f"  not {pattern}{_times(names)}: {why}")
        return "\n".join(lines)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name) or "(the module itself)"


def _times(items: list[Any]) -> str:
    return f" x {len(items)}" if len(items) > 1 else ""


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.2f} KiB"


def replace_linear(
    module: torch.nn.Module,
    qtype: int | str,
    filter: Filter | None = None,
    *,
    algo: str = "auto",
    importance: Mapping[str, torch.Tensor] | None = None,
    tied: bool = False,
    progress: bool | None = None,
) -> tuple[torch.nn.Module, ReplaceReport]:
    """Quantises the nn.Linear layers of a module in place, each where it lies.

    filter: which ones: a glob (``"*.mlp.*"``) or a compiled regular expression (searched) over the
    layer's name, or ``callable(name, layer) -> bool``. What cannot be replaced stays, and the
    report says why; a second call with another type can take it. A layer used in several places is
    replaced once and goes by its first name. Layers that share a weight keep sharing it; one whose
    weight is also an nn.Embedding's stays unless ``tied=True``, which replaces both, on the same
    bytes. importance: float32 ``[in_features]`` by layer name. progress: a bar; None shows it on
    terminals. Numbers are freed layer by layer unless somebody else, such as an optimizer, holds
    them: make optimizers afterwards.

    Returns the module, a new one only where `module` itself is an nn.Linear, and the report.
    """
    fmt, wanted = as_format(qtype), _as_filter(filter)
    check_algo(algo)
    importance = importance or {}
    if unknown := sorted(set(importance) - {name for name, _ in module.named_modules()}):
        raise ValueError(f"importance: expected names of layers, got {', '.join(unknown)}")

    chosen, skipped = _choose(module, fmt, wanted, tied)
    places, total_before = _places(module), _total_bytes(module)
    packed: dict[_Memory, tuple[str, Parameter]] = {}  # first user and new bytes, by old memory
    replaced: list[Replaced] = []
    hidden = None if progress is None else not progress
    with tqdm(total=len(chosen), unit="layer", leave=False, disable=hidden) as bar:
        for name, memory in chosen.items():
            old = module.get_submodule(name)
            assert isinstance(old, torch.nn.Linear | torch.nn.Embedding)
            rows, cols = old.weight.shape
            if memory in packed:
                first, blocks = packed[memory]
                replaced.append(Replaced(name, (rows, cols), 0, 0, first))
            else:
                alike = (n for n, m in chosen.items() if m == memory and n in importance)
                columns = importance.get(next(alike, name))
                blocks = _frozen(_quantize(name or "module", old.weight, fmt, columns))
                packed[memory] = name, blocks
                replaced.append(Replaced(name, (rows, cols), old.weight.nbytes, blocks.nbytes))
            new = _layer_like(old, blocks, fmt, algo)
            for parent, attribute in places.get(name, []):
                setattr(parent, attribute, new)
            if old is module:
                module = new
            del old  # its numbers go before the next layer's bytes come
            bar.update()
    total_after = _total_bytes(module)
    return module, ReplaceReport(fmt.name, tuple(replaced), skipped, total_before, total_after)


# Memory that tensors may share: the storage and the view of it. Two Parameters can be one weight.
_Memory: TypeAlias = tuple[Any, ...]


def _memory(tensor: torch.Tensor) -> _Memory:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride()


def _places(module: torch.nn.Module) -> dict[str, list[tuple[torch.nn.Module, str]]]:
    """Where each layer is, by its first name: parents and the attribute that it is of them."""
    first_name = {id(child): name for name, child in module.named_modules()}
    places: dict[str, list[tuple[torch.nn.Module, str]]] = defaultdict(list)
    for parent in module.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places[first_name[id(child)]].append((parent, attribute))
    return places


def _choose(
    module: torch.nn.Module,
    fmt: Format,
    wanted: Callable[[str, torch.nn.Linear], bool],
    tied: bool,
) -> tuple[dict[str, _Memory], dict[str, str]]:
    """Layers to replace with the memory of their weights, and why the others stay."""
    places = _places(module)
    chosen: dict[str, _Memory] = {}
    skipped: dict[str, str] = {}
    holders: dict[_Memory, list[str]] = defaultdict(list)  # layers, by the memory they use
    for name, layer in module.named_modules():
        for parameter in layer._parameters.values():
            if type(parameter) is Parameter:
                holders[_memory(parameter)].append(name)
        if isinstance(layer, torch.nn.Linear) and not wanted(name, layer):
            skipped[name] = "left out by the filter"
        elif isinstance(layer, torch.nn.Linear | QuantLinear):
            why = _obstacle(layer, [parent for parent, _ in places[name]], fmt)
            if why is None:
                chosen[name] = _memory(layer.weight)
            else:
                skipped[name] = why
    # A shared weight is replaced in all its layers or in none.
    for memory in dict.fromkeys(chosen.values()):
        others = [name for name in holders[memory] if name not in chosen]
        are_tables = all(_is_plain_table(module.get_submodule(name)) for name in others)
        if are_tables and (tied or not others):
            chosen.update(dict.fromkeys(others, memory))
            continue
        hint = "; tied=True replaces both" if are_tables else ""
        for name in [name for name, its in chosen.items() if its == memory]:
            del chosen[name]
            skipped[name] = f"its weight is also that of {', '.join(others)}{hint}"
    return chosen, skipped


def _obstacle(
    layer: torch.nn.Linear | QuantLinear, parents: list[torch.nn.Module], fmt: Format
) -> str | None:
    """Why a layer cannot be replaced; None if it can."""
    if isinstance(layer, QuantLinear):
        return f"already quantised ({layer.format.name})"
    readers = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer)
    for parent in parents:
        if isinstance(parent, readers):
            return f"the {type(parent).__name__} around it reads its weight without calling it"
    if type(layer) is not torch.nn.Linear:
        return f"a {type(layer).__name__}, whose forward may be another than nn.Linear's"
    tensors = [*layer._parameters, *layer._buffers, *layer._modules]
    if sorted(tensors) != ["bias", "weight"]:
        return f"expected weight and bias in it, found {', '.join(tensors)}"
    if _has_hooks(layer):
        return "it has hooks, which a new layer would not have"
    if type(layer.weight) is not Parameter:
        return f"its weight is a {type(layer.weight).__name__}"
    if layer.weight.dtype not in _FLOATS:
        return f"its weight is {layer.weight.dtype}"
    if layer.in_features % fmt.block_elems:
        return f"in_features: {_misfit(layer.in_features, fmt)}"
    return None


def _has_hooks(layer: torch.nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    backward = (layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or any(backward) or "forward" in layer.__dict__


def _is_plain_table(layer: torch.nn.Module) -> bool:
    return type(layer) is torch.nn.Embedding and layer.max_norm is None and not _has_hooks(layer)


def _layer_like(
    old: torch.nn.Linear | torch.nn.Embedding, blocks: Parameter, fmt: Format, algo: str
) -> QuantLinear | QuantEmbedding:
    if isinstance(old, torch.nn.Linear):
        linear = QuantLinear.from_blocks(blocks, fmt.type_id, old.bias, algo)
        return linear.train(old.training)
    padding_idx, dtype = old.padding_idx, old.weight.dtype
    return QuantEmbedding.from_blocks(blocks, fmt.type_id, padding_idx, dtype).train(old.training)


def _as_filter(filter: Filter | None) -> Callable[[str, torch.nn.Linear], bool]:
    if filter is None:
        return lambda name, layer: True
    if isinstance(filter, str):
        return lambda name, layer: fnmatchcase(name, filter)
    if isinstance(filter, re.Pattern):
        return lambda name, layer: filter.search(name) is not None
    if callable(filter):
        return filter
    raise TypeError(
        f"filter: expected a glob, a compiled regular expression or a callable, "
        f"got {type(filter).__name__}"
    )


def _total_bytes(module: torch.nn.Module) -> int:
    """Of parameters and buffers, memory that they share counted once."""
    return sum({_memory(t): t.nbytes for t in [*module.parameters(), *module.buffers()]}.values())
