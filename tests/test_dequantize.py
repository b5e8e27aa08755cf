# SPDX-License-Identifier: MIT
"""torch.ops.quantgemm.dequantize against the numpy classes, PyPI gguf and ggml's own vectors: equal
bits, no tolerance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ALL_FORMATS, BLOCK_FORMATS, DEVICES, SHARED, assert_same, random_blocks

from quantgemm import ops
from quantgemm.formats import FORMATS, Format, QType

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
by_name = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda f: f.name)
blocks_by_name = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.name)
on_devices = pytest.mark.parametrize("device", DEVICES)


@on_devices
@by_name
def test_random_bytes_decode_to_the_same_bits(fmt: Format, device: str) -> None:
    """Any bytes: infinities, NaN, unused codes. Sizes around a thread block's tile."""
    for rows, num_blocks in ((1, 1), (3, 5), (2, 257), (19, 3)):
        blocks = random_blocks(fmt, rows, num_blocks * fmt.block_elems)
        want = torch.from_numpy(fmt.decode(blocks))
        on_device = torch.from_numpy(blocks).to(device)
        for dtype in DTYPES:
            assert_same(ops.dequantize(on_device, fmt.type_id, dtype), want.to(dtype))


@on_devices
@blocks_by_name
def test_every_byte_value_in_every_position(fmt: Format, device: str) -> None:
    """256 blocks, byte i of block b is b + 37 i: no table index or scale byte is left out."""
    b = np.arange(256)[:, None] + 37 * np.arange(fmt.block_bytes)[None, :]
    blocks = b.astype(np.uint8)
    want = torch.from_numpy(fmt.decode(blocks))
    assert_same(ops.dequantize(torch.from_numpy(blocks).to(device), fmt.type_id), want)


@on_devices
@blocks_by_name
def test_pypi_gguf(fmt: Format, device: str) -> None:
    gguf = pytest.importorskip("gguf")
    blocks = random_blocks(fmt, 8, 12 * fmt.block_elems, seed=1)
    try:
        with np.errstate(all="ignore"):
            want = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(fmt.type_id))
    except (NotImplementedError, ValueError):
        pytest.skip(f"PyPI gguf cannot decode {fmt.name}")
    got = ops.dequantize(torch.from_numpy(blocks).to(device), fmt.type_id)
    assert_same(got, torch.from_numpy(np.ascontiguousarray(want)))


@pytest.mark.skipif(not SHARED.exists(), reason="ggml's vectors are not on this machine")
@on_devices
@blocks_by_name
def test_ggml_vectors(fmt: Format, device: str) -> None:
    with np.load(SHARED / "golden" / f"{fmt.name.lower().replace('_k', '_K')}.npz") as z:
        pairs = [("rand_blocks", "rand_deq"), ("q_chunk", "deq_chunk"), ("q_ref", "deq_ref")]
        found = [(z[a], z[b]) for a, b in pairs if a in z.files and b in z.files]
    assert found
    for blocks, want in found:
        got = ops.dequantize(torch.from_numpy(blocks).to(device), fmt.type_id)
        assert_same(got, torch.from_numpy(want).reshape(got.shape))


@on_devices
def test_leading_dimensions_and_strides(device: str) -> None:
    fmt = FORMATS[QType.Q4_K]
    blocks = torch.from_numpy(random_blocks(fmt, 24, 512)).to(device)
    want = ops.dequantize(blocks, fmt.type_id)
    assert_same(ops.dequantize(blocks.view(2, 3, 4, -1), fmt.type_id), want.view(2, 3, 4, 512))
    assert_same(ops.dequantize(blocks[::2], fmt.type_id), want[::2].contiguous())
    assert_same(ops.dequantize(blocks[3], fmt.type_id), want[3])
    assert ops.dequantize(blocks[:0], fmt.type_id).shape == (0, 512)
    assert ops.dequantize(blocks[:, :0], fmt.type_id).shape == (24, 0)


@on_devices
@by_name
def test_misaligned_storage(fmt: Format, device: str) -> None:
    """A view that starts at an odd address decodes like any other."""
    blocks = torch.from_numpy(random_blocks(fmt, 2, 8 * fmt.block_elems)).to(device)
    storage = torch.zeros(blocks.numel() + 1, dtype=torch.uint8, device=device)
    view = storage[1:].view(blocks.shape)
    view.copy_(blocks)
    assert_same(ops.dequantize(view, fmt.type_id), ops.dequantize(blocks, fmt.type_id))


@on_devices
def test_does_not_touch_its_input(device: str) -> None:
    blocks = torch.from_numpy(random_blocks(FORMATS[QType.Q6_K], 4, 256)).to(device)
    before = blocks.clone()
    ops.dequantize(blocks, QType.Q6_K)
    assert torch.equal(blocks, before)


@pytest.mark.cuda
@pytest.mark.slow
def test_more_than_2_to_the_31_weights() -> None:
    fmt = FORMATS[QType.Q4_0]
    rows = 2**31 // 4096 + 3
    tile = torch.from_numpy(random_blocks(fmt, 1, 4096)).cuda()
    blocks = tile.expand(rows, -1).contiguous()
    out = ops.dequantize(blocks, fmt.type_id, torch.bfloat16)
    want = ops.dequantize(tile, fmt.type_id, torch.bfloat16)
    assert_same(out[-2:], want.expand(2, -1).contiguous())
    assert out.shape == (rows, 4096)


@on_devices
@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((torch.zeros(2, 35, dtype=torch.uint8), 2), ValueError,
         "blocks: row of 35 bytes is not a multiple of the 18-byte Q4_0 block"),
        ((torch.zeros(2, 18), 2), TypeError, "blocks: expected torch.uint8, got torch.float32"),
        ((torch.zeros(2, 18, dtype=torch.uint8), 4), ValueError, "qtype: 4 is not a GGUF type"),
        ((torch.zeros(2, 18, dtype=torch.uint8), -1), ValueError, "qtype: -1 is not a GGUF type"),
        ((torch.zeros((), dtype=torch.uint8), 2), ValueError, "at least one dimension"),
        ((torch.zeros(2, 18, dtype=torch.uint8), 2, torch.int8), TypeError,
         "dtype: expected torch.float32, torch.float16 or torch.bfloat16, got torch.int8"),
    ],
)  # fmt: skip
def test_mistakes_are_named(args: tuple, error: type, text: str, device: str) -> None:
    with pytest.raises(error, match=text.replace(".", r"\.")):
        ops.dequantize(args[0].to(device), *args[1:])


@pytest.mark.cuda
def test_out_of_memory_is_torchs_exception() -> None:
    rows = torch.cuda.mem_get_info()[1] // (4 * 2048) + 1  # more than the whole card as float32
    blocks = torch.zeros(1, 8 * 66, dtype=torch.uint8, device="cuda").expand(rows, -1)
    with pytest.raises(torch.OutOfMemoryError):
        ops.dequantize(blocks.contiguous(), QType.TQ2_0)
