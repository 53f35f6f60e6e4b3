"""The precision in which networks compute: what --precision auto comes to on a device, and what is slow there."""

from __future__ import annotations

import pathlib

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # of --precision, but for auto
CPU_INFO = pathlib.Path("/proc/cpuinfo")
_BF16 = {"avx512_bf16", "bf16"}  # flags of x86, whose AMX comes with it, and of ARM


def multiplies_in_bf16(device: torch.device) -> bool:
    """Does a device have products in bf16? Without them, a CPU takes 8 to 10 times as long for a convolution in bf16 as
    in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not CPU_INFO.exists():
        return False
    lines = CPU_INFO.read_text(encoding="utf-8").lower().splitlines()
    return any(_BF16 & set(line.split()) for line in lines if line.startswith(("flags", "features")))


def fastest_precision(device: torch.device) -> str:
    """What --precision auto is on a device."""
    if multiplies_in_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def slow(precision: str, device: torch.device) -> str:
    """In a line, if a device is far slower in a precision than it could be; else ""."""
    if device.type != "cpu" or precision in ("fp32", fastest_precision(device)):
        return ""
    return f"this CPU does not multiply in {precision}: --precision fp32 is many times faster"
