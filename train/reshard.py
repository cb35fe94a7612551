"""A checkpoint for another number of ranks, by DeepSpeed's universal checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from train.checkpoints import step_of
from train.errors import TrainingError

_WORKERS = 2  # processes that read and write; each holds one rank's part in memory


def reshard(checkpoint: Path) -> Path:
    """Converts a checkpoint into one that any number of ranks can load, beside it; rank 0 alone calls it.

    Args:
        checkpoint: folder of a whole checkpoint.

    Returns:
        The converted folder; it is deleted with the next checkpoint.

    Raises:
        TrainingError: DeepSpeed could not convert it.
    """
    target = checkpoint.with_name(f"resharded-{checkpoint.name}")
    shutil.rmtree(target, ignore_errors=True)
    tag = f"global_step{step_of(checkpoint)}"
    target.mkdir()
    for file in (path for path in checkpoint.iterdir() if path.is_file()):
        if file.suffix != ".safetensors":  # Trainer's states; the weights are DeepSpeed's
            shutil.copy2(file, target)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint / tag), "--output_folder", str(target / tag)]
    command += ["--num_extract_workers", str(_WORKERS), "--num_merge_workers", str(_WORKERS), "--inject_missing_state"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TrainingError(f"{checkpoint} cannot be converted for another number of ranks: {reason}")
    return target
