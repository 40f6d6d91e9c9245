"""The paper's claims against our figures: the rules for a verdict, the table of claims and that of recipes."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import pandas as pd

from ..core.formatting import in_points
from .comparison import one, studied
from .labels import ADVERSARY


class Verdict(StrEnum):
    """What an interval says of a claim; the values are those of claims.csv."""

    HOLDS = "holds"
    NOT_SHOWN = "not shown"
    FAILS = "does not hold"
    NOT_TESTED = "not tested"


class Claim(NamedTuple):
    """A row of the table of claims."""

    claim: str
    paper: str
    method: str
    evidence: str
    n: int
    verdict: Verdict


# claim of the paper (arXiv 2512.21999), the paper's own figure, metric of ours, benchmark, and the sign asked for
CLAIMS = (
    ("The edit lowers hallucination in captions", "LLaVA-1.5: CHAIRs 39.3", "chair_s_diff", "chair", -1),
    ("It does better than saying less", "not asked", "frontier_gap", "chair", +1),
    ("The share of attention on the image rises", "29.71 % to 33.72 %", "attn_last_max_diff", "grounding", +1),
)
KEPT = (  # claims that something does not get worse by more than a margin
    ("Recall is kept (loss under 3 points)", "LLaVA-1.5: recall 74.2", "recall_diff", "chair", 0.03),
    ("Yes/no answers stay right (loss under 3 points)", "general ability kept", "pope_accuracy_diff", "pope", 0.03),
)
UNTESTED = (  # claim, paper, evidence, verdict
    ("Inference costs nothing more", "no overhead",
     "by construction: same modules, shapes and dtypes (checked by a test; timed on a GPU: chapter What it takes)",
     Verdict.HOLDS),
    ("It generalises to other model families", "open in the paper", "cannot be tested on one model",
     Verdict.NOT_TESTED),
    ("People prefer the captions", "open in the paper", "not answered here", Verdict.NOT_TESTED),
)  # fmt: skip
NOT_RUN = {"scenes": "not in this run: make study", "coco": "not run: needs a GPU"}  # a column each, whatever was run
WORSE, LOST = 0.02, 0.03  # what still counts as "as good": CHAIRs at most so much higher, recall so much lower


def verdict(lo: float, hi: float, sign: float) -> Verdict:
    """Holds or fails when the interval lies on one side of zero, else not shown."""
    if lo * sign > 0 and hi * sign > 0:
        return Verdict.HOLDS
    return Verdict.FAILS if lo * sign < 0 and hi * sign < 0 else Verdict.NOT_SHOWN


def kept(lo: float, hi: float, margin: float) -> Verdict:
    """Holds when the whole interval is above -margin, fails when it is wholly below, else not shown."""
    return Verdict.HOLDS if lo > -margin else Verdict.FAILS if hi < -margin else Verdict.NOT_SHOWN


def claims(metrics: pd.DataFrame) -> pd.DataFrame:
    """The table of claims: claim, paper, method, evidence, n, and a column a world. The world of ``metrics`` has the
    verdicts, others say how to get theirs: what holds in one says nothing of another. KeyError names a missing row.
    """
    world = metrics.loc[metrics["model"] == studied(metrics), "world"].iloc[0]
    rows = []
    for table, judge, again in (
        (CLAIMS, verdict, "... and so does the edit with clean steps mixed in"),
        (KEPT, kept, "... with clean steps mixed in"),
    ):
        for claim, paper, metric, benchmark, bar in table:
            for method, text, figure in zip(ADVERSARY, (claim, again), (paper, "(ours)")):
                row = one(metrics, metric, benchmark, method)
                judged = judge(row["lo"], row["hi"], bar)
                rows.append(Claim(text, figure, method, _evidence(row), int(row["n"]), judged))
    rows += [adversary(metrics, method) for method in ADVERSARY]
    rows += [adversary(metrics, method, "chair_s", "attacked") for method in ADVERSARY]
    rows += [Claim(claim, paper, "", why, 0, judged) for claim, paper, why, judged in UNTESTED]
    table = pd.DataFrame(rows).rename(columns={"verdict": world})
    others = {name: text for name, text in NOT_RUN.items() if name != world}
    return table.assign(**others)[[*table.columns[:-1], *dict.fromkeys([*NOT_RUN, world])]]


def adversary(metrics: pd.DataFrame, method: str, metric: str = "chair_s_diff", condition: str = "clean") -> Claim:
    """The row of one adversarial edit against plain supervised editing, on clean prompts or under a fresh attack.

    Only intervals that do not meet count (holds: the adversarial edit has the lower CHAIRs), which is stricter than
    a paired test.
    """
    own, plain = (one(metrics, metric, "chair", m, condition) for m in (method, "no-prefix"))
    judged = Verdict.NOT_SHOWN
    if own["hi"] < plain["lo"]:
        judged = Verdict.HOLDS
    elif own["lo"] > plain["hi"]:
        judged = Verdict.FAILS
    evidence = f"{_evidence(own)} against no-prefix {_evidence(plain).removeprefix(metric + ' ')}"
    where = "clean prompts" if condition == "clean" else "under a fresh attack"
    claim = f"The adversary helps beyond plain supervised editing ({where})"
    return Claim(claim, "the method's idea", method, evidence, int(own["n"]), judged)


def _evidence(row: pd.Series) -> str:
    return f"{row['metric']} {row['value']:+.3f} [{row['lo']:+.3f}, {row['hi']:+.3f}]"


def robust_recipes(rows: pd.DataFrame) -> pd.DataFrame:
    """Which edits are as good as plain supervised editing on clean prompts, and better under attack.

    ``rows``: the record of trials, one or more models. Of each model and label: ``clean`` and ``recall`` (hold when
    the whole interval of the paired difference lies within WORSE and LOST), ``attacked`` (holds when it lies below
    0), each with its difference; ``recipe`` when all three hold.
    """
    out = []
    differences = rows[rows["against"] == "no-prefix"].set_index(["model", "label", "condition", "metric"])
    for model, label in dict.fromkeys((m, name) for m, name, *_ in differences.index):
        clean, recall, hit = (
            differences.loc[(model, label, *where)]
            for where in (("clean", "chair_s"), ("clean", "recall"), ("attacked", "chair_s"))
        )
        judged = {
            "clean": kept(-clean["hi"], -clean["lo"], WORSE),
            "recall": kept(recall["lo"], recall["hi"], LOST),
            "attacked": verdict(hit["lo"], hit["hi"], -1),
        }
        texts = {f"{k} difference": in_points(r) for k, r in zip(judged, (clean, recall, hit))}
        row = {"model": model, "label": label, "seeds": int(clean["seeds"]), "n": int(clean["n"])}
        out.append({**row, **judged, **texts, "recipe": set(judged.values()) == {Verdict.HOLDS}})
    return pd.DataFrame(out)
