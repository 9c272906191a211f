"""Align a student with a motion prior in a plain PyTorch loop: python examples/align_plain_loop.py FOLDER

FOLDER is a toy world of `python -m motionenhancer.toy --output_dir FOLDER`."""

import argparse
from pathlib import Path

import torch

from motionenhancer import extract_prior, load_teacher
from motionenhancer.alignment.aligner import align, build_aligner
from motionenhancer.data import prompt_text, read_frames, read_samples
from motionenhancer.students import capture_attention, load_student, map_words

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("folder", type=Path)
folder = parser.parse_args().folder
model, processor, family = load_student(folder / "student")
sample = next(iter(read_samples(folder / "train.jsonl", folder / "videos")))
text, segments = prompt_text(sample)
teacher = load_teacher(folder / "teacher")
prior = extract_prior(teacher, read_frames(sample.videos[0], num_frames=17).frames, text, steps=2)

encoded = family.encode(processor, sample, [read_frames(sample.videos[0], num_frames=8)])
batch = family.collate([encoded], pad_token_id=processor.tokenizer.pad_token_id)
(layout,) = batch.pop("layouts")
spans, video = layout.message_spans, layout.videos[0]
words = map_words(prior.spans, prior.prompt, segments, layout.text, layout.offsets, message_spans=spans)
rows, row_tokens = torch.tensor([words.rows]) + layout.start, torch.tensor([words.row_tokens])

aligner = build_aligner("mlp", prior.grid)
optimizer = torch.optim.AdamW([*model.train().parameters(), *aligner.parameters()], lr=1e-3)
for step in range(4):
    with capture_attention(model, rows, video.positions[None]) as captured:
        loss = model(**batch).loss
    aligned = align(captured, prior, grid=video.grid, row_tokens=row_tokens, aligner=aligner)
    (loss + aligned).backward()
    optimizer.step(), optimizer.zero_grad()
    print(f"step {step}: answer {loss.item():.4f}, alignment {aligned.item():.6f}")
