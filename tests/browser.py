"""A headless Chromium for tests of pages; a test is skipped where there is none."""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Opened:
    """An open page and what went on in it.

    Attributes:
        page: playwright's page.
        errors: errors on the console, exceptions that nothing caught, requests that failed.
        urls: every URL that was asked for, but for data: and blob:.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def note_request(self, request):
        """Notes what is asked for."""
        if not request.url.startswith(("data:", "blob:")):
            self.urls.append(request.url)

    def note_failed(self, request):
        """Notes a request without an answer, unless the page itself gave it up."""
        if request.failure != "net::ERR_ABORTED":
            self.errors.append(f"{request.url}: {request.failure}")


@contextmanager
def open_page(url, *, width=1280, height=900):
    """Yields an Opened page at `url`, http:// or file://; the window's size in pixels. Not to be nested."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser found: {', '.join(NAMES)}")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=FLAGS)
        context = browser.new_context(viewport={"width": width, "height": height})
        opened = Opened(context.new_page())
        context.on("console", lambda said: said.type == "error" and opened.errors.append(said.text))
        context.on("weberror", lambda thrown: opened.errors.append(str(thrown.error)))
        context.on("request", opened.note_request)
        context.on("requestfailed", opened.note_failed)
        opened.page.goto(url)
        yield opened
        browser.close()
