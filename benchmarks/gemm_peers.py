# SPDX-License-Identifier: MIT
"""Other ways to multiply by quantised weights, where they are installed: same sizes, own formats.

A peer gives a function that prepares one copy of its weights [n, k] and returns x -> y.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch

Product = Callable[[torch.Tensor], torch.Tensor]
Prepare = Callable[[torch.Tensor], Product]


def cublas(w: torch.Tensor) -> Product:
    """Full-precision weights: what quantised ones are compared with."""
    weight = w.to(torch.bfloat16)
    return lambda x: x @ weight.T


def tinygemm(w: torch.Tensor) -> Product:
    """torch's own int4 kernel: groups of 32, scale and zero in bfloat16."""
    n, k = w.shape
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=w.device)
    packed = torch._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(k // 32, n, 2, device=w.device).to(torch.bfloat16)
    return lambda x: torch._weight_int4pack_mm(x, packed, 32, scales)


def bitsandbytes(w: torch.Tensor) -> Product:
    """NF4, blocks of 64."""
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(
        w.to(torch.bfloat16), blocksize=64, quant_type="nf4"
    )
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)


def gemlite(w: torch.Tensor) -> Product:
    """Triton, int4, groups of 128."""
    from gemlite.core import DType, GemLiteLinearTriton

    n, k = w.shape
    layer = GemLiteLinearTriton(
        4, group_size=128, in_features=k, out_features=n,
        input_dtype=DType.BF16, output_dtype=DType.BF16,
    )  # fmt: skip
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=w.device)
    scales = torch.rand(n * k // 128, 1, device=w.device, dtype=torch.bfloat16)
    layer.pack(codes, scales, torch.full_like(scales, 8.0), None)
    return layer


def torchao(w: torch.Tensor) -> Product:
    """int4 weight-only, groups of 128."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(w.to(torch.bfloat16))
    quantize_(linear, Int4WeightOnlyConfig(group_size=128))
    return linear


def vllm_gguf(type_id: int, blocks: torch.Tensor) -> Product:
    """vLLM's GGUF kernels on the very same blocks."""
    from vllm import _custom_ops

    n = blocks.shape[0]

    def product(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= 8:
            return _custom_ops.ggml_mul_mat_vec_a8(blocks, x, type_id, n)
        return _custom_ops.ggml_mul_mat_a8(blocks, x, type_id, n)

    return product


PEERS: dict[str, tuple[str, Prepare]] = {
    "cuBLAS bf16": ("torch", cublas),
    "torch int4 g32": ("torch", tinygemm),
    "bitsandbytes nf4 g64": ("bitsandbytes", bitsandbytes),
    "gemlite int4 g128": ("gemlite", gemlite),
    "torchao int4 g128": ("torchao", torchao),
}


def installed() -> Iterator[tuple[str, Prepare]]:
    """The peers whose package is here."""
    for name, (package, prepare) in PEERS.items():
        if importlib.util.find_spec(package) is not None:
            yield name, prepare


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None
