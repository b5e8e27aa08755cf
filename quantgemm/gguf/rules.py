# SPDX-License-Identifier: MIT
"""What reader and writer both insist on. Each function returns what is wrong, or None."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantgemm.formats import FORMATS, REMOVED_TYPE_IDS, Format

MAX_KEYS = 65536  # metadata keys of a file
MAX_TENSORS = 65536  # tensors of a file; with MAX_KEYS, bounds the memory that opening takes
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # of a tensor: ggml keeps names in 64 bytes with a final NUL
MAX_DIMS = 4
MAX_DEPTH = 8  # arrays, each in the one before
MAX_WEIGHTS = 2**59  # of a tensor: at 8 bytes each, strides and sizes in bytes fit torch's int64
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 20


def key_problem(key: str) -> str | None:
    if not key:
        return "the key is empty"
    if len(key) > MAX_KEY_BYTES:
        return f"the key has {len(key)} bytes, expected at most {MAX_KEY_BYTES}"
    if not (key.isascii() and key.isprintable()):
        return "the key must consist of printable ASCII characters"
    return None


def name_problem(name: str, limit: int = MAX_NAME_BYTES) -> str | None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "the tensor's name is not valid UTF-8"
    if size > limit:
        return f"the tensor's name has {size} bytes, expected at most {limit}"
    if "\0" in name:
        return "the tensor's name contains a NUL character"
    return None


def alignment_problem(value: int) -> str | None:
    if MIN_ALIGNMENT <= value <= MAX_ALIGNMENT and value & (value - 1) == 0:
        return None
    return f"expected a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}, got {value}"


def type_problem(type_id: int) -> str | None:
    if type_id in REMOVED_TYPE_IDS:
        return f"tensor type {type_id} was removed from GGUF"
    if type_id not in FORMATS:
        known = ", ".join(f"{i} {fmt.name}" for i, fmt in FORMATS.items())
        return f"unknown tensor type {type_id}, expected one of {known}"
    return None


def shape_problem(shape: Sequence[int], fmt: Format) -> str | None:
    """shape: torch order, the row (fastest dimension) last."""
    if len(shape) > MAX_DIMS:
        return f"{len(shape)} dimensions, expected at most {MAX_DIMS}"
    if any(dim < 0 for dim in shape):
        return f"negative dimension in shape {tuple(shape)}"
    cols = shape[-1] if shape else 1
    if cols % fmt.block_elems:
        return f"row of {cols} weights, expected a multiple of {fmt.block_elems} for {fmt.name}"
    # An empty dimension counts as 1, because torch's strides do not shrink with it either.
    if math.prod(max(dim, 1) for dim in shape) > MAX_WEIGHTS:
        return f"shape {tuple(shape)} is too large to be addressed"
    return None


def tensor_bytes(shape: Sequence[int], fmt: Format) -> int:
    """Bytes of a tensor whose shape has no `shape_problem`."""
    return math.prod(shape) // fmt.block_elems * fmt.block_bytes
