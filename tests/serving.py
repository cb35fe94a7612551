"""Runs `transformers serve` as somebody who has the libraries, and not this repository, and asks it."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


def stranger(**more: str) -> dict[str, str]:
    """Returns the environment of somebody who has the libraries, and not this repository."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"OMP_NUM_THREADS": "1"} | more


@contextmanager
def serving(cache: Path, *models: Path) -> Iterator[str]:
    """Serves one model, or whatever a request names, on a free port; yields the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", *map(str, models), "--trust-remote-code"]
    with (cache / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"],
            cwd=cache,
            env=stranger(HF_MODULES_CACHE=str(cache / "modules"), PATH=os.environ["PATH"]),
            stdout=log,
            stderr=log,
        )
        try:
            for _ in range(960):
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                    break
                except urllib.error.URLError:
                    assert server.poll() is None, (cache / "log").read_text()
                    time.sleep(0.25)
            yield f"http://localhost:{port}"
        finally:
            server.terminate()
            server.wait(120)


def ask(address: str, model: Path, image: Image.Image, question: str, tokens: int) -> str:
    """Returns what a server answers to a question about an image."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": str(model), "messages": [{"role": "user", "content": content}], "max_tokens": tokens}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    said = json.loads(urllib.request.urlopen(request, timeout=120).read())
    return said["choices"][0]["message"]["content"]
