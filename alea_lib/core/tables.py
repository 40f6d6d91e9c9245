"""The schema of ``metrics.csv``: one long tidy table, one row a unique key of ``METRIC_KEYS``.

Fractions are 0-1 floats; ``lo`` and ``hi`` bound the 95 % interval; a measure that is not defined is absent, never NaN.
"""

from __future__ import annotations

import re

import pandas as pd

from .files import DataError, PathLike, write_csv

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
METHOD_FORM = r"[a-z0-9]+(?:-[a-z0-9]+)*"
METHOD_RULE = "of lower-case letters, digits and single hyphens"
ENUMERATIONS = {
    "split": ("train", "activate", "validate", "test"),
    "prompt": ("plain", "careful", "speculative"),
    "condition": ("clean", "attacked", "blank", "swap"),
}
_declared: set[str] = set()


def declare_method(name: str) -> None:
    """Let rows bear the name of a new method, in lower case and with hyphens ("my-method"); DataError if it is not."""
    if not re.fullmatch(METHOD_FORM, name):
        raise DataError(f"the method name {name!r} must be {METHOD_RULE}")
    _declared.add(name)


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


def check_metrics(rows: pd.DataFrame, declared_only: bool = True) -> pd.DataFrame:
    """The table unchanged if it keeps the schema; DataError naming the first offending rows if not.

    A method must be one of ``METHOD_NAMES`` or declared by ``declare_method``. ``declared_only=False``, for tables
    that another process wrote, takes any well-formed name.
    """
    if list(rows.columns) != list(METRIC_COLUMNS):
        raise DataError(f"columns are {list(rows.columns)}, must be {list(METRIC_COLUMNS)} in this order")
    for column in REQUIRED_KEYS:
        _refuse(rows, rows[column].fillna("").astype(str) == "", f"empty {column}")
    for column, allowed in ENUMERATIONS.items():
        _refuse(rows, ~rows[column].fillna("").isin(("", *allowed)), f"{column} must be one of {', '.join(allowed)}")
    methods, known = rows["method"].astype(str), (*METHOD_NAMES, *sorted(_declared - set(METHOD_NAMES)))
    if declared_only:
        _refuse(rows, ~methods.isin(known), f"method must be one of {', '.join(known)}")
    _refuse(rows, ~methods.str.fullmatch(METHOD_FORM).astype(bool), f"method must be {METHOD_RULE}")
    _refuse(rows, ~rows["metric"].map(is_metric), "unknown metric name; add it to METRIC_NAMES if it is new")
    _refuse(rows, rows.duplicated(list(METRIC_KEYS), keep=False), "the same key twice")
    _check_values(rows)
    return rows


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


def read_csv(path: PathLike) -> pd.DataFrame:
    """Read what ``write_csv`` wrote: numbers become numbers, but key columns of the metrics table stay text."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a table ({error}); delete it and run its stage again") from error
    of_metrics = list(table.columns) == list(METRIC_COLUMNS)
    for column in [c for c in table.columns if c not in METRIC_KEYS]:
        empty = table[column] == ""
        numbers = pd.to_numeric(table[column].mask(empty), errors="coerce")
        if not (numbers.notna() | empty).all():
            if of_metrics:
                raise DataError(f"{path}: {column} holds text; write the table with write_metrics")
        elif of_metrics or numbers.notna().any():
            table[column] = numbers
    return _typed(table) if of_metrics else table


def write_metrics(rows: pd.DataFrame, path: PathLike, declared_only: bool = True) -> None:
    """Check the metrics table, sort it by its key and write it."""
    write_csv(check_metrics(rows, declared_only).sort_values(list(METRIC_KEYS), kind="stable"), path)


def read_metrics(path: PathLike) -> pd.DataFrame:
    """Read and check a metrics table; methods of any well-formed name."""
    return check_metrics(read_csv(path), declared_only=False)
