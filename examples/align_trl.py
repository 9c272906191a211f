"""Align a student with motion priors in TRL's SFTTrainer: python examples/align_trl.py FOLDER OUTPUT

FOLDER is a toy world of `python -m motionenhancer.toy --output_dir FOLDER`."""

import sys
from itertools import islice

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from motionenhancer import extract_prior, load_teacher
from motionenhancer.alignment.aligner import align
from motionenhancer.alignment.dataset import Item, MotionCollator
from motionenhancer.data import prompt_text, read_frames, read_samples
from motionenhancer.students import capture_attention, load_student, map_words


class AlignedSFTTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, **options):
        chosen, _, _ = (inputs.pop(name) for name in ("alignment", "ids", "skipped"))
        with capture_attention(model, chosen.rows, chosen.columns) as captured:
            loss = super().compute_loss(model, inputs, **options)
        aligned = align(captured, chosen.priors, grid=chosen.grids, row_tokens=chosen.row_tokens)
        return loss + aligned / self.current_gradient_accumulation_steps  # SFT's loss is divided already


folder, items, teacher = sys.argv[1], [], load_teacher(f"{sys.argv[1]}/teacher")
model, processor, family = load_student(f"{folder}/student")
for sample in islice(read_samples(f"{folder}/train.jsonl", f"{folder}/videos"), 4):
    text, parts = prompt_text(sample)
    prior = extract_prior(teacher, read_frames(sample.videos[0], num_frames=17).frames, text, steps=2)
    encoded = family.encode(processor, sample, [read_frames(sample.videos[0], num_frames=8)])
    at, spans = encoded.layout, encoded.layout.message_spans
    words = map_words(prior.spans, prior.prompt, parts, at.text, at.offsets, message_spans=spans)
    items.append(Item(sample.id, encoded, prior, words, skipped={}))
collate, ready = MotionCollator(family, processor), {"skip_prepare_dataset": True}
args = SFTConfig(sys.argv[2], bf16=False, remove_unused_columns=False, dataset_kwargs=ready, logging_steps=1)
data = Dataset.from_dict({"item": list(range(len(items)))})
choose = {"data_collator": lambda rows: collate([items[row["item"]] for row in rows])}
AlignedSFTTrainer(model, args, train_dataset=data, processing_class=processor, **choose).train()
