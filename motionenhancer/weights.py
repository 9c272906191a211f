"""Load weights of students, teachers and checkpoints, compute their ids, and refuse incomplete folders."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from .data.digests import file_digest
from .files import too_deep

#: Buffers that older libraries saved and newer ones compute.
_COMPUTED = ("position_ids", "inv_freq")


def load_whole(model_class: Any, folder: str | Path, **options: Any) -> Any:
    """Load a model of transformers or diffusers from safetensors on this disk.

    Args:
        model_class: class of the model.
        folder: folder of its configuration and all of its weights.
        **options: other options of `from_pretrained`.

    Raises:
        ValueError: see `check_loaded`; a file of weights is damaged, or a weight is NaN or infinite.
    """
    options |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        model, info = model_class.from_pretrained(folder, **options)
    except (SafetensorError, OSError):
        # Neither library names the file that is damaged.
        for _ in read_weights(folder, content=False):
            pass
        raise
    except (TypeError, ArithmeticError, IndexError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if isinstance(error, RecursionError) and (deep := too_deep(folder)):
            raise ValueError(f"{deep}: not valid JSON (nested too deeply)") from None
        # A configuration that makes no model ends in an error of any type, by class.
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{folder}: its json files, such as config.json, and weights make no model ({said})"
        ) from error
    check_loaded(folder, info)
    if wrong := not_finite(model.named_parameters()):
        raise ValueError(f"{folder}: the weight {wrong} is NaN or infinite; download or save the model again")
    return model


def read_weights(folder: str | Path, *, content: bool = True) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield names and tensors of a folder's safetensors files; with `content` false, only check the files.

    Raises:
        ValueError: names the file that cannot be read.
    """
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys() if content else ():
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error


def refuse_weights(models: Iterable[torch.nn.Module | None], step: int, processes: int) -> None:
    """Stop a run before it saves non-finite weights. Every process must call this.

    Args:
        models: models of the run after `step` steps.
        processes: number of processes of the run.

    Raises:
        FloatingPointError: in all processes; names the first non-finite weight.
    """
    # Each process looks at the weights that it holds: DeepSpeed and FSDP2 shard them.
    held = (
        (name, getattr(parameter, "ds_tensor", parameter).detach())
        for model in models
        if model is not None
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )
    wrong = not_finite((name, w.to_local() if isinstance(w, DTensor) else w) for name, w in held)
    found = [name for name in (gather_object([wrong]) if processes > 1 else [wrong]) if name]
    if found:
        raise FloatingPointError(
            f"the weight {found[0]} is NaN or infinite after step {step}; it is not saved. A smaller "
            "--learning_rate may help"
        )


@contextmanager
def saving(folder: str | Path) -> Iterator[None]:
    """Raise an error that names the folder if a model or its optimizer cannot be saved, as on a full disk.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # On a full disk torch.save only says that its archive has the wrong length.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise OSError(f"{folder}: cannot be saved ({' '.join(str(error).split())})") from error


def not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The name of the first weight that holds NaN or infinity; empty if there is none.

    >>> not_finite([("a", torch.zeros(2)), ("b", torch.tensor([0.0, torch.nan]))])
    'b'
    """
    for name, weight in weights:
        # No mask of the whole weight is built: a model's largest one has billions of entries.
        if weight.is_floating_point() and weight.element_size() > 1 and weight.numel() and not weight.is_meta:
            low, high = weight.detach().aminmax()
            if not bool((low.isfinite() & high.isfinite()).all()):
                return name
    return ""


def check_moments(optimizer: Any, checkpoint: str | Path) -> None:
    """Refuse the moments that Adam loaded from a checkpoint if some are missing or have wrong shapes.

    With other shapes a step of torch would write outside of its memory.

    Raises:
        ValueError: names the checkpoint, and the missing moment or the shapes.
    """
    if not isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.Adam | torch.optim.AdamW):
        return
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state and name not in state:
                raise ValueError(f"{checkpoint}: the optimizer's state of a weight has no {name}")
            if state and state[name].shape != parameter.shape:
                raise ValueError(
                    f"{checkpoint}: the optimizer's {name} has shape {tuple(state[name].shape)}, its weight "
                    f"{tuple(parameter.shape)}: not the optimizer of this run"
                )


def check_loaded(folder: str | Path, info: Mapping[str, Any]) -> None:
    """Refuse a model if its folder lacks some of its weights or has unexpected weights.

    transformers and diffusers only warn: they fill missing weights with random numbers and drop unexpected
        ones.

    Args:
        folder: folder of the loaded model.
        info: the loading info that `from_pretrained(..., output_loading_info=True)` returned.

    Raises:
        ValueError: names the folder and the first of the weights.

    >>> check_loaded("student", {"missing_keys": ["head.weight"], "unexpected_keys": []})
    Traceback (most recent call last):
    ValueError: student: 1 weight is missing (head.weight); download or save the model again
    """
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith(_COMPUTED)]
    faults = [*_said("missing", info["missing_keys"]), *_said("not of this model", unexpected)]
    if faults:
        raise ValueError(f"{folder}: {' and '.join(faults)}; download or save the model again")


def _said(what: str, keys: Collection[str]) -> list[str]:
    if not keys:
        return []
    count = f"{len(keys)} weight{' is' if len(keys) == 1 else 's are'} {what}"
    return [f"{count} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"]


def student_digest(folder: str | Path) -> str:
    """An id of a student's weights and settings: 32 hexadecimal digits.

    Only the files of the checkpoint itself are read. Other runs below the folder, and reports, do not change
    the id.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        parts = file.suffix in (".json", ".safetensors", ".jinja", ".txt") and file.is_file()
        if not parts or file.name in ("motion_report.json", "trainer_state.json"):
            continue
        digest.update(f"{file.name}\0{file_digest(file)}\0".encode())
    return digest.hexdigest()[:32]
