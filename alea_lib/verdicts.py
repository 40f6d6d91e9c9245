"""The paper's claims against our figures: a rule for a verdict, and the tables of the last chapter."""

from __future__ import annotations

import pandas as pd

from .phrases import in_points, percent, with_interval

# claim of the paper (arXiv 2512.21999), the paper's own figure, metric of ours, method, and the sign that it asks for
CLAIMS = (
    (
        "The edit lowers hallucination in captions",
        "LLaVA-1.5: CHAIRs 39.3",
        "chair_s_diff",
        "chair",
        "alea-corrected",
        -1,
    ),
    ("... and so does the edit with clean steps mixed in", "(ours)", "chair_s_diff", "chair", "alea-mixed", -1),
    ("It does better than saying less", "not asked", "frontier_gap", "chair", "alea-corrected", +1),
    ("... and so does the edit with clean steps mixed in", "(ours)", "frontier_gap", "chair", "alea-mixed", +1),
    (
        "The share of attention on the image rises",
        "29.71 % to 33.72 %",
        "attn_last_max_diff",
        "grounding",
        "alea-corrected",
        +1,
    ),
    (
        "... and so does the edit with clean steps mixed in",
        "(ours)",
        "attn_last_max_diff",
        "grounding",
        "alea-mixed",
        +1,
    ),
)
KEPT = (  # claims that something does not get worse by more than a margin
    ("Recall is kept (loss under 3 points)", "LLaVA-1.5: recall 74.2", "recall_diff", "chair", "alea-corrected", 0.03),
    ("... with clean steps mixed in", "(ours)", "recall_diff", "chair", "alea-mixed", 0.03),
    (
        "Yes/no answers stay right (loss under 3 points)",
        "general ability kept",
        "pope_accuracy_diff",
        "pope",
        "alea-corrected",
        0.03,
    ),
    ("... with clean steps mixed in", "(ours)", "pope_accuracy_diff", "pope", "alea-mixed", 0.03),
)
ADVERSARY = (
    "alea-corrected",
    "alea-mixed",
)  # each against no-prefix: the same modules, pairs and steps without adversary
UNTESTED = (
    (
        "Inference costs nothing more",
        "no overhead",
        "by construction: same modules, shapes and dtypes (checked by a test; timed on a GPU: chapter What it takes)",
    ),
    ("It generalises to other model families", "open in the paper", "cannot be tested on one model"),
    ("People prefer the captions", "open in the paper", "not answered here"),
)
METHOD_ORDER = (
    "base", "truncation", "sft", "no-prefix", "random-prefix", "alea-official", "alea-corrected", "alea-mixed",
    "lora", "heads", "random-layers", "last-layer", "all-layers",
)  # fmt: skip
NOT_RUN = {"scenes": "not in this run: make study", "coco": "not run: needs a GPU"}  # a column each, whatever was run
CUT = ",cut"  # in the setting of a row: the base model's captions cut to so many sentences


def verdict(lo: float, hi: float, sign: int) -> str:
    """'holds' / 'does not hold' when the interval lies on one side of zero, else 'not shown'."""
    if lo * sign > 0 and hi * sign > 0:
        return "holds"
    return "does not hold" if lo * sign < 0 and hi * sign < 0 else "not shown"


def kept(lo: float, hi: float, margin: float) -> str:
    """'holds' when the whole interval is above -margin, 'does not hold' when it is wholly below, else 'not shown'."""
    return "holds" if lo > -margin else "does not hold" if hi < -margin else "not shown"


def claims(metrics: pd.DataFrame) -> pd.DataFrame:
    """The table of claims: claim, paper, method, evidence, n, and a column a world. The world of ``metrics`` has the
    verdicts, others say how to get theirs: what holds in one says nothing of another. KeyError names a missing row.
    """
    world, rows = metrics.loc[metrics["model"] == studied(metrics), "world"].iloc[0], []
    for table, judge in ((CLAIMS, verdict), (KEPT, kept)):
        for claim, paper, metric, benchmark, method, bar in table:
            row = one(metrics, metric, benchmark, method)
            evidence = f"{metric} {row['value']:+.3f} [{row['lo']:+.3f}, {row['hi']:+.3f}]"
            rows.append((claim, paper, method, evidence, int(row["n"]), judge(row["lo"], row["hi"], bar)))
    rows += [adversary(metrics, method) for method in ADVERSARY]
    rows += [adversary(metrics, method, "chair_s", "attacked") for method in ADVERSARY]
    rows += [
        (claim, paper, "", why, 0, "not tested" if "construction" not in why else "holds")
        for claim, paper, why in UNTESTED
    ]
    table = pd.DataFrame(rows, columns=["claim", "paper", "method", "evidence", "n", world])
    others = {name: told for name, told in NOT_RUN.items() if name != world}
    return table.assign(**others)[[*table.columns[:-1], *dict.fromkeys([*NOT_RUN, world])]]


def adversary(metrics: pd.DataFrame, method: str, metric: str = "chair_s_diff", condition: str = "clean") -> tuple:
    """The row of one adversarial edit against plain supervised editing, on clean prompts or under a fresh attack.

    Only intervals that do not meet count ('holds': the adversarial edit has the lower CHAIRs), which is stricter than
    a paired test.
    """
    own, plain = (one(metrics, metric, "chair", m, condition) for m in (method, "no-prefix"))
    judged = "holds" if own["hi"] < plain["lo"] else "does not hold" if own["lo"] > plain["hi"] else "not shown"
    evidence = f"{metric} {own['value']:+.3f} [{own['lo']:+.3f}, {own['hi']:+.3f}] against no-prefix "
    evidence += f"{plain['value']:+.3f} [{plain['lo']:+.3f}, {plain['hi']:+.3f}]"
    where = "clean prompts" if condition == "clean" else "under a fresh attack"
    claim = f"The adversary helps beyond plain supervised editing ({where})"
    return claim, "the method's idea", method, evidence, int(own["n"]), judged


def studied(metrics: pd.DataFrame) -> str:
    """The model that is edited: that of the first row of another method than base (else of the first row)."""
    edited = metrics[metrics["method"] != "base"]
    return (edited if len(edited) else metrics)["model"].iloc[0]


def one(metrics: pd.DataFrame, metric: str, benchmark: str, method: str, condition: str = "clean") -> pd.Series:
    """The single row of a measure on the test split, plain prompt, over all POPE settings."""
    mine = (metrics["model"] == studied(metrics)) & (metrics["method"] == method)
    found = metrics[mine & (metrics["metric"] == metric) & (metrics["benchmark"] == benchmark)]
    found = found[(found["setting"] == "all") if benchmark == "pope" else (found["prompt"] == "plain")]
    found = found[~found["setting"].str.contains(CUT) & (found["condition"] == condition)]
    if len(found) != 1:
        raise KeyError(
            f"metrics.csv has {len(found)} rows of {metric} for {method}, {condition}, expected one: run notebook "
            f"{'06_measure' if condition == 'clean' else '10_robustness'} for it"
        )
    return found.iloc[0]


def finding(metrics: pd.DataFrame) -> str:
    """What came out, as a list in markdown: one line a method, percentages with 95 % intervals, n."""
    if not (metrics["metric"] == "chair_s").any():
        return "This profile measures no captions.\n"
    base = one(metrics, "chair_s", "chair", "base")
    lines = [
        f"Over {int(base['n'])} test pictures the unedited model names an absent object in {percent(base)} "
        "of its captions."
    ]
    for method in [m for m in METHOD_ORDER[1:] if (metrics["method"] == m).any()]:
        wrong, lost, gap = (one(metrics, m, "chair", method) for m in ("chair_s", "recall_diff", "frontier_gap"))
        lines.append(
            f"`{method}`: {percent(wrong)}; recall changes by {in_points(lost)}; "
            f"{in_points(gap)} below the truncation frontier."
        )
    return "\n".join(f"- {line}" for line in lines) + "\n"


WORSE, LOST = 0.02, 0.03  # what still counts as "as good": CHAIRs at most so much higher, recall so much lower


def robustness_finding(rows: pd.DataFrame) -> str:
    """What the attacks did, as a list in markdown. ``rows``: the record of :func:`alea_lib.trial_rows`, one model."""
    values = rows[(rows["metric"] == "chair_s") & (rows["against"] == "")].set_index(["label", "condition"])
    lines = [
        f"`{label}`: {percent(values.loc[(label, 'clean')])} of the captions name an absent object, "
        f"{percent(values.loc[(label, 'attacked')])} under a fresh attack on this very model."
        for label in dict.fromkeys(rows["label"])
    ]
    bought = rows[(rows["metric"] == "chair_s") & (rows["condition"] == "attacked") & (rows["against"] == "no-prefix")]
    for row in bought[bought["label"].isin(ADVERSARY)].to_dict("records"):
        said = verdict(row["lo"], row["hi"], -1).replace("does not hold", "the other way round")
        said = said.replace("holds", "shown")
        lines.append(f"Fewer under attack with `{row['label']}` than with `no-prefix`: {in_points(row)}, {said}.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def robust_recipes(rows: pd.DataFrame, against: str = "no-prefix") -> pd.DataFrame:
    """Which edits are as good as plain supervised editing on clean prompts, and better under attack.

    ``rows``: the record of trials, one or more models. Of each model and label: ``clean`` and ``recall`` ('holds' when
    the whole interval of the paired difference lies within WORSE and LOST), ``attacked`` ('holds' when it lies below
    0), each with its difference; ``recipe`` when all three hold.
    """
    out = []
    differences = rows[rows["against"] == against].set_index(["model", "label", "condition", "metric"])
    for model, label in dict.fromkeys((m, name) for m, name, *_ in differences.index):
        clean, recall, attacked = (
            differences.loc[(model, label, *where)]
            for where in (("clean", "chair_s"), ("clean", "recall"), ("attacked", "chair_s"))
        )
        said = {
            "clean": kept(-clean["hi"], -clean["lo"], WORSE),
            "recall": kept(recall["lo"], recall["hi"], LOST),
            "attacked": verdict(attacked["lo"], attacked["hi"], -1),
        }
        texts = {f"{k} difference": in_points(r) for k, r in zip(said, (clean, recall, attacked))}
        row = {"model": model, "label": label, "seeds": int(clean["seeds"]), "n": int(clean["n"])}
        out.append({**row, **said, **texts, "recipe": set(said.values()) == {"holds"}})
    return pd.DataFrame(out)


def recipe_sentence(recipes: pd.DataFrame) -> str:
    """Is there a recipe that costs nothing on clean prompts and helps under attack? One sentence from the table."""
    models, every = recipes["model"].nunique(), recipes.groupby("label", sort=False)["recipe"].all()
    seeds = " to ".join(str(n) for n in sorted({recipes["seeds"].min(), recipes["seeds"].max()}))
    where = f"in {'all ' if models > 1 else ''}{models} base model{'s' * (models > 1)} ({seeds} seeds each)"
    bar = f"at most {100 * WORSE:.0f} points more CHAIRs and {100 * LOST:.0f} points less recall"
    if not every.any():
        return (
            f"No edit tried is both as good as plain supervised editing on clean prompts ({bar}, whole intervals) "
            f"and better under a fresh attack {where}."
        )
    named = " and ".join(f"`{label}`" for label in every.index[every])
    return (
        f"{named}: as good as plain supervised editing on clean prompts ({bar}, whole intervals) and better "
        f"under a fresh attack {where}; no other edit tried is both."
    )


HEADLINE = ("chair_s", "chair_i", "recall", "words", "objects_per_caption", "frontier_gap", "pope_accuracy",
            "mme_total", "amber_score", "attn_last_max", "ppl_grounded")  # fmt: skip


def headline(metrics: pd.DataFrame) -> pd.DataFrame:
    """Measure by method, 'value [lo, hi]'; an empty cell is a measure that is not defined for the method."""
    return side_by_side(metrics, HEADLINE)


def side_by_side(metrics: pd.DataFrame, wanted: tuple[str, ...], setting: str | None = None) -> pd.DataFrame:
    """Measure by method, 'value [lo, hi]', of the studied model under the plain prompt, in the order of ``wanted``.

    ``setting``: which of a measure's settings, where it has several; by default the overall one.
    """
    rows = rows_of(metrics, wanted, setting)
    table = rows.assign(text=with_interval(rows))
    table = table.pivot(index="metric", columns="method", values="text")
    columns = [m for m in METHOD_ORDER if m in table.columns]
    return table.reindex(index=[m for m in wanted if m in table.index], columns=columns).fillna("")


def rows_of(metrics: pd.DataFrame, wanted: tuple[str, ...], setting: str | None = None) -> pd.DataFrame:
    """The rows of these measures of the studied model, plain prompt, whole captions; see :func:`side_by_side`."""
    rows = metrics[(metrics["model"] == studied(metrics)) & metrics["metric"].isin(wanted)]
    rows = rows[rows["method"].isin(METHOD_ORDER)]  # rivals are measured on fewer pictures, on a page of their own
    rows = rows[rows["prompt"].isin(["plain", ""]) & ~rows["setting"].str.contains(CUT) & rows["condition"].eq("clean")]
    overall = rows["setting"].isin(["all", "answer", "reference"]) | rows["benchmark"].eq("chair")
    return rows[overall if setting is None else rows["setting"].eq(setting)]


def frontier_line(metrics: pd.DataFrame) -> pd.DataFrame:
    """The base model's truncation frontier: k, and value, _lo, _hi of chair_s, chair_i, recall, words."""
    rows = metrics[(metrics["model"] == studied(metrics)) & metrics["setting"].str.contains(CUT)]
    rows = rows.assign(k=rows["setting"].str.rpartition("cut")[2].astype(int))
    return _wide(rows, "k")


def frontier_points(metrics: pd.DataFrame) -> pd.DataFrame:
    """Each method's point for the frontier's plane: method, and value, _lo, _hi of chair_s and recall."""
    points = _wide(rows_of(metrics, ("chair_s", "recall")), "method")
    return points.sort_values("method", key=lambda m: m.map(list(METHOD_ORDER).index), ignore_index=True)


def _wide(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    wide = rows.pivot(index=by, columns="metric", values=["value", "lo", "hi"])
    wide.columns = [metric if part == "value" else f"{metric}_{part}" for part, metric in wide.columns]
    return wide.astype(float).reset_index()
