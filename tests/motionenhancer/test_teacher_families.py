"""Extraction with a teacher of every family, from the plan to the store."""

from __future__ import annotations

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
