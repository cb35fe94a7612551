"""Uploading a release to the hub, or to a mirror that HF_ENDPOINT names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its HTTP library's
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from train.release.errors import InputError, ReleaseError

_OWN: Final = (".gitattributes",)  # what a new repository of the hub begins with
_UNAUTHORIZED: Final = 401  # the hub's answer to a wrong token, also where a repository is not there
_FORBIDDEN: Final = 403


def check_target(repo: str, *, force: bool) -> None:
    """Asks the hub whether a release may go there, before any work is done.

    Args:
        repo: ORG/NAME.
        force: files that are there already may be replaced.

    Raises:
        InputError: not a name, no token, no right to it, or files are there already.
        ReleaseError: the hub cannot be reached.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push: got {repo!r} ({_line(error)}), expected ORG/NAME") from None
    if repo.count("/") != 1:
        raise InputError(f"--push: got {repo!r}, expected ORG/NAME")
    if get_token() is None:
        raise InputError("--push: got no token of the hub, expected `hf auth login`, or the variable HF_TOKEN")
    try:
        known = HfApi().model_info(repo).siblings or []
    except RepositoryNotFoundError as error:
        if error.response.status_code == _UNAUTHORIZED:
            raise _refused(repo, error) from None
        return
    except (HTTPError, OfflineModeIsEnabled) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (_UNAUTHORIZED, _FORBIDDEN):
            raise _refused(repo, error) from None
        raise ReleaseError(f"--push: the hub at {HfApi().endpoint} cannot be reached: {_line(error)}") from None
    files = [file.rfilename for file in known if file.rfilename not in _OWN]
    if files and not force:
        raise InputError(
            f"--push: {repo} holds {len(files)} files already, {files[0]} among them; expected an empty or a new "
            "repository, or --force, which replaces them all"
        )


def push(release: Path, repo: str, *, force: bool) -> str:
    """Uploads a release; with `force` whatever else the repository holds is deleted. Returns the repository's address.

    Raises:
        InputError: the token may not write there.
        ReleaseError: the upload did not come to its end.
    """
    api: Any = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=release,
            commit_message=f"Release {release.name}",
            delete_patterns="*" if force else None,
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # HfHubHTTPError; and the upload's own
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (_UNAUTHORIZED, _FORBIDDEN):
            raise _refused(repo, error) from None
        raise ReleaseError(
            f"--push: {repo}: {_line(error)}; {release} is whole, `hf upload {repo} {release}` uploads it"
        ) from None
    return str(address)


def _refused(repo: str, error: HfHubHTTPError) -> InputError:
    return InputError(f"--push: {repo}: the hub says: {_line(error)}; expected a token that may write there")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
