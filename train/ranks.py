"""The processes of one run: how they start, meet and go on to the next phase."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Final, NoReturn

import torch
from torch import distributed
from transformers.utils.logging import disable_progress_bar

_TIMEOUT: Final = timedelta(hours=2)  # rank 0 may read a 7B checkpoint from the hub while the others wait


def prepare() -> None:
    """Fills the environment of a process that no launcher started, and names the CPU where there is no GPU.

    DeepSpeed reads both when it is first imported.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or count())
        threads = max(1, len(os.sched_getaffinity(0)) // local)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # else accelerate warns, and takes its own number
    # DeepSpeed compiles with the ninja of this environment, active or not.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    disable_progress_bar()  # of reading and writing weights: the one bar is the training's
    for module in ("torch.distributed", "transformers.modeling_utils"):  # DeepSpeed's and peft's calls
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    # Trainer counts accumulation itself, so accelerate's own count of 1 is no mismatch.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    if not torch.cuda.is_available():  # a machine with nvcc and no GPU is no reason to warn
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def rank() -> int:
    """Returns the number of this process, 0 = the one that writes and speaks."""
    return int(os.environ["RANK"])


def count() -> int:
    """Returns the number of processes of the run."""
    return int(os.environ["WORLD_SIZE"])


def join() -> None:
    """Joins the process group of the run; returns when all ranks are there."""
    import deepspeed  # imports slowly, and only after prepare()

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=_TIMEOUT, verbose=False)
    distributed.barrier()


def say(text: str) -> None:
    """Prints `text` once for the whole run."""
    if rank() == 0:
        print(text, flush=True)


def fail(text: str, *, code: int) -> int:
    """Writes one line on stderr, once for the whole run; returns the exit code."""
    if rank() == 0:
        print(" ".join(text.split()), file=sys.stderr, flush=True)
    return code


def wait() -> None:
    """Returns when all ranks have come here."""
    distributed.barrier()


def leave() -> None:
    """Leaves the process group, after all ranks are done."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def run_next(phase: int) -> NoReturn:
    """Replaces this process by a fresh one that runs the given phase under its own DeepSpeed configuration."""
    leave()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the old one may linger
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's store knows the old port only
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], f"--phase={phase}"])
