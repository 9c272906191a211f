"""The picture of where a question looks, and the printed statistics, are those of eager attention."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "attention_received.py"


def test_the_picture_and_the_statistics(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "received.png")])
    names = runpy.run_path(str(SCRIPT))
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith(f": {tmp_path / 'received.png'}")
    model, vision = names["model"], names["vision"].positions
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        maps = torch.stack(model(**names["batch"], output_attentions=True).attentions)[:, 0]
    glow = maps[:, :, int(vision.max()) + 1 :, vision].sum(2).mean((0, 1)).view(names["vision"].grid)
    torch.testing.assert_close(names["glow"], glow, rtol=1e-4, atol=1e-6)
    entropy = -(maps * maps.clamp_min(1e-30).log()).sum(-1).mean(-1)
    found = re.findall(r"entropy of the heads \[(.*?)\]", printed)
    assert len(found) == len(maps)
    np.testing.assert_allclose([[float(x) for x in line.split(",")] for line in found], entropy, atol=0.006)
    shown = np.asarray(Image.open(tmp_path / "received.png"))
    frames, height, width = glow.shape
    assert shown.shape == (512, 256 * frames, 3)
    place = np.unravel_index(int(glow.argmax()), glow.shape)
    light = shown[256:, 256 * place[0] : 256 * (place[0] + 1), 0].reshape(height, 256 // height, width, -1)
    assert light.mean((1, 3)).argmax() == place[1] * width + place[2]
