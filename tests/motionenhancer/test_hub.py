"""Models named by a folder or by an id of the Hub, in a cache made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects
from tiny_world import World
from train_support import flags, report_of, shared_priors

from motionenhancer import eval as evaluation
from motionenhancer import extract, hub, train
from motionenhancer.hub import model_folder
from motionenhancer.priors.arguments import PriorArguments
from motionenhancer.settings import StudentArguments
from motionenhancer.students import load_student
from motionenhancer.teachers import load_teacher, teacher_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, model: Path, name: str, revision: str = "main") -> Path:
    """A model as the Hub's clients keep it."""
    home = cache / ("models--" + name.replace("/", "--"))
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(COMMIT)
    return Path(shutil.copytree(model, home / "snapshots" / COMMIT))


def test_a_folder_is_itself(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert model_folder("owner/model", "--student") == Path("owner/model")
    for name in ("none", "/no/such", "a/b/c", "./a", "../a", "a/"):
        assert model_folder(name, "--student") == Path(name)


def test_ids_of_students_and_teachers(cache: Path, student_dir: Path, teacher_dir: Path) -> None:
    student = put(cache, student_dir, "owner/student")
    teacher = put(cache, teacher_dir, "owner/teacher", "v1")
    for name in ("owner/student", "owner/student@main", f"owner/student@{COMMIT}"):
        assert model_folder(name, "--student") == student
    assert load_student("owner/student")[2].name == "qwen2_5_vl"
    assert StudentArguments(student="owner/student").student == str(student)
    arguments = PriorArguments(teacher="owner/teacher@v1")
    arguments.find()
    assert arguments.teacher == str(teacher)
    found = load_teacher("owner/teacher@v1", "cpu")
    # A folder and the id of the same model share their priors.
    assert found.id == load_teacher(teacher_dir, "cpu").id
    assert arguments.teacher_id("cpu") == teacher_id(teacher_dir, **arguments.identity("cpu"))


def status(run: Any, *flags: str) -> int:
    """The exit status of a command; the parser of flags exits by an exception."""
    try:
        return run(list(flags))
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize("name", ["owner/none", "owner/student@v2"])
def test_what_is_not_in_the_cache(cache: Path, student_dir: Path, capsys: Any, name: str) -> None:
    put(cache, student_dir, "owner/student")
    repository, _, revision = name.partition("@")
    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    for run in (train.main, evaluation.main):
        assert status(run, "--student", name) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"--student {name}: there is no such folder" in said
        assert "HF_HUB_OFFLINE is set" in said
        assert said.endswith(f"download it with `{command}`")


def test_incomplete_models_are_not_taken(cache: Path, student_dir: Path) -> None:
    folder = put(cache, student_dir, "owner/student")
    weights = folder / "model.safetensors"
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no complete model of this id"):
        model_folder("owner/student", "--student")
    shutil.copy(weights, folder / "model-00002.safetensors")
    assert model_folder("owner/student", "--student") == folder
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no complete model of this id"):
        model_folder("owner/student", "--student")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RepositoryNotFoundError, "the Hub has no model owner/none that you may read"),
        (GatedRepoError, "owner/none is gated: accept its terms"),
        (RevisionNotFoundError, "the Hub has no revision 'v1' of owner/none"),
        (OSError, "the download failed: no route"),
    ],
)
def test_what_the_hub_refuses(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], says: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    original = hub.snapshot_download

    def refused(repository: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return original(repository, **options)
        assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in options["allow_patterns"])
        failure = error.__new__(error)
        Exception.__init__(failure, "no route")
        raise failure

    monkeypatch.setattr(hub, "snapshot_download", refused)
    with pytest.raises(ValueError, match=says) as caught:
        model_folder("owner/none@v1", "--teacher")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("download it with `hf download owner/none --revision v1`")


def test_a_dry_run_downloads_nothing(
    cache: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    original = hub.snapshot_download

    def listed(repository: str, **options: Any) -> Any:
        if options.get("local_files_only"):
            return original(repository, **options)
        assert options["dry_run"], "a download"
        sizes = {"config.json": 900, "model.safetensors": 3 << 30, "vae/model.safetensors": 1 << 30}
        return [SimpleNamespace(file_size=size, will_download=size > 1000) for size in sizes.values()]

    monkeypatch.setattr(hub, "snapshot_download", listed)
    says = "a run would download 2 files, 4.0 GB, and a dry run downloads nothing"
    data = tmp_path / "train.jsonl"
    data.touch()
    for run, flag in ((train.main, "--student"), (train.main, "--teacher"), (extract.main, "--teacher")):
        assert status(run, flag, "owner/large", "--data", str(data), "--dry_run", "true") == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{flag} owner/large: not in the Hugging Face cache: {says}; download it with" in said
    put(cache, student_dir, "owner/student")
    # A dry run plans with a model in the cache.
    assert model_folder("owner/student", "--student", dry_run=True).is_dir()


def test_a_download_takes_the_place_of_an_incomplete_model(
    cache: Path, tmp_path: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = put(cache, student_dir, "owner/student")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    original = hub.snapshot_download

    def downloaded(repository: str, **options: Any) -> str:
        if not options.get("local_files_only"):
            shutil.copy(tmp_path / "model.safetensors", folder)
            return str(folder)
        return original(repository, **options)

    monkeypatch.setattr(hub, "snapshot_download", downloaded)
    assert load_student("owner/student")[2].name == "qwen2_5_vl"


class Api:
    """A stand-in for the Hub: it records calls, and raises the given errors."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails: dict[str, Exception] = {}

    def __call__(self, token: str | None) -> Api:
        assert token == "hf_secret"
        return self

    def __getattr__(self, name: str) -> Any:
        def call(repo_id: str, **given: Any) -> SimpleNamespace:
            self.calls.append((name, given))
            if name in self.fails:
                raise self.fails[name]
            return SimpleNamespace(repo_id=f"me/{repo_id.rpartition('/')[2]}")

        return call


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HfApi", api := Api())
    return api


def pushing(world: World, out: Path, **more: object) -> list[str]:
    options = {
        "push_to_hub": True,
        "hub_token": "hf_secret",
        "save_strategy": "steps",
        "save_steps": 1,
        **more,
    }
    return flags(world, out, prior_dir=shared_priors(world), **options)


def test_the_model_of_a_finished_run_is_uploaded_and_nothing_else(
    world: World, tmp_path: Path, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    api.fails["upload_folder"] = OSError("no\nnetwork")
    assert train.main(pushing(world, out, hub_private_repo=True, hub_revision="v2")) == 2
    assert f"the finished run in {out} was not uploaded (no network)" in capsys.readouterr().err
    assert report_of(out)["status"] == "finished"
    opens = ["create_repo", "create_branch"]
    assert [name for name, _ in api.calls] == [*opens, *opens, "upload_folder"], "it is opened at the start"
    assert api.calls[0][1] == {"private": True, "exist_ok": True}
    api.fails.clear()
    assert train.main(pushing(world, out, hub_private_repo=True, hub_revision="v2")) == 0
    said = capsys.readouterr().out
    assert "this run is finished" in said
    assert said.endswith("uploaded: https://huggingface.co/me/mine\n")
    name, given = api.calls[-1]
    assert (name, given["folder_path"], given["revision"]) == ("upload_folder", out, "v2")
    held = [str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()]
    gone = set(filter_repo_objects(held, allow_patterns=given["allow_patterns"]))
    assert gone == {"README.md", *(file.name for file in world.student.iterdir())}
    assert {"motion_report.json", "report.html", "report/samples.safetensors"} <= {*held}
    assert any(name.startswith("checkpoint-2/") for name in held)
    assert not any(b"hf_secret" in file.read_bytes() for file in out.rglob("*") if file.is_file())


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the real client, whose network library raises other errors."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    upload = hub.Upload("owner/model", token="hf_secret")
    assert upload.open().startswith("--push_to_hub true: owner/model cannot be written (")
    with pytest.raises(OSError, match="owner/model cannot be written"):
        upload.push(tmp_path, "")


def test_an_upload_that_cannot_be_is_refused_before_any_work(
    world: World,
    tmp_path: Path,
    api: Api,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("motionenhancer.train.load_samples", lambda *_: pytest.fail("went on to the data"))
    api.fails["create_repo"] = OSError("401: not yours")
    assert train.main(pushing(world, tmp_path / "out", hub_model_id="them/model")) == 2
    said = "error: --push_to_hub true: them/model cannot be written (401: not yours)"
    assert said in capsys.readouterr().err
    assert [*(tmp_path / "out").iterdir()] == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert train.main(pushing(world, tmp_path / "out", dry_run=True)) == 2
    assert "error: --push_to_hub true: HF_HUB_OFFLINE is set" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(pushing(world, tmp_path / "out", push_to_hub=False))
    error = capsys.readouterr().err
    assert "--hub_token needs --push_to_hub true" in error
    assert "hf_secret" not in error
