"""Checkpoints on the Hugging Face hub: ``hf://owner/name``, through ``huggingface_hub`` (timm brings it)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError

SCHEME = "hf://"
FILE = "model.ckpt"  # of a repository, where the name says no other
_NAME = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>.+))?")


def on_hub(path: str | Path) -> bool:
    """Whether a name is one of the hub."""
    return str(path).startswith(SCHEME)


def parsed(name: str) -> tuple[str, str, str | None]:
    """Repository, file and revision of ``hf://owner/name``, ``hf://owner/name@revision``, ``hf://owner/name/a.ckpt``.

    Raises:
        CheckpointError: no such name.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise CheckpointError(
            f"{name}: is no name on the Hugging Face hub; they are hf://OWNER/NAME, hf://OWNER/NAME@REVISION or "
            "hf://OWNER/NAME/FILE."
        )
    return found["repo"], found["file"] or FILE, found["revision"]


def fetch(name: str) -> Path:
    """The local copy of a file on the hub; it is fetched once.

    Raises:
        CheckpointError: no such name, repository or file, no access to it, or no connection.
    """
    import huggingface_hub

    repo, file, revision = parsed(name)
    with _told(name):
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))


def send(folder: Path, repo: str, private: bool = False) -> str:
    """Put the files of a folder into a repository, which is made if it is not there; returns its address.

    Raises:
        CheckpointError: no access, or no connection.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _told(f"{SCHEME}{repo}"):
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="panoptic_ibs.push")
    return str(address)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the library raises, in a sentence. It never asks for a login."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        raise CheckpointError(
            f"{name}: there is no such repository, or you may not see it. Check the name; for one of yours that is "
            "private set HF_TOKEN, or log in with 'hf auth login'."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{name}: the repository has no such revision.") from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name}: was never fetched to this machine, and the hub cannot be reached. Fetch it with a connection, or "
            "give the file itself."
        ) from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"{name}: the repository has no such file. Name it: hf://OWNER/NAME/FILE.") from None
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: the hub refuses, or cannot be reached ({reason}).") from None
    except Exception as error:  # of the library below, for a lost connection
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "requests", "urllib3"):
            raise
        raise CheckpointError(f"{name}: the hub cannot be reached ({type(error).__name__}).") from None
