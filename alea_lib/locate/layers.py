"""LOCATE: which layers separate the hallucinated from the grounded answer. One function a locator, one registry."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

Locator = Callable[[torch.Tensor, torch.Tensor, int], np.ndarray]
LOCATORS: dict[str, Locator] = {}


def locator(name: str) -> Callable[[Locator], Locator]:
    """Register a locator: (positive [N,L,D], negative [N,L,D], seed) -> scores [N,L], larger = more suspect."""

    def add(function: Locator) -> Locator:
        LOCATORS[name] = function
        return function

    return add


@locator("relative-l2")
def relative_l2(positive: torch.Tensor, negative: torch.Tensor, seed: int = 0) -> np.ndarray:
    """|p - n| / mean(|p|, |n|): free of the growth of norms with depth. Our correction of the paper's distance."""
    scale = (positive.norm(dim=-1) + negative.norm(dim=-1)) / 2
    return ((positive - negative).norm(dim=-1) / scale).numpy()


@locator("raw-l2")
def raw_l2(positive: torch.Tensor, negative: torch.Tensor, seed: int = 0) -> np.ndarray:
    """|p - n|: the paper's distance (the official code feeds it padded text without the image)."""
    return (positive - negative).norm(dim=-1).numpy()


@locator("random")
def random(positive: torch.Tensor, negative: torch.Tensor, seed: int = 0) -> np.ndarray:
    """Control: one random order of the layers, the same for every pair."""
    order = np.random.default_rng([seed, 5]).permutation(positive.shape[1]).astype(float)
    return np.tile(order, (len(positive), 1))


@locator("last")
def last(positive: torch.Tensor, negative: torch.Tensor, seed: int = 0) -> np.ndarray:
    """Control: the deeper, the more suspect."""
    return np.tile(np.arange(positive.shape[1], dtype=float), (len(positive), 1))


def locate_layers(
    positive: torch.Tensor, negative: torch.Tensor, names: list[str] | None = None, seed: int = 0
) -> pd.DataFrame:
    """Scores of several locators as a tidy table: locator, pair, layer, score. KeyError names the known ones."""
    parts = []
    for name in names or list(LOCATORS):
        if name not in LOCATORS:
            raise KeyError(f"unknown locator {name!r}; there are {sorted(LOCATORS)}")
        scores = LOCATORS[name](positive, negative, seed)
        pair, layer = np.indices(scores.shape)
        parts.append(
            pd.DataFrame({"locator": name, "pair": pair.ravel(), "layer": layer.ravel(), "score": scores.ravel()})
        )
    return pd.concat(parts, ignore_index=True)


def choose_layers(scores: pd.DataFrame, k: int = 2, rule: str = "vote") -> list[int]:
    """The ``k`` layers that one locator names, in order of depth.

    ``vote``: each pair votes for its own best layer, most votes win (ties: the higher mean score). ``mean``: largest
    mean score. ValueError for another rule or when ``k`` exceeds the number of layers.
    """
    return _choose(scores.pivot(index="pair", columns="layer", values="score").to_numpy(), k, rule)


def _choose(table: np.ndarray, k: int, rule: str) -> list[int]:
    """``table`` [pairs, layers]."""
    if not 0 < k <= table.shape[1]:
        raise ValueError(f"{k} layers asked for, the model has {table.shape[1]}")
    mean = table.mean(0)
    if rule == "mean":
        ranked = np.argsort(-mean, kind="stable")
    elif rule == "vote":
        votes = np.bincount(table.argmax(1), minlength=table.shape[1])
        ranked = np.lexsort((-mean, -votes))
    else:
        raise ValueError(f"unknown rule {rule!r}; there are 'vote' and 'mean'")
    return sorted(int(layer) for layer in ranked[:k])


def stability(
    scores: pd.DataFrame, k: int = 2, rule: str = "vote", resamples: int = 100, seed: int = 0
) -> pd.DataFrame:
    """Share of resamples of the pairs in which a layer is chosen, [locator, layer]."""
    rng = np.random.default_rng([seed, 6])
    rows = {}
    for name, part in scores.groupby("locator", sort=False):
        wide = part.pivot(index="pair", columns="layer", values="score").to_numpy()
        share = np.zeros(wide.shape[1])
        for _ in range(resamples):
            share[_choose(wide[rng.integers(0, len(wide), len(wide))], k, rule)] += 1 / resamples
        rows[name] = share
    return pd.DataFrame(rows).T.rename_axis(index="locator", columns="layer")
