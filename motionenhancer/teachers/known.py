"""Which fields of a teacher's configuration files are understood; every other one is refused by name.

A field that changes what a model computes, and that this package does not know, would give wrong priors
without a word. Each field below is known for one of three reasons: the class that runs, of diffusers or
transformers, reads it; the family's file reads it; or it changes nothing in a prior. Some fields are known at
certain values only.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .schedule import FLOW_TIMESTEPS

#: Fields of the parts of a teacher, by the part's name.
Parts = dict[str, dict[str, Any]]

#: Accepted values of a field by name; None accepts every value.
Fields = Mapping[str, tuple[Any, ...] | None]

_OFF = (False, None)


def _fields(any_value: str, **certain: tuple[Any, ...]) -> Fields:
    return {**dict.fromkeys(any_value.split()), **certain}


_BETAS = "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr"
#: ᾱ and the timesteps come from diffusers' class with all of these applied, and its step clips nothing.
_DDIM = _fields(
    f"{_BETAS} snr_shift_scale timestep_spacing steps_offset set_alpha_to_one "
    "clip_sample clip_sample_range sample_max_value",
    prediction_type=("v_prediction", "epsilon"),
)
#: Of a flow's scheduler only the shift is read, as the levels are ours and steps are Euler's: what else moves
#: the levels or changes the step must be off. Betas, the solver's order and its kind play no part.
_FLOW = _fields(
    "beta_start beta_end beta_schedule trained_betas timestep_spacing steps_offset time_shift_type",
    num_train_timesteps=(FLOW_TIMESTEPS,),
    use_dynamic_shifting=_OFF,
    use_karras_sigmas=_OFF,
    use_exponential_sigmas=_OFF,
    use_beta_sigmas=_OFF,
    shift_terminal=(None,),
)
#: Fields that shift the levels by the clip, for a family that reads them.
_DYNAMIC = {
    **_fields("shift base_shift max_shift base_image_seq_len max_image_seq_len shift_terminal"),
    "use_dynamic_shifting": (True, False),
    "time_shift_type": ("exponential",),
}
_FLOW_MULTISTEP = {
    **_FLOW,
    **_fields(
        "flow_shift solver_order solver_type lower_order_final dynamic_thresholding_ratio sample_max_value",
        prediction_type=("flow_prediction",),
        use_flow_sigmas=(True,),
        thresholding=_OFF,
        rescale_betas_zero_snr=_OFF,
        final_sigmas_type=("zero",),
    ),
}
#: transformers' own class reads them all. The second half is what older versions wrote and nothing reads.
_T5 = _fields(
    "vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads relative_attention_num_buckets "
    "relative_attention_max_distance dropout_rate layer_norm_epsilon initializer_factor feed_forward_proj "
    "dense_act_fn is_gated_act is_encoder_decoder use_cache pad_token_id eos_token_id decoder_start_token_id "
    "classifier_dropout tie_word_embeddings architectures model_type dtype torch_dtype transformers_version "
    "output_past scalable_attention scale_decoder_outputs tokenizer_class n_positions task_specific_params "
    "id2label label2id problem_type return_dict output_hidden_states",
    is_decoder=_OFF,
    chunk_size_feed_forward=(0,),
)
#: Fields that transformers' classes of decoders and of CLIP read.
_TRANSFORMER = _fields(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act "
    "max_position_embeddings initializer_range attention_dropout pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings architectures model_type dtype torch_dtype transformers_version id2label label2id "
    "problem_type return_dict output_hidden_states is_encoder_decoder use_cache",
    chunk_size_feed_forward=(0,),
)
_DECODER = _fields("num_key_value_heads head_dim rms_norm_eps attention_bias rope_parameters rope_theta")

#: Class → its fields.
KNOWN: dict[str, Fields] = {
    "CogVideoXPipeline": _fields("tokenizer text_encoder vae transformer scheduler"),
    "CogVideoXVideoToVideoPipeline": _fields("tokenizer text_encoder vae transformer scheduler"),
    "CogVideoXImageToVideoPipeline": _fields("tokenizer text_encoder vae transformer scheduler"),
    "WanPipeline": _fields(
        "tokenizer text_encoder vae transformer transformer_2 scheduler boundary_ratio",
        expand_timesteps=(True, False, None),
    ),
    "CogVideoXTransformer3DModel": _fields(
        "num_attention_heads attention_head_dim in_channels out_channels flip_sin_to_cos freq_shift "
        "time_embed_dim text_embed_dim num_layers dropout attention_bias sample_width sample_height "
        "sample_frames patch_size patch_size_t temporal_compression_ratio max_text_seq_length activation_fn "
        "timestep_activation_fn norm_elementwise_affine norm_eps spatial_interpolation_scale "
        "temporal_interpolation_scale patch_bias ofs_embed_dim",
        use_rotary_positional_embeddings=(True, False),
        use_learned_positional_embeddings=(True, False),
    ),
    "WanTransformer3DModel": _fields(
        "patch_size num_attention_heads attention_head_dim in_channels out_channels text_dim freq_dim "
        "ffn_dim num_layers cross_attn_norm eps rope_max_seq_len",
        qk_norm=("rms_norm_across_heads",),
        image_dim=(None,),
        added_kv_proj_dim=(None,),
        pos_embed_seq_len=(None,),
    ),
    "LTXPipeline": _fields("tokenizer text_encoder vae transformer scheduler"),
    # Fields of sound, of rewritten prompts and of a clip's length do not change a prior.
    "LTX2Pipeline": _fields(
        "tokenizer text_encoder connectors vae transformer scheduler audio_vae vocoder processor "
        "prompt_enhancer duration_head"
    ),
    "LTX2VideoTransformer3DModel": _fields(
        "in_channels out_channels num_attention_heads attention_head_dim cross_attention_dim "
        "vae_scale_factors pos_embed_max_pos base_height base_width gated_attn cross_attn_mod "
        "audio_in_channels audio_out_channels audio_patch_size audio_patch_size_t audio_num_attention_heads "
        "audio_attention_head_dim audio_cross_attention_dim audio_scale_factor audio_pos_embed_max_pos "
        "audio_sampling_rate audio_hop_length audio_gated_attn audio_cross_attn_mod num_layers "
        "activation_fn norm_elementwise_affine norm_eps caption_channels attention_bias "
        "attention_out_bias rope_theta rope_double_precision causal_offset timestep_scale_multiplier "
        "cross_attn_timestep_scale_multiplier use_prompt_embeddings perturbed_attn ff_bias audio_ff_bias "
        "use_prompt_adaln_single",
        patch_size=(1,),
        patch_size_t=(1,),
        qk_norm=("rms_norm_across_heads",),
        rope_type=("interleaved", "split"),
        use_keyframes_abs_pos_embedding=_OFF,
    ),
    "LTX2TextConnectors": _fields(
        "caption_channels text_proj_in_factor video_connector_num_attention_heads "
        "video_connector_attention_head_dim video_connector_num_layers "
        "video_connector_num_learnable_registers video_gated_attn audio_connector_num_attention_heads "
        "audio_connector_attention_head_dim audio_connector_num_layers "
        "audio_connector_num_learnable_registers audio_gated_attn connector_rope_base_seq_len rope_theta "
        "rope_double_precision causal_temporal_positioning rope_type per_modality_projections "
        "video_hidden_dim audio_hidden_dim proj_bias"
    ),
    "AutoencoderKLLTX2Video": _fields(
        "out_channels latent_channels block_out_channels down_block_types decoder_block_out_channels "
        "layers_per_block decoder_layers_per_block spatio_temporal_scaling decoder_spatio_temporal_scaling "
        "decoder_inject_noise downsample_type upsample_type upsample_residual upsample_factor "
        "timestep_conditioning patch_size patch_size_t resnet_norm_eps scaling_factor encoder_causal "
        "decoder_causal encoder_spatial_padding_mode decoder_spatial_padding_mode "
        "spatial_compression_ratio temporal_compression_ratio",
        in_channels=(3,),
    ),
    "LTXVideoTransformer3DModel": _fields(
        "in_channels out_channels num_attention_heads attention_head_dim cross_attention_dim num_layers "
        "activation_fn norm_elementwise_affine norm_eps caption_channels attention_bias attention_out_bias",
        patch_size=(1,),
        patch_size_t=(1,),
        qk_norm=("rms_norm_across_heads",),
    ),
    "AutoencoderKLLTXVideo": _fields(
        "out_channels latent_channels block_out_channels down_block_types decoder_block_out_channels "
        "layers_per_block decoder_layers_per_block spatio_temporal_scaling decoder_spatio_temporal_scaling "
        "decoder_inject_noise downsample_type upsample_residual upsample_factor timestep_conditioning "
        "patch_size patch_size_t resnet_norm_eps scaling_factor encoder_causal decoder_causal "
        "spatial_compression_ratio temporal_compression_ratio",
        in_channels=(3,),
    ),
    "HunyuanVideoPipeline": _fields(
        "tokenizer tokenizer_2 text_encoder text_encoder_2 vae transformer scheduler"
    ),
    "HunyuanVideoTransformer3DModel": _fields(
        "in_channels out_channels num_attention_heads attention_head_dim num_layers num_single_layers "
        "num_refiner_layers mlp_ratio patch_size patch_size_t text_embed_dim pooled_projection_dim "
        "rope_theta rope_axes_dim",
        qk_norm=("rms_norm",),
        guidance_embeds=(True, False),
        image_condition_type=(None,),
    ),
    "HunyuanVideo15Pipeline": _fields(
        "tokenizer tokenizer_2 text_encoder text_encoder_2 vae transformer scheduler guider"
    ),
    # target_size is that of the clips; nothing reads task_type.
    "HunyuanVideo15Transformer3DModel": _fields(
        "in_channels out_channels num_attention_heads attention_head_dim num_layers num_refiner_layers "
        "mlp_ratio patch_size patch_size_t text_embed_dim text_embed_2_dim image_embed_dim rope_theta "
        "rope_axes_dim target_size task_type",
        qk_norm=("rms_norm",),
        use_meanflow=_OFF,
    ),
    "AutoencoderKLHunyuanVideo15": _fields(
        "out_channels latent_channels block_out_channels layers_per_block scaling_factor "
        "spatial_compression_ratio temporal_compression_ratio downsample_match_channel "
        "upsample_match_channel",
        in_channels=(3,),
    ),
    # A prior has a guidance setting of its own.
    "ClassifierFreeGuidance": _fields(
        "guidance_scale guidance_rescale use_original_formulation start stop enabled"
    ),
    "AutoencoderKLHunyuanVideo": _fields(
        "out_channels latent_channels down_block_types up_block_types block_out_channels layers_per_block "
        "act_fn norm_num_groups scaling_factor spatial_compression_ratio temporal_compression_ratio "
        "mid_block_add_attention",
        in_channels=(3,),
    ),
    # invert_scale_latents is for the first frame of image-to-video.
    "AutoencoderKLCogVideoX": _fields(
        "out_channels down_block_types up_block_types block_out_channels latent_channels layers_per_block "
        "act_fn norm_eps norm_num_groups temporal_compression_ratio sample_height sample_width "
        "scaling_factor force_upcast use_quant_conv use_post_quant_conv invert_scale_latents",
        in_channels=(3,),
        shift_factor=(None,),
        latents_mean=(None,),
        latents_std=(None,),
    ),
    # clip_output is the decoder's, and no longer read.
    "AutoencoderKLWan": _fields(
        "base_dim decoder_base_dim z_dim dim_mult num_res_blocks attn_scales temperal_downsample dropout "
        "latents_mean latents_std is_residual in_channels out_channels patch_size scale_factor_temporal "
        "scale_factor_spatial clip_output"
    ),
    "CogVideoXDDIMScheduler": _DDIM,
    "CogVideoXDPMScheduler": _DDIM,
    "UniPCMultistepScheduler": {
        **_FLOW_MULTISTEP,
        **_fields("predict_x0 disable_corrector solver_p", sigma_min=(None,), sigma_max=(None,)),
    },
    "DPMSolverMultistepScheduler": {
        **_FLOW_MULTISTEP,
        **_fields(
            "algorithm_type euler_at_final lambda_min_clipped",
            use_lu_lambdas=_OFF,
            variance_type=(None,),
        ),
    },
    "FlowMatchEulerDiscreteScheduler": {
        **_FLOW,
        **_fields(
            "shift base_shift max_shift base_image_seq_len max_image_seq_len",
            invert_sigmas=_OFF,
            stochastic_sampling=_OFF,
        ),
    },
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    "LlamaModel": {
        **_TRANSFORMER,
        **_DECODER,
        **_fields("pretraining_tp mlp_bias rope_scaling"),
    },
    # Fields of pictures and clips have no effect: the model reads text only.
    "Qwen2_5_VLTextModel": {
        **_TRANSFORMER,
        **_DECODER,
        **_fields(
            "use_sliding_window sliding_window max_window_layers layer_types rope_scaling image_token_id "
            "video_token_id vision_start_token_id vision_end_token_id vision_token_id"
        ),
    },
    # What its two models are of, and what is of pictures.
    "Gemma3ForConditionalGeneration": {
        **_TRANSFORMER,
        **_fields(
            "text_config vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index"
        ),
    },
    "CLIPTextModel": {
        **_TRANSFORMER,
        **_fields("projection_dim layer_norm_eps initializer_factor dropout"),
    },
}

#: `_class_name` in model_index.json → family.
FAMILIES = {
    "CogVideoXImageToVideoPipeline": "cogvideox_image",
    "CogVideoXPipeline": "cogvideox",
    "CogVideoXVideoToVideoPipeline": "cogvideox",
    "HunyuanVideo15Pipeline": "hunyuan_video15",
    "HunyuanVideoPipeline": "hunyuan_video",
    "LTX2Pipeline": "ltx2",
    "LTXPipeline": "ltx",
    "WanPipeline": "wan",
}

#: Family → part of the pipeline → classes that it may have.
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "cogvideox": {
        "transformer": ("CogVideoXTransformer3DModel",),
        "vae": ("AutoencoderKLCogVideoX",),
        "text_encoder": ("T5EncoderModel",),
        "scheduler": ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    },
    "hunyuan_video": {
        "transformer": ("HunyuanVideoTransformer3DModel",),
        "vae": ("AutoencoderKLHunyuanVideo",),
        "text_encoder": ("LlamaModel",),
        "text_encoder_2": ("CLIPTextModel",),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    },
    "hunyuan_video15": {
        "transformer": ("HunyuanVideo15Transformer3DModel",),
        "vae": ("AutoencoderKLHunyuanVideo15",),
        "text_encoder": ("Qwen2_5_VLTextModel",),
        "text_encoder_2": ("T5EncoderModel",),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        "guider": ("ClassifierFreeGuidance",),
    },
    "ltx": {
        "transformer": ("LTXVideoTransformer3DModel",),
        "vae": ("AutoencoderKLLTXVideo",),
        "text_encoder": ("T5EncoderModel",),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    },
    "ltx2": {
        "transformer": ("LTX2VideoTransformer3DModel",),
        "vae": ("AutoencoderKLLTX2Video",),
        "text_encoder": ("Gemma3ForConditionalGeneration",),
        "connectors": ("LTX2TextConnectors",),
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    },
    "wan": {
        "transformer": ("WanTransformer3DModel",),
        "transformer_2": ("WanTransformer3DModel",),
        "vae": ("AutoencoderKLWan",),
        "text_encoder": ("UMT5EncoderModel",),
        "scheduler": (
            "UniPCMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "FlowMatchEulerDiscreteScheduler",
        ),
    },
}
PARTS["cogvideox_image"] = PARTS["cogvideox"]
#: Part → the library that model_index.json names, where it is not diffusers' or transformers' own.
_LIBRARIES = {"connectors": "ltx2"}
#: Family and part → fields that this family understands beside, or otherwise than, its class's own.
_MORE: dict[tuple[str, str], Fields] = {
    ("cogvideox", "transformer"): {"ofs_embed_dim": (None,)},
    ("ltx", "scheduler"): _DYNAMIC,
    ("ltx2", "scheduler"): _DYNAMIC,
}


def read_folder(path: str | Path) -> tuple[str, Parts]:
    """Read the configurations of a teacher's parts; refuse what is not understood.

    Args:
        path: a diffusers folder.

    Returns:
        The family, and the fields of each part that a pipeline would use, by the part's name, defaults filled
        in. "pipeline" holds those of `model_index.json`.

    Raises:
        FileNotFoundError: the folder or one of its configurations is missing.
        ValueError: the pipeline class is not a supported family, a class or a field is not understood, or
            parts do not fit together. The message names the file and the field.
    """
    folder, file = Path(path), Path(path, "model_index.json")
    if not folder.is_dir():
        raise FileNotFoundError(f"teacher {folder}: no such folder; give a diffusers folder on disk")
    if not file.is_file():
        raise FileNotFoundError(
            f"teacher {folder}: no model_index.json in it; give the folder that save_pretrained wrote"
        )
    index = _read_json(file)
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(
            f"teacher {path}: pipeline class {name!r} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    found = {"pipeline": _check_fields(file, name, index)}
    for part, classes in PARTS[family].items():
        named = found["pipeline"].get(part)
        if named is None or list(named) == [None, None]:
            continue
        library = "transformers" if part.startswith("text_encoder") else _LIBRARIES.get(part, "diffusers")
        if not isinstance(named, list | tuple) or len(named) != 2 or named[0] != library:
            raise ValueError(f"{file}: {part} is {named!r}; only a class of {library} is supported")
        if named[1] not in classes:
            raise ValueError(f"{file}: {part} is {named[1]!r}; supported are {', '.join(classes)}")
        config = folder / part / (f"{part}_config.json" if part in ("scheduler", "guider") else "config.json")
        if not config.is_file():
            raise FileNotFoundError(f"{config}: no such file, but model_index.json names {named[1]}")
        more = _MORE.get((family, part), {})
        found[part] = _check_fields(config, named[1], _read_json(config), more)
    for part in PARTS[family]:
        if part not in found and (family != "wan" or not part.startswith("transformer")):
            raise ValueError(f"{file}: names no {part}")
    _FIT[family](folder, found)
    return family, found


def _read_json(file: Path) -> dict[str, Any]:
    try:
        given = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"{file}: not a JSON object")
    return given


def _check_fields(
    file: Path, name: str, given: Mapping[str, Any], more: Fields | None = None
) -> dict[str, Any]:
    """The fields of a configuration of class `name`, with its defaults; raise where one is not understood."""
    known, defaults = {**KNOWN[name], **(more or {})}, _defaults(name)
    fields = {**defaults, **{k: v for k, v in given.items() if not k.startswith("_")}}
    for field, value in fields.items():
        accepted = known.get(field, (defaults.get(field),))
        if accepted is None or any(_same(value, one) for one in accepted):
            continue
        why = (
            f"supported is {' or '.join(map(repr, accepted))}"
            if field in known
            else "this field is not understood, and may change what the model computes"
        )
        raise ValueError(f"{file}: {field} is {value!r}; {why}")
    return fields


def _same(value: Any, other: Any) -> bool:
    """Equal, lists and tuples alike; 1 is not True."""
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(_same, value, other))
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _defaults(name: str) -> dict[str, Any]:
    """What a class assumes for fields that a file leaves out."""
    import diffusers
    import transformers
    from diffusers.pipelines import ltx2

    cls = (
        getattr(diffusers, name, None)
        or getattr(ltx2, name, None)
        or getattr(transformers, name).config_class
    )
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _fits_cogvideox(folder: Path, found: Parts) -> None:
    _check_widths(folder, "transformer", found, found["vae"]["latent_channels"], "text_embed_dim")


def _fits_wan(folder: Path, found: Parts) -> None:
    file, ratio = folder / "model_index.json", found["pipeline"]["boundary_ratio"]
    if ratio is None:
        # Without a boundary a pipeline never uses its second transformer.
        found.pop("transformer_2", None)
        if "transformer" not in found:
            raise ValueError(f"{file}: names no transformer, and no boundary_ratio for a transformer_2")
    elif not _is_number(ratio) or not 0 <= ratio <= 1:
        raise ValueError(f"{file}: boundary_ratio is {ratio!r}; it must be a number from 0 to 1")
    elif "transformer_2" not in found:
        raise ValueError(
            f"{file}: boundary_ratio is {ratio}, but there is no transformer_2 for the noise levels below it"
        )
    experts = [part for part in ("transformer", "transformer_2") if part in found]
    for part in experts:
        config, patch = folder / part / "config.json", found[part]["patch_size"]
        if len(patch) != 3 or patch[0] != 1:
            raise ValueError(f"{config}: patch_size is {patch!r}; supported is [1, height, width]")
        _check_widths(folder, part, found, found["vae"]["z_dim"], "text_dim")
        for field, value in found[experts[0]].items():
            other = found[part].get(field)
            if not _same(value, other):
                raise ValueError(
                    f"{config}: {field} is {other!r}, but {value!r} in transformer; both must have the "
                    "same shape, as their heads are pooled"
                )
    _check_shift(folder, found)
    channels = found["vae"]["z_dim"]
    for field in ("latents_mean", "latents_std"):
        values = found["vae"][field]
        if not isinstance(values, list | tuple) or len(values) != channels:
            file = folder / "vae" / "config.json"
            raise ValueError(
                f"{file}: {field} must be {channels} numbers, one for each channel of the latents"
            )


def _fits_cogvideox_image(folder: Path, found: Parts) -> None:
    channels = found["vae"]["latent_channels"]
    # The first frame's latents stand beside the noisy ones.
    _check_widths(folder, "transformer", found, channels, "text_embed_dim", 2 * channels)


def _fits_ltx(folder: Path, found: Parts) -> None:
    _check_widths(folder, "transformer", found, found["vae"]["latent_channels"], "caption_channels")
    _check_dynamic(folder, found)


def _fits_ltx2(folder: Path, found: Parts) -> None:
    _check_channels(folder, "transformer", found, found["vae"]["latent_channels"])
    registers = found["connectors"]["video_connector_num_learnable_registers"]
    if isinstance(registers, bool) or not isinstance(registers, int) or registers < 1 or 1024 % registers:
        file = folder / "connectors" / "config.json"
        raise ValueError(
            f"{file}: video_connector_num_learnable_registers is {registers!r}; it must divide the 1024 "
            "tokens of a text, whose padding the registers replace"
        )
    _check_dynamic(folder, found)


def _check_dynamic(folder: Path, found: Parts) -> None:
    _check_shift(folder, found)
    file, scheduler = folder / "scheduler" / "scheduler_config.json", found["scheduler"]
    terminal = scheduler["shift_terminal"]
    if terminal is not None and not (_is_number(terminal) and 0 <= terminal < 1):
        raise ValueError(f"{file}: shift_terminal is {terminal!r}; it must be a number from 0 to below 1")
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    for name in names if scheduler["use_dynamic_shifting"] else ():
        if not _is_number(scheduler[name]):
            raise ValueError(f"{file}: {name} is {scheduler[name]!r}; it must be a number")


def _fits_hunyuan_video(folder: Path, found: Parts) -> None:
    _check_widths(folder, "transformer", found, found["vae"]["latent_channels"], "text_embed_dim")
    _check_text(folder, found, "pooled_projection_dim", "text_encoder_2")
    _check_shift(folder, found)


def _fits_hunyuan_video15(folder: Path, found: Parts) -> None:
    channels = found["vae"]["latent_channels"]
    # Beside the noisy latents stand those of a picture and a mask, zero without one.
    _check_widths(folder, "transformer", found, channels, "text_embed_dim", 2 * channels + 1)
    _check_text(folder, found, "text_embed_2_dim", "text_encoder_2")
    _check_shift(folder, found)


def _check_shift(folder: Path, found: Parts) -> None:
    shift = flow_shift(found["scheduler"])
    if not _is_number(shift) or not shift > 0:
        file = folder / "scheduler" / "scheduler_config.json"
        name = "flow_shift" if "flow_shift" in found["scheduler"] else "shift"
        raise ValueError(f"{file}: {name} is {shift!r}; it must be a number above 0")


def flow_shift(scheduler: Mapping[str, Any]) -> float:
    """The shift of a flow's noise levels, as its scheduler's configuration gives it."""
    return scheduler["flow_shift"] if "flow_shift" in scheduler else scheduler["shift"]


def boundary_of(parts: Parts) -> float | None:
    """The timestep below which `transformer_2` serves; None where there is one transformer for all.

    Args:
        parts: from `check_folder`.
    """
    ratio = parts["pipeline"].get("boundary_ratio")
    if ratio is None:
        return None
    # At a ratio of 1 a pipeline, whose first step is a little below the last timestep, needs no other.
    return math.inf if ratio == 1 and "transformer" not in parts else ratio * FLOW_TIMESTEPS


def _check_widths(
    folder: Path, part: str, found: Parts, channels: int, text: str, given: int | None = None
) -> None:
    _check_channels(folder, part, found, channels, given)
    _check_text(folder, found, text, "text_encoder", part)


def _check_channels(folder: Path, part: str, found: Parts, channels: int, given: int | None = None) -> None:
    """A model that takes more than noisy latents and a text, such as a picture, has other widths."""
    file, config = folder / part / "config.json", found[part]
    for field, wanted in (("in_channels", given or channels), ("out_channels", channels)):
        if config[field] != wanted:
            raise ValueError(
                f"{file}: {field} is {config[field]}, not {wanted}, and the VAE's latents have {channels} "
                "channels: only text-to-video models and CogVideoX's image-to-video are supported"
            )


def _check_text(folder: Path, found: Parts, field: str, encoder: str, part: str = "transformer") -> None:
    """A model's width for a text is that of the text encoder's hidden states."""
    name = "d_model" if "d_model" in found[encoder] else "hidden_size"
    file, width, given = folder / part / "config.json", found[encoder].get(name), found[part][field]
    if width != given:
        who = "the text encoder" if encoder == "text_encoder" else encoder
        raise ValueError(f"{file}: {field} is {given}, but {who}'s {name} is {width}")


_FIT = {
    "cogvideox": _fits_cogvideox,
    "cogvideox_image": _fits_cogvideox_image,
    "hunyuan_video": _fits_hunyuan_video,
    "hunyuan_video15": _fits_hunyuan_video15,
    "ltx": _fits_ltx,
    "ltx2": _fits_ltx2,
    "wan": _fits_wan,
}
