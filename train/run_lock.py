"""The lock of a run folder: two runs at once would mix their checkpoints and logs."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Final

from recipes.errors import RecipeError

NAME: Final = "run.lock"
_BEAT_SECONDS: Final = 5.0
_SILENCE_SECONDS: Final = 30.0  # after which a holder on another host counts as gone


class RunLock:
    """Holds a run folder from `take` to the end of the process.

    flock excludes other processes of this host, and of others where the file system shares locks; it ends with its
    process. Where it does not reach other hosts, the file's time, renewed every few seconds, tells that its holder
    lives.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._handle: Any = None

    def take(self) -> None:
        """Takes the lock.

        Raises:
            RecipeError: another process holds it; the message names host, process and start.
        """
        self._handle = self._file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal() from None
        except OSError:
            pass  # a file system without locks: the file's time is all there is
        if self._lives_elsewhere():
            raise self._refusal()
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self._handle.truncate(0)
        self._handle.write(json.dumps(holder))
        self._handle.flush()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Gives the lock back."""
        self._handle.truncate(0)
        self._handle.close()

    def _holder(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _lives_elsewhere(self) -> bool:
        """Returns whether a process of another host renews the file; waits for it where its last sign is recent."""
        host = self._holder().get("host")
        if host is None or host == socket.gethostname():
            return False
        seen = self._file.stat().st_mtime
        while time.time() - seen < _SILENCE_SECONDS:
            time.sleep(_BEAT_SECONDS / 5)
            if self._file.stat().st_mtime != seen:
                return True
        return False

    def _refusal(self) -> RecipeError:
        holder = self._holder()
        who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('start')}"
        return RecipeError(
            f"output: {self._file.parent} is in use by {who if holder else 'another process'}; "
            "expected another output, or the end of that run"
        )

    def _beat(self) -> None:
        while not self._handle.closed:
            time.sleep(_BEAT_SECONDS)
            try:
                os.utime(self._file)
            except OSError:
                return
