"""Files that are never half written, and what is said about damaged ones."""

import errno
import hashlib
import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alea_lib.core.files import (
    DataError,
    DiskFullError,
    hash_of,
    read_json,
    read_jsonl,
    read_parquet,
    replacing,
    sha256,
    write_csv,
    write_json,
    write_jsonl,
    write_parquet,
)
from alea_lib.core.tables import read_csv
from alea_lib.metrics.amber import read_amber
from alea_lib.metrics.answers import read_table
from alea_lib.metrics.mme import read_mme, read_mme_answers
from alea_lib.pairs.table import import_pairs

ODD = "a\u2028b\u0085c\x1cd"  # splitlines would cut at each of these


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5))
def test_floats_are_written_alike_and_read_back(tmp_path, numbers):
    write_csv(pd.DataFrame({"name": "x", "number": numbers}), tmp_path / "t.csv")
    back = read_csv(tmp_path / "t.csv")
    assert back["number"].to_numpy(float) == pytest.approx(np.array(numbers), rel=1e-9, abs=1e-300)
    first = (tmp_path / "t.csv").read_bytes()
    write_csv(back.assign(number=back["number"].astype(float)), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == first


def test_noise_below_ten_digits_and_negative_zero_leave_no_trace(tmp_path):
    write_csv(pd.DataFrame({"x": [0.1 + 0.2, -0.0, 1e-9, np.nan]}), tmp_path / "a.csv")
    write_csv(pd.DataFrame({"x": [0.3, 0.0, 1e-9, np.nan]}), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert (tmp_path / "a.csv").read_text() == 'x\n0.3\n0\n1e-09\n""\n'


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "t"
    path.write_text('{"a": 1}\n\n{"a": 2\n')
    with pytest.raises(DataError, match=r"t, line 3: .*; repair or delete that line"):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: not a JSON object"):
        read_jsonl(path)
    path.write_text("")
    with pytest.raises(DataError, match="not a table"):
        read_csv(path)
    with pytest.raises(DataError, match="not a Parquet table"):
        read_parquet(path)


def test_json_lines_and_parquet_round_trip(tmp_path):
    records = [
        {"image_id": 1, "caption": "\u00e9clair \U0001f436\nsecond line"},
        {"image_id": 2, "caption": ""},
    ]
    write_jsonl(records, tmp_path / "deep" / "t.jsonl")
    assert read_jsonl(tmp_path / "deep" / "t.jsonl") == records
    write_jsonl(pd.DataFrame(records).assign(wrong=[frozenset({"b", "a"}), np.array([1])]), tmp_path / "t.jsonl")
    assert [r["wrong"] for r in read_jsonl(tmp_path / "t.jsonl")] == [["a", "b"], [1]]
    write_parquet(pd.DataFrame(records), tmp_path / "t.parquet")
    assert read_parquet(tmp_path / "t.parquet").to_dict("records") == records


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, fault):
    path = tmp_path / "t.csv"
    path.write_text("old")
    with pytest.raises(DiskFullError if isinstance(fault, OSError) else type(fault)) as caught:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise fault
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["t.csv"]
    if isinstance(fault, OSError):
        assert "free some space" in str(caught.value)


def test_a_reader_of_the_old_file_never_sees_half_of_the_new(tmp_path):
    path = tmp_path / "t.csv"
    write_csv(pd.DataFrame({"x": [1]}), path)
    with open(path) as reader:
        write_csv(pd.DataFrame({"x": [2, 3]}), path)
        assert reader.read() == "x\n1\n"
    assert path.read_text() == "x\n2\n3\n" and os.listdir(tmp_path) == ["t.csv"]


def test_lines_of_json_end_at_line_feeds_alone(tmp_path):
    records = [{"image_id": 1, "caption": ODD}, {"image_id": 2, "caption": "b"}]
    write_jsonl(records, tmp_path / "t.jsonl")
    assert read_jsonl(tmp_path / "t.jsonl") == records
    assert read_table(tmp_path / "t.jsonl", "image_id", "caption")["caption"].tolist() == [ODD, "b"]
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')  # as Windows writes it
    assert read_jsonl(tmp_path / "t.jsonl") == [{"a": 1}, {"a": 2}]
    (tmp_path / "t.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="not a text in UTF-8"):
        read_jsonl(tmp_path / "t.jsonl")


def test_lines_of_imported_pairs_end_at_line_feeds_alone(tmp_path):
    split = SimpleNamespace(name="activate", ids=[1], files=[tmp_path / "1.png"])
    write_jsonl([{"image_id": 1, "positive": "A cup.", "negative": f"A cup and a bowl. {ODD}"}], tmp_path / "p.jsonl")
    assert import_pairs(tmp_path / "p.jsonl", split)["negative"].tolist() == [f"A cup and a bowl. {ODD}"]


def test_lines_of_answers_and_questions_end_at_line_feeds_alone(tmp_path):
    (tmp_path / "mme" / "count").mkdir(parents=True)
    (tmp_path / "mme" / "count" / "1.txt").write_text(f"Is {ODD}?\tYes\nIs it?\tNo\n", encoding="utf-8")
    questions = read_mme(tmp_path / "mme")
    assert questions["text"].tolist() == [f"Is {ODD}?", "Is it?"]
    lines = f"1.jpg\tIs {ODD}?\tYes\tYes, {ODD}\r\n1.jpg\tIs it?\tNo\tNo\r\n"
    (tmp_path / "count.txt").write_text(lines, encoding="utf-8", newline="")
    assert read_mme_answers(tmp_path, questions)["answer"].tolist() == [f"Yes, {ODD}", "No"]
    write_json(tmp_path / "annotations.json", [{"id": 1, "type": "generative", "truth": [], "hallu": []}])
    write_json(tmp_path / "query_all.json", [{"id": 1, "image": "1.jpg", "query": "?"}])
    write_json(tmp_path / "relation.json", {})
    (tmp_path / "safe_words.txt").write_text(f"Line\r\n\r\n{ODD}", encoding="utf-8", newline="")
    assert read_amber(tmp_path).safe_words == {"line", ODD}


def test_json_is_written_alike_and_checked(tmp_path):
    write_json(tmp_path / "deep" / "t.json", {"b": [1], "a": "\u00e9"})
    assert (tmp_path / "deep" / "t.json").read_text() == '{\n "a": "\\u00e9",\n "b": [\n  1\n ]\n}\n'
    assert read_json(tmp_path / "deep" / "t.json") == {"b": [1], "a": "\u00e9"}
    with pytest.raises(DataError, match="holds a dict where a list is needed"):
        read_json(tmp_path / "deep" / "t.json", list)
    (tmp_path / "t.json").write_text('{"a": ')
    with pytest.raises(DataError, match="not valid JSON"):
        read_json(tmp_path / "t.json")


def test_hashes_are_of_contents(tmp_path):
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "b").write_bytes(b"1")
    (tmp_path / "d" / "e" / "a").write_bytes(b"2")
    one, two = (hashlib.sha256(x).hexdigest() for x in (b"1", b"2"))
    assert sha256(tmp_path / "d" / "b") == one
    assert sha256(tmp_path / "d") == hashlib.sha256(f"b {one}\ne/a {two}\n".encode()).hexdigest()
    assert hash_of({"b": 1, "a": "\u00e9"}) == hash_of({"a": "\u00e9", "b": 1})


def test_tensors_are_written_like_every_other_file(tmp_path, monkeypatch):
    """Files of one stem do not share a temporary one, and a full disk is told in the same way."""
    torch = pytest.importorskip("torch")
    from alea_lib.models import checkpoint

    (tmp_path / "a.partial").write_text("another's")
    checkpoint.write_safetensors({"w": torch.ones(2)}, tmp_path / "a.safetensors", {})
    assert (tmp_path / "a.partial").read_text() == "another's"
    whole = (tmp_path / "a.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DiskFullError, match="no room on the disk for 0.0 MiB"):
        checkpoint.write_safetensors({"w": torch.ones(2)}, tmp_path / "a.safetensors", {})
    assert (tmp_path / "a.safetensors").read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["a.partial", "a.safetensors"]
