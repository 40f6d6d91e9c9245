"""The schema of a table of pairs."""

import pandas as pd
import pytest

from alea_lib.core.files import DataError, read_parquet, write_parquet
from alea_lib.pairs.table import check_pairs

PAIR = {
    "image_id": 1,
    "image": "1.png",
    "positive": "A cup.",
    "negative": "A cup and a bowl.",
    "wrong": ["bowl"],
    "label_source": "truth",
    "prompt_negative": "p",
    "prompt_positive": "q",
}


def test_good_pairs_pass_and_survive_parquet(tmp_path):
    pairs = pd.DataFrame([PAIR, PAIR | {"image_id": 2, "label_source": "detector"}])
    assert check_pairs(pairs) is pairs
    write_parquet(pairs, tmp_path / "pairs.parquet")
    assert list(check_pairs(read_parquet(tmp_path / "pairs.parquet"))["wrong"][1]) == ["bowl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_source": "guess"}, "label_source must be"),
        ({"wrong": "bowl"}, "must be a list"),
        ({"wrong": ["lion"]}, "no category"),
        ({"positive": "  "}, "empty positive"),
        ({"negative": None}, "empty negative"),
        ({"negative": "A cup."}, "same text"),
        ({"image_id": "1"}, "integers"),
    ],
)
def test_broken_pairs_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        check_pairs(pd.DataFrame([PAIR | change]))


def test_empty_doubled_or_incomplete_pairs_are_refused():
    with pytest.raises(DataError, match="empty"):
        check_pairs(pd.DataFrame(columns=list(PAIR)))
    with pytest.raises(DataError, match="same pair twice"):
        check_pairs(pd.DataFrame([PAIR, PAIR]))
    with pytest.raises(DataError, match="lack the columns .'wrong'"):
        check_pairs(pd.DataFrame([PAIR]).drop(columns="wrong"))
