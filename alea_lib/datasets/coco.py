"""The coco world: COCO's val2014 photographs and POPE's questions, downloaded into the layout of every world.

world.json                             name, seed, POPE's edition, sizes; written last
splits.json                            the image ids of every split, with the rule and the sha256 of each list
images/val2014/COCO_val2014_<id>.jpg   single images, those of the splits alone
annotations/instances_<split>.json     COCO's records of these images, without the outlines; captions_<split>.json
pope/coco_pope_<setting>.json          POPE's own files, in one edition
source/                                what these were made from

Splits: ``activate`` and ``validate`` to edit and to choose by, ``chair500`` and ``pope`` to test on. They share no
image. ``test`` is the last two together.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..core.files import DataError, read_json, replacing, sha256, write_json
from ..core.paths import read_yaml, root
from ..metrics.pope import SETTINGS, read_pope
from .fetch import FetchError, Item, fault, fetch, require_space
from .world import World

PARTS = {  # what can be chosen, and what it is for; annotations and questions always come along
    "annotations": "instances and captions of val2014: the truth that CHAIR reads, and which images there are",
    "pope": "the 500 images that POPE asks about",
    "chair500": "500 images to caption and score with CHAIR",
    "validate": "images to choose layers and settings by",
    "activate": "images whose captions become the pairs of an edit",
}
EDITIONS = ("new", "old")
IMAGES = "val2014"
VERSION = 1  # of what build_world writes


@dataclass(frozen=True)
class Catalogue:
    """``data/coco.yaml`` and the sizes of the splits; ``mirror``: base address of a server with the same files."""

    files: dict
    rule: str
    seed: int
    sizes: dict[str, int]
    mirror: str = ""

    def _url(self, original: str, mirrored: str) -> str:
        return f"{self.mirror.rstrip('/')}/{mirrored}" if self.mirror else original

    def archive(self) -> Item:
        """The zip of the annotations."""
        row = self.files["annotations"]
        url = self._url(row["url"], f"annotations/{Path(row['url']).name}")
        return Item("source/annotations.zip", url, row["sha256"], row["bytes"])

    def members(self) -> dict[str, str]:
        """Place in the folder -> name in the zip, of the two files that are taken out of it."""
        names = (self.files["annotations"][kind] for kind in ("instances", "captions"))
        return {f"source/{Path(name).name}": name for name in names}

    def questions(self, edition: str) -> dict[str, Item]:
        """Setting -> POPE's file."""
        row, found = self.files["pope"][edition], {}
        for setting in SETTINGS:
            name, facts = f"coco_pope_{setting}.json", row["files"][setting]
            url = self._url(row["url"] + name, f"pope/{edition}/{name}")
            place = f"source/pope-{edition}/{name}"
            found[setting] = Item(place, url, facts["sha256"], facts.get("bytes", row["about"]))
        return found

    def all_questions(self) -> list[Item]:
        """POPE's files in both editions: the splits avoid the images of both."""
        return [item for edition in EDITIONS for item in self.questions(edition).values()]

    def image(self, image_id: int) -> Item:
        row = self.files["images"]
        name = row["name"].format(image_id)
        url = self._url(row["url"] + name, f"{IMAGES}/{name}")
        return Item(f"images/{IMAGES}/{name}", url, "", row["about"])


def load_catalogue(path: Path | str | None = None, mirror: str = "") -> Catalogue:
    """``data/coco.yaml`` or another file of its form. DataError when it lacks something."""
    path = Path(path) if path else root() / "data" / "coco.yaml"
    if mirror and not mirror.startswith(("http://", "https://")):
        raise DataError(f"{mirror!r} is no address to download from: it must start with http:// or https://")
    try:
        files = read_yaml(path.read_text(encoding="utf-8"))
        splits = json.loads((path.parent / files["splits"]).read_text(encoding="utf-8"))
        catalogue = Catalogue(files, splits["rule"], splits["seed"], splits["sizes"], mirror)
        catalogue.archive(), catalogue.members(), catalogue.image(1), catalogue.all_questions()
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a catalogue of the coco world ({error!r}); see data/coco.yaml") from error
    return catalogue


def make_splits(instances: dict, pope_ids: Iterable[int], seed: int, sizes: dict[str, int]) -> dict[str, list[int]]:
    """Disjoint image ids of every split, each list in ascending order, from ids and the seed alone.

    ``instances``: the content of an instances file. POPE's images make the split ``pope``. All other images stand in
    the order of sha256("<seed>:<image id>") and are cut into pieces of these ``sizes``, in their order: the last may
    grow and no other split changes. DataError when POPE asks about an unknown image or there are too few.
    """
    ids, asked = {image["id"] for image in instances["images"]}, set(pope_ids)
    if unknown := sorted(asked - ids):
        raise DataError(f"POPE asks about {len(unknown)} images that the annotations lack, e.g. {unknown[:3]}")
    if sum(sizes.values()) > len(ids - asked):
        raise DataError(f"the splits want {sum(sizes.values())} images, and {len(ids - asked)} are there beside POPE's")
    order = iter(sorted(ids - asked, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest()))
    splits = {name: sorted(next(order) for _ in range(n)) for name, n in sizes.items()}
    return splits | {"pope": sorted(asked)}


def ids_sha256(ids: list[int]) -> str:
    """The sum by which a list of ids is published: of its decimal numbers, one a line."""
    return hashlib.sha256("".join(f"{i}\n" for i in ids).encode()).hexdigest()


def fetch_coco(
    folder: Path | str, only: Iterable[str] = tuple(PARTS), edition: str = "new", catalogue: Catalogue | None = None
) -> World:
    """Download the chosen parts to ``folder``, as far as they are not there, and write the world; returns it opened.

    What was chosen in an earlier call stays in the world. Raises DataError for an unknown part or edition,
    DiskFullError before anything starts when there is no room, FetchError as ``fetch`` does.
    """
    folder, parts, catalogue = Path(folder), list(only), catalogue or load_catalogue()
    for word, known in [*((p, PARTS) for p in parts), (edition, EDITIONS)]:
        if word not in known:
            raise DataError(f"there is no {word!r} to fetch; choose from {', '.join(known)}")
    require_space(folder, needed(catalogue, parts, folder))
    _fetch_annotations(catalogue, folder)
    fetch(catalogue.all_questions(), folder, "POPE's questions")
    splits = read_splits(catalogue, edition, folder)
    for part in (p for p in PARTS if p in parts and p in splits):
        fetch([catalogue.image(i) for i in splits[part]], folder, f"images of {part}")
    return build_world(catalogue, edition, splits, folder)


def needed(catalogue: Catalogue, parts: list[str], folder: Path) -> int:
    """Bytes that will be written, as far as that is known beforehand: images count with COCO's mean size."""
    total, files = 0, catalogue.all_questions()
    if not _unpacked(catalogue, folder):
        total += catalogue.archive().size + catalogue.files["annotations"]["about"]
    path = folder / "splits.json"
    known = read_json(path)["splits"] if path.is_file() else {}
    for part in parts:
        if part in known:
            files += [catalogue.image(i) for i in known[part]["ids"]]
        elif part != "annotations":
            total += catalogue.image(1).size * catalogue.sizes.get(part, 500)
    return total + sum(item.size for item in files if not (folder / item.path).is_file())


def _unpacked(catalogue: Catalogue, folder: Path) -> bool:
    return all((folder / place).is_file() for place in catalogue.members())


def _fetch_annotations(catalogue: Catalogue, folder: Path) -> None:
    """The zip, whole: a part of it has no published sum. Two of its files are kept."""
    if _unpacked(catalogue, folder):
        return
    archive = catalogue.archive()
    fetch([archive], folder, "annotations")
    packed = folder / archive.path
    for place, name in catalogue.members().items():
        try:
            with zipfile.ZipFile(packed) as zipped, zipped.open(name) as source, replacing(folder / place) as out:
                with open(out, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)  # the CRC is checked at the end
        except (KeyError, zipfile.BadZipFile, EOFError) as error:
            raise FetchError(f"{archive.url}: {name} cannot be read from it ({error})") from error
    packed.unlink()


def read_splits(catalogue: Catalogue, edition: str, folder: Path) -> dict[str, list[int]]:
    """Ids of every split, made by the rule and written to ``splits.json``; ``pope`` is that of the edition."""
    asked = {}
    for each in EDITIONS:
        tables = [read_pope(folder / item.path) for item in catalogue.questions(each).values()]
        asked[each] = {int(i) for table in tables for i in table["image_id"]}
    instances = folder / next(iter(catalogue.members()))
    made = make_splits(_read_source(instances), set().union(*asked.values()), catalogue.seed, catalogue.sizes)
    facts = {"rule": catalogue.rule, "seed": catalogue.seed, "sizes": catalogue.sizes, "instances": sha256(instances)}
    facts["pope"] = {e: ids_sha256(sorted(ids)) for e, ids in asked.items()}
    facts["splits"] = {n: {"n": len(ids), "sha256": ids_sha256(ids), "ids": ids} for n, ids in made.items()}
    write_json(folder / "splits.json", facts, sort_keys=False, indent=None)
    return made | {"pope": sorted(asked[edition])}


def build_world(catalogue: Catalogue, edition: str, splits: dict[str, list[int]], folder: Path) -> World:
    """Write annotations, questions and at last ``world.json``, of the splits whose images are all there."""
    there = {n: ids for n, ids in splits.items() if all((folder / catalogue.image(i).path).is_file() for i in ids)}
    if {"chair500", "pope"} <= set(there):
        there["test"] = sorted(there["chair500"] + there["pope"])
    questions = [item.path for item in catalogue.questions(edition).values()]
    sums = {place: sha256(folder / place) for place in [*catalogue.members(), *questions]}
    info = {"name": "coco", "seed": catalogue.seed, "pope_edition": edition}
    info |= {"sizes": {name: len(ids) for name, ids in there.items()}, "images": dict.fromkeys(there, IMAGES)}
    info |= {"made_from": {"version": VERSION, **sums, **{n: ids_sha256(ids) for n, ids in there.items()}}}
    path = folder / "world.json"
    if not path.is_file() or read_json(path) != info:
        path.unlink(missing_ok=True)  # no half-written world may look whole
        for part in ("annotations", "pope"):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / "pope").mkdir()
        for place in questions:
            shutil.copyfile(folder / place, folder / "pope" / Path(place).name)
        _write_annotations(catalogue, there, folder)
        write_json(path, info, sort_keys=False, indent=None)
    return World(folder)


def _write_annotations(catalogue: Catalogue, splits: dict[str, list[int]], folder: Path) -> None:
    images = {}
    for place, kind in zip(catalogue.members(), ("instances", "captions")):
        data, by_image = _read_source(folder / place), defaultdict(list)
        images = images or {image["id"]: image for image in data["images"]}
        for annotation in data["annotations"]:
            annotation.pop("segmentation", None)  # outlines, nine tenths of the file: nothing here reads them
            by_image[annotation["image_id"]].append(annotation)
        for name, ids in splits.items():
            rows = {"images": [images[i] for i in ids], "annotations": [a for i in ids for a in by_image[i]]}
            kept = {key: data[key] for key in ("info", "licenses", "categories") if key in data}
            path = folder / "annotations" / f"{kind}_{name}.json"
            write_json(path, kept | rows, sort_keys=False, indent=None)


def check_coco(folder: Path | str, catalogue: Catalogue | None = None) -> tuple[int, list[str]]:
    """How many files of a folder were read, and what is wrong with them or with the world: path and reason.

    Files with a published sum must have it, images must be whole, and the splits those that the world was made of.
    """
    folder, catalogue = Path(folder), catalogue or load_catalogue()
    items, faults = catalogue.all_questions(), []
    if not (folder / "world.json").is_file():
        return 0, ["world.json: missing, the world is not finished"]
    world = World(folder)
    for name in world.info["sizes"]:
        try:
            ids = world.split(name).ids
        except (KeyError, ValueError):
            ids = []
        if ids_sha256(ids) != world.info["made_from"][name]:
            faults.append(f"split {name}: not the images it was made of")
        items += [catalogue.image(i) for i in ids if name != "test"]
    found = ((item.path, fault(item, folder)) for item in tqdm(items, desc="check", disable=None))
    return len(items), [f"{path}: {why}" for path, why in found if why] + faults


def _read_source(path: Path) -> dict:
    data = read_json(path)
    if not {"images", "annotations"} <= set(data):
        raise DataError(f"{path}: not a whole annotations file of COCO; delete it and fetch again")
    return data
