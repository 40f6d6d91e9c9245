"""Yes/no answers: how they are read, and what they score."""

from __future__ import annotations

import re
from collections.abc import Callable

import pandas as pd

from ..core.files import DataError

# A parser turns an answer into (yes, no or None, whether yes or no was said at all).


def _official(answer: str) -> tuple[str | None, bool]:
    """POPE's program: first sentence up to a full stop; "No", "no" or "not" is no, everything else is yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    if {"No", "no", "not"} & set(words):
        return "no", True
    return "yes", bool(re.search(r"\byes\b", answer, re.I))


def _strict(answer: str) -> tuple[str | None, bool]:
    """The first word must be yes or no, in any case."""
    first = re.match(r"\W*([^\W_]+)", answer)
    word = first.group(1).lower() if first else ""
    return (word, True) if word in ("yes", "no") else (None, False)


def _substring(answer: str) -> tuple[str | None, bool]:
    """ "yes" anywhere is yes, else "no" anywhere is no ("nothing" and "know" too)."""
    text = answer.lower()
    word = "yes" if "yes" in text else "no" if "no" in text else None
    return word, word is not None


def _mme(answer: str) -> tuple[str | None, bool]:
    """MME's tool: in lower case, "yes" or "no" whole, else "yes", else "no" within the first four characters."""
    return _substring(answer.lower()[:4])


def _exact(answer: str) -> tuple[str | None, bool]:
    """AMBER's program: the whole answer is "Yes" or "No", with this capital and no full stop."""
    return (answer.lower(), True) if answer in ("Yes", "No") else (None, False)


PARSERS: dict[str, Callable[[str], tuple[str | None, bool]]] = {
    "official": _official,
    "strict": _strict,
    "substring": _substring,
    "mme": _mme,
    "exact": _exact,
}


def check_parser(parser: str) -> None:
    """DataError when there is no parser of that name."""
    if parser not in PARSERS:
        raise DataError(f"unknown parser {parser!r}; choose one of {', '.join(PARSERS)}")


def judged(answered: pd.DataFrame, column: str, parser: str) -> pd.DataFrame:
    """The table with said (yes, no or None), parsed (whether either was said at all) and correct (said == label)."""
    said, parsed = zip(*(PARSERS[parser](text) for text in answered[column]), strict=True)
    said = pd.Series(said, index=answered.index, dtype=object)
    return answered.assign(said=said, parsed=list(parsed), correct=said == answered["label"])


def unparsed(rows: pd.DataFrame) -> tuple:
    """The share of answers that hold neither word, as (num, den) of each."""
    return 1.0 - rows["parsed"].to_numpy(float), 1.0


def yes_no_ratios(rows: pd.DataFrame, positive: str) -> dict[str, tuple]:
    """accuracy, precision, recall and f1 of judged answers, as (num, den) of each answer."""
    said, label = ((rows[c] == positive).to_numpy(float) for c in ("said", "label"))
    hit = said * label
    return {
        "accuracy": (rows["correct"].to_numpy(float), 1.0),
        "precision": (hit, said),
        "recall": (hit, label),
        "f1": (2 * hit, said + label),  # = 2TP / (2TP + FP + FN)
    }


def labels(values: pd.Series, ids: pd.Series, where: str) -> pd.Series:
    """Labels in lower case; DataError for one that is neither yes nor no."""
    found = values.astype(str).str.strip().str.lower()
    bad = ids[~found.isin(("yes", "no"))]
    if len(bad):
        raise DataError(f"{where}: the labels of questions {bad.head(3).tolist()} are neither yes nor no")
    return found
