"""CogVideoX image-to-video as a teacher: each evaluation also gets the clip's first frame.

Source: diffusers, `CogVideoXImageToVideoPipeline`. The frame's latents are the posterior's mode, as for a
    clip.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import CogVideoXImageToVideoPipeline

from .cogvideox import CogVideoXTeacher
from .frames import to_pixels
from .protocol import VideoLatents


class CogVideoXImageTeacher(CogVideoXTeacher):
    """A frozen CogVideoX image-to-video model."""

    pipeline_class = CogVideoXImageToVideoPipeline

    @torch.no_grad()
    def encode_video(self, frames: np.ndarray) -> VideoLatents:
        video, vae = super().encode_video(frames), self.pipeline.vae
        pixels = to_pixels(frames[:1], self.size).to(self.device, self.dtype)
        first = vae.encode(pixels).latent_dist.mode().float().transpose(1, 2)
        scale: Any = vae.config.scaling_factor
        first = first / scale if vae.config.invert_scale_latents else first * scale
        rest = video.latents.shape[1] - first.shape[1]
        return replace(video, picture=F.pad(first, (0, 0, 0, 0, 0, 0, 0, rest)))

    def predict(self, latents: torch.Tensor, embeds: torch.Tensor, timestep: float) -> torch.Tensor:
        if self.picture is None:
            raise ValueError("an image-to-video teacher must be evaluated within `teacher.showing(video)`")
        picture = self.picture.expand(len(latents), -1, -1, -1, -1)
        return super().predict(torch.cat([latents, picture.to(latents)], dim=2), embeds, timestep)
