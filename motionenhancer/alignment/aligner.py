"""The alignment loss: a student's captured attention against a teacher's motion prior.

Source: MotionEnhancer (CVPR 2026, arXiv 2606.06853), section 5.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import mekernels
from mekernels import align_rows

from ..files import whole_file
from ..students.keys import to_device

if TYPE_CHECKING:
    from ..priors.prior import MotionPrior
    from ..students.capture import CapturedAttention


Grid = tuple[int, int, int]

ALIGNERS = ("mlp", "identity", "pointwise", "conv")
LOSSES = ("l2", "squared", "mse", "kl")
NOT_FINITE = "captured attention holds NaN or infinity"
_METADATA = "motion_aligner"


class Aligner(nn.Module):
    """A residual map of attention rows. It starts as the identity, because its last layer starts at zero.

    Input and output of ``body`` are in units of the uniform row 1/S, so that one learning rate suits every
    grid. ``kind`` and ``width`` are those of :func:`build_aligner`.
    """

    def __init__(self, body: nn.Module, grid: Grid, kind: str, width: int) -> None:
        super().__init__()
        self.body, self.grid, self.kind, self.width = body, grid, kind, width

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(..., S) rows to (..., S) rows."""
        size = math.prod(self.grid)
        if maps.shape[-1] != size:
            raise ValueError(
                f"maps must have {size} columns, the aligner's grid {self.grid}, got {maps.shape[-1]}"
            )
        scaled = (maps * size).to(next(self.body.parameters()).dtype)
        if self.kind == "mlp":
            scaled = self.body(scaled)
        else:
            scaled = self.body(scaled.reshape(-1, 1, *self.grid)).reshape(maps.shape)
        return maps + scaled.to(maps.dtype) / size


def build_aligner(name: str, grid: Sequence[int], width: int = 256, seed: int = 0) -> nn.Module:
    """Build an aligner. It is trained together with the student and discarded afterwards.

    Args:
        name: ``"mlp"``: three linear layers along the S axis; ``"pointwise"``: three 1 x 1 x 1 convolutions;
            ``"conv"``: three 3 x 3 x 3 convolutions. All three are residual, with a last layer of zeros.
            ``"identity"``: no change.
        grid: (F, H, W) of the prior.
        width: hidden width of the perceptron; the convolutions have width / 16 channels.
        seed: seed of the first layers' weights. The global random state does not change.

    Raises:
        ValueError: the name is unknown, the grid is not three positive numbers, or the width is below 1.

    >>> maps = torch.rand(1, 2, 24)
    >>> torch.equal(build_aligner("mlp", (2, 3, 4))(maps), maps)
    True
    """
    if name not in ALIGNERS:
        raise ValueError(f"name must be one of {ALIGNERS}, got {name!r}")
    shape = _checked_grid("grid", grid)
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if name == "identity":
        return nn.Identity()
    outer, inner = (math.prod(shape), width) if name == "mlp" else (1, max(1, width // 16))

    def layer(inputs: int, outputs: int) -> nn.Linear | nn.Conv3d:
        if name == "mlp":
            return nn.Linear(inputs, outputs)
        return nn.Conv3d(inputs, outputs, 3 if name == "conv" else 1, padding="same")

    # Seeding this generator alone leaves those of other devices untouched, which torch.manual_seed would not.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        # The order in which layers are made decides which random weights each gets.
        last, first, middle = layer(inner, outer), layer(outer, inner), layer(inner, inner)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        return Aligner(nn.Sequential(first, nn.GELU(), middle, nn.GELU(), last), shape, name, width)


def save_aligner(aligner: nn.Module, path: str | Path) -> None:
    """Write an aligner of :func:`build_aligner` to a safetensors file that :func:`load_aligner` reads.

    The file appears complete, by rename. Its folder is created.

    Raises:
        ValueError: the module is the identity, which has nothing to save, or not an aligner.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "aligner.safetensors"
    >>> save_aligner(build_aligner("conv", (2, 3, 4)), file)
    >>> load_aligner(file).grid
    (2, 3, 4)
    """
    if not isinstance(aligner, Aligner):
        raise ValueError(f"aligner must be of build_aligner, with weights, got {type(aligner).__name__}")
    about = {"name": aligner.kind, "grid": list(aligner.grid), "width": aligner.width}
    weights = {name: value.detach().cpu().contiguous() for name, value in aligner.state_dict().items()}
    with whole_file(path) as temporary:
        save_file(weights, temporary, {_METADATA: json.dumps(about)})


def load_aligner(path: str | Path) -> Aligner:
    """Read an aligner that :func:`save_aligner`, or a run with ``--save_aligner``, wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an aligner.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"aligner {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_METADATA])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        aligner = build_aligner(about["name"], tuple(about["grid"]), about["width"])
        aligner.load_state_dict(weights)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"aligner {path}: not a file that save_aligner wrote ({error})") from error
    assert isinstance(aligner, Aligner)
    return aligner


def align(
    captured: CapturedAttention | torch.Tensor,
    prior: MotionPrior | Sequence[MotionPrior | None],
    *,
    grid: Sequence[int] | Sequence[Sequence[int]] | None = None,
    row_tokens: torch.Tensor | None = None,
    aligner: nn.Module | None = None,
    loss: str = "l2",
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    normalize: bool = True,
    check_finite: bool = True,
) -> torch.Tensor:
    """Return the distance of captured attention from the prior, a scalar to add to the training loss.

    For each sample, the rows of each teacher token are averaged, resampled to the prior's grid and scaled to
    sum to one, like the prior's rows. Then the aligner is applied. The distance is computed for each row and
    averaged over the rows of a sample, then over the samples that have any row.

    Args:
        captured: the result of :func:`motionenhancer.students.capture.capture_attention`, or its attention:
            (B, R, C); or (B, L, H, R, C), where every layer's and head's map is compared and the distances
            are averaged.
        prior: one prior for a batch of one, or a sequence of B; None for a sample that is not aligned.
        grid: (F, H, W) of the student's vision tokens, one for all samples or a sequence of B. A sample's
            columns are the first F * H * W; the rest is padding. The default is the prior's grid, which needs
            C = S.
        row_tokens: (B, R) int64, index of the prior's kept token for each row, -1 = padding. By default row i
            belongs to token i, and rows captured as padding belong to no token.
        aligner: from :func:`build_aligner`; the identity by default.
        loss: ``"l2"``: the L2 norm of a row's difference, as in eq. 15; ``"squared"``: its square, as in
            eq. 20; ``"mse"``: its mean square; ``"kl"``: the divergence KL(prior row, student row), with
            the student's entries at least 1e-8 and scaled to sum to one.
        weights: B factors on the samples' distances, such as confidences. The mean is still over the number
            of samples, so a small weight lowers the loss and does not raise the share of other samples.
        temperature: the prior's rows are raised to the power 1 / temperature before they are scaled. Below 1
            they become sharper: a mean over many layers and heads is more diffuse than each map.
        normalize: whether rows are scaled to sum to one. False compares the unscaled attention, as in eqs. 22
            and 23; then the loss also pulls the attention mass that a word gives to the video.
        check_finite: look for NaN and infinity in ``captured``, which waits for its device. Without it,
            non-finite entries that are read make the result NaN or infinite.

    Returns:
        A float32 scalar (float64 for float64 attention). Without any aligned row it is zero. It still depends
        on the captured attention then, so that ``backward`` works.

    Raises:
        ValueError: a shape, grid, token index or name does not fit; a temperature is not above 0;
            ``normalize=False`` with a temperature or with ``"kl"``;
            NaN or infinity in the captured attention (see ``check_finite``) or in a prior.

    >>> from types import SimpleNamespace
    >>> teacher = SimpleNamespace(attention=torch.rand(2, 24).half(), grid=(2, 3, 4))
    >>> float(align(teacher.attention.float()[None], teacher))
    0.0
    """
    attention = captured if isinstance(captured, torch.Tensor) else captured.attention
    if attention.dim() not in (3, 5):
        raise ValueError(
            "captured attention must be (batch, rows, columns), or with reduce='none' "
            f"(batch, layers, heads, rows, columns), got {tuple(attention.shape)}"
        )
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a number above 0, got {temperature}")
    check_normalize(normalize, loss, temperature)
    batch, count, width = attention.shape[0], *attention.shape[-2:]
    priors: list[MotionPrior | None] = list(prior) if isinstance(prior, Sequence) else [prior]
    if len(priors) != batch:
        raise ValueError(f"prior must have one entry per sample ({batch}), got {len(priors)}")
    if weights is not None and len(weights) != batch:
        raise ValueError(f"weights must have one entry per sample ({batch}), got {len(weights)}")
    grids = _grids(grid, priors, width)
    tokens = _row_tokens(captured, row_tokens, priors, batch, count)
    if check_finite and not torch.isfinite(attention).all():
        raise ValueError(NOT_FINITE)
    groups: dict[tuple[Grid, Grid], list[_Pair]] = {}
    for sample, read in ((i, one) for i in range(batch) for one in attention[i].reshape(-1, count, width)):
        teacher, shape = priors[sample], grids[sample]
        if teacher is None or shape is None:
            continue
        maps = _token_rows(read[:, : math.prod(shape)], tokens[sample])
        if maps is None:
            continue
        rows, kept = maps
        target = _teacher_rows(teacher, kept, sample, temperature, check_finite)
        target = to_device(target, attention.device)
        factor = 1.0 if weights is None else weights[sample]
        groups.setdefault((shape, teacher.grid), []).append((rows, target, factor))
    if not groups:
        return attention.sum() * 0.0
    plain = aligner is None or isinstance(aligner, nn.Identity)
    terms = []
    for (shape, wanted), pairs in groups.items():
        if plain and loss == "l2" and normalize:
            terms += _unaligned(pairs, shape, wanted)
        else:
            terms += _aligned(pairs, shape, wanted, aligner, loss, normalize)
    return torch.stack(terms).sum() / sum(map(len, groups.values()))


#: Rows of one sample's tokens, the prior's, and the factor on their distance.
_Pair = tuple[torch.Tensor, torch.Tensor, float]


def _unaligned(pairs: Sequence[_Pair], shape: Grid, wanted: Grid) -> list[torch.Tensor]:
    """L2 distances that sum to the distances of the samples, without a resampled map."""
    alike = len({target.dtype for _, target, _ in pairs}) == 1 and all(factor == 1.0 for *_, factor in pairs)
    if len(pairs) == 1 or not alike:
        terms: list[torch.Tensor] = []
        for rows, target, factor in pairs:
            term = align_rows(rows[None], target[None], shape, wanted)
            terms.append(term if factor == 1.0 else term * factor)
        return terms
    counts = [len(rows) for rows, _, _ in pairs]
    mask = to_device(torch.arange(max(counts)) < torch.tensor(counts)[:, None], pairs[0][0].device)
    students = pad_sequence([rows for rows, _, _ in pairs], batch_first=True)
    teachers = pad_sequence([target for _, target, _ in pairs], batch_first=True)
    return [align_rows(students, teachers, shape, wanted, mask) * len(pairs)]


def _aligned(
    pairs: Sequence[_Pair],
    shape: Grid,
    wanted: Grid,
    aligner: nn.Module | None,
    loss: str,
    normalize: bool,
) -> list[torch.Tensor]:
    """One distance per sample. The aligner sees all rows at once, so its gradients are computed once."""
    joined = torch.cat([rows for rows, _, _ in pairs])[None]
    student = mekernels.resample_rows(joined, shape, wanted, normalize=normalize)
    scale = _sum_to_one if normalize else torch.Tensor.float
    student = student if aligner is None else aligner(student)
    parts = student.split([len(rows) for rows, _, _ in pairs], dim=1)
    return [
        _distance(part, scale(target)[None].to(part.dtype), loss) * factor
        for part, (_, target, factor) in zip(parts, pairs, strict=True)
    ]


def _checked_grid(name: str, grid: Sequence[int]) -> Grid:
    shape = tuple(grid)
    if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"{name} must be three positive integers (frames, height, width), got {grid!r}")
    return shape


def _grids(
    grid: Sequence[int] | Sequence[Sequence[int]] | None, priors: Sequence[MotionPrior | None], width: int
) -> list[Grid | None]:
    """The student's grid of each sample; None if it has no prior."""
    if grid is None:
        for teacher in priors:
            if teacher is not None and teacher.attention.shape[1] != width:
                raise ValueError(
                    f"captured attention has {width} columns, but the prior has "
                    f"{teacher.attention.shape[1]}: pass the student's grid=(frames, height, width)"
                )
        return [None if teacher is None else _checked_grid("prior.grid", teacher.grid) for teacher in priors]
    each: list[Any] = [grid] * len(priors) if _is_grid(grid) else list(grid)
    if len(each) != len(priors):
        raise ValueError(f"grid must be one grid or one per sample ({len(priors)}), got {len(each)}")
    shapes = [None if t is None else _checked_grid("grid", g) for g, t in zip(each, priors, strict=True)]
    for shape in shapes:
        if shape is not None and math.prod(shape) > width:
            raise ValueError(
                f"grid {shape} has {math.prod(shape)} tokens, more than the {width} captured columns"
            )
    return shapes


def _is_grid(grid: Sequence) -> bool:
    return len(grid) > 0 and all(isinstance(entry, int) for entry in grid)


def _row_tokens(
    captured: CapturedAttention | torch.Tensor,
    row_tokens: torch.Tensor | None,
    priors: Sequence[MotionPrior | None],
    batch: int,
    count: int,
) -> list[list[int]]:
    """The prior's token index of each sample and row; -1 for none."""
    if row_tokens is None:
        rows = getattr(captured, "rows", None)
        places = [[0] * count] * batch if rows is None else rows.tolist()
        tokens = [[-1 if place < 0 else row for row, place in enumerate(listed)] for listed in places]
        what = "numbers of the captured rows (row_tokens is None)"
    else:
        if row_tokens.dtype != torch.int64 or row_tokens.shape != (batch, count):
            found = f"{tuple(row_tokens.shape)} {row_tokens.dtype}"
            raise ValueError(f"row_tokens must be ({batch}, {count}) int64, got {found}")
        tokens, what = row_tokens.tolist(), "row_tokens"
    for listed, teacher in zip(tokens, priors, strict=True):
        kept = 0 if teacher is None else teacher.attention.shape[0]
        highest = max(listed, default=-1)
        if teacher is not None and highest >= kept:
            raise ValueError(f"{what} must be below the prior's {kept} kept tokens, got {highest}")
    return tokens


def _token_rows(maps: torch.Tensor, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Average the (R, C) rows of each token: (T, C) and the T token indices on the CPU, ascending."""
    chosen = [row for row, token in enumerate(tokens) if token >= 0]
    if not chosen:
        return None
    counts = sorted(Counter(tokens[row] for row in chosen).items())
    place = {token: index for index, (token, _) in enumerate(counts)}
    rows, index, divisors = (
        to_device(torch.tensor(values), maps.device)
        for values in (chosen, [place[tokens[row]] for row in chosen], [[count] for _, count in counts])
    )
    total = maps.new_zeros(len(counts), maps.shape[1]).index_add(0, index, maps.index_select(0, rows))
    return total / divisors, torch.tensor(list(place))


def _teacher_rows(
    teacher: MotionPrior, kept: torch.Tensor, sample: int, temperature: float, check_finite: bool
) -> torch.Tensor:
    """The chosen rows of a prior in their stored dtype, at most float32; sharpened rows are float32."""
    if teacher.attention.dim() != 2 or teacher.attention.shape[1] != math.prod(teacher.grid):
        raise ValueError(
            f"the prior of sample {sample} must be (tokens, {math.prod(teacher.grid)}) for its grid "
            f"{teacher.grid}, got {tuple(teacher.attention.shape)}"
        )
    rows = teacher.attention[kept.to(teacher.attention.device)]
    if (check_finite or rows.device.type == "cpu") and not torch.isfinite(rows).all():
        raise ValueError(f"the prior of sample {sample} holds NaN or infinity")
    if temperature != 1.0:
        peak = rows.float().amax(dim=-1, keepdim=True)
        return (rows.float() / torch.where(peak == 0, 1.0, peak)).clamp(min=0) ** (1 / temperature)
    return rows.float() if rows.dtype == torch.float64 else rows


def _sum_to_one(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.float()
    mass = rows.sum(dim=-1, keepdim=True)
    return rows / torch.where(mass == 0, 1.0, mass)


def check_normalize(normalize: bool, loss: str, temperature: float) -> None:
    """Refuse options that need rows that sum to one.

    Raises:
        ValueError: names the option that was given beside ``normalize=False``.
    """
    if not normalize and (loss == "kl" or temperature != 1.0):
        what = "alignment_loss 'kl'" if loss == "kl" else f"prior_temperature {temperature}"
        raise ValueError(
            f"normalize_rows must be true with {what}, which needs rows that sum to one; got false"
        )


def _distance(student: torch.Tensor, teacher: torch.Tensor, loss: str) -> torch.Tensor:
    if loss == "l2":
        return mekernels.row_l2_loss(student, teacher)
    if loss == "squared":
        return (student - teacher).square().sum(dim=-1).mean()
    if loss == "mse":
        return (student - teacher).square().mean()
    floored = student.clamp(min=1e-8)
    student_log = (floored / floored.sum(dim=-1, keepdim=True)).log()
    return (torch.xlogy(teacher, teacher) - teacher * student_log).sum(dim=-1).mean()
