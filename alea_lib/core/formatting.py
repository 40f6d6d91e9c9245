"""Values with their intervals as text, for sentences and tables of a page."""

import pandas as pd


def percent(row: pd.Series) -> str:
    """A share (value, lo, hi) in per cent: "4.1% (2.0% to 6.3%)"."""
    return f"{row['value']:.1%} ({row['lo']:.1%} to {row['hi']:.1%})"


def in_points(row: pd.Series) -> str:
    """A difference (value, lo, hi) in percentage points: "+4.1 points (+2.0 to +6.3)"."""
    return f"{100 * row['value']:+.1f} points ({100 * row['lo']:+.1f} to {100 * row['hi']:+.1f})"


def with_interval(rows: pd.DataFrame, form: str = "") -> pd.Series:
    """Cells of a table (value, lo, hi): "0.041 [0.020, 0.063]"; a value without an interval stands alone.

    ``form``: how numbers are written (".2f", ".0%"); default: three decimals, from 10 on one: "502.5 [490.1, 516.2]".
    """

    def cell(row: pd.Series) -> str:
        own = form or (".1f" if abs(row["value"]) >= 10 else ".3f")
        value, lo, hi = (format(row[key], own) for key in ("value", "lo", "hi"))
        return f"{value} [{lo}, {hi}]" if pd.notna(row["lo"]) else value

    return rows.apply(cell, axis=1)


def markdown_table(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).values.tolist()]
    return "".join("| " + " | ".join(str(value).replace("|", "\\|") for value in row) + " |\n" for row in rows)
