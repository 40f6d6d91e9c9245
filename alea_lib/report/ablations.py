"""What the ablations found, in sentences, and the published table beside a run's own."""

from __future__ import annotations

import pandas as pd

from ..core.formatting import in_points, percent
from ..core.paths import root
from ..core.tables import read_csv
from ..experiments.ablations import FACTORS


def ablation_finding(rows: pd.DataFrame) -> str:
    """What came out, as a list in markdown: one line a factor, each level's CHAIRs (clean; attacked where it is), then
    which differences to the factor's reference are shown (interval without zero), and which are not."""
    wrong = rows[rows["metric"] == "chair_s"]
    changes = wrong[wrong["against"] != ""]
    lines = []
    for factor, part in wrong[wrong["against"] == ""].groupby("factor", sort=False):
        said = []
        for (level, condition), row in part.set_index(["level", "condition"]).iterrows():
            under = " under attack" if condition == "attacked" else ""
            said.append(f"{level}{under} {percent(row)}")
        seeds, n = int(part["seeds"].iloc[0]), int(part["n"].iloc[0])
        question = FACTORS[factor].question if factor in FACTORS else "The unedited model"
        line = f"{question} (`{factor}`, {seeds} seed{'s' * (seeds > 1)}, {n} pictures) {'; '.join(said)}."
        lines += [f"- {line}", *(f"  - {verdict}" for verdict in _verdicts(changes[changes["factor"] == factor]))]
    return "\n".join(lines) + "\n"


def _verdicts(changes: pd.DataFrame) -> list[str]:
    """Sentences on one factor's differences: shown, not shown, and levels that no picture tells apart."""
    said: dict[str, list[str]] = {"Shown": [], "Not shown": [], "Equal on every picture": []}
    for _, row in changes.iterrows():
        level = f"{row['level']}{' under attack' if row['condition'] == 'attacked' else ''}"
        if row["value"] == row["lo"] == row["hi"] == 0:
            said["Equal on every picture"].append(level)
        elif row["lo"] > 0 or row["hi"] < 0:
            said["Shown"].append(f"{level} {in_points(row)}")
        else:
            said["Not shown"].append(level)
    return [
        f"{word} (against {changes['against'].iloc[0]}): {'; '.join(found)}." for word, found in said.items() if found
    ]


def published_ablations(run, folder: str) -> pd.DataFrame:
    """The committed rows of data/results/<folder>/ablations.csv, which ``run`` then has read: call it before the run's
    id is used. Empty if there are none; column ``source`` is the folder."""
    name = f"data/results/{folder}/ablations.csv"
    if not (root() / name).exists():
        return pd.DataFrame(columns=["factor", "source"])
    return read_csv(run.uses(name)).fillna({"against": ""}).assign(source=folder)


def beside_published(published: pd.DataFrame, rows: pd.DataFrame, source: str) -> pd.DataFrame:
    """The published rows, and of ``rows`` (of this ``source``) the factors that they lack."""
    live = rows[~rows["factor"].isin(published["factor"])].assign(source=source)
    return pd.concat([published, live], ignore_index=True) if len(published) else live
