"""The scripts of the how-to run unchanged, and print the values of eager attention."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from motionenhancer.toy.models import save_student

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("words_*.py"))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return str(save_student(tmp_path_factory.mktemp("student"), seed=3, layers=2))


def run(monkeypatch, capsys, script, *arguments):
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    names = runpy.run_path(str(FOLDER / script))
    return names, capsys.readouterr().out


def eager(names):
    """The rows and columns that the script read, from transformers' own maps."""
    model, rows, columns = names["model"], names["rows"], names["columns"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(**names["inputs"], output_attentions=True).attentions
    return torch.stack(attention).mean(dim=(0, 2))[0][rows][:, columns[0]]


def test_there_are_three_of_at_most_thirty_lines():
    assert len(SCRIPTS) == 3
    for script in SCRIPTS:
        assert len((FOLDER / script).read_text().splitlines()) <= 30


def test_words_in_video(monkeypatch, capsys, student):
    names, printed = run(monkeypatch, capsys, "words_in_video.py", student)
    expected = eager(names)
    for word, row, line in zip(["red", "ring", "moves"], expected, printed.splitlines(), strict=True):
        share, best = re.fullmatch(
            rf"{word}: ([\d.]+)% on the video, most on its token (\d+) of 256", line
        ).groups()
        assert float(share) == pytest.approx(100 * row.sum().item(), abs=0.06)
        assert row[int(best)] == pytest.approx(row.max().item(), rel=1e-4)
    ids = names["inputs"]["input_ids"][0]
    decoded = [names["processor"].decode([ids[row]]).strip() for row in names["rows"]]
    assert decoded == ["red", "ring", "moves"]


def test_words_in_video_of_a_file(monkeypatch, capsys, student, tmp_path):
    from motionenhancer.toy.render import render
    from motionenhancer.toy.scene import sample_scene

    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for picture in render(sample_scene(np.random.default_rng(0))).frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    _, printed = run(
        monkeypatch, capsys, "words_in_video.py", student, tmp_path / "clip.mp4", "blue", "jumps"
    )
    assert re.match(r"blue: [\d.]+% on the video.*\njumps: [\d.]+% on the video", printed)


def test_words_as_loss(monkeypatch, capsys, student):
    _, printed = run(monkeypatch, capsys, "words_as_loss.py", student)
    shares = [float(share) for share in re.findall(r"([\d.]+)% of what", printed)]
    assert len(shares) == 20
    assert shares[0] < 65
    assert shares[-1] > 80


def test_words_as_pictures(monkeypatch, capsys, student, tmp_path):
    Image.effect_noise((72, 56), 90).save(tmp_path / "given.png")
    given = (tmp_path, student, tmp_path / "given.png", "green", "square")
    names, printed = run(monkeypatch, capsys, "words_as_pictures.py", *given)
    files = [f"{tmp_path}/{word}.png" for word in ("green", "square")]
    assert [line.rpartition(": ")[2] for line in printed.splitlines()] == files
    expected = eager(names)
    for word, row in zip(["green", "square"], expected, strict=True):
        picture = Image.open(tmp_path / f"{word}.png")
        assert picture.size == (72, 56)
        wanted = ((row - row.min()) / (row.max() - row.min()) * 255).byte().view(names["grid"]).numpy()
        wanted = np.asarray(Image.fromarray(wanted).resize((72, 56))).astype(int)
        assert np.abs(np.asarray(picture)[..., 0] - wanted).max() <= 2
        assert wanted.std() > 20
        assert (np.asarray(picture)[..., 1] == np.asarray(Image.open(tmp_path / "given.png"))).all()
