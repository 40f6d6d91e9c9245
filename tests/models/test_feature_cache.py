"""Image features on disk: the same bits, found again, rebuilt when wrong, and never lost to a full disk."""

import errno

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_tiny

from alea_lib.edit.fit import fit_edit
from alea_lib.edit.settings import EditSettings
from alea_lib.locate.run import locate_layers
from alea_lib.metrics.parse import mentions
from alea_lib.models import feature_cache as module
from alea_lib.models.feature_cache import Features, fingerprint, folder_name, whole


@pytest.fixture
def cached(tmp_path):
    """A model of its own that keeps its features, and how many images it has really looked at."""
    vlm = build_tiny()
    vlm.cache, vlm.looked = tmp_path / "features", 0
    see = vlm.compute_features

    def counting(images, *rest):
        vlm.looked += len(images)
        return see(images, *rest)

    vlm.compute_features = counting
    return vlm


@pytest.fixture
def files(tiny_world):
    return tiny_world.split("activate").files


def kept(vlm):
    return sorted(vlm.cache.rglob("*.safetensors"))


def test_the_same_features_read_once(cached, files, seen):
    found = cached.features(files)
    assert isinstance(found, Features) and found.shape == seen.shape and cached.looked == 6
    assert torch.equal(found.tensor(), seen.half())
    again = cached.features(files[2:4])  # another stage, other images of the same
    assert cached.looked == 6 and torch.equal(again.tensor(), seen.half()[2:4])
    assert len(kept(cached)) == 6


def test_used_like_a_tensor(cached, files, seen):
    found, plain = cached.features(files), seen.half()
    rows = torch.tensor([4, 0, 4])
    for a, b in (
        (found[rows], plain[rows]), (found[1:5][2:], plain[3:5]), (found[np.array([True] + [False] * 5)], plain[:1]),
        (found[rows][1], plain[0]), (torch.cat([found[rows]] * 2), plain[rows].repeat(2, 1, 1)),
        (found[:0], plain[:0]), (found[rows].repeat(2, 1, 1), plain[rows].repeat(2, 1, 1)),
        (found.to("cpu", torch.float32), plain.float()),
    ):  # fmt: skip
        a = a.tensor() if isinstance(a, Features) else a
        assert torch.equal(a, b)
    assert len(found[rows]) == 3 and found[rows].shape == (3, *plain.shape[1:])
    assert isinstance(found[np.zeros(3000, dtype=int)], Features)  # reads nothing: questions repeat their image


def test_only_what_is_asked_for_is_read(cached, files, monkeypatch):
    found, read = cached.features(files), []
    own = module._read
    monkeypatch.setattr(module, "_read", lambda f: read.append(f) or own(f))
    found[torch.tensor([2, 2, 5])].to("cpu")
    assert read == [found.files[2], found.files[5]]


def test_an_unknown_attribute_reads_nothing(cached, files, monkeypatch):
    found = cached.features(files)
    monkeypatch.setattr(module, "_read", lambda f: pytest.fail(f"{f} was read"))
    assert not hasattr(found, "nowhere") and not hasattr(found, "flip") and found.device == torch.device("cpu")
    with pytest.raises(AttributeError, match="nowhere"):
        found.nowhere  # noqa: B018


def test_locators_run_on_them(cached, files, told):
    found = cached.features(files)
    table = pd.DataFrame({"positive": told, "negative": told[1:] + told[:1]})
    table["wrong"] = [sorted({m.category for m in mentions(t)}) for t in table["negative"]]
    a, b = (locate_layers(cached, f, table, ["raw-l2", "tracing"]).scores for f in (found, found.tensor()))
    pd.testing.assert_frame_equal(a, b)


def test_everything_runs_on_them(cached, files, seen, told):
    found = cached.features(files)
    plain = found.tensor().float()
    question = cached.prompt("plain")
    assert cached.generate(found, question, 6, batch_size=4) == cached.generate(plain, question, 6, batch_size=4)
    settings = EditSettings(layers=(2,), prefix_share=0.0, epochs=1, batch=3)
    a, b = (fit_edit(cached, f, told, None, settings)[0] for f in (found, plain))
    assert all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)
    assert fingerprint(found) == fingerprint(plain) != fingerprint(plain + 1)


@pytest.mark.parametrize("fault", ["cut", "empty", "other", "flipped"])
def test_a_wrong_file_is_made_again(cached, files, seen, fault):
    cached.features(files)
    bad = kept(cached)[3]
    data = bytearray(bad.read_bytes())
    if fault == "cut":
        data = data[:-5]
    elif fault == "empty":
        data = b""
    elif fault == "other":
        data = b"not a safetensors file at all"
    else:
        data[-3] ^= 64
    bad.write_bytes(bytes(data))
    assert not whole(bad)
    assert torch.equal(cached.features(files).tensor(), seen.half())
    assert cached.looked == 7 and whole(bad)


def test_stopped_and_gone_on(cached, files, monkeypatch):
    cached.limits = type(cached.limits)(see=2)
    own, written = module.write_safetensors, []

    def full(tensors, path, meta):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        own(tensors, path, meta)

    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.raises(
        OSError, match=r"features of 4 images take 0.00 GiB more and .* GiB are free; make room"
    ) as error:
        cached.features(files)
    assert error.value.errno == errno.ENOSPC and len(kept(cached)) == 3
    monkeypatch.setattr(module, "write_safetensors", own)
    before = cached.looked
    cached.features(files)
    assert cached.looked == before + 3 and len(kept(cached)) == 6


def test_who_looked_and_how_is_in_the_name(cached):
    names = {folder_name(cached)}
    cached.revision = "b" * 40
    names.add(folder_name(cached))
    cached.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    names.add(folder_name(cached))
    cached.model.half()
    names.add(folder_name(cached))
    assert len(names) == 4


def test_missing_image_before_anything_is_computed(cached, files, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png"):
        cached.features([*files, tmp_path / "none.png"])
    assert cached.looked == 0


def test_pictures_in_memory_are_not_kept(cached):
    from PIL import Image

    assert isinstance(cached.features([Image.new("RGB", (96, 96))]), torch.Tensor) and not cached.cache.exists()
