# SPDX-License-Identifier: MIT
"""Builds `quantgemm._C` with ninja: csrc/cpu and csrc/ops with the host compiler, csrc/cuda with
nvcc where there is one, even when the installed torch is a CPU build.

    TORCH_CUDA_ARCH_LIST="9.0a"   architectures, as torch spells them (default below)
    QUANTGEMM_CUDA=0              a CPU-only build although nvcc is there
    CXX, NVCC, MAX_JOBS           host compiler, nvcc, parallel jobs
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# The place to add an architecture. PTX of 8.9 is what newer GPUs compile at load time.
DEFAULT_ARCHS = "8.0;8.6;8.9+PTX;9.0a"
TORCH_ABI = (2, 10)  # the oldest torch whose stable ABI has what csrc/ops uses
CXX_FLAGS = "-std=c++20 -O3 -Wall -Wextra -fPIC -fvisibility=hidden -ffp-contract=off"
NVCC_FLAGS = "-std=c++20 -O3 --compress-mode=size -Werror all-warnings"
NVCC_FLAGS += " -Xcompiler=-fPIC,-Wall,-Wno-unknown-pragmas,-fvisibility=hidden"


def find_nvcc() -> str | None:
    if os.environ.get("QUANTGEMM_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = (os.environ.get("NVCC"), shutil.which("nvcc"), f"{home}/bin/nvcc")
    return next(filter(lambda path: path and Path(path).exists(), found), None)


def gencode_flags(archs: str) -> str:
    """'8.9+PTX;9.0a' -> nvcc's -gencode flags."""
    flags = []
    for arch in re.split(r"[;\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", arch)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {arch!r} is not like '8.0', '9.0a', '8.9+PTX'")
        cc = match[1] + match[2]
        code = f"[sm_{cc},compute_{cc}]" if match[3] else f"sm_{cc}"
        flags.append(f"-gencode=arch=compute_{cc},code={code}")
    return " ".join(flags)


def include_dirs() -> list[str]:
    import torch  # for its headers; nothing of it runs

    torch_include = f"{Path(torch.__file__).parent}/include"
    try:
        from pybind11 import get_include

        pybind11_include = get_include()
    except ImportError:  # torch ships a copy
        pybind11_include = torch_include
    return [pybind11_include, torch_include, sysconfig.get_path("include")]


def output_of(*command: str) -> str:
    return subprocess.run(command, stdout=-1, stderr=subprocess.STDOUT, text=True).stdout


class NinjaBuild(build_ext):
    """One extension, one ninja file: incremental, parallel, every command on record."""

    def build_extension(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cxx, nvcc = os.environ.get("CXX", "g++"), find_nvcc()
        archs = (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS) if nvcc else ""
        includes, rules = include_dirs(), {}
        defines = f"-DQG_TORCH_TARGET={TORCH_ABI[0] << 56 | TORCH_ABI[1] << 48:#x}"
        info = {"COMPILER": output_of(cxx, "--version").splitlines()[0], "CUDA_VERSION": ""}
        info |= {"CUDA_ARCHS": archs, "TORCH_ABI": "{}.{}".format(*TORCH_ABI)}
        if nvcc:
            toolkit = re.search(r"TOP=(\S+)", output_of(nvcc, "--dryrun", "x.cu"))[1]
            info["CUDA_VERSION"] = re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))[1]
            includes.append(f"{toolkit}/include")
            defines += " -DQG_WITH_CUDA" + " -DQG_SM90A" * ("9.0a" in archs)
            flags = f"-ccbin={cxx} {NVCC_FLAGS} {gencode_flags(archs)}"
            rules["nvcc"] = f"{nvcc} -MMD -MF $out.d {flags} $extra -c $in -o $out"
        flags = f"{CXX_FLAGS} {defines} " + " ".join(f"-isystem {path}" for path in includes)
        rules["cxx"] = f"{cxx} -MMD -MF $out.d {flags} $extra -c $in -o $out"
        # The C++ library that torch uses: a static copy's stream and locale objects would clash.
        link = "-Xlinker " + output_of(cxx, "-print-file-name=libstdc++.so.6").strip()
        link += f" -L{includes[1]}/../lib -ltorch_cpu -lc10"
        rules["link"] = f"{f'{nvcc} -ccbin={cxx}' if nvcc else cxx} -shared $in -o $out {link}"
        print(f"quantgemm: CUDA {info['CUDA_VERSION']}, {archs}" if nvcc else "quantgemm: CPU only")
        lines = [f"rule {name}\n  command = {command}" for name, command in rules.items()]
        lines = [f"{r}\n  depfile = $out.d\n  deps = gcc" if "$out.d" in r else r for r in lines]
        lines[:-1] = [
            f"{rule}\n  description = $in" for rule in lines[:-1]
        ]  # not for the long link
        objects = [str(build_dir / (source.replace("/", "_") + ".o")) for source in ext.sources]
        for source, obj in zip(ext.sources, objects, strict=True):
            extra = " ".join(f"'-DQG_{k}=\"{v}\"'" for k, v in info.items())
            if source.endswith(".cu"):
                # Encoders must give the same bits on both sides: no fused multiply-add there.
                extra = "--fmad=false" if Path(source).name.startswith("quantize") else ""
            rule = {".cu": "nvcc", ".cpp": "cxx"}[Path(source).suffix]
            lines.append(f"build {obj}: {rule} {ROOT / source}\n  extra = {extra}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        lines.append(f"build {target}: link {' '.join(objects)}\ndefault {target}\n")
        (build_dir / "build.ninja").write_text("\n".join(lines))
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        jobs = ["-j", os.environ.get("MAX_JOBS", str(os.cpu_count()))]
        subprocess.run([ninja or "ninja", "-C", str(build_dir), *jobs], check=True)


folders = ["cpu", "ops"] + (["cuda"] if find_nvcc() else [])
files = sorted(path for folder in folders for path in (ROOT / "csrc" / folder).iterdir())
sources = [str(path.relative_to(ROOT)) for path in files if path.suffix in (".cpp", ".cu")]
setup(ext_modules=[Extension("quantgemm._C", sources)], cmdclass={"build_ext": NinjaBuild})
