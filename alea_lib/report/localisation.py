"""What the pages say about locators: the table that ranks them, and the sentences of what came out."""

from __future__ import annotations

import pandas as pd

from ..core.formatting import with_interval
from ..experiments.localisation import chance

CONTROLS = ("random", "first", "last", "all", "weight-norm")


def league(judged: pd.DataFrame) -> pd.DataFrame:
    """Locators from the best mean reciprocal rank down: target, locator, models, 'value [lo, hi]' of each measure.

    ``judged``: what ``aggregate`` gives: locator, target, metric, value, lo, hi, n.
    """
    keys = ["target", "locator"]
    table = judged.assign(text=with_interval(judged, ".2f")).pivot(index=keys, columns="metric", values="text")
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
        hits = hits.assign(share=with_interval(hits, ".0%"))
        by_chance = chance(places)["hit@1"]
        above = hits[(hits["lo"] > by_chance) & ~hits["locator"].isin(CONTROLS)]
        named = ", ".join(f"`{r.locator}` ({r.share})" for r in above.itertuples()) or "none"
        lines.append(
            f"Of {hits['n'].max()} implanted models the {what} stands first, more often than by chance "
            f"({by_chance:.0%}), for: {named}."
        )
        norm = hits.loc[hits["locator"] == "weight-norm", "share"]
        lines += [f"The control `weight-norm`, which sees implant and decoy: {share}." for share in norm]
        if what == "layer":
            paper = hits[hits["locator"].isin(["raw-l2", "official"])]
            shares = " and ".join(f"`{r.locator}` in {r.share}" for r in paper.itertuples())
            lines.append(f"The paper's distance, and the official code's setting of it: {shares} of the models.")
    return "\n".join(f"- {line}" for line in lines) + "\n"
