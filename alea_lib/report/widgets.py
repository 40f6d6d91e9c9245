"""One image and a model at hand: choose an edit and its strength, and read caption, score and maps at once."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from dataclasses import dataclass

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
import torch
from PIL import Image

from ..datasets.world import Split
from ..evaluate.patches import patch_maps
from ..metrics.chair import chair
from ..metrics.truth import Truth
from ..models.delta import Delta, applied, edited_layers, scaled
from ..models.vlm import VLM
from .figures.images import mark, word_maps


@dataclass(frozen=True)
class Look:
    """``caption`` of one image; ``words``: its maps, as of :func:`alea_lib.evaluate.patches.patch_maps`; ``score``:
    right, wrong, missed (objects) and words (of the caption)."""

    caption: str
    words: pd.DataFrame
    score: dict[str, int]


@torch.no_grad()
def look(
    vlm: VLM,
    split: Split,
    truth: Truth,
    image_id: int,
    delta: Delta | None = None,
    max_new_tokens: int = 64,
    block: int = 3,
) -> Look:
    """What a model, edited by ``delta`` if there is one, writes about one image of the split, and where it looks.

    ``block``: side of the square of patches that the maps blank.
    """
    one = split.find([image_id])
    features = vlm.features(one.files)
    with applied(vlm, delta):
        text = vlm.generate(features, vlm.prompt("plain"), max_new_tokens)[0].text
        table = pd.DataFrame({"image_id": [image_id], "caption": [text]})
        words = patch_maps(vlm, one, features, table, truth, block)
    found = chair(table, truth, truth.family).per_caption.iloc[0]
    wrong = len(found["hallucinated"])
    score = {"right": len(found["mentioned"]) - wrong, "wrong": wrong, "missed": len(found["missed"])}
    return Look(text, words, {**score, "words": int(found["n_words"])})


class Live:
    """A board that answers every change of its controls with caption, maps, and a score beside the unedited model's.

    ``deltas``: method -> its edit, None = the base; ``options``: of :func:`look`. ``box`` is what a cell shows. Needs a
    kernel: in a finished notebook a figure stands in for it. Works with ipywidgets 7 and 8.
    """

    def __init__(self, vlm: VLM, split: Split, truth: Truth, deltas: Mapping[str, Delta | None], **options: int):
        self.vlm, self.split, self.truth, self.deltas, self.options = vlm, split, truth, deltas, options
        self.controls = {
            "image": ipywidgets.Dropdown(options=list(split.ids), description="image"),
            "method": ipywidgets.Dropdown(options=list(deltas), description="method"),
            "layers": ipywidgets.SelectMultiple(rows=3, description="layers"),
            "strength": ipywidgets.FloatSlider(1.0, max=2.0, step=0.25, description="strength"),
        }
        self.controls["strength"].continuous_update = False
        self.report, self.maps = ipywidgets.HTML(), ipywidgets.Image(format="png")
        self.box = ipywidgets.VBox([*self.controls.values(), self.report, self.maps])
        self._busy = False  # several controls are being set at once
        self.controls["method"].observe(self.method_changed, "value")
        for name in ("image", "layers", "strength"):
            self.controls[name].observe(self.changed, "value")
        self.method_changed()

    def layers(self) -> dict[int, list[str]]:
        """Layer -> the matrices that the chosen edit changes there."""
        delta = self.deltas[self.controls["method"].value]
        return edited_layers(self.vlm, delta) if delta else {}

    def method_changed(self, _=None) -> None:
        """Another edit has other layers: all of them are chosen at first."""
        self._busy, layers = True, self.controls["layers"]
        try:
            layers.options = list(self.layers())
            layers.value = tuple(layers.options)
        finally:
            self._busy = False
        self.changed()

    def changed(self, _=None) -> None:
        """Fill report and maps by the controls."""
        if self._busy:
            return
        image_id, method, chosen, strength = (control.value for control in self.controls.values())
        delta, layers = self.deltas[method], self.layers()
        part = delta and scaled(delta, strength, [name for layer in chosen for name in layers[layer]])
        looks = [look(self.vlm, self.split, self.truth, image_id, d, **self.options) for d in (None, part)]
        self.report.value = _report(looks, method, self.truth[image_id])
        with Image.open(self.split.find([image_id]).files[0]) as image:
            self.maps.value = _png(image.convert("RGB"), looks[1].words)


live = Live  # the name that notebooks use


def _report(looks: list[Look], method: str, there: frozenset[str]) -> str:
    """Two captions, wrong objects in [CAPITALS AND BRACKETS], above their scores and the difference."""
    scores = pd.DataFrame([each.score for each in looks], index=["base", method])
    scores.loc["difference"] = scores.iloc[1] - scores.iloc[0]
    texts = (html.escape(mark(each.caption, there)) for each in looks)
    captions = "".join(f"<p><b>{html.escape(n)}</b>: {t}</p>" for n, t in zip(scores.index, texts))
    return captions + scores.to_html()


def _png(image: Image.Image, words: pd.DataFrame) -> bytes:
    """The maps of a caption's first five words; the image alone where it names no object."""
    file = io.BytesIO()
    if words.empty:
        image.save(file, "png")
        return file.getvalue()
    few = words.head(5)
    figure = word_maps([image] * len(few), few.assign(label=few["category"]))
    figure.savefig(file, format="png", dpi=80)
    plt.close(figure)
    return file.getvalue()
