"""The caption explorer: a page to click through test images and captions; no kernel, no network, no torch.

A run chooses the images (``choose_images``) and writes ``explorer.json`` and thumbnails (``write_explorer``); the book
lays the page around them (``publish``), from the templates in ``book/explorer``.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ..core.files import DataError, replacing
from ..datasets.world import Split
from ..metrics.chair import check_captions
from ..metrics.parse import mentions
from ..metrics.truth import Truth

GROUPS = {  # a filter, and what it shows: the method's caption against the base model's
    "worse": "more wrong objects than before",
    "better": "fewer wrong objects than before",
    "still": "wrong objects before and after",
    "companion": "a planted companion named, before or after",
    "right": "no wrong object, before or after",
}
MAX_BYTES = 3_000_000
MAX_SIDE = 192  # pixels of a thumbnail


@dataclass(frozen=True)
class ExplorerSettings:
    """``n_images`` images, drawn by ``seed``; ``shown``: the method that is compared with ``base`` at first; both of
    these have maps. ``block``: side of the square that the maps of effect blank."""

    n_images: int = 120
    shown: str = "alea-mixed"
    block: int = 3
    seed: int = 0


def groups_of(base: str, method: str, there: frozenset[str], called: frozenset[str], family: str) -> tuple[str, ...]:
    """The filters that two captions pass. ``there``: objects in the image; ``called``: absent companions of these."""
    before, after = ({m.category for m in mentions(text, family)} - there for text in (base, method))
    passes = {
        "worse": len(after) > len(before),
        "better": len(after) < len(before),
        "still": bool(before and after),
        "companion": bool((before | after) & called),
        "right": not before | after,
    }
    return tuple(name for name in GROUPS if passes[name])


def called_for(there: frozenset[str], companions: Mapping[str, str]) -> frozenset[str]:
    """The absent objects that those in an image call for; ``companions``: object -> the one that it calls for."""
    return frozenset(companions[a] for a in there if a in companions) - there


def choose_images(
    captions: Mapping[str, pd.DataFrame], truth: Truth, companions: Mapping[str, str], settings: ExplorerSettings
) -> pd.DataFrame:
    """Which images the page shows: image_id, drawn_for (a filter), in ascending order of image_id.

    The filters draw in turn, each its next image in an order that the seed shuffles once for each filter, until
    ``n_images`` are drawn or none is left; an image is drawn once. ``captions``: method -> image_id, caption.
    """
    if missing := {"base", settings.shown} - set(captions):
        raise DataError(f"no captions of {sorted(missing)}; there are {sorted(captions)}: run 06_measure for it")
    base, shown = (_texts(captions[m], truth) for m in ("base", settings.shown))
    passed: dict[str, list[int]] = {name: [] for name in GROUPS}
    for i in sorted(set(base) & set(shown)):
        for name in groups_of(base[i], shown[i], truth[i], called_for(truth[i], companions), truth.family):
            passed[name].append(i)
    queues = {
        name: np.random.default_rng([settings.seed, k]).permutation(ids).tolist()
        for k, (name, ids) in enumerate(passed.items())
    }
    drawn: dict[int, str] = {}
    while len(drawn) < settings.n_images and any(queues.values()):
        for name, queue in queues.items():
            while queue and queue[-1] in drawn:
                queue.pop()
            if queue and len(drawn) < settings.n_images:
                drawn[int(queue.pop())] = name
    return pd.DataFrame(sorted(drawn.items()), columns=["image_id", "drawn_for"])


def _texts(captions: pd.DataFrame, truth: Truth) -> dict[int, str]:
    return dict(check_captions(captions, truth).itertuples(index=False))


def write_explorer(
    folder: Path,
    split: Split,
    truth: Truth,
    captions: Mapping[str, pd.DataFrame],
    maps: Mapping[str, pd.DataFrame],
    companions: Mapping[str, str],
    settings: ExplorerSettings,
    chosen: pd.DataFrame,
) -> pd.DataFrame:
    """Write ``explorer.json`` and ``pictures/<id>.webp`` of the chosen images; returns part, files, bytes.

    ``captions``: method -> image_id, caption; ``maps``: method -> table of
    :func:`alea_lib.evaluate.patches.patch_maps`, for ``base`` and the shown method. Maps are stored in eight bits, on
    one scale a kind for the whole page: the 99th percentile of their largest values, beyond which they are cut.
    """
    words = pd.concat([m.assign(method=name) for name, m in maps.items()], ignore_index=True)
    scale = {kind: _scale(words[kind]) for kind in ("attention", "effect")}
    numbers = {(r.method, r.image_id, r.start): r.Index for r in words.itertuples()}  # of the map of a word
    texts = {m: _texts(table, truth) for m, table in captions.items()}
    data = {
        "settings": asdict(settings),
        "methods": list(captions),
        "mapped": list(maps),
        "grid": round(len(words["effect"].iloc[0]) ** 0.5) if len(words) else 0,
        "scale": scale,
        "groups": GROUPS,
        "images": [_entry(i, texts, truth, companions, numbers) for i in chosen["image_id"]],
        "maps": [_packed(r, scale) for r in words.itertuples()],
    }
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    images = split.find(chosen["image_id"].tolist())
    for image_id, file in zip(images.ids, images.files):
        with Image.open(file) as image:
            thumbnail = image.convert("RGB")
        thumbnail.thumbnail((MAX_SIDE, MAX_SIDE))
        thumbnail.save(folder / "pictures" / f"{image_id}.webp", quality=80, method=6)
    with replacing(folder / "explorer.json") as partial:
        partial.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    sizes = {"explorer.json": [folder / "explorer.json"], "pictures": sorted((folder / "pictures").glob("*.webp"))}
    rows = [(part, len(files), sum(f.stat().st_size for f in files)) for part, files in sizes.items()]
    return pd.DataFrame(rows, columns=["part", "files", "bytes"])


def _entry(image_id: int, texts: dict, truth: Truth, companions: Mapping[str, str], numbers: dict) -> dict:
    """One image: its objects, its captions in parts, and the filters it passes for each method.

    A part is a plain text, or an object word [word, category, right|wrong|companion, number of its map or -1].
    """
    there = truth[image_id]
    called = called_for(there, companions)
    own = {m: t[image_id] for m, t in texts.items() if image_id in t}
    captions: dict[str, list[str | list]] = {}
    for method, text in own.items():
        parts, at = captions.setdefault(method, []), 0
        for m in mentions(text, truth.family):
            state = "right" if m.category in there else "companion" if m.category in called else "wrong"
            word = [text[m.start : m.end], m.category, state, numbers.get((method, image_id, m.start), -1)]
            parts += [text[at : m.start], word] if m.start > at else [word]
            at = m.end
        parts += [text[at:]] if at < len(text) else []
    groups = {m: groups_of(own["base"], text, there, called, truth.family) for m, text in own.items()}
    return {"id": image_id, "objects": sorted(there), "captions": captions, "groups": groups}


def _scale(maps: pd.Series) -> float:
    """99th percentile of the largest absolute values of the maps."""
    return round(float(np.percentile([np.abs(m).max() for m in maps], 99)), 4) if len(maps) else 1.0


def _packed(row, scale: Mapping[str, float]) -> list:
    """Two maps as base64: attention 0 to 255, effect -127 to 127 (two's complement); and attention's sum."""
    attention, effect = (np.clip(np.array(getattr(row, k)) / (scale[k] or 1), -1, 1) for k in ("attention", "effect"))
    bytes_ = (np.round(attention * 255).astype(np.uint8), np.round(effect * 127).astype(np.int8))
    return [*(base64.b64encode(b.tobytes()).decode() for b in bytes_), round(float(np.sum(row.attention)), 4)]


def publish(run: Path, templates: Path, target: Path) -> Path:
    """The page around a run's data: ``target/index.html`` with style, script and images; returns it.

    The data stand inside the page, so that it works from a file, where a script may read no other. DataError when it
    would be larger than 3 MB.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(run / "pictures", target / "pictures")
    page = (templates / "index.html").read_text(encoding="utf-8")
    data = (run / "explorer.json").read_text(encoding="utf-8").strip().replace("</", "<\\/")
    (target / "index.html").write_text(page.replace("{{data}}", data), encoding="utf-8")
    for name in ("explorer.css", "explorer.js"):
        shutil.copyfile(templates / name, target / name)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    if size > MAX_BYTES:
        raise DataError(f"the explorer has {size:,} bytes, more than {MAX_BYTES:,}: show fewer images (N_IMAGES)")
    return target / "index.html"
