"""CHAIR on worlds small enough to check by eye."""

import json
import time

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alea_lib.core.files import DataError, write_jsonl
from alea_lib.metrics.__main__ import main
from alea_lib.metrics.chair import ChairResult, chair, companion_share, distinct
from alea_lib.metrics.lexicon import load_lexicon
from alea_lib.metrics.parse import FAMILIES
from alea_lib.metrics.truth import Truth, read_truth

IDS = load_lexicon().category_ids
quick = settings(max_examples=40, deadline=None)


def truth_of(objects, family="singularise"):
    instances = {i: frozenset(names) for i, names in objects.items()}
    return Truth(instances, {}, {i: f"{i}.png" for i in instances}, family)


def table(captions):
    return pd.DataFrame({"image_id": list(captions), "caption": list(captions.values())})


def value(result: ChairResult, metric):
    rows = result.items[result.items["metric"] == metric]
    return rows["num"].sum() / rows["den"].sum()


TRUTH = truth_of({1: ["dog", "cup"], 2: ["cat"], 3: ["bus", "person"], 4: []})
CAPTIONS = table(
    {
        1: "A dog, two dogs and a bowl.",  # mentions dog dog bowl: bowl is wrong, cup is missed
        2: "A cat.",
        3: "",  # says nothing: bus and person are missed
        4: "An empty field with a cow, cows and a horse.",  # 3 wrong mentions of 2 wrong objects
    }
)


def test_worked_example():
    result = chair(CAPTIONS, TRUTH)
    assert value(result, "chair_s") == 2 / 4
    assert value(result, "chair_i") == (1 + 0 + 0 + 3) / (3 + 1 + 0 + 3)
    assert value(result, "recall") == (1 + 1 + 0 + 0) / (2 + 1 + 2 + 0)
    assert value(result, "f1_objects") == 2 * 2 / (2 * 2 + 3 + 3)  # TP dog cat; FP bowl cow horse; FN cup bus person
    assert value(result, "words") == (7 + 2 + 0 + 10) / 4
    assert value(result, "objects_per_caption") == (2 + 1 + 0 + 2) / 4


def test_tables():
    result = chair(CAPTIONS, TRUTH)
    first = result.per_caption.set_index("image_id").loc[1]
    assert (first["mentioned"], first["hallucinated"], first["missed"]) == (
        ("dog", "bowl"),
        ("bowl",),
        ("cup",),
    )
    for rows in (result.items, result.per_caption):
        assert set(rows["scorer"]) == {"singularise"}


def test_the_family_decides():
    captions = table({1: "A man seated at a coffee table."})
    objects = {1: ["person"]}
    wrong = {
        f: chair(captions, truth_of(objects, f), f).per_caption["hallucinated"][0]
        for f in ("singularise", "lemma", "strict")
    }
    assert wrong == {"singularise": ("dining table",), "lemma": ("chair", "dining table"), "strict": ()}


def test_distinct():
    assert distinct(table({1: "a", 2: "a", 3: "b", 4: "c"})) == 3 / 4


def test_companions():
    truth = truth_of({1: ["spoon"], 2: ["cup"], 3: ["cat"]})
    scored = chair(table({1: "a spoon, a bowl, a dog", 2: "a bowl", 3: "a cat"}), truth)
    share = companion_share(scored.per_caption, truth, {"spoon": "bowl", "cat": "dog"})
    # hallucinated: bowl and dog in 1 (a spoon calls for the bowl alone), bowl in 2 (uncalled for)
    assert (share["num"].sum(), share["den"].sum()) == (1, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_traps_in_every_family(family):
    if family == "official":
        pytest.importorskip("textblob")
    objects = {1: ["toilet"], 2: ["hot dog"], 3: [], 4: [], 5: ["cat"], 6: ["wine glass", "person"]}
    captions = {
        1: "A toilet with its seat up.",  # no chair
        2: "HOT DOGS, two hot dogs!",  # no dog
        3: "",
        4: "Nothing but xyzzy \u2014 \u732b \U0001f431 \u00f1and\u00fa.",  # unknown words, other scripts
        5: "\u201cCats\u201d; (a CAT...) cat's",
        6: "Wine glasses and women",
    }
    result = chair(table(captions), truth_of(objects, family), family)
    assert result.per_caption["hallucinated"].tolist() == [()] * 6
    named = [("toilet",), ("hot dog",), (), (), ("cat",), ("wine glass", "person")]
    assert result.per_caption["mentioned"].tolist() == named
    assert value(result, "chair_s") == 0 and value(result, "recall") == 1


def test_nothing_said_at_all():
    result = chair(table({1: "", 2: " \n"}), TRUTH)
    assert value(result, "chair_s") == 0 and value(result, "recall") == 0 and value(result, "words") == 0
    assert result.items.loc[result.items["metric"] == "chair_i", "den"].sum() == 0  # CHAIRi is not defined


# ---- reading the truth


def coco_files(folder, instances, captions, categories=None):
    names = categories or {name: IDS[name] for objects in instances.values() for name in objects}
    (folder / "instances.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"{i}.png"} for i in instances],
                "annotations": [
                    {"image_id": i, "category_id": names[o]} for i, objects in instances.items() for o in objects
                ],
                "categories": [{"id": number, "name": name} for name, number in names.items()],
            }
        )
    )
    (folder / "captions.json").write_text(
        json.dumps({"annotations": [{"image_id": i, "caption": c} for i, texts in captions.items() for c in texts]})
    )
    return folder / "instances.json", folder / "captions.json"


def test_truth_is_instances_and_references(tmp_path):
    files = coco_files(tmp_path, {7: ["dog", "dog"], 8: []}, {7: ["A dog.", "Two puppies in a car"], 8: ["sky"]})
    truth = read_truth(*files, cache=tmp_path / "kept")
    assert truth.instances == {7: {"dog"}, 8: frozenset()}
    assert truth.captions == {7: {"dog", "car"}, 8: frozenset()}
    assert truth[7] == {"dog", "car"} and truth.file_names[7] == "7.png" and truth.categories == ("car", "dog")
    assert read_truth(*files, cache=tmp_path / "kept") == truth
    assert read_truth(files[0])[7] == {"dog"}
    assert truth.only([8]).objects == {8: frozenset()}


def test_a_kept_truth_is_made_anew_when_the_files_change_or_it_is_damaged(tmp_path):
    files = coco_files(tmp_path, {7: ["dog"]}, {7: ["A dog."]})
    read_truth(*files, cache=tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_text("[[7")
    assert read_truth(*files, cache=tmp_path / "kept")[7] == {"dog"}
    coco_files(tmp_path, {7: ["dog"]}, {7: ["A dog and a cat."]})
    assert read_truth(*files, cache=tmp_path / "kept")[7] == {"dog", "cat"}


def test_damaged_or_wrong_files_are_refused(tmp_path):
    instances, captions = coco_files(tmp_path, {7: ["dog"], 8: ["cat"]}, {7: ["A dog."]})
    with pytest.raises(DataError, match=r"no reference caption, e.g. \[8\]"):
        read_truth(instances, captions)
    with pytest.raises(DataError, match="no list .*categories"):
        read_truth(captions, captions)
    whole = instances.read_text()
    instances.write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not valid JSON"):
        read_truth(instances, captions)
    instances.write_text(whole.replace(f'"category_id": {IDS["cat"]}', '"category_id": 12'))
    with pytest.raises(DataError, match="image 8 has the unknown category id 12"):
        read_truth(instances, captions)
    instances.write_text(whole.replace('"name": "cat"', '"name": "lion"'))
    with pytest.raises(DataError, match="'lion' is none of COCO's"):
        read_truth(instances, captions)
    instances.write_text(whole.replace('"image_id": 8', '"image_id": 9'))
    with pytest.raises(DataError, match="belongs to image 9"):
        read_truth(instances, captions)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (pd.DataFrame({"image_id": [1], "text": ["a"]}), "lacks .'caption'"),
        (pd.DataFrame({"image_id": [], "caption": []}), "is empty"),
        (pd.DataFrame({"image_id": [1, 1], "caption": ["a", "b"]}), "two captions"),
        (pd.DataFrame({"image_id": [1, 99], "caption": ["a", "b"]}), r"no ground truth, e.g. \[99\]"),
        (pd.DataFrame({"image_id": [1, 2], "caption": ["a", None]}), r"not text, e.g. \[2\]"),
    ],
)
def test_bad_captions_are_refused(captions, message):
    with pytest.raises(DataError, match=message):
        chair(captions, TRUTH)


def test_references_and_captions_must_be_parsed_alike():
    truth = Truth({1: frozenset()}, {1: frozenset(["dog"])}, {}, "lemma")
    with pytest.raises(DataError, match="same family"):
        chair(table({1: "a dog"}), truth)


# ---- properties

words = st.sampled_from(["dog", "dogs", "a cat", "bowl.", "hot dog", "people", "bus", "toilet", "seat", "xyzzy", "The"])
captions_of = st.lists(st.lists(words, max_size=8).map(" ".join), min_size=1, max_size=6)
objects = st.frozensets(st.sampled_from(["dog", "cat", "bowl", "hot dog", "person", "bus"]), max_size=4)


@st.composite
def scored_worlds(draw):
    texts = draw(captions_of)
    return table(dict(enumerate(texts))), truth_of({i: draw(objects) for i in range(len(texts))})


@quick
@given(scored_worlds(), st.randoms(use_true_random=False))
def test_order_of_captions_changes_nothing(world, random):
    captions, truth = world
    order = list(captions.index)
    random.shuffle(order)
    key = ["image_id", "metric"]
    a, b = (chair(c, truth).items.sort_values(key, ignore_index=True) for c in (captions, captions.loc[order]))
    pd.testing.assert_frame_equal(a, b)


@quick
@given(scored_worlds())
def test_bounds_and_bookkeeping(world):
    captions, truth = world
    result = chair(captions, truth)
    shares = result.items[~result.items["metric"].isin(["words", "objects_per_caption"])]
    assert (shares["num"] <= shares["den"]).all() and (result.items["num"] >= 0).all()
    for row in result.per_caption.itertuples():
        there = truth[row.image_id]
        assert set(row.hallucinated) == set(row.mentioned) - there
        assert set(row.missed) == there - set(row.mentioned)


@quick
@given(scored_worlds())
def test_unknown_words_change_nothing_but_the_length(world):
    captions, truth = world
    longer = captions.assign(caption=[f"quux {text} blorp" for text in captions["caption"]])
    a, b = (chair(c, truth).items for c in (captions, longer))
    is_words = a["metric"] == "words"
    pd.testing.assert_frame_equal(a[~is_words], b[~is_words])
    assert (b.loc[is_words, "num"] == a.loc[is_words, "num"] + 2).all()


@quick
@given(scored_worlds())
def test_more_truth_never_raises_chair(world):
    captions, truth = world
    richer = truth_of({i: there | {"dog"} for i, there in truth.objects.items()})
    before, after = (chair(captions, t).per_caption["hallucinated"] for t in (truth, richer))
    assert all(set(b) <= set(a) for a, b in zip(before, after, strict=True))


def test_five_thousand_long_captions_are_quick():
    text = "A man rides two horses by a traffic light while quiet people watch. " * 7 + "There are six words left over."
    captions = table({i: f"{text} {i}" for i in range(5000)})
    truth = truth_of({i: ["person"] for i in range(5000)})
    start = time.process_time()
    result = chair(captions, truth)
    assert time.process_time() - start < 5  # about 1 s; the margin is for slow machines
    assert value(result, "words") == 13 * 7 + 6 + 1 and value(result, "chair_i") == 2 / 4


# ---- the command line


def test_command_line(tmp_path, capsys):
    coco_files(tmp_path, {1: ["dog"], 2: ["cat"]}, {1: ["A dog."], 2: ["A cat."]})
    (tmp_path / "model.json").write_text(json.dumps(table({1: "A dog. A bowl.", 2: "A cat."}).to_dict("records")))
    write_jsonl(table({1: "A dog.", 2: "A cat."}), tmp_path / "cut.jsonl")
    where = ["--coco", str(tmp_path), "--json", str(tmp_path / "out.json")]
    assert main(["chair", "--captions", str(tmp_path / "model.json"), *where]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["scorer"] == "singularise" and out["scores"][0]["value"] == 0.5 and len(out["frontier"]) == 2
    assert "chair_s 0.5000" in capsys.readouterr().out
    both = ["--captions", str(tmp_path / "cut.jsonl"), "--base", str(tmp_path / "model.json")]
    assert main(["chair", *both, *where]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["difference to the base"][0]["value"] == -0.5 and out["frontier gap"]["value"] == 0
    write_jsonl(table({1: "A dog.", 3: "A cat."}), tmp_path / "cut.jsonl")
    assert main(["chair", "--captions", str(tmp_path / "cut.jsonl"), *where]) == 2
    assert "no ground truth, e.g. [3]" in capsys.readouterr().err
    (tmp_path / "instances_train.json").write_text("{}")
    assert main(["chair", "--captions", str(tmp_path / "cut.jsonl"), *where]) == 2
    assert "--split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 1, "caption": "b"}\n', r"1 images have two captions, e.g. [1]"),
        ('{"image_id": 9, "caption": "a"}\n', "no ground truth, e.g. [9]"),
        ('{"image_id": "1", "caption": "a"}\n', "ids are integers"),
        ('{"image_id": [1], "caption": "a"}\n', "image_id must be a number or a text"),
        ("", "is empty"),
        ("[]", "is empty"),
        ('{"annotations": []}', "is empty"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2, "cap', "line 2"),
        ('[{"image_id": 1, "caption": "a"', "is the file cut short?"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2}\n', "record 2: lacks ['caption']"),
        ("[1, 2]", "record 1: not a JSON object but '1'"),
        ("7", "record 1: not a JSON object"),
        ('{"image_id": 1, "caption": 5}', "not text, e.g. [1]"),
    ],
)
def test_unusable_captions_are_one_line_of_error(tmp_path, capsys, text, message):
    coco_files(tmp_path, {1: ["dog"], 2: ["cat"]}, {1: ["A dog."], 2: ["A cat."]})
    (tmp_path / "model.jsonl").write_text(text)
    assert main(["chair", "--captions", str(tmp_path / "model.jsonl"), "--coco", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_forms_of_files_are_read_alike(tmp_path, capsys):
    coco_files(tmp_path, {1: ["dog"], 2: ["cat"]}, {1: ["A dog."], 2: ["A cat."]})
    records = table({1: "A dog. A bowl.", 2: "A cat."}).to_dict("records")
    printed = []
    for text in (
        "\n".join(json.dumps(r) for r in records),
        json.dumps(records, indent=1),
        json.dumps({"info": {}, "annotations": records}),
        "\ufeff" + json.dumps(records),
    ):
        (tmp_path / "model.json").write_text(text, encoding="utf-8")
        assert main(["chair", "--captions", str(tmp_path / "model.json"), "--coco", str(tmp_path)]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1 and "chair_s 0.5000" in printed[0]
    (tmp_path / "model.json").write_bytes(b"\xff\xfe{}")
    assert main(["chair", "--captions", str(tmp_path / "model.json"), "--coco", str(tmp_path)]) == 2
    assert "UTF-8" in capsys.readouterr().err
    assert main(["chair", "--captions", str(tmp_path / "none.json"), "--coco", str(tmp_path)]) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "captions.json").unlink()
    assert main(["chair", "--captions", str(tmp_path / "model.json"), "--coco", str(tmp_path)]) == 2
    assert "one file captions*.json is needed, found none" in capsys.readouterr().err
