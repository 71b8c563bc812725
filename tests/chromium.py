"""Pages in headless Chromium."""

import contextlib
import shutil
from pathlib import Path

import pytest


@contextlib.contextmanager
def launch():
    """The browser of the system or of Playwright; the test is skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium
        if installed is None and not Path(chromium.executable_path).exists():
            pytest.skip(
                "the page is not tested, there is no Chromium: apt-get install chromium, or "
                "python -m playwright install chromium"
            )
        browser = chromium.launch(executable_path=installed)
        yield browser
        browser.close()


@contextlib.contextmanager
def open_page(browser, file):
    """The page in `file` on a desktop; what it complains of or fetches is in its `complaints`."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.complaints.append(request.url[:40]))
    page.goto(file.as_uri())
    yield page
    context.close()
