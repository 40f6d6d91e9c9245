"""Who says what is there: worlds that lie in data, detectors of transformers, pairs of one's own."""

import json

import pytest
import torch
from PIL import Image

from alea_lib.core.files import DataError
from alea_lib.datasets.world import World
from alea_lib.datasets.write import prepare_world
from alea_lib.evaluate.scoring import Benchmarks, evaluate, read_benchmarks, truncated
from alea_lib.metrics.truth import read_truth
from alea_lib.pairs.detect import HubDetector, load_detector
from alea_lib.pairs.table import import_pairs


@pytest.fixture
def photographs(tmp_path, tiny_world, monkeypatch):
    """A repository whose folder data/photos holds the tiny world without MME, AMBER and training captions."""
    import shutil

    place = tmp_path / "data" / "photos"
    leave = shutil.ignore_patterns("mme", "amber", "training")
    shutil.copytree(tiny_world.folder, place, ignore=leave)
    monkeypatch.setenv("ALEA_ROOT", str(tmp_path))
    return place


def test_a_world_in_data_is_read_where_it_lies(tmp_path, photographs, tiny_world):
    world = prepare_world("photos", tmp_path / "run" / "world", 0, activate=6, validate=4, test=16)
    assert world.folder == photographs and not world.planted and tiny_world.planted
    again = World(tmp_path / "run" / "world")  # as a later stage opens it
    assert again.split("test").ids == tiny_world.split("test").ids and again.info == tiny_world.info
    assert again.split("test").files[0].is_relative_to(photographs)
    assert [p.name for p in (tmp_path / "run" / "world").iterdir()] == ["world.json"]


def test_a_world_that_is_not_there_or_too_small_is_refused_with_the_command(tmp_path, photographs):
    with pytest.raises(DataError, match="no world 'coco' in data: python -m alea_lib.datasets fetch coco"):
        prepare_world("coco", tmp_path / "world")
    with pytest.raises(DataError, match="has 4 images of split 'validate', the profile asks for 5"):
        prepare_world("photos", tmp_path / "world", validate=5)
    assert not (tmp_path / "world").exists()


def test_benchmarks_that_a_world_lacks_are_named_and_left_out(tiny, photographs):
    world = World(photographs)
    split = world.split("test").take(4)
    truth = read_truth(split.instances, split.captions).only(split.ids)
    found = read_benchmarks(world, split.ids)
    assert list(found.questions()) == ["pope"] and set(found.lacking) == {"mme", "amber"}
    base = evaluate(tiny, split, truth, found, 4, n_grounding=2)
    assert set(base.items["benchmark"]) == {"chair", "grounding", "ability", "pope"}
    why = base.notes.set_index("metric")["reason"]
    assert "has no MME questions" in why["mme_*"] and "has no AMBER questions" in why["amber_*"]
    assert set(truncated(base.captions, truth, 4, found.amber).items["benchmark"]) == {"chair"}


def test_questions_about_other_images_alone_are_lacking(tiny_world):
    found = read_benchmarks(tiny_world, [-1])
    assert found.questions() == {} and set(found.lacking) == {"pope", "mme", "amber"}
    assert Benchmarks().questions() == {}


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_of_ones_own_by_id_or_file(tmp_path, tiny_world):
    split = tiny_world.split("activate")
    texts = {"positive": "There is a cup.", "negative": "There is a cup with a bowl and a dog."}
    rows = [{"image_id": split.ids[1], **texts}, {"file": split.files[2].name, **texts, "wrong": ["dog"]}]
    pairs = import_pairs(write(tmp_path / "own.jsonl", rows[0], "\n", rows[1]), split)
    assert pairs["image_id"].tolist() == split.ids[1:3] and pairs["image"].tolist() == [
        f.name for f in split.files[1:3]
    ]
    assert pairs["wrong"].tolist() == [["bowl", "dog"], ["dog"]] and set(pairs["label_source"]) == {"import"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"positive": " "}, "line 2: positive must be a text"),
        ({"negative": 3}, "line 2: negative must be a text"),
        ({"image_id": 12345}, "line 2: image_id 12345 is no image"),
        ({"wrong": ["cat"]}, "line 2: wrong must list categories"),
        ({"negative": "There is a cup."}, "line 2: wrong must list"),
    ],
)
def test_a_mistake_in_pairs_of_ones_own_is_named_by_line_and_field(tmp_path, tiny_world, change, said):
    split = tiny_world.split("activate")
    good = {"image_id": split.ids[0], "positive": "There is a cup.", "negative": "There is a cup with a bowl."}
    with pytest.raises(DataError, match=said):
        import_pairs(write(tmp_path / "own.jsonl", good, {**good, "image_id": split.ids[1], **change}), split)
    with pytest.raises(DataError, match="line 2: not JSON"):
        import_pairs(write(tmp_path / "own.jsonl", good, "{cut"), split)


@pytest.fixture
def yolos(tmp_path):
    """A folder with a random YOLOS whose class head says: cup with 0.9, and a class unknown to COCO with 0.1."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {0: "N/A", 1: "cup", 2: "Dog", 3: "drone"}
    config = YolosConfig(
        **shape, image_size=[32, 32], patch_size=16, num_detection_tokens=3, id2label=names,
        label2id={n: i for i, n in names.items()},
    )  # fmt: skip
    model = YolosForObjectDetection(config)
    last = [m for m in model.class_labels_classifier.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1e-6, 0.9, 1e-6, 0.1, 1e-6]).log())
    model.save_pretrained(tmp_path / "yolos")
    processor = YolosImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "yolos")
    return tmp_path / "yolos"


def test_a_detector_of_transformers_sees_cocos_categories(yolos, tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    detector = load_detector(str(yolos))
    assert isinstance(detector, HubDetector) and set(detector.classes.values()) == {"cup", "dog"}
    assert detector.detect([tmp_path / "a.png", Image.new("RGB", (40, 50))]) == [frozenset({"cup"})] * 2
    detector.threshold = 0.95
    assert detector.detect([tmp_path / "a.png"]) == [frozenset()]


def test_a_detector_that_knows_none_of_cocos_categories_is_refused(yolos):
    config = json.loads((yolos / "config.json").read_text())
    config["id2label"] = {str(i): f"thing {i}" for i in range(4)}
    (yolos / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="none of COCO's 80 categories"):
        load_detector(str(yolos))
    with pytest.raises(FileNotFoundError, match="no detector 'nobody/nothing'"):
        load_detector("nobody/nothing")
