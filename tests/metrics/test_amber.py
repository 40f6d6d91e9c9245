"""AMBER: words, worked scores, files, and the set made of the scenes world."""

import json
import sys
import types

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alea_lib.core.files import DataError, write_jsonl
from alea_lib.core.stats import summarise
from alea_lib.datasets.describe import existence_question, noun_phrase, references
from alea_lib.datasets.scenes import companions, sample
from alea_lib.metrics.__main__ import main
from alea_lib.metrics.amber import Amber, Words, _cosine, amber, amber_responses, describe, read_amber

quick = settings(max_examples=40, deadline=None)

RELATION = {
    "man": ["person", "people"], "woman": ["person"], "forest": ["tree"], "dog": [], "ship": ["boat"], "sky": [],
    "hot dog": [], "light": [], "person": ["man", "woman"],
}  # fmt: skip
ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["man", "dog", "forest", "dog"], "hallu": ["ship", "sky"]},
    {"id": 2, "type": "generative", "truth": ["woman"], "hallu": ["dog"]},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 5, "type": "discriminative-attribute-number", "truth": "no"},
    {"id": 6, "type": "relation", "truth": "no"},
]
QUERIES = [
    {"id": i, "image": f"AMBER_{image}.jpg", "query": f"query {i}"} for i, image in zip(range(1, 7), (1, 2, 1, 1, 2, 2))
]
KINDS = ["generative", "generative", "existence", "attribute", "attribute", "relation"]
RESPONSES = {
    1: "A man with two dogs and a boat under the light. A hot dog!",  # boat: the expected ship; hot dog: unexpected
    2: "People walk.",  # associated with man, not with woman: wrong
    3: "No", 4: "No, it is not.", 5: "Yes", 6: "no",
}  # fmt: skip


def write_files(folder, annotations=ANNOTATIONS, queries=QUERIES):
    (folder / "query").mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("annotations.json", annotations),
        ("relation.json", RELATION),
        ("query/query_generative.json", queries[:2]),
        ("query/query_discriminative.json", queries[2:]),
    ):
        (folder / name).write_text(json.dumps(content))
    (folder / "safe_words.txt").write_text("light\nline")
    return folder


@pytest.fixture
def benchmark(tmp_path):
    return read_amber(write_files(tmp_path / "data"))


def table(responses=RESPONSES):
    return pd.DataFrame({"id": list(responses), "response": list(responses.values())})


def described(benchmark, responses=RESPONSES, similarity="exact"):
    """The object words of each description."""
    words = Words(benchmark.relation, benchmark.safe_words, similarity)
    generative = benchmark.queries[benchmark.queries["type"] == "generative"]
    return describe(generative.assign(response=generative["id"].map(responses)), benchmark, words)


def values(items):
    return summarise(items, 20).set_index("metric")["value"].to_dict()


def test_reading(benchmark, tmp_path):
    assert benchmark.queries["type"].tolist() == KINDS
    assert benchmark.queries["image_id"].tolist() == [1, 2, 1, 1, 2, 2]
    assert benchmark.truth[1] == ("man", "dog", "forest") and benchmark.hallu[1] == ("ship", "sky")
    assert benchmark.safe_words == {"light", "line"}
    asked = benchmark.questions()
    assert asked["question_id"].tolist() == [3, 4, 5, 6] and asked["label"].tolist() == ["no", "yes", "no", "no"]
    (tmp_path / "data" / "query" / "query_all.json").write_text(json.dumps(QUERIES))
    pd.testing.assert_frame_equal(read_amber(tmp_path / "data").queries, benchmark.queries)


def test_worked_example(benchmark):
    first, second = described(benchmark).to_dict("records")
    assert first["named"] == ("man", "dog", "boat", "light", "hot dog")
    assert (first["covered"], first["wrong"], first["targets"]) == (("man", "dog"), ("boat", "hot dog"), ("ship",))
    assert (second["named"], second["wrong"], second["covered"]) == (("people",), ("people",), ())
    items = amber(table(), benchmark)
    got = values(items)
    assert got["amber_chair"] == (2 + 1) / (5 + 1)  # the safe word counts below, never above
    assert got["amber_cover"] == (2 + 0) / (3 + 1)  # the second "dog" of the truth is the same object
    assert got["amber_hal"] == 1
    assert got["amber_cog"] == (1 + 0) / (2 + 1)
    assert got["amber_cog_paper"] == 1 / 6 and got["amber_cog_share"] == 1 / 3
    # said no: 3 right, 4 wrong, 6 right; true no: 3 5 6
    assert got["amber_accuracy"] == 2 / 4 and got["amber_precision"] == 2 / 3 and got["amber_recall"] == 2 / 3
    assert got["amber_f1"] == pytest.approx(2 / 3)
    assert (got["amber_existence_f1"], got["amber_relation_f1"], got["amber_attribute_accuracy"]) == (1, 1, 0)
    assert got["amber_score"] == pytest.approx((100 - 50 + 100 * 2 / 3) / 2)
    assert set(items["scorer"]) == {"strict, exact"}


def test_the_score_is_resampled_with_both_parts_at_once(benchmark):
    rows = summarise(amber(table(), benchmark), 400, seed=1).set_index("metric")
    score, chair = rows.loc["amber_score"], rows.loc["amber_chair"]
    # drawing image 1 alone: CHAIR 2/5, F1 of questions 3, 4 = 2/3; image 2 alone: CHAIR 1, F1 of 5, 6 = 2/3
    assert (chair["lo"], chair["hi"]) == (2 / 5, 1)
    assert (score["lo"], score["hi"]) == pytest.approx((50 * (1 - 1 + 2 / 3), 50 * (1 - 2 / 5 + 2 / 3)))


def test_parsers(benchmark):
    got = values(amber(table(), benchmark, "exact"))  # "No, it is not." and "no" are not the official program's words
    assert got["unparsed"] == 2 / 4 and got["amber_precision"] == 1 and got["amber_recall"] == 1 / 3
    assert values(amber(table(), benchmark, "official"))["unparsed"] == 0


def test_parts_are_scored_alone_but_never_in_part(benchmark):
    alone = values(amber(table({i: RESPONSES[i] for i in (1, 2)}), benchmark))
    assert "amber_chair" in alone and "amber_f1" not in alone and "amber_score" not in alone
    existence = values(amber(table({3: "No"}), benchmark))
    assert existence["amber_existence_accuracy"] == 1 and "amber_accuracy" not in existence
    yes_no = values(amber(table({i: RESPONSES[i] for i in (3, 4, 5, 6)}), benchmark))
    assert "amber_f1" in yes_no and "amber_score" not in yes_no
    with pytest.raises(DataError, match=r"1 questions have no answer, e.g. id \[5\]"):
        amber(table({4: "Yes"}), benchmark)


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (table({1: "a", 2: "b", 99: "c"}), r"1 responses belong to no query, e.g. id \[99\]"),
        (pd.concat([table(), table({3: "No"})]), r"doubled in the responses, e.g. \[3\]"),
        (table().assign(response=[None, *list(RESPONSES.values())[1:]]), "not text"),
        (table()[:0], "are empty"),
        (table().drop(columns="id"), "lack"),
    ],
)
def test_bad_responses_are_refused(benchmark, responses, message):
    with pytest.raises(DataError, match=message):
        amber(responses, benchmark)


def test_bad_files_are_refused(tmp_path):
    def attempt(message, annotations=ANNOTATIONS, queries=QUERIES, spoil=None):
        folder = write_files(tmp_path / message[:9].replace(" ", ""), annotations, queries)
        if spoil:
            spoil(folder)
        with pytest.raises(DataError, match=message):
            read_amber(folder)

    attempt("1 queries have no annotation, e.g. id .6", annotations=ANNOTATIONS[:5])
    attempt("unknown type .'poem'", annotations=[*ANNOTATIONS[:5], {"id": 6, "type": "poem", "truth": "no"}])
    attempt("neither yes nor no", annotations=[*ANNOTATIONS[:5], ANNOTATIONS[5] | {"truth": "perhaps"}])
    attempt("lacks .'truth'", annotations=[{"id": 1, "type": "generative"}])
    attempt("safe_words.txt: is missing", spoil=lambda f: (f / "safe_words.txt").unlink())
    attempt("not valid JSON", spoil=lambda f: (f / "relation.json").write_text('{"man": '))
    attempt("a dict is needed", spoil=lambda f: (f / "relation.json").write_text("[]"))
    attempt("doubled in the queries", queries=[*QUERIES, QUERIES[5] | {"query": "other"}])
    with pytest.raises(DataError, match="no query_"):
        read_amber(tmp_path)


def words(similarity="exact", safe=("light",)):
    return Words({w: tuple(more) for w, more in RELATION.items()}, frozenset(safe), similarity)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("MEN and Women, the man's dogs!", ["man", "woman", "man", "dog"]),
        ("Hot-dogs; hot\tdogs", ["hot dog"]),  # a hyphenated word is one token, and AMBER's list has none of these
        ("a hot. Dog", ["dog"]),
        ("\uff24\uff2f\uff27 \u72d7 xyzzy", ["dog"]),
        ("boats on the sky line", ["boat", "sky"]),
    ],
)
def test_object_words(text, expected):
    assert words().named(text) == expected


def test_a_word_stands_for_itself_before_it_stands_for_others():
    truth = ("man", "person")
    assert words().judge("person", truth, ()) == ("person", "", False)
    assert words().judge("people", truth, ()) == ("man", "", False)
    assert words().judge("woman", truth, ("woman",)) == ("person", "", False)  # right, so no target
    assert words().judge("light", (), ("light",)) == ("", "", False)
    assert words().judge("boat", truth, ("ship",)) == ("", "ship", True)


class Doc:
    def __init__(self, word):
        self.vector_norm = float(word != "sky")
        self.animal = word in ("dog", "hot dog")

    def similarity(self, other):
        return 0.9 if self.animal == other.animal else 0.1


def test_similar_words_by_vectors(monkeypatch, benchmark):
    _cosine.cache_clear()
    loaded = []
    spacy = types.SimpleNamespace(load=lambda name: loaded.append(name) or Doc)
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    items = amber(table(), benchmark, similarity="spacy")
    first = described(benchmark, similarity="spacy").iloc[0]
    assert first["wrong"] == () and first["covered"] == ("man", "dog")  # boat ~ man, hot dog ~ dog
    assert loaded == ["en_core_web_lg"] and set(items["scorer"]) == {"strict, spacy"}
    _cosine.cache_clear()


def test_missing_vectors_say_what_to_install(monkeypatch, benchmark):
    _cosine.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(DataError, match="needs spaCy: pip install spacy, then python -m spacy download en_core_web_lg"):
        amber(table(), benchmark, similarity="spacy")

    def absent(name):
        raise OSError(name)

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=absent))
    with pytest.raises(DataError, match="needs the word vectors en_core_web_lg"):
        amber(table(), benchmark, similarity="spacy")
    with pytest.raises(DataError, match="choose one of exact, spacy"):
        amber(table(), benchmark, similarity="vectors")


texts = st.lists(
    st.sampled_from(["a", "man", "dogs", "hot", "boat", "people", "sky", "light", ".", "xyzzy"]), max_size=9
)
objects = st.lists(st.sampled_from(sorted(RELATION)), max_size=4, unique=True).map(tuple)


@quick
@given(texts.map(" ".join), objects, objects)
def test_bookkeeping_of_descriptions(text, truth, hallu):
    queries = pd.DataFrame(
        [(1, "1.jpg", "?", 1, "generative", "")], columns=["id", "image", "text", "image_id", "type", "label"]
    )
    one = Amber(queries, {1: truth}, {1: hallu}, {w: tuple(m) for w, m in RELATION.items()}, frozenset({"light"}))
    row = described(one, {1: text}).iloc[0]
    assert (
        len(row["wrong"]) <= len(row["named"])
        and set(row["covered"]) <= set(truth)
        and set(row["targets"]) <= set(hallu)
    )
    assert not set(row["wrong"]) & {*truth, "light"} and len(row["targets"]) <= len(row["wrong"])
    items = amber(table({1: text}), one).set_index("metric")
    assert (items["num"] <= items["den"]).all() and items.loc["amber_hal", "num"] == bool(row["wrong"])


@quick
@given(st.permutations(list(RESPONSES)))
def test_order_changes_nothing(order):
    queries = pd.DataFrame(QUERIES).rename(columns={"query": "text"})
    queries = queries.assign(image_id=[1, 2, 1, 1, 2, 2], type=KINDS, label=["", "", "no", "yes", "no", "no"])
    relation = {w: tuple(m) for w, m in RELATION.items()}
    one = Amber(queries, {1: ("man", "dog"), 2: ("woman",)}, {1: ("ship",), 2: ("dog",)}, relation, frozenset())
    shuffled = table({i: RESPONSES[i] for i in order})
    assert values(amber(shuffled, one)) == values(amber(table(), one))


# ---- the set made of the scenes world


def test_the_scenes_set_is_true(tiny_world):
    benchmark = read_amber(tiny_world.amber())
    test = tiny_world.split("test")
    generative = benchmark.queries[benchmark.queries["type"] == "generative"]
    assert len(generative) == 16 and set(generative["image"]) == {f.name for f in test.files}
    for row in generative.itertuples():
        scene = sample("test", row.image_id - 3_000_001)
        expected = {companions()[k] for k in scene.kinds} - set(scene.kinds)
        assert set(benchmark.truth[row.id]) == set(scene.kinds) and set(benchmark.hallu[row.id]) == expected
    asked = benchmark.questions()
    assert set(asked["setting"]) == {"existence", "attribute"} and set(asked["label"]) == {"yes", "no"}
    for row in asked[asked["setting"] == "existence"].itertuples():
        scene = sample("test", row.image_id - 3_000_001)
        assert (row.text in {existence_question(k) for k in scene.kinds}) == (row.label == "yes")
    attributes = asked[asked["setting"] == "attribute"]["text"]
    assert (
        attributes.str.startswith("Is the background").any()
        and attributes.str.contains(" on the | in the middle").any()
    )


def test_a_model_that_always_completes_sets(tiny_world):
    benchmark = read_amber(tiny_world.amber())
    test = tiny_world.split("test")
    truthful = pd.DataFrame({"image_id": test.ids, "caption": [references(sample("test", i))[0] for i in range(16)]})
    hallu = {q.image_id: benchmark.hallu[q.id] for q in benchmark.queries.itertuples() if q.type == "generative"}
    added = [" ".join(f"There is {noun_phrase(c)}." for c in hallu[i]) for i in test.ids]
    answers = benchmark.questions()[["question_id", "label"]].rename(columns={"label": "answer"})
    clean = values(amber(amber_responses(truthful, answers, benchmark), benchmark))
    assert (clean["amber_chair"], clean["amber_cover"], clean["amber_cog"], clean["amber_score"]) == (0, 1, 0, 100)
    with pytest.raises(DataError, match=r"1 questions have no answer, e.g. image_id \[3000001\]"):
        amber_responses(truthful[1:], None, benchmark)
    more = pd.concat([truthful, pd.DataFrame({"image_id": [7], "caption": ["elsewhere"]})])
    pd.testing.assert_frame_equal(amber_responses(more, None, benchmark), amber_responses(truthful, None, benchmark))
    captions = truthful.assign(caption=truthful["caption"] + " " + pd.Series(added))
    natural = values(amber(amber_responses(captions, None, benchmark), benchmark))
    assert natural["amber_cover"] == 1 and natural["amber_cog"] == 1 and natural["amber_cog_share"] == 1
    assert natural["amber_hal"] == sum(bool(h) for h in hallu.values()) / 16


# ---- the command line


def test_command_line(tmp_path, capsys):
    data = write_files(tmp_path / "data")
    write_jsonl(table()[::-1], tmp_path / "r.jsonl")
    call = ["amber", "--data", str(data), "--answers", str(tmp_path / "r.jsonl")]
    assert main([*call, "--json", str(tmp_path / "out.json")]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["similarity"] == "exact" and out["scorer"] == "strict"
    assert {row["metric"]: row["value"] for row in out["scores"]}["amber_chair"] == 0.5
    assert "amber_score" in capsys.readouterr().out
    (tmp_path / "r.jsonl").write_text('{"id": 1}\n')
    assert main(call) == 2
    assert "record 1: lacks ['response']" in capsys.readouterr().err
