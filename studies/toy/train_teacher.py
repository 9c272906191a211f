"""Train the toy teacher from the toy world alone: ``python -m studies.toy.train_teacher``.

First the VAE learns to rebuild clips. Then the transformer and its text encoder learn to denoise latents
under a text, first of single pictures, then of clips. The text contains wrong words. Heads on the
transformer's text stream, one after each block but the first, learn to name the right words, and are removed
after training: with denoising alone, a model of this size hardly uses its text. All weights follow from the
seed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from motionenhancer.toy.language import caption, question, still_question
from motionenhancer.toy.models import make_teacher
from motionenhancer.toy.render import FRAMES, SIZE, render
from motionenhancer.toy.scene import TASKS, Scene, sample_scene
from studies.toy.mistakes import CHECKED, mistaken

TEACHER: dict[str, Any] = {
    "layers": 4,
    "heads": 8,
    "head_dim": 16,
    "positions": "sinusoidal",
    "snr_shift_scale": 1.0,
    "frames": FRAMES,
    "height": SIZE,
    "width": SIZE,
    "text_length": 32,
    "text_width": 64,
    "vae_channels": (16, 32, 32),
    "temporal_compression": 2,
    "scaling_factor": 1.0,
}
#: A separate random stream: no clip of the student is drawn again.
_STREAM = 7_000_101
_SHORT = 5


def draw(seed: int, index: int, *, still: bool = False) -> tuple[Scene, str]:
    """Return scene ``index`` of the teacher's random stream and its task; training pairs only."""
    task = list(TASKS)[index % len(TASKS)]
    rng = np.random.default_rng([_STREAM, seed, int(still), index])
    return sample_scene(rng, task, split="train"), task


def pixels(frames: np.ndarray) -> torch.Tensor:
    """Turn (n, f, h, w, 3) uint8 into (n, 3, f, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def picture_text(scene: Scene, task: str, rng: np.random.Generator) -> str:
    """Say what a still picture shows: a question about it with its answer, or the answer alone."""
    asked, answer = still_question(scene, rng)
    return answer if rng.random() < 0.7 or len(answer) > 60 else f"{asked} {answer}"


def clip_text(scene: Scene, task: str, rng: np.random.Generator) -> str:
    """Say what happens in a clip: a caption of some or all objects, or a question with its answer."""
    kind = rng.random()
    if kind < 0.4:
        order = rng.permutation(len(scene.objects))
        kept = order[: int(rng.integers(1, len(order) + 1))]
        return caption(Scene(tuple(scene.objects[i] for i in kept), scene.ground, scene.camera))
    asked, answer = question(scene, task)
    return answer if kind < 0.5 else f"{asked} {answer}"


def train_vae(vae: Any, clips: np.ndarray, *, seed: int, steps: int, batch: int = 8) -> Iterator[float]:
    """Teach ``vae`` to rebuild parts of ``clips`` (n, f, h, w, 3); yields each step's mean absolute error."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng([_STREAM, seed, 2])
    vae.train()
    for _ in range(steps):
        first = int(rng.integers(0, clips.shape[1] - _SHORT + 1))
        video = pixels(clips[rng.integers(0, len(clips), batch), first : first + _SHORT])
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(video).latent_dist.mode().float()
            rebuilt = vae.decode(latents).sample.float()
        error = (rebuilt - video).abs().mean()
        loss = error + 4 * (rebuilt - video).square().mean() + 1e-4 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield error.item()
    vae.eval()


@torch.no_grad()
def encode(vae: Any, clips: np.ndarray) -> torch.Tensor:
    """Return (n, latent frames, channels, h, w) float16 latents, unscaled."""
    parts = [
        vae.encode(pixels(clips[i : i + 32])).latent_dist.mode().transpose(1, 2).half()
        for i in tqdm(range(0, len(clips), 32), desc="latents", unit="batch", mininterval=2)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Lesson:
    """Scaled latents, the scene of each, the function that writes its text; ``steps`` of ``batch``."""

    latents: torch.Tensor
    scenes: list[tuple[Scene, str]]
    text: Callable[[Scene, str, np.random.Generator], str]
    steps: int
    batch: int


def sharpen(transformer: nn.Module) -> None:
    """Start the scales of queries and keys at 1.5, which makes heads of width 16 as sharp as wider ones."""
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight")):
                weight.fill_(1.5)


def train_transformer(
    pipe: Any, lessons: Sequence[Lesson], *, seed: int, rate: float, wrong: float, compiled: bool = False
) -> Iterator[tuple[float, float]]:
    """Teach the transformer and the text encoder one lesson after the other.

    Words are exchanged at the rate ``wrong``. Yields each step's denoising loss and the share of wrong words
    that were corrected, among those at levels with more signal than noise.

    The learning rate falls along a cosine in the last lesson. The weights kept are their running mean over
    about its last five hundred steps.
    """
    transformer, encoder, tokenizer = pipe.transformer, pipe.text_encoder, pipe.tokenizer
    config, alphas = transformer.config, pipe.scheduler.alphas_cumprod.float()
    width = config.num_attention_heads * config.attention_head_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(tokenizer)))
            for _ in transformer.transformer_blocks[1:]
        )
    checked = torch.zeros(len(tokenizer), dtype=torch.bool)
    checked[[tokenizer.convert_tokens_to_ids(f"▁{word}") for word in CHECKED]] = True
    streams: list[torch.Tensor] = []
    hooks = []
    for block in transformer.transformer_blocks[1:]:
        hooks.append(block.register_forward_hook(lambda *call: streams.append(call[2][1])))
    if compiled:
        for block in transformer.transformer_blocks:
            block.forward = torch.compile(block.forward, dynamic=False)

    models = nn.ModuleList([transformer, encoder])
    trained = [*models.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    rng, noise = np.random.default_rng([_STREAM, seed, 3]), torch.Generator().manual_seed(seed)

    def tokens(texts: list[str]) -> torch.Tensor:
        options = {"padding": "max_length", "max_length": config.max_text_seq_length, "truncation": True}
        return tokenizer(texts, return_tensors="pt", **options).input_ids

    models.train()
    for lesson in lessons:
        mean = [weight.detach().clone() for weight in models.parameters()]
        for step in range(lesson.steps):
            fall = 0.5 * (1 + math.cos(math.pi * step / lesson.steps)) if lesson is lessons[-1] else 1.0
            optimizer.param_groups[0]["lr"] = rate * (min(1.0, (step + 1) / 200) * fall + 0.005)
            drawn = rng.integers(0, len(lesson.latents), lesson.batch)
            texts = [lesson.text(*lesson.scenes[int(i)], rng) for i in drawn]
            given, true = tokens([mistaken(text, rng, rate=wrong) for text in texts]), tokens(texts)
            clean = lesson.latents[torch.from_numpy(drawn)].float()
            level = torch.rand(lesson.batch, generator=noise)
            level[::2] *= 0.3
            level = (level * len(alphas)).long()
            epsilon = torch.randn(clean.shape, generator=noise)
            alpha = alphas[level].view(-1, 1, 1, 1, 1)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * epsilon
            target = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * clean
            streams.clear()
            # At this size PyTorch's plain attention is faster on a CPU than its flash attention.
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                output = transformer(
                    hidden_states=noisy,
                    encoder_hidden_states=encoder(given)[0],
                    timestep=level,
                    return_dict=False,
                )[0]
            denoising = (output.float() - target).square().mean()
            use = checked[true]
            # Words that noise hides cannot be corrected: each step's weight is its share of signal.
            weight = alphas[level][:, None].expand(true.shape)[use]
            named = [head(stream.float())[use] for head, stream in zip(heads, streams, strict=True)]
            naming = torch.stack(
                [nn.functional.cross_entropy(words, true[use], reduction="none") for words in named]
            ).mean(0)
            loss = denoising + (naming * weight).sum() / weight.sum()
            exchanged = (given[use] != true[use]) & (weight > 0.5)
            righted = (named[-1].argmax(-1) == true[use])[exchanged].float().mean().item()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            decay = 1.0 - 1.0 / min(500, max(10, (step + 1) // 10))
            with torch.no_grad():
                torch._foreach_lerp_(mean, [weight.detach() for weight in models.parameters()], 1.0 - decay)
            yield denoising.item(), righted
    for hook in hooks:
        hook.remove()
    if compiled:
        for block in transformer.transformer_blocks:
            del block.forward
    with torch.no_grad():
        for weight, kept in zip(models.parameters(), mean, strict=True):
            weight.copy_(kept)
    models.eval()


def save(pipe: Any, record: dict[str, Any], folder: Path) -> None:
    """Write the pipeline in half precision as a diffusers folder, and the record of its training."""
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _shown(steps: Iterator[Any], count: int, what: str, names: Sequence[str]) -> dict[str, list[float]]:
    """Run through ``steps`` with a progress bar; returns the mean of every hundred steps, by name."""
    seen: list[Any] = []
    with tqdm(steps, total=count, desc=what, unit="step", mininterval=2) as bar:
        for step in bar:
            seen.append(step)
            if len(seen) % 20 == 0:
                recent = np.nanmean(np.reshape(seen[-100:], (-1, len(names))), 0)
                bar.set_postfix({n: f"{v:.4f}" for n, v in zip(names, recent, strict=True)}, refresh=False)
    values = np.reshape(seen, (-1, len(names)))
    means = [np.nanmean(values[i : i + 100], 0) for i in range(0, len(values), 100)]
    return {name: [round(float(m[i]), 5) for m in means] for i, name in enumerate(names)}


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the settings of ``argv`` and write a folder; 0."""
    parser = argparse.ArgumentParser(prog="python -m studies.toy.train_teacher", description=__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("runs/toy_teacher"), help="a diffusers folder (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, clips and noise (%(default)s)")
    add("--vae_steps", type=int, default=800, help="of 8 parts of clips, for the VAE (%(default)s)")
    add("--pictures", type=int, default=16000, help="different pictures to learn (%(default)s)")
    add("--picture_steps", type=int, default=2000, help="of 64 pictures, for the transformer (%(default)s)")
    add("--clips", type=int, default=20000, help="different clips to learn (%(default)s)")
    add("--steps", type=int, default=12000, help="of 32 clips, for the transformer (%(default)s)")
    add("--learning_rate", type=float, default=2e-3, help="the transformer's peak (%(default)s)")
    add("--wrong", type=float, default=0.2, help="share of the words that are exchanged (%(default)s)")
    add("--compile", action="store_true", help="half as fast again; needs a C++ compiler")
    args = parser.parse_args(argv)
    # One thread: sums come in one order, so the same seed gives the same weights.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pipe: Any = make_teacher(seed=args.seed, **TEACHER)
    record: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "output_dir"}
    scenes = [draw(args.seed, i) for i in tqdm(range(args.clips), desc="scenes", mininterval=2)]
    stills = [
        draw(args.seed, i, still=True) for i in tqdm(range(args.pictures), desc="stills", mininterval=2)
    ]
    clips = np.stack([render(scene).frames for scene, _ in tqdm(scenes, desc="clips", mininterval=2)])
    pictures = np.stack([render(scene, frames=1).frames for scene, _ in stills])
    errors = train_vae(pipe.vae, clips, seed=args.seed, steps=args.vae_steps)
    record |= _shown(errors, args.vae_steps, "vae", ["vae_error"])
    latents, flat = encode(pipe.vae, clips), encode(pipe.vae, pictures)
    scale = float(f"{1.0 / latents.float().std().item():.4g}")
    pipe.vae.register_to_config(scaling_factor=scale)
    lessons = (
        Lesson((flat.float() * scale).half(), stills, picture_text, args.picture_steps, 64),
        Lesson((latents.float() * scale).half(), scenes, clip_text, args.steps, 32),
    )
    sharpen(pipe.transformer)
    steps = train_transformer(
        pipe, lessons, seed=args.seed, rate=args.learning_rate, wrong=args.wrong, compiled=args.compile
    )
    record |= _shown(steps, args.picture_steps + args.steps, "transformer", ["loss", "righted"])
    save(pipe, record, args.output_dir)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
