"""Are the tables of two runs of a profile equal? python tests/compare_tables.py OLD/results NEW/results [TABLE ...]

Rows are matched by all their text columns but the run's id; values must be equal as written (10 significant digits).
Prints every row that differs or stands on one side only, and exits with 1 if there is any.
"""

import sys
from pathlib import Path

import pandas as pd

TABLES = ("metrics", "notes", "localisation", "robustness", "ablations", "rivals", "tuning")
OF_A_RUN = ("run_id", "seconds")  # differ between equal runs
NUMBERS = {"value", "lo", "hi", "n"}


def read(folder: Path, name: str) -> pd.DataFrame:
    """A table as text, without the columns that name a run."""
    table = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
    return table.drop(columns=[c for c in OF_A_RUN if c in table])


def differences(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Rows of one side only; a row whose value changed stands there twice, once a side."""
    columns = sorted(set(old) | set(new))
    both = old.reindex(columns=columns).merge(new.reindex(columns=columns), how="outer", indicator="side")
    odd = both[both["side"] != "both"].replace({"side": {"left_only": "old", "right_only": "new"}})
    keys = [c for c in columns if c not in NUMBERS]
    return odd.sort_values([*keys, "side"], kind="stable")


def main(old: str, new: str, *names: str) -> int:
    found = 0
    for name in names or TABLES:
        paths = [Path(folder) / f"{name}.csv" for folder in (old, new)]
        if not all(path.exists() and path.stat().st_size > 1 for path in paths):
            print(f"{name}: not on both sides")
            continue
        a, b = (read(Path(folder), name) for folder in (old, new))
        odd = differences(a, b)
        found += len(odd)
        print(f"{name}: {len(a)} rows and {len(b)}, {len(odd)} not on both sides")
        if len(odd):
            print(odd.to_string(index=False, max_colwidth=40))
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
