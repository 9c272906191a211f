"""Train the toy teacher from the toy world alone: ``python -m motionenhancer.toy.train_teacher``.

First the VAE learns to rebuild clips, then the transformer and its text encoder learn together to denoise
their latents under captions, or under a question with its answer. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from motionenhancer.toy.language import caption, question
from motionenhancer.toy.models import make_teacher
from motionenhancer.toy.render import render
from motionenhancer.toy.scene import TASKS, Scene, sample_scene

TEACHER: dict[str, Any] = {
    "layers": 4,
    "heads": 8,
    "head_dim": 16,
    "frames": 17,
    "height": 32,
    "width": 32,
    "text_length": 32,
    "text_width": 64,
    "scaling_factor": 1.0,
}
#: Apart from any stream that draws clips for the student.
_STREAM = 101


def draw(seed: int, index: int) -> tuple[Scene, str]:
    """Return scene ``index`` of the teacher's own stream and the task it was drawn for."""
    task = list(TASKS)[index % len(TASKS)]
    return sample_scene(np.random.default_rng([_STREAM, seed, index]), task), task


def pixels(scenes: list[Scene]) -> torch.Tensor:
    """(n, 3, 17, 32, 32) float32 in [-1, 1]."""
    clips = np.stack([render(scene).frames for scene in scenes])
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def texts(scene: Scene, task: str, rng: np.random.Generator) -> str:
    """Draw what a clip is called: a caption, a question with its answer, an answer, or nothing."""
    kind = rng.random()
    if kind < 0.1:
        return ""
    if kind < 0.55:
        order = rng.permutation(len(scene.objects))
        kept = order[: int(rng.integers(1, len(order) + 1))]
        return caption(Scene(tuple(scene.objects[i] for i in kept), scene.ground, scene.camera))
    asked, answer = question(scene, task)
    return answer if kind < 0.75 else f"{asked} {answer}"


def train_vae(vae: Any, *, seed: int, steps: int, batch: int = 8) -> Iterator[float]:
    """Teach ``vae`` to rebuild toy clips; yields the mean absolute error of each step, in [-1, 1] units."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    vae.train()
    for step in range(steps):
        video = pixels([draw(seed, step * batch + i)[0] for i in range(batch)])
        posterior = vae.encode(video).latent_dist
        rebuilt = vae.decode(posterior.mode()).sample
        error = (rebuilt - video).abs().mean()
        loss = error + (rebuilt - video).square().mean() + 1e-4 * posterior.mode().square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield error.item()
    vae.eval()


@torch.no_grad()
def encode(vae: Any, *, seed: int, clips: int, first: int) -> torch.Tensor:
    """(clips, 5, 8, 8, 8) float16 latents of the stream's clips from ``first`` on."""
    parts = []
    for start in tqdm(range(0, clips, 32), desc="latents", unit="batch"):
        scenes = [draw(seed, first + i)[0] for i in range(start, min(clips, start + 32))]
        parts.append(vae.encode(pixels(scenes)).latent_dist.mode().transpose(1, 2).half())
    return torch.cat(parts)


def train_transformer(
    pipe: Any, latents: torch.Tensor, *, seed: int, first: int, steps: int, batch: int, rate: float
) -> Iterator[float]:
    """Teach the transformer and the text encoder to denoise; yields the loss of each step.

    The weights kept are their running mean over about the last thousand steps.
    """
    transformer, encoder, tokenizer = pipe.transformer, pipe.text_encoder, pipe.tokenizer
    alphas = pipe.scheduler.alphas_cumprod.float()
    rotary = pipe._prepare_rotary_positional_embeddings(32, 32, 5, torch.device("cpu"))
    length = transformer.config.max_text_seq_length
    models = nn.ModuleList([transformer, encoder])
    mean = copy.deepcopy(models).requires_grad_(False)
    decay = 1.0 - 1.0 / min(1000, max(10, steps // 10))
    optimizer = torch.optim.AdamW(models.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / 200) * 0.5 * (1 + math.cos(math.pi * i / steps)) + 0.01,
    )
    rng = np.random.default_rng([_STREAM, seed, 1])
    scenes = [draw(seed, first + i) for i in range(len(latents))]
    noise = torch.Generator().manual_seed(seed)
    models.train()
    for _ in range(steps):
        chosen = rng.integers(0, len(latents), batch)
        drawn = [scenes[int(i)] for i in chosen]
        ids = tokenizer(
            [texts(scene, task, rng) for scene, task in drawn],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        clean = latents[torch.from_numpy(chosen)].float()
        level = torch.randint(0, len(alphas), (batch,), generator=noise)
        epsilon = torch.randn(clean.shape, generator=noise)
        alpha = alphas[level].view(-1, 1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * epsilon
        target = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * clean
        output = transformer(
            hidden_states=noisy,
            encoder_hidden_states=encoder(ids)[0],
            timestep=level,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        loss = (output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for kept, now in zip(mean.parameters(), models.parameters(), strict=True):
                kept.lerp_(now, 1.0 - decay)
        yield loss.item()
    models.load_state_dict(mean.state_dict())
    models.eval()


def save(pipe: Any, record: dict[str, Any], folder: Path) -> None:
    """Write the pipeline in half precision, as an ordinary diffusers folder, and how it came about."""
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _shown(losses: Iterator[float], steps: int, what: str) -> list[float]:
    """Run through ``losses`` behind a progress bar; returns the mean of every hundred."""
    seen: list[float] = []
    with tqdm(losses, total=steps, desc=what, unit="step", mininterval=2) as bar:
        for loss in bar:
            seen.append(loss)
            bar.set_postfix(loss=f"{np.mean(seen[-100:]):.4f}", refresh=False)
    return [round(float(np.mean(seen[i : i + 100])), 5) for i in range(0, len(seen), 100)]


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the settings of ``argv`` and write a folder; 0."""
    parser = argparse.ArgumentParser(prog="python -m motionenhancer.toy.train_teacher", description=__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/toy_teacher"), help="a diffusers folder (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, clips and noise (%(default)s)")
    add("--vae_steps", type=int, default=400, help="of 8 clips, for the VAE (%(default)s)")
    add("--clips", type=int, default=12000, help="clips whose latents are learnt (%(default)s)")
    add("--steps", type=int, default=6000, help="of the transformer (%(default)s)")
    add("--batch", type=int, default=32, help="clips a step of the transformer (%(default)s)")
    add("--learning_rate", type=float, default=2e-3, help="its peak (%(default)s)")
    args = parser.parse_args(argv)
    # One thread: sums come in one order, so the same seed gives the same weights.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pipe: Any = make_teacher(seed=args.seed, **TEACHER)
    record: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "output_dir"}
    errors = train_vae(pipe.vae, seed=args.seed, steps=args.vae_steps)
    record["vae_error"] = _shown(errors, args.vae_steps, "vae")
    first = args.vae_steps * 8
    latents = encode(pipe.vae, seed=args.seed, clips=args.clips, first=first)
    scale = float(f"{1.0 / latents.float().std().item():.4g}")
    pipe.vae.register_to_config(scaling_factor=scale)
    losses = train_transformer(
        pipe,
        (latents.float() * scale).half(),
        seed=args.seed,
        first=first,
        steps=args.steps,
        batch=args.batch,
        rate=args.learning_rate,
    )
    record["losses"] = _shown(losses, args.steps, "transformer")
    save(pipe, record, args.output_dir)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
