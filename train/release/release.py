"""The release command: `python -m train.release RUN_DIR --out DIR [--push ORG/NAME]`.

A release is a folder that `AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True)` loads where this
repository is not; a dense one is a plain Hugging Face checkpoint, without code. It is written beside DIR, proves itself
in a fresh process, and only then becomes DIR.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
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
from transformers import logging as transformers_logging

from data.chat import TokenizerError
from models.families import is_plain
from recipes.schema import RecipeError
from train.checkpoints import RECIPE
from train.errors import InputError, ReleaseError, one_line
from train.release.card import TABLE, Comparison, licence_file, licences, read_comparison, write_card
from train.release.checkpoint import Run, find_run, load, parse_schedule, write_model
from train.release.processor import read_processor, released_processor, save_released
from train.release.proof import SUMS, Released, expect, picture, prove, write_sums

LICENSES: Final = "LICENSES.md"
_FIRST_FILES: Final = (".gitattributes",)  # what a new repository of the hub begins with
_UNAUTHORIZED: Final = 401  # the hub's answer to a wrong token, also where a repository is not there
_FORBIDDEN: Final = 403


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes a release; returns the exit code: 0 done, 1 the release failed, 2 the user's input is wrong."""
    options = _options(arguments)
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed is imported on the way, and warns where it has to guess
    try:
        _release(options)
    except (InputError, RecipeError, TokenizerError) as error:
        return _fail(error, code=2)
    except (ReleaseError, OSError) as error:
        return _fail(error, code=1)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.release", description="Make a run's model releasable.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a finished run, e.g. outputs/llava_fused")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; must not hold anything"
    )
    parser.add_argument("--push", metavar="ORG/NAME", help="upload it to this repository of the hub, made if missing")
    parser.add_argument("--force", action="store_true", help="replace a release in DIR, and what the repository holds")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file; default 5GB")
    parser.add_argument(
        "--schedule",
        metavar="NAME",
        help="the schedule that the release starts under, instead of its trained plan: a name such as visipruner, or "
        '{"name": "visipruner", "layer_threshold": 0.99}',
    )
    parser.add_argument("--comparison", type=Path, metavar="DIR", help="folder that eval.compare wrote, for the card")
    return parser.parse_args(arguments)


def _release(options: argparse.Namespace) -> None:
    """Checks what was asked, writes, proves, moves into place, uploads."""
    out: Path = options.out
    for where, path in (("RUN_DIR", options.run), ("--out", out)):
        try:
            path.is_dir()
        except OSError as error:  # such as a name that is too long
            raise InputError(f"{where}: got {path} ({error.strerror}), expected the path of a folder") from None
    run = find_run(options.run)
    schedule = parse_schedule(options.schedule, run)
    comparison = read_comparison(options.comparison, run, schedule) if options.comparison else None
    _check_shard_size(options.max_shard_size)
    _check_out(out, run, force=options.force)
    if options.push is not None:
        check_target(options.push, force=options.force)
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out: {partial}: {error.strerror}, expected a folder that can be written") from None
    try:
        write_release(partial, run, schedule, comparison, options)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: released; a fresh process without this repository gave the run's logits and answer")
    if options.push is not None:
        print(f"{out}: uploaded to {push(out, options.push, force=options.force)}")


def write_release(
    partial: Path,
    run: Run,
    schedule: Mapping[str, Any] | None,
    comparison: Comparison | None,
    options: argparse.Namespace,
) -> None:
    """Writes the whole release and proves it."""
    print(f"{run.final}: loading")
    model = load(run, schedule)
    trained, processor = read_processor(run.final), released_processor(run.final, run.data)
    image = picture(trained.image_processor)
    expected = expect(model, trained, run.data, image)
    print(f"{options.out}: writing")
    write_model(model, partial, max_shard_size=options.max_shard_size)
    save_released(processor, partial)
    shutil.copyfile(run.final / RECIPE, partial / RECIPE)
    for weights in partial.glob("*.safetensors"):  # written for their owner alone
        shutil.copymode(partial / RECIPE, weights)
    licence = licence_file()
    if licence is not None:
        shutil.copyfile(licence, partial / licence.name)
    plain = is_plain(model.config)
    (partial / LICENSES).write_text(licences(run.recipe, code=not plain), encoding="utf-8")
    if comparison is not None:
        for name in TABLE:
            shutil.copyfile(options.comparison / name, partial / name)
    write_card(partial, run, model.config, comparison, repo=options.push, plain=plain)
    write_sums(partial)
    del model  # a second copy is loaded now
    print(f"{options.out}: loading it in a fresh process")
    prove(Released(partial, expected, image, plain))


def _check_out(out: Path, run: Run, *, force: bool) -> None:
    """Refuses a place that must not be overwritten; `force` overwrites releases, nothing else."""
    if out.is_file():
        raise InputError(f"--out: {out} is a file, expected a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise InputError(f"--out: {out} is not empty, expected a new or empty folder, or --force to replace a release")
    if not (out / SUMS).is_file() or run.folder.resolve().is_relative_to(out.resolve()):
        raise InputError(f"--out: {out} is no release (it has no {SUMS}), expected with --force: a release to replace")


def _check_shard_size(size: str) -> None:
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", size):
        raise InputError(f"--max-shard-size: got {size!r}, expected a size such as 500MB, 5GB")


def _replace(partial: Path, out: Path) -> None:
    """Moves a proven release into place; what was there goes only when the new one is there, and else comes back."""
    old = out.with_name(f".{out.name}-replaced-{os.getpid()}")
    try:
        if out.is_dir():
            out.rename(old)
        partial.rename(out)
    except BaseException:
        if old.is_dir() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_target(repo: str, *, force: bool) -> None:
    """Asks the hub whether a release may go to ORG/NAME, before any work is done; `force` may replace what is there.

    Raises:
        InputError: not a name, no token, no right to it, or files are there already.
        ReleaseError: the hub cannot be reached.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push: got {repo!r} ({_words(error)}), expected ORG/NAME") from None
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
        raise ReleaseError(f"--push: the hub at {HfApi().endpoint} cannot be reached: {_words(error)}") from None
    files = [file.rfilename for file in known if file.rfilename not in _FIRST_FILES]
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
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # HfHubHTTPError; and the upload's
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (_UNAUTHORIZED, _FORBIDDEN):
            raise _refused(repo, error) from None
        again = f"`hf upload {repo} {shlex.quote(str(release))}` uploads it"
        raise ReleaseError(f"--push: {repo}: {_words(error)}; {release} is whole, {again}") from None
    return str(address)


def _refused(repo: str, error: HfHubHTTPError) -> InputError:
    return InputError(f"--push: {repo}: the hub says: {_words(error)}; expected a token that may write there")


def _words(error: Exception) -> str:
    return one_line(error) or type(error).__name__


def _fail(error: Exception, *, code: int) -> int:
    print(one_line(error), file=sys.stderr)
    return code
