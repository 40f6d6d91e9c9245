"""An edit handed over: adapter and checkpoint load in plain transformers and write the same tokens."""

import dataclasses
import errno
import shutil

import pytest
import torch
from conftest import build_tiny
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from alea_lib.edit import export
from alea_lib.edit.export import export_adapter, export_checkpoint, stored_name
from alea_lib.edit.fit import fit_edit
from alea_lib.edit.settings import EditSettings, preset
from alea_lib.models import checkpoint
from alea_lib.models.delta import Delta, WrongBase, applied, load_delta, save_delta
from alea_lib.models.identity import config_hash
from alea_lib.models.vlm import VLM

SHORT = EditSettings(layers=(1, 3), prefix_share=0.0, epochs=6, batch=3, lr=1e-2, kl=0.0)
KINDS = {
    "down_proj": SHORT,
    "lora": dataclasses.replace(SHORT, rank=2, lr=5e-2),
    "heads": dataclasses.replace(SHORT, modules="o_proj", heads=((1, 0), (3, 2), (3, 3)), lr=5e-2),
    "decoder": dataclasses.replace(SHORT, modules="decoder", layers=(2,)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model on disk, in two shards."""
    tiny, path = build_tiny(), tmp_path_factory.mktemp("model") / "tiny"
    tiny.model.save_pretrained(path, max_shard_size="300KB")
    tiny.processor.save_pretrained(path)
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request, tiny, seen, told):
    return request.param, fit_edit(tiny, seen, told, None, KINDS[request.param])[0]


def plain(path, tiny):
    """A folder through transformers alone, then wrapped to be able to caption."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path)
    return VLM(model, tiny.processor, tiny.row, "plain")


def written(vlm, seen):
    return [a.text for a in vlm.generate(seen, vlm.prompt("plain"), 24)]


def test_adapter_writes_the_same_tokens(tiny, seen, folder, kind, tmp_path):
    from peft import PeftModel

    _, delta = kind
    with applied(tiny, delta):
        want = written(tiny, seen)
    assert want != written(tiny, seen)
    export_adapter(delta, tmp_path / "adapter", str(folder))
    base = plain(folder, tiny)
    adapted = PeftModel.from_pretrained(base.model, tmp_path / "adapter")
    assert written(base, seen) == want  # peft wraps the modules in place
    for name, change in delta.weights.items():
        module = adapted.base_model.model.get_submodule(name)
        torch.testing.assert_close(module.get_delta_weight("default"), change, atol=1e-6, rtol=1e-5)
    tuned = {n.split(".lora_")[0] for n, _ in adapted.named_parameters() if ".lora_" in n}
    assert tuned == {f"base_model.model.{n}" for n in delta.weights}


def test_checkpoint_writes_the_same_tokens_and_changes_nothing_else(tiny, seen, folder, kind, tmp_path):
    _, delta = kind
    with applied(tiny, delta):
        want = written(tiny, seen)
    table = export_checkpoint(delta, folder, tmp_path / "out")
    assert written(plain(tmp_path / "out", tiny), seen) == want
    assert len(table) == len(delta.weights) and (table["survived"] - 1).abs().max() < 1e-3
    differ = set()
    for file in folder.glob("*.safetensors"):
        a, b = load_file(file), load_file(tmp_path / "out" / file.name)
        differ |= {k for k in a if not torch.equal(a[k], b[k])}
    assert differ == set(table["tensor"])


def test_lora_is_low_rank_on_disk_and_off(kind, tmp_path):
    name, delta = kind
    path = tmp_path / "delta.safetensors"
    save_delta(delta, path)
    loaded = load_delta(path)
    assert all(torch.equal(loaded.weights[n], w) for n, w in delta.weights.items()) and loaded.base == delta.base
    with safe_open(path, "pt") as f:
        assert any(k.endswith(".A") for k in f.keys()) == (name == "lora")
    if name == "lora":
        assert all(torch.linalg.matrix_rank(w) <= 2 for w in loaded.weights.values())


def test_heads_change_their_columns_alone(tiny, seen, told):
    delta, _ = fit_edit(tiny, seen, told, None, dataclasses.replace(KINDS["heads"], epochs=1))
    layers = {tiny.address("o_proj", 1): {0}, tiny.address("o_proj", 3): {2, 3}}
    assert set(delta.weights) == set(layers)
    for n, heads in layers.items():
        moved = delta.weights[n].view(64, 4, 16).abs().amax((0, 2)).nonzero()[:, 0]
        assert set(moved.tolist()) == heads


def test_another_checkpoint_is_refused(tiny, other, seen, told, folder, tmp_path):
    delta, _ = fit_edit(other, seen, told, None, dataclasses.replace(SHORT, epochs=1))
    with pytest.raises(WrongBase, match="not the weight"):
        export_checkpoint(delta, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="safetensors checkpoint"):
        export_checkpoint(delta, tmp_path, tmp_path / "out")


def test_another_configuration_is_refused(tiny, kind):
    _, delta = kind
    odd = dataclasses.replace(delta, info={**delta.info, "config": "0" * 16})
    with pytest.raises(WrongBase, match="another configuration"), applied(tiny, odd):
        pass
    loose = type(tiny.model.config).from_dict({**tiny.model.config.to_dict(), "dtype": "float16"})
    assert config_hash(loose) == delta.info["config"]


def test_names_on_disk():
    memory = "model.language_model.layers.3.self_attn.q_proj.weight"
    legacy = [
        "language_model.model.layers.3.self_attn.q_proj.weight",
        "language_model.model.layers.13.self_attn.q_proj.weight",
    ]
    tower = ["vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.weight"]
    assert stored_name(memory, tower + legacy) == legacy[0]
    assert stored_name(memory, tower + [memory]) == memory
    with pytest.raises(WrongBase, match="no tensor that answers"):
        stored_name("model.language_model.layers.3.mlp.down_proj.weight", tower)


def test_no_room_on_the_disk(folder, kind, tmp_path, monkeypatch):
    _, delta = kind
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as m:
        m.setattr(export.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match="no room on the disk: .* MiB needed"):
            export_checkpoint(delta, folder, tmp_path / "out")
    for fault in (OSError(errno.ENOSPC, "x"), SafetensorError("I/O error: No space left on device")):

        def full(tensors, path, metadata, fault=fault):
            path.write_bytes(b"half")
            raise fault

        with monkeypatch.context() as m:
            m.setattr(checkpoint, "save_file", full)
            with pytest.raises(OSError, match="no room on the disk for .* MiB; free some"):
                save_delta(delta, tmp_path / "d.safetensors")
        assert not list(tmp_path.glob("d.*"))


def test_a_run_on_a_full_disk_keeps_its_last_checkpoint(tiny, seen, told, tmp_path, monkeypatch):
    path, save_file = tmp_path / "c.safetensors", checkpoint.save_file
    settings = dataclasses.replace(SHORT, epochs=3)
    whole, _ = fit_edit(tiny, seen, told, None, settings)
    writes = []

    def full(*args, **kwargs):
        writes.append(1)
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "x")
        return save_file(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no room"):
        fit_edit(tiny, seen, told, None, settings, path)
    resumed, curve = fit_edit(tiny, seen, told, None, settings, path)
    assert all(torch.equal(resumed.weights[n], w) for n, w in whole.weights.items()) and len(curve) == 6


def test_presets_ready_to_ship():
    assert preset("lora").rank > 0 and preset("heads", heads=((0, 1),)).modules == "o_proj"
    assert Delta({}, {}, {}).factors == {}
