# SPDX-License-Identifier: MIT
"""GGUF-quantised weights in PyTorch, decoded exactly and multiplied fast.

    import quantgemm

    file = quantgemm.open_gguf("model.gguf")
    weight = file.tensors["blk.0.attn_q.weight"].dequantize(device="cuda")

The compiled ops are `torch.ops.quantgemm.*`; `quantgemm.ops` has them with types and documentation.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from quantgemm import formats, kv, ops, reference, sampling
from quantgemm.build import BuildInfo, build_info
from quantgemm.experts import QuantExpertLinear, QuantExperts
from quantgemm.formats import QType
from quantgemm.gguf import (
    GGUFError,
    GGUFFile,
    GGUFTensor,
    GGUFValue,
    GGUFWriter,
    open_gguf,
    open_whisper_bin,
    save_gguf,
)
from quantgemm.kv.cache import SparseKVCache
from quantgemm.models import load_model, load_tokenizer
from quantgemm.models.whisper import load_whisper, transcribe, whisper_processor
from quantgemm.nn import QuantEmbedding, QuantLinear, ReplaceReport, replace_linear
from quantgemm.plan import GemmPlan, explain_gemm
from quantgemm.read_ahead import ReadAhead

try:
    __version__ = version("quantgemm")
except PackageNotFoundError:  # a source tree that was built in place
    __version__ = "0.1.0"

__all__ = [
    "BuildInfo",
    "GGUFError",
    "GGUFFile",
    "GGUFTensor",
    "GGUFValue",
    "GGUFWriter",
    "GemmPlan",
    "QType",
    "QuantEmbedding",
    "QuantExpertLinear",
    "QuantExperts",
    "QuantLinear",
    "ReadAhead",
    "ReplaceReport",
    "SparseKVCache",
    "__version__",
    "build_info",
    "explain_gemm",
    "formats",
    "kv",
    "load_model",
    "load_tokenizer",
    "load_whisper",
    "open_gguf",
    "open_whisper_bin",
    "ops",
    "reference",
    "replace_linear",
    "sampling",
    "save_gguf",
    "transcribe",
    "whisper_processor",
]
