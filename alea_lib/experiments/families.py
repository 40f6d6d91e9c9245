"""Does the method's machinery hold for a model family? Checked on a tiny random model of the family's real class."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from ..adversary.prefix import PrefixSettings, fit_prefix
from ..edit.fit import fit_edit
from ..edit.losses import answer_nll
from ..edit.settings import EditSettings
from ..locate.run import locate_heads, locate_layers
from ..locate.settings import LocateSettings
from ..models.delta import Delta, applied, load_delta, save_delta
from ..models.families import FAMILIES
from ..models.layout import causal
from ..models.loading import load
from ..models.vlm import VLM
from ..zoo.tiny import BUILDERS, build

QUESTION = "Please describe this image in detail."
PAIRS = pd.DataFrame(
    {
        "positive": ["There is a cup.", "A kitchen scene shows a knife.", "There is a bowl with a spoon."],
        "negative": ["There is a dog.", "There is a cat. There is also a knife.", "There is a bus and a spoon."],
        "wrong": [["dog"], ["cat"], ["bus"]],
        "image_id": [5, 2, 9],
    }
)
CHECKS = ("image span", "locate layers", "locate heads", "prefix", "edit", "delta", "reload")


def family_table() -> pd.DataFrame:
    """What is known of each family: row, type, text parts, what an image is to the decoder, and addresses."""
    rows = []
    for row in FAMILIES.values():
        image = "queries of a Q-Former" if row.queries else "projected patches"
        mask = "causal" if row.decoder_inputs is causal else row.decoder_inputs.__name__.replace("_", " ")
        rows.append((row.name, row.model_type, ", ".join(row.decoders), image, mask, row.down_proj, row.o_proj))
    columns = ["family", "model type", "text part", "the image is", "positions and mask", "down_proj", "o_proj"]
    return pd.DataFrame(rows, columns=columns)


def verify_family(name: str) -> pd.DataFrame:
    """Locate, prefix, edit, save and reload on a tiny random model of a family: family, check, passed, found, seconds.

    ``found`` says what was measured, or the error. A random model shows that the mechanics hold, nothing of quality.
    """
    vlm, places = build(name)
    rng = np.random.default_rng(0)
    features = vlm.features([Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in range(3)])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(vlm, features, places, Path(folder))
        for check in CHECKS:
            started = time.perf_counter()
            try:
                passed, found = getattr(bench, check.replace(" ", "_"))()
            except Exception as error:
                passed, found = False, f"{type(error).__name__}: {error}"
            rows.append((name, check, bool(passed), found, time.perf_counter() - started))
    return pd.DataFrame(rows, columns=["family", "check", "passed", "found", "seconds"])


def verified_families(names: list[str] | None = None) -> pd.DataFrame:
    """``verify_family`` of all families that have a builder (or of these names)."""
    return pd.concat([verify_family(name) for name in (names or list(BUILDERS))], ignore_index=True)


class _Bench:
    """One tiny model; each check returns whether it holds and what was found."""

    def __init__(self, vlm: VLM, features: torch.Tensor, places: int, folder: Path):
        self.vlm, self.features, self.places, self.folder = vlm, features, places, folder
        self.positives, self.negatives = PAIRS["positive"].tolist(), PAIRS["negative"].tolist()
        self.settings = LocateSettings(sites="answer")
        self.edited: Delta | None = None

    def image_span(self):
        """As many placeholders as the family has positions, in one piece, before the question."""
        batch = self.vlm.encode(self.features, QUESTION, self.positives)
        at = [(row == self.vlm.image_id).nonzero().ravel() for row in batch.ids]
        whole = all(len(a) == self.places and a[-1] - a[0] == self.places - 1 for a in at)
        return whole and all(a[-1] < q for a, q in zip(at, batch.question)), f"{self.places} positions"

    def locate_layers(self):
        found = locate_layers(self.vlm, self.features, PAIRS, ["relative-l2", "ablation"], self.settings).scores
        whole = len(found) == 2 * self.vlm.n_layers * len(PAIRS) and np.isfinite(found["score"]).all()
        return whole and found["score"].std() > 0, f"{self.vlm.n_layers} layers"

    def locate_heads(self):
        found = locate_heads(self.vlm, self.features, PAIRS, ["gradient"], self.settings).scores
        whole = len(found) == self.vlm.n_layers * self.vlm.n_heads * len(PAIRS) and np.isfinite(found["score"]).all()
        shared = getattr(self.vlm.model.config.get_text_config(), "num_key_value_heads", self.vlm.n_heads)
        return whole, f"{self.vlm.n_heads} heads over {shared} of keys and values"

    def prefix(self):
        settings = PrefixSettings(length=3, steps=8, batch=3, lr=0.05, norm=0.0)
        _, curve = fit_prefix(self.vlm, self.features, self.negatives, settings)
        first, last = curve["nll"].iloc[0], curve["nll"].iloc[-1]
        return last < first, f"NLL of the negatives {first:.2f} to {last:.2f} in {len(curve)} steps"

    def edit(self):
        """The grounded answers become likelier, and the model itself stays as it was."""
        batch = self.vlm.encode(self.features, self.vlm.prompt("plain"), self.positives)
        layers = (self.vlm.n_layers - 2, self.vlm.n_layers - 1)
        settings = EditSettings(layers=layers, prefix_share=0.0, epochs=2, batch=3, lr=1e-2)
        self.edited = fit_edit(self.vlm, self.features, self.positives, None, settings)[0]
        with torch.no_grad():
            base = answer_nll(self.vlm, batch).item()
            with applied(self.vlm, self.edited):
                after = answer_nll(self.vlm, batch).item()
            kept = answer_nll(self.vlm, batch).item() == base
        return after < base and kept, f"NLL of the positives {base:.2f} to {after:.2f}"

    def delta(self):
        save_delta(self.edited, self.folder / "delta.safetensors")
        again = load_delta(self.folder / "delta.safetensors")
        with applied(self.vlm, again):
            answers = self._answers(self.vlm)
        with applied(self.vlm, self.edited):
            return answers == self._answers(self.vlm), f"{len(again.weights)} matrices"

    def reload(self):
        """The edited checkpoint, saved and loaded from its folder, writes the same tokens."""
        processor, folder = self.vlm.processor, self.folder / "checkpoint"
        with applied(self.vlm, self.edited):
            self.vlm.model.save_pretrained(folder)
            for part in [processor] if hasattr(processor, "save_pretrained") else vars(processor).values():
                part.save_pretrained(folder)
            again = load(str(folder), device="cpu")
            return self._answers(again) == self._answers(self.vlm), f"row {again.row.name}"

    def _answers(self, vlm: VLM) -> list[str]:
        return [a.text for a in vlm.generate(self.features, QUESTION, 6)]
