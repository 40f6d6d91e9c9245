"""Download files with pooch so that nothing half-done ever looks finished.

A file takes its place only when it is whole and has its published sum. ``lock.json`` in the folder keeps the size and
sum of every file that was placed; a later download of the same file must match it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pooch
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from ..core.files import DiskFullError, replacing
from ..core.paths import RunError

CHUNK = 1 << 16
MARGIN = 64 << 20  # bytes of disk to leave free
PASSING = (408, 416, 425, 429)  # client errors that may be gone a moment later; 416: the half file here is too long
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class FetchError(RunError):
    """A file could not be had; the message says which, why, and what to do."""


@dataclass(frozen=True)
class FetchSettings:
    """``timeout``: seconds that a server may stay silent. ``tries``: attempts at a file, with growing waits between."""

    workers: int = 8
    timeout: float = 30.0
    tries: int = 5


DEFAULT = FetchSettings()


@dataclass(frozen=True)
class Item:
    """One file: its place in the folder, its address, its sum and size where they are published ("" and None if not).

    ``about``: bytes to expect where the size is unknown. JPEGs must open and decode to their end.
    """

    path: str
    url: str
    sha256: str = ""
    bytes: int | None = None
    about: int = 0

    @property
    def size(self) -> int:
        return self.about if self.bytes is None else self.bytes


class Lock:
    """``lock.json`` of a folder: path -> {url, bytes, sha256} of every file that was placed."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "lock.json"
        try:
            self.entries: dict[str, dict] = json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError as error:
            raise FetchError(
                f"{self.path}: not valid JSON ({error}); delete it, and the next fetch checks all files again"
            ) from error

    def record(self, path: str, url: str) -> None:
        """Note a placed file; the first note of a path stays when the file is the same."""
        place = self.folder / path
        found = {"bytes": place.stat().st_size, "sha256": file_sha256(place)}
        if {k: self.entries.get(path, {}).get(k) for k in found} != found:
            self.entries[path] = {"url": url, **found}

    def holds(self, path: str) -> bool:
        """True when the file is there with the noted size (``Lock.faults`` compares its sum)."""
        place = self.folder / path
        return path in self.entries and place.is_file() and place.stat().st_size == self.entries[path]["bytes"]

    def sum(self, path: str) -> str:
        """The noted sum of a file, "" when there is none."""
        return self.entries.get(path, {}).get("sha256", "")

    def faults(self) -> list[str]:
        """Files that are missing or no longer what was placed, each with the reason; reads all of them."""
        found = []
        for path, entry in tqdm(sorted(self.entries.items()), desc="check", disable=None):
            if not (self.folder / path).is_file():
                found.append(f"{path}: missing")
            elif file_sha256(self.folder / path) != entry["sha256"]:
                found.append(f"{path}: changed since it was downloaded")
        return found

    def save(self) -> None:
        text = json.dumps(self.entries, indent=0, sort_keys=True) + "\n"
        if not self.path.exists() or self.path.read_text() != text:
            with replacing(self.path) as temporary:
                temporary.write_text(text)


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


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No second process fetches into the folder meanwhile; FetchError when one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".fetching", timeout=0):
            yield
    except Timeout as error:
        raise FetchError(f"another fetch is writing to {folder}; wait for it to end") from error


def missing(items: list[Item], lock: Lock) -> list[Item]:
    """Items that are not in place. Files that lie there but are not in the lock are checked, and noted when good."""
    todo = []
    for item in items:
        if lock.holds(item.path):
            continue
        place, wanted = lock.folder / item.path, item.sha256 or lock.sum(item.path)
        try:
            check(place, item)
            if wanted and file_sha256(place) != wanted:
                raise ValueError
            lock.record(item.path, item.url)
        except (FileNotFoundError, ValueError):
            todo.append(item)
    return todo


def check(path: Path, item: Item) -> None:
    """ValueError when a file has another size than the item, or is no whole JPEG and should be one."""
    size = path.stat().st_size
    if item.bytes is not None and size != item.bytes:
        raise ValueError(f"the file has {size:,} bytes, must have {item.bytes:,}.")
    if item.path.endswith(".jpg"):
        try:
            with Image.open(path, formats=["JPEG"]) as image:
                image.load()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"not a whole JPEG file ({error}).") from error


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(items: list[Item], lock: Lock, settings: FetchSettings = DEFAULT, title: str = "fetch") -> int:
    """Download what is not in place into the lock's folder; returns how many files that were.

    The first failure stops what has not started. FetchError for a file that is not to be had, is not what it should be
    or does not come; DiskFullError. Finished files stay, and are noted in the lock.
    """
    todo = missing(items, lock)
    for item in todo:
        (lock.folder / item.path).unlink(missing_ok=True)  # a damaged file must not be noted below
    source = pooch.Pooch(
        path=lock.folder,
        base_url="",
        registry={item.path: item.sha256 or lock.sum(item.path) or None for item in todo},
        urls={item.path: item.url for item in todo},
        retry_if_failed=settings.tries - 1,
    )
    pooch.get_logger().setLevel("WARNING")  # else a line for each image
    bar = len(todo) == 1 and sys.stderr.isatty()  # of bytes; of files when there are more
    try:
        thread_map(
            lambda item: _download(source, item, lock.folder / item.path, settings, bar),
            todo, max_workers=max(1, settings.workers), desc=title, unit="file", disable=True if bar else None,
        )  # fmt: skip
    finally:  # on an error and on Ctrl-C as well
        for item in todo:
            if (lock.folder / item.path).is_file():
                lock.record(item.path, item.url)
        lock.save()
    return len(todo)


def _download(source: pooch.Pooch, item: Item, place: Path, settings: FetchSettings, bar: bool) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.fetch(item.path, downloader=_Download(item, place, settings.timeout, bar))
    except ValueError as error:
        raise FetchError(
            f"{item.url}: {error} Nothing was kept. Try again later; if it stays so, the server has another file than"
            " the one that this study means"
        ) from error
    except OSError as error:  # those of requests are of this kind, and have no number
        if error.errno in NO_ROOM:
            raise DiskFullError(error.errno, f"no room to write {place}; free some space and call again") from error
        if error.errno is not None:
            raise
        raise FetchError(
            f"{item.url}: {error} ({settings.tries} attempts); is there a network? Finished files are kept: call again"
            " to go on"
        ) from error


@dataclass(frozen=True)
class _Download:
    """pooch's download by HTTP, of a file that is looked into before pooch compares its sum and places it.

    A file with a published sum goes on from ``<name>.partial`` after a cut: if the halves do not belong together, the
    sum tells, and the next attempt starts over.
    """

    item: Item
    place: Path
    timeout: float
    bar: bool

    def __call__(self, url: str, output_file: str, source: pooch.Pooch) -> None:
        partial = self.place.with_name(f"{self.place.name}.partial")
        if not self.item.sha256:
            partial.unlink(missing_ok=True)
        have = partial.stat().st_size if partial.exists() else 0
        if not have or have != self.item.bytes:
            self._get(url, partial, have, source)
        try:
            check(partial, self.item)
        except ValueError:
            partial.unlink()
            raise
        os.replace(partial, output_file)

    def _get(self, url: str, partial: Path, have: int, source: pooch.Pooch) -> None:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        http = pooch.HTTPDownloader(self.bar, CHUNK, timeout=self.timeout, headers=headers)
        try:
            with open(partial, "ab") as file:
                http(url, file, source)
        except OSError as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if status == 416:
                partial.unlink()
            if status < 500 and status not in PASSING:
                raise FetchError(f"{url}: {error}; is the address (--from) right?") from error
            raise
