"""The table of families says what was seen, also when a check fails."""

import pytest

from alea_lib.experiments.families import CHECKS, family_table, verify_family
from alea_lib.models.families import FAMILIES
from alea_lib.zoo import tiny


def test_each_row_is_in_the_table_and_each_has_a_tiny_model_or_a_small_one():
    assert family_table()["family"].tolist() == list(FAMILIES)
    assert set(FAMILIES) - set(tiny.BUILDERS) == {name for name, row in FAMILIES.items() if row.small}


@pytest.mark.parametrize("name", ["llava", "instructblip"])
def test_a_family_holds(name):
    found = verify_family(name)
    assert found["check"].tolist() == list(CHECKS) and found["passed"].all(), found.to_string()


def test_a_failing_check_is_shown_and_the_rest_goes_on(monkeypatch):
    def fails(*args):
        raise RuntimeError("no prefix")

    monkeypatch.setattr("alea_lib.experiments.families.fit_prefix", fails)
    found = verify_family("llava").set_index("check")
    assert not found.loc["prefix", "passed"] and found.loc["prefix", "found"] == "RuntimeError: no prefix"
    assert found.loc["edit", "passed"] and found.loc["reload", "passed"]


def test_a_family_without_a_builder_is_told():
    with pytest.raises(KeyError, match="alea_lib/zoo/tiny.py"):
        verify_family("llava-small")
