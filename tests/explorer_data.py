"""A small explorer on the tiny world: captions and maps whose every detail is known."""

import pandas as pd

from alea_lib.datasets.scenes import companions
from alea_lib.metrics.parse import mentions
from alea_lib.metrics.truth import read_truth
from alea_lib.report.explorer import ExplorerSettings, choose_images, write_explorer

SETTINGS = ExplorerSettings(n_images=12, shown="edit")
STRANGER = "There is a toaster. "  # in no picture of the small world


def sentence(objects) -> str:
    return "".join(f"There is a {o}. " for o in objects)


def captions(truth) -> dict[str, pd.DataFrame]:
    """Base and edit; by turns better (the companion goes), worse (a stranger comes), still wrong, and right."""
    texts = {"base": [], "edit": [], "cut": []}
    for turn, i in enumerate(sorted(truth.instances)):
        there = sorted(truth[i])
        called = sorted({companions()[a] for a in there} - truth[i])[:1]
        right, wrong = sentence(there), sentence(there) + sentence(called)
        base, edit = [(wrong, right), (right, right + STRANGER), (wrong, wrong), (right, right)][turn % 4]
        for method, text in (("base", base), ("edit", edit), ("cut", sentence(there[:1]))):
            texts[method].append((i, text.strip()))
    return {m: pd.DataFrame(rows, columns=["image_id", "caption"]) for m, rows in texts.items()}


def maps(table: pd.DataFrame, truth, chosen) -> pd.DataFrame:
    """Word k of a caption hangs on patch k: +2 there, -1 on the patch after it; attention 0.3 on the patch before."""
    rows = []
    for i, text in table[table["image_id"].isin(chosen)].itertuples(index=False):
        for k, m in enumerate(mentions(text)):
            effect, attention = [0.0] * 36, [0.0] * 36
            effect[k], effect[k + 1], attention[k - 1] = 2.0, -1.0, 0.3
            rows.append((i, m.start, m.end, m.category, m.category in truth[i], attention, effect))
    columns = ["image_id", "start", "end", "category", "present", "attention", "effect"]
    return pd.DataFrame(rows, columns=columns)


def write(world, folder):
    """The data of a run in ``folder``; returns truth, captions and the chosen pictures."""
    split = world.split("test")
    truth = read_truth(split.instances, split.captions)
    told = captions(truth)
    chosen = choose_images(told, truth, companions(), SETTINGS)
    found = {m: maps(told[m], truth, set(chosen["image_id"])) for m in ("base", "edit")}
    folder.mkdir(parents=True, exist_ok=True)
    write_explorer(folder, split, truth, told, found, companions(), SETTINGS, chosen)
    return truth, told, chosen
