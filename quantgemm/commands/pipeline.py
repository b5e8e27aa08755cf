# SPDX-License-Identifier: MIT
"""Blocks -> device -> numbers, in pieces, through buffers that exist before the clock starts.

A piece is at most PIECE_BYTES of blocks and PIECE_WEIGHTS weights, so that a tensor of any size
goes through the same buffers: `staging` (pinned, blocks), `blocks` (the same on the device), and
`landing` (pinned, float32), one for the first run and one for those that are compared with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import torch

from quantgemm import ops
from quantgemm.formats import FORMATS, Format

PIECE_WEIGHTS = 1 << 24
PIECE_BYTES = 1 << 26  # so PIECE_WEIGHTS of float32, or half as many of float64

STAGES = ("upload", "dequantize", "download")

Decoded = tuple[torch.Tensor, list[float]]  # float32 [n] on the CPU; seconds of each of STAGES


def pieces(blocks: torch.Tensor, fmt: Format) -> Iterator[torch.Tensor]:
    """The bytes of whole blocks, uint8 [at most PIECE_BYTES], in order."""
    count = min(PIECE_WEIGHTS // fmt.block_elems, PIECE_BYTES // fmt.block_bytes)
    flat, step = blocks.reshape(-1), count * fmt.block_bytes
    return (flat[start : start + step] for start in range(0, len(flat), step))


class CpuPipeline:
    """Without a GPU nothing moves: blocks are decoded where the file is mapped."""

    def run(self, blocks: torch.Tensor, fmt: Format, again: bool) -> Decoded:
        start = time.perf_counter()
        weights = ops.dequantize(blocks, fmt.type_id)
        return weights, [0.0, time.perf_counter() - start, 0.0]


class GpuPipeline:
    """Making one is the start-up: context, buffers, and one launch of every decoder."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._staging = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._landing = [
                torch.empty(PIECE_WEIGHTS, dtype=torch.float32, pin_memory=True) for _ in range(2)
            ]
        self._blocks = torch.zeros(PIECE_BYTES, dtype=torch.uint8, device=device)
        for fmt in FORMATS.values():  # a kernel is loaded when it is first launched
            ops.dequantize(self._blocks[: fmt.block_bytes], fmt.type_id)
        # A full-size round: torch's allocator keeps the output's memory for the next time.
        largest = torch.zeros(min(PIECE_BYTES, 4 * PIECE_WEIGHTS), dtype=torch.uint8)
        for again in (False, True):
            self.run(largest, FORMATS[0], again)

    def run(self, blocks: torch.Tensor, fmt: Format, again: bool) -> Decoded:
        """blocks: one of `pieces`. The result stays valid until the next call with that `again`."""
        times = [time.perf_counter()]
        staging, on_device = self._staging[: len(blocks)], self._blocks[: len(blocks)]
        staging.copy_(blocks)  # out of the page cache, by all of torch's threads
        on_device.copy_(staging, non_blocking=True)
        self._lap(times)
        weights = ops.dequantize(on_device, fmt.type_id)
        self._lap(times)
        landing = self._landing[again][: len(weights)]
        landing.copy_(weights, non_blocking=True)
        self._lap(times)
        return landing, [end - start for start, end in pairwise(times)]

    def _lap(self, times: list[float]) -> None:
        """The time when all that was asked of the device is done."""
        torch.cuda.synchronize(self._device)
        times.append(time.perf_counter())


Pipeline = CpuPipeline | GpuPipeline


def make_pipeline(device: torch.device) -> Pipeline:
    return GpuPipeline(device) if device.type == "cuda" else CpuPipeline()
