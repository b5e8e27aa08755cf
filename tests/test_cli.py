# SPDX-License-Identifier: MIT
"""The command line: what it prints, what it writes, and one clear line for each failure."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICES, SHARED, Cli
from safetensors.torch import save_file

import quantgemm
from quantgemm import _C, cli, ops
from quantgemm.commands import output, pipeline, quantize
from quantgemm.commands.env import has_kernels
from quantgemm.formats import FORMATS, QType, format_by_name
from quantgemm.gguf import GGUFValue, open_gguf, save_gguf

ROOT = Path(__file__).resolve().parents[1]
on_devices = pytest.mark.parametrize("device", DEVICES)
WRITABLE = [row["name"] for row in _C.format_table() if row["can_quantize"]]
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="files of other tools are not here")


@pytest.fixture
def fails(run: Cli) -> Callable[..., str]:
    """Run a command line that must fail with status 1 and one line; returns the line."""

    def call(*argv: object) -> str:
        status, _, err = run(*argv)
        assert status == 1, err
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert err.startswith(f"quantgemm {argv[0]}: error: ")
        return err.removeprefix(f"quantgemm {argv[0]}: error: ").rstrip("\n")

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small file with plain and quantized tensors, in the order of the dictionary."""
    torch.manual_seed(1)
    path = tmp_path / "model.gguf"
    tensors: dict[str, Any] = {
        "norm": torch.randn(64),
        "half": torch.randn(3, 64).half(),
        "a.q8": (ops.quantize(torch.randn(5, 64), QType.Q8_0), "Q8_0"),
        "b.q4": (ops.quantize(torch.randn(2, 3, 64), QType.Q4_0), "Q4_0"),
        "c.q4": (ops.quantize(torch.randn(4, 64), QType.Q4_0), "Q4_0"),
        "empty": torch.empty(0, 64),
    }
    metadata = {
        "general.architecture": "llama",
        "general.name": "tést \x1b[31m",
        "list": list(range(100)),
        "big": GGUFValue("f32", math.inf),
        "nested": [[1.0, math.nan], [2.0]],
        "chat": "x" * 500,
        "general.file_type": 1,
    }
    save_gguf(path, tensors, metadata)
    return path


def subprocess_run(*argv: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantgemm", *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False, **kwargs
    )


# ------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "command", [[], ["env"], ["ls"], ["verify"], ["quantize"], ["run"], ["bench"]]
)
def test_help(run: Cli, command: list[str]) -> None:
    status, out, err = run(*command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: quantgemm")
    assert max(map(len, out.splitlines())) <= 100


def test_help_states_the_rules(run: Cli) -> None:
    out = run("quantize", "--help")[1]
    for word in ("norm", "bias", "F32", "multiple of the type's block", "Q4_0", "--force"):
        assert word in out


def test_version(run: Cli) -> None:
    assert run("--version") == (0, f"quantgemm {quantgemm.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "required: COMMAND"),
        (["ls"], "required: FILE"),
        (["frob"], "invalid choice: 'frob'"),
        (["verify", "x", "--type", "Q9_9"], "unknown GGUF type 'Q9_9'; known: F32, F16"),
        (["verify", "x", "--type", "Q4_2"], "removed"),
        (["verify", "x", "--device", "tpu"], "expected cpu, cuda or cuda:N, got 'tpu'"),
        (["verify", "x", "--device", "cuda:"], "expected cpu, cuda or cuda:N"),
        (["verify", "x", "--repeats", "0"], "expected a number from 1 to 1000, got '0'"),
        (["verify", "x", "--repeats", "-3"], "--repeats"),
        (["verify", "x", "--all", "--tensor", "t"], "not allowed with"),
        (["quantize", "x", "y"], "required: --type"),
        (["quantize", "x", "y", "--type", "Q8_K"], "expected one of F32, F16, "),
        (["quantize", "x", "y", "--type", "IQ2_XXS"], "got 'IQ2_XXS'"),
    ],
)
def test_wrong_arguments(run: Cli, argv: list[str], text: str) -> None:
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert text in err


def test_module_and_version_in_a_subprocess() -> None:
    done = subprocess_run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"quantgemm {quantgemm.__version__}\n"


def test_failure_in_a_subprocess(tmp_path: Path) -> None:
    done = subprocess_run("verify", tmp_path / "nope.gguf")
    assert done.returncode == 1
    expected = f"quantgemm verify: error: {tmp_path}/nope.gguf: no such file or directory\n"
    assert done.stderr == expected


# ------------------------------------------------------------------------------ env


def test_env(run: Cli) -> None:
    status, out, err = run("env")
    assert (status, err) == (0, "")
    for text in (quantgemm.__version__, torch.__version__, "cpu", "compiler", "Q4_0"):
        assert text in out


def test_env_json(run: Cli) -> None:
    found = json.loads(run("env", "--json")[1])
    assert set(found) == {"versions", "build", "devices", "no_cuda"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["build"]["cuda"] == quantgemm.build_info().cuda
    assert found["build"]["reads"] == [row["name"] for row in _C.format_table()]
    assert found["build"]["writes"] == WRITABLE
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    for device in found["devices"]:
        assert set(device) == {"device", "name", "memory", "free", "capability", "kernels"}


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (("8.0",), (8, 0), True),
        (("8.0",), (8, 9), True),  # same major number, later minor one
        (("8.6",), (8, 0), False),
        (("8.0",), (9, 0), False),
        (("8.9+PTX",), (12, 0), True),
        (("9.0a",), (9, 0), True),
        (("9.0a",), (9, 1), False),
        (("9.0a",), (10, 0), False),
        (("8.0", "9.0a"), (9, 0), True),
        ((), (8, 0), False),
    ],
)
def test_has_kernels(
    architectures: tuple[str, ...], capability: tuple[int, int], expected: bool
) -> None:
    assert has_kernels(architectures, capability) is expected


# ------------------------------------------------------------------------------ ls


def test_ls(run: Cli, model: Path) -> None:
    status, out, err = run("ls", model)
    assert (status, err) == (0, "")
    assert "GGUF version 3, little-endian, aligned to 32 bytes" in out
    assert "7 metadata keys" in out
    assert "6 tensors" in out
    assert re.search(r"b\.q4 +Q4_0 +\[2, 3, 64\] +216 B +4\.5\n", out)
    assert re.search(r"Q4_0 +2 +640 +360 B +4\.5\n", out)
    assert re.search(r"total +6 +", out)
    assert "[0, 1, 2, 3, 4, 5, 6, 7, ...] (100 items)" in out
    assert "x" * 60 in out
    assert "x" * 100 not in out
    assert "x" * 500 in run("ls", "--full", model)[1]


def test_ls_prints_nothing_a_terminal_would_obey(run: Cli, model: Path) -> None:
    out = run("ls", model)[1]
    assert "\x1b" not in out
    assert r"tést \x1b[31m" in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_ls_json(run: Cli, model: Path) -> None:
    status, out, _ = run("ls", "--json", model)
    listing = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert status == 0
    assert {k: listing[k] for k in ("format", "version", "byte_order", "alignment")} == {
        "format": "gguf",
        "version": 3,
        "byte_order": "little",
        "alignment": 32,
    }
    assert listing["files"] == [str(model)]
    assert listing["file_bytes"] == model.stat().st_size
    metadata = listing["metadata"]
    assert metadata["list"] == {"type": "arr[i32]", "count": 100, "value": list(range(8))}
    assert metadata["big"] == {"type": "f32", "value": "inf"}
    assert metadata["nested"]["value"] == [[1.0, "nan"], [2.0]]
    assert metadata["general.name"] == {"type": "str", "value": "tést \x1b[31m"}
    tensor = listing["tensors"][3]
    offset = tensor.pop("offset")
    assert model.read_bytes()[offset : offset + 18] == bytes(
        open_gguf(model).tensors["b.q4"].blocks[0, 0, :18].tolist()
    )
    assert tensor == {
        "name": "b.q4",
        "type": "Q4_0",
        "type_id": 2,
        "shape": [2, 3, 64],
        "weights": 384,
        "bytes": 216,
        "bits_per_weight": 4.5,
    }
    assert list(listing["types"]) == ["F32", "F16", "Q8_0", "Q4_0"]
    q4 = {"tensors": 2, "weights": 640, "bytes": 360, "bits_per_weight": 4.5}
    assert listing["types"]["Q4_0"] == q4
    assert listing["total"]["tensors"] == 6
    assert listing["total"]["bytes"] == sum(t["bytes"] for t in listing["tensors"])
    full = json.loads(run("ls", "--json", "--full", model)[1])
    assert full["metadata"]["list"]["value"] == list(range(100))


def test_ls_of_a_file_without_anything(run: Cli, tmp_path: Path) -> None:
    save_gguf(tmp_path / "empty.gguf", {})
    status, out, _ = run("ls", tmp_path / "empty.gguf")
    assert status == 0
    assert "0 metadata keys" in out
    total = json.loads(run("ls", "--json", tmp_path / "empty.gguf")[1])["total"]
    assert total == {"tensors": 0, "weights": 0, "bytes": 0, "bits_per_weight": 0.0}


def test_ls_into_a_closed_pipe(model: Path) -> None:
    """`quantgemm ls --full model.gguf | head -0`: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "quantgemm", "ls", str(model)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_ls_where_the_terminal_has_ascii_only(model: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "quantgemm", "ls", str(model)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"t\xe9st" in done.stdout


@needs_shared
def test_ls_of_files_by_other_tools(run: Cli) -> None:
    listing = json.loads(run("ls", "--json", SHARED / "gguf/split-00002-of-00003.gguf")[1])
    assert len(listing["files"]) == 3
    whole = json.loads(run("ls", "--json", SHARED / "gguf/mixed_v3_le.gguf")[1])
    assert len(whole["tensors"]) == 35
    for name in ("mixed_v1_le", "mixed_v2_le", "plain_v3_be", "meta_only", "nested_array"):
        status, out, err = run("ls", SHARED / f"gguf/{name}.gguf")
        assert (status, err) == (0, "")
        assert ("big-endian" in out) == (name == "plain_v3_be")


@needs_shared
def test_ls_of_a_whisper_bin(run: Cli) -> None:
    path = SHARED / "whisper/tiny_q4_0.bin"
    expected = json.loads((SHARED / "whisper/expected.json").read_text())["tiny_q4_0.bin"]
    assert run("ls", path)[0] == 0
    listing = json.loads(run("ls", "--json", path)[1])
    assert listing["format"] == "whisper"
    assert listing["version"] is None
    for name, value in expected["hparams"].items():
        assert listing["metadata"][name] == {"type": "i32", "value": value}
    assert listing["metadata"]["vocab"]["count"] == expected["n_vocab_in_file"]
    assert listing["metadata"]["mel_filters"]["shape"] == [expected["n_mel"], expected["n_fft"]]
    for tensor in listing["tensors"]:
        want = expected["tensors"][tensor["name"]]
        assert tensor["shape"] == want["ne"][::-1]
        assert (tensor["type_id"], tensor["offset"]) == (want["type"], want["offset"])


# ------------------------------------------------------------------------------ verify


@on_devices
def test_verify_takes_the_first_quantized_tensor(run: Cli, model: Path, device: str) -> None:
    status, out, err = run("verify", model, "--device", device)
    assert (status, err) == (0, "")
    assert "tensor a.q8: Q8_0 [5, 64]" in out
    assert f"device: {device}" in out
    for stage in ("start-up", "parse", "find", "upload", "dequantize", "download", "total"):
        assert re.search(rf"^{stage}\b", out, re.MULTILINE), stage
    assert "run 3" in out
    assert "run 4" not in out
    assert out.rstrip().endswith(
        "OK: 1 tensor, 320 weights, largest difference 0, 3 runs identical"
    )


@on_devices
def test_verify_selects(run: Cli, model: Path, device: str) -> None:
    def said(*options: str) -> str:
        status, out, err = run("verify", model, "--device", device, *options)
        assert (status, err) == (0, "")
        return out

    assert "tensor b.q4: Q4_0" in said("--type", "q4_0")
    assert "tensor norm: F32" in said("--type", "F32")
    assert "tensor c.q4: Q4_0" in said("--tensor", "c.q4")
    assert "tensor empty: F32 [0, 64]" in said("--tensor", "empty")
    everything = said("--all", "--repeats", "1")
    assert "OK: 6 tensors, 1,216 weights, largest difference 0\n" in everything
    assert "run 2" not in everything


@on_devices
def test_verify_total_is_the_sum_of_the_stages(run: Cli, model: Path, device: str) -> None:
    out = run("verify", model, "--all", "--repeats", "2", "--device", device)[1]
    times = {}
    for line in out.splitlines():
        cells = line.split()
        stages = ("parse", "find", "upload", "dequantize", "download", "total")
        if cells and cells[0] in stages and cells[-1] != "ms":
            times[cells[0]] = 0.0 if cells[-1] == "-" else float(cells[-1])  # of the last run
    total = times.pop("total")
    assert total == pytest.approx(sum(times.values()), abs=0.003)


@on_devices
def test_verify_in_pieces(
    run: Cli, model: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Eight blocks, two at a time, in both runs."""
    sizes = []
    decode = ops.dequantize
    monkeypatch.setattr(pipeline, "PIECE_WEIGHTS", 64)
    monkeypatch.setattr(pipeline, "PIECE_BYTES", 512)
    monkeypatch.setattr(
        ops, "dequantize", lambda b, q, *rest: sizes.append(b.numel()) or decode(b, q, *rest)
    )
    status, out, _ = run("verify", model, "--tensor", "c.q4", "--device", device, "--repeats", "2")
    assert status == 0
    assert "256 weights, largest difference 0" in out
    assert sizes[-8:] == [36] * 8


@on_devices
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_verify_any_bytes(run: Cli, tmp_path: Path, fmt: Any, device: str) -> None:
    """NaN and infinities included."""
    torch.manual_seed(fmt.type_id)
    blocks = torch.randint(0, 256, (7, 3 * fmt.block_bytes), dtype=torch.uint8)
    blocks[0] = 255
    save_gguf(tmp_path / "x.gguf", {"t": (blocks, fmt)})
    status, out, err = run("verify", tmp_path / "x.gguf", "--all", "--device", device)
    assert (status, err) == (0, "")
    assert re.search(rf"{fmt.name} +1 +{21 * fmt.block_elems:,} +0 +identical", out)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (1.0, "largest difference 1, first at weight 5: expected "),
        (math.nan, "largest difference inf"),
        (math.inf, "largest difference inf"),
    ],
)
def test_verify_reports_a_mismatch(
    fails: Callable[..., str],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: float,
    text: str,
) -> None:
    def wrong(blocks: torch.Tensor, qtype: int) -> torch.Tensor:
        weights = FORMATS[qtype].decode(blocks.numpy())
        weights[5] += change
        return torch.from_numpy(weights)

    monkeypatch.setattr(ops, "dequantize", wrong)
    line = fails("verify", model, "--device", "cpu")
    name = f"{model}: tensor 'a.q8' (Q8_0): 1 of 320 weights differ from the numpy decoder"
    assert line.startswith(name)
    assert text in line
    line = fails("verify", model, "--all", "--device", "cpu")
    assert line.endswith("(and 4 more tensors)")


def test_verify_reports_runs_that_differ(
    fails: Callable[..., str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the weights compare equal: -0 instead of 0."""
    calls = []

    def unstable(blocks: torch.Tensor, qtype: int) -> torch.Tensor:
        calls.append(qtype)
        weights = torch.zeros(32 * len(blocks) // 34)
        return -weights if len(calls) == 2 else weights

    monkeypatch.setattr(ops, "dequantize", unstable)
    zeros = model.with_name("zeros.gguf")
    save_gguf(zeros, {"z": (torch.zeros(4, 34, dtype=torch.uint8), "Q8_0")})
    line = fails("verify", zeros, "--device", "cpu")
    assert line == f"{zeros}: tensor 'z' (Q8_0): 1 later run gave other bits than the first"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.\nDetails"),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["torch", "driver", "host", "python"],
)
def test_verify_out_of_memory(
    fails: Callable[..., str], model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(ops, "dequantize", full)
    line = fails("verify", model, "--device", "cpu")
    assert line.startswith("out of memory: ")
    assert len(line) > len("out of memory: ")
    assert "Details" not in line


def test_a_bug_keeps_its_traceback(run: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "dequantize", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("verify", model, "--device", "cpu")


def test_interrupt(run: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "dequantize", interrupted)
    status, _, err = run("verify", model, "--device", "cpu")
    assert (status, err) == (130, "quantgemm verify: error: interrupted\n")


def test_verify_finds_nothing(fails: Callable[..., str], model: Path, tmp_path: Path) -> None:
    held = "the file holds F32 (2), F16 (1), Q8_0 (1), Q4_0 (2)"
    assert fails("verify", model, "--type", "Q6_K") == f"{model}: no tensor of type Q6_K; {held}"
    line = fails("verify", model, "--tensor", "zzzzzzz")
    assert line == f"{model}: no tensor named 'zzzzzzz'; {held}"
    line = fails("verify", model, "--tensor", "c.q5")
    assert re.search(r"no tensor named 'c.q5'; did you mean '[bc]\.q4'\?", line)
    plain = tmp_path / "plain.gguf"
    save_gguf(plain, {"x": torch.ones(3)})
    assert "no tensor of a quantized type" in fails("verify", plain)
    save_gguf(plain, {})
    assert fails("verify", plain, "--all").endswith("no tensors at all; the file holds no tensors")


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_files_that_cannot_be_read(
    fails: Callable[..., str], command: str, model: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "no\nsuch.gguf"
    assert fails(command, missing) == f"{tmp_path}/no such.gguf: no such file or directory"
    assert fails(command, tmp_path) == f"{tmp_path}: expected a file, got a directory"
    text = tmp_path / "text.gguf"
    text.write_text("hello, world")
    assert "not a GGUF file: it begins with b'hell'" in fails(command, text)
    empty = tmp_path / "empty.gguf"
    empty.write_bytes(b"")
    assert "the file is empty" in fails(command, empty)
    cut = tmp_path / "cut.gguf"
    for keep in (3, 7, 30, 500, model.stat().st_size - 100):
        cut.write_bytes(model.read_bytes()[:keep])
        line = fails(command, cut)
        assert line.startswith(f"{cut}: ")
        assert "truncated" in line or "not a GGUF file" in line
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert fails(command, fifo) == f"{fifo}: not a regular file"


@needs_shared
@pytest.mark.parametrize("command", ["ls", "verify"])
def test_malformed_files(run: Cli, command: str) -> None:
    paths = sorted((SHARED / "gguf/bad").glob("*.gguf"))
    assert len(paths) > 50
    for path in paths:
        status, _, err = run(command, path)
        assert status in (0, 1), path
        assert err.count("\n") == status, path


@needs_shared
@on_devices
def test_verify_files_by_other_tools(run: Cli, device: str) -> None:
    files = ["gguf/mixed_v1_le.gguf", "gguf/mixed_v3_le.gguf", "gguf/plain_v3_be.gguf"]
    files += ["gguf/split-00001-of-00003.gguf", "whisper/tiny_q5_0.bin", "whisper/tiny_q6_k.bin"]
    for name in files:
        status, out, err = run("verify", SHARED / name, "--all", "--device", device)
        assert (status, err) == (0, ""), name
        assert "largest difference 0" in out


def test_device_that_is_not_there(
    fails: Callable[..., str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (["verify", model], ["quantize", model, model.with_name("o"), "--type", "Q4_0"]):
        line = fails(*command, "--device", "cuda")
        assert line.startswith("--device cuda: t")
        assert not model.with_name("o").exists()


def test_default_device_without_a_gpu(
    run: Cli, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = run("verify", model)[1]
    assert re.search(r"^device: cpu \(t.*\)$", out, re.MULTILINE)


@pytest.mark.cuda
def test_no_such_gpu(fails: Callable[..., str], model: Path) -> None:
    line = fails("verify", model, "--device", "cuda:99")
    assert line.startswith("--device cuda:99: no such device, expected one of cuda:0")


@pytest.mark.cuda
def test_gpu_out_of_memory(fails: Callable[..., str], model: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        line = fails("verify", model, "--device", "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert line.startswith("out of memory: CUDA out of memory")


@pytest.mark.cuda
def test_verify_end_to_end_time(run: Cli, tmp_path: Path) -> None:
    """A 4096 x 4096 Q4_0 tensor: the bar is 10 ms on an H200; here, that it is not a second."""
    path = tmp_path / "big.gguf"
    blocks = ops.quantize(torch.randn(4096, 4096), QType.Q4_0)
    save_gguf(path, {"w": (blocks, "Q4_0")})
    status, out, _ = run("verify", path, "--type", "Q4_0", "--repeats", "5")
    assert status == 0
    best = re.search(r"best ([\d.]+) ms", out)
    assert best is not None
    assert float(best[1]) < 1000


# ------------------------------------------------------------------------------ quantize

TARGETS = ["Q4_0", "Q8_0", "MXFP4", *(t for t in ("Q4_K", "IQ4_XS") if t in WRITABLE)]


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {
        "embed.weight": torch.randn(10, 256).bfloat16(),
        "layers.0.proj.weight": torch.randn(6, 512).half(),
        "layers.0.proj.bias": torch.randn(6).half(),
        "layers.0.q_norm.weight": torch.randn(4, 256).bfloat16(),
        "experts.weight": torch.randn(2, 3, 256),
        "wide.weight": torch.randn(3, 256, dtype=torch.float64),
        "odd.weight": torch.randn(3, 30).bfloat16(),
        "odd64.weight": torch.randn(3, 30, dtype=torch.float64),
        "conv.weight": torch.randn(4, 3, 3, 3),
        "scalar": torch.tensor(1.25),
        "row.weight": torch.randn(1, 256).half(),
        "ids": torch.arange(512).reshape(2, 256),
        "mask": torch.tensor([[True, False] * 16] * 2),
        "codes": torch.arange(256, dtype=torch.uint8).reshape(1, 256),
        "empty": torch.empty(0, 256),
    }


QUANTIZED = {"embed.weight", "layers.0.proj.weight", "experts.weight", "wide.weight"}
KEPT = {  # name -> type in the output
    "layers.0.proj.bias": "F32",
    "layers.0.q_norm.weight": "F32",
    "odd.weight": "BF16",
    "odd64.weight": "F32",
    "conv.weight": "F32",
    "scalar": "F32",
    "row.weight": "F32",
    "ids": "I64",
    "mask": "I8",
    "codes": "I16",
    "empty": "F32",
}


def write_gguf(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    known = {torch.bool: torch.int8, torch.uint8: torch.int16}
    plain = {name: t.to(known.get(t.dtype, t.dtype)) for name, t in tensors.items()}
    save_gguf(path, plain, {"general.architecture": "llama", "general.file_type": 1, "x": [1, 2]})


WRITERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], None]] = {
    "safetensors": lambda path, tensors: save_file(tensors, path),
    "torch": lambda path, tensors: torch.save(tensors, path),
    "torch legacy": lambda path, tensors: torch.save(
        tensors, path, _use_new_zipfile_serialization=False
    ),
    "torch nested": lambda path, tensors: torch.save(
        {"epoch": 3, "state_dict": {**tensors, "version": "2"}}, path
    ),
    "gguf": write_gguf,
}


def check_output(path: Path, type_name: str) -> None:
    tensors, made = weights(), open_gguf(path).tensors
    assert list(made) == list(tensors) or set(made) == set(tensors)
    fmt = format_by_name(type_name)
    for name, value in tensors.items():
        tensor = made[name]
        assert tensor.shape == tuple(value.shape)
        if name in QUANTIZED:
            assert tensor.format is fmt, name
            assert torch.equal(tensor.blocks, ops.quantize(value.float(), fmt.type_id)), name
        else:
            assert tensor.format.name == KEPT[name], name
            assert torch.equal(tensor.dequantize(), value.float()), name


@pytest.mark.parametrize("type_name", TARGETS)
@pytest.mark.parametrize("kind", WRITERS)
def test_quantize(run: Cli, tmp_path: Path, kind: str, type_name: str) -> None:
    source, target = tmp_path / "in.file", tmp_path / "out.gguf"
    WRITERS[kind](source, weights())
    status, out, err = run("quantize", source, target, "--type", type_name, "--device", "cpu")
    assert (status, err) == (0, "")
    check_output(target, type_name)
    assert re.search(rf"{type_name} +quantized +4 ", out)
    assert "relative rms error of 4 tensors: mean " in out
    for why in ("one row", "norm or bias by its name", "integers", "rows not a multiple of"):
        assert f"kept: {why}" in out
    assert ("skipped, since they are no tensors: version (str)" in out) == (kind == "torch nested")
    assert f"{output.size(target.stat().st_size)}, " in out
    assert os.listdir(tmp_path) in (["in.file", "out.gguf"], ["out.gguf", "in.file"])
    assert run("verify", target, "--all", "--device", "cpu")[0] == 0


@pytest.mark.cuda
@pytest.mark.parametrize("type_name", TARGETS)
def test_quantize_on_the_gpu(run: Cli, tmp_path: Path, type_name: str) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.gguf"
    save_file(weights(), source)
    status, out, _ = run("quantize", source, target, "--type", type_name)
    assert status == 0
    assert "device: cuda:0" in out
    check_output(target, type_name)


def test_quantize_several_safetensors(run: Cli, tmp_path: Path) -> None:
    tensors = weights()
    names = list(tensors)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: part for part, held in parts.items() for name in held}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert (
        run("quantize", index, tmp_path / "out.gguf", "--type", "Q8_0", "--device", "cpu")[0] == 0
    )
    check_output(tmp_path / "out.gguf", "Q8_0")


def test_quantize_in_pieces(run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of 256 at a time; rows longer than a piece go one by one."""
    save_file(weights(), tmp_path / "in.safetensors")
    monkeypatch.setattr(quantize, "PIECE_WEIGHTS", 511)
    argv = ("quantize", tmp_path / "in.safetensors", tmp_path / "out.gguf", "--type", "Q4_0")
    assert run(*argv, "--device", "cpu")[0] == 0
    check_output(tmp_path / "out.gguf", "Q4_0")


def test_quantize_a_quantized_gguf(run: Cli, tmp_path: Path) -> None:
    """Decoded first; what is of the type already, or does not fit it, is copied bit for bit."""
    torch.manual_seed(3)
    q8, q4 = (torch.randn(4, 256) for _ in range(2))
    narrow, row = (ops.quantize(torch.randn(*s), QType.Q8_0) for s in ((4, 32), (64,)))
    blocks = {name: ops.quantize(t, QType[name]) for name, t in (("Q8_0", q8), ("Q4_1", q4))}
    tensors = {
        "a": (blocks["Q8_0"], "Q8_0"),
        "b": (blocks["Q4_1"], "Q4_1"),
        "narrow": (narrow, "Q8_0"),
        "row": (row, "Q8_0"),
    }
    metadata = {
        "general.architecture": "llama",
        "general.file_type": GGUFValue("u64", 7),
        "general.alignment": 64,
        "big": GGUFValue("arr[u16]", [1, 2]),
    }
    save_gguf(tmp_path / "in.gguf", tensors, metadata)

    def convert(type_name: str) -> Any:
        path = tmp_path / f"{type_name}.gguf"
        argv = ("quantize", tmp_path / "in.gguf", path, "--type", type_name, "--device", "cpu")
        assert run(*argv)[0] == 0
        return open_gguf(path)

    made = convert("Q4_1")
    want = ops.quantize(ops.dequantize(blocks["Q8_0"], QType.Q8_0), QType.Q4_1)
    assert torch.equal(made.tensors["a"].blocks, want)
    assert torch.equal(made.tensors["b"].blocks, blocks["Q4_1"])
    assert made.tensors["row"].format.name == "F32"
    assert torch.equal(made.tensors["row"].dequantize(), ops.dequantize(row, QType.Q8_0))
    assert made.alignment == 64
    assert made.metadata.typed("big") == GGUFValue("arr[u16]", [1, 2])
    assert made.metadata.typed("general.file_type") == GGUFValue("u32", 3)
    assert made.metadata.typed("general.quantization_version") == GGUFValue("u32", 2)

    ternary = convert("TQ2_0")
    assert ternary.tensors["narrow"].format.name == "Q8_0"
    assert torch.equal(ternary.tensors["narrow"].blocks, narrow)

    plain = convert("F16")
    assert plain.tensors["a"].format.name == "F16"
    decoded = ops.dequantize(blocks["Q8_0"], QType.Q8_0)
    assert torch.equal(plain.tensors["a"].dequantize(), decoded.half().float())
    assert "general.file_type" not in convert("Q2_0").metadata  # it has no number


@needs_shared
def test_quantize_a_split_file(run: Cli, tmp_path: Path) -> None:
    source, target = SHARED / "gguf/split-00003-of-00003.gguf", tmp_path / "out.gguf"
    assert run("quantize", source, target, "--type", "Q8_0", "--device", "cpu")[0] == 0
    made, original = open_gguf(target), open_gguf(source)
    assert len(made.paths) == 1
    assert set(made.tensors) == set(original.tensors)
    assert not [key for key in made.metadata if key.startswith("split.")]
    for key in set(original.metadata) - {"general.file_type", "general.quantization_version"}:
        assert made.metadata.typed(key) == original.metadata.typed(key)


def test_quantize_keep(run: Cli, tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "in.safetensors")
    argv = ("quantize", tmp_path / "in.safetensors", tmp_path / "out.gguf", "--type", "Q4_0")
    keep = ("--keep", "embed*", "--keep", "wide.weight")
    status, out, _ = run(*argv, *keep, "--verbose", "--device", "cpu")
    made = open_gguf(tmp_path / "out.gguf").tensors
    assert status == 0
    assert made["embed.weight"].format.name == "BF16"
    assert torch.equal(made["embed.weight"].dequantize(), weights()["embed.weight"].float())
    assert made["wide.weight"].format.name == "F32"
    assert re.search(r"embed\.weight +\[10, 256\] +BF16 +BF16 +--keep\n", out)
    assert re.search(r"experts\.weight +\[2, 3, 256\] +F32 +Q4_0 +\d\.\d{3}%\n", out)


def test_quantize_reports_the_error(run: Cli, tmp_path: Path) -> None:
    x = torch.randn(8, 256)
    bad = torch.randn(8, 256)
    bad[3, 3] = math.nan
    save_file({"good": x, "bad": bad, "zero": torch.zeros(8, 256)}, tmp_path / "in")
    argv = ("quantize", tmp_path / "in", tmp_path / "out", "--type", "Q8_0", "--device", "cpu")
    out = run(*argv)[1]
    error = (x - ops.dequantize(ops.quantize(x, QType.Q8_0), QType.Q8_0)).norm() / x.norm()
    assert f"{error:.3%}  good" in out
    assert re.search(r"largest:\n +nan  bad\n", out)


def test_quantize_does_not_overwrite(
    run: Cli, fails: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("precious")
    argv = ("quantize", model, target, "--type", "Q4_0", "--device", "cpu")
    assert fails(*argv) == f"{target}: the file exists (--force overwrites it)"
    assert target.read_text() == "precious"
    assert run(*argv, "--force")[0] == 0
    assert len(open_gguf(target).tensors) == 6
    assert run("quantize", target, target, "--type", "Q8_0", "--device", "cpu", "--force")[0] == 0
    assert open_gguf(target).tensors["half"].format.name == "Q8_0"
    line = fails("quantize", model, tmp_path, "--type", "Q4_0")
    assert line == f"{tmp_path}: expected a file name, got a directory"
    line = fails("quantize", model, tmp_path / "no/out.gguf", "--type", "Q4_0")
    assert line == f"{tmp_path}/no/out.gguf: no such directory: {tmp_path}/no"


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), OSError(28, "No space left on device")]
)
def test_quantize_leaves_the_target_alone_when_it_fails(
    fails: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    existed: bool,
    error: Exception,
) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.gguf"
    save_file(weights(), source)
    if existed:
        target.write_text("precious")
    encode, calls = ops.quantize, []

    def third_fails(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise error
        return encode(*args)

    monkeypatch.setattr(ops, "quantize", third_fails)
    line = fails("quantize", source, target, "--type", "Q4_0", "--force", "--device", "cpu")
    assert "out of memory" in line or "no space left on device" in line
    assert len(calls) == 3
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out.gguf"][: 1 + existed]
    if existed:
        assert target.read_text() == "precious"


def test_quantize_what_cannot_be_read(fails: Callable[..., str], tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out.gguf"

    def said() -> str:
        line = fails("quantize", source, target, "--type", "Q4_0", "--device", "cpu")
        assert not target.exists()
        return line

    assert said() == f"{source}: no such file or directory"
    source.write_bytes(b"")
    assert "got a file that begins with b''" in said()
    source.write_text("hello, world, this is not a model")
    expected = "expected GGUF, safetensors (or its .index.json) or a torch state dict"
    assert f"{source}: {expected}, got a file that begins with b'hell'" == said()
    save_file(weights(), source)
    source.write_bytes(source.read_bytes()[:-5])
    assert said().startswith(f"{source}: not a sound safetensors file: ")
    source.write_bytes(b"\x10\0\0\0\0\0\0\0{not json at all")
    assert said().startswith(f"{source}: not a sound safetensors file: ")
    save_file({}, source)
    assert said() == f"{source}: expected tensors, got safetensors without any"
    save_file({"x": torch.ones(2, 32, dtype=torch.uint16)}, source)
    assert "tensor 'x': expected one of float64, float32, " in said()
    source.write_bytes(b"lmgg" + bytes(20))
    assert "hyperparameters needs 44 bytes, but only 20 are left" in said()
    source.write_bytes(b"GGUF" + bytes(20))
    assert "GGUF version 0" in said()


class NotATensor:
    pass


def test_quantize_torch_files_that_cannot_be_read(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    source, target = tmp_path / "in.pt", tmp_path / "out.gguf"

    def said(saved: Any = None) -> str:
        if saved is not None:
            torch.save(saved, source)
        line = fails("quantize", source, target, "--type", "Q4_0", "--device", "cpu")
        assert line.startswith(f"{source}: ")
        return line.removeprefix(f"{source}: ")

    assert "which are not loaded since that could run code" in said({"x": NotATensor()})
    assert said(torch.ones(3)) == "expected a state dict, got a Tensor"
    assert said({"epoch": 1}) == "expected tensors, got torch without any"
    assert "expected a dense tensor" in said({"x": torch.eye(3).to_sparse()})
    assert "got complex64" in said({"x": torch.ones(3, dtype=torch.complex64)})
    torch.save(weights(), source)
    source.write_bytes(source.read_bytes()[:-1000])
    assert said().startswith("not a sound torch file: ")
    source.write_bytes(b"\x80\x02garbage")
    assert said()


def test_quantize_an_index_that_cannot_be_read(fails: Callable[..., str], tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        line = fails("quantize", index, tmp_path / "out", "--type", "Q4_0")
        assert line.startswith(f"{index}: not an index of safetensors files: ")
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    assert "not a plain name" in fails("quantize", index, tmp_path / "out", "--type", "Q4_0")
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    line = fails("quantize", index, tmp_path / "out", "--type", "Q4_0")
    assert "gone.safetensors" in line


def test_quantize_what_gguf_cannot_hold(fails: Callable[..., str], tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out.gguf"
    save_file({"n" * 70: torch.ones(2, 32)}, source)
    line = fails("quantize", source, target, "--type", "Q4_0", "--device", "cpu")
    assert line.startswith(f"{target}: not written: tensor 'nnn")
    assert "the tensor's name has 70 bytes, expected at most 63" in line
    save_file({"x": torch.ones(1, 2, 3, 4, 32)}, source)
    line = fails("quantize", source, target, "--type", "Q4_0", "--device", "cpu")
    assert "5 dimensions, expected at most 4" in line
    assert os.listdir(tmp_path) == ["in"]


def test_targets_are_what_can_be_written() -> None:
    names = set(quantize.targets())
    assert {"F32", "F16", "BF16", "Q4_0", "Q8_0"} <= names <= {*WRITABLE, "F32", "F16", "BF16"}
    assert not names & {"Q8_1", "Q8_K"}
    # every number is that of PyPI gguf's list
    gguf = pytest.importorskip("gguf")
    for name, number in quantize.FILE_TYPES.items():
        known = gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        assert known in (name, f"{name}_S", f"{name}_MOE")


# ------------------------------------------------------------------------------ output


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (9 << 20, "9.00 MiB"),
        (5 << 40, "5.00 TiB"),
    ],
)
def test_size(value: int, text: str) -> None:
    assert output.size(value) == text


def test_printable() -> None:
    assert output.printable("blk.0 漢字 ✓") == "blk.0 漢字 ✓"
    assert output.printable("a\x1b[2J\n\u202e\udc80") == r"a\x1b[2J\n\u202e\udc80"
    assert output.one_line("a\n b\t\x07") == r"a b \x07"


def test_a_terminal_gets_colours(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.main(["ls", str(model)]) == 0
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "\x1b[31m" not in out  # the one of the metadata
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in out.splitlines()) <= 60
