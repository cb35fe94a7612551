"""The release command: `python -m train.release RUN_DIR --out DIR [--push ORG/NAME]`.

A release is a folder that `AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True)` loads where this
repository is not. It is written beside DIR, proves itself in a fresh process, and only then becomes DIR.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from transformers import logging as transformers_logging
from transformers.dynamic_module_utils import custom_object_save

from data.chat import TokenizerError
from models import FusedLlavaForConditionalGeneration
from recipes.schema import RecipeError
from train.checkpoints import RECIPE
from train.initial import refuse_faults
from train.release_card import TABLE, Comparison, read_comparison, write_card
from train.release_hub import check_target, push
from train.release_processor import read_processor, released_processor
from train.release_proof import SUMS, expect, picture, prove, write_sums
from train.release_run import InputError, ReleaseError, Run, find_run
from train.release_sources import licence_file, licences

LICENSES: Final = "LICENSES.md"
_CONFIG, _MODEL = "families.FusedLlavaConfig", "families.FusedLlavaForConditionalGeneration"
AUTO_MAP: Final = {
    "AutoConfig": _CONFIG,
    "AutoModelForImageTextToText": _MODEL,
    "AutoModelForMultimodalLM": _MODEL,  # `transformers serve` asks for this one
}


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
    parser.add_argument("--comparison", type=Path, metavar="DIR", help="folder that eval.compare wrote, for the card")
    return parser.parse_args(arguments)


def _release(options: argparse.Namespace) -> None:
    """Checks what was asked, writes, proves, moves into place, uploads."""
    run = find_run(options.run)
    out: Path = options.out
    comparison = read_comparison(options.comparison, run) if options.comparison else None
    _check_shard_size(options.max_shard_size)
    _check_out(out, run, force=options.force)
    if options.push is not None:
        check_target(options.push, force=options.force)
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--out: {partial}: {error.strerror}, accepted: a folder that can be written") from None
    try:
        _write(partial, run, comparison, options)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: released; a fresh process without this repository gave the run's logits and answer")
    if options.push is not None:
        print(f"{out}: uploaded to {push(out, options.push, force=options.force)}")


def _write(partial: Path, run: Run, comparison: Comparison | None, options: argparse.Namespace) -> None:
    """Writes the whole release and proves it."""
    print(f"{run.final}: loading")
    model = _load(run)
    own, processor = read_processor(run.final), released_processor(run.final, run.data)
    image = picture(own.image_processor)
    expected = expect(model, own, run.data, image)
    print(f"{options.out}: writing")
    model.config.auto_map = AUTO_MAP
    model.config.use_cache = True  # training switched it off
    model.save_pretrained(partial, max_shard_size=options.max_shard_size)
    custom_object_save(model, partial)  # the model's file and all that it imports, by relative imports, of models/
    processor.save_pretrained(partial)
    shutil.copyfile(run.final / RECIPE, partial / RECIPE)
    for weights in partial.glob("*.safetensors"):  # written for their owner alone
        shutil.copymode(partial / RECIPE, weights)
    licence = licence_file()
    if licence is not None:
        shutil.copyfile(licence, partial / licence.name)
    (partial / LICENSES).write_text(licences(run.recipe), encoding="utf-8")
    if comparison is not None:
        for name in TABLE:
            shutil.copyfile(options.comparison / name, partial / name)
    write_card(partial, run, model.config, comparison, options.push)
    write_sums(partial)
    del model  # a second copy is loaded now
    print(f"{options.out}: loading it in a fresh process")
    prove(partial, expected, image)


def _load(run: Run) -> FusedLlavaForConditionalGeneration:
    """Returns the run's model with every weight of its config, in the type that it was saved in."""
    try:
        model, report = FusedLlavaForConditionalGeneration.from_pretrained(
            run.final, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{run.final}: cannot be loaded: {' '.join(str(error).split())}; accepted: the checkpoint that a run writes"
        ) from error
    refuse_faults(run.final, report)
    return model.eval()


def _check_out(out: Path, run: Run, *, force: bool) -> None:
    """Refuses a place that must not be overwritten; `force` overwrites releases, nothing else."""
    if out.is_file():
        raise InputError(f"--out: {out} is a file, accepted: a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise InputError(f"--out: {out} is not empty, accepted: a new or empty folder, or --force to replace a release")
    if not (out / SUMS).is_file() or run.folder.resolve().is_relative_to(out.resolve()):
        raise InputError(f"--out: {out} is no release (it has no {SUMS}), accepted with --force: a release to replace")


def _check_shard_size(size: str) -> None:
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", size):
        raise InputError(f"--max-shard-size: found {size!r}, accepted: a size such as 500MB, 5GB")


def _replace(partial: Path, out: Path) -> None:
    """Moves a proven release into place; what was there goes only when the new one is there."""
    with tempfile.TemporaryDirectory(dir=partial.parent, prefix=f".{partial.name}-") as old:
        if out.is_dir():
            out.rename(Path(old) / "old")
        partial.rename(out)


def _fail(error: Exception, *, code: int) -> int:
    print(" ".join(str(error).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
