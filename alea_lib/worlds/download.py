"""One file from a server: resumed after a cut, retried, verified, and only then put in its place."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..runs.places import RunError
from ..tables import DiskFullError

CHUNK = 1 << 18
SLOWEST = 1024  # bytes a second; a server that is slower for a whole timeout counts as silent
PROGRESS = 1 << 20  # bytes that an attempt must bring for the count of failures to start anew
LONGEST_WAIT = 30.0  # seconds between two attempts
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone a moment later


class FetchError(RunError):
    """A file could not be had; the message says which, why, and what to do."""


class Cut(Exception):
    """An attempt failed in a way that the next may not. ``wait``: seconds the server asks for."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


class Stopped(Exception):
    """Another download failed or the user stopped: leave, and keep what is there."""


@dataclass(frozen=True)
class FetchSettings:
    """``timeout``: seconds that a server may stay silent. ``tries``: attempts in a row that bring nothing, with waits
    of ``wait`` seconds, doubled each time, between them."""

    workers: int = 8
    timeout: float = 30.0
    tries: int = 5
    wait: float = 1.0


@dataclass(frozen=True)
class Item:
    """One file: its place in the folder, its address, its size and sum where they are published ("" and None if not).

    ``kind``: "jpeg" (must open and decode to its end), "zip" (CRCs must hold) or "" (no look inside). ``about``: bytes
    to reckon with where the size is unknown.
    """

    path: str
    url: str
    bytes: int | None = None
    sha256: str = ""
    kind: str = ""
    about: int = 0

    @property
    def size(self) -> int:
        return self.about if self.bytes is None else self.bytes


def download(
    item: Item, folder: Path, known: str, settings: FetchSettings, stop: threading.Event, tell: Callable[[int], object]
) -> str:
    """One file into its place in the folder; returns its sum, which must be ``known`` ("" when it is not).

    ``tell`` is called with the bytes that came. Stopped when ``stop`` is set meanwhile.
    """
    place = folder / item.path
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.partial")
    for resumed in (partial.exists(), False):  # what an earlier run left may be wrong: then once more from the start
        _complete(item, partial, settings, stop, tell)
        try:
            found = verify(partial, item, known)
            break
        except Cut as error:
            _forget(partial)
            if not resumed:
                raise FetchError(
                    f"{item.url}: {error}; nothing was kept. Try again later; if it stays so, the server's file is"
                    " another one than the one that this study means"
                ) from error
    os.replace(partial, place)
    _forget(partial)
    return found


def _complete(item: Item, partial: Path, settings: FetchSettings, stop: threading.Event, tell) -> None:
    """Attempts until the partial file is whole."""
    failures = 0
    while True:
        before = _size(partial)
        try:
            return _attempt(item, partial, settings, stop, tell)
        except Cut as error:
            failures = 1 if _size(partial) - before >= PROGRESS else failures + 1
            if failures >= settings.tries:
                raise FetchError(
                    f"{item.url}: {error} ({failures} attempts); is there a network? What came is kept: call again"
                    " to go on"
                ) from error
            pause = max(settings.wait * 2 ** (failures - 1), error.wait)
            if stop.wait(min(pause, LONGEST_WAIT)):
                raise Stopped from error


def _attempt(item: Item, partial: Path, settings: FetchSettings, stop: threading.Event, tell) -> None:
    note = _read_note(partial)
    have = _size(partial) if note.get("tag") else 0  # without a name for the version, the rest may be of another
    if have and have == note.get("total"):
        return
    headers = {"User-Agent": "alea_lib", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": note["tag"]}
    with _open(item, headers, partial, settings.timeout) as response:
        start, total = _span(response, item, partial, have, note)
        if not start:
            _forget(partial)
            tag = response.headers.get("ETag", "")
            tag = response.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
            _note_path(partial).write_text(json.dumps({"tag": tag, "total": total}))
        try:
            with open(partial, "ab") as file:
                _pour(response, file, settings.timeout, stop, tell)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(
                    error.errno, f"no room to write {partial}; free some space and call again"
                ) from error
            raise
    if total is not None and _size(partial) != total:
        raise Cut(f"the connection was cut after {_size(partial):,} of {total:,} bytes")


def _open(item: Item, headers: dict, partial: Path, timeout: float):
    """The response; redirects are followed. FetchError for a status that will not pass."""
    try:
        return urllib.request.urlopen(urllib.request.Request(item.url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the part here is longer than the file there
            _forget(partial)
        elif error.code not in PASSING:
            raise FetchError(
                f"{item.url}: the server says {error.code} {error.reason}; is the address (--from) right?"
            ) from error
        asked = error.headers.get("Retry-After", "")
        raise Cut(f"the server says {error.code} {error.reason}", float(asked) if asked.isdigit() else 0.0) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        slow = isinstance(reason, TimeoutError)
        raise Cut(f"no answer in {timeout:g} s" if slow else f"no connection ({reason})") from error


def _span(response, item: Item, partial: Path, have: int, note: dict) -> tuple[int, int | None]:
    """Where the response starts, and the size of the whole file if the server tells it."""
    if response.status == 206:
        place, _, size = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        total = int(size) if size.isdigit() else None
        tags = (response.headers.get("ETag"), response.headers.get("Last-Modified"))
        if place.partition("-")[0] != str(have) or total != note.get("total") or note["tag"] not in tags:
            _forget(partial)
            raise Cut("the file changed on the server meanwhile")
        return have, total
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    if None not in (total, item.bytes) and total != item.bytes:
        raise FetchError(f"{item.url}: has {total:,} bytes on the server, must have {item.bytes:,}: it is another file")
    return 0, total


def _pour(response, file, timeout: float, stop: threading.Event, tell) -> None:
    began, came = time.monotonic(), 0
    while True:
        if stop.is_set():
            raise Stopped
        try:
            chunk = response.read1(CHUNK)  # what is there, so that a trickle is seen
        except TimeoutError as error:
            raise Cut(f"no byte in {timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise Cut(f"the connection was cut ({error})") from error
        if not chunk:
            return
        file.write(chunk)
        tell(len(chunk))
        came += len(chunk)
        seconds = time.monotonic() - began
        if seconds > timeout and came < SLOWEST * seconds:
            raise Cut(f"slower than {SLOWEST} bytes a second")


def verify(path: Path, item: Item, known: str = "") -> str:
    """The sum of a file that is what it should be; Cut says what is wrong with another."""
    size = path.stat().st_size
    if item.bytes is not None and size != item.bytes:
        raise Cut(f"{size:,} bytes, must be {item.bytes:,}")
    found = file_sha256(path)
    for wanted, who in ((item.sha256, "published"), (known, "in lock.json")):
        if wanted and found != wanted:
            raise Cut(f"wrong sum: sha256 {found}, the one {who} is {wanted}")
    try:
        if item.kind == "jpeg":
            with Image.open(path, formats=["JPEG"]) as image:
                image.load()
        elif item.kind == "zip" and not item.sha256:
            with zipfile.ZipFile(path) as archive:
                if (bad := archive.testzip()) is not None:
                    raise Cut(f"{bad} in it is damaged")
    except (OSError, SyntaxError, zipfile.BadZipFile) as error:
        raise Cut(f"not a whole {item.kind.upper()} file ({error})") from error
    return found


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _note_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.note")


def _read_note(partial: Path) -> dict:
    try:
        return json.loads(_note_path(partial).read_text())
    except (OSError, ValueError):
        return {}


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _note_path(partial).unlink(missing_ok=True)
