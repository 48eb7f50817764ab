"""The backend for CUDA over interpreted kernels, with what tests of kernels have around them.

Its modules are imported by fixtures and tests here only after the kernels.
"""

from __future__ import annotations

from tests.kernels.conftest import HAS_GPU, device, garbage, triton_of_kernels

__all__ = ["HAS_GPU", "device", "garbage", "triton_of_kernels"]
