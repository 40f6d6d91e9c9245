"""Locators beside each other: who agrees with whom, and which place each one names on each implanted model."""

from __future__ import annotations

import pandas as pd

from .judge import TARGETS, chance, kendall

CONTROLS = ("random", "first", "last", "all", "weight-norm")


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


def league(judged: pd.DataFrame) -> pd.DataFrame:
    """Locators from the best mean reciprocal rank down: target, locator, models, 'value [lo, hi]' of each measure.

    ``judged``: what ``aggregate`` gives: locator, target, metric, value, lo, hi, n.
    """
    text = judged.apply(lambda r: f"{r['value']:.2f} [{r['lo']:.2f}, {r['hi']:.2f}]", axis=1)
    keys = ["target", "locator"]
    table = judged.assign(text=text).pivot(index=keys, columns="metric", values="text")
    best = judged[judged["metric"] == "mrr"].set_index(keys)
    order = best.sort_values("value", ascending=False, kind="stable").index
    return table.reindex(order)[["hit@1", "hit@2", "mrr"]].assign(models=best["n"]).reset_index()


def localisation_finding(layers: pd.DataFrame, heads: pd.DataFrame, n_layers: int, n_heads: int) -> str:
    """What came out, as markdown: which locators find the layer and the head, and what the paper's distance does.

    ``layers``, ``heads``: what ``aggregate`` gives; ``n_heads`` counts those of all layers. A locator finds the place
    when the whole interval of its hit@1 is above chance; controls are told apart.
    """
    lines = []
    for what, rows, places in (("layer", layers, n_layers), ("head", heads, n_heads)):
        hits = rows[rows["metric"] == "hit@1"].sort_values("value", ascending=False, kind="stable")
        above = hits[(hits["lo"] > chance(places)["hit@1"]) & ~hits["locator"].isin(CONTROLS)]
        named = ", ".join(f"`{r.locator}` ({_share(r)})" for r in above.itertuples()) or "none"
        lines.append(
            f"Of {hits['n'].max()} implanted models the {what} stands first, more often than by chance "
            f"({chance(places)['hit@1']:.0%}), for: {named}."
        )
        norm = hits[hits["locator"] == "weight-norm"]
        lines += [f"The control `weight-norm`, which sees implant and decoy: {_share(r)}." for r in norm.itertuples()]
        if what == "layer":
            paper = hits[hits["locator"].isin(["raw-l2", "official"])]
            shares = " and ".join(f"`{r.locator}` in {_share(r)}" for r in paper.itertuples())
            lines.append(f"The paper's distance, and the official code's setting of it: {shares} of the models.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _share(row) -> str:
    return f"{row.value:.0%} [{row.lo:.0%}, {row.hi:.0%}]"
