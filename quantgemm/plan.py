# SPDX-License-Identifier: MIT
"""Which algorithm a product would run with, and why: the choice of csrc/gemm_select.h in words.

print(quantgemm.explain_gemm(m=1, n=4096, k=4096, qtype="Q4_K", device="sm_90"))
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from quantgemm import _C
from quantgemm.build import build_info
from quantgemm.formats import Format, format_by_id, format_by_name

__all__ = ["GemmPlan", "explain_gemm"]

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class GemmPlan:
    """How ``y[m, n] = x[m, k] · dequantize(w)[n, k]ᵀ`` is computed.

    algo: the rung of the ladder; reason: why this one; available: all that could serve;
    obstacles: ``{algo: why not}`` of the others; rounds_activations: whether x becomes int8 with a
    scale per 32 values, or per 256 with ``int8``, which rounds weights so too; device: ``"cpu"`` or
    ``"sm_90"``; folds_norm: whether norm_weight of `ops.gemm_packed` is no launch of its own.
    """

    m: int
    n: int
    k: int
    qtype: str
    dtype: torch.dtype
    device: str
    algo: str
    reason: str
    available: tuple[str, ...]
    obstacles: dict[str, str]
    rounds_activations: bool
    folds_norm: bool = False

    def __str__(self) -> str:
        rounding = "rounded to int8 per 32" if self.rounds_activations else "kept as they are"
        if self.algo == "int8":
            rounding = "rounded to int8 per 256, as are weights"
        lines = [
            f"{self.qtype} product, m={self.m} n={self.n} k={self.k}, {self.dtype}, {self.device}",
            f"  {self.algo}: {self.reason}",
            f"  activations are {rounding}",
            f"  could serve: {', '.join(self.available)}",
        ]
        if self.folds_norm:
            lines.insert(3, "  norm_weight takes no launch of its own")
        lines += [f"  not {algo}: {why}" for algo, why in self.obstacles.items()]
        return "\n".join(lines)


def explain_gemm(
    m: int,
    n: int,
    k: int,
    qtype: int | str,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    algo: str = "auto",
    packed: bool = False,
) -> GemmPlan:
    """What `ops.gemm` would do with x ``[m, k]`` of `dtype` and n rows of `qtype`.

    qtype: a ggml id or name; device: as torch spells it, or an architecture such as ``"sm_90"``
    whether or not this machine has one; None is the current GPU where the package can use one,
    else the CPU. An algorithm that cannot serve is an error, as it is in `ops.gemm`. packed: what
    `ops.gemm_packed` would do with the rows packed, where algo must be ``"auto"``, or, to allow
    int8 products, ``"auto_int8"`` or ``"int8"``.
    """
    for name, size in {"m": m, "n": n, "k": k}.items():
        if size < 0:
            raise ValueError(f"{name}: expected a size of 0 or more, got {size}")
    if dtype not in _DTYPES:
        raise TypeError(
            f"dtype: expected torch.float32, torch.float16 or torch.bfloat16, got {dtype}"
        )
    in_int8 = packed and algo in ("auto_int8", "int8")
    if not in_int8:
        check_algo(algo)
    fmt = as_format(qtype)
    try:
        fmt.row_bytes(k)
    except ValueError as error:
        raise ValueError(f"k: {error}") from None
    arch = _architecture(device)
    if packed:
        check_packed(fmt, "auto" if in_int8 else algo)
        choice = _C.select_packed_gemm(m, n, k, _DTYPES[dtype], arch, algo == "auto_int8")
    else:
        may_round = algo == "auto_q8"
        choice = _C.select_gemm(m, n, k, fmt.type_id, _DTYPES[dtype], arch, may_round)
    available = tuple(name for name, why in choice["obstacles"].items() if why is None)
    obstacles = {name: why for name, why in choice["obstacles"].items() if why is not None}
    chosen, reason = choice["algo"], choice["reason"]
    wanted = "int8" if in_int8 else algo
    if wanted in obstacles:
        raise NotImplementedError(
            f"algo: {algo} cannot serve this product: {obstacles[wanted]}; "
            f"these can: {', '.join(available)}"
        )
    if algo == "auto_int8" and chosen != "int8":
        reason += "; int8 products would not be faster"
    if algo not in ("auto", "auto_q8", "auto_int8"):
        chosen, reason = algo, "asked for by name"
    return GemmPlan(
        m=m,
        n=n,
        k=k,
        qtype=fmt.name,
        dtype=dtype,
        device=f"sm_{arch}" if arch else "cpu",
        algo=chosen,
        reason=reason,
        available=available,
        obstacles=obstacles,
        rounds_activations=chosen in choice["rounding"],
        folds_norm=chosen == choice["algo"] and bool(choice.get("folds_norm")),
    )


def as_format(qtype: int | str) -> Format:
    """The format of a ggml id or name."""
    return format_by_name(qtype) if isinstance(qtype, str) else format_by_id(int(qtype))


def can_pack(fmt: Format) -> bool:
    """Whether rows of this format have a packed form."""
    return any(row["can_pack"] for row in _C.format_table() if row["type_id"] == fmt.type_id)


def check_packed(fmt: Format, algo: str = "auto") -> None:
    """That `ops.gemm_packed` can stand in for `ops.gemm` with this algorithm."""
    if not can_pack(fmt):
        known = ", ".join(row["name"] for row in _C.format_table() if row["can_pack"])
        raise NotImplementedError(f"packed: {fmt.name} has no packed form; these have: {known}")
    if algo != "auto":
        raise NotImplementedError(f"algo: expected 'auto' for packed weights, got {algo!r}")


def check_algo(algo: str) -> str:
    """The same name, if `ops.gemm` knows it."""
    known = ["auto", "auto_q8", *_C.select_gemm(1, 1, 32, 0, "float32", 0, False)["obstacles"]]
    if algo not in known:
        raise ValueError(f"algo: expected one of {', '.join(known)}, got {algo!r}")
    return algo


def _architecture(device: torch.device | str | None) -> int:
    """10 x compute capability, 0 for the CPU."""
    if device is None:
        usable = build_info().cuda is not None and torch.cuda.is_available()
        device = "cuda" if usable else "cpu"
    if isinstance(device, str) and (match := re.fullmatch(r"sm_(\d+)[af]?", device)):
        return int(match[1])
    place = torch.device(device)
    if place.type == "cpu":
        return 0
    if place.type != "cuda":
        raise ValueError(f"device: expected cpu, cuda or an architecture as 'sm_90', got {device}")
    if not torch.cuda.is_available():
        raise ValueError(
            f"device: expected a GPU of this machine, got {device} where torch finds none; "
            "an architecture such as 'sm_90' needs none"
        )
    major, minor = torch.cuda.get_device_capability(place)
    return 10 * major + minor
