"""Look after a folder of motion priors.

`python -m motionenhancer.store list|verify|prune --prior_dir DIR`
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from pathlib import Path

from .priors.storage import DAMAGED, DEFAULT_DIR, DamagedPrior, PriorStore

#: Seconds after which a temporary file is taken for one of a run that died.
_ABANDONED = 600


def _list(store: PriorStore) -> int:
    total = count = 0
    for key in store:
        size = 0
        try:
            size = store.path(key).stat().st_size
            prior = store.read(key)
            about = (
                f"grid {'×'.join(map(str, prior.grid))}  {len(prior.tokens)} tokens  {prior.prompt[:60]!r}"
            )
        except (FileNotFoundError, KeyError):
            continue  # removed or set aside since the folder was listed
        except DamagedPrior:
            about = "DAMAGED"
        except OSError as error:
            about = f"CANNOT BE READ ({error.strerror})"
        total, count = total + size, count + 1
        print(f"{key[:16]}  {size:>9,} B  {about}")
    refused = list(store.refusals())
    for key, refusal in refused:
        why = f"{refusal.reason}: {refusal.detail}".encode("utf-8", "backslashreplace").decode()
        print(f"{key[:16]}  {'none':>11}  {why}")
    print(f"{count} priors, {total:,} bytes, {len(refused)} clips that can give none in {store.folder}")
    return 0


def _verify(store: PriorStore) -> int:
    good, bad, unread = 0, [], []
    for key in store:
        try:
            store.read(key)
            good += 1
        except KeyError:
            continue  # removed or set aside since the folder was listed
        except DamagedPrior as error:
            bad.append(str(error))
            with suppress(FileNotFoundError):
                store.set_aside(key)
        except OSError as error:
            unread.append(str(error))
    for line in bad:
        print(f"damaged, set aside: {line}")
    for line in unread:
        print(f"cannot be read, left as it is: {line}")
    more = f", {len(unread)} that cannot be read" if unread else ""
    print(f"{good} good, {len(bad)} damaged{more} in {store.folder}")
    return 1 if bad or unread else 0


def _prune(store: PriorStore) -> int:
    """Remove what no run will read: damaged files set aside and temporary files of runs that died."""
    freed = count = 0
    left = [*store.folder.glob("*/.*.tmp"), *store.folder.glob(".*.tmp")]
    for path in [*store.folder.glob(f"*/*{DAMAGED}"), *left]:
        with suppress(FileNotFoundError):
            found = path.stat()
            # A younger one may belong to a run that is writing now.
            if path not in left or time.time() - found.st_mtime > _ABANDONED:
                path.unlink()
                freed, count = freed + found.st_size, count + 1
    print(f"removed {count} files, {freed:,} bytes from {store.folder}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m motionenhancer.store", description="Look after a folder of motion priors."
    )
    parser.add_argument("action", choices=("list", "verify", "prune"))
    parser.add_argument("--prior_dir", type=Path, default=Path(DEFAULT_DIR))
    arguments = parser.parse_args(argv)
    if not arguments.prior_dir.is_dir():
        print(f"--prior_dir {arguments.prior_dir}: no such folder", file=sys.stderr)
        return 2
    actions = {"list": _list, "verify": _verify, "prune": _prune}
    return actions[arguments.action](PriorStore(arguments.prior_dir))


if __name__ == "__main__":
    sys.exit(main())
