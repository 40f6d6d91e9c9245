"""Download files with pooch: a file takes its place only when it is whole and has its published sum."""

from __future__ import annotations

import errno
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pooch
from PIL import Image
from tqdm.contrib.concurrent import thread_map

from ..core.files import DiskFullError, sha256
from ..core.paths import RunError

WORKERS = 8  # downloads at a time
TIMEOUT = 30.0  # seconds that a server may stay silent
TRIES = 5  # attempts at a file, with growing waits between
MARGIN = 64 << 20  # bytes of disk to leave free
PASSING = (408, 425, 429)  # client errors that may be gone a moment later
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class FetchError(RunError):
    """A file could not be had; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Item:
    """One file: its place in the folder, its address, its sum ("" where none is published), the bytes to expect."""

    path: str
    url: str
    sha256: str
    size: int


def require_space(folder: Path, needed: int) -> None:
    """DiskFullError, with both numbers, when the disk under ``folder`` cannot take that many bytes more."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed and needed + MARGIN > free:
        raise DiskFullError(
            errno.ENOSPC,
            f"{folder} needs {gib(needed)} more and {gib(free)} are free; make room, choose fewer parts (--only)"
            " or another disk (--to)",
        )


def gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"


def fault(item: Item, folder: Path) -> str:
    """What is wrong with an item in a folder; "" when it is there, has its published sum and is a whole JPEG."""
    place = folder / item.path
    if not place.is_file():
        return "missing"
    if item.sha256 and sha256(place) != item.sha256:
        return "not the published file"
    return _jpeg_fault(place) if item.path.endswith(".jpg") else ""


def _jpeg_fault(path: Path | str) -> str:
    try:
        with Image.open(path, formats=["JPEG"]) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        return f"not a whole JPEG file ({error})"
    return ""


def fetch(items: list[Item], folder: Path, title: str) -> None:
    """Download what is not in place.

    The first failure stops what has not started. FetchError for a file that is not to be had, is not what it should be
    or does not come; DiskFullError. Finished files stay.
    """
    todo = [item for item in items if fault(item, folder)]
    for item in todo:
        (folder / item.path).unlink(missing_ok=True)
        (folder / item.path).parent.mkdir(parents=True, exist_ok=True)
    source = pooch.Pooch(
        path=folder,
        base_url="",
        registry={item.path: item.sha256 or None for item in todo},
        urls={item.path: item.url for item in todo},
        retry_if_failed=TRIES - 1,
    )
    pooch.get_logger().setLevel("WARNING")  # else a line for each image
    bar = len(todo) == 1 and sys.stderr.isatty()  # of bytes; of files when there are more
    http = pooch.HTTPDownloader(progressbar=bar, timeout=TIMEOUT)
    thread_map(
        lambda item: _download(item, source, http),
        todo, max_workers=WORKERS, desc=title, unit="file", disable=True if bar else None,
    )  # fmt: skip


def _download(item: Item, source: pooch.Pooch, http: pooch.HTTPDownloader) -> None:
    def checked(url: str, output_file: str, _: pooch.Pooch) -> None:
        """pooch's download, of a file that is looked into before pooch compares its sum and places it."""
        try:
            http(url, output_file, source)
        except OSError as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if status < 500 and status not in PASSING:
                raise FetchError(f"{url}: {error}; is the address (--from) right?") from error
            raise
        if item.path.endswith(".jpg") and (found := _jpeg_fault(output_file)):
            raise ValueError(f"{found}.")

    try:
        source.fetch(item.path, downloader=checked)
    except ValueError as error:
        raise FetchError(
            f"{item.url}: {error} Nothing was kept. Try again later; if it stays so, the server has another file than"
            " the one that this study means"
        ) from error
    except OSError as error:  # those of requests are of this kind, and have no number
        if error.errno in NO_ROOM:
            raise DiskFullError(error.errno, f"no room to write {item.path}; free some space and call again") from error
        if error.errno is not None:
            raise
        raise FetchError(
            f"{item.url}: {error} ({TRIES} attempts); is there a network? Finished files are kept: call again to go on"
        ) from error
