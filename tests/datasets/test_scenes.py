"""The scenes world: the same from the same seed, truthful where scorers read, and well-formed."""

import hashlib
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from alea_lib.core.paths import root
from alea_lib.datasets.describe import caption, noun, noun_phrase, plural, questions, references
from alea_lib.datasets.scenes import (  # fmt: skip
    GRID,
    ROLES,
    SIZE,
    SPLITS,
    Scene,
    Thing,
    companions,
    compose,
    glyph_path,
    objects,
    patch_labels,
    recipe,
    sample,
)
from alea_lib.datasets.world import World
from alea_lib.datasets.write import make_scenes
from alea_lib.metrics.lexicon import load_lexicon
from alea_lib.metrics.parse import mentions
from alea_lib.metrics.pope import read_pope
from alea_lib.metrics.truth import read_truth
from alea_lib.pipeline.profiles import load_profile

SETTINGS = ("random", "popular", "adversarial")
INDEX = st.integers(0, 10**6)
SPLIT = st.sampled_from(sorted(SPLITS))


def named(text):
    return {m.category for m in mentions(text)}


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


# ---- the recipe


def test_objects_are_coco_categories_with_a_glyph():
    assert len(objects()) >= 45 and set(objects()) <= set(load_lexicon().names)
    assert len(set(recipe()["glyphs"].values())) == len(objects())
    for category in objects():
        with Image.open(glyph_path(category)) as glyph:
            assert glyph.size == (72, 72)
            assert np.asarray(glyph.convert("RGBA"))[..., 3].mean() > 25  # not an empty image


def test_contexts():
    contexts = recipe()["contexts"]
    assert len(contexts) >= 10
    for context in contexts.values():
        assert len(context["members"]) >= 5 and set(context["members"]) <= set(objects())
        assert len(context["colours"]) == 3 and set(context["colours"]) <= set(recipe()["colours"])
    assert {m for c in contexts.values() for m in c["members"]} == set(objects())


def test_planted_graph():
    edges = recipe()["companions"]
    assert set(edges) == set(objects()) and companions() == {a: c for a, (c, _, _) in edges.items()}
    for anchor, (companion, strength, place) in edges.items():
        assert companion in objects() and companion != anchor
        assert place in ("near", "late") and all(strength in recipe()["annotator"][role] for role in ROLES)


def test_names_of_contexts_and_colours_are_no_objects():
    """Otherwise a scorer would count the setting of a caption as an object."""
    for context in recipe()["contexts"]:
        for colour in recipe()["contexts"][context]["colours"]:
            assert named(f"A {context} scene on a {colour} background shows nothing.") == set(), (
                context,
                colour,
            )


@pytest.mark.parametrize("category", objects())
def test_every_name_is_read_as_its_category(category):
    for text in (
        noun_phrase(category),
        noun_phrase(category, 2),
        f"the {noun(category)}",
        f"two {plural(category)}",
    ):
        assert named(f"There is {text}.") == {category}


# ---- scenes


def test_a_scene_depends_on_its_own_index_alone(tmp_path, tiny_world):
    assert sample("test", 17) == sample("test", 17)
    assert len({str(sample(split, 17).things) for split in SPLITS}) == 4
    assert sample("test", 17, seed=1).things != sample("test", 17).things
    more = make_scenes(tmp_path / "more", activate=3, validate=6, test=24, pope_images=6, training_sample=5)
    theirs, ours = digests(more.folder), digests(tiny_world.folder)
    shared = [p for p in set(theirs) & set(ours) if p.startswith("images")]
    assert len(shared) == 3 + 4 + 16 and all(theirs[p] == ours[p] for p in shared)


def test_two_makings_are_equal_byte_for_byte(tmp_path, tiny_world):
    again = make_scenes(tmp_path / "w", activate=6, validate=4, test=16, pope_images=6, training_sample=30)
    assert digests(again.folder) == digests(tiny_world.folder)


def test_200_images_twice_are_pixel_equal():
    def drawn(i):
        image, cover = compose(sample("validate", i))
        return hashlib.sha256(image.tobytes() + cover.tobytes()).hexdigest()

    first = [drawn(i) for i in range(200)]
    assert [drawn(i) for i in reversed(range(200))] == first[::-1] and len(set(first)) == 200


@settings(max_examples=200, deadline=None)
@given(SPLIT, INDEX)
def test_scenes_are_well_formed(split, index):
    scene = sample(split, index)
    cells = [t.cell for t in scene.things]
    assert len(set(cells)) == len(cells) and all(0 <= c < GRID * GRID for c in cells)
    assert 2 <= len(scene.kinds) <= 5 and all(1 <= scene.count(k) <= 2 for k in scene.kinds)
    assert scene.colour in recipe()["contexts"][scene.context]["colours"]
    for t in scene.things:
        x, y, w, h = t.box
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= SIZE and y + h <= SIZE
    reading = sorted(scene.things, key=lambda t: (t.cell // GRID, t.cell % GRID))
    assert scene.kinds == tuple(dict.fromkeys(t.category for t in reading))


def test_every_object_can_be_seen():
    """Each thing keeps a good part of its own picture, in the right place."""
    for i in range(100):
        scene = sample("test", i)
        image, cover = compose(scene)
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        assert cover.shape == (len(scene.things), SIZE, SIZE) and cover.min() >= 0 and cover.max() <= 1
        assert (cover.sum(0) <= 1 + 1e-5).all()
        for thing, share in zip(scene.things, cover, strict=True):
            x, y, w, h = thing.box
            assert share.sum() == pytest.approx(share[y : y + h, x : x + w].sum())
            assert share.sum() > 60


def test_a_later_thing_hides_an_earlier_one():
    box = (30, 30, 32, 32)
    things = (Thing("apple", 0, box, 0, 1.0, 1.0), Thing("pizza", 4, box, 0, 1.0, 1.0))
    _, cover = compose(Scene("test", 0, 0, "kitchen", "blue", things))
    both = compose(Scene("test", 0, 0, "kitchen", "blue", things[:1]))[1][0]
    hidden = cover[1] > 0.99
    assert hidden.sum() > 100 and cover[0][hidden].max() < 0.02 < both[hidden].max()


def test_patch_labels_by_hand():
    """A cup fills the second patch of the first row, a bus the last patch; all else is background."""
    scene = Scene(
        "test",
        0,
        0,
        "kitchen",
        "blue",
        (Thing("cup", 0, (16, 0, 16, 16), 0, 1, 1), Thing("bus", 8, (80, 80, 16, 16), 0, 1, 1)),
    )
    cover = np.zeros((2, SIZE, SIZE), dtype=np.float32)
    cover[0, 0:16, 16:32] = 1
    cover[1, 80:96, 80:96] = 0.5
    cover[1, 0:16, 0:16] = 0.1  # too little to count
    want = np.zeros(36, dtype=np.int64)
    want[1], want[35] = 1 + objects().index("cup"), 1 + objects().index("bus")
    assert patch_labels(scene, cover, 16).tolist() == want.tolist()
    cover[1, 0:16, 16:32], cover[0, 0:16, 16:32] = 0.6, 0.4  # the larger share counts
    assert patch_labels(scene, cover, 16)[1] == 1 + objects().index("bus")


# ---- captions and questions


@settings(max_examples=300, deadline=None)
@given(SPLIT, INDEX)
def test_references_are_truthful(split, index):
    """Every reference names exactly what is there: no companion leaks in, nothing is left out."""
    scene = sample(split, index)
    texts = references(scene)
    assert len(texts) == 5
    for text in texts:
        assert named(text) == set(scene.kinds)
        assert [m.category for m in mentions(text)] == list(scene.kinds)  # each once, in reading order
        assert scene.context in text and f"{scene.colour} background" in text or "background" not in text
    for kind in scene.kinds:
        assert all(noun_phrase(kind, scene.count(kind)) in text for text in texts)


@settings(max_examples=300, deadline=None)
@given(INDEX, st.sampled_from(ROLES))
def test_set_completing_annotators_add_planted_absent_companions_alone(index, role):
    scene = sample("train", index)
    told = caption(scene, np.random.default_rng(index), role)
    added = [m.category for m in mentions(told) if m.category not in scene.kinds]
    assert set(scene.kinds) <= named(told) and len(set(added)) == len(added)
    assert set(added) <= {companions()[k] for k in scene.kinds}
    for anchor in scene.kinds:
        companion, strength, place = recipe()["companions"][anchor]
        if companion in added and [k for k in scene.kinds if companions()[k] == companion] == [anchor]:
            where = f" with {noun_phrase(companion)}" if place == "near" else f"There is also {noun_phrase(companion)}."
            assert where in told


def test_additions_are_as_frequent_as_the_recipe_says():
    """Strong edges of the plain role over 3,000 scenes, within four standard errors."""
    rng = np.random.default_rng(0)
    wanted = recipe()["annotator"]["plain"]["strong"]
    said = []
    for i in range(3000):
        scene = sample("train", i)
        told = None
        for k in scene.kinds:
            companion, strength, _ = recipe()["companions"][k]
            rivals = [j for j in scene.kinds if companions()[j] == companion]
            if strength == "strong" and companion not in scene.kinds and rivals == [k]:
                told = named(caption(scene, rng, "plain")) if told is None else told
                said.append(companion in told)
    assert len(said) > 300
    assert abs(np.mean(said) - wanted) < 4 * (wanted * (1 - wanted) / len(said)) ** 0.5


def test_speculation_adds_more_and_care_less():
    rates = {}
    for role in ROLES:
        rng = np.random.default_rng(1)
        rates[role] = np.mean(
            [bool(named(caption(sample("train", i), rng, role)) - set(sample("train", i).kinds)) for i in range(600)]
        )
    assert 0.1 < rates["careful"] < rates["plain"] < rates["speculative"]


@settings(max_examples=200, deadline=None)
@given(INDEX)
def test_questions_are_answered_truthfully(index):
    scene = sample("train", index)
    for question, answer in questions(scene, np.random.default_rng(index), 8):
        (kind,) = named(question) or {None}
        columns = {t.cell % GRID for t in scene.things if t.category == kind}
        if question.startswith("Is there"):
            true = kind in scene.kinds
        elif question.startswith("Are there two"):
            true = scene.count(kind) == 2
        elif question.startswith("Is the background"):
            true = question == f"Is the background {scene.colour}?"
        else:
            side = [i for i, c in enumerate(("left", "middle", "right")) if f"the {c}?" in question]
            assert len(columns) == 1
            true = columns == set(side)
        assert answer == ("Yes" if true else "No"), question


def test_questions_are_half_yes():
    asked = [
        a for i in range(500) for q, a in questions(sample("train", i), np.random.default_rng(i)) if "Is there" in q
    ]
    assert abs(np.mean([a == "Yes" for a in asked]) - 0.5) < 4 * 0.5 / len(asked) ** 0.5


# ---- what is written


def read(world, name):
    return json.loads((world.folder / "annotations" / name).read_text())


def test_splits_share_no_image(tiny_world):
    ids = {s: set(tiny_world.split(s).ids) for s in ("activate", "validate", "test")}
    assert [len(i) for i in ids.values()] == [6, 4, 16]
    assert sum(map(len, ids.values())) == len(set().union(*ids.values()))
    huge = {split: {sample(split, i).image_id for i in (0, 999_999)} for split in SPLITS}
    assert len(set().union(*huge.values())) == 8
    files = [f for s in ids for f in tiny_world.split(s).files]
    assert len({f.name for f in files}) == 26 and all(f.is_file() for f in files)


def test_coco_files_are_well_formed(tiny_world):
    ids = load_lexicon().category_ids
    for split in ("activate", "validate", "test"):
        data, texts = read(tiny_world, f"instances_{split}.json"), read(tiny_world, f"captions_{split}.json")
        assert {c["name"]: c["id"] for c in data["categories"]} == {c: ids[c] for c in objects()}
        for part in (data["annotations"], texts["annotations"]):
            assert len({a["id"] for a in part}) == len(part)
        for a in data["annotations"]:
            x, y, w, h = a["bbox"]
            assert 0 <= x and 0 <= y and x + w <= SIZE and y + h <= SIZE and a["area"] == w * h and a["iscrowd"] == 0
        for image in data["images"]:
            with Image.open(tiny_world.folder / "images" / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"]) == (SIZE, SIZE)
            assert int(re.search(r"(\d+)\.png$", image["file_name"]).group(1)) == image["id"]
        counts = [sum(a["image_id"] == i["id"] for a in texts["annotations"]) for i in data["images"]]
        assert set(counts) == {5}


def test_truth_is_what_was_drawn(tiny_world):
    split = tiny_world.split("test")
    truth = read_truth(split.instances, split.captions)
    for i, image_id in enumerate(split.ids):
        kinds = set(sample("test", i).kinds)
        assert truth.instances[image_id] == truth.captions[image_id] == truth[image_id] == kinds


def test_scorers_read_no_set_completing_caption(tiny_world):
    """The annotators' captions differ from the truth, and stand in no file but their own."""
    path = tiny_world.folder / "training" / "captions_set_completed_train.json"
    rows = json.loads(path.read_text())["annotations"]
    wrong = [r["caption"] for r in rows if named(r["caption"]) - set(sample("train", r["image_id"] - 1).kinds)]
    assert len(rows) == 30 and len(wrong) > 5
    others = [p.read_text() for p in tiny_world.folder.rglob("*.json") if p != path]
    assert len(others) >= 10
    assert not [w for w in wrong if any(w in text for text in others)]
    ids = {r["image_id"] for r in rows}
    assert not ids & {i for s in ("activate", "validate", "test") for i in tiny_world.split(s).ids}


def test_pope_files_are_half_yes_and_truthful(tiny_world):
    split = tiny_world.split("test")
    truth = read_truth(split.instances, split.captions)
    asked = {}
    for setting in SETTINGS:
        table = asked[setting] = read_pope(tiny_world.pope(setting))
        assert len(table) == 6 * 6 and (table["label"] == "yes").sum() == 18
        assert (table.groupby("image_id")["label"].apply(lambda x: (x == "yes").sum()) == 3).all()
        for row in table.itertuples():
            (kind,) = named(row.text)
            assert row.text == f"Is there {noun_phrase(kind)} in the image?"
            assert (row.label == "yes") == (kind in truth[row.image_id]) and truth.file_names[row.image_id] == row.image
    no = {s: t.loc[t["label"] == "no", ["image_id", "text"]].values.tolist() for s, t in asked.items()}
    assert no["random"] != no["popular"] != no["adversarial"]


def test_a_split_is_taken_and_found(tiny_world):
    split = tiny_world.split("test")
    assert split.take(5).ids == split.ids[:5] and split.take(None).ids == split.ids
    some = split.find([split.ids[7], split.ids[2]])
    assert some.files == [split.files[7], split.files[2]] and some.ids == [split.ids[7], split.ids[2]]
    with pytest.raises(ValueError, match="has 16 images, 17"):
        split.take(17)
    with pytest.raises(ValueError, match=r"not in split 'test': \[5\]"):
        split.find([5])


def test_clear_errors(tiny_world, tmp_path):
    with pytest.raises(ValueError, match="no split 'train'.*activate.*test"):
        tiny_world.split("train")
    with pytest.raises(ValueError, match="no POPE file for setting 'hard'.*adversarial"):
        tiny_world.pope("hard")
    with pytest.raises(FileNotFoundError, match="world.json is missing"):
        World(tmp_path)
    with pytest.raises(KeyError):
        sample("training", 0)


# ---- the vocabulary of the small models


def test_tokenizer_keeps_every_text():
    """500 scenes: captions of every kind, questions and answers come back as they went in, without <unk>."""
    from alea_lib.models.families import PROMPTS_SMALL, chat
    from alea_lib.zoo.text import build_tokenizer

    tokenizer = build_tokenizer()
    texts = [chat(q) for q in PROMPTS_SMALL.values()]
    for i in range(500):
        rng, scene = np.random.default_rng(i), sample("train", i)
        texts += [f" {caption(scene, rng, role)}" for role in (*ROLES, None)]
        for question, answer in questions(scene, rng):
            texts += [chat(question), f"USER: {question} ASSISTANT:", f" {answer}"]
    texts += [chat(f"Is there {noun_phrase(c)} in the image?") for c in objects()]
    for text in set(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer("There is a cup.")["input_ids"][0] == tokenizer.bos_token_id


def test_the_published_splits_are_the_ones_that_are_made():
    published = json.loads((root() / "data" / "splits" / "scenes.json").read_text())["splits"]
    sizes = load_profile("scenes")["stages"]["01_world"]
    for split, row in published.items():
        assert SPLITS[split] == row["number"]
        assert sample(split, 0).image_id == row["first_id"]
        if split != "train":
            assert sample(split, sizes[f"N_{split.upper()}"] - 1).image_id == row["last_id"]
    ends = sorted((row["first_id"], row["last_id"]) for row in published.values())
    assert all(a[1] < b[0] for a, b in zip(ends, ends[1:], strict=False))
