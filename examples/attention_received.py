"""Where a question looks in a clip: python examples/attention_received.py [picture [model [clip]]]
Without arguments: received.png, the toy student of the package, and a toy clip that it makes."""

import sys
import tempfile

import torch
from PIL import Image
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import mekernels
from motionenhancer.data import read_frames
from motionenhancer.evaluation.generate import encode_request
from motionenhancer.students import load_student
from motionenhancer.toy.world import WEIGHTS, write_world

picture, name, clip = (sys.argv[1:] + ["received.png", WEIGHTS / "student", None][len(sys.argv) - 1 :])[:3]
clip = clip or min(write_world(tempfile.mkdtemp(), clips=1, test_clips=6).videos.glob("*.mp4"))
model, processor, family = load_student(name, dtype=torch.float32)
video = read_frames(clip, num_frames=8)
asked = encode_request(family, processor, "", "What does the green ring do?", video)
vision, received, heads = asked.layout.videos[0], [], []


def reading(module, query, key, value, attention_mask, scaling=None, **options):
    """Torch's own attention. Beside it: what each key receives from the words, and statistics of heads."""
    same = {"softmax_scale": scaling, "causal": True}
    lse = mekernels.attention_lse(query, key, **same)
    words = slice(int(vision.positions.max()) + 1, None)
    received.append(mekernels.attention_sums(query, key, lse, over="rows", rows=words, **same)[0].mean(0))
    heads.append(mekernels.head_statistics(query, key, lse, sinks=slice(0, 1), **same))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)


AttentionInterface.register("reading", reading)
model.set_attn_implementation({"text_config": "reading"})
batch = family.collate([asked], pad_token_id=processor.tokenizer.pad_token_id)
del batch["layouts"], batch["labels"]
with torch.no_grad():
    model(**batch, use_cache=False)
for layer, found in enumerate(heads):
    entropy, distance = ([round(x, 2) for x in part[0].tolist()] for part in (found.entropy, found.distance))
    print(f"layer {layer}: entropy of the heads {entropy}, distance in tokens {distance}")
glow = torch.stack(received).mean(0)[vision.positions].view(vision.grid)
each, size = -(-len(video.frames) // vision.grid[0]), (256, 256)
strip = Image.new("RGB", (size[0] * vision.grid[0], 2 * size[1]))
for i, seen in enumerate((glow / glow.max() * 255).byte()):
    frame = Image.fromarray(video.frames[i * each]).resize(size)
    strip.paste(frame, (i * size[0], 0))
    light, grey = Image.fromarray(seen.numpy()).resize(size, Image.Resampling.BICUBIC), frame.convert("L")
    strip.paste(Image.merge("RGB", (light, grey, grey)), (i * size[0], size[1]))
strip.save(picture)
print(f"frames, and where the question looks, in red: {picture}")
