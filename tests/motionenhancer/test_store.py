from __future__ import annotations

import dataclasses
import errno
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from motionenhancer import store as cli
from motionenhancer.priors.prior import MotionPrior
from motionenhancer.priors.prior_settings import PriorSettings
from motionenhancer.priors.storage import DamagedPrior, PriorStore, prior_key

KEY = "ab" + "0" * 62


def make_prior(seed: int = 0) -> MotionPrior:
    generator = torch.Generator().manual_seed(seed)
    return MotionPrior(
        attention=(torch.rand(2, 24, generator=generator) / 24).half(),
        tokens=["▁red", "▁moves"],
        spans=[(4, 7), (15, 20)],
        prompt="the red square moves — naïve ✓",
        grid=(2, 3, 4),
        heads=[0, 3],
        head_scores={
            "dfc": [0.1, 0.2, 0.1, 0.3],
            "tcs": [1.0, 2.0, 1.0, 1.0],
            "dsr": [0.5, 0.25, 0.25, 0.75],
            "composite": [0.1, -0.1, -0.2, 0.2],
        },
        all_tokens=["▁the", "▁red", "▁square", "▁moves"],
        all_spans=[(0, 3), (4, 7), (8, 14), (15, 20)],
        token_scores=[0.1, 0.3, 0.1, 1 / 3],
        kept=[1, 3],
        confidence={"concentration": 0.1, "variation": 0.4, "confidence": 0.2},
        teacher="t" * 32,
        settings=PriorSettings(steps=2, sampled_rows="all"),
        frames_given=17,
        frames_used=17,
        truncated=1,
        evaluations=10,
        seconds={"encode": 0.5},
        times=[0.0, 1 / 3],
        origin="caf\udce9.mp4 by model",
    )


def made_for(text: str, settings: PriorSettings, seed: int = 0) -> MotionPrior:
    """The prior of a teacher "t" for a text of at least four characters."""
    places = [(i, i + 1) for i in range(4)]
    given = {"prompt": text, "teacher": "t", "settings": settings, "spans": places[1::2], "all_spans": places}
    return dataclasses.replace(make_prior(seed), **given)


def test_a_prior_says_in_one_line_and_in_a_notebook_what_it_is() -> None:
    prior = dataclasses.replace(make_prior(), prompt="the red <b>&amp; moves")
    said = repr(prior)
    assert "\n" not in said
    assert len(said) < 300
    for part in ("words: red", "grid 2×3×4", "teacher tttttttt", "steps=2", "sampled_rows=all"):
        assert part in said
    page = prior._repr_html_()
    assert "<b>" not in page, "what a text holds is no markup"
    shares = prior.attention.float().reshape(2, 2, 12).sum(2)
    shares /= shares.sum(1, keepdim=True)
    assert all(f">{share:.2f}</td>" in page for share in shares.flatten().tolist())


def test_a_prior_comes_back_as_it_went_in(tmp_path: Path) -> None:
    store, prior = PriorStore(tmp_path), make_prior()
    assert KEY not in store
    store.write(KEY, prior)
    assert KEY in store
    assert list(store) == [KEY]
    back = store.read(KEY)
    assert torch.equal(back.attention, prior.attention)
    for field in dataclasses.fields(MotionPrior):
        if field.name not in ("attention", "seconds"):
            assert getattr(back, field.name) == getattr(prior, field.name), field.name


def test_writing_is_deterministic_and_leaves_nothing_behind(tmp_path: Path) -> None:
    store, prior = PriorStore(tmp_path), make_prior()
    first = store.write(KEY, prior).read_bytes()
    slower = dataclasses.replace(prior, seconds={"encode": 9.0})
    assert store.write(KEY, slower).read_bytes() == first
    assert [p.name for p in (tmp_path / "ab").iterdir()] == [f"{KEY}.safetensors"]


def test_the_key_follows_everything_that_changes_a_prior() -> None:
    base = ("v" * 64, "text", "t" * 32, PriorSettings())
    keys = {prior_key(*base)}
    keys.add(prior_key("w" * 64, *base[1:]))
    keys.add(prior_key(base[0], "Text", *base[2:]))
    keys.add(prior_key(*base[:2], "u" * 32, base[3]))
    changed = {"steps": 10, "guidance_scale": 5.0, "start": "random", "memory": False, "head_ratio": 0.25}
    changed |= {"token_ratio": 0.75, "sampled_rows": "all", "seed": 1, "mode": "renoise", "noise_level": 300}
    changed |= {"step_weights": (0, 0, 0, 1, 1), "head_selection": "off", "token_selection": "off"}
    changed |= {"guidance_scale_2": 3.0, "diagonal_width": 1, "token_scores": "standardized"}
    changed |= {"token_unit": "word"}
    assert set(changed) == {f.name for f in dataclasses.fields(PriorSettings)}
    keys |= {prior_key(*base[:3], PriorSettings(**{name: value})) for name, value in changed.items()}
    assert len(keys) == 4 + len(changed)
    written = PriorSettings(guidance_scale=6, head_ratio=1, token_ratio=1)
    assert written == PriorSettings(guidance_scale=6.0, head_ratio=1.0, token_ratio=1.0)
    assert prior_key(*base[:3], written) == prior_key(
        *base[:3], PriorSettings(head_ratio=1.0, token_ratio=1.0)
    )
    assert PriorSettings(guidance_scale_2=6) == PriorSettings()
    assert prior_key(*base) == prior_key(*base)
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "text", "type"])
def test_a_damaged_file_is_noticed(tmp_path: Path, harm: str) -> None:
    store = PriorStore(tmp_path)
    path = store.write(KEY, make_prior())
    body = path.read_bytes()
    damaged = {
        "truncate": body[:-7],
        "flip": body[:-3] + bytes([body[-3] ^ 1]) + body[-2:],
        "empty": b"",
        "text": body.replace(b"square moves", b"square stays", 1),
        "type": body.replace(b'"F16"', b'"I16"', 1),
    }[harm]
    path.write_bytes(damaged)
    with pytest.raises(DamagedPrior, match=KEY):
        store.read(KEY)
    aside = store.set_aside(KEY)
    assert KEY not in store
    assert aside.read_bytes() == damaged


def test_files_that_were_exchanged_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, other = PriorStore(tmp_path), "cd" + "1" * 62
    mine, theirs = store.write(KEY, make_prior()), store.write(other, make_prior(1))
    body = mine.read_bytes()
    mine.write_bytes(theirs.read_bytes())
    theirs.write_bytes(body)
    for key in (KEY, other):
        with pytest.raises(DamagedPrior, match="its name"):
            store.read(key)
    assert cli.main(["verify", "--prior_dir", str(tmp_path)]) == 1
    assert "0 good, 2 damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed", [{}, {"clip": "w" * 64}, {"prompt": "the red square moves — naive ✓"}, {"teacher": "u" * 32}]
)
def test_a_prior_under_the_name_of_another_is_noticed(tmp_path: Path, changed: dict[str, str]) -> None:
    store, prior = PriorStore(tmp_path), dataclasses.replace(make_prior(), clip="v" * 64)
    key = prior_key(prior.clip, prior.prompt, prior.teacher, prior.settings)
    store.write(key, dataclasses.replace(prior, **changed))
    if not changed:
        assert store.read(key).clip == prior.clip
        return
    with pytest.raises(DamagedPrior, match="another clip, text, teacher or settings"):
        store.read(key)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention", -torch.ones(2, 24).half()),
        ("attention", torch.full((2, 24), torch.inf).half()),
        ("attention", torch.full((2, 24), torch.nan).half()),
        ("attention", torch.ones(2, 23).half()),
        ("grid", (2, 3, -4)),
        ("kept", [1, 4]),
        ("kept", [3, 1]),
        ("kept", [-1, 3]),
        ("spans", [(4, 7), (15, 99)]),
        ("spans", [(7, 4), (15, 20)]),
        ("all_spans", [(0, 3)]),
        ("token_scores", [0.1, 0.3, 0.1]),
        ("heads", [0, 4]),
        ("heads", [-1]),
        ("confidence", {"confidence": 1.5}),
    ],
)
def test_what_no_teacher_gives_is_damage(tmp_path: Path, name: str, value: object) -> None:
    store = PriorStore(tmp_path)
    store.write(KEY, dataclasses.replace(make_prior(), **{name: value}))
    said = {"token_scores": "all_spans"}.get(name, name)
    with pytest.raises(DamagedPrior, match=f"{said} is out of the range of a teacher"):
        store.read(KEY)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    store = PriorStore(tmp_path)
    path, prior = store.write(KEY, make_prior()), make_prior()
    body = path.read_bytes()
    for position in range(0, len(body), 13):
        path.write_bytes(body[:position] + bytes([body[position] ^ 0x20]) + body[position + 1 :])
        try:
            back = store.read(KEY)
        except DamagedPrior:
            continue
        assert torch.equal(back.attention, prior.attention)
        assert back.prompt == prior.prompt
        assert back.heads == prior.heads


def test_reading_again_and_again_keeps_no_memory(tmp_path: Path) -> None:
    store = PriorStore(tmp_path)
    store.write(KEY, make_prior())

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").is_file():
        pytest.skip("resident memory is read from /proc")
    kept = []
    for _ in range(4):
        before = resident()
        for _ in range(2000):
            store.read(KEY)
        gc.collect()
        kept.append(resident() - before)
    # As torch tensors from safetensors 0.8 they would have kept 64 bytes each, every time. An allocator takes
    # a large piece once in a while.
    assert min(kept) < 2000 * 32


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=KEY):
        PriorStore(tmp_path).read(KEY)


def test_list_verify_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, other = PriorStore(tmp_path), "cd" + "1" * 62
    store.write(KEY, make_prior())
    path = store.write(other, make_prior(1))
    assert cli.main(["list", "--prior_dir", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "2 priors" in listed
    assert "2×3×4" in listed
    assert listed.count("caf\\udce9.mp4 by model  MotionPrior(") == 2
    assert listed.count("teacher tttttttt") == 2
    assert cli.main(["verify", "--prior_dir", str(tmp_path)]) == 0
    path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["verify", "--prior_dir", str(tmp_path)]) == 1
    assert "1 good, 1 damaged" in capsys.readouterr().out
    assert other not in store
    left, writing = tmp_path / "ab" / ".left.123.tmp", tmp_path / "ab" / ".writing.124.tmp"
    for temporary in (left, writing, tmp_path / ".job.json.125.tmp"):
        temporary.write_bytes(b"half")
        if temporary != writing:
            os.utime(temporary, (0, 0))
    assert cli.main(["prune", "--prior_dir", str(tmp_path)]) == 0
    assert "removed 3 files" in capsys.readouterr().out
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {f"{KEY}.safetensors", writing.name}
    with pytest.raises(SystemExit):
        cli.main(["list", "--prior_dir", str(tmp_path / "missing")])
    assert "missing" in capsys.readouterr().err


def test_what_is_no_prior_is_reported_and_never_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, pipe, folder = PriorStore(tmp_path), "cd" + "1" * 62, "ef" + "2" * 62
    right = store.write(KEY, make_prior())
    for key in (pipe, folder):
        store.path(key).parent.mkdir()
    os.mkfifo(store.path(pipe))
    os.mkfifo(store.refusal_path(pipe))
    store.path(folder).mkdir()
    (tmp_path / "0f").write_bytes(b"in place of a folder")
    right.with_name(f"{folder}.safetensors").write_bytes(b"in the folder of another key")
    assert cli.main(["list", "--prior_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("DAMAGED") == 2
    assert cli.main(["verify", "--prior_dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "1 good, 2 damaged, 2 out of place" in out
    assert f"not where a prior belongs, left as it is: {tmp_path / '0f'}\n" in out
    assert out.count("not a regular file") == 2
    assert cli.main(["verify", "--prior_dir", str(tmp_path)]) == 1, "what is out of place is still there"
    assert "1 good, 0 damaged, 2 out of place" in capsys.readouterr().out
    assert cli.main(["prune", "--prior_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("removed 1 files"), "a folder may hold anything"


def test_a_folder_that_cannot_be_listed_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    PriorStore(tmp_path).write(KEY, make_prior())

    scan = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name == KEY[:2]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert cli.main(["verify", "--prior_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: [Errno 13] Permission denied")


def test_a_good_file_that_cannot_be_read_just_now_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, gone = PriorStore(tmp_path), "ef" + "2" * 62
    path = store.write(KEY, make_prior())
    opened = Path.open

    def refuse(file: Path, *args, **options):
        if file == path:
            raise OSError(errno.EMFILE, "Too many open files", str(file))
        return opened(file, *args, **options)

    # A key that is listed and then removed by somebody else counts as none.
    monkeypatch.setattr(PriorStore, "__iter__", lambda store: iter([KEY, gone]))
    assert cli.main(["verify", "--prior_dir", str(tmp_path)]) == 0
    assert "1 good, 0 damaged in" in capsys.readouterr().out
    assert cli.main(["list", "--prior_dir", str(tmp_path)]) == 0
    assert "1 priors" in capsys.readouterr().out
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        store.read(KEY)
    assert cli.main(["verify", "--prior_dir", str(tmp_path)]) == 1
    assert "0 good, 0 damaged, 1 that cannot be read" in capsys.readouterr().out
    assert cli.main(["list", "--prior_dir", str(tmp_path)]) == 0
    assert "CANNOT BE READ (Too many open files)" in capsys.readouterr().out
    monkeypatch.undo()
    assert torch.equal(store.read(KEY).attention, make_prior().attention)


def test_opening_and_reading_never_list_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PriorStore(tmp_path)
    for i in range(40):
        store.write(f"{i:02x}" + "0" * 62, make_prior(i))

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a folder was listed")

    for name in ("scandir", "listdir", "walk"):
        monkeypatch.setattr(f"os.{name}", refuse)
    for name in ("glob", "rglob", "iterdir"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(AssertionError, match="listed"):
        list(store)
    opened = PriorStore(tmp_path)
    key = "07" + "0" * 62
    assert key in opened
    assert "ff" + "0" * 62 not in opened
    assert torch.equal(opened.read(key).attention, make_prior(7).attention)
    with pytest.raises(KeyError):
        opened.read("ff" + "0" * 62)
    opened.write(key, make_prior(8))
    assert torch.equal(opened.read(key).attention, make_prior(8).attention)


_WRITER = """
import sys
from pathlib import Path
from test_store import make_prior
from motionenhancer.priors.storage import PriorStore
store = PriorStore(Path(sys.argv[1]))
for again in range(15):
    for i in range(12):
        store.write(f"{i % 3:02x}{i:062x}", make_prior(i))
"""


def test_processes_that_write_the_same_keys_leave_each_prior_whole(tmp_path: Path) -> None:
    store, here = PriorStore(tmp_path / "store"), Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(store.folder)], env=environment)
        for _ in range(2)
    ]
    keys, reads = [f"{i % 3:02x}{i:062x}" for i in range(12)], 0
    while any(writer.poll() is None for writer in writers):
        for i, key in enumerate(keys):
            if key in store:
                assert torch.equal(store.read(key).attention, make_prior(i).attention)
                reads += 1
        time.sleep(0.002)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert reads
    assert sorted(store) == sorted(keys)
    assert len([path for path in store.folder.rglob("*") if path.is_file()]) == len(keys)
    alone = PriorStore(tmp_path / "alone")
    for i, key in enumerate(keys):
        assert store.path(key).read_bytes() == alone.write(key, make_prior(i)).read_bytes()


@pytest.mark.parametrize("seed", range(3))
def test_half_precision_loses_what_it_says(tmp_path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.rand(2, 24, generator=generator, dtype=torch.float64) ** (4 * seed + 1)
    store = PriorStore(tmp_path)
    store.write(KEY, dataclasses.replace(make_prior(), attention=exact))
    lost = (store.read(KEY).attention.double() - exact).abs()
    assert (lost <= torch.where(exact > 6.1e-5, exact * 2**-11, torch.tensor(3e-8).double())).all()
