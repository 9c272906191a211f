"""A small captioner that learns from scratch, plainly or pulled towards maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import mekernels
from motionenhancer.alignment.aligner import align
from motionenhancer.alignment.weight import AlignmentSchedule
from motionenhancer.students.capture import capture_attention
from motionenhancer.toy.tokenizers import t5_tokenizer
from studies.motion.clips import GRID, MAP_GRID, Clips, Maps, words_of

__all__ = ["Captioner", "Regime", "measure", "own_rows", "train"]

_CELLS = math.prod(GRID)
#: Index of the word of a caption that is the colour of the last object.
_LAST_COLOUR = 12
#: Number of clips of one forward pass without gradients.
_PART = 200


@dataclass(frozen=True)
class Regime:
    """The settings that all arms share.

    Attributes:
        clips, test_clips: number of training and test clips.
        world_seed: seed of the clips.
        movers: number of the three objects that move, 1 or 2.
        steps, batch, learning_rate: of the training, whose rate falls along a cosine to nearly zero.
        weight: λ at the start; λ falls to zero linearly.
        width, layers: of the captioner.
    """

    clips: int = 2000
    test_clips: int = 2000
    world_seed: int = 2
    movers: int = 2
    steps: int = 700
    batch: int = 16
    learning_rate: float = 3e-3
    weight: float = 3.0
    width: int = 48
    layers: int = 2


class Captioner(nn.Module):
    """A Qwen2 language model that reads a clip's vision tokens and then its caption.

    Every weight is drawn from ``seed``. Nothing is pretrained, and no mask is shown.
    """

    def __init__(self, pixels: int, seed: int, width: int, layers: int) -> None:
        super().__init__()
        config = Qwen2Config(
            vocab_size=len(t5_tokenizer()),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.language = Qwen2ForCausalLM(config)
            self.eye = nn.Sequential(nn.Linear(pixels, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            self.places = nn.ParameterList([nn.Parameter(0.5 * torch.randn(n, width)) for n in GRID])
            for name, weight in self.language.named_parameters():
                if weight.dim() == 2:
                    # The family's 0.02 is made for wide models; this narrow one would have uniform attention.
                    nn.init.normal_(weight, 0.0, 0.5 if "embed_tokens" in name else weight.shape[1] ** -0.5)

    def forward(self, tubes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, T - 1, vocabulary) of the caption's tokens but the first."""
        when, down, across = self.places
        place = when[:, None, None] + down[None, :, None] + across[None, None]
        vision = self.eye(tubes.float()) + place.flatten(0, 2)
        text = self.language.get_input_embeddings()(tokens)
        seen = self.language.model(inputs_embeds=torch.cat([vision, text], 1), use_cache=False)
        return self.language.lm_head(seen.last_hidden_state[:, _CELLS:-1])


def word_positions(clips: Clips) -> torch.Tensor:
    """(N, W) int64, the place of each word of the captions in the model's sequence."""
    found = []
    for text, spans in zip(clips.texts, clips.spans, strict=True):
        starts = {int(start): i for i, (start, end) in enumerate(spans) if end > start}
        found.append([_CELLS + starts[start] for start, _ in words_of(text)])
    return torch.tensor(found)


class Targets:
    """Maps as the alignment takes them: padded rows of words, and one prior per clip."""

    def __init__(self, maps: Maps, words: torch.Tensor) -> None:
        self.options: dict[str, Any] = {
            "temperature": maps.temperature,
            "loss": maps.loss,
            "normalize": maps.normalize,
        }
        most = int(maps.kept.sum(1).max())
        self.rows = words.new_full((len(words), most), -1)
        self.row_tokens = self.rows.clone()
        self.priors: list[Any] = []
        for i, (rows, kept) in enumerate(zip(maps.rows, maps.kept, strict=True)):
            count = int(kept.sum())
            self.rows[i, :count] = words[i, kept]
            self.row_tokens[i, :count] = torch.arange(count)
            self.priors.append(SimpleNamespace(attention=rows[kept], grid=MAP_GRID))

    def distance(self, captured: Any, chosen: list[int]) -> torch.Tensor:
        return align(
            captured,
            [self.priors[i] for i in chosen],
            grid=GRID,
            row_tokens=self.row_tokens[chosen],
            **self.options,
        )


def train(clips: Clips, maps: Maps | None, seed: int, regime: Regime) -> Captioner:
    """Train a captioner from the weights of ``seed``, in the order of ``seed``.

    Args:
        clips: the training clips.
        maps: targets of the words' attention; None for plain training.
        seed: of the weights and of the order of the clips.
        regime: all other settings.
    """
    model = Captioner(clips.tubes.shape[-1], seed, regime.width, regime.layers).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=regime.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    targets = None if maps is None else Targets(maps, word_positions(clips))
    weight = AlignmentSchedule(regime.weight, "linear")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(regime.steps):
        if len(order) < regime.batch:
            order = torch.randperm(len(clips.tokens), generator=generator).tolist()
        chosen, order = order[: regime.batch], order[regime.batch :]
        tubes, tokens = clips.tubes[chosen], clips.tokens[chosen]
        for group in optimizer.param_groups:
            fall = 0.5 * (1 + math.cos(math.pi * step / regime.steps))
            group["lr"] = regime.learning_rate * (min(1.0, (step + 1) / 50) * fall + 0.005)
        if targets is None:
            loss = _caption_loss(model(tubes, tokens), tokens)
        else:
            with capture_attention(model.language, targets.rows[chosen], slice(0, _CELLS)) as captured:
                loss = _caption_loss(model(tubes, tokens), tokens)
            loss = loss + weight.at(step, regime.steps) * targets.distance(captured, chosen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def _caption_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def own_rows(model: Captioner, clips: Clips) -> torch.Tensor:
    """(N, W, S) float16: the captioner's own attention of every word, on the grid of the maps."""
    words, parts = word_positions(clips), []
    for start in range(0, len(words), _PART):
        part = slice(start, start + _PART)
        with capture_attention(model.language, words[part], slice(0, _CELLS)) as captured:
            model(clips.tubes[part], clips.tokens[part])
        parts.append(mekernels.resample_rows(captured.attention, GRID, MAP_GRID, normalize=True).half())
    return torch.cat(parts)


@torch.no_grad()
def measure(model: Captioner, clips: Clips) -> dict[str, float]:
    """How well a captioner says what the first named object does, after the object's name.

    Returns:
        ``right``: percent of the clips in which it says the right words, "moves left" or "stays still".
        ``verb``: percent of the clips with the right verb.
        ``direction``: percent of the moving objects with the right direction, given the verb.
        ``colour``: percent of the clips in which it names the last object's colour, after all words before
            it. The captioner has seen the colours in training, but not these pairs of colour and shape.
        ``distance``: between its content words' attention and the true masks, as the alignment measures it.
    """
    words = word_positions(clips)
    targets = Targets(clips.masks, words)
    found, distances = [], []
    for start in range(0, len(clips.tokens), _PART):
        chosen = list(range(start, min(start + _PART, len(clips.tokens))))
        tokens = clips.tokens[chosen]
        with capture_attention(model.language, targets.rows[chosen], slice(0, _CELLS)) as captured:
            logits = model(clips.tubes[chosen], tokens)
        found.append(logits.argmax(-1) == tokens[:, 1:])
        distances.append(float(targets.distance(captured, chosen)) * len(chosen))
    # "The red square moves left": the verb is token 3, the direction token 4.
    said = torch.cat(found).double()
    verb, direction = said[:, 2], said[:, 3]
    colour = said.gather(1, words[:, _LAST_COLOUR, None] - _CELLS - 1)
    moves = clips.tokens[:, 3] == t5_tokenizer().convert_tokens_to_ids("▁moves")
    return {
        "right": 100 * float((verb * direction).mean()),
        "verb": 100 * float(verb.mean()),
        "direction": 100 * float(direction[moves].mean()),
        "colour": 100 * float(colour.mean()),
        "distance": sum(distances) / len(clips.tokens),
    }
