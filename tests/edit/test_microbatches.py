"""Steps in pieces, and what an edit keeps in files: the gradients of the whole, whatever the card can hold."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import build_tiny

from alea_lib.adversary.prefix import PrefixSettings, adversary_preset, fit_prefix, random_prefix
from alea_lib.edit.fit import _Run, fit_edit
from alea_lib.edit.losses import CachedForward, Reference, SpillCache, scratch
from alea_lib.edit.settings import EditSettings
from alea_lib.edit.trained import trained
from alea_lib.models.batch import Limits, loss_scale, scale_gradient
from alea_lib.models.cached_forward import Cached

SETTINGS = EditSettings(layers=(2, 3), prefix_share=0.5, epochs=2, batch=6, unlikelihood=0.3, kl=0.4)


@pytest.fixture(scope="module")
def vlm():
    return build_tiny()


@pytest.fixture(autouse=True)
def no_limits(vlm):
    vlm.limits = Limits()


def gradients(vlm, seen, told, prefix, limits, folder=None, settings=SETTINGS):
    vlm.limits = limits
    run = _Run(vlm, seen, told, told[::-1], [prefix], settings, None, folder)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():  # somewhere off the base, so that the KL pulls too
        for p in run.trained.parameters.values():
            p += 0.3 * p.std() * torch.randn(p.shape, generator=noise)
    row = run.step(1)  # a prefixed step
    return {n: p.grad.clone() for n, p in run.trained.parameters.items()}, row, run


@pytest.mark.parametrize("most", [1, 2, 4, 6])
def test_an_edit_in_pieces_has_the_gradient_of_the_whole(vlm, seen, told, most):
    prefix = random_prefix(vlm, PrefixSettings(length=3))
    want, row, _ = gradients(vlm, seen, told, prefix, Limits())
    found, same, _ = gradients(vlm, seen, told, prefix, Limits(train=most))
    for name in want:
        assert ((found[name] - want[name]).norm() / want[name].norm()).item() < 1e-5
        assert most < 6 or torch.equal(found[name], want[name])
    assert {k: same[k] for k in ("nll", "kl", "unlikelihood")} == pytest.approx(
        {k: row[k] for k in ("nll", "kl", "unlikelihood")}, rel=1e-4
    )
    assert min(row["nll"], row["kl"], row["unlikelihood"]) > 1e-3


@pytest.mark.parametrize("kind, most", [("contrast", 1), ("contrast", 2), ("imitation", 4)])
def test_an_adversary_in_pieces_is_the_same(vlm, seen, told, kind, most):
    settings = adversary_preset(kind, length=3, steps=2, batch=5, lr=1e-3)
    want, curve = fit_prefix(vlm, seen, told, settings, told[::-1])
    vlm.limits = Limits(train=most)
    found, same = fit_prefix(vlm, seen, told, settings, told[::-1])
    start = random_prefix(vlm, settings).rows
    moved = (want.rows - start).norm()
    assert ((found.rows - want.rows).norm() / moved).item() < 1e-2
    np.testing.assert_allclose(same.to_numpy(), curve.to_numpy(), rtol=1e-3, atol=1e-5)


def test_pieces_are_whole_and_small_enough():
    for n in range(1, 30):
        for most in (None, 1, 2, 7):
            found = Limits(train=most).microbatches(np.arange(n))
            assert np.concatenate(found).tolist() == list(range(n))
            assert max(map(len, found)) <= (most or n) and (most or len(found) == 1)


@pytest.mark.parametrize("limit", [0, 20_000, None])
@pytest.mark.parametrize("files", [True, False])
@pytest.mark.parametrize("layers", [(2, 3), (3,)])
def test_what_is_kept_in_files_gives_the_same_bits(vlm, seen, told, tmp_path, limit, files, layers):
    """In memory, partly or wholly in files, or read again: the step is the same to the bit."""
    prefix, settings = random_prefix(vlm, PrefixSettings(length=3)), dataclasses.replace(SETTINGS, layers=layers)
    want, _, _ = gradients(vlm, seen, told, prefix, Limits(), settings=settings)
    for _ in range(2):
        found, _, run = gradients(
            vlm, seen, told, prefix, Limits(keep=limit), tmp_path / "kept" if files else None, settings
        )
        assert all(torch.equal(found[n], want[n]) for n in want)
    held = run.passes.kept
    assert limit is None or held.bytes <= limit
    assert (len(held.far) > 0) == (files and limit is not None)
    if limit is None or files:
        assert len(held.near) + len(held.far) == 3 * 6  # positives under two conditions, negatives under one


def test_a_whole_edit_leaves_no_files(vlm, seen, told, tmp_path):
    settings = dataclasses.replace(SETTINGS, prefix_share=0.0, unlikelihood=0.0)
    want, _ = fit_edit(vlm, seen, told, None, settings)
    vlm.limits = Limits(keep=0)
    found, _ = fit_edit(vlm, seen, told, None, settings, tmp_path / "checkpoint-edit.safetensors")
    assert all(torch.equal(found.weights[n], want.weights[n]) for n in want.weights)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-edit.safetensors"]


def test_the_reference_too(vlm, seen, told, tmp_path):
    vlm.limits = Limits(keep=0)
    passes = CachedForward(vlm, seen, {"positive": told}, SETTINGS, trained(vlm, SETTINGS), tmp_path)
    reference, plain = Reference(passes), None
    vlm.limits = Limits()
    plain = Reference(CachedForward(vlm, seen, {"positive": told}, SETTINGS, trained(vlm, SETTINGS)))
    pick = np.array([4, 1])
    for _ in range(2):
        assert torch.equal(reference(pick), plain(pick))
    assert len(reference.kept.far) == 6 and not reference.kept.near


def test_kept_by_hand(tmp_path):
    item = Cached(torch.arange(6.0).reshape(2, 3).half(), torch.tensor([7]), torch.tensor([True, False]))
    held = SpillCache(limit=30, folder=tmp_path / "kept")
    held.put(("a", 1), item)  # 12 + 8 + 2 bytes
    held.put(("b", 1), item)
    held.put(("c", 1), Cached(torch.ones(2), torch.empty(0)))
    assert held.bytes == 30 and set(held.near) == {("a", 1), ("c", 1)} and set(held.far) == {("b", 1)}
    found = held[("b", 1)]
    assert torch.equal(found.states, item.states) and found.states.dtype == torch.float16
    assert torch.equal(found.scored, item.scored) and found.activation is None
    with scratch(None) as folder:
        assert folder.is_dir()
    assert not folder.exists()


def test_loss_scale():
    """A gradient too small for half precision arrives when the loss is scaled, and is that of the loss."""
    assert loss_scale(torch.float32) == loss_scale(torch.bfloat16) == 1 < loss_scale(torch.float16)
    found = []
    for scale in (1.0, loss_scale(torch.float16)):
        w = torch.ones(3, requires_grad=True)
        scale_gradient([w], scale)
        x = w.half() * 1e-4
        (scale * (x.float() * 1e-5).sum()).backward()
        found.append(w.grad)
    assert found[0].abs().max() < 1e-10 or (found[0] - 1e-9).abs().max() > 1e-10
    torch.testing.assert_close(found[1], torch.full((3,), 1e-9), rtol=0.02, atol=0)
