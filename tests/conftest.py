# SPDX-License-Identifier: MIT
"""What all tests share: where vectors made by other programs lie, and when GPU tests can run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import quantgemm
from quantgemm import cli
from quantgemm.formats import FORMATS, Format

# Vectors and files written by ggml's own tools; they are not part of the package.
SHARED = Path(__file__).resolve().parents[2] / "shared"

HAS_GPU = torch.cuda.is_available() and quantgemm.build_info().cuda is not None
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
BLOCK_FORMATS = [f for f in FORMATS.values() if not f.is_plain]
ALL_FORMATS = list(FORMATS.values())
Cli = Callable[..., tuple[int, str, str]]  # the fixture `run`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA device (make gpu-test runs these)")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


def random_blocks(fmt: Format, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, row_bytes] of any bits at all: infinite and NaN scales included."""
    rng = np.random.default_rng([seed, fmt.type_id, rows, cols])
    return rng.integers(0, 256, (rows, fmt.row_bytes(cols)), dtype=np.uint8)


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal values, NaN where NaN is expected and nowhere else."""
    assert got.shape == want.shape, f"{tuple(got.shape)} instead of {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{got.dtype} instead of {want.dtype}"
    got, want = got.cpu(), want.cpu()
    same = (got == want) | (got.isnan() & want.isnan())
    bad = (~same).nonzero()
    assert same.all(), f"{len(bad)} values differ, first at {bad[0].tolist()}"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line in this process: exit status, standard output, standard error."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return status, out, err

    return call
