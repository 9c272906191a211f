"""Align a student with motion priors under accelerate: accelerate launch examples/align_accelerate.py FOLDER

FOLDER is a toy world of `python -m motionenhancer.toy --output_dir FOLDER`."""

import argparse
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator

from motionenhancer import extract_prior, load_teacher
from motionenhancer.alignment.aligner import align
from motionenhancer.alignment.dataset import Item, MotionCollator
from motionenhancer.data import prompt_text, read_frames, read_samples
from motionenhancer.students import capture_attention, load_student, map_words

parser = argparse.ArgumentParser(usage=__doc__)
parser.add_argument("folder", type=Path)
accelerator, folder, items = Accelerator(), parser.parse_args().folder, []
model, processor, family = load_student(folder / "student")
teacher = load_teacher(folder / "teacher", accelerator.device)
for sample in islice(read_samples(folder / "train.jsonl", folder / "videos"), 4):
    text, parts = prompt_text(sample)
    prior = extract_prior(teacher, read_frames(sample.videos[0], num_frames=17).frames, text, steps=2)
    encoded = family.encode(processor, sample, [read_frames(sample.videos[0], num_frames=8)])
    at = encoded.layout
    words = map_words(prior.spans, prior.prompt, parts, at.text, at.offsets, message_spans=at.message_spans)
    items.append(Item(sample.id, encoded, prior, words, skipped={}))
loader = torch.utils.data.DataLoader(items, batch_size=2, collate_fn=MotionCollator(family, processor))
optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for step, batch in enumerate(batch for _ in range(4) for batch in loader):
    chosen, _, _ = (batch.pop(name) for name in ("alignment", "ids", "skipped"))
    with capture_attention(model, chosen.rows, chosen.columns) as captured:
        loss = model(**batch).loss
    aligned = align(captured, chosen.priors, grid=chosen.grids, row_tokens=chosen.row_tokens)
    accelerator.backward(loss + aligned)
    optimizer.step(), optimizer.zero_grad()
    accelerator.print(f"step {step}: answer {loss.item():.4f}, alignment {aligned.item():.6f}")
