"""Find models by folder or by Hugging Face Hub id with an optional revision; upload models."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .files import read_json, readable

#: What a model is loaded from: configurations, tokenizers and safetensors. No pickle and no code.
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")

#: What a call of the Hub may raise: errors of its network library too, which depends on the Hub's version.
_FAILURES: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w(@[\w./-]+)?", re.ASCII)


def model_folder(name: str | Path, flag: str, *, dry_run: bool = False) -> Path:
    """The folder of a model.

    A folder is used as it is. An id such as ``owner/model`` or ``owner/model@revision`` is looked up in the
    Hugging Face cache and, unless ``HF_HUB_OFFLINE`` is set, downloaded into it. Only configurations,
    tokenizers and safetensors are downloaded.

    Args:
        name: a folder or an id. Any other name, such as a missing folder, is returned unchanged.
        flag: names the argument in errors, for instance ``"--student"``.
        dry_run: download nothing.

    Raises:
        ValueError: the id has no complete model in the cache, and none can be downloaded. The message is one
            line: the reason, and how to download it; in a dry run, how much a run would download.

    >>> str(model_folder("runs/toy/with/student", "--student"))
    'runs/toy/with/student'
    """
    if Path(name).exists() or not _ID.fullmatch(str(name)):
        return Path(name)
    repository, _, revision = str(name).partition("@")
    try:
        found = _snapshot(repository, revision or None, dry_run)
        if isinstance(found, Path):
            return found
        reason = f"not in the Hugging Face cache: {found}, and a dry run downloads nothing"
    except RevisionNotFoundError:
        reason = f"the Hub has no revision {revision!r} of {repository}"
    except GatedRepoError:
        reason = f"{repository} is gated: accept its terms on the Hub and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = f"there is no such folder, and the Hub has no model {repository} that you may read"
    except LocalEntryNotFoundError:
        reason = "there is no such folder, and the Hugging Face cache has no complete model of this id"
        if constants.HF_HUB_OFFLINE:
            reason += "; HF_HUB_OFFLINE is set"
    except _FAILURES as error:
        reason = f"the download failed: {' '.join(str(error).split())}"
    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    raise ValueError(f"{flag} {name}: {reason}; download it with `{command}`")


def _snapshot(repository: str, revision: str | None, dry_run: bool) -> Path | str:
    """The folder of a model; of a dry run, what is to be downloaded if it is not in the cache."""
    with suppress(LocalEntryNotFoundError):
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        if _complete(folder):
            return folder
    if constants.HF_HUB_OFFLINE:
        raise LocalEntryNotFoundError(repository)
    if dry_run:
        listed = snapshot_download(repository, revision=revision, allow_patterns=list(FILES), dry_run=True)
        missing = [file.file_size or 0 for file in listed if file.will_download]
        return f"a run would download {len(missing)} files, {readable(sum(missing))}"
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    if not any(folder.rglob("*.safetensors")):
        raise OSError("it has no safetensors weights")
    return folder


def _complete(folder: Path) -> bool:
    """Whether weights are there, and every file that an index of weights names."""
    named = [
        index.parent / shard
        for index in folder.rglob("*.safetensors.index.json")
        for shard in set(read_json(index)["weight_map"].values())
    ]
    return any(folder.rglob("*.safetensors")) and all(file.is_file() for file in named)


class Upload:
    """A repository of the Hub for the model of a finished run.

    Args:
        name: ``owner/model``, or ``model`` of the user who is logged in.
        token: token of the Hub; by default the token of `hf auth login`.
        private: whether a new repository is private; None leaves it to the Hub.
        revision: a branch other than the main one.

    Raises:
        ValueError: `HF_HUB_OFFLINE` is set, so the Hub cannot be reached.
    """

    def __init__(
        self, name: str, token: str | None = None, private: bool | None = None, revision: str | None = None
    ) -> None:
        if constants.HF_HUB_OFFLINE:
            raise ValueError("--push_to_hub true: HF_HUB_OFFLINE is set, so nothing can be uploaded")
        self.name, self.private, self.revision = name, private, revision
        self._api = HfApi(token=token)

    def open(self) -> str:
        """Create the repository if it does not exist; return an error text, or an empty text."""
        try:
            self.name = self._api.create_repo(self.name, private=self.private, exist_ok=True).repo_id
            if self.revision is not None:
                self._api.create_branch(self.name, branch=self.revision, exist_ok=True)
        except _FAILURES as error:
            return f"--push_to_hub true: {self.name} cannot be written ({' '.join(str(error).split())})"
        return ""

    def push(self, folder: Path, left_out: str) -> str:
        """Upload a folder's model and model card, without subfolders; return their address.

        Args:
            folder: folder of a model and other files.
            left_out: a file in it that is not uploaded, although it is named like a file of a model.

        Raises:
            OSError: it cannot be uploaded.
        """
        if wrong := self.open():
            raise OSError(wrong)
        names = ["README.md", *(path.name for kind in FILES for path in folder.glob(kind))]
        try:
            self._api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                # Whole names: a pattern would also take files of folders below.
                allow_patterns=[name for name in names if name != left_out],
                revision=self.revision,
                commit_message="Upload the model of a finished run",
            )
        except _FAILURES as error:
            raise OSError(
                f"--push_to_hub true: the finished run in {folder} was not uploaded "
                f"({' '.join(str(error).split())}); the same command tries again"
            ) from error
        return f"{constants.ENDPOINT}/{self.name}"
