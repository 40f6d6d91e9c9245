"""MME's hallucination subset: files, matching, worked scores, and generated questions."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alea_lib.core.files import DataError, write_jsonl
from alea_lib.core.stats import bootstrap_weights, paired_difference, summarise
from alea_lib.datasets.describe import COLUMN, noun, noun_phrase, plural
from alea_lib.datasets.scenes import GRID, sample
from alea_lib.metrics.__main__ import main
from alea_lib.metrics.lexicon import load_lexicon
from alea_lib.metrics.mme import TASKS, mme, read_mme, read_mme_answers

quick = settings(max_examples=30, deadline=None)
IDS = load_lexicon().category_ids

# two images a task; as MME has them: the files of position and color in a folder apart
IMAGES = {"existence": (11, 12), "count": (12, 13), "position": (14, 15), "color": (16, 17)}


def text_of(task, image, index):
    return f"{task} {image} {index}? Please answer yes or no."


@pytest.fixture
def folder(tmp_path):
    for task, images in IMAGES.items():
        apart = task in ("position", "color")
        texts = tmp_path / "mme" / task / ("questions_answers_YN" if apart else "")
        texts.mkdir(parents=True)
        for image in images:
            name = f"{image:012d}"
            lines = [f"{text_of(task, image, 1)}\tYes", f"{text_of(task, image, 2)}\tNo", ""]
            (texts / f"{name}.txt").write_text("\n".join(lines))
    return tmp_path / "mme"


def answers_of(questions, wrong=()):
    """Right answers but for the question ids in ``wrong``."""
    turned = {"yes": "No", "no": "Yes"}
    said = [
        turned[label] if q in wrong else label.capitalize()
        for q, label in zip(questions["question_id"], questions["label"], strict=True)
    ]
    return questions[["question_id"]].assign(answer=said)


def values(result):
    return summarise(result, 20).set_index("metric")["value"].to_dict()


def test_both_layouts_are_read(folder):
    questions = read_mme(folder)
    assert len(questions) == 16 and questions["question_id"].is_unique
    first = questions.iloc[0]
    assert first.to_dict() == {
        "question_id": "existence/000000000011/1",
        "setting": "existence",
        "image": "000000000011",
        "text": text_of("existence", 11, 1),
        "label": "yes",
        "image_id": 11,
    }
    assert questions.groupby("setting")["image_id"].apply(lambda x: tuple(sorted(set(x)))).to_dict() == IMAGES


def test_worked_example(folder):
    questions = read_mme(folder)
    # existence: image 11 half right, 12 right. count: both images half right. position: all wrong. color: all right
    wrong = {"existence/000000000011/2", "count/000000000012/1", "count/000000000013/2"}
    wrong |= {q for q in questions["question_id"] if q.startswith("position")}
    got = values(mme(answers_of(questions, wrong), questions))
    assert (got["mme_existence_accuracy"], got["mme_existence_accuracy_plus"]) == (3 / 4, 1 / 2)
    assert (got["mme_count_accuracy"], got["mme_count_accuracy_plus"]) == (2 / 4, 0)
    points = {"existence": 75 + 50, "count": 50 + 0, "position": 0, "color": 200}
    assert {task: got[f"mme_{task}"] for task in TASKS} == points
    assert got["mme_total"] == sum(points.values()) == 375
    assert got["unparsed"] == 0


def test_an_answer_that_says_neither_is_wrong_and_counted(folder):
    questions = read_mme(folder)
    answers = answers_of(questions)
    answers.loc[0, "answer"] = "A dog."
    got = values(mme(answers, questions))
    assert got["unparsed"] == 1 / 16 and got["mme_existence_accuracy"] == 3 / 4 and got["mme_total"] == 800 - 25 - 50


def test_tasks_of_different_sizes_weigh_the_same_in_the_total():
    sizes = {"existence": 9, "count": 1, "position": 1, "color": 1}
    rows = [(task, i, j) for task, n in sizes.items() for i in range(n) for j in (1, 2)]
    questions = pd.DataFrame(
        {
            "question_id": [f"{t}/{i}/{j}" for t, i, j in rows],
            "setting": [t for t, _, _ in rows],
            "image": [f"{t}{i}" for t, i, _ in rows],
            "text": [f"{t}{i}{j}" for t, i, j in rows],
            "label": ["yes" if j == 1 else "no" for _, _, j in rows],
            "image_id": [TASKS.index(t) * 100 + i for t, i, _ in rows],
        }
    )
    wrong = {q for q in questions["question_id"] if q.startswith("existence")}
    assert values(mme(answers_of(questions, wrong), questions))["mme_total"] == 600


def test_the_total_is_the_sum_of_the_tasks_in_every_resample(folder):
    questions = read_mme(folder)
    items = mme(answers_of(questions, {"existence/000000000011/2", "count/000000000012/1"}), questions)
    total = summarise(items, 64, seed=5).set_index("metric").loc["mme_total"]
    tasks = {t: items[items["metric"] == f"mme_{t}"].set_index("image_id")["num"] for t in TASKS}
    ids = sorted(items["image_id"].unique())
    found = []
    for weights in np.concatenate(list(bootstrap_weights(len(ids), 64, 5))):
        drawn = pd.Series(weights, ids)
        with np.errstate(invalid="ignore"):
            found.append(sum((drawn[t.index] * t).sum() / drawn[t.index].sum() for t in tasks.values()))
    lo, hi = np.quantile([x for x in found if np.isfinite(x)], [0.025, 0.975])
    assert (total["lo"], total["hi"]) == pytest.approx((lo, max(hi, total["value"])))
    assert total["n"] == 7  # image 12 serves two tasks


def test_answers_are_matched_by_key_and_never_by_order(folder, tmp_path):
    questions = read_mme(folder)
    plain = answers_of(questions, {"existence/000000000011/2", "color/000000000016/1"})
    want = values(mme(plain, questions))
    assert values(mme(plain.sample(frac=1, random_state=1), questions)) == want
    (tmp_path / "tool").mkdir()
    keyed = questions.assign(image=questions["image"] + ".jpg", answer=plain["answer"])
    for task, rows in keyed.sample(frac=1, random_state=2).groupby("setting"):
        lines = ["\t".join(r) for r in rows[["image", "text", "label", "answer"]].to_numpy().tolist()]
        (tmp_path / "tool" / f"{task}.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "tool" / "posters.txt").write_text("a.jpg\t?\tYes\tYes\n")  # of another task
    assert values(mme(read_mme_answers(tmp_path / "tool", questions), questions)) == want
    (tmp_path / "answers.json").write_text(json.dumps(plain.to_dict("records")))
    assert values(mme(read_mme_answers(tmp_path / "answers.json", questions), questions)) == want
    color = questions[questions["setting"] == "color"]
    alone = read_mme_answers(tmp_path / "tool" / "color.txt", color)  # one task's file
    assert alone.sort_values("question_id")["answer"].tolist() == plain.loc[color.index, "answer"].tolist()


def test_bad_answers_are_refused_by_name(folder):
    questions = read_mme(folder)
    good = answers_of(questions)
    for bad, message in (
        (good[1:], r"1 questions have no answer, e.g. question_id \['existence/000000000011/1'\]"),
        (pd.concat([good, good[:1]]), r"doubled in the answers, e.g. \['existence/000000000011/1'\]"),
        (pd.concat([good, good[:1].assign(question_id="count/9/1")]), r"belong to no question.*'count/9/1'"),
        (good.drop(columns="question_id"), "lacks .'question_id'"),
        (good.assign(answer=[None, *good["answer"][1:]]), "not text"),
    ):
        with pytest.raises(DataError, match=message):
            mme(bad, questions)
    with pytest.raises(DataError, match="unknown parser"):
        mme(good, questions, "strictly")
    with pytest.raises(DataError, match="two questions an image"):
        mme(good[1:], questions[1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is it?\tYes\n", "1 questions where MME has two"),
        ("Is it?\tYes\nIs it not? No\n", "line 2: not of the form"),
        ("Is it?\tYes\nIs it not?\tPerhaps\n", "line 2"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    (tmp_path / "count").mkdir()
    with pytest.raises(DataError, match="no questions in it"):
        read_mme(tmp_path)
    (tmp_path / "count" / "1.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_mme(tmp_path)
    (tmp_path / "color.txt").write_text("1.jpg\tIs it?\tYes\n")
    with pytest.raises(DataError, match="line 1: not of the form image<TAB>question"):
        read_mme_answers(tmp_path, pd.DataFrame())


@quick
@given(st.lists(st.booleans(), min_size=16, max_size=16))
def test_points_follow_from_what_is_right(right):
    rows = [(task, i, j) for task in TASKS for i in (0, 1) for j in (1, 2)]
    questions = pd.DataFrame(
        {
            "question_id": [f"{t}/{i}/{j}" for t, i, j in rows],
            "setting": [t for t, _, _ in rows],
            "image": [f"{t}{i}" for t, i, _ in rows],
            "text": "?",
            "label": ["yes" if j == 1 else "no" for _, _, j in rows],
            "image_id": [2 * TASKS.index(t) + i for t, i, _ in rows],
        }
    )
    wrong = {q for q, ok in zip(questions["question_id"], right, strict=True) if not ok}
    got = values(mme(answers_of(questions, wrong), questions))
    for number, task in enumerate(TASKS):
        own = np.array(right[4 * number : 4 * number + 4]).reshape(2, 2)
        assert got[f"mme_{task}"] == pytest.approx(100 * own.mean() + 100 * own.all(axis=1).mean())
        assert got[f"mme_{task}_accuracy_plus"] <= got[f"mme_{task}_accuracy"]
    assert got["mme_total"] == pytest.approx(sum(got[f"mme_{task}"] for task in TASKS))


# ---- generated questions


def test_questions_of_the_scenes_world_are_true(tiny_world):
    questions = read_mme(tiny_world.mme())
    assert set(questions["setting"]) == set(TASKS) and set(questions["image_id"]) <= set(tiny_world.split("test").ids)
    files = {f.name for f in tiny_world.split("test").files}
    assert set(questions["image"]) <= files
    for row in questions.itertuples():
        scene = sample("test", row.image_id - 3_000_001)
        assert (row.label == "yes") == _true(scene, row.setting, row.text), (row.text, scene)
    assert (questions.groupby(["setting", "image_id"])["label"].apply(list).map(tuple) == ("yes", "no")).all()
    right = questions[["question_id"]].assign(answer=questions["label"])
    assert values(mme(right, questions))["mme_total"] == 800
    always = values(mme(right.assign(answer="Yes"), questions))
    assert always["mme_total"] == 200 and always["mme_count_accuracy_plus"] == 0


def _true(scene, task, text):
    if task == "existence":
        return any(text == f"Is there {noun_phrase(k)} in the image?" for k in scene.kinds)
    if task == "count":
        return any(text == f"Are there two {plural(k)} in the image?" for k in scene.kinds if scene.count(k) == 2)
    if task == "color":
        return text == f"Is the background {scene.colour}?"
    return any(text == f"Is the {noun(t.category)} {COLUMN[t.cell % GRID]}?" for t in scene.things)


# ---- the command line


def test_command_line(folder, tmp_path, capsys):
    questions = read_mme(folder)
    write_jsonl(answers_of(questions), tmp_path / "base.jsonl")
    write_jsonl(answers_of(questions, {"existence/000000000011/2"})[::-1], tmp_path / "answers.jsonl")
    call = ["mme", "--questions", str(folder), "--answers", str(tmp_path / "answers.jsonl")]
    more = ["--base", str(tmp_path / "base.jsonl"), "--json", str(tmp_path / "out.json")]
    assert main([*call, *more]) == 0
    assert "mme, parser mme, 95 % percentile intervals" in capsys.readouterr().out
    out = json.loads((tmp_path / "out.json").read_text())
    scores = {row["metric"]: row["value"] for row in out["scores"]}
    assert scores["mme_total"] == 800 - 25 - 50 and out["level"] == 0.95
    change = {row["metric"]: row["value"] for row in out["difference to the base"]}
    assert change["mme_total"] == -75
    write_jsonl(answers_of(questions)[1:], tmp_path / "answers.jsonl")
    assert main(call) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 1 questions have no answer") and error.count("\n") == 1


def test_a_difference_of_totals_is_paired(folder):
    questions = read_mme(folder)
    a, b = (
        mme(answers_of(questions), questions),
        mme(answers_of(questions, {"count/000000000013/1"}), questions),
    )
    change = paired_difference(a, b, 200).set_index("metric")
    assert change.loc["mme_total", "value"] == 75 and change.loc["mme_color", "hi"] == 0
