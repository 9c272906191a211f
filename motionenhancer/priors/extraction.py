"""The record of the newest run that made priors of a folder, and the lookup of a sample's prior by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import Clip, Sample, prompt_text
from ..data.clip import segment_of
from ..files import read_json, write_json
from .arguments import PriorArguments, source_class
from .combination import CombinedStore
from .prior import MotionPrior
from .prior_settings import PriorSettings
from .requests import PriorRequest, request_key
from .storage import prior_keys

#: The record's file, in the folder of the priors.
EXTRACTION = "extraction.json"


class ExtractionRecord:
    """Writes `extraction.json`: one teacher's report, or the reports of several teachers under `teachers`.

    Args:
        folder: folder of the priors.
        reports: report of each teacher's extraction. A finished report of the same extraction in the folder
            is kept.
        common: additional entries beside the reports of several teachers.
    """

    def __init__(self, folder: Path, reports: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> None:
        self.path, self.common = folder / EXTRACTION, common
        self.asked: list[dict[str, Any]] = json.loads(json.dumps(reports))
        try:
            self.written: dict[str, Any] | None = read_json(self.path)
            before = [one for one in _reports(self.written) if one["status"] == "finished"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.written, before = None, []
        #: of each teacher, what the same extraction wrote when it had finished
        self.finished = [next((b for b in before if one.items() <= b.items()), None) for one in self.asked]
        waiting = [{"status": "waiting", **one} for one in self.asked]
        self.reports = [old or new for old, new in zip(self.finished, waiting, strict=True)]

    @classmethod
    def of(
        cls,
        prior: PriorArguments,
        settings: PriorSettings,
        device: torch.device,
        data: Mapping[str, Any],
        **about: Any,
    ) -> ExtractionRecord:
        """Return the record of priors, one report for each teacher.

        Args:
            prior, settings: the teachers, their folder of priors and their settings.
            device: device of the teachers.
            data: "data", "video_root" and "limit" of the samples.
            about: additional entries of every report.
        """
        samples = {name: data.get(name) for name in ("data", "video_root", "limit")}
        reports = [
            {
                "teacher": {"path": one.teacher, "id": one.teacher_id(device)},
                "settings": asdict(one.reading(settings)),
                **samples,
                "prompt_source": prior.prompt_source,
                **about,
            }
            for one in prior.each()
        ]
        several = {"teacher_weights": prior.teacher_weights, "grid": prior.common_grid(device)}
        return cls(Path(prior.prior_dir), reports, several)

    def write(self, place: int, status: str, results: Mapping[str, Any]) -> None:
        """Write the state of the extraction from the teacher at index `place`."""
        self.reports[place] = {"status": status, **self.asked[place], **results}
        self.save()

    def save(self) -> None:
        """Write the whole file, unless its content is already the same."""
        body = self.reports[0]
        if len(self.reports) > 1:
            open_ = [one["status"] for one in self.reports if one["status"] != "finished"]
            body = {"status": [*open_, "finished"][0], **self.common, "teachers": self.reports}
        if body != self.written:
            write_json(self.path, body)
            self.written = body


def _reports(record: Any) -> list[dict[str, Any]]:
    return record.get("teachers", [record])


@dataclass(frozen=True)
class StoredPriors:
    """How the priors of a folder were made, which gives the key of a sample's prior.

    Attributes:
        teachers: path → `prior_keys` of the teacher and its settings.
        source: the text of the teachers: "both", "question" or "answer".
        store: reads the priors; priors of several teachers are combined.
        data, video_root: the samples of the extraction.
    """

    teachers: Mapping[str, Callable[[str, str], str]]
    source: str
    store: CombinedStore
    data: str = ""
    video_root: str | None = None

    def keys(self, sample: Sample, digest: Callable[[Path], str]) -> list[str]:
        """The keys of a sample's priors, one for each teacher; empty for a teacher that can make no prior.

        Args:
            sample: a sample with one video.
            digest: reads a clip's `content_digest`.

        Raises:
            ValueError, OSError: no teacher can make a prior, or the clip cannot be read.
        """
        if len(sample.videos) != 1:
            raise ValueError(f"alignment needs one video, the sample has {len(sample.videos)}")
        text, _ = prompt_text(sample, self.source)  # type: ignore[arg-type]
        video = segment_of(sample.videos[0])
        read = digest(video.path if isinstance(video, Clip) else video)
        keys, errors = [], []
        for teacher, name in self.teachers.items():
            source = source_class(teacher)
            try:
                said = "" if source is None else source.said(sample, self.source)
                keys.append(request_key(name, read, PriorRequest(video, text, said=said)))
            except ValueError as error:
                errors.append(error)
                keys.append("")
        if not any(keys):
            raise errors[0]
        return keys

    def read(self, keys: Sequence[str]) -> MotionPrior:
        """Read the prior of `keys`, from those keys that the store has.

        Raises:
            KeyError, OSError, DamagedPrior: the store has none of the keys; see `PriorStore.read`.
        """
        there = [key if key and key in self.store else "" for key in keys]
        if not any(there):
            raise KeyError("no such prior in the store")
        return self.store.read("+".join(there))


def read_extraction(folder: str | Path) -> StoredPriors:
    """Return how the newest extraction into a folder made its priors.

    Raises:
        FileNotFoundError: there was no extraction.
        ValueError: the record cannot be read.
    """
    path = Path(folder) / EXTRACTION
    try:
        record = read_json(path)
        reports = _reports(record)
        teachers = {
            str(one["teacher"]["path"]): prior_keys(one["teacher"]["id"], PriorSettings(**one["settings"]))
            for one in reports
        }
        prior = PriorArguments(teacher=[*teachers], teacher_weights=record.get("teacher_weights"))
        grid = record.get("grid")
        store = CombinedStore(path.parent, prior.weights(), None if grid is None else tuple(grid))
        samples = {name: reports[0][name] for name in ("data", "video_root")}
        return StoredPriors(teachers, str(reports[0]["prompt_source"]), store, **samples)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the record of an extraction ({error})") from error
