"""The core of the study on a model of yours, in one go: pairs, layers, adversary, edit, and the difference to the base.

    python book/own_model.py --model FOLDER_OR_HUB_NAME --world data/coco --images 20

Prints the seconds of each step (they grow in proportion to --images), then each method minus the unedited model,
paired by image, with 95 % intervals, and its gap to the truncation frontier.
"""

import argparse
import time

import pandas as pd

from alea_lib.adversary.prefix import adversary_preset, fit_prefix
from alea_lib.core.stats import paired_difference
from alea_lib.datasets.write import World
from alea_lib.edit.fit import fit_edit
from alea_lib.edit.settings import preset
from alea_lib.evaluate.answers import captions
from alea_lib.locate.choose import choose_layers
from alea_lib.locate.run import locate_layers
from alea_lib.metrics.chair import chair
from alea_lib.metrics.frontier import frontier_gap
from alea_lib.metrics.truth import read_truth
from alea_lib.models.delta import applied
from alea_lib.models.loading import load
from alea_lib.pairs.activation import ActivateSettings, activate


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of data/models, a path, or a hub name")
    parser.add_argument("--world", required=True, help="a folder in COCO's formats, as `alea_lib.datasets` writes them")
    parser.add_argument("--images", type=int, default=20, help="images of each split")
    parser.add_argument(
        "--locator", default="gradient", help="a layer locator by name; see the verdict on the locators"
    )
    parser.add_argument("--layers", type=int, default=2, help="how many layers to edit")
    parser.add_argument("--steps", type=int, default=100, help="steps of the adversary")
    parser.add_argument("--four-bit", action="store_true", help="a base in NF4; the edited matrices stay whole")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    return parser.parse_args(arguments)


class Clock:
    """Seconds of each step."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step], self._last = round(now - self._last, 1), now


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """One row a method and measure."""
    o, clock = options(arguments), Clock()
    world = World(o.world)
    learn, test = (world.split(name).take(o.images) for name in ("activate", "test"))
    vlm = load(o.model, four_bit=o.four_bit, edited_layers=None)
    clock("load")

    known = read_truth(learn.instances, learn.captions)
    settings = ActivateSettings(label_source="truth", max_new_tokens=o.max_new_tokens)
    supported = [known[i] for i in learn.ids]
    pairs = activate(vlm, vlm.features(learn.files), learn.ids, [f.name for f in learn.files], supported, settings)
    clock(f"activate: {len(pairs)} pairs")

    features = vlm.features(learn.find(pairs["image_id"].tolist()).files)
    scores = locate_layers(vlm, features, pairs, [o.locator]).scores
    layers = tuple(choose_layers(scores, o.layers, "mean"))
    clock(f"locate: layers {layers}")

    wrong, right = pairs["negative"].tolist(), pairs["positive"].tolist()
    prefix, _ = fit_prefix(vlm, features, wrong, adversary_preset("contrast", steps=o.steps), right)
    clock("adversary")
    deltas = {"base": None}
    for method in ("no-prefix", "alea-mixed"):
        deltas[method], _ = fit_edit(vlm, features, right, prefix, preset(method, layers=layers))
        clock(f"edit: {method}")

    truth, test_features, texts = read_truth(test.instances, test.captions), vlm.features(test.files), {}
    for method, delta in deltas.items():
        with applied(vlm, delta):
            texts[method] = captions(vlm, test, test_features, "plain", o.max_new_tokens)
        clock(f"captions: {method}")
    return report(texts, truth, clock)


def report(texts: dict[str, pd.DataFrame], truth, clock: Clock) -> pd.DataFrame:
    print(pd.Series(clock.seconds, name="seconds").to_string(), end="\n\n")
    items = {method: chair(table, truth).items for method, table in texts.items()}
    rows = []
    for method in [m for m in texts if m != "base"]:
        change = paired_difference(items[method], items["base"])
        gap = frontier_gap(texts["base"], texts[method], truth)
        gap = pd.DataFrame([{"metric": "frontier_gap", **{k: gap[k] for k in ("value", "lo", "hi")}}])
        shown = pd.concat([change[change["metric"].isin(["chair_s", "recall", "words"])], gap])
        rows.append(shown.assign(method=method))
    table = pd.concat(rows)[["method", "metric", "value", "lo", "hi"]].reset_index(drop=True)
    print(table.round(3).to_string(index=False))
    return table


if __name__ == "__main__":
    main()
