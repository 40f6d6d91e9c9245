"""The book as one printable PDF, without TeX: one page by jupyter-book, printed by the system's Chromium or Chrome.

jupyter-book's own builder ``pdfhtml`` prints with a Chromium that playwright must have downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..core import paths
from ..core.paths import RunError
from . import book

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium")  # fmt: skip
OPTIONS = ("--headless", "--disable-gpu", "--disable-background-networking", "--no-pdf-header-footer",
    "--generate-pdf-document-outline")  # fmt: skip
PATIENCE = 300  # seconds


def browser() -> str:
    """The path of a browser that can print: $CHROMIUM, else one of the PATH, else macOS's applications."""
    asked = os.environ.get("CHROMIUM")
    for name in (asked,) if asked else BROWSERS:
        if path := shutil.which(name):
            return path
    if asked:
        raise RunError(f"$CHROMIUM is {asked}, which is no program")
    raise RunError(
        "the PDF is printed by Chromium or Chrome, and none is installed (Debian, Ubuntu: apt install chromium). "
        "If it is in an unusual place, name it: CHROMIUM=PATH make pdf"
    )


def print_page(page: Path, target: Path) -> None:
    """Print an HTML file into a PDF with page numbers and an outline."""
    program = browser()
    root_user = hasattr(os, "geteuid") and os.geteuid() == 0
    sandbox = ["--no-sandbox"] if root_user else []  # Chromium's sandbox does not run as root (containers)
    with tempfile.TemporaryDirectory() as profile:
        files = [f"--user-data-dir={profile}", f"--print-to-pdf={target}", page.resolve().as_uri()]
        command = [program, *sandbox, *OPTIONS, *files]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise RunError(f"{program} did not print {page.name} within {PATIENCE} s") from None
    if done.returncode or not target.exists() or not target.read_bytes().startswith(b"%PDF"):
        raise RunError(f"{program} did not print {page.name}:\n  " + "\n  ".join(done.stderr.splitlines()[-5:]))


def build(profile: str) -> Path:
    """_build/look-closer.pdf from the finished runs of a profile."""
    browser()  # says what is missing before anything is built
    book.prepare(profile)
    root = paths.root()
    toc = paths.read_yaml((root / "book" / "_toc.yml").read_text(encoding="utf-8"))
    page = root / "_build" / "singlehtml" / f"{toc['root']}.html"  # index.html only leads to it
    book.call_jupyter_book("singlehtml", page)
    target = root / "_build" / "look-closer.pdf"
    target.unlink(missing_ok=True)
    print_page(page, target)
    print(f"PDF of profile {profile}: {target.relative_to(root)}", flush=True)
    return target
