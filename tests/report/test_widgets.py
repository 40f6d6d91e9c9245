"""The board of controls, driven without a browser, and what is left of it in a finished notebook."""

import io
import json

import pytest
import torch
from PIL import Image

from alea_lib.metrics.truth import read_truth
from alea_lib.models.delta import applied, delta_of, edited_layers, scaled
from alea_lib.pipeline.execute import tidy
from alea_lib.report.widgets import live, look

SHORT = {"max_new_tokens": 6, "block": 1}


@pytest.fixture(scope="module")
def edit(tiny):
    """A strong edit of the down-projections of two layers."""
    generator = torch.Generator().manual_seed(3)
    names = [tiny.address("down_proj", layer) for layer in (1, 3)]
    weights = {n: tiny.model.get_submodule(n).weight.detach() for n in names}
    return delta_of(tiny, {n: w + torch.randn(w.shape, generator=generator) for n, w in weights.items()}, {})


@pytest.fixture(scope="module")
def scene(tiny_world):
    split = tiny_world.split("activate")
    return split, read_truth(split.instances, split.captions)


def told(vlm, split, image_id, delta):
    with applied(vlm, delta):
        features = vlm.features(split.find([image_id]).files)
        return vlm.generate(features, vlm.prompt("plain"), SHORT["max_new_tokens"])[0].text


def test_a_share_of_an_edit(tiny, edit):
    half = scaled(edit, 0.5)
    for name, whole in edit.weights.items():
        assert torch.equal(half.weights[name], 0.5 * whole)
    one = scaled(edit, 1.0, [tiny.address("down_proj", 3)])
    assert edited_layers(tiny, one) == {3: [tiny.address("down_proj", 3)]}
    assert list(edited_layers(tiny, edit)) == [1, 3]
    with pytest.raises(KeyError, match="does not change"):
        scaled(edit, 1.0, ["lm_head"])


def test_a_look_scores_its_own_caption(tiny, scene, monkeypatch):
    split, truth = scene
    image_id = split.ids[0]
    there = sorted(truth[image_id])
    text = f"There is a {there[0]}. There is a toaster. There is a toaster."
    answer = type("Answer", (), {"text": text})
    monkeypatch.setattr(tiny, "generate", lambda *args, **kwargs: [answer])
    seen = look(tiny, split, truth, image_id, **SHORT)
    assert seen.score == {"right": 1, "wrong": 1, "missed": len(there) - 1, "words": len(text.split())}
    assert seen.words["category"].tolist() == [there[0], "toaster", "toaster"]


def test_the_board_answers_each_control(tiny, scene, edit, bits):
    split, truth = scene
    before = bits(tiny)
    board = live(tiny, split, truth, {"edit": edit, "base": None}, **SHORT)
    first, second = split.ids[:2]

    def says(image_id, delta):
        return f"<b>base</b>: {told(tiny, split, image_id, None)}" in marked(board) and told(
            tiny, split, image_id, delta
        ) in marked(board)

    assert says(first, edit) and board.controls["layers"].value == (1, 3)
    assert told(tiny, split, first, edit) != told(tiny, split, first, None), "an edit that can be told"
    board.controls["strength"].value = 0.0
    assert says(first, None)
    board.controls["strength"].value = 1.0
    board.controls["layers"].value = (3,)
    assert says(first, scaled(edit, 1.0, [tiny.address("down_proj", 3)]))
    board.controls["image"].value = second
    assert says(second, scaled(edit, 1.0, [tiny.address("down_proj", 3)]))
    board.controls["method"].value = "base"
    assert board.controls["layers"].options == () and says(second, None)
    assert Image.open(io.BytesIO(board.maps.value)).format == "PNG"
    assert bits(tiny) == before, "the model is as it was"


def marked(board) -> str:
    """The report without the marks of wrong objects."""
    from html import unescape

    text = unescape(board.report.value)
    return "".join(p.lower() if i % 2 else p for i, p in enumerate(text.replace("]", "[").split("[")))


def test_a_finished_notebook_holds_no_empty_box(tmp_path):
    widget = {
        "output_type": "display_data",
        "data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "VBox()"},
    }
    plain = {"output_type": "stream", "name": "stdout", "text": "0.5: a caption"}
    cells = [
        {"cell_type": "code", "metadata": {}, "outputs": [widget, plain]},
        {"cell_type": "markdown", "metadata": {}, "source": "x"},
    ]
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {"widgets": {"state": 1}, "kernelspec": {}}}))
    tidy(path)
    kept = json.loads(path.read_text())
    assert kept["cells"][0]["outputs"] == [plain] and kept["cells"][1] == cells[1]
    assert kept["metadata"] == {"kernelspec": {}}
