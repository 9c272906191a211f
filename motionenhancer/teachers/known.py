"""The known fields of a teacher's configuration files. Every other field is refused by name.

An unknown field that changes the computation of a model would silently give wrong priors. Each field below is
known for one of three reasons: the class of diffusers or transformers that runs reads it; the family's file
reads it; or it does not change a prior. Some fields are known only with certain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .schedule import FLOW_TIMESTEPS

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
#: Fields that shift the noise levels by the clip's size, for a family that reads them.
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
#: transformers' class reads the first half. Older versions wrote the second half, and nothing reads it.
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

#: Class → its fields. A pipeline has its parts, and the fields of `MORE`.
KNOWN: dict[str, Fields] = {
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
    "HunyuanVideoTransformer3DModel": _fields(
        "in_channels out_channels num_attention_heads attention_head_dim num_layers num_single_layers "
        "num_refiner_layers mlp_ratio patch_size patch_size_t text_embed_dim pooled_projection_dim "
        "rope_theta rope_axes_dim",
        qk_norm=("rms_norm",),
        guidance_embeds=(True, False),
        image_condition_type=(None,),
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
    # Configurations of its two models, and fields for pictures.
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
LIBRARIES = {"connectors": "ltx2"}
#: Family and part → fields that this family accepts in addition to its class's, or with other values.
MORE: dict[tuple[str, str], Fields] = {
    ("cogvideox", "transformer"): {"ofs_embed_dim": (None,)},
    ("hunyuan_video", "pipeline"): _fields("tokenizer_2"),
    ("hunyuan_video15", "pipeline"): _fields("tokenizer_2"),
    # Fields of sound, of rewritten prompts and of a clip's length do not change a prior.
    ("ltx2", "pipeline"): _fields("audio_vae vocoder processor prompt_enhancer duration_head"),
    ("wan", "pipeline"): _fields("boundary_ratio", expand_timesteps=(True, False, None)),
    ("ltx", "scheduler"): _DYNAMIC,
    ("ltx2", "scheduler"): _DYNAMIC,
}
