"""Builds DeepSpeed's C++ operators once per user, and prints a message whenever a process waits for a build.

torch guards a build with a lock file. A killed process leaves it behind, and every later start then waits forever. This
file also takes a flock, which the system releases when the process ends: torch's lock file is then stale unless some
process has it open.

`python -m train.extensions` builds what a run on the CPU needs, so that the first run need not.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import torch
from filelock import FileLock, Timeout

from recipes.errors import RecipeError

_PATIENCE_SECONDS: Final = 20.0  # before a wait is announced


def build_communication() -> None:
    """Builds, or loads, the operator through which DeepSpeed's ranks talk on a CPU."""
    if not torch.cuda.is_available():
        _build("ShareMemCommBuilder", "deepspeed_shm_comm", "half a minute")


def build_cpu_adam() -> None:
    """Builds, or loads, DeepSpeed's Adam for optimizer states that are kept on the CPU."""
    _build("CPUAdamBuilder", "cpu_adam", "two to three minutes")


def release_shared_memory() -> None:
    """Frees the buffer of this rank in /dev/shm with the run, however it ends; every rank must have opened it.

    DeepSpeed never removes the name, so that each rank of each run would leave 66 MiB of memory behind.
    """
    name = "deepspeed_allreduce_buffer_{}_{MASTER_ADDR}_{MASTER_PORT}_{RANK}".format(os.getuid(), **os.environ)
    (Path("/dev/shm") / name).unlink(missing_ok=True)


def main() -> int:
    """Builds the operator of the CPU; returns the exit code."""
    from train import distributed

    try:
        distributed.setup_env()
        distributed.init()
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    distributed.shutdown()
    return 0


def _build(builder: str, name: str, duration: str) -> None:
    from deepspeed.accelerator import get_accelerator  # imports slowly, and only after setup_env()

    made = list(_root().glob(f"**/{name}/*.so"))
    with build_lock(name):
        if not made and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"compiling DeepSpeed's {name}, once ({duration})", flush=True)
        get_accelerator().create_op_builder(builder).load(verbose=False)


@contextmanager
def build_lock(name: str) -> Iterator[None]:
    """Holds the right to build one operator; waits for others with a message, and clears what a killed build left."""
    try:
        _root().mkdir(parents=True, exist_ok=True)
        (_root() / f"{name}.flock").touch()
    except OSError as error:
        raise RecipeError(
            f"environment: TORCH_EXTENSIONS_DIR: {_root()}: {error.strerror}, expected a folder that can be written"
        ) from error
    guard = FileLock(_root() / f"{name}.flock")
    try:
        held = guard.acquire(timeout=_PATIENCE_SECONDS)
    except Timeout:
        print(f"waiting for another process that compiles DeepSpeed's {name} ({guard.lock_file})", flush=True)
        held = guard.acquire()
    with held:
        for lock in _root().glob(f"**/{name}/lock"):
            _clear(lock)
        yield


def _clear(lock: Path) -> None:
    """Removes torch's lock once no process has it open."""
    is_announced = False
    while (holder := _holder(lock)) is not None:
        if not is_announced:
            print(f"waiting for process {holder}, which compiles in {lock.parent}", flush=True)
            is_announced = True
        time.sleep(0.5)
    if lock.exists():
        print(f"removed {lock}, which a killed build left behind", flush=True)
        lock.unlink(missing_ok=True)


def _holder(lock: Path) -> int | None:
    """Returns a process of this machine that has the file open."""
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # the file or the process is gone
            if handle.samefile(lock):
                return int(handle.parts[2])
    return None


def _root() -> Path:
    # imported late: a CUDA build of torch warns there on a machine with nvcc and no GPU, until setup_env() silences it
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


if __name__ == "__main__":
    sys.exit(main())
