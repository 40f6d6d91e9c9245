"""LOCATE, the choice: from the scores of one locator to the layers or heads to be edited."""

from __future__ import annotations

import numpy as np
import pandas as pd

RULES = ("vote", "mean", "union")


def choose_layers(scores: pd.DataFrame, k: int = 2, rule: str = "vote") -> list[int]:
    """The layers that one locator names, in order of depth.

    ``vote``: each pair votes for its own best layer, the ``k`` with most votes win (ties: the higher mean score).
    ``mean``: the ``k`` largest mean scores. ``union``: every layer that is the best of some pair, however many
    (official code). ValueError for another rule, scores of several locators, or when ``k`` exceeds the number of
    layers.
    """
    return [layer for (layer,) in _chosen(scores, ["layer"], k, rule)]


def choose_heads(scores: pd.DataFrame, k: int = 5, rule: str = "mean") -> list[tuple[int, int]]:
    """The heads (layer, head) that one locator names, in order of depth; rules as in :func:`choose_layers`."""
    return _chosen(scores, ["layer", "head"], k, rule)


def _chosen(scores: pd.DataFrame, target: list[str], k: int, rule: str) -> list[tuple]:
    if "locator" in scores and (several := scores["locator"].unique()).size > 1:
        raise ValueError(f"scores of {len(several)} locators ({', '.join(several[:4])}, ...): choose by one of them")
    wide = scores.pivot(index="pair", columns=target, values="score")
    names = [(c,) if len(target) == 1 else c for c in wide.columns]
    return [tuple(map(int, names[i])) for i in _ranked(wide.to_numpy(), k, rule, target[-1])]


def _ranked(table: np.ndarray, k: int, rule: str, what: str = "layer") -> list[int]:
    """``table`` [pairs, places] -> the chosen places in order."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; there are {', '.join(map(repr, RULES))}")
    if rule == "union":
        return sorted(set(table.argmax(1).tolist()))
    if not 0 < k <= table.shape[1]:
        raise ValueError(f"{k} {what}s asked for, the model has {table.shape[1]}")
    mean, votes = table.mean(0), np.bincount(table.argmax(1), minlength=table.shape[1])
    ranked = np.argsort(-mean, kind="stable") if rule == "mean" else np.lexsort((-mean, -votes))
    return sorted(ranked[:k].tolist())


def stability(
    scores: pd.DataFrame, k: int = 2, rule: str = "vote", resamples: int = 100, seed: int = 0
) -> pd.DataFrame:
    """Share of resamples of the pairs in which a place is chosen: rows locators, columns layers (or layer and head)."""
    rng = np.random.default_rng([seed, 6])
    target = ["layer", "head"] if "head" in scores else "layer"
    rows, columns = {}, None
    for name, part in scores.groupby("locator", sort=False):
        wide = part.pivot(index="pair", columns=target, values="score")
        table, columns = wide.to_numpy(), wide.columns
        share = np.zeros(table.shape[1])
        for _ in range(resamples):
            share[_ranked(table[rng.integers(0, len(table), len(table))], k, rule)] += 1 / resamples
        rows[name] = share
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis(index="locator")
