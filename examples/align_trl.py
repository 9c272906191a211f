"""Align a student with stored motion priors in TRL's SFTTrainer: python examples/align_trl.py FOLDER OUTPUT

FOLDER is a toy world of `python -m motionenhancer toy --output_dir FOLDER`, with priors in FOLDER/priors
as docs/integrations.md makes them."""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig

from motionenhancer.data import read_frames, read_samples
from motionenhancer.integrations.trl import AlignedSFTTrainer

parser = argparse.ArgumentParser(usage=__doc__)
for name in ("folder", "output"):
    parser.add_argument(name)
folder, output = vars(parser.parse_args()).values()
processor = AutoProcessor.from_pretrained(f"{folder}/student")
model = AutoModelForImageTextToText.from_pretrained(f"{folder}/student", dtype=torch.float32)


def collate(rows):
    clips = [torch.from_numpy(read_frames(row["video"], num_frames=8).frames) for row in rows]
    texts = [processor.apply_chat_template(row["messages"]) for row in rows]
    batch = processor(text=texts, videos=clips, padding=True, do_sample_frames=False, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


samples = read_samples(f"{folder}/train.jsonl", f"{folder}/videos")
rows = [{"messages": sample.messages, "video": str(sample.videos[0])} for sample in samples]
args = SFTConfig(output, bf16=False, per_device_train_batch_size=2, num_train_epochs=2, logging_steps=1)
priors = {"prior_dir": f"{folder}/priors", "alignment_weight": 1.0}
trainer = AlignedSFTTrainer(
    model, args, collate, train_dataset=Dataset.from_list(rows), processing_class=processor, **priors
)
trainer.train()
