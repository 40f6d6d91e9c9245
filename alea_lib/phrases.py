"""Values with their intervals as text, for sentences that are made from tables."""

import pandas as pd


def percent(row: pd.Series) -> str:
    """A share (value, lo, hi) in per cent: "4.1% (2.0% to 6.3%)"."""
    return f"{row['value']:.1%} ({row['lo']:.1%} to {row['hi']:.1%})"


def in_points(row: pd.Series) -> str:
    """A difference (value, lo, hi) in percentage points: "+4.1 points (+2.0 to +6.3)"."""
    return f"{100 * row['value']:+.1f} points ({100 * row['lo']:+.1f} to {100 * row['hi']:+.1f})"
