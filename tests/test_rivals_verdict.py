"""Who is better, the best rival or the edit: a rule on metrics.csv."""

import pandas as pd

from alea_lib import rivals_verdict


def rows(method, gap, recall, chair):
    values = {"frontier_gap": gap, "recall_diff": recall, "chair_s_diff": chair}
    keys = {"model": "m", "method": method, "benchmark": "chair", "prompt": "plain", "setting": "max64,keep"}
    keys["condition"] = "clean"
    return [{**keys, "metric": m, "value": v, "lo": v - 0.02, "hi": v + 0.02} for m, v in values.items()]


def test_the_best_rival_is_no_control_and_is_told_apart_only_by_intervals():
    metrics = pd.DataFrame(
        rows("alea-mixed", 0.10, -0.01, -0.10)
        + rows("vcd", 0.02, 0.05, -0.05)
        + rows("nullu", 0.12, -0.10, -0.20)
        + rows("stop-early", 0.50, 0.0, 0.0)
    )
    judged = rivals_verdict(metrics)
    assert set(judged["rival"]) == {"nullu"}
    said = dict(zip(judged["metric"], judged["judged"], strict=True))
    assert said == {
        "frontier_gap": "not told apart",
        "chair_s_diff": "nullu better",
        "recall_diff": "alea-mixed better",
    }
    assert rivals_verdict(metrics[metrics["method"].isin(["alea-mixed", "stop-early"])]).empty
