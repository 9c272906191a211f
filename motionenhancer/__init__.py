"""MotionEnhancer: pull a video VLM's attention toward a video diffusion model's motion prior."""

from . import interrupts

if interrupts.COMMAND_LINE:
    # Before the seconds that torch takes to load.
    interrupts.watch_signals()

from .alignment.aligner import align
from .priors.prior import MotionPrior, extract_prior
from .students import capture_attention, load_student
from .teachers import load_teacher

__version__ = "0.1.0"

__all__ = ["MotionPrior", "align", "capture_attention", "extract_prior", "load_student", "load_teacher"]
