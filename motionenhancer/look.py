"""Show what a teacher and a student attend to, in one html file: for a run, a folder of priors, or one clip.

`motionenhancer look RUN`, `look --prior_dir DIR`, `look --video FILE --text TEXT --teacher DIR --student DIR`
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .alignment.dataset import MotionDataset
from .data import Sample, SkipLog, read_frames
from .data.clip import segment_of
from .data.digests import DigestCache
from .data.readers import read_samples
from .data.sample import whole_words
from .evaluation.generate import conversation
from .flags import parse_arguments
from .priors.arguments import PriorArguments
from .priors.combination import combine_priors
from .priors.extraction import StoredPriors, read_extraction
from .priors.prior import MotionPrior
from .priors.prior_settings import PriorSettings
from .priors.reader import Reader
from .priors.requests import PriorRequest
from .priors.storage import DamagedPrior, PriorStore
from .report.page import pick, write_page, write_run_page
from .report.picture import contact_sheet, write_overlay
from .report.views import View, load_views
from .report.watch import add_maps, read_student, task_of
from .settings import DataArguments, LookArguments, ReportArguments
from .students import load_student
from .toy.defaults import default_toy

NAME = "look.html"


def main(argv: list[str] | None = None) -> int:
    kinds = (LookArguments, ReportArguments, DataArguments, PriorArguments, PriorSettings)
    given = parse_arguments(kinds, argv, prog="python -m motionenhancer.look")
    try:
        _run(*given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(
    look: LookArguments,
    shown: ReportArguments,
    data: DataArguments,
    prior: PriorArguments,
    settings: PriorSettings,
) -> None:
    prior.find()
    output = None if look.output is None else Path(look.output)
    if look.run is not None:
        folder = Path(look.run)
        path = write_run_page(folder, output, look.id)
        views = pick(load_views(folder), look.id, str(folder))
    else:
        if look.video is not None:
            views, title, folder = [_view_of_clip(look, prior, settings)], look.video, Path(".")
        else:
            folder, title = Path(prior.prior_dir), prior.prior_dir
            most = len(look.id or ()) or max(1, shown.report_samples)
            views = list(islice(_views_of_store(look.id or [], data, prior, settings), most))
            if not views:
                raise ValueError(f"--prior_dir {folder}: holds no prior{' of --id' if look.id else ''}")
        path = output or folder / NAME
        write_page(path, views, title)
    print(f"{len(views)} clips: {path}")
    if (look.png or look.mp4) and not views:
        raise ValueError(f"{look.run}: the run kept no sample to draw")
    if look.png is not None:
        contact_sheet(views[0], look.word, smooth=look.smooth).save(look.png, "PNG", optimize=True)
        print(f"{views[0].id}: {look.png}")
    if look.mp4 is not None:
        write_overlay(look.mp4, views[0], look.word, smooth=look.smooth)
        print(f"{views[0].id}: {look.mp4}")


def _view_of_clip(look: LookArguments, prior: PriorArguments, settings: PriorSettings) -> View:
    """Read one clip by a teacher, a student or both."""
    assert look.video is not None
    assert look.text is not None
    if prior.teacher is None and look.student is None:
        prior.teacher = str(default_toy().teacher)
    video, device = Path(look.video), PartialState().device
    read_frames(video, num_frames=2, min_frames=2)
    view = View(video.name, look.text.strip(), video, spans=whole_words(look.text.strip()))
    # Nothing that comes after a word changes how it attends; a conversation ends with an answer.
    sample = conversation(video.name, view.prompt, video)
    if prior.teacher is not None:
        prior.check(settings, device)
        read = []
        for one in prior.each():
            said = "" if one.source is None else one.source.said(sample, "question")
            reader = Reader(one.load(device), one.reading(settings))
            request = PriorRequest(video, view.prompt, said=said)
            read.append(reader.read(request, reader.decode(request)).prior)
        found = combine_priors(read, prior.weights())
        view = View.of_prior(found, id=video.name, video=video)
    if look.student is not None:
        model, processor, family = load_student(look.student, device=device)
        dataset = MotionDataset(
            [sample],
            family,
            processor,
            keys={},
            store=PriorStore(Path(prior.prior_dir)),
            source="question",
            num_frames=look.num_frames or family.num_frames,
        )
        add_maps(view, "after", read_student(model, dataset, sample), sample, "question")
    return view


def _views_of_store(
    ids: list[str], data: DataArguments, prior: PriorArguments, settings: PriorSettings
) -> Iterator[View]:
    """Yield priors of a folder: of a data file's samples, with clips; otherwise by their keys."""
    store = PriorStore(Path(prior.prior_dir))
    if not store.folder.is_dir():
        raise ValueError(f"--prior_dir {store.folder}: no such folder")
    seen: set[str] = set()
    for sample, keys, found in _of_samples(ids, data, prior, settings, store):
        seen |= {*keys, sample.id}
        yield View.of_prior(found, id=sample.id, video=segment_of(sample.videos[0]), task=task_of(sample))
    for key in [] if seen and not ids else store:
        wanted = not ids or any(key.startswith(name) for name in ids if name not in seen)
        if key not in seen and wanted and (alone := _read(store, key)) is not None:
            yield View.of_prior(alone, id=key[:16])


def _of_samples(
    ids: list[str], data: DataArguments, prior: PriorArguments, settings: PriorSettings, store: PriorStore
) -> Iterator[tuple[Sample, list[str], MotionPrior]]:
    """Yield samples of `--data`, or of the folder's last extraction, with their priors and their keys."""
    try:
        last = read_extraction(store.folder)
    except (OSError, ValueError):
        last = None
    file, root, made = data.data, data.video_root, last
    if file is None and last is not None and Path(last.data).is_file():
        file, root = last.data, last.video_root
    if prior.teachers:
        device = PartialState().device
        source = prior.prompt_source if last is None else last.source
        named = {str(one.teacher): one.name(device, settings) for one in prior.each()}
        made = StoredPriors(named, source, prior.store(device))
    if file is None or made is None:
        print("clips are not shown: they need --data, --video_root, --teacher and the settings of the priors")
        return
    if len(made.teachers) > 1:
        print(f"priors of {' + '.join(made.teachers)}, combined; --teacher shows those of one")
    with DigestCache(store.folder, writes=False) as cache:
        for sample in read_samples(file, root, SkipLog(shout=0), limit=data.limit):
            if ids and sample.id not in ids:
                continue
            try:
                keys = made.keys(sample, cache.digest)
            except (ValueError, OSError):
                continue
            if any(key in store for key in keys) and (found := _read(made, keys)) is not None:
                yield sample, keys, found


def _read(priors: PriorStore | StoredPriors, key: Any) -> MotionPrior | None:
    try:
        return priors.read(key)
    except (DamagedPrior, KeyError) as error:
        print(f"not shown: {error}")
        return None


if __name__ == "__main__":
    sys.exit(main())
