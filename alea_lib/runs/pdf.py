"""The book as one printable PDF, without TeX: one page by jupyter-book, printed by the system's Chromium or Chrome."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from alea_lib.runs import book, places
from alea_lib.runs.places import RunError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
MAC = ("Google Chrome.app/Contents/MacOS/Google Chrome", "Chromium.app/Contents/MacOS/Chromium")
PATIENCE = 300  # seconds


def browser() -> str:
    """The path of a browser that can print: $CHROMIUM, else one of the PATH, else macOS's applications."""
    asked = os.environ.get("CHROMIUM")
    if asked:
        if shutil.which(asked):
            return shutil.which(asked)
        raise RunError(f"$CHROMIUM is {asked}, which is no program")
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    found += [path for name in MAC if (path := shutil.which(str(Path("/Applications") / name)))]
    if not found:
        raise RunError(
            "the PDF is printed by Chromium or Chrome, and none is installed (Debian, Ubuntu: apt install chromium). "
            "If it is in an unusual place, name it: CHROMIUM=PATH make pdf"
        )
    return found[0]


def print_page(page: Path, target: Path) -> None:
    """Print an HTML file into a PDF with page numbers and an outline."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser(),
            "--headless",
            "--disable-gpu",
            "--disable-background-networking",
            "--no-pdf-header-footer",
        ]
        command += [f"--user-data-dir={profile}", "--generate-pdf-document-outline", f"--print-to-pdf={target}"]
        command += [page.resolve().as_uri()]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium's sandbox does not run as root (containers)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise RunError(f"{command[0]} did not print {page.name} within {PATIENCE} s") from None
    if done.returncode or not target.exists() or not target.read_bytes().startswith(b"%PDF"):
        raise RunError(f"{command[0]} did not print {page.name}:\n  " + "\n  ".join(done.stderr.splitlines()[-5:]))


def build(profile: str) -> Path:
    """_build/look-closer.pdf from the finished runs of a profile."""
    browser()  # says what is missing before anything is built
    book.prepare(profile)
    root = places.root()
    toc = places.read_yaml((root / "book" / "_toc.yml").read_text(encoding="utf-8"))
    page = root / "_build" / "singlehtml" / f"{toc['root']}.html"  # index.html only leads to it
    book.call_jupyter_book("singlehtml", page)
    target = root / "_build" / "look-closer.pdf"
    target.unlink(missing_ok=True)
    print_page(page, target)
    print(f"PDF of profile {profile}: {target.relative_to(root)}", flush=True)
    return target
