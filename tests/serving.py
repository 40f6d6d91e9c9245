"""A server on localhost that misbehaves when told to, and a tiny set of files in COCO's and POPE's formats."""

import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import yaml
from PIL import Image

from alea_lib.metrics.lexicon import load_lexicon
from alea_lib.metrics.pope import SETTINGS


class Handler(BaseHTTPRequestHandler):
    """GET with ranges. ``server.faults[path]`` is a list of functions of the handler, used up one a request."""

    timeout = 20

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Range")))
        faults = self.server.faults.get(self.path, [])
        (faults.pop(0) if faults else Handler.whole)(self)

    def whole(self, keep=None):
        """The file, or from where it was asked for; only ``keep`` bytes of what was promised."""
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        tag, start = f'"{hashlib.md5(body).hexdigest()}"', 0
        asked = self.headers.get("Range")
        if asked:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][:keep])

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.seen, self.closing = files, {}, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that leaves is what is tested."""

    def asked(self, part=""):
        return [path for path, _ in self.seen if part in path]


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def name(image_id: int) -> str:
    return f"COCO_val2014_{image_id:012d}.jpg"


IDS = [7 * i + 42 for i in range(40)]
ASKED = IDS[3:33:5]  # six images


def tiny_coco() -> dict[str, bytes]:
    """Address on the server -> content. Every image shows a cup, every second a dog; captions tell of a bowl too."""
    number = load_lexicon().category_ids
    images = [{"id": i, "file_name": name(i), "width": 40, "height": 32} for i in IDS]
    marks = [(i, number["cup"]) for i in IDS] + [(i, number["dog"]) for i in IDS[::2]]
    common = {"bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0, "segmentation": [[0] * 8]}
    annotations = [{"id": k, "image_id": i, "category_id": c, **common} for k, (i, c) in enumerate(marks)]
    told = [{"id": k, "image_id": i, "caption": "A cup and a bowl."} for k, i in enumerate(IDS * 5)]
    categories = [{"id": v, "name": k} for k, v in number.items()]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        instances = {"images": images, "annotations": annotations, "categories": categories}
        file.writestr("annotations/instances_val2014.json", json.dumps(instances))
        file.writestr("annotations/captions_val2014.json", json.dumps({"images": images, "annotations": told}))
        noise = np.random.default_rng(0).bytes(60_000)  # a member that nobody needs
        file.writestr("annotations/person_keypoints_val2014.json", noise.hex())
    files = {"/annotations/annotations_trainval2014.zip": packed.getvalue()}
    files |= {f"/val2014/{name(i)}": jpeg(i) for i in IDS}
    for edition in ("new", "old"):
        for setting in SETTINGS:
            n = 11 if (edition, setting) == ("old", "random") else 12
            files[f"/pope/{edition}/coco_pope_{setting}.json"] = questions(setting, n)
    return files


def questions(setting: str, n: int) -> bytes:
    things = {"random": "train", "popular": "car", "adversarial": "fork"}
    rows = [(image, thing) for image in ASKED for thing in ("cup", things[setting])][:n]
    lines = []
    for k, (image, thing) in enumerate(rows, 1):
        line = {"question_id": k, "image": name(image), "text": f"Is there a {thing} in the image?"}
        lines.append(json.dumps(line | {"label": "yes" if thing == "cup" else "no"}) + "\n")
    return "".join(lines).encode()


def write_catalogue(folder, files: dict[str, bytes], activate: int = 8):
    """A catalogue of the tiny set beside its sizes of splits; returns its path."""
    archive = files["/annotations/annotations_trainval2014.zip"]
    pope = {
        edition: {
            "url": "http://nowhere.invalid/",
            "about": 1500,
            "files": {s: facts(files[f"/pope/{edition}/coco_pope_{s}.json"]) for s in SETTINGS},
        }
        for edition in ("new", "old")
    }
    catalogue = {
        "annotations": {
            "url": "http://nowhere.invalid/annotations_trainval2014.zip",
            **facts(archive),
            "instances": "annotations/instances_val2014.json",
            "captions": "annotations/captions_val2014.json",
            "about": 20_000,
        },
        "images": {"url": "http://nowhere.invalid/val2014/", "name": "COCO_val2014_{:012d}.jpg", "about": 2500},
        "pope": pope,
        "splits": "splits.json",
    }
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"chair500": 6, "validate": 4, "activate": activate}
    (folder / "splits.json").write_text(json.dumps({"rule": "by sum", "seed": 0, "sizes": sizes}))
    (folder / "coco.yaml").write_text(yaml.safe_dump(catalogue))
    return folder / "coco.yaml"


def facts(body: bytes) -> dict:
    return {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
