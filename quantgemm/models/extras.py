# SPDX-License-Identifier: MIT
"""transformers, which is an extra: imported when first needed, with a clear error without it."""

from __future__ import annotations

import importlib
from types import ModuleType

OLDEST = (5, 17)


def import_transformers() -> ModuleType:
    """The module; an ImportError that says what to type where it is missing or too old."""
    how = "python -m pip install 'quantgemm[hf]'"
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"whole models need the transformers package ({error}): {how}") from error
    found = transformers.__version__
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"expected transformers {oldest} or newer, got {found}: {how} --upgrade")
    return transformers
