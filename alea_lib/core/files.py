"""Files that are never half written, and readers that say what is wrong with a damaged one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

PathLike = str | os.PathLike


class DataError(ValueError):
    """A table or file is not what it should be; the message says where, what, and how to repair it."""


class DiskFullError(OSError):
    """No room to write a file; the file that was there before is unchanged."""


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Path of a temporary file to write; it takes the place of ``path`` when the block ends without an error.

    On any error it is removed and the old file stays; DiskFullError when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(error.errno, f"no room to write {path}; free some space and run again") from error
        raise


def sha256(path: PathLike) -> str:
    """Content hash of a file, or of a folder's files with their names."""
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    names = (f"{f.relative_to(path).as_posix()} {sha256(f)}\n" for f in sorted(path.rglob("*")) if f.is_file())
    return hashlib.sha256("".join(names).encode()).hexdigest()


def hash_of(value) -> str:
    """Hash of plain data, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def write_text(path: PathLike, text: str) -> None:
    """Write a text in UTF-8, line ends as they are; atomic."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: PathLike, value, sort_keys: bool = True, indent: int | None = 1) -> None:
    """Write plain data as JSON; atomic. ``indent=None``: in one line, much faster for large data."""
    write_text(path, json.dumps(value, indent=indent, sort_keys=sort_keys) + "\n")


def read_json(path: PathLike, kind: type = dict):
    """The content of a JSON file that must be a list or a dict (``kind``); DataError when it is not."""
    try:
        data = json.loads(Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); a cut file must be downloaded or written again") from error
    if not isinstance(data, kind):
        raise DataError(
            f"{path}: holds a {type(data).__name__} where a {kind.__name__} is needed; is it the right file?"
        )
    return data


def read_text(path: PathLike) -> str:
    """A text in UTF-8, line ends as they are; DataError when it is in another encoding."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error}); save it as UTF-8") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1.

    Lines end at line feeds alone: U+2028 and U+0085, at which ``splitlines`` would cut, may stand in JSON and answers.
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def write_jsonl(rows: Iterable[dict] | pd.DataFrame, path: PathLike) -> None:
    """One JSON object a line, keys in the given order, UTF-8; atomic."""
    records = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, default=_plain) + "\n")


def _plain(value):
    """numpy scalars, arrays and sets as JSON knows them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} cannot be written as JSON")


def read_jsonl(path: PathLike) -> list[dict]:
    """The objects of a JSON-lines file; DataError with file and line number for a malformed line."""
    return [_object(line, f"{path}, line {number}") for number, line in numbered_lines(read_text(path))]


def _object(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
        fault = "" if isinstance(record, dict) else "not a JSON object"
    except json.JSONDecodeError as error:
        fault = error.msg
    if fault:
        raise DataError(f"{where}: {fault}; repair or delete that line (a cut last line means an interrupted copy)")
    return record


def write_csv(table: pd.DataFrame, path: PathLike) -> None:
    """Write a table, atomically; equal values give equal bytes (10 significant digits, no negative zero)."""
    out = table.copy()
    for column in out.columns[[pd.api.types.is_float_dtype(t) for t in out.dtypes]]:
        out[column] = ["" if pd.isna(x) else f"{x:.10g}" if x else "0" for x in out[column].astype(float)]
    with replacing(path) as temporary:
        out.to_csv(temporary, index=False, lineterminator="\n", na_rep="")


def write_parquet(table: pd.DataFrame, path: PathLike) -> None:
    """Write a table as Parquet; atomic."""
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)


def read_parquet(path: PathLike) -> pd.DataFrame:
    """Read a Parquet table; DataError when the file is damaged."""
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet table ({error}); delete it and run its stage again") from error


def read_record(folder: Path) -> dict:
    """The run.json of a finished run."""
    return read_json(Path(folder) / "run.json")
