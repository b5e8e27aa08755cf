# SPDX-License-Identifier: MIT
"""Keys and values of attention, pruned and quantised: the container of csrc/kv.h.

    from quantgemm import kv

    keys = kv.compress_keys(k, sparsity=0.7, bits=2)  # k [batch x heads, tokens, head_dim]
    logits = kv.sparse_key_spmm(query, *keys, num_tokens=k.shape[1], groups=4, bits=2)

`convert_*` and `mustafar_*` are the same under the names and arguments of the Mustafar kernels.
`quantgemm.kv.reference` does all of it in plain PyTorch. docs/sparse-kv.md explains the format.
"""

from __future__ import annotations

from quantgemm.kv.cache import SparseKVCache, sparse_kv_attention
from quantgemm.kv.mustafar import (
    convert_key_batched,
    convert_key_batched_quant,
    convert_value_batched,
    convert_value_batched_quant,
    mustafar_key_formulation,
    mustafar_key_formulation_quant,
    mustafar_value_formulation,
    mustafar_value_formulation_quant,
)
from quantgemm.kv.ops import (
    Container,
    compress_keys,
    compress_values,
    kept_values,
    prune_keys,
    prune_values,
    sparse_key_spmm,
    sparse_kv_compress,
    sparse_value_spmm,
)
from quantgemm.kv.reference import (
    dequantize_tile,
    reconstruct_sparse_matrix,
    sparse_matmul_reference,
)

__all__ = [
    "Container",
    "SparseKVCache",
    "compress_keys",
    "compress_values",
    "convert_key_batched",
    "convert_key_batched_quant",
    "convert_value_batched",
    "convert_value_batched_quant",
    "dequantize_tile",
    "kept_values",
    "mustafar_key_formulation",
    "mustafar_key_formulation_quant",
    "mustafar_value_formulation",
    "mustafar_value_formulation_quant",
    "prune_keys",
    "prune_values",
    "reconstruct_sparse_matrix",
    "sparse_key_spmm",
    "sparse_kv_attention",
    "sparse_kv_compress",
    "sparse_matmul_reference",
    "sparse_value_spmm",
]
