"""The benchmark of the edit's loops: same gradients, and the frozen part pays."""

import pytest

from alea_lib.experiments.edit_speed import Bench, bench_steps, predicted_speedup
from alea_lib.models.memory import kl_reference_bytes


def test_loops_agree_and_the_frozen_part_pays():
    table = bench_steps(Bench(layers=8, width=64, heads=4, items=24, batch=8, words=12, repeats=2))
    assert table["loop"].tolist() == ["official", "plain", "fast"] * 3 and table["edited"].unique().tolist() == [
        1,
        2,
        4,
    ]
    assert table["gradient"].max() < 1e-5
    fast = table[table["loop"] == "fast"].set_index("edited")
    assert fast.loc[1, "speedup"] > 2 and (fast["capture"] > 0).all()
    assert (table["amortised"] >= table["seconds"] - 1e-3).all()
    assert (table["speedup_lo"] <= table["speedup"]).all() and (table["speedup"] <= table["speedup_hi"]).all()
    assert (table.loc[table["loop"] == "official", ["speedup_lo", "speedup_hi"]] == 1).all(axis=None)
    assert fast.loc[4, "predicted"] == predicted_speedup(8, 4) and table["predicted"].notna().sum() == 3


def test_prediction():
    """Published for layers of one kind: 13.3, 2.5, 1.5 times for 1, 4 and 8 of 16 against a loop that stops early."""
    for edited, want in ((1, 13.3), (4, 2.5), (8, 1.5)):
        assert predicted_speedup(16, edited, official=False) == pytest.approx(want, abs=0.05)
    assert predicted_speedup(32, 2) > predicted_speedup(32, 2, official=False)


def test_reference_at_the_real_size():
    need = kl_reference_bytes()
    assert need["states"] == pytest.approx(2.46e9, rel=0.01) and need["logits"] == pytest.approx(19.2e9, rel=0.01)
    assert need["states"] * 7 <= need["logits"]
