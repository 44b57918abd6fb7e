"""The device, the dtype and the memory one process computes with."""

import contextlib
import ctypes
import sys

import torch


def device() -> torch.device:
    """The device one process uses: its CUDA card, Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_dtype(name: str) -> torch.dtype:
    """torch dtype of the knob `dtype`. auto: bfloat16 on a GPU that has it, or float32; never float16 unasked.

    Not chosen by timing: one command would then compute differently from run to run (benchmarks/README.md).
    """
    if name != "auto":
        return getattr(torch, name)
    has_bf16 = device().type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def hand_back() -> None:
    """Give the memory of what is no longer used back to the system, which the C library would not do by itself."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
