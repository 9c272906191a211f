"""The tiny teacher and student are the real classes, load from disk without a network, and work."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.video_utils import VideoMetadata

from motionenhancer.students import load_student
from motionenhancer.toy.models import make_student, make_teacher, save_student, save_teacher
from motionenhancer.toy.render import render
from motionenhancer.toy.scene import sample_scene
from motionenhancer.toy.tokenizers import QWEN_SPECIAL_TOKENS, qwen_tokenizer, t5_tokenizer
from motionenhancer.toy.world import WEIGHTS

diffusers = pytest.importorskip("diffusers")
SENTENCE = "The red ring moves left quickly, the blue post stays still. Zoë (really) waits?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_teacher(root / "teacher"), save_student(root / "student")


@pytest.fixture(scope="module")
def teacher(folders):
    return diffusers.DiffusionPipeline.from_pretrained(folders[0], local_files_only=True)


@pytest.fixture(scope="module")
def student(folders):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folders[1], local_files_only=True)
    return model, AutoProcessor.from_pretrained(folders[1], local_files_only=True)


def toy_video(frames=17):
    return render(sample_scene(np.random.default_rng(0)), frames=frames, height=64, width=64).frames


def digests(root):
    files = (p for p in sorted(Path(root).rglob("*")) if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_teacher_is_made_of_the_real_classes(teacher):
    assert type(teacher).__name__ == "CogVideoXPipeline"
    assert type(teacher.transformer).__name__ == "CogVideoXTransformer3DModel"
    assert type(teacher.vae).__name__ == "AutoencoderKLCogVideoX"
    assert type(teacher.text_encoder).__name__ == "T5EncoderModel"
    assert type(teacher.tokenizer).__name__ == "T5Tokenizer"
    assert type(teacher.scheduler).__name__ == "CogVideoXDDIMScheduler"
    config = teacher.scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing"
    assert config.snr_shift_scale == 1.0
    assert teacher.scheduler.alphas_cumprod[-1].item() == 0.0


def encode(vae, frames):
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return vae.encode(video).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def test_teacher_encodes_a_clip_to_unit_latents(teacher):
    latents = encode(teacher.vae, toy_video())
    assert latents.shape == (1, 8, 5, 16, 16)
    assert latents.isfinite().all()
    assert 0.7 < latents.std() < 1.4
    assert teacher.vae.decode(latents / teacher.vae.config.scaling_factor).sample.shape == (1, 3, 17, 64, 64)


VARIANTS = {
    "5B": ({}, 17),
    "2B": ({"positions": "sinusoidal"}, 17),
    "learned": ({"positions": "learned"}, 17),
    "1.5": ({"patch_size_t": 2, "frames": 21}, 21),
    "wide": ({"layers": 2, "heads": 3, "head_dim": 32}, 17),
    "narrow 2B": ({"layers": 1, "heads": 2, "head_dim": 8, "positions": "sinusoidal"}, 17),
    "coarse": ({"vae_channels": (8, 8, 16, 16), "latent_channels": 4, "text_length": 20}, 17),
    "oblong": ({"height": 48, "width": 80, "frames": 9}, 9),
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_teacher_variants_denoise(name):
    options, frames = VARIANTS[name]
    pipe = make_teacher(scaling_factor=1.0, **options)
    out = pipe(
        "The red ring moves left.",
        height=options.get("height", 64),
        width=options.get("width", 64),
        num_frames=frames,
        num_inference_steps=1,
        max_sequence_length=pipe.transformer.config.max_text_seq_length,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert out.isfinite().all()
    assert out.std() > 1e-3
    assert pipe.transformer.config.use_rotary_positional_embeddings == (
        options.get("positions") != "sinusoidal"
    )
    assert pipe.scheduler.config.snr_shift_scale == (3.0 if options.get("positions") == "sinusoidal" else 1.0)


@torch.no_grad()
def test_teacher_listens_to_its_prompt(teacher):
    latents = encode(teacher.vae, toy_video()).permute(0, 2, 1, 3, 4)
    rotary = teacher._prepare_rotary_positional_embeddings(64, 64, 5, torch.device("cpu"))
    outputs = []
    for prompt in ("The red ring moves left.", "The blue post stays still."):
        text = teacher.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=48)[0]
        out = teacher.transformer(latents, text, torch.tensor([199]), image_rotary_emb=rotary).sample
        assert out.shape == (1, 5, 8, 16, 16)
        outputs.append(out)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"positions": "none"}, "positions"),
        ({"head_dim": 24}, "head_dim"),
        ({"vae_channels": (8, 8)}, "vae_channels"),
        ({"height": 60}, "height"),
        ({"width": 0}, "width"),
        ({"frames": 16}, "frames"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_teacher_refuses(options, name):
    with pytest.raises(ValueError, match=name):
        make_teacher(**options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"hidden_size": 60, "heads": 4}, "hidden_size"),
        ({"key_value_heads": 3}, "key_value_heads"),
        ({"vision_hidden_size": 30}, "vision_hidden_size"),
        ({"vocab_size": 100}, "vocab_size"),
        ({"seed": True}, "seed"),
    ],
)
def test_student_refuses(options, name):
    with pytest.raises(ValueError, match=name):
        make_student(**options)


def test_t5_offsets_survive_the_disk(teacher):
    for tokenizer in (t5_tokenizer(), teacher.tokenizer):
        assert tokenizer.is_fast
        encoded = tokenizer(SENTENCE, return_offsets_mapping=True)
        tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        assert tokens[:4] == ["▁The", "▁red", "▁ring", "▁moves"]
        assert tokens[-1] == "</s>"
        for token, (start, end) in zip(tokens[:-1], encoded["offset_mapping"][:-1], strict=True):
            if token not in ("<unk>", "▁"):
                assert SENTENCE[start:end] == token.removeprefix("▁")
        padded = tokenizer(["a", "The red ring"], padding="max_length", max_length=9, truncation=True)
        assert {len(ids) for ids in padded["input_ids"]} == {9}
    assert t5_tokenizer()(SENTENCE)["input_ids"] == teacher.tokenizer(SENTENCE)["input_ids"]
    assert teacher.tokenizer.model_max_length == 48


def test_qwen_tokens_survive_the_disk(student):
    strange = "Zoë 你好 🎈\n\t<x>" + SENTENCE
    for tokenizer in (qwen_tokenizer(), student[1].tokenizer):
        assert tokenizer.is_fast
        ids = tokenizer(strange)["input_ids"]
        assert tokenizer.decode(ids) == strange
        encoded = tokenizer(SENTENCE, return_offsets_mapping=True)
        pieces = [SENTENCE[a:b] for a, b in encoded["offset_mapping"]]
        assert "".join(pieces).startswith("The red ring moves left")
        for token in QWEN_SPECIAL_TOKENS:
            assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(qwen_tokenizer(vocab_size=300)) == 300 + len(QWEN_SPECIAL_TOKENS)


CHAT = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "The red ring."}]},
]


def test_chat_template(student):
    render_chat = student[1].apply_chat_template
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    assert render_chat(CHAT, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{video}What moves?<|im_end|>\n"
        "<|im_start|>assistant\nThe red ring.<|im_end|>\n"
    )
    asked = [{"role": "system", "content": "Be short."}, CHAT[0]]
    assert render_chat(asked, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        f"<|im_start|>user\n{video}What moves?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    mixed = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " or "}, {"type": "video"}]}
    ]
    assert render_chat(mixed, tokenize=False, add_vision_id=True).endswith(
        "<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>"
        f" or Video 1: {video}<|im_end|>\n"
    )


def batch(processor, counts=(8, 8), generation=False):
    messages = CHAT[:1] if generation else CHAT
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    videos = [torch.from_numpy(toy_video(count)).permute(0, 3, 1, 2) for count in counts]
    metadata = [VideoMetadata(total_num_frames=count, fps=4.0) for count in counts]
    texts = [text] * len(counts)
    return processor(text=texts, videos=videos, video_metadata=metadata, padding=True, return_tensors="pt")


def test_student_grid_and_positions(student):
    model, processor = student
    inputs = batch(processor, (8, 5))
    assert inputs["video_grid_thw"].tolist() == [[4, 16, 16], [3, 16, 16]]
    video = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert (inputs["input_ids"] == video).sum(1).tolist() == [4 * 8 * 8, 3 * 8 * 8]
    assert "mm_token_type_ids" in inputs
    assert model.config.text_config.rope_parameters["mrope_section"] == [2, 3, 3]


def test_student_loss_gradient_and_memorising():
    model, processor = make_student(seed=1)
    inputs = batch(processor)
    labels = inputs["input_ids"].clone()
    labels[labels == processor.video_token_id] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]
    vision = [p.grad for n, p in model.named_parameters() if "visual" in n]
    assert all(g is not None and g.isfinite().all() for g in vision)


@torch.no_grad()
def test_student_sees_the_video_and_generates(student):
    model, processor = student
    inputs = batch(processor, (8,), generation=True)
    first = model(**inputs).logits[:, -1]
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].flip(0)
    assert (model(**inputs).logits[:, -1] - first).abs().max() > 1e-5
    out = model.generate(**inputs, max_new_tokens=4)
    assert inputs["input_ids"].shape[1] < out.shape[1] <= inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("options", [{"layers": 1, "heads": 8, "key_value_heads": 8}, {"patch_size": 8}])
@torch.no_grad()
def test_student_variants(options):
    model, processor = make_student(**options)
    assert model(**batch(processor, (4,))).logits.isfinite().all()


def test_large_frames_are_capped(student):
    frames = torch.zeros(2, 3, 360, 640, dtype=torch.uint8)
    out = student[1].video_processor(videos=[frames], return_tensors="pt")
    _, rows, columns = out["video_grid_thw"][0].tolist()
    assert rows * columns * 16 <= 128 * 128
    assert columns / rows == pytest.approx(640 / 360, rel=0.1)


def test_seed_decides_and_the_callers_random_state_is_untouched(folders, tmp_path):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    save_teacher(tmp_path / "teacher")
    save_student(tmp_path / "student")
    assert torch.equal(torch.rand(3), expected)
    assert digests(tmp_path / "teacher") == digests(folders[0])
    assert digests(tmp_path / "student") == digests(folders[1])
    other = save_teacher(tmp_path / "other", seed=1, scaling_factor=1.0)
    changed = [n for n, d in digests(other).items() if d != digests(folders[0])[n]]
    assert {Path(name).suffix for name in changed if "config" not in name} == {".safetensors"}


def test_another_process_makes_the_same_tokenizers(tmp_path):
    code = (
        "import sys; from motionenhancer.toy.tokenizers import qwen_tokenizer, t5_tokenizer;"
        "qwen_tokenizer().save_pretrained(sys.argv[1] + '/q');"
        "t5_tokenizer().save_pretrained(sys.argv[1] + '/t')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, timeout=120)
    qwen_tokenizer().save_pretrained(tmp_path / "b" / "q")
    t5_tokenizer().save_pretrained(tmp_path / "b" / "t")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_folders_are_small_and_hold_no_pickle(folders):
    for folder in folders:
        sizes = {p.name: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        assert sum(sizes.values()) < 5_000_000
        assert {Path(name).suffix for name in sizes} <= {".json", ".safetensors", ".jinja"}
        assert "auto_map" not in json.dumps([p.read_text() for p in folder.rglob("*.json")])


def test_the_weights_in_the_package_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 8_000_000


def test_the_student_in_the_package_can_be_trained_as_it_is_loaded() -> None:
    model, _, _ = load_student(WEIGHTS / "student")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
