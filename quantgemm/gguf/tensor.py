# SPDX-License-Identifier: MIT
"""A tensor of a file: name, type, shape, and its bytes as they are mapped."""

from __future__ import annotations

from typing import Any

import torch

from quantgemm.formats import Bytes, Format
from quantgemm.gguf.errors import GGUFError
from quantgemm.gguf.mapping import MappedFile
from quantgemm.gguf.rules import tensor_bytes

# Where a block holds numbers of two bytes; all else in it is single bytes. The same types that
# ggml's own byte-order converter knows: for others nobody has said what a big-endian block is.
_HALVES = {
    "Q4_0": (0,),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q6_K": (208,),
    "MXFP4": (),
    "NVFP4": (),
}


def swaps_bytes(fmt: Format) -> bool:
    """Whether data of this type can be read from and written to big-endian files."""
    return fmt.is_plain or fmt.name in _HALVES


def swap_bytes(data: Bytes, fmt: Format) -> Bytes:
    """A copy of whole blocks, uint8 [bytes], from one byte order to the other."""
    swapped: Bytes = data.copy()
    blocks = swapped.reshape(-1, fmt.block_bytes)
    if fmt.is_plain:
        blocks[:] = data.reshape(blocks.shape)[:, ::-1]
    for at in _HALVES.get(fmt.name, ()):
        blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
    return swapped


class GGUFTensor:
    """A tensor in a GGUF or whisper file. It keeps the mapping of the file alive.

    name: as in the file, never a path; format: its `quantgemm.formats.Format`; shape: torch order,
    slowest dimension first; offset: of its data in the file; byte_order: 'little' or 'big'.
    """

    __slots__ = ("_file", "byte_order", "format", "name", "offset", "shape")

    def __init__(
        self,
        name: str,
        fmt: Format,
        shape: tuple[int, ...],
        file: MappedFile,
        offset: int,
        byte_order: str = "little",
    ) -> None:
        self.name, self.format, self.shape = name, fmt, shape
        self._file, self.offset, self.byte_order = file, offset, byte_order

    @property
    def qtype(self) -> int:
        """The ggml type id, as `quantgemm.ops.dequantize` takes it."""
        return self.format.type_id

    @property
    def nbytes(self) -> int:
        """Bytes of the data in the file."""
        return tensor_bytes(self.shape, self.format)

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """[*shape[:-1], row_bytes]; a tensor without dimensions is a row of one number."""
        cols = self.shape[-1] if self.shape else 1
        return (*self.shape[:-1], self.format.row_bytes(cols))

    @property
    def blocks(self) -> torch.Tensor:
        """The data as uint8 [*shape[:-1], row_bytes] on the CPU, without a copy.

        Writing to it changes this process's memory, not the file. From a big-endian file it is a
        copy in little-endian order, the only one the decoders know.
        """
        if 0 in self.shape:
            return torch.empty(self.blocks_shape, dtype=torch.uint8)
        data = self._file.array[self.offset : self.offset + self.nbytes]
        if self.byte_order == "big":
            if not swaps_bytes(self.format):
                raise GGUFError(
                    f"the layout of {self.format.name} blocks in big-endian files is not defined",
                    path=self._file.path,
                    offset=self.offset,
                    tensor=self.name,
                    suggestion="use a little-endian file of the same model",
                )
            data = swap_bytes(data, self.format)
        return torch.from_numpy(data).view(self.blocks_shape)

    def dequantize(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The numbers, `dtype` [*shape], decoded on `device`."""
        from quantgemm import ops

        if 0 in self.shape:
            return torch.empty(self.shape, dtype=dtype, device=device)
        values = ops.dequantize(self.blocks.to(device), self.qtype, dtype)
        return values.reshape(self.shape)

    def release(self) -> None:
        """Let the system take back the memory into which this tensor's part of the file was read.

        It is read again when it is next used. Only for files that nobody has written to: a write to
        `blocks` would be lost with the memory.
        """
        self._file.release(self.offset, self.nbytes)

    def __repr__(self) -> str:
        what = f"{self.format.name} {list(self.shape)}, {self.nbytes} bytes"
        return f"<GGUFTensor {self.name!r} {what}>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"{self!r} is a view of a mapped file: pickle its blocks instead")
