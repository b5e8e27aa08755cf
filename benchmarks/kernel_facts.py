# SPDX-License-Identifier: MIT
"""What a call launches: threads, registers and shared memory from torch's profiler, spills from the
compiled module (cuobjdump, where the CUDA toolkit is installed)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import quantgemm._C


@cache
def stack_bytes() -> dict[str, int]:
    """Mangled kernel name -> bytes of local memory per thread (spills and indexed arrays)."""
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if tool is None:
        return {}
    report = subprocess.run(
        [tool, "--dump-resource-usage", quantgemm._C.__file__], capture_output=True, text=True
    ).stdout
    found = re.findall(r"Function (\S+):\s*REG:\d+ STACK:(\d+)", report)
    return {name: int(stack) for name, stack in found}


def demangled(name: str) -> str:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    return subprocess.run([tool, name], capture_output=True, text=True).stdout if tool else name


def launches(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels of one call, in order: name, time, grid, threads, registers, shared KiB."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [e for e in events if e.get("cat") == "kernel"]
    return [
        {
            "kernel": event["name"],
            "us": event["dur"],
            "grid": "x".join(map(str, event["args"]["grid"])),
            "threads": event["args"]["block"][0],
            "registers": event["args"]["registers per thread"],
            "shared_KiB": event["args"]["shared memory"] / 1024,
        }
        for event in sorted(kernels, key=lambda e: e["ts"])
    ]


def spills(kernel: str, type_name: str) -> str:
    """Largest local memory among the instances of a kernel for a type, e.g. '0'; '?' if unknown.

    A kernel that is the same for all types counts with all of its instances.
    """
    stem = (
        re.sub(r"<.*|\(.*", "", kernel.replace("(anonymous namespace)::", ""))
        .split("::")[-1]
        .split()[-1]
    )
    # A mangled name carries the length before an identifier: Q4_0 is 4Q4_0.
    all_types = {name: size for name, size in stack_bytes().items() if stem in name}
    mine = {n: size for n, size in all_types.items() if f"{len(type_name)}{type_name}" in n}
    found = mine or all_types
    return str(max(found.values())) if found else "?"
