"""Training that starts again by itself: `python -m train.elastic --restarts N RECIPE [key=value ...]`.

torch's elastic agent starts the ranks of this machine, meets the agents of others, and after a lost rank or machine
restarts the ranks that are left; `train/run.py` then goes on from the last checkpoint, on however many ranks there are.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Final

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

_RUN: Final = str(Path(__file__).resolve().with_name("run.py"))
_SAVE_SECONDS: Final = 1800  # that ranks have for their checkpoint after a stop request


def main() -> int:
    """Runs the ranks of this machine; returns the exit code: that of the first rank that failed for good."""
    arguments, rest = _parser().parse_known_args()
    config = _config(arguments)
    checked = subprocess.run(
        [sys.executable, _RUN, *rest, "--check"], stdout=subprocess.DEVNULL, env=_first_rank(config), check=False
    )
    if checked.returncode != 0:
        return checked.returncode  # what a restart would not mend
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-u", _RUN, *rest)
    except SignalException:
        return 0  # the ranks have saved
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        print(f"rank {failure.local_rank} failed after {arguments.restarts} restarts", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _first_rank(config: LaunchConfig) -> dict[str, str]:
    """Returns the environment of rank 0 of the least machines, for a check of what every rank would find."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(config.nproc_per_node * config.min_nodes)}
    return {**os.environ, **ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a model from a recipe, and restart after a lost rank.")
    parser.add_argument("--restarts", type=_count, required=True, metavar="N", help="starts after the first, at most")
    parser.add_argument("--nproc-per-node", type=_ranks, metavar="N", help="ranks of this machine; default: one a GPU")
    parser.add_argument("--nnodes", type=_machines, default=(1, 1), metavar="MIN:MAX", help="machines; default 1")
    parser.add_argument(
        "--rdzv-endpoint", type=_endpoint, metavar="HOST:PORT", help="where several machines meet: one that stays"
    )
    parser.add_argument("--local-addr", metavar="HOST", help="address of this machine, where its name is not enough")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got '{text}', expected a number, 0 or more")
    return int(text)


def _ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got '{text}', expected a number of ranks, 1 or more")
    return int(text)


def _machines(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise argparse.ArgumentTypeError(f"got '{text}', expected a number of machines, or the least and the most: 2:4")
    return int(least), int(most or least)


def _endpoint(text: str) -> str:
    host, mark, port = text.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, ValueError, OverflowError):
        mark = ""
    if not mark or not host:
        raise argparse.ArgumentTypeError(f"got '{text}', expected HOST:PORT of a machine that this one can find")
    return text


def _config(arguments: argparse.Namespace) -> LaunchConfig:
    least, most = arguments.nnodes
    meeting = {"timeout": 900, "last_call_timeout": 15}
    if arguments.local_addr and arguments.rdzv_endpoint:
        meeting["is_host"] = arguments.rdzv_endpoint.rpartition(":")[0] == arguments.local_addr
    return LaunchConfig(
        min_nodes=least,
        max_nodes=most,
        nproc_per_node=arguments.nproc_per_node or torch.cuda.device_count() or 1,
        max_restarts=arguments.restarts,
        run_id=os.environ.get("SLURM_JOB_ID", "fused-llava") if arguments.rdzv_endpoint else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=arguments.rdzv_endpoint or "localhost:0",
        rdzv_configs=meeting,
        local_addr=arguments.local_addr or (None if arguments.rdzv_endpoint else "localhost"),
        monitor_interval=1.0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP",
        shutdown_timeout=_SAVE_SECONDS,
        logs_specs=DefaultLogsSpecs(),
    )


if __name__ == "__main__":
    sys.exit(main())
