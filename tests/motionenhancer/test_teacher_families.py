"""Extraction with a teacher of every family, from the plan to the store."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from test_cogvideox_image import save_image_teacher
from tiny_hunyuan import save_hunyuan, save_hunyuan15
from tiny_ltx import save_ltx, save_ltx2
from tiny_wan import save_wan
from tiny_world import World

from motionenhancer import extract
from motionenhancer.priors.storage import PriorStore
from motionenhancer.teachers.plan import plan_teacher

#: How a family's folder is made, the clips it is given, and the evaluations of a prior of one step.
FAMILIES: dict[str, tuple[Callable[[Path], Path], dict[str, object], int]] = {
    "cogvideox_image": (partial(save_image_teacher, newer=False), {}, 5),
    "hunyuan_video": (save_hunyuan, {"teacher_size": "32x32", "teacher_frames": 9}, 3),
    "hunyuan_video15": (save_hunyuan15, {"teacher_size": "32x32", "teacher_frames": 9}, 5),
    "ltx": (save_ltx, {"teacher_size": "16x16", "teacher_frames": 9}, 5),
    "ltx2": (save_ltx2, {"teacher_size": "16x16", "teacher_frames": 5}, 5),
    "wan": (save_wan, {"teacher_size": "32x32", "teacher_frames": 9}, 5),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_priors_are_planned_made_and_stored(
    family: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save, clips, evaluations = FAMILIES[family]
    flags = world.flags(
        student=None,
        teacher=save(tmp_path / "teacher"),
        prior_dir=tmp_path / "priors",
        text_cache=tmp_path / "texts",
        ddim_steps=1,
        limit=2,
        **clips,
    )
    assert extract.main([*flags, "--dry_run"]) == 0
    assert f"evaluations of the transformer: {2 * evaluations}" in capsys.readouterr().out
    assert extract.main(flags) == 0
    store = PriorStore(tmp_path / "priors")
    priors = [store.read(key) for key in store]
    assert len(priors) == 2
    for prior in priors:
        assert prior.evaluations == evaluations
        assert prior.tokens
        assert (prior.attention.sum(-1) > 0).all()


PAGE = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
LIMITS = PAGE[PAGE.index("## Limits and costs") : PAGE.index("- **Text tokens**")]


def test_the_page_has_a_download_command_for_every_model() -> None:
    found = {re.sub(r"[-_ ]", "", name.lower()) for name in re.findall(r"--local-dir (\S+)", PAGE)}
    names = re.findall(r"^\| (\S.*?) \| \d", LIMITS, flags=re.MULTILINE)
    models = [
        f"{name.split()[0]} {part}" if "CogVideoX" in name else name
        for name in names
        for part in (name.removeprefix("CogVideoX ").split(" and "))
    ]
    assert len(models) == 13
    for model in models:
        wanted = re.sub(r"[-_ ]", "", model.lower()).replace("wan2.1", "wan2.1t2v").replace("a14b", "t2va14b")
        assert wanted in found, model


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("HunyuanVideo", "hunyuan_video"),
        ("LTX-Video", "ltx"),
        ("LTX-2", "ltx2"),
        ("Wan 2.1 1.3B", "wan"),
    ],
)
def test_the_page_has_the_limits_that_no_folder_states(model: str, family: str, tmp_path: Path) -> None:
    plan = plan_teacher(FAMILIES[family][0](tmp_path / "teacher"))
    (row,) = [line for line in LIMITS.splitlines() if line.startswith(f"| {model} |")]
    _, _, text, clip, size, *_ = row.split("|")
    assert int(text) == plan.text_length
    assert int(clip.split()[0]) == plan.frames
    assert tuple(map(int, size.split(" × "))) == plan.size
