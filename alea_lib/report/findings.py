"""What came out, in sentences with values, intervals and n: the texts that pages include, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from ..core.formatting import in_points, percent, with_interval
from ..core.tables import DIFFERENCE
from ..experiments.ablations import FACTORS
from ..experiments.baseline_comparison import better_than
from ..experiments.localisation import chance
from .comparison import attacked, baseline_comparison, one
from .labels import ADVERSARY, METHOD_ORDER
from .verdicts import LOST, WORSE, Verdict, adversary, verdict

CONTROLS = ("random", "first", "last", "all", "weight-norm")  # locators that look at no answer


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) + "\n"


def summary(metrics: pd.DataFrame) -> str:
    """The first page's three sentences: what the edit does, what of it is the adversary's, and the attack.

    ``alea-corrected`` is the paper's idea and ``no-prefix`` its control; KeyError names a missing row.
    """
    text = {
        Verdict.HOLDS: "is shown to help",
        Verdict.NOT_SHOWN: "makes no significant difference",
        Verdict.FAILS: "makes it worse",
    }
    base, edit, plain = (one(metrics, "chair_s", "chair", m) for m in ("base", "alea-corrected", "no-prefix"))
    lost, hit = one(metrics, "recall_diff", "chair", "alea-corrected"), attacked(metrics).set_index("method")
    clean, under_attack = (
        text[adversary(metrics, "alea-corrected", *measure).verdict] for measure in ((), ("chair_s", "attacked"))
    )
    return (
        f"Of {int(base['n'])} test images the unedited model names an absent object in {percent(base)}; after the "
        f"adversarial edit (`alea-corrected`) it does so in {percent(edit)}, and recall changes by "
        f"{in_points(lost)}.\n\n"
        f"Plain supervised editing of the same matrices (`no-prefix`) reaches {percent(plain)}: on clean prompts the "
        f"adversary {clean}.\n\n"
        f"Under a fresh attack on each model ({int(hit['n'].max())} images) the share is "
        f"{percent(hit.loc['no-prefix'])} for plain editing and {percent(hit.loc['alea-corrected'])} for the "
        f"adversarial edit: there the adversary {under_attack}.\n"
    )


def finding(metrics: pd.DataFrame) -> str:
    """One line a method: percentages with 95 % intervals, n."""
    base = one(metrics, "chair_s", "chair", "base")
    lines = [
        f"Over {int(base['n'])} test images the unedited model names an absent object in {percent(base)} "
        "of its captions."
    ]
    for method in [m for m in METHOD_ORDER[1:] if (metrics["method"] == m).any()]:
        wrong, lost, gap = (one(metrics, m, "chair", method) for m in ("chair_s", "recall_diff", "frontier_gap"))
        lines.append(
            f"`{method}`: {percent(wrong)}; recall changes by {in_points(lost)}; "
            f"{in_points(gap)} below the truncation frontier."
        )
    return _bullets(lines)


def robustness_finding(rows: pd.DataFrame) -> str:
    """What the attacks did. ``rows``: the record of :func:`alea_lib.experiments.edits.trial_rows`, one model."""
    text = {
        Verdict.HOLDS: "significantly lower",
        Verdict.NOT_SHOWN: "no significant difference",
        Verdict.FAILS: "significantly higher",
    }
    values = rows[(rows["metric"] == "chair_s") & (rows["against"] == "")].set_index(["label", "condition"])
    lines = [
        f"`{label}`: {percent(values.loc[(label, 'clean')])} of the captions name an absent object, "
        f"{percent(values.loc[(label, 'attacked')])} under a fresh attack on this very model."
        for label in dict.fromkeys(rows["label"])
    ]
    gained = rows[(rows["metric"] == "chair_s") & (rows["condition"] == "attacked") & (rows["against"] == "no-prefix")]
    for row in gained[gained["label"].isin(ADVERSARY)].to_dict("records"):
        judged = verdict(row["lo"], row["hi"], -1)
        lines.append(f"Under attack, `{row['label']}` minus `no-prefix`: {in_points(row)}, {text[judged]}.")
    return _bullets(lines)


def recipe_sentence(recipes: pd.DataFrame) -> str:
    """Is there a recipe that costs nothing on clean prompts and helps under attack? One sentence from the table of
    ``robust_recipes``."""
    models, every = recipes["model"].nunique(), recipes.groupby("label", sort=False)["recipe"].all()
    seeds = " to ".join(str(n) for n in sorted({recipes["seeds"].min(), recipes["seeds"].max()}))
    where = f"in {'all ' if models > 1 else ''}{models} base model{'s' * (models > 1)} ({seeds} seeds each)"
    bar = f"at most {100 * WORSE:.0f} points more CHAIRs and {100 * LOST:.0f} points less recall"
    good = f"as good as plain supervised editing on clean prompts ({bar}, whole intervals) and better under a fresh"
    if not every.any():
        return f"No edit tried is both {good} attack {where}."
    named = " and ".join(f"`{label}`" for label in every.index[every])
    return f"{named}: {good} attack {where}; no other edit tried is both."


def ablation_finding(rows: pd.DataFrame) -> str:
    """One line a factor, each level's CHAIRs (clean; attacked where it is), then which differences to the factor's
    reference are shown (interval without zero), and which are not."""
    wrong = rows[rows["metric"] == "chair_s"]
    changes = wrong[wrong["against"] != ""]
    lines = []
    for factor, part in wrong[wrong["against"] == ""].groupby("factor", sort=False):
        levels = "; ".join(f"{_level(row)} {percent(row)}" for row in part.to_dict("records"))
        seeds, n = int(part["seeds"].iloc[0]), int(part["n"].iloc[0])
        question = FACTORS[factor].question if factor in FACTORS else "The unedited model"
        line = f"{question} (`{factor}`, {seeds} seed{'s' * (seeds > 1)}, {n} images) {levels}."
        lines += [f"- {line}", *(f"  - {text}" for text in _differences(changes[changes["factor"] == factor]))]
    return "\n".join(lines) + "\n"


def _level(row: dict) -> str:
    return f"{row['level']}{' under attack' if row['condition'] == 'attacked' else ''}"


def _differences(changes: pd.DataFrame) -> list[str]:
    """Sentences on one factor's differences: shown, not shown, and levels that no image tells apart."""
    found: dict[str, list[str]] = {"Shown": [], "Not shown": [], "Equal on every image": []}
    for row in changes.to_dict("records"):
        if row["value"] == row["lo"] == row["hi"] == 0:
            found["Equal on every image"].append(_level(row))
        elif row["lo"] > 0 or row["hi"] < 0:
            found["Shown"].append(f"{_level(row)} {in_points(row)}")
        else:
            found["Not shown"].append(_level(row))
    return [
        f"{word} (against {changes['against'].iloc[0]}): {'; '.join(levels)}."
        for word, levels in found.items()
        if levels
    ]


def baseline_finding(rows: pd.DataFrame, method: str) -> str:
    """The best baseline (largest gap to the base model's frontier) and the controls beside ``method``, then where any
    other does better than it."""
    lines = []
    for row in baseline_comparison(rows, method).to_dict("records"):
        line = f"`{row['method']}` ({row['what']}) lies {row['gap']} below the base model's truncation frontier"
        apart = f"; CHAIRs minus those of `{method}`: {row['chair_s']}, recall {row['recall']}" if row["recall"] else ""
        lines.append(f"{line}{apart}.")
    better = better_than(rows, method)
    for metric, what in (("chair_s", "fewer wrong captions"), ("recall", "more recall")):
        part = better[better["metric"] == metric + DIFFERENCE]
        names = "; ".join(f"`{row['method']}` ({in_points(row)})" for row in part.to_dict("records"))
        lines.append(f"With {what} than `{method}`, interval apart from zero: {names or 'none'}.")
    return _bullets(lines)


def localisation_finding(layers: pd.DataFrame, heads: pd.DataFrame, n_layers: int, n_heads: int) -> str:
    """Which locators find the layer and the head, and what the paper's distance does.

    ``layers``, ``heads``: what ``aggregate`` gives; ``n_heads`` counts those of all layers. A locator finds the place
    when the whole interval of its hit@1 is above chance; controls are listed apart.
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
    return _bullets(lines)
