"""The ranks of a run: environment, rendezvous, barriers, failure propagation and the start of the next phase."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from transformers.utils.logging import disable_progress_bar

from recipes.errors import RecipeError
from train.errors import PeerError, one_line
from train.extensions import build_communication, release_shared_memory
from train.stop import STOP_SIGNALS, ignore_signals

_TIMEOUT: Final = timedelta(hours=2)  # rank 0 may read a 7B checkpoint from the hub while the others wait
_MEET_TIMEOUT: Final = timedelta(minutes=10)
_GRACE_SECONDS: Final = 5.0  # in which a rank may exit cleanly after another rank has failed
_FAULT: Final = "fault"
_STORE_FAULTS: Final = (dist.DistNetworkError, dist.DistStoreError)
_LAST_PORT: Final = 65535
_LAUNCHED: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class _Group:
    """The store that the ranks of this process' run share; None until `connect`."""

    store: Any = None
    barriers = 0
    peer_exit_code: int | None = None  # exit code of another rank that failed
    watch: threading.Thread | None = None  # listens for it, until `left` is set
    left = threading.Event()


def setup_env() -> None:
    """Fills the environment of a process that no launcher started, and names the CPU where there is no GPU.

    DeepSpeed reads both when it is first imported.

    Raises:
        RecipeError: a launcher's variables are there in part, or are no numbers.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed loads torch's compiler, which only its Muon uses, into every run: a second of each start.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if not any(name in os.environ for name in ("RANK", "WORLD_SIZE")):
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port("127.0.0.1", 0)))
    _check_env()
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())
        threads = max(1, len(os.sched_getaffinity(0)) // local)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # else accelerate warns, and chooses a number
    # DeepSpeed compiles with the ninja of this environment, active or not.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    disable_progress_bar()  # of reading and writing weights: the one bar is the training's
    for module in ("torch.distributed", "transformers.modeling_utils"):  # DeepSpeed's and peft's calls
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")  # the rank's
    # Trainer counts accumulation itself, so accelerate's count of 1 is no mismatch.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    if not torch.cuda.is_available():  # a machine with nvcc and no GPU is no reason to warn
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def rank() -> int:
    """Returns the rank of this process; rank 0 writes files and prints."""
    return int(os.environ["RANK"])


def world_size() -> int:
    """Returns the number of processes of the run."""
    return int(os.environ["WORLD_SIZE"])


def connect() -> None:
    """Opens the store through which ranks report failures; returns when rank 0 has joined.

    Raises:
        PeerError: rank 0 does not join within ten minutes.
    """
    try:
        store, _, _ = next(rendezvous("env://", timeout=_MEET_TIMEOUT))
    except _STORE_FAULTS as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise _contact_lost(f"cannot meet the other ranks at {at}: {one_line(error)}") from error
    # torchrun keeps one store for all its restarts: a prefix separates the entries of each
    prefix = f"run/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{world_size()}"
    _Group.store = PrefixStore(prefix, store)
    if world_size() > 1:
        watched = PrefixStore(prefix, store.clone())
        _Group.watch = threading.Thread(target=_watch, args=(watched,), daemon=True)
        _Group.watch.start()


def is_initialized() -> bool:
    """Returns whether this process is in the process group of the run."""
    return dist.is_initialized()


def init() -> None:
    """Joins the process group of the run, unless this process is in it; returns when all ranks are there."""
    if is_initialized():
        return
    build_communication()
    import deepspeed  # imports slowly, and only after setup_env()

    if _Group.store is None:
        connect()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, store=_Group.store, rank=rank(), world_size=world_size(), timeout=_TIMEOUT)
    except RuntimeError as error:
        exit_if_lost(error)
        raise
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=_TIMEOUT, verbose=False)
    barrier()
    release_shared_memory()


def print_rank0(text: str) -> None:
    """Prints `text` once for the whole run."""
    if rank() == 0:
        print(text, flush=True)


def exit_with(text: str, *, code: int) -> int:
    """Prints one line, once for the whole run, and reports the failure to the other ranks; returns the exit code.

    When several ranks fail, rank 0 prints at once; another rank prints only if rank 0 does not within two seconds.
    """
    ignore_signals()  # the launcher sends them once one rank has ended, while this one may wait to speak
    line, store = one_line(text), _Group.store
    stream = sys.stderr if code else sys.stdout
    if store is None or world_size() == 1:
        if rank() == 0:
            print(line, file=stream, flush=True)
        return code
    try:
        if rank() > 0:
            time.sleep(2.0)
        if _Group.peer_exit_code is None and store.add(f"{_FAULT}/count", 1) == 1:
            print(f"rank {rank()}: {line}" if rank() else line, file=stream, flush=True)
            store.set(_FAULT, str(code))
        deadline = time.monotonic() + _GRACE_SECONDS
        # rank 0 holds the store, so it stays until the other ranks have seen the failure
        while rank() == 0 and store.add(f"{_FAULT}/heard", 0) < world_size() - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
    except _STORE_FAULTS:
        if _Group.peer_exit_code is None:  # rank 0 and its store are gone, without a report
            print(f"rank {rank()}: {line}", file=stream, flush=True)
    return code


def exit_if_lost(error: RuntimeError) -> None:
    """Raises PeerError where an error of a collective call means that another rank is gone; else returns."""
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset", "Broken pipe", "NCCL", "ncclRemoteError")
    if world_size() == 1 or not (isinstance(error, dist.DistError) or any(sign in text for sign in signs)):
        return
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline:
        if _Group.peer_exit_code is not None:
            raise _peer_failed(_Group.peer_exit_code) from error
        time.sleep(0.2)
    raise _contact_lost("lost contact with another rank") from error


def barrier() -> None:
    """Returns when all ranks have come here.

    Raises:
        PeerError: another rank failed meanwhile.
    """
    if world_size() == 1:
        return
    _Group.barriers += 1
    name = f"barrier/{_Group.barriers}"
    try:
        _Group.store.add(name, 1)
        while _Group.store.add(name, 0) < world_size():
            if _Group.peer_exit_code is not None:
                raise _peer_failed(_Group.peer_exit_code)
            time.sleep(0.05)
    except _STORE_FAULTS as error:
        code = _Group.peer_exit_code
        raise (_contact_lost("lost contact with rank 0") if code is None else _peer_failed(code)) from error


def any_rank(value: bool) -> bool:
    """Returns whether `value` is true on any rank; every rank must call it."""
    if world_size() == 1:
        return value
    name = f"any/{_Group.barriers}"
    _Group.store.add(name, int(value))
    barrier()
    return _Group.store.add(name, 0) > 0


def shutdown() -> None:
    """Leaves the run, after all ranks are done; rank 0, which holds the store, goes last."""
    if world_size() > 1 and _Group.store is not None:
        barrier()
        _Group.store.add("left", 1)
        deadline = time.monotonic() + _GRACE_SECONDS
        while rank() == 0 and _Group.store.add("left", 0) < world_size() and time.monotonic() < deadline:
            time.sleep(0.05)
    if _Group.watch is not None:  # a thread inside the store while Python ends would abort the process
        _Group.left.set()
        _Group.watch.join(_GRACE_SECONDS)
    if dist.is_initialized():
        dist.destroy_process_group()


def run_next(phase: int) -> NoReturn:
    """Replaces this process by a fresh one that runs the given phase under that phase's DeepSpeed configuration."""
    _choose_next_port()
    shutdown()
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 holds the store from here on
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a stop request waits until the new process listens
    arguments = [argument for argument in sys.orig_argv[1:] if not argument.startswith("--phase=")]
    os.execv(sys.executable, [sys.executable, *arguments, f"--phase={phase}"])


def _check_env() -> None:
    missing = [name for name in _LAUNCHED if name not in os.environ]
    if missing:
        raise RecipeError(
            f"environment: got {'RANK' if 'RANK' in os.environ else 'WORLD_SIZE'} without {missing[0]}, expected all "
            f"of {', '.join(_LAUNCHED)}, as launchers set them, or none"
        )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise RecipeError(f"environment: {name}: got '{os.environ[name]}', expected a whole number")
    if int(os.environ["MASTER_PORT"]) > _LAST_PORT:
        raise RecipeError(f"environment: MASTER_PORT: got {os.environ['MASTER_PORT']}, expected at most {_LAST_PORT}")
    if rank() >= world_size():
        raise RecipeError(f"environment: RANK: got {rank()}, expected a number below WORLD_SIZE ({world_size()})")


def _free_port(host: str, first: int) -> int:
    """Returns the first port from `first` on that nobody listens at on this machine; 0 lets the system choose."""
    for port in range(first, min(first + 100, _LAST_PORT + 1)):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1" if host == "127.0.0.1" else "", port))
            except OSError:
                continue
            return trial.getsockname()[1]
    return _free_port(host, 0)


def _choose_next_port() -> None:
    """Agrees with the other ranks on where the next phase meets: a free port of rank 0, because the old one lingers."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if world_size() > 1:
        if rank() == 0:
            if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:  # held by torchrun, maybe on another machine
                with socket.create_connection((address, port)) as there:
                    address = there.getsockname()[0]
            _Group.store.set("next", f"{address} {_free_port(address, port + 1)}")
        address, port = _Group.store.get("next").decode().split()
    else:
        port = _free_port(address, port + 1)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def _peer_failed(code: int) -> PeerError:
    return PeerError("another rank ended the run", code=code, is_reported=True)


def _contact_lost(what: str) -> PeerError:
    return PeerError(f"rank {rank()} {what}", code=1, is_reported=False)


def _watch(store: Any) -> None:
    """Ends this rank soon after another one failed, even where it waits in a collective call for ever."""
    try:
        while not store.check([_FAULT]):
            if _Group.left.wait(1.0):
                return
        _Group.peer_exit_code = code = int(store.get(_FAULT))
        if rank() > 0:  # rank 0 waits for this count, so it must not add itself
            store.add(f"{_FAULT}/heard", 1)
    except (RuntimeError, ValueError):  # rank 0 and its store are gone: the collective calls fail
        return
    time.sleep(_GRACE_SECONDS)
    sys.stdout.flush()
    os._exit(code)
