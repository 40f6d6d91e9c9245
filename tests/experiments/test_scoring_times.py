"""Timing the scorer: what is made has the wanted size, and times are of real work."""

import json

import pytest

from alea_lib.core.files import DataError
from alea_lib.metrics.chair import chair
from alea_lib.metrics.parse import FAMILIES, count_words
from alea_lib.metrics.timing import TimingSizes, families, synthesise, synthetic_captions, timings
from alea_lib.metrics.truth import read_truth

SMALL = TimingSizes(images=60, instances=400, references=300, captions=20, words=34, resamples=50)


def test_what_is_made_has_the_wanted_size_and_comes_again_from_the_seed(tmp_path):
    instances, captions = synthesise(tmp_path / "a", SMALL)
    data, told = json.loads(instances.read_text()), json.loads(captions.read_text())
    assert (len(data["images"]), len(data["annotations"]), len(told["annotations"])) == (60, 400, 300)
    again = synthesise(tmp_path / "b", SMALL)
    assert [p.read_bytes() for p in again] == [instances.read_bytes(), captions.read_bytes()]
    assert synthesise(tmp_path / "c", SMALL, seed=1)[1].read_bytes() != captions.read_bytes()


def test_made_captions_are_scored_like_any_other(tmp_path):
    files, captions = synthesise(tmp_path, SMALL), synthetic_captions(SMALL)
    assert len(captions) == 20 and captions["image_id"].is_unique
    words = captions["caption"].map(count_words)
    assert words.between(34, 60).all()  # some of the lexicon's names are two words
    scored = chair(captions, read_truth(*files))
    assert scored.per_caption["mentioned"].map(len).mean() > 4 and scored.per_caption["hallucinated"].map(len).sum() > 0
    assert len(set(" ".join(captions["caption"]).split())) > 100  # invented words, too


def test_every_step_is_timed():
    table = timings(SMALL)
    assert table.columns.tolist() == ["what", "n", "seconds", "limit"]
    scored = [f"score, {f}" for f in families()]
    assert table["what"].tolist() == ["read", "read again", *scored, "bootstrap, 50 resamples"]
    assert table["n"].tolist() == [60, 60, *[20] * len(scored), 20]
    assert (table["seconds"] >= 0).all() and (table["limit"] > 0).all()
    assert table["seconds"][0] > table["seconds"][1]  # from the cache it is quicker
    assert set(families()) >= set(FAMILIES) - {"official"}


def test_sizes_that_cannot_be():
    with pytest.raises(DataError, match="each image needs a reference"):
        TimingSizes(images=10, references=9)
    with pytest.raises(DataError):
        TimingSizes(images=10, captions=11)
