"""vLLM as the engine: it gets the same requests as transformers, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from ..data.clip import Clip
from ..data.video import Video
from ..files import read_json
from ..students.chat import render
from ..students.families import interval, student_family
from ..students.family import StudentFamily, metadata
from ..students.layout import Encoded
from ..students.load import base_folder, load_processor
from .generate import Engine, conversation, encode_request

#: Families whose answers by vLLM were compared with those by transformers, and are the same.
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "internvl")
#: Settings of generation that greedy answers of one sequence do not depend on, or that are handed over.
_READ = frozenset(
    str.split(
        "bos_token_id eos_token_id pad_token_id do_sample temperature top_p top_k min_p typical_p max_length "
        "max_new_tokens repetition_penalty transformers_version use_cache cache_implementation "
        "output_attentions output_hidden_states return_dict_in_generate _from_model_config"
    )
)


class Request(NamedTuple):
    """The input of vLLM, and the tokens that vLLM must make of it.

    id: id of the question.
    tokens: input tokens of transformers, including the tokens of the video.
    late: whether transformers and vLLM give the words after the clip different positions.
    prompt: text, the decoded frames and the options of their processor.
    """

    id: str
    tokens: list[int]
    late: bool
    prompt: dict[str, Any]


def check_vllm(student: Path, family: StudentFamily) -> None:
    """Refuse students that vLLM would answer differently from transformers, or not at all.

    Raises:
        ValueError: the family was not compared, there are adapters, or there are several processes.
    """
    if family.name not in FAMILIES:
        raise ValueError(
            f"--engine vllm supports {', '.join(FAMILIES)}, got {family.name}: it is not known whether vLLM "
            "gives its answers as transformers does; leave --engine out"
        )
    if base_folder(student) != student:
        raise ValueError(
            f"--engine vllm: {student} holds adapters; merge them into the model, as train's "
            "--lora_merge does"
        )
    if PartialState().num_processes > 1:
        raise ValueError(
            f"--engine vllm must run in one process, got {PartialState().num_processes}; start it without "
            "accelerate launch or torchrun"
        )


def vllm_engine(
    student: Path, dtype: str | None, *, max_pixels: int | None, max_new_tokens: int, **options: Any
) -> Engine:
    """Load a student into vLLM. The engine raises ValueError if vLLM makes other tokens than transformers.

    Args:
        student: folder of a whole model.
        dtype: of the weights; None as stored.
        max_pixels, max_new_tokens: as of :func:`transformers_engine`.
        options: further options of `vllm.LLM`.

    Raises:
        ValueError: settings of generation that vLLM does not have, or weights whose type is not stored.
    """
    config = read_json(student / "config.json")
    dtype = dtype or config.get("dtype") or config.get("torch_dtype")
    if dtype is None:
        raise ValueError(f"--engine vllm: {student / 'config.json'} names no dtype; give --dtype")
    sampling = _sampling(student, max_new_tokens)
    processor = load_processor(student)
    from vllm import LLM, SamplingParams

    # By itself vLLM takes float32 weights as half precision.
    llm = LLM(model=str(student), dtype=dtype, limit_mm_per_prompt={"video": 1, "image": 0}, **options)
    family = student_family(config["model_type"])
    seconds = None
    if family.name in ("qwen2_vl", "qwen2_5_vl"):
        seconds = config["vision_config"].get("tokens_per_second", 1.0)
    return Engine(
        partial(vllm_request, family, processor, max_pixels=max_pixels, tokens_per_second=seconds),
        partial(_answers, llm, SamplingParams(**sampling), processor),
    )


def vllm_request(
    family: StudentFamily,
    processor: Any,
    id: str,
    prompt: str,
    video: Video,
    *,
    clip: Path | Clip | None = None,
    max_pixels: int | None = None,
    tokens_per_second: float | None = None,
) -> Request:
    """The request of :func:`encode_request`, and the same as vLLM takes it.

    Args, Raises: as :func:`encode_request`.
        tokens_per_second: steps of the model's positions in time; None where frames have no such positions.
    """
    encoded = encode_request(family, processor, id, prompt, video, clip=clip, max_pixels=max_pixels)
    sample = conversation(id, prompt, clip)
    rendered = render(processor, sample, family.template(processor, sample))
    shown, options = family.prepared(processor, sample, video, max_pixels)
    # Qwen2.5-VL reads its seconds between two frames from the rate at which a clip was sampled.
    about = {**metadata(shown), "total_num_frames": len(shown.frames) * interval(video)}
    return Request(
        id,
        _of_one_kind(processor, encoded.input_ids.tolist()),
        tokens_per_second is not None and _is_late(encoded, tokens_per_second),
        {
            "prompt": rendered.text[: rendered.answer_spans[0][0]],
            "multi_modal_data": {"video": [(shown.frames, {**about, "do_sample_frames": False})]},
            "mm_processor_kwargs": options,
        },
    )


def _is_late(encoded: Encoded, tokens_per_second: float) -> bool:
    """Whether a clip has more steps in time than in space: transformers 5 counts those in space only."""
    frames, *sides = encoded.layout.videos[0].grid
    seconds = encoded.vision_inputs.get("second_per_grid_ts")
    step = 1.0 if seconds is None else float(seconds[0]) * tokens_per_second
    return int((frames - 1) * step) >= max(sides)


def _of_one_kind(processor: Any, tokens: Sequence[int]) -> list[int]:
    """InternVL: in the places of a video vLLM has the token of images, which stands for the same vectors."""
    video, image = processor.tokenizer.convert_tokens_to_ids([processor.video_token, processor.image_token])
    return [video if token == image else token for token in tokens]


def _answers(llm: Any, sampling: Any, processor: Any, requests: Sequence[Request]) -> list[str]:
    late = [request.id for request in requests if request.late]
    if late:
        raise ValueError(
            f"--engine vllm: the clip of question {late[0]!r} is too long: vLLM and transformers "
            "number the positions after it differently; leave --engine out"
        )
    found = llm.generate([request.prompt for request in requests], sampling, use_tqdm=False)
    for request, output in zip(requests, found, strict=True):
        tokens = _of_one_kind(processor, output.prompt_token_ids)
        if tokens != request.tokens:
            raise ValueError(
                f"--engine vllm: question {request.id!r} has {len(tokens)} tokens in vLLM and "
                f"{len(request.tokens)} in transformers, and both must be the same: this version of vLLM "
                "prepares clips differently; leave --engine out"
            )
    said = [list(output.outputs[0].token_ids) for output in found]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return processor.tokenizer.batch_decode(said, **options)


def _sampling(student: Path, max_new_tokens: int) -> dict[str, Any]:
    """The model's own generation settings with sampling off, as options of `vllm.SamplingParams`."""
    from transformers import AutoConfig, GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(student, local_files_only=True)
    except OSError:
        own = GenerationConfig.from_model_config(AutoConfig.from_pretrained(student, local_files_only=True))
    if unread := sorted(own.to_diff_dict().keys() - _READ):
        raise ValueError(
            f"--engine vllm: {student} generates with {', '.join(unread)}, which vLLM does not have; leave "
            "--engine out"
        )
    ends = own.eos_token_id
    return {
        "temperature": 0.0,
        "max_tokens": max_new_tokens,
        "repetition_penalty": own.repetition_penalty or 1.0,
        # transformers ends at these tokens only, vLLM by itself at the tokenizer's too.
        "ignore_eos": True,
        "stop_token_ids": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "detokenize": False,
    }
