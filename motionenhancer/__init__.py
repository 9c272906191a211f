"""MotionEnhancer: pull a video VLM's attention toward a video diffusion model's motion prior."""

__version__ = "0.1.0"
