"""MotionEnhancer: pull a video VLM's attention toward a video diffusion model's motion prior."""

from .aligner import align
from .prior import MotionPrior, extract_prior
from .vdm import load_teacher
from .vlm import capture_attention, load_student

__version__ = "0.1.0"

__all__ = ["MotionPrior", "align", "capture_attention", "extract_prior", "load_student", "load_teacher"]
