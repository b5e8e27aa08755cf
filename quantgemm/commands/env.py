# SPDX-License-Identifier: MIT
"""`quantgemm env`: versions, what was built, and the devices it can use."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
from typing import Any

import torch

import quantgemm
from quantgemm import _C
from quantgemm.commands.devices import why_no_cuda
from quantgemm.commands.output import Grid, console, size


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "env",
        help="versions, what was built, and devices",
        description="Print versions, what this installation was built for, and the devices it "
        "can use. Paste it into bug reports.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    out = console()
    versions = Grid("versions", "what", "version")
    for name, value in found["versions"].items():
        versions.row(name, value or "none")
    versions.print(out)
    build = Grid("build", "what", "value")
    for name, value in found["build"].items():
        shown = " ".join(value) if isinstance(value, list) else value
        build.row(name.replace("_", " "), shown or "none (CPU only)")
    build.print(out)
    devices = Grid("devices", "device", "name", ">memory", ">free", "capability", "kernels")
    for device in found["devices"]:
        memory, free = (size(device[k]) if device[k] else "-" for k in ("memory", "free"))
        kernels = "yes" if device["kernels"] else "none for this device"
        capability = device["capability"] or "-"
        devices.row(device["device"], device["name"], memory, free, capability, kernels)
    devices.print(out)
    if found["no_cuda"]:
        out.print(f"no CUDA device: {found['no_cuda']}")
    return 0


def environment() -> dict[str, Any]:
    """What `--json` prints."""
    build = quantgemm.build_info()
    return {
        "versions": {
            "quantgemm": quantgemm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch's CUDA": torch.version.cuda,
            "system": platform.platform(),
        },
        "build": {
            "compiler": build.compiler,
            "cuda": build.cuda,
            "cuda_architectures": list(build.cuda_architectures),
            "torch_abi": build.torch_abi,
            "reads": [row["name"] for row in _C.format_table()],
            "writes": [row["name"] for row in _C.format_table() if row["can_quantize"]],
        },
        "devices": [_cpu(), *(_gpu(i, build) for i in range(torch.cuda.device_count()))],
        "no_cuda": why_no_cuda(),
    }


def _cpu() -> dict[str, Any]:
    memory: int | None = None
    free: int | None = None
    with contextlib.suppress(AttributeError, OSError, ValueError):  # on other than POSIX systems
        page = os.sysconf("SC_PAGE_SIZE")
        memory, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    device = {"device": "cpu", "name": name, "memory": memory, "free": free}
    return {**device, "capability": None, "kernels": True}


def _gpu(index: int, build: quantgemm.BuildInfo) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    try:
        free = torch.cuda.mem_get_info(index)[0]
    except RuntimeError:  # no memory left even for a context
        free = None
    capability = (properties.major, properties.minor)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "memory": properties.total_memory,
        "free": free,
        "capability": "{}.{}".format(*capability),
        "kernels": has_kernels(build.cuda_architectures, capability),
    }


def has_kernels(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures (as '8.0', '9.0a' or '8.9+PTX') runs on a device.

    Machine code runs on later devices of the same major number, code of an 'a' architecture on
    exactly that one, PTX on all later devices.
    """
    for text in architectures:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", text)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        if built == capability or (match[4] and not match[3] and built <= capability):
            return True
        if not match[3] and built[0] == capability[0] and built <= capability:
            return True
    return False
