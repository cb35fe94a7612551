"""Verifies releases: a fresh process that cannot import this repository must reproduce the outputs of the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data.config import DataConfig
from data.processor import VisionProcessor
from train.checkpoints import files_of, sha256_of
from train.errors import ReleaseError
from train.release.processor import CONVERSATION, trained_ids

SUMS: Final = "SHA256SUMS"
_PROBE: Final = Path(__file__).with_name("probe.py")
_NEW_TOKENS: Final = 8
_SIDE: Final = 64  # pixels of the image that a processor without a crop is shown
_LAST: Final = 8  # positions whose logits are compared: the last ones, which are text
_TOLERANCE: Final = 1e-4  # of logits, relative to the largest; the same code on the same machine gives 0
_PIXEL_TOLERANCE: Final = 1e-5


@dataclass(frozen=True)
class Released:
    """A written release, and what it has to give.

    Attributes:
        folder: of the release.
        expected: what `expect` returned for the run's model.
        image: that `expect` was given.
        plain: it has to load without `trust_remote_code`, into a class of transformers.
    """

    folder: Path
    expected: dict[str, Tensor]
    image: Image.Image
    plain: bool


def expect(model: Any, processor: Any, data: DataConfig, image: Image.Image) -> dict[str, Tensor]:
    """Returns what the run's model makes of CONVERSATION with an image, asked as training asked.

    The processor is the run's, not the release's.

    Returns:
        input_ids (1, S), pixel_values as the family has them, in float32, logits (1, 8, vocabulary) of the last
        positions, and tokens (1, new), the greedy answer.
    """
    vision = VisionProcessor(processor, aspect=data.image_aspect)
    images = vision.encode([image])
    spans = iter(images.spans)
    written = trained_ids(processor, data)
    ids = torch.tensor([[new for one in written for new in (next(spans) if one == vision.image_token_id else [one])]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **vision.type_ids(ids), **images.inputs}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=_LAST).logits.float()
        answer = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
    pixels = images.inputs["pixel_values"].float()
    return {"input_ids": ids, "pixel_values": pixels, "logits": logits, "tokens": answer[:, ids.shape[1] :]}


def picture(image_processor: Any) -> Image.Image:
    """Returns an image of many colours; not square, where the processor takes such images."""
    crop = getattr(image_processor, "crop_size", None) or {}
    width, height = crop.get("width", _SIDE), crop.get("height", _SIDE)
    if image_processor.do_resize and (not crop or image_processor.do_center_crop):
        width = width * 3 // 2
    random = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (height, width, 3), generator=random, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def prove(*releases: Released) -> None:
    """Loads releases in one fresh process and compares what they make of CONVERSATION; then checks their checksums.

    Raises:
        ReleaseError: one does not load there, or gives something else, or a file is not what was written.
    """
    with tempfile.TemporaryDirectory() as name:
        results = ask_fresh_process(releases, Path(name))
    limits = {"input_ids": 0.0, "pixel_values": _PIXEL_TOLERANCE, "logits": _TOLERANCE, "tokens": 0.0}
    for release, found in zip(releases, results, strict=True):
        for part, limit in limits.items():  # causes before what follows from them
            error = _error(found[part], release.expected[part])
            if not error <= limit:
                raise ReleaseError(
                    f"the release in a fresh process: {part} differ from the run's by {error:.1e} of the largest, "
                    f"expected {limit:.0e}"
                )
        check_sums(release.folder)


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS over all files of a folder, as `sha256sum -c` reads it."""
    lines = [f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files_of(folder, but=(SUMS,))]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Raises ReleaseError unless a folder holds exactly the files of its SHA256SUMS, unchanged."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    files = {path.relative_to(folder).as_posix(): path for path in files_of(folder, but=(SUMS,))}
    for name in sorted(sums.keys() | files.keys()):
        if name not in files or sums.get(name) != sha256_of(files[name]):
            raise ReleaseError(f"{folder / name}: is not what {SUMS} says")


def ask_fresh_process(releases: Sequence[Released], folder: Path) -> list[dict[str, Tensor]]:
    """Returns what a process that knows the releases alone makes of the conversation."""
    jobs = []
    for number, release in enumerate(releases):
        image, found = folder / f"{number}.png", folder / f"{number}.safetensors"
        release.image.save(image)
        job = {"release": str(release.folder.resolve()), "plain": release.plain, "image": str(image)}
        jobs.append({**job, "found": str(found)})
    shared = {"messages": CONVERSATION, "threads": torch.get_num_threads(), "last": _LAST, "new_tokens": _NEW_TOKENS}
    (folder / "jobs.json").write_text(json.dumps({**shared, "jobs": jobs}), encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # an empty cache: no code of an earlier release; offline: nothing but the folders; no GPU: as the run's model here
    changed = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-I", str(_PROBE), str(folder / "jobs.json")],
        cwd=folder,
        env=inherited | changed,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ReleaseError(f"the release does not work in a fresh process: {reason}")
    return [load_file(job["found"]) for job in jobs]


def _error(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest number expected; infinite for another shape."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
