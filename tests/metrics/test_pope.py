"""POPE: parsers, matching by id, worked scores, and generated question sets."""

import json

import pandas as pd
import pytest

from alea_lib.core.files import DataError, write_jsonl
from alea_lib.core.stats import summarise
from alea_lib.datasets.describe import existence_question
from alea_lib.metrics.__main__ import main
from alea_lib.metrics.answers import PARSERS, image_numbers
from alea_lib.metrics.pope import SETTINGS, pope, read_pope
from alea_lib.metrics.questions import make_pope
from alea_lib.metrics.truth import Truth


@pytest.mark.parametrize(
    ("answer", "official", "strict", "substring", "mme", "exact"),
    [
        ("Yes", "yes", "yes", "yes", "yes", "yes"),
        ("no", "no", "no", "no", "no", None),
        ("No, there is no dog.", "no", "no", "no", "no", None),
        ("NO", "yes", "no", "no", "no", None),  # the official code knows "No" and "no" alone
        ("Yes. But not a dog.", "yes", "yes", "yes", "yes", None),
        ("There is not a dog.", "no", None, "no", None, None),  # "not" holds "no"
        ("A dog, I think", "yes", None, None, None, None),
        ("I know it", "yes", None, "no", None, None),  # "know" holds "no"; MME's tool reads "i kn"
        ("Know it", "yes", None, "no", "no", None),
        ("  \u201cYes,\u201d it is", "yes", "yes", "yes", None, None),
        ("", "yes", None, None, None, None),
        ("I say no. Then yes.", "no", None, "yes", None, None),
    ],
)
def test_parsers(answer, official, strict, substring, mme, exact):
    assert {name: parser(answer)[0] for name, parser in PARSERS.items()} == {
        "official": official,
        "strict": strict,
        "substring": substring,
        "mme": mme,
        "exact": exact,
    }


def test_official_counts_what_holds_neither_word():
    said = {text: PARSERS["official"](text)[1] for text in ("Yes, a dog", "no", "not there", "a dog", "")}
    assert said == {"Yes, a dog": True, "no": True, "not there": True, "a dog": False, "": False}


QUESTIONS = pd.DataFrame(
    {
        "question_id": [1, 2, 3, 4, 5, 6],
        "image": ["a.png"] * 4 + ["b.png"] * 2,
        "text": "Is there a dog in the image?",
        "label": ["yes", "yes", "no", "no", "yes", "no"],
        "image_id": [10] * 4 + [11] * 2,
    }
)
ANSWERS = pd.DataFrame({"question_id": [1, 2, 3, 4, 5, 6], "answer": ["yes", "no", "yes", "no", "yes", "maybe"]})


def values(result):
    return summarise(result.items, 10).set_index("metric")["value"].to_dict()


def test_worked_example():
    # official: TP 1,5; FN 2; FP 3,6 (maybe = yes); TN 4
    assert values(pope(ANSWERS, QUESTIONS)) == pytest.approx(
        {
            "pope_accuracy": 3 / 6,
            "pope_precision": 2 / 4,
            "pope_recall": 2 / 3,
            "pope_f1": 4 / 7,
            "pope_yes": 4 / 6,
            "unparsed": 1 / 6,
        }
    )
    # strict: "maybe" is wrong, but no yes
    assert values(pope(ANSWERS, QUESTIONS, "strict")) == pytest.approx(
        {
            "pope_accuracy": 3 / 6,
            "pope_precision": 2 / 3,
            "pope_recall": 2 / 3,
            "pope_f1": 4 / 6,
            "pope_yes": 3 / 6,
            "unparsed": 1 / 6,
        }
    )


def test_items_are_clustered_by_image():
    items = pope(ANSWERS, QUESTIONS).items
    accuracy = items[items["metric"] == "pope_accuracy"].set_index("image_id")
    assert accuracy["num"].to_dict() == {10: 2, 11: 1} and accuracy["den"].to_dict() == {10: 4, 11: 2}
    assert summarise(items, 10)["n"].tolist() == [2] * 6
    assert set(items["scorer"]) == {"official"}


def test_always_yes_is_right_half_the_time():
    always = ANSWERS.assign(answer="Yes")
    got = values(pope(always, QUESTIONS))
    assert (got["pope_accuracy"], got["pope_recall"], got["pope_yes"]) == (0.5, 1, 1)
    never = values(pope(ANSWERS.assign(answer="no"), QUESTIONS))
    assert "pope_precision" not in never and never["pope_yes"] == 0  # no yes said: precision is not defined


def test_order_of_answers_does_not_matter():
    for seed in range(5):
        shuffled = ANSWERS.sample(frac=1, random_state=seed)
        pd.testing.assert_frame_equal(pope(shuffled, QUESTIONS).items, pope(ANSWERS, QUESTIONS).items)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (ANSWERS[:4], r"2 questions have no answer, e.g. question_id \[5, 6\]"),
        (pd.concat([ANSWERS, ANSWERS[2:3]]), r"1 keys \(question_id\) are doubled in the answers, e.g. \[3\]"),
        (ANSWERS.assign(question_id=[1, 2, 3, 4, 5, 66]), r"question_id \[6\]"),
        (
            pd.concat([ANSWERS, ANSWERS[:1].assign(question_id=77)]),
            r"belong to no question, e.g. question_id \[77\]",
        ),
        (ANSWERS.drop(columns="answer"), "lacks"),
        (ANSWERS.assign(answer=["yes"] * 5 + [None]), r"answers to \[6\]"),
    ],
)
def test_answers_that_do_not_match_are_refused_by_name(answers, message):
    with pytest.raises(DataError, match=message):
        pope(answers, QUESTIONS)


def test_settings_with_the_same_ids_are_kept_apart():
    questions = pd.concat([QUESTIONS.assign(setting="random"), QUESTIONS.assign(setting="popular")])
    answers = pd.concat([ANSWERS.assign(setting="random"), ANSWERS.assign(setting="popular", answer="no")])
    result = pope(answers, questions)
    assert set(result.by_setting) == {"random", "popular"}
    pd.testing.assert_frame_equal(result.by_setting["random"], pope(ANSWERS, QUESTIONS).items)
    assert values(result)["pope_accuracy"] == (3 + 3) / 12
    with pytest.raises(DataError, match="setting"):
        pope(ANSWERS, questions)


def test_reading_questions(tmp_path):
    path = tmp_path / "pope.json"
    lines = [
        {
            "question_id": 1,
            "image": "COCO_val2014_000000310196.jpg",
            "text": "Is there a cat?",
            "label": "yes",
        },
        {
            "question_id": 2,
            "image": "COCO_val2014_000000000042.jpg",
            "text": "Is there a dog?",
            "label": "No",
        },
    ]
    write_jsonl(lines, path)
    questions = read_pope(path)
    assert questions["image_id"].tolist() == [310196, 42] and questions["label"].tolist() == ["yes", "no"]
    assert questions.attrs["edition"] == "2"
    write_jsonl([lines[0] | {"image_id": 3}], path)
    assert read_pope(path)["image_id"].tolist() == [3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"question_id": 1, "image": "1.png", "text": "a"}\n', "lacks .'label'"),
        ('{"question_id": 1, "image": "1.png", "text": "a", "label": "perhaps"}\n', "neither yes nor no"),
        (
            '{"question_id": 1, "image": "1.png", "text": "a", "label": "no"}\n' * 2,
            "doubled in the questions",
        ),
        ('{"question_id": 1, "image": "1.png"\n', "line 1"),
    ],
)
def test_malformed_question_files(tmp_path, text, message):
    (tmp_path / "pope.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_pope(tmp_path / "pope.json")


# ---- generated questions

OBJECTS = {i: ["cup", "spoon", "bowl"] for i in range(8)} | {i: ["dog", "cat", "person"] for i in range(8, 12)}
OBJECTS |= {12: ["cup", "dog", "cat"], 13: ["bus"], 14: ["car"]}
TRUTH = Truth(
    {i: frozenset(names) for i, names in OBJECTS.items()},
    {0: frozenset(["person"])},  # the captions of image 0 name a person that no instance marks
    {i: f"{i}.png" for i in OBJECTS},
    "singularise",
)


@pytest.mark.parametrize("setting", SETTINGS)
def test_generated_questions_are_true_balanced_and_askable(setting, tmp_path):
    made = make_pope(TRUTH, setting, 13, 1, existence_question)
    assert len(made) == 13 * 6 and made["question_id"].is_unique
    assert (made.groupby("image_id")["label"].value_counts() == 3).all()
    assert not made.duplicated(["image_id", "category"]).any()
    for row in made.itertuples():
        assert row.image == f"{row.image_id}.png" and row.category in row.text
        assert (row.category in TRUTH[row.image_id]) == (row.label == "yes")
    write_jsonl(made, tmp_path / "made.json")
    again = read_pope(tmp_path / "made.json")
    assert values(pope(again.assign(answer=again["label"])[["question_id", "answer"]], again))["pope_accuracy"] == 1
    pd.testing.assert_frame_equal(made, make_pope(TRUTH, setting, 13, 1, existence_question))


def test_settings_share_images_and_positives_and_differ_in_negatives():
    made = {s: make_pope(TRUTH, s, 10, 2, existence_question) for s in SETTINGS}
    positives = [m.loc[m["label"] == "yes", ["image_id", "category"]].to_numpy().tolist() for m in made.values()]
    assert positives[0] == positives[1] == positives[2]
    negatives = {s: m[m["label"] == "no"].groupby("image_id")["category"].apply(set) for s, m in made.items()}
    image = next(i for i in negatives["popular"].index if 8 <= i < 12)
    assert negatives["popular"][image] == {"cup", "spoon", "bowl"}  # the most frequent of all that is absent
    # with dog and cat there, image 12 makes the cup tempting; nothing else ever stood beside them
    assert "cup" in negatives["adversarial"][image]


def test_adversarial_negatives_are_the_companions_of_what_is_there():
    made = make_pope(TRUTH, "adversarial", 13, 0, existence_question)
    asked = made[(made["image_id"] == 12) & (made["label"] == "no")]["category"]
    assert set(asked) == {"spoon", "bowl", "person"}  # beside cup: spoon, bowl; beside dog and cat: person


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match="only 13 images"):
        make_pope(TRUTH, "random", 14, 0, existence_question)


# ---- the published files


def published(n_images, name, per_image=6):
    """Questions in the form of POPE's own files: half yes, names as COCO or GQA have them."""
    return [
        {"question_id": i * per_image + j + 1, "image": name(i), "text": "Is there a dog in the image?", "label": label}
        for i in range(n_images)
        for j, label in enumerate(("yes", "no") * (per_image // 2))
    ]


def coco(i):
    return f"COCO_val2014_{i:012d}.jpg"


def gqa(i):
    return f"{2400000 + i}.jpg" if i % 2 else f"n{400000 + i}.jpg"


@pytest.mark.parametrize(
    ("name", "as_list", "cut", "edition"),
    [
        (coco, False, 0, "3000"),
        (coco, False, 90, "2910 (older COCO random file)"),
        (coco, True, 0, "3000"),  # A-OKVQA asks about COCO's images, in a JSON list
        (gqa, True, 0, "3000"),
    ],
)
def test_the_published_files_are_read_and_told_apart(tmp_path, name, as_list, cut, edition):
    records = published(500, name)[: 3000 - cut]
    path = tmp_path / "pope.json"
    path.write_text(json.dumps(records)) if as_list else write_jsonl(records, path)
    questions = read_pope(path)
    assert len(questions) == 3000 - cut and questions.attrs["edition"] == edition
    assert questions.groupby("image")["image_id"].nunique().eq(1).all()
    assert questions["image_id"].nunique() == questions["image"].nunique()
    answers = questions[["question_id"]].assign(answer=["yes", "yes", "no"] * (len(questions) // 3))
    result = pope(answers, questions)
    shuffled = pope(answers.sample(frac=1, random_state=3), questions.sample(frac=1, random_state=4))
    pd.testing.assert_frame_equal(summarise(result.items, 20), summarise(shuffled.items, 20))


def test_names_whose_numbers_clash_stay_two_images():
    assert image_numbers(["n5.jpg", "5.jpg", "n5.jpg"]) == {"5.jpg": 1, "n5.jpg": 2}
    assert image_numbers(["COCO_val2014_000000000042.jpg", "7"]) == {"7": 7, "COCO_val2014_000000000042.jpg": 42}
    assert image_numbers(["b.png", "a.png"]) == {"a.png": 1, "b.png": 2}


def test_command_line(tmp_path, capsys):
    write_jsonl(QUESTIONS, tmp_path / "questions.json")
    write_jsonl(ANSWERS[::-1], tmp_path / "answers.jsonl")
    call = [
        "pope",
        "--answers",
        str(tmp_path / "answers.jsonl"),
        "--questions",
        str(tmp_path / "questions.json"),
    ]
    assert main(call) == 0
    assert "pope_accuracy 0.5000" in capsys.readouterr().out
    write_jsonl(ANSWERS[:2], tmp_path / "answers.jsonl")
    assert main(call) == 2
    assert "question_id [3, 4, 5]" in capsys.readouterr().err
