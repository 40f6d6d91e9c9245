"""Values with their intervals as text, for sentences and tables of a page."""

import pandas as pd


def percent(row: pd.Series) -> str:
    """A share (value, lo, hi) in per cent: "4.1% (2.0% to 6.3%)"."""
    return f"{row['value']:.1%} ({row['lo']:.1%} to {row['hi']:.1%})"


def in_points(row: pd.Series) -> str:
    """A difference (value, lo, hi) in percentage points: "+4.1 points (+2.0 to +6.3)"."""
    return f"{100 * row['value']:+.1f} points ({100 * row['lo']:+.1f} to {100 * row['hi']:+.1f})"


def with_interval(rows: pd.DataFrame) -> pd.Series:
    """Cells of a table (value, lo, hi): "0.041 [0.020, 0.063]"; from 10 on with one decimal, "502.5 [490.1, 516.2]".

    A value without an interval stands alone.
    """

    def cell(row: pd.Series) -> str:
        decimals = 1 if abs(row["value"]) >= 10 else 3
        value, lo, hi = (f"{row[key]:.{decimals}f}" for key in ("value", "lo", "hi"))
        return f"{value} [{lo}, {hi}]" if pd.notna(row["lo"]) else value

    return rows.apply(cell, axis=1)
