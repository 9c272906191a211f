"""Look after a folder of motion priors.

`python -m motionenhancer.store list|verify|prune --prior_dir DIR`
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .flags import parse_arguments
from .priors.prior import MotionPrior
from .priors.storage import DAMAGED, DamagedPrior, PriorStore
from .settings import StoreArguments

#: Age in seconds from which a temporary file is assumed to be of a run that died.
_ABANDONED = 600


def _each(store: PriorStore) -> Iterator[tuple[str, int, MotionPrior | Exception]]:
    """Yield every stored prior's key and bytes, and the prior or the reason why it cannot be read."""
    for key in store:
        size = 0
        try:
            size = store.path(key).stat().st_size
            yield key, size, store.read(key)
        except (FileNotFoundError, KeyError):
            continue  # removed or set aside since the folder was listed
        except (DamagedPrior, OSError) as error:
            yield key, size, error


def _printable(text: str) -> str:
    """A text whose bytes of file names that are not text are escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _list(store: PriorStore) -> int:
    total = count = 0
    for key, size, found in _each(store):
        if isinstance(found, MotionPrior):
            about = f"{_printable(found.origin)}  {found!r}"
        elif isinstance(found, OSError):
            about = f"CANNOT BE READ ({found.strerror})"
        else:
            about = "DAMAGED"
        total, count = total + size, count + 1
        print(f"{key[:16]}  {size:>9,} B  {about}")
    refused = list(store.refusals())
    for key, refusal in refused:
        why = f"{refusal.reason}: {refusal.detail}"
        print(f"{key[:16]}  {'none':>11}  {_printable(why)}")
    print(f"{count} priors, {total:,} bytes, {len(refused)} clips without a prior in {store.folder}")
    return 0


def _verify(store: PriorStore) -> int:
    good, bad, unread = 0, 0, 0
    for key, _, found in _each(store):
        if isinstance(found, MotionPrior):
            good += 1
        elif isinstance(found, DamagedPrior):
            bad += 1
            try:
                store.set_aside(key)
                print(f"damaged, set aside: {found}")
            except FileNotFoundError:
                print(f"damaged, gone meanwhile: {found}")
            except OSError as error:
                print(f"damaged, cannot be set aside ({error.strerror}): {found}")
        else:
            unread += 1
            print(f"cannot be read, left as it is: {found}")
    strays = list(store.strays())
    for path in strays:
        print(f"not where a prior belongs, left as it is: {path}")
    more = f", {unread} that cannot be read" if unread else ""
    more += f", {len(strays)} out of place" if strays else ""
    print(f"{good} good, {bad} damaged{more} in {store.folder}")
    return 1 if bad or unread or strays else 0


def _prune(store: PriorStore) -> int:
    """Remove what no run will read: damaged files set aside and temporary files of runs that died."""
    freed = count = 0
    left = [*store.folder.glob("*/.*.tmp"), *store.folder.glob(".*.tmp")]
    for path in [*store.folder.glob(f"*/*{DAMAGED}"), *left]:
        with suppress(FileNotFoundError, IsADirectoryError):
            found = path.stat()
            # A younger one may belong to a run that is writing now.
            if path not in left or time.time() - found.st_mtime > _ABANDONED:
                path.unlink()
                freed, count = freed + found.st_size, count + 1
    print(f"removed {count} files, {freed:,} bytes from {store.folder}")
    return 0


def main(argv: list[str] | None = None) -> int:
    (chosen,) = parse_arguments((StoreArguments,), argv, prog="python -m motionenhancer.store")
    actions = {"list": _list, "verify": _verify, "prune": _prune}
    try:
        return actions[chosen.action](PriorStore(Path(chosen.prior_dir)))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
