"""The compiled library: its kernels as plain functions of torch tensors, and a report of the build."""

from .functions import (
    align_backward,
    align_forward,
    motion_scores,
    resample_rows_backward,
    resample_rows_forward,
    row_l2_loss_backward,
    row_l2_loss_forward,
    token_motion_scores,
)
from .library import (
    NativeError,
    NativeLoadError,
    available,
    build_report,
    cpu_level,
    cuda_available,
    cuda_why_not,
    device_reasons,
    machine,
    narrow_float_reasons,
    why_not,
)

__all__ = [
    "NativeError",
    "NativeLoadError",
    "align_backward",
    "align_forward",
    "available",
    "build_report",
    "cpu_level",
    "cuda_available",
    "cuda_why_not",
    "device_reasons",
    "machine",
    "motion_scores",
    "narrow_float_reasons",
    "resample_rows_backward",
    "resample_rows_forward",
    "row_l2_loss_backward",
    "row_l2_loss_forward",
    "token_motion_scores",
    "why_not",
]
