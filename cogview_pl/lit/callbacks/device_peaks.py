"""Peak matmul throughput of GPUs, from their makers' data sheets: dense (no sparsity), fp32 accumulation."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """10¹² operations per second."""

    half: float
    """bf16 and fp16."""
    tf32: float
    fp32: float


_PEAKS = {  # the first name that is a word of the device's name counts, so longer names come first
    "B200": Peak(2250, 1125, 75),
    "H200 NVL": Peak(835, 418, 60),
    "H200": Peak(989, 495, 67),
    "H100 PCIe": Peak(756, 378, 51),
    "H100 NVL": Peak(835, 418, 60),
    "H100": Peak(989, 495, 67),
    "A100": Peak(312, 156, 19.5),
    "A10G": Peak(70, 35, 35),
    "L40S": Peak(362, 183, 91.6),
    "L40": Peak(181, 90.5, 90.5),
    "L4": Peak(121, 60, 30.3),
    "RTX 6000 Ada": Peak(364, 182, 91.1),
    "RTX A6000": Peak(155, 77.4, 38.7),
    "RTX 4090 D": Peak(147, 73.5, 73.5),
    "RTX 4090": Peak(165, 82.6, 82.6),
    "RTX 3090 Ti": Peak(80, 40, 40),
    "RTX 3090": Peak(71, 35.6, 35.6),
}

_PART = re.compile(r"\b(MIG|Laptop)\b")  # such a device has less than the full card


def peak_tflops(name: str, precision: str) -> float | None:
    """Peak of a device in 10¹² operations per second; None for a device or precision without a known peak.

    Args:
        name: name from `torch.cuda.get_device_name`.
        precision: Lightning's name (`bf16-mixed`, `16-mixed`, `32-true`). fp32 has the peak of TF32 if torch uses it.
    """
    if _PART.search(name):
        return None
    peak = next((peak for model, peak in _PEAKS.items() if re.search(rf"\b{model}\b", name)), None)
    if peak is None:
        return None
    if precision in ("bf16-mixed", "bf16-true", "16-mixed", "16-true"):
        return peak.half
    if precision == "32-true":
        return peak.fp32 if torch.get_float32_matmul_precision() == "highest" else peak.tf32
    return None
