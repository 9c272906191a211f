"""Where words look in a video: python examples/words_in_video.py [model [video file [word ...]]]
Without arguments: an untrained Qwen2.5-VL that it makes, and a clip of noise."""

import sys
import tempfile

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from motionenhancer.data import read_frames
from motionenhancer.students import capture_attention
from motionenhancer.toy.models import save_student

name = sys.argv[1] if len(sys.argv) > 1 else save_student(tempfile.mkdtemp())
video = read_frames(sys.argv[2], num_frames=8).frames if sys.argv[2:] else torch.rand(8, 64, 64, 3).mul(255)
model = AutoModelForImageTextToText.from_pretrained(name, attn_implementation="sdpa")  # or flash_attention_2
processor = AutoProcessor.from_pretrained(name)
words = sys.argv[3:] or ["red", "ring", "moves"]
say = {"type": "text", "text": f"The {' '.join(words)}."}
text = processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}, say]}])
inputs = processor(text=[text], videos=[torch.as_tensor(video).byte().movedim(-1, 1)], return_tensors="pt")
ids = inputs["input_ids"][0]
columns = (ids == model.config.video_token_id).nonzero().T
prompt = range(int(columns.max()), len(ids))  # a word's row is the token that ends it
rows = [next(i for i in prompt if word in processor.decode(ids[prompt[0] : i + 1])) for word in words]
with torch.no_grad(), capture_attention(model, torch.tensor([rows]), columns) as captured:
    model(**inputs)
for word, seen in zip(words, captured.attention[0], strict=True):
    print(f"{word}: {seen.sum():.1%} on the video, most on its token {int(seen.argmax())} of {len(seen)}")
