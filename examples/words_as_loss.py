"""Teach a word to look left in an image: python examples/words_as_loss.py [model, else an untrained one]"""

import sys
import tempfile

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from motionenhancer.students import capture_attention
from motionenhancer.toy.models import save_student

name = sys.argv[1] if len(sys.argv) > 1 else save_student(tempfile.mkdtemp())
model = AutoModelForImageTextToText.from_pretrained(name, attn_implementation="sdpa").train()
processor = AutoProcessor.from_pretrained(name)
image = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB")
text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}]) + "A red square"
inputs = processor(text=[text], images=[image], return_tensors="pt")
rows = torch.tensor([[inputs["input_ids"].shape[1] - 1]])  # the last token: "square"
columns = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().T
width = int(inputs["image_grid_thw"][0, 2]) // processor.image_processor.merge_size
left = torch.arange(columns.shape[1]) % width < width // 2
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(20):
    with capture_attention(model, rows, columns) as captured:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    share = captured.attention[..., left].sum() / captured.attention.sum()
    (loss - 5 * share.log()).backward()
    optimizer.step(), optimizer.zero_grad()
    print(f"step {step}: loss {loss:.2f}, {share:.1%} of what the word sees of the image is its left half")
