"""Starts train/run.py in new processes, as a user or a cluster does."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more):
    """Returns the environment of this process without the ranks that a launcher, or a training here, has set."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return {**kept, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **more}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def start_ranks(*arguments, ranks, out, err, **more):
    """Starts ranks as srun starts them, which takes half the time of DeepSpeed's launcher; returns their processes."""
    command = [sys.executable, "train/run.py", *map(str, arguments)]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    given = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} if ranks > 1 else {} for rank in range(ranks)]
    return [
        subprocess.Popen(command, cwd=ROOT, env=environment(**more, **each), stdout=out, stderr=err) for each in given
    ]


def run(*arguments, ranks=1, timeout=400, **more):
    """Runs the command to its end; returns the first exit code that is not 0, and what all ranks printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        processes = start_ranks(*arguments, ranks=ranks, out=out, err=err, **more)
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for output in (out, err):
            output.seek(0)
        return subprocess.CompletedProcess(arguments, next(filter(None, codes), 0), out.read(), err.read())
