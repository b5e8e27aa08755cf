# SPDX-License-Identifier: MIT
"""The pages of the native key-value cache in plain PyTorch: csrc/kv_page.h says what lies where."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor

PAGE = 64  # tokens


class PageFormat(NamedTuple):
    kind: str  # dense, bitmap or 4of8
    bits: int


FORMATS = {
    "dense2": PageFormat("dense", 2),
    "dense4": PageFormat("dense", 4),
    "bitmap2": PageFormat("bitmap", 2),
    "bitmap4": PageFormat("bitmap", 4),
    "4of8_2": PageFormat("4of8", 2),
    "4of8_4": PageFormat("4of8", 4),
}


def unpack_pages(pages: Tensor, head_dim: int, bits: int, value: bool) -> Tensor:
    """uint8 ``[..., page bytes]`` to float32 ``[..., 64 tokens, head_dim]``: csrc/kv_page.h."""
    rows, num_k = (head_dim, PAGE) if value else (PAGE, head_dim)
    row = torch.arange(rows, device=pages.device)[:, None]
    k = torch.arange(num_k, device=pages.device)[None]
    per_half = 16 // bits
    pair = (row // 64 * (num_k // 16) + k // 16) * 2 + k // 8 % 2
    own = pair * (8 // per_half) + row // 8 % 8 // per_half
    word = (own // 4 * 32 + row % 8 * 4 + k % 8 // 2) * 4 + own % 4
    at = row // 8 % per_half * bits + 16 * (k % 2)
    end = rows * num_k * bits // 8
    words = pages[..., :end].contiguous().view(torch.int32)[..., word]
    codes = words.long() >> at & (2**bits - 1)
    fits = pages[..., end:].contiguous().view(torch.float16).float()
    place = (((k // 32 * 4 + k % 8 // 2) * 4 + k // 8 % 4) * 2 + k % 2)[0]
    scale, shift = fits[..., place], fits[..., num_k + place]
    x: Tensor = (codes / 2**bits + shift[..., None, :]) * scale[..., None, :]
    return x.transpose(-1, -2) if value else x
