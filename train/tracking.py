"""Trackers. Weights & Biases is offline unless its server answers and the user is logged in; it never asks."""

from __future__ import annotations

import netrc
import os
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from recipes.errors import RecipeError
from train import distributed

_MODES: Final = ("online", "offline", "shared", "disabled", "dryrun", "run")
_ANSWER_SECONDS: Final = 5.0


def check_tracking(tracker: str) -> None:
    """Raises RecipeError when a tracker is not installed, or WANDB_MODE is none that Weights & Biases knows."""
    if tracker == "tensorboard" and find_spec("tensorboard") is None:
        raise RecipeError(
            "train.tracker: got tensorboard, which is not installed; expected wandb or none, or pip install tensorboard"
        )
    mode = os.environ.get("WANDB_MODE")
    if mode is not None and mode not in _MODES:
        raise RecipeError(f"environment: WANDB_MODE: got '{mode}', expected online, offline or disabled")


def start_tracking(tracker: str, name: str, folder: Path) -> None:
    """Opens the Weights & Biases run that transformers' callback writes to, on rank 0, where this is the tracker.

    A server that does not answer in five seconds makes the run go offline.
    """
    if tracker != "wandb":
        return
    os.environ["WANDB_DIR"] = str(folder)  # no ./wandb folder, which would pass for the package
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_PROJECT", "fused-llava")
    if "WANDB_MODE" not in os.environ and not _is_logged_in():
        os.environ["WANDB_MODE"] = "offline"
    if distributed.rank() != 0:
        return
    if os.environ.get("WANDB_MODE", "online") in ("online", "shared", "run") and not _answers():
        print("Weights & Biases cannot be reached: this run is logged offline", flush=True)
        os.environ["WANDB_MODE"] = "offline"
    import wandb  # slow to import, and only rank 0 needs it

    try:
        wandb.init(project=os.environ["WANDB_PROJECT"], name=name, settings=wandb.Settings(init_timeout=5))
    except (wandb.Error, OSError, ValueError) as error:
        print(f"Weights & Biases refuses ({error}): this run is logged offline", flush=True)
        os.environ["WANDB_MODE"] = "offline"
        wandb.init(project=os.environ["WANDB_PROJECT"], name=name, mode="offline")


def stop_tracking(tracker: str) -> None:
    """Closes the Weights & Biases run."""
    if tracker == "wandb" and distributed.rank() == 0:
        import wandb

        wandb.finish()


def _is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers() -> bool:
    """Returns whether the server says anything at all, through the proxy where one is set."""
    heard = threading.Event()
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=_ANSWER_SECONDS).close()
        except urllib.error.HTTPError:
            heard.set()  # an answer too
        except (OSError, ValueError):
            return
        heard.set()

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit
    asking.start()
    asking.join(_ANSWER_SECONDS)
    return heard.is_set()
