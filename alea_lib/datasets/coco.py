"""The coco world: COCO's val2014 photographs and POPE's questions, downloaded into the layout of every world.

world.json                             name, seed, POPE's edition, sizes; written last
splits.json                            the image ids of every split, with the rule and the sha256 of each list
images/val2014/COCO_val2014_<id>.jpg   single images, those of the splits alone
annotations/instances_<split>.json     COCO's records of these images, without the outlines; captions_<split>.json
pope/coco_pope_<setting>.json          POPE's own files, in one edition
source/                                what these were made from;  lock.json: sums of all that was downloaded

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

from ..core.files import DataError, replacing
from ..core.paths import read_yaml, root
from ..metrics.pope import SETTINGS, read_pope
from .fetch import DEFAULT, FetchError, FetchSettings, Item, Lock, alone, fetch, missing, require_space
from .write import World

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
        return Item("source/annotations.zip", url, row["sha256"], row["bytes"], row["about"])

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
            found[setting] = Item(place, url, facts["sha256"], facts.get("bytes"), row["about"])
        return found

    def all_questions(self) -> list[Item]:
        """POPE's files in both editions: the splits avoid the images of both."""
        return [item for edition in EDITIONS for item in self.questions(edition).values()]

    def image(self, image_id: int) -> Item:
        row = self.files["images"]
        name = row["name"].format(image_id)
        url = self._url(row["url"] + name, f"{IMAGES}/{name}")
        return Item(f"images/{IMAGES}/{name}", url, about=row["about"])


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
    folder: Path | str,
    only: Iterable[str] = tuple(PARTS),
    edition: str = "new",
    catalogue: Catalogue | None = None,
    settings: FetchSettings = DEFAULT,
) -> World:
    """Download the chosen parts to ``folder``, as far as they are not there, and write the world; returns it opened.

    What was chosen in an earlier call stays in the world. Raises DataError for an unknown part or edition,
    DiskFullError before anything starts when there is no room, FetchError as ``fetch`` does.
    """
    folder, parts, catalogue = Path(folder), list(only), catalogue or load_catalogue()
    for word, known in [*((p, PARTS) for p in parts), (edition, EDITIONS)]:
        if word not in known:
            raise DataError(f"there is no {word!r} to fetch; choose from {', '.join(known)}")
    lock = Lock(folder)
    require_space(folder, needed(catalogue, parts, lock))
    with alone(folder):
        _fetch_annotations(catalogue, lock, settings)
        fetch(catalogue.all_questions(), lock, settings, "POPE's questions")
        splits = read_splits(catalogue, edition, lock)
        for part in (p for p in PARTS if p in parts and p in splits):
            fetch([catalogue.image(i) for i in splits[part]], lock, settings, f"images of {part}")
        return build_world(catalogue, edition, splits, lock)


def needed(catalogue: Catalogue, parts: list[str], lock: Lock) -> int:
    """Bytes that will be written, as far as that is known beforehand: images count with COCO's mean size."""
    archive, total = catalogue.archive(), 0
    if not all(map(lock.holds, catalogue.members())):
        total += archive.size + archive.about
    files = catalogue.all_questions()
    known = _read_json(lock.folder / "splits.json").get("splits", {})
    for part in parts:
        if part in known:
            files += [catalogue.image(i) for i in known[part]["ids"]]
        elif part != "annotations":
            total += catalogue.image(1).size * catalogue.sizes.get(part, 500)
    return total + sum(item.size for item in files if not (lock.folder / item.path).is_file())


def _fetch_annotations(catalogue: Catalogue, lock: Lock, settings: FetchSettings) -> None:
    """The zip, whole: a part of it has no published sum. Two of its files are kept."""
    archive, members = catalogue.archive(), catalogue.members()
    if all(map(lock.holds, members)):
        return
    fetch([archive], lock, settings, "annotations")
    packed = lock.folder / archive.path
    for place, name in members.items():
        try:
            with zipfile.ZipFile(packed) as zipped, zipped.open(name) as source, replacing(lock.folder / place) as out:
                with open(out, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)  # the CRC is checked at the end
        except (KeyError, zipfile.BadZipFile, EOFError) as error:
            raise FetchError(f"{archive.url}: {name} cannot be read from it ({error})") from error
        lock.record(place, f"{archive.url}#{name}")
    packed.unlink()
    del lock.entries[archive.path]
    lock.save()


def read_splits(catalogue: Catalogue, edition: str, lock: Lock) -> dict[str, list[int]]:
    """Ids of every split: from ``splits.json``, or made by the rule and written there when something has changed."""
    asked = {e: _asked(catalogue, e, lock) for e in EDITIONS}
    instances, _ = catalogue.members()
    facts = {"rule": catalogue.rule, "seed": catalogue.seed, "sizes": catalogue.sizes, "instances": lock.sum(instances)}
    facts["pope"] = {e: ids_sha256(sorted(ids)) for e, ids in asked.items()}
    path = lock.folder / "splits.json"
    kept = _read_json(path)
    if json.dumps({k: kept.get(k) for k in facts}) != json.dumps(facts):  # the order of the sizes counts
        everything = set().union(*asked.values())
        made = make_splits(_read_source(lock.folder / instances), everything, catalogue.seed, catalogue.sizes)
        rows = {n: {"n": len(ids), "sha256": ids_sha256(ids), "ids": ids} for n, ids in made.items()}
        kept = facts | {"splits": rows}
        _write_json(path, kept)
    splits = {name: row["ids"] for name, row in kept["splits"].items()}
    return splits | {"pope": sorted(asked[edition])}


def _asked(catalogue: Catalogue, edition: str, lock: Lock) -> set[int]:
    """Ids of the images that an edition of POPE asks about."""
    files = catalogue.questions(edition).values()
    return {int(i) for item in files for i in read_pope(lock.folder / item.path)["image_id"]}


def build_world(catalogue: Catalogue, edition: str, splits: dict[str, list[int]], lock: Lock) -> World:
    """Write annotations, questions and at last ``world.json``, of the splits whose images are all there."""
    folder, there = lock.folder, {}
    for name, ids in splits.items():
        if not missing([catalogue.image(i) for i in ids], lock):
            there[name] = ids
    if {"chair500", "pope"} <= set(there):
        there["test"] = sorted(there["chair500"] + there["pope"])
    sums = {place: lock.sum(place) for place in catalogue.members()}
    sums |= {item.path: lock.sum(item.path) for item in catalogue.questions(edition).values()}
    info = {"name": "coco", "seed": catalogue.seed, "pope_edition": edition}
    info |= {"sizes": {name: len(ids) for name, ids in there.items()}, "images": dict.fromkeys(there, IMAGES)}
    info |= {"made_from": {"version": VERSION, **sums, **{n: ids_sha256(ids) for n, ids in there.items()}}}
    if _read_json(folder / "world.json") != info:
        (folder / "world.json").unlink(missing_ok=True)  # no half-written world may look whole
        for part in ("annotations", "pope"):
            shutil.rmtree(folder / part, ignore_errors=True)
        lock.entries = {p: e for p, e in lock.entries.items() if not p.startswith(("annotations/", "pope/"))}
        for item in catalogue.questions(edition).values():
            with replacing(folder / "pope" / Path(item.path).name) as temporary:
                shutil.copyfile(folder / item.path, temporary)
        _write_annotations(catalogue, there, folder)
        for path in sorted([*folder.glob("annotations/*.json"), *folder.glob("pope/*.json")]):
            lock.record(path.relative_to(folder).as_posix(), "made from the files in source")
        lock.save()
        _write_json(folder / "world.json", info)
    lock.save()
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
            _write_json(folder / "annotations" / f"{kind}_{name}.json", kept | rows)


def check_coco(folder: Path | str, catalogue: Catalogue | None = None) -> tuple[int, list[str]]:
    """How many files of a folder were looked at, and what is wrong with them or with the world: path and reason.

    Every file is read again and compared with the sum it had when it came, and with the published one if there is one.
    """
    folder, catalogue = Path(folder), catalogue or load_catalogue()
    lock = Lock(folder)
    faults = lock.faults()
    for item in catalogue.all_questions():
        if lock.sum(item.path) not in ("", item.sha256):
            faults.append(f"{item.path}: not the published file")
    info = _read_json(folder / "world.json")
    if not info:
        faults.append("world.json: missing, the world is not finished")
    for name in info.get("sizes", {}):
        try:
            split = World(folder).split(name)
            whole = ids_sha256(split.ids) == info["made_from"][name] and all(f.is_file() for f in split.files)
        except (KeyError, ValueError):
            whole = False
        if not whole:
            faults.append(f"split {name}: not the images it was made of")
    return len(lock.entries), faults


def _read_source(path: Path) -> dict:
    data = _read_json(path)
    if not isinstance(data, dict) or not {"images", "annotations"} <= set(data):
        raise DataError(f"{path}: not a whole annotations file of COCO; delete it and fetch again")
    return data


def _read_json(path: Path) -> dict:
    """A JSON object; empty when there is no such file or it is damaged (it is then made again)."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _write_json(path: Path, value: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")
