# SPDX-License-Identifier: MIT
"""The pages of the native key-value cache in plain PyTorch: 64 tokens of one head.

Where everything lies is said by csrc/kv_page.h (dense) and csrc/kv_sparse_page.h (bitmap, 4of8);
it is where a warp of 32 lanes wants it for tensor cores, so positions look shuffled.
"""

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


def pages_together(key_format: str) -> int:
    """So many pages leave the ring at a time: dense keys' share scales and shifts in twos."""
    return 2 if FORMATS[key_format].kind == "dense" else 1


def codes_bytes(form: str, head_dim: int, keep: int) -> int:
    """Of a page without its scales. keep: elements of a token, for bitmaps."""
    kind, bits = FORMATS[form]
    if kind == "dense":
        return PAGE * head_dim * bits // 8
    if kind == "bitmap":
        return PAGE * head_dim // 8 + PAGE * keep * bits // 8
    return PAGE * head_dim // 8 * (8 + 4 * bits) // 8


def page_bytes(form: str, head_dim: int, keep: int, value: bool) -> int:
    """Codes, and a half for each channel of keys, each token of values; dense values have two."""
    halves = 2 * PAGE if form.startswith("dense") else PAGE
    return codes_bytes(form, head_dim, keep) + 2 * (halves if value else head_dim)


def unpack_pages(pages: Tensor, form: str, head_dim: int, keep: int, value: bool) -> Tensor:
    """uint8 ``[..., page bytes]`` to float32 ``[..., 64 tokens, head_dim]``.

    Dense keys: ``[..., pages, heads, page bytes]``, of neighbouring pages the even one first.
    """
    kind, bits = FORMATS[form]
    if kind == "dense":
        return _unpack_dense(pages, bits, head_dim, value)
    end = codes_bytes(form, head_dim, keep)
    fits = pages[..., end:].contiguous().view(torch.float16).float()
    if kind == "bitmap":
        levels = _bitmap_levels(pages[..., :end], bits, head_dim, value)
    else:
        levels = _four_of_eight_levels(pages[..., :end], bits, head_dim, value)
    if value:  # one scale per token
        token = torch.arange(PAGE, device=pages.device)
        at = ((token // 32 * 4 + token % 8 // 2) * 4 + token // 8 % 4) * 2 + token % 2
        scales = fits[..., at, None]
    else:  # one per channel
        channel = torch.arange(head_dim, device=pages.device)
        lane, y, even = _key_places(channel // 8, channel % 8, head_dim)
        at = ((y // 4 * 4 + lane) * 4 + y % 2 * 2 + y // 2 % 2) * 2 + even
        scales = fits[..., None, at]
    # What is not kept is zero also where the scale is not a number.
    return torch.where(levels == 0, 0.0, levels * scales)


def _key_places(group: Tensor, i: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of element i of 8 channels: lane of a quad, y = i + 8j, even."""
    j = group // 4
    return group % 4, i + 8 * (j % (head_dim // 64)), j // (head_dim // 64)


def _places(head_dim: int, value: bool, device: torch.device) -> dict[str, Tensor]:
    """Of each element ``[64, head_dim]``: its lane, its numbers x, y = i + 8j and even there."""
    token = torch.arange(PAGE, device=device)[:, None].expand(PAGE, head_dim)
    channel = torch.arange(head_dim, device=device)[None].expand(PAGE, head_dim)
    group, i, x = channel // 8, channel % 8, token // 8
    if value:
        lane, y, even = group % 8 * 4 + token % 8 // 2, i + 8 * (group // 8), token % 2
    else:
        lane, y, even = _key_places(group, i, head_dim)
        lane = lane + token % 8 * 4
    return {"lane": lane, "x": x, "y": y, "even": even}


def _word(lane: Tensor, word: Tensor) -> Tensor:
    return (word // 4 * 32 + lane) * 4 + word % 4


def _bitmap_levels(pages: Tensor, bits: int, head_dim: int, value: bool) -> Tensor:
    """Levels ``[..., 64, head_dim]``, 0 where nothing is kept."""
    at = _places(head_dim, value, pages.device)
    lane, x, y, even = at["lane"], at["x"], at["y"], at["even"]
    if value:
        bit = y // 2 * 32 + (x // 4 * 2 + x % 2) * 8 + y % 2 * 4 + x // 2 % 2 * 2 + even
    else:
        bit = y // 2 * 32 + x * 4 + y % 2 * 2 + even
    place = (bit // 64 * 32 + lane) * 64 + bit % 64
    end = PAGE * head_dim // 8
    is_set = pages[..., place // 8].long() >> place % 8 & 1  # [..., 64, head_dim]
    # The codes of all that is set follow each other in the same order.
    order = place.flatten().argsort()
    in_order = is_set.flatten(-2)[..., order]
    rank = torch.empty_like(in_order)
    rank[..., order] = in_order.cumsum(-1) - in_order
    first = rank * bits
    last = pages.shape[-1] - end - 1
    codes = pages[..., end:].long().gather(-1, (first // 8).clamp(max=last))
    codes = codes >> first % 8 & (2**bits - 1)
    return _levels(codes.view(is_set.shape), bits) * is_set


def _four_of_eight_levels(pages: Tensor, bits: int, head_dim: int, value: bool) -> Tensor:
    """Levels ``[..., 64, head_dim]`` from bit planes, 0 where nothing is kept."""
    planes = 8 + 4 * bits
    at = _places(head_dim, value, pages.device)
    lane, x, y, even = (at[n].view(PAGE, head_dim // 8, 8) for n in ("lane", "x", "y", "even"))
    j, i = y // 8, y % 8
    bit = 16 * even + (x % 4 + 4 * (j % 2) + 8 * (x // 4) if value else x + 8 * (j % 2))
    words = pages.contiguous().view(torch.int32)

    def plane(number: Tensor) -> Tensor:
        word, own = j // 2 * planes + number, bit
        if head_dim == 64:  # half of the words: the second half of the planes between the bits
            second = (2 * number >= planes).long()
            word, own = number - second * (planes // 2), bit + second * (4 if value else 8)
        return words[..., _word(lane, word)].long() >> own & 1

    is_set = plane(i)  # [..., 64, head_dim/8, 8]
    before = is_set.cumsum(-1)
    rank = torch.where(i < 4, before - is_set, 3 + before - before[..., -1:])
    of_ranks = []
    for r in range(4):  # a code is the same for all of a group, so the first element's will do
        parts = [plane(torch.full_like(i, 8 + r * bits + b)) << b for b in range(bits)]
        of_ranks.append(torch.stack(parts).sum(0)[..., 0])
    codes = torch.stack(of_ranks, -1).gather(-1, rank.clamp(0, 3))
    return (_levels(codes, bits) * is_set).flatten(-2)


def _levels(codes: Tensor, bits: int) -> Tensor:
    if bits == 4:
        return (codes ^ 8) - 8
    return (1 - (codes & 2)) * ((codes & 1) + 1)


def _unpack_dense(pages: Tensor, bits: int, head_dim: int, value: bool) -> Tensor:
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
    if value:
        scale, shift = fits[..., place], fits[..., num_k + place]
    else:  # of two pages the first has the scales, the second the shifts
        scale, shift = (fits[..., odd::2, :, place].repeat_interleave(2, -3) for odd in (0, 1))
    x: Tensor = (codes / 2**bits + shift[..., None, :]) * scale[..., None, :]
    return x.transpose(-1, -2) if value else x
