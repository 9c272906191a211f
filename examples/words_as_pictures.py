"""What words look at, as PNG: python examples/words_as_pictures.py [folder [model [image [word ...]]]]
Without arguments: a new folder, an untrained Qwen2.5-VL that it makes, and a drawn image."""

import sys
import tempfile

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from motionenhancer.students import capture_attention
from motionenhancer.toy.models import save_student

folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
name = sys.argv[2] if len(sys.argv) > 2 else save_student(tempfile.mkdtemp())
image = Image.open(sys.argv[3]) if sys.argv[3:] else Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 50)
model, processor = AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)
words = sys.argv[4:] or ["red", "ring"]
text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}]) + " ".join(words)
inputs = processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")
columns = ((ids := inputs["input_ids"][0]) == model.config.image_token_id).nonzero().T
prompt = range(int(columns.max()), len(ids))  # a word's row is the token that ends it
rows = [next(i for i in prompt if word in processor.decode(ids[prompt[0] : i + 1])) for word in words]
with torch.no_grad(), capture_attention(model, torch.tensor([rows]), columns) as captured:
    model(**inputs)
grid = (inputs["image_grid_thw"][0, 1:] // processor.image_processor.merge_size).tolist()
for word, seen in zip(words, captured.attention[0] - captured.attention[0].amin(1)[:, None], strict=True):
    glow = Image.fromarray((seen / seen.max() * 255).byte().view(grid).numpy()).resize(image.size)
    Image.merge("RGB", (glow, image.convert("L"), image.convert("L"))).save(f"{folder}/{word}.png")
    print(f"where {word} looks, in red: {folder}/{word}.png")
