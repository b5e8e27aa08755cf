# SPDX-License-Identifier: MIT
"""Our kernels in the seat that transformers (5.23 and newer) has for those of GGUF files.

    from quantgemm.integrations import transformers as gguf_in_transformers

    gguf_in_transformers.enable()
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf")

Its own loader then leaves quantised weights packed, on CUDA and on the CPU, and every product,
look-up and mixture of experts runs on the blocks. Without a kernel it dequantises the whole model.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from quantgemm import ops
from quantgemm.experts import multiply_each
from quantgemm.formats import FORMATS
from quantgemm.integrations.common import Patch, linear, module_of, serves
from quantgemm.plan import check_algo

__all__ = ["disable", "enable", "is_enabled"]

_ADVICE = "quantgemm.load_model reads the file without it"
_WANTED = {
    "kernels": {
        "GgufKernel": ("supports",),
        "get_gguf_kernel": (),
        "kernel_can_read": (),
        "_dequantize_chunk": (),
    },
    "utils": {"GgufLinear": ("forward", "_unpack_matmul"), "mul_mat_vec": (), "mul_mat_id": ()},
}

_patch = Patch()


def enable(algo: str = "auto") -> None:
    """Makes transformers' GGUF loader use quantgemm, in this process, until `disable`.

    algo: what `ops.gemm` is asked for: ``auto`` never rounds activations, ``auto_q8`` may, as
    llama.cpp does. Models that were loaded before keep what they have.
    """
    check_algo(algo)
    root = "transformers.integrations.gguf"
    kernels = module_of("transformers", f"{root}.kernels", _WANTED["kernels"], _ADVICE)
    utils = module_of("transformers", f"{root}.utils", _WANTED["utils"], _ADVICE)
    disable()

    def mul_mat_vec(
        weight: torch.Tensor, x: torch.Tensor, ggml_type: int, out_features: int
    ) -> torch.Tensor:
        """weight uint8 ``[out_features, row_bytes]``, x ``[rows, k]``: ``[rows, out_features]``."""
        return ops.gemm(x, weight, ggml_type, algo)

    def dequantize(
        weight: torch.Tensor, ggml_type: int, rows: int, cols: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return ops.dequantize(weight.reshape(rows, -1), ggml_type, dtype)

    def get_rows(
        weight: torch.Tensor, ids: torch.Tensor, ggml_type: int, cols: int, dtype: torch.dtype
    ) -> torch.Tensor:
        return ops.embedding(ids, weight, ggml_type, dtype)

    def mul_mat_id(
        blocks: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, ggml_type: int, out_features: int
    ) -> torch.Tensor:
        return multiply_by_experts(x, blocks, ids, ggml_type, algo)

    def many_rows(self: Any, flat: torch.Tensor) -> torch.Tensor:
        return linear(flat, self.weight, self.ggml_type, algo=algo)

    seat = SimpleNamespace(
        mul_mat_vec=mul_mat_vec,
        dequantize=dequantize,
        get_rows=get_rows,
        mul_mat_id=mul_mat_id,
        GEMV_TYPES=frozenset(qtype for qtype in FORMATS if serves(qtype)),
    )
    _patch.set(kernels, "_gguf_kernel", kernels.GgufKernel(seat))
    _patch.set(kernels, "kernel_can_read", lambda tensor: tensor.device.type in ("cpu", "cuda"))
    _patch.set(utils.GgufLinear, "_unpack_matmul", many_rows)


def disable() -> None:
    """Gives transformers back what `enable` replaced."""
    _patch.undo()


def is_enabled() -> bool:
    return bool(_patch)


def multiply_by_experts(
    x: torch.Tensor, blocks: torch.Tensor, ids: torch.Tensor, qtype: int, algo: str = "auto"
) -> torch.Tensor:
    """`multiply_each` with blocks, uint8 ``[experts, n, row_bytes]``."""
    return multiply_each(x, blocks, ids, lambda rows, w: linear(rows, w, qtype, algo=algo))
