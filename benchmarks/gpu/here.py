"""What is here: the device, versions, which kernels can run, and which did in one step of training."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import PRECISIONS, Bench
from benchmarks.gpu.findings import Findings
from llava import attention
from llava.attention import Kernel
from llava.errors import RefusedInput
from llava.training import memory

PACKAGES = (
    "torch", "transformers", "triton", "pyarrow", "pillow", "numpy", "safetensors",
    "accelerate", "peft", "deepspeed", "flash-attn",
)  # fmt: skip
KERNELS: tuple[Kernel, ...] = ("varlen", "sdpa")
_WORDS = ("attention", "attn", "flash", "fmha")


def check(bench: Bench, findings: Findings) -> None:
    """The device, and the attention that a step of stage 2 runs in each precision."""
    here = findings.figures["here"] = about(bench.device)
    for dtype, precision in PRECISIONS.items():
        head = bench.shape.sizes.language.head
        chosen = attention.choose("auto", bench.device, dtype, head)
        ran = _profiled(bench, dtype)
        findings.figures.setdefault("attention", {})[precision] = {
            "available": {kernel: _available(kernel, bench, dtype, head) for kernel in KERNELS},
            "chosen": chosen,
            "ran": ran,
        }
        wanted = "varlen" if chosen == "varlen" else "scaled_dot_product"
        said = ", ".join(sorted(ran)) or "nothing"
        findings.holds(
            f"{precision}: {chosen} ran", any(wanted in name for name in ran), f"what ran is {said}"
        )
        findings.say(f"{precision} packs with {chosen}")
    findings.said.insert(0, f"{here['device']}, torch {here['versions']['torch']}")


def about(device: torch.device) -> dict[str, Any]:
    """Device, memory, driver, versions and switches, as they are now."""
    found: dict[str, Any] = {
        "device": device.type,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cpus": os.cpu_count(),
        "compiler": shutil.which("g++") is not None,
        "linear_cross_entropy": memory.can_fuse_loss(),
        "varlen_attn": varlen_attn.__module__,
    }
    if device.type != "cuda":
        return found
    properties, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
    return found | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": {"total": total, "free": free},
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "sdpa": {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        },
    }


def _available(kernel: Kernel, bench: Bench, dtype: torch.dtype, head: int) -> str:
    """Whether a kernel runs here, or why not."""
    try:
        attention.choose(kernel, bench.device, dtype, head)
        return "yes"
    except RefusedInput as refused:
        return str(refused).partition(";")[0]


def _profiled(bench: Bench, dtype: torch.dtype) -> dict[str, int]:
    """Names of the operators and kernels of attention in one step of training, and how often each was called."""
    module, step = bench.module(dtype), bench.rows()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profile(activities=activities) as profiled:
        bench.gradients(module, step)
    return {
        event.key: event.count
        for event in profiled.key_averages()
        if any(word in event.key.lower() for word in _WORDS)
    }


def _driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
