"""Auxiliary detectors by key: which of COCO's categories are in an image, when annotations are not to be used."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from ..core.files import DataError
from ..core.paths import root
from ..metrics.lexicon import load_lexicon
from ..models.hub import switched_off
from ..models.layout import fp32_convolutions, opened
from ..zoo import detector as small


class HubDetector:
    """An object detector of transformers whose classes are named as in COCO. It sees an object where a box of its class
    has at least ``threshold`` probability."""

    threshold, batch_size = 0.7, 8

    def __init__(self, model, processor):
        self.model, self.processor = model.eval(), processor
        self.names = load_lexicon().names
        labels = getattr(model.config, "id2label", {})
        self.classes = {int(i): str(n).lower() for i, n in labels.items() if str(n).lower() in self.names}

    @torch.no_grad()
    def detect(self, images: list) -> list[frozenset[str]]:
        """The set of COCO's categories seen in each image (file, array or PIL)."""
        found = []
        for start in tqdm(range(0, len(images), self.batch_size), desc="detect"):
            given = [opened(i, 0) for i in images[start : start + self.batch_size]]
            inputs = self.processor(images=given, return_tensors="pt").to(self.model.device)
            with fp32_convolutions():
                boxes = self.processor.post_process_object_detection(self.model(**inputs), self.threshold)
            labels = [{int(i) for i in each["labels"]} for each in boxes]
            found += [frozenset(self.classes[i] for i in some if i in self.classes) for some in labels]
        return found


def load_detector(key: str = "scenes-detector"):
    """A detector by key: one of ``data/models``, else the folder or hub name of a model for object detection (DETR,
    YOLOS, ...) whose classes are COCO's. Its ``detect(images)`` gives a frozenset of categories an image.

    FileNotFoundError for an unknown key, DataError for a model that names none of COCO's categories.
    """
    if (root() / "data" / "models" / key / "detector.json").is_file():
        return small.load_detector(key)
    if not key or (switched_off() and not Path(key).is_dir()):
        raise FileNotFoundError(
            f"no detector {key!r}: give scenes-detector, the folder of a model for object detection, or its hub name "
            "with the hub switched on (HF_HUB_OFFLINE=0)"
        )
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    model = AutoModelForObjectDetection.from_pretrained(key).to("cuda" if torch.cuda.is_available() else "cpu")
    found = HubDetector(model, AutoImageProcessor.from_pretrained(key, backend="pil"))
    if not found.classes:
        raise DataError(f"the detector {key!r} names none of COCO's 80 categories (config.json, id2label)")
    return found
