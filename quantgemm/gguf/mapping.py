# SPDX-License-Identifier: MIT
"""A whole file as bytes in memory, read by the operating system page by page as it is touched."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from quantgemm.gguf.errors import DAMAGED, GGUFError

# Linux promises memory for every page of a private mapping at once, and so refuses files larger
# than memory, unless told not to. Python names the flag from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class MappedFile:
    """A read-only file as `view` (memoryview) and `array` (uint8 [size]) of the same bytes.

    The mapping is private and copy-on-write: a write to a tensor made from it changes that memory,
    never the file. It is unmapped when the last view of it is gone, and never before: nothing here
    closes it, and both views hold an export of the buffer, so that nobody else can.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        mode = os.stat(self.path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.path)
        if not stat.S_ISREG(mode):
            raise GGUFError("not a regular file", path=self.path)
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise GGUFError("the file is empty", path=self.path, offset=0, suggestion=DAMAGED)
            self.view = memoryview(_map(file.fileno()))
        self.size = len(self.view)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self.view, np.uint8)

    def release(self, start: int, nbytes: int) -> None:
        """Drop the whole pages in this range from memory, and what was written to them."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        pages, advice = self.view.obj, getattr(mmap, "MADV_DONTNEED", None)
        if isinstance(pages, mmap.mmap) and advice is not None and first < last:
            pages.madvise(advice, first, last - first)

    def __repr__(self) -> str:
        return f"<{self.path}: {self.size} bytes>"


def _map(fd: int) -> mmap.mmap:
    private: dict[str, Any] = {"access": mmap.ACCESS_COPY}
    if sys.platform == "linux":
        private = {
            "flags": mmap.MAP_PRIVATE | _NORESERVE,
            "prot": mmap.PROT_READ | mmap.PROT_WRITE,
        }
    try:
        return mmap.mmap(fd, 0, **private)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        # A system set never to overcommit: read-only works there, and torch warns that it is so.
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
