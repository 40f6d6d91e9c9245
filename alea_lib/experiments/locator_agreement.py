"""Locators beside each other: who agrees with whom, and which place each one names on each implanted model."""

from __future__ import annotations

import pandas as pd

from .localisation import TARGETS, kendall


def agreement(means: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau between the orders in which locators put the places, [locator, locator].

    ``means``: locator, layer (, head), score. Locators that score all places alike have no order and are left out.
    """
    place = TARGETS["head" if "head" in means.columns else "layer"]
    tables = {name: part[[*place, "score"]] for name, part in means.groupby("locator", sort=False)}
    tables = {name: part for name, part in tables.items() if part["score"].nunique() > 1}
    taus = {a: {b: kendall(x, y) for b, y in tables.items()} for a, x in tables.items()}
    return pd.DataFrame(taus).rename_axis(index="locator", columns="locator")


def tau_with(means: pd.DataFrame, benefit: pd.DataFrame) -> pd.Series:
    """Kendall's tau of each locator's order with the gain of acting on a place, largest first.

    ``benefit``: place (a layer's number), metric, value; the gain is the fall of CHAIRs.
    """
    gain = benefit[benefit["metric"] == "chair_s"]
    gain = pd.DataFrame({"layer": gain["place"].astype(int), "score": -gain["value"]})
    taus = {name: kendall(part[["layer", "score"]], gain) for name, part in means.groupby("locator", sort=False)}
    return pd.Series(taus, name="Kendall's tau with the gain").dropna().sort_values(ascending=False, kind="stable")


def named_places(scores: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """Which layer each locator puts first on models with one implanted layer: locator, model, true, named, share.

    ``scores``: model, locator, layer, score; ``index``: name, layers. Ties share the model between the layers.
    """
    true = {row.name: row.layers[0] for row in index.itertuples(index=False) if len(row.layers) == 1}
    scores = scores[scores["model"].isin(true)]
    best = scores.groupby(["model", "locator"])["score"].transform("max") == scores["score"]
    first = scores[best]
    ties = first.groupby(["model", "locator"])["score"].transform("size")
    found = first.assign(true=first["model"].map(true), named=first["layer"], share=1 / ties)
    return found[["locator", "model", "true", "named", "share"]].reset_index(drop=True)
