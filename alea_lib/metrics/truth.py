"""What is in each image: instances and what reference captions name, from files in COCO's formats."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..core.files import DataError, PathLike, hash_of, read_json, sha256, write_json
from .lexicon import LEXICON_FILE, load_lexicon
from .parse import mentions


@dataclass(frozen=True)
class Truth:
    """Ground truth by image id: ``truth[image_id]`` is the frozenset of category names that are there.

    ``instances`` and ``captions`` keep the two sources apart; the truth is their union. ``family`` is the
    parser that read the captions, ``file_names`` the images' file names.
    """

    instances: dict[int, frozenset[str]]
    captions: dict[int, frozenset[str]]
    file_names: dict[int, str]
    family: str

    @functools.cached_property
    def objects(self) -> dict[int, frozenset[str]]:
        """Image id to the categories of either source."""
        return {i: self.instances[i] | self.captions.get(i, frozenset()) for i in self.instances}

    @functools.cached_property
    def categories(self) -> tuple[str, ...]:
        """The categories that occur at all, in COCO's order."""
        there = frozenset().union(*self.objects.values())
        return tuple(name for name in load_lexicon().names if name in there)

    def __getitem__(self, image_id: int) -> frozenset[str]:
        return self.objects[image_id]

    def __contains__(self, image_id: int) -> bool:
        return image_id in self.instances

    def __len__(self) -> int:
        return len(self.instances)

    def only(self, image_ids: Iterable[int]) -> Truth:
        """The same truth for some images; DataError naming ids that are not there."""
        ids = list(image_ids)
        if unknown := [i for i in ids if i not in self]:
            raise DataError(f"{len(unknown)} image ids have no ground truth, e.g. {unknown[:3]}")
        captions = {i: self.captions[i] for i in ids if i in self.captions}
        names = {i: self.file_names[i] for i in ids if i in self.file_names}
        return Truth({i: self.instances[i] for i in ids}, captions, names, self.family)


def read_truth(
    instances_json: PathLike,
    captions_json: PathLike | None = None,
    family: str = "singularise",
    cache: PathLike | None = None,
) -> Truth:
    """Ground truth of CHAIR (Rohrbach et al. 2018): instances and what reference captions name.

    ``captions_json``: of the same images (None: instances alone). ``family``: of the parser. ``cache``: a folder in
    which the result is kept under the hash of the files, the lexicon and the parser. DataError for a damaged file,
    a category that COCO lacks, and an image without reference captions.
    """
    kept = None
    if cache is not None:
        sources = [p for p in (instances_json, captions_json) if p is not None]
        kept = Path(cache) / f"truth-{_fingerprint(sources, family)}.json"
        if kept.exists() and (truth := _load(kept, family)) is not None:
            return truth
    instances, file_names = _read_instances(instances_json)
    captions = {} if captions_json is None else _read_captions(captions_json, instances, family)
    truth = Truth(instances, captions, file_names, family)
    if kept is not None:
        rows = [
            (i, file_names[i], sorted(there), sorted(captions[i]) if captions else None)
            for i, there in instances.items()
        ]
        write_json(kept, rows, indent=None)
    return truth


def _read_coco(path: PathLike, keys: tuple[str, ...]) -> dict:
    data = read_json(path)
    missing = [k for k in keys if not isinstance(data.get(k), list)]
    if missing:
        raise DataError(f"{path}: no list {missing} in it; this is not a COCO file of that kind")
    return data


def _read_instances(path: PathLike) -> tuple[dict[int, frozenset[str]], dict[int, str]]:
    data = _read_coco(path, ("images", "annotations", "categories"))
    ids, names = load_lexicon().category_ids, {c.get("id"): c.get("name") for c in data["categories"]}
    for number, name in names.items():
        if ids.get(name) != number:
            raise DataError(f"{path}: category {number} {name!r} is none of COCO's; ids and names must be COCO's own")
    try:
        file_names = {image["id"]: image.get("file_name", "") for image in data["images"]}
        there: dict[int, set[str]] = {image_id: set() for image_id in file_names}
        for annotation in data["annotations"]:
            image_id, category = annotation["image_id"], annotation["category_id"]
            if image_id not in there:
                raise DataError(f"{path}: an annotation belongs to image {image_id}, which is not in `images`")
            if category not in names:
                raise DataError(f"{path}: image {image_id} has the unknown category id {category}; COCO's are 1-90")
            there[image_id].add(names[category])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: an image or annotation lacks {error}; this is not a COCO instances file") from error
    return {i: frozenset(objects) for i, objects in there.items()}, file_names


def _read_captions(path: PathLike, images: dict[int, frozenset], family: str) -> dict[int, frozenset[str]]:
    data = _read_coco(path, ("annotations",))
    named: dict[int, set[str]] = {}
    try:
        for annotation in data["annotations"]:
            found = named.setdefault(annotation["image_id"], set())
            found.update(m.category for m in mentions(annotation["caption"], family))
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: an annotation lacks {error}; this is not a COCO captions file") from error
    if without := [i for i in images if i not in named]:
        raise DataError(
            f"{path}: {len(without)} images have no reference caption, e.g. {without[:3]}; give the captions"
            " file of the same split, or captions_json=None to trust the instances alone"
        )
    return {i: frozenset(named[i]) for i in images}


def _fingerprint(sources: list[PathLike], family: str) -> str:
    code = [LEXICON_FILE, Path(__file__).with_name("parse.py"), Path(__file__)]
    return hash_of([family, *(sha256(path) for path in [*sources, *code])])[:32]


def _load(path: Path, family: str) -> Truth | None:
    """What was kept, or None when the file is damaged."""
    try:
        rows = read_json(path, list)
        captions = {i: frozenset(named) for i, _, _, named in rows if named is not None}
        instances = {i: frozenset(objects) for i, _, objects, _ in rows}
        return Truth(instances, captions, {i: name for i, name, _, _ in rows}, family)
    except (ValueError, TypeError):
        return None
