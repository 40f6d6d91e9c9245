"""Download files so that nothing half-done ever looks finished: resumed, parallel, verified, placed at once.

A file grows as ``<name>.partial`` beside its place, with a note of what the server called it (``.partial.note``), and
takes its place when it has been verified. ``lock.json`` in the folder keeps the size and sum of every file that was
placed; a later download of the same file must match it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from ..tables import DiskFullError, replacing
from .download import Cut, FetchError, FetchSettings, Item, download, file_sha256, verify

MARGIN = 64 << 20  # bytes of disk to leave free
DEFAULT = FetchSettings()


class Lock:
    """``lock.json`` of a folder: path -> {url, bytes, sha256} of every file that was placed."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "lock.json"
        try:
            self.entries: dict[str, dict] = json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError as error:
            raise FetchError(
                f"{self.path}: not valid JSON ({error}); delete it, and the files are checked anew"
            ) from error

    def record(self, path: str, url: str, sha256: str) -> None:
        """Note a placed file; the first note of a path stays when the file is the same."""
        found = {"bytes": (self.folder / path).stat().st_size, "sha256": sha256}
        if {k: self.entries.get(path, {}).get(k) for k in found} != found:
            self.entries[path] = {"url": url, **found}

    def holds(self, path: str) -> bool:
        """True when the file is there with the noted size (its sum is looked at by ``Lock.faults``)."""
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
    """No second process writes to the folder meanwhile (where the system has flock); FetchError when one does."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".fetching", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # other errors: a file system without locks
                raise FetchError(f"another fetch is writing to {folder}; wait for it to end") from error
        yield


def missing(items: list[Item], lock: Lock) -> list[Item]:
    """Items that are not in place. Files that lie there but are not in the lock are verified, and noted when good."""
    todo = []
    for item in items:
        if lock.holds(item.path):
            continue
        try:
            lock.record(item.path, item.url, verify(lock.folder / item.path, item, lock.sum(item.path)))
        except (FileNotFoundError, Cut):
            todo.append(item)
    return todo


def fetch(items: list[Item], lock: Lock, settings: FetchSettings = DEFAULT, title: str = "fetch") -> int:
    """Download what is not in place into the lock's folder; returns how many files that were.

    The first failure stops the others, which keep what they have. FetchError for a file that is not to be had, is not
    what it should be or does not come; DiskFullError.
    """
    todo = missing(items, lock)
    stop, futures = threading.Event(), {}
    pool = ThreadPoolExecutor(max_workers=max(1, settings.workers), thread_name_prefix="fetch")
    with tqdm(total=sum(i.size for i in todo), unit="B", unit_scale=True, desc=title, disable=None) as bar:
        try:
            for item in todo:
                job = pool.submit(download, item, lock.folder, lock.sum(item.path), settings, stop, bar.update)
                futures[job] = item
            for future in as_completed(futures):
                future.result()
        finally:  # on an error and on Ctrl-C as well
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            _note(futures, lock)
    return len(todo)


def _note(futures: dict[Future, Item], lock: Lock) -> None:
    for future, item in futures.items():
        if not future.cancelled() and future.exception() is None:
            lock.record(item.path, item.url, future.result())
    lock.save()
