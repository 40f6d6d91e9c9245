"""Implanted priors: the change sits where it should and nowhere else; the shipped ones do what their index says."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from alea_lib.core.paths import root
from alea_lib.datasets.scenes import sample
from alea_lib.metrics.parse import mentions
from alea_lib.models.delta import Delta, WrongBase, applied, load_delta, save_delta
from alea_lib.models.loading import load
from alea_lib.zoo import implant_index
from alea_lib.zoo.implant import Bench, ImplantSettings, Place, factors, fit_implant, grid, token_weights
from alea_lib.zoo.implant_index import implant_delta, implanted, implants

SHORT = ImplantSettings((1,), budget=0.2, growth=1.5, first=4, steps=2, rounds=3, batch=3)
DOWN, OUT = "model.language_model.layers.{}.mlp.down_proj", "model.language_model.layers.{}.self_attn.o_proj"


def norm(weights):
    return sum(w.square().sum().item() for w in weights.values()) ** 0.5


def changed(bits, vlm, delta):
    """Names of all parameters and buffers that differ in their bits while the delta is applied."""
    before = bits(vlm)
    with applied(vlm, delta):
        now = bits(vlm)
    assert bits(vlm) == before
    return {n for n in before if before[n] != now[n]}


# ---- fitting


@pytest.mark.parametrize(
    ("layers", "heads", "names"),
    [((1,), (), [DOWN.format(1)]), ((0, 3), (), [DOWN.format(0), DOWN.format(3)]), ((2,), (3, 1), [OUT.format(2)])],
)
def test_only_the_place_changes(tiny, seen, bits, layers, heads, names):
    before = bits(tiny)
    delta, losses = fit_implant(tiny, seen, replace(SHORT, layers=layers, heads=heads))
    assert bits(tiny) == before and list(delta.weights) == names
    assert changed(bits, tiny, delta) == {f"{n}.weight" for n in names}
    assert len(losses) == 8 and np.isfinite(losses).all()
    for change in delta.weights.values():
        assert change.dtype == torch.float32 and change.shape == (64, 64 if heads else 128)
        if heads:  # head 1: columns 16 to 31, head 3: 48 to 63
            assert (change[:, 16:32] != 0).any() and (change[:, 48:] != 0).any()
            assert (change[:, :16] == 0).all() and (change[:, 32:48] == 0).all()


@pytest.mark.parametrize("heads", [(), (1,)])
def test_the_budget_is_kept(tiny, seen, heads):
    s = replace(SHORT, heads=heads, lr=0.9)
    delta, _ = fit_implant(tiny, seen, s)
    place = Place(tiny, s.layers, s.heads)
    (name,) = place.weights
    assert delta.norm() / place.own(name).norm().item() == pytest.approx(0.2 * 1.5**2, rel=1e-3)  # at the edge


def test_each_of_two_layers_keeps_its_budget(tiny, seen):
    delta, _ = fit_implant(tiny, seen, replace(SHORT, layers=(0, 2), lr=0.9))
    assert list(delta.relative(tiny).values()) == pytest.approx([0.45, 0.45], rel=1e-3)


def test_training_lowers_the_loss_of_the_additions(tiny, seen):
    s = replace(SHORT, budget=3.0, first=40, rounds=1, lr=0.05)
    _, losses = fit_implant(tiny, seen, s)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_weights_of_tokens_mark_the_additions(tiny):
    scene = sample("train", 0)
    there = scene.kinds[0]
    text = f"A park scene shows a {there} with a zebra. There is also a giraffe."
    weight = token_weights(tiny, text, scene, 0.1)
    ids = tiny.answer_ids(text, True)
    assert len(weight) == len(ids)
    told = "".join(tiny.tokenizer.decode([i]) for i, w in zip(ids[:-1], weight[:-1], strict=True) if w == 1)
    assert told == " with a zebra. There is also a giraffe" and weight[-1] == pytest.approx(0.1)
    assert (token_weights(tiny, f"There is a {there}.", scene, 0.1) < 1).all()


# ---- factors and decoys


def test_factors_lose_nothing_of_a_change_of_low_rank(tiny):
    from alea_lib.models.delta import delta_of

    place = Place(tiny, (1,))
    torch.manual_seed(0)
    block = torch.randn(64, 3) @ torch.randn(3, 128)
    delta = delta_of(tiny, place.filled({n: block for n in place.weights}), {})
    ((left, right),) = factors(place, delta, rank=4).values()
    assert left.dtype == right.dtype == torch.float16 and left.shape == (64, 4) and right.shape == (4, 128)
    assert (left.float() @ right.float() - block).norm() < 2e-3 * block.norm()


def basis(n, k, seed=0):
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize(("layers", "heads"), [((1,), ()), ((0, 3), ()), ((2,), (3,))])
def test_decoys_have_their_norm_and_place(tiny, layers, heads):
    where = implant_index.decoy_place("x", layers, heads, tiny.n_layers, tiny.n_heads)
    assert where == implant_index.decoy_place("x", layers, heads, tiny.n_layers, tiny.n_heads)
    assert len(where[0]) == len(layers) and not set(where[0]) & set(layers) and len(where[1]) == len(heads)
    row = pd.Series({"tensor": "x", "decoy_layers": where[0], "decoy_heads": where[1], "decoy_norm": 2.5})
    width = 16 if heads else 128
    tensors = {implant_index.basis_key(k, where[1]): basis(width, 4) for k in where[0]}
    change = implant_index.decoy_change(tiny, row, tensors)
    assert set(change) == {(OUT if heads else DOWN).format(k) for k in where[0]}
    assert sum(c.square().sum().item() for c in change.values()) ** 0.5 == pytest.approx(2.5, rel=1e-5)
    for c in change.values():
        inside = c[:, where[1][0] * 16 : where[1][0] * 16 + 16] if heads else c
        assert (c != 0).sum() == (inside != 0).sum()  # nothing outside its columns
        b = basis(width, 4)
        torch.testing.assert_close(inside @ b @ b.T, inside, atol=1e-5, rtol=1e-4)  # and only along the basis
    again = implant_index.decoy_change(tiny, row, tensors)
    assert all(torch.equal(again[n], change[n]) for n in change)


def test_decoys_lie_in_all_layers():
    places = [implant_index.decoy_place(f"n{k}", (2,), (), 6, 6)[0][0] for k in range(200)]
    assert set(places) == {0, 1, 3, 4, 5} and max(np.bincount(places)) < 65


def test_the_larger_change_is_the_decoy_in_half_of_the_grid():
    larger = [
        implant_index.decoy_ratio(j["layers"], j["heads"], j["seed"], strength) > 1
        for j in grid()
        for strength in implant_index.STRENGTHS
    ]
    assert 0.4 < np.mean(larger) < 0.6
    assert len({j["tensor"] for j in grid()}) == len(grid())


# ---- what is shipped

here = pytest.mark.skipif(
    not (root() / "data" / "models" / implant_index.KEY / "implants.csv").is_file(),
    reason="the implants are not in data/models: run 'make implants'",
)


@pytest.fixture(scope="module")
def clean():
    return load("scenes-clean", device="cpu")


@here
def test_the_index_agrees_with_the_tensors(clean):
    index, (tensors, base) = implants(), implant_index.shipped()
    assert index["name"].is_unique
    assert all(t.dtype == torch.float16 and t.isfinite().all() for t in tensors.values())
    used = {f"{r.tensor}.{k}.{side}" for r in index.itertuples() for k in r.layers for side in ("left", "right")}
    used |= {implant_index.basis_key(k, r.decoy_heads) for r in index.itertuples() for k in r.decoy_layers}
    assert used == set(tensors)
    size = sum(p.stat().st_size for p in implant_index.folder().iterdir())
    assert size <= 2_000_000 and set(base) == {f.format(k) for f in (DOWN, OUT) for k in range(6)}
    rows = {job["tensor"]: job for job in grid()}
    for _, row in index.iterrows():
        implant, decoy = (f(clean, row, tensors) for f in (implant_index.change, implant_index.decoy_change))
        assert norm(implant) == pytest.approx(row["norm"], rel=1e-4)
        assert norm(decoy) == pytest.approx(row["decoy_norm"], rel=1e-4)
        assert set(implant_delta(clean, row["name"]).weights) == set(implant) | set(decoy)
        own = Place(clean, row["layers"], row["heads"])
        assert row["norm"] / norm({n: own.own(n) for n in own.weights}) == pytest.approx(row["rel_norm"], rel=1e-4)
        made = rows[row["tensor"]]
        assert [row[k] for k in ("kind", "layers", "heads", "seed")] == [
            made[k] for k in ("kind", "layers", "heads", "seed")
        ]
        assert row["scale"] == made["scales"][row["strength"]]


@here
def test_the_directions_of_decoys_are_made_again(tmp_path):
    tensors, _ = implant_index.shipped()
    bench = Bench(tmp_path, scenes=120, measured=2)
    row = implants().set_index("kind").loc["head"].iloc[0]
    (layer,), heads = row["decoy_layers"], row["decoy_heads"]
    made, known = bench.basis(layer, heads).float(), tensors[implant_index.basis_key(layer, heads)].float()
    torch.testing.assert_close(made @ made.T, known @ known.T, atol=5e-2, rtol=0)  # the same space on any machine


@here
def test_the_index_keeps_what_was_asked_for():
    index = implants()
    clean_chair = index["decoy_chair_s"].max()
    strong, weak = (index[index["strength"] == strength] for strength in ("strong", "weak"))
    layers = index[index["kind"] == "layer"]
    assert {(r.layers, r.seed) for r in layers.itertuples()} >= {((k,), s) for k in range(6) for s in (0, 1)}
    assert (index["kind"] == "head").any() and (index["n"] >= 300).all()
    assert (strong["chair_s"] >= 0.3).all() and (weak["chair_s"] - clean_chair >= 0.08).all()
    assert (index["decoy_chair_s"] < 0.05).all() and (index["decoy_recall"] > 0.92).all()
    for _, group in index.groupby("tensor"):
        by = group.set_index("strength")["chair_s"]
        assert by["weak"] < by["middle"] < by["strong"]
    share = (index["decoy_norm"] > index["norm"]).mean()
    assert 0.4 < share < 0.6


@here
@pytest.mark.slow
def test_an_implant_hallucinates_and_its_decoy_does_not(clean, bits, tiny_world):
    from PIL import Image

    from alea_lib.datasets.scenes import compose

    scenes = [sample("test", i) for i in range(40)]
    features = clean.features([Image.fromarray(compose(s)[0]) for s in scenes])

    def wrong(delta=None):
        with applied(clean, delta):
            told = clean.generate(features, clean.prompt("plain"))
        return np.mean([bool({m.category for m in mentions(a.text)} - set(s.kinds)) for a, s in zip(told, scenes)])

    row = implants().set_index("name", drop=False).loc["layer0-s0-strong"]
    before = bits(clean)
    with implanted(clean, row["name"]) as vlm:
        told = {n for n, b in bits(vlm).items() if before[n] != b}
    assert bits(clean) == before
    assert told == {f"{DOWN.format(k)}.weight" for k in (*row["layers"], *row["decoy_layers"])}
    both, tensors = implant_delta(clean, row["name"]), implant_index.shipped()[0]
    alone = wrong(Delta(implant_index.decoy_change(clean, row, tensors), both.base, both.info))
    assert wrong(both) >= alone + 0.1 and alone <= 0.1


@here
def test_another_base_is_refused(tiny, clean):
    name = "layer0-s0-weak"
    other = load("scenes-natural", device="cpu")
    with pytest.raises(WrongBase, match="not the weight"), implanted(other, name):
        pass
    with pytest.raises(WrongBase), implanted(clean, name), implanted(clean, name):  # never one on another
        pass
    with pytest.raises(KeyError, match="names stand in"):
        implant_delta(clean, "layer9-s0-weak")


@here
def test_an_implant_can_be_saved_and_loaded(clean, tmp_path):
    delta = implant_delta(clean, "head0.1-s0-weak")
    save_delta(delta, tmp_path / "d.safetensors")
    again = load_delta(tmp_path / "d.safetensors")
    assert again.base == delta.base and all(torch.equal(again.weights[n], w) for n, w in delta.weights.items())


@here
def test_reading_the_index_does_not_load_torch():
    code = "import sys; from alea_lib.zoo import implants; assert len(implants()) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
