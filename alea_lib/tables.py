"""Tables: the schemas that rooms share, and reading and writing them without half-written files.

``metrics.csv`` is one long tidy table: one row a unique key of ``METRIC_KEYS``. Fractions are 0-1 floats;
``lo`` and ``hi`` bound the 95 % interval; a measure that is not defined is absent, never NaN.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from alea_lib.worlds.lexicon import load_lexicon

METRIC_KEYS = (
    "run_id", "profile", "world", "model", "method", "benchmark", "split", "prompt", "condition", "scorer",
    "setting", "metric",
)  # fmt: skip
METRIC_COLUMNS = (*METRIC_KEYS, "value", "lo", "hi", "n", "base_seed", "seed")
REQUIRED_KEYS = ("run_id", "profile", "world", "model", "method", "benchmark", "metric")
FRACTIONS = (
    "chair_s", "chair_i", "recall", "f1_objects", "eos_rate", "distinct", "companion_share", "pope_accuracy",
    "pope_precision", "pope_recall", "pope_f1", "pope_yes", "unparsed", "attn_last_max", "attn_last_mean",
    "attn_all_mean",
)  # fmt: skip
METRIC_NAMES = (
    *FRACTIONS, "words", "objects_per_caption", "blank_effect", "swap_effect", "kl_clean", "nll_grounded",
    "ppl_grounded", "frontier_gap", "seconds_per_token", "peak_mib",
)  # fmt: skip
METRIC_PREFIXES = ("mme_", "amber_")
DIFFERENCE = "_diff"  # "chair_s_diff": the method minus the base model, paired by image
METHOD_NAMES = (
    "base", "truncation", "stop-early", "careful-prompt", "alea-official", "alea-corrected", "alea-mixed",
    "no-prefix", "random-prefix", "random-layers", "last-layer", "all-layers", "heads", "lora", "lora-all",
    "sft", "dpo", "nullu", "beam", "nucleus", "vcd", "m3id", "dola", "pai", "opera", "adhh", "spin", "vhr",
)  # fmt: skip
ENUMERATIONS = {
    "method": METHOD_NAMES,
    "split": ("train", "activate", "validate", "test"),
    "prompt": ("plain", "careful", "speculative"),
    "condition": ("clean", "attacked", "blank", "swap"),
}
PAIR_COLUMNS = (
    "image_id", "image", "positive", "negative", "wrong", "label_source", "prompt_negative",
    "prompt_positive",
)  # fmt: skip
LABEL_SOURCES = ("truth", "detector", "import")


class DataError(ValueError):
    """A table or file is not what it should be; the message says where, what, and how to mend it."""


class DiskFullError(OSError):
    """No room to write a file; what stood there before is untouched."""


def is_metric(name: str) -> bool:
    """True for the names of the contract, ``mme_*``, ``amber_*``, and any of these with ``_diff`` added."""
    name = name.removesuffix(DIFFERENCE)
    return name in METRIC_NAMES or name.startswith(METRIC_PREFIXES)


def is_fraction(name: str) -> bool:
    """True for metrics that are shares between 0 and 1; ``mme_<task>`` and ``amber_score`` are points."""
    if name.startswith("amber_"):
        return name != "amber_score" and not name.endswith(DIFFERENCE)
    return name in FRACTIONS or (name.startswith("mme_") and name.endswith(("_accuracy", "_accuracy_plus")))


def metric_rows(summary: pd.DataFrame, **keys) -> pd.DataFrame:
    """Rows of the metrics table from a summary (metric, value, lo, hi, n) and the keys they share.

    Keys that are not given are empty; ``base_seed`` and ``seed`` may be given too. DataError for an unknown
    key.
    """
    unknown = sorted(set(keys) - set(METRIC_COLUMNS) - {"base_seed", "seed"})
    if unknown:
        raise DataError(f"unknown column {unknown}; the metrics table has {', '.join(METRIC_COLUMNS)}")
    rows = summary.reindex(columns=["metric", "value", "lo", "hi", "n"]).copy()
    for column in METRIC_COLUMNS:
        if column in keys:
            rows[column] = keys[column]
        elif column not in rows:
            rows[column] = pd.NA if column in ("base_seed", "seed") else ""
    return _typed(rows[list(METRIC_COLUMNS)].reset_index(drop=True))


def _typed(rows: pd.DataFrame) -> pd.DataFrame:
    text = {c: "object" for c in METRIC_KEYS}
    numbers = {"value": float, "lo": float, "hi": float, "n": "Int64", "base_seed": "Int64", "seed": "Int64"}
    return rows.astype(text | numbers)


def check_metrics(rows: pd.DataFrame) -> pd.DataFrame:
    """The table unchanged if it keeps the contract; DataError naming the first offending rows if not."""
    if list(rows.columns) != list(METRIC_COLUMNS):
        raise DataError(f"columns are {list(rows.columns)}, must be {list(METRIC_COLUMNS)} in this order")
    for column in REQUIRED_KEYS:
        _refuse(rows, rows[column].fillna("").astype(str) == "", f"empty {column}")
    for column in ENUMERATIONS:
        allowed = _allowed(column, rows[column])
        bad = ~rows[column].fillna("").isin(allowed if column in REQUIRED_KEYS else ("", *allowed))
        _refuse(rows, bad, f"{column} must be one of {', '.join(allowed)}")
    _refuse(rows, ~rows["metric"].map(is_metric), "unknown metric name; add it to METRIC_NAMES if it is new")
    _refuse(rows, rows.duplicated(list(METRIC_KEYS), keep=False), "the same key twice")
    _check_values(rows)
    return rows


def _allowed(column: str, values: pd.Series) -> tuple[str, ...]:
    names = ENUMERATIONS[column]
    if column == "method" and not values.isin(names).all():
        from .rivals.registry import baseline_names  # one of these may be new; only then, since it brings torch

        names = (*names, *sorted(baseline_names() - set(names)))
    return names


def _check_values(rows: pd.DataFrame) -> None:
    value, lo, hi = (pd.to_numeric(rows[c], errors="coerce") for c in ("value", "lo", "hi"))
    _refuse(rows, value.isna() | value.abs().eq(float("inf")), "value must be finite; leave undefined rows out")
    _refuse(rows, lo.isna() != hi.isna(), "lo and hi must be both there or both empty")
    _refuse(rows, (lo > value) | (hi < value), "lo <= value <= hi does not hold")
    share = rows["metric"].map(is_fraction)
    smallest, largest = value.where(lo.isna(), lo), value.where(hi.isna(), hi)
    _refuse(rows, share & ((smallest < 0) | (largest > 1)), "a fraction lies outside 0-1 (per cent given?)")
    n = pd.to_numeric(rows["n"], errors="coerce")
    _refuse(rows, ~(n >= 1), "n must be at least 1")


def _refuse(rows: pd.DataFrame, bad: pd.Series, why: str) -> None:
    bad = bad.fillna(True).astype(bool)
    if bad.any():
        shown = rows.loc[bad, ["method", "metric", "value", "lo", "hi"]].head(3).to_dict("records")
        raise DataError(f"metrics table: {why} ({int(bad.sum())} rows, e.g. {shown})")


def check_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """The table of pairs unchanged if it keeps the schema ``PAIR_COLUMNS``; DataError if not.

    ``positive`` and ``negative`` are answers about the same image; ``wrong`` lists the COCO categories that
    the negative names and the image lacks; ``label_source`` says who judged that.
    """
    missing = [c for c in PAIR_COLUMNS if c not in pairs.columns]
    if missing:
        raise DataError(f"pairs lack the columns {missing}; needed are {list(PAIR_COLUMNS)}")
    if pairs.empty:
        raise DataError("the table of pairs is empty: no image gave a usable pair")
    if not pd.api.types.is_integer_dtype(pairs["image_id"]):
        raise DataError("image_id of the pairs must be integers")
    for column in ("image", "positive", "negative", "prompt_negative", "prompt_positive"):
        _refuse_pairs(pairs, [not (isinstance(x, str) and x.strip()) for x in pairs[column]], f"empty {column}")
    _refuse_pairs(pairs, ~pairs["label_source"].isin(LABEL_SOURCES), f"label_source must be in {LABEL_SOURCES}")
    _refuse_pairs(pairs, pairs["positive"] == pairs["negative"], "positive and negative are the same text")
    names = set(load_lexicon().names)
    is_list = [not isinstance(w, str) and isinstance(w, Iterable) for w in pairs["wrong"]]
    _refuse_pairs(pairs, [not x for x in is_list], "wrong must be a list of categories")
    _refuse_pairs(pairs, [not set(w) <= names for w in pairs["wrong"]], "wrong holds a name that is no category")
    twice = pairs.duplicated(["image_id", "positive", "negative"], keep=False)
    _refuse_pairs(pairs, twice, "the same pair twice")
    return pairs


def _refuse_pairs(pairs: pd.DataFrame, bad, why: str) -> None:
    bad = pd.Series(list(bad), index=pairs.index, dtype=bool)
    if bad.any():
        raise DataError(f"pairs: {why} ({int(bad.sum())} rows, image_id {pairs.loc[bad, 'image_id'].head(3).tolist()})")


# ---- files


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to; takes its place when the block ends without an error.

    On any error the temporary file is removed and the old file stays; DiskFullError when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(error.errno, f"no room to write {path}; free some space and run again") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_csv(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a table, atomically; equal values give equal bytes (10 significant digits, no negative zero)."""
    out = table.copy()
    for column in out.columns[[pd.api.types.is_float_dtype(t) for t in out.dtypes]]:
        out[column] = ["" if pd.isna(x) else f"{x:.10g}" if x else "0" for x in out[column].astype(float)]
    with replacing(path) as temporary:
        out.to_csv(temporary, index=False, lineterminator="\n", na_rep="")


def read_csv(path: str | os.PathLike) -> pd.DataFrame:
    """Read what ``write_csv`` wrote. Key columns of the metrics table stay text, numbers become numbers."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a table ({error}); delete it and run its stage again") from error
    is_metrics = list(table.columns) == list(METRIC_COLUMNS)
    for column in [c for c in table.columns if c not in METRIC_KEYS]:
        empty = table[column] == ""
        numbers = pd.to_numeric(table[column].mask(empty), errors="coerce")
        if (numbers.notna() | empty).all() and (is_metrics or numbers.notna().any()):
            table[column] = numbers
        elif is_metrics:
            raise DataError(f"{path}: {column} holds text; write the table with write_metrics")
    return _typed(table) if is_metrics else table


def write_metrics(rows: pd.DataFrame, path: str | os.PathLike) -> None:
    """Check the metrics table, sort it by its key and write it."""
    write_csv(check_metrics(rows).sort_values(list(METRIC_KEYS), kind="stable"), path)


def read_metrics(path: str | os.PathLike) -> pd.DataFrame:
    """Read and check a metrics table."""
    return check_metrics(read_csv(path))


def write_jsonl(rows: Iterable[dict] | pd.DataFrame, path: str | os.PathLike) -> None:
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


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The objects of a JSON-lines file; DataError with file and line number for a malformed line."""
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(_bad_line(path, number, error.msg)) from error
            if not isinstance(record, dict):
                raise DataError(_bad_line(path, number, "not a JSON object"))
            records.append(record)
    return records


def _bad_line(path, number: int, what: str) -> str:
    return f"{path}, line {number}: {what}; mend or delete that line (a cut last line means an interrupted copy)"


def write_parquet(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a table as Parquet; atomic."""
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False)


def read_parquet(path: str | os.PathLike) -> pd.DataFrame:
    """Read a Parquet table; DataError when the file is damaged."""
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet table ({error}); delete it and run its stage again") from error
