# SPDX-License-Identifier: MIT
"""A bounded run of tests/fuzz_gguf.py, hypothesis on the same promises, and proof they bite."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_gguf
import pytest
import torch
from fuzz_gguf import Failure, check, gguf_seeds, whisper_seeds
from gguf_builder import Builder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantgemm import open_gguf, open_whisper_bin

SETTINGS = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("seed", [11, 12])
def test_mutated_and_hostile_files(tmp_path: Path, seed: int) -> None:
    counts = fuzz_gguf.fuzz(seconds=60, seed=seed, keep=tmp_path, limit=10_000)
    assert not list(tmp_path.iterdir()), "failing inputs were kept"
    assert counts.total() >= 1000  # also on a machine where 10,000 take more than a minute
    for kind in ("mutated", "hostile", "whisper", "part"):
        assert counts[f"{kind} opened"] > 10
        assert counts[f"{kind} refused"] > 10


@st.composite
def edited(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed of which one stretch is replaced; shrinks to the smallest change that fails."""
    data = draw(st.sampled_from(seeds))
    at = draw(st.integers(0, len(data)))
    gone = draw(st.integers(0, 16))
    return data[:at] + draw(st.binary(max_size=16)) + data[at + gone :]


@SETTINGS
@given(data=edited([seed for seed in gguf_seeds() if len(seed) < 5000]))
def test_edited_gguf(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "edited.gguf"
    path.write_bytes(data)
    check(path, len(data), open_gguf, round_trip=True)


@SETTINGS
@given(data=edited([seed for seed in whisper_seeds() if len(seed) < 5000]))
def test_edited_whisper(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "edited.bin"
    path.write_bytes(data)
    check(path, len(data), open_whisper_bin, round_trip=False)


@SETTINGS
@given(data=st.binary(max_size=300), endian=st.sampled_from("<>"), version=st.integers(1, 3))
def test_random_bytes_behind_a_version(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, endian: str, version: int
) -> None:
    data = Builder(version, endian).build()[:8] + data
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(data)
    check(path, len(data), open_gguf, round_trip=True)


# ------------------------------------------------------------------------------ the check itself


def takes_memory(path: Path) -> Any:
    bytearray(70_000_000)
    return open_gguf(path)


def takes_memory_elsewhere(path: Path) -> Any:
    """Outside what Python traces."""
    torch.ones(200_000_000, dtype=torch.uint8)
    return open_gguf(path)


def takes_time(path: Path) -> Any:
    end = time.process_time() + 1.1
    while time.process_time() < end:
        pass
    return open_gguf(path)


def raises_something_else(path: Path) -> Any:
    raise OverflowError("some other error")


def has_a_wrong_tensor(path: Path) -> Any:
    file = open_gguf(path)
    file.tensors["w"].shape = (5,)
    return file


def has_a_tensor_past_the_end(path: Path) -> Any:
    file = open_gguf(path)
    file.tensors["w"].offset += 32
    return file


@pytest.mark.parametrize(
    ("opener", "error", "text"),
    [
        (takes_memory, Failure, "bytes of memory"),
        (takes_memory_elsewhere, Failure, "bytes of memory"),
        (takes_time, Failure, "took 1"),
        (raises_something_else, OverflowError, "some other error"),
        (has_a_wrong_tensor, Failure, "does not fit"),
        (has_a_tensor_past_the_end, Failure, "does not fit"),
    ],
)
def test_broken_promises_are_seen(
    tmp_path: Path, opener: Callable[[Path], Any], error: type[Exception], text: str
) -> None:
    if opener is takes_memory_elsewhere and not fuzz_gguf.reset_peak_memory():
        pytest.skip("this system cannot reset the peak of memory in use")
    path = tmp_path / "good.gguf"
    data = Builder().tensor("w", (4,), 0, bytes(16)).build()
    path.write_bytes(data)
    assert check(path, len(data), open_gguf, round_trip=True) == "opened"
    with pytest.raises(error, match=text):
        check(path, len(data), opener, round_trip=True)
