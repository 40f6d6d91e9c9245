"""Passes that intervene or differentiate: what each MLP and each head does to the probability of the named objects.

The quantity is always the *contrast* of a pair: mean (log-)probability of the negative's wrong objects minus that of
the truthful objects (:func:`alea_lib.locate.tokens.contrast_weights`).
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import torch

from ..hooks import read_heads, read_outputs, read_parts, replaced_heads, replaced_outputs
from ..tables import DataError
from .evidence import Work, own_pass
from .probed import Probed

# ---- MLPs ------------------------------------------------------------------------------------------------------------


def _baseline(work: Work) -> torch.Tensor:
    """[L,D]: what an ablated MLP gives instead of its output."""
    if work.settings.ablation == "mean":
        return torch.as_tensor(work.evidence["mlps"]["mean"].mean(0), device=work.embeds.device)
    return torch.zeros(work.vlm.n_layers, work.embeds.shape[-1], device=work.embeds.device)


@own_pass("mlp-ablation", objects=True)
@torch.no_grad()
def mlp_ablation(work: Work) -> dict[str, torch.Tensor]:
    """``effect`` [n,L]: fall of the contrast of log p when the layer's MLP is ablated."""
    probed, baseline = Probed(work), _baseline(work)
    inputs, final = probed.inputs(probed.embeds)
    base, falls, sites = probed.contrast(final, "logp")[0], [], probed.sites[:, probed.cut :]
    for layer, h in enumerate(inputs):

        def ablated(layer, x):
            return torch.where(sites[..., None], baseline[layer].to(x.dtype), x)

        with replaced_outputs(work.vlm, "down_proj", ablated, [layer]):
            falls.append(base - probed.contrast(probed.tail(layer, h), "logp")[0])
    return {"effect": probed.by_pair(torch.stack(falls, 1))}


@own_pass("mlp-gradient", objects=True)
def mlp_gradient(work: Work) -> dict[str, torch.Tensor]:
    """``effect`` [n,L]: <gradient of the contrast of log p, MLP output minus its ablated value>, summed over sites."""
    probed, baseline, found = Probed(work), _baseline(work), {}
    with torch.enable_grad(), read_outputs(work.vlm, "down_proj", found.__setitem__):
        final = work.vlm.hidden(probed.embeds.detach().requires_grad_(True), probed.mask, probed.batch)
        outputs = [found[layer] for layer in range(work.vlm.n_layers)]
        gradients = torch.autograd.grad(probed.contrast(final, "logp").sum(), outputs)
    products = [
        ((g.float() * (x.detach().float() - b)).sum(-1) * probed.sites).sum(1)
        for g, x, b in zip(gradients, outputs, baseline)
    ]
    return {"effect": probed.by_pair(torch.stack(products, 1))}


# ---- causal tracing --------------------------------------------------------------------------------------------------


@own_pass("tracing", objects=True)
@torch.no_grad()
def tracing(work: Work) -> dict[str, torch.Tensor]:
    """``effect`` [n,L]: rise of the contrast of p when a window of layers around l is put back to its clean outputs
    while the image is corrupted. ``total`` [n]: the contrast with the image minus that with the corrupted one."""
    vlm, s, probed = work.vlm, work.settings, Probed(work)
    part = "layer" if s.restore == "state" else "down_proj"
    sites = (probed.sites & (probed.answer if s.restore == "state" else True))[:, probed.cut :]
    clean: dict[int, torch.Tensor] = {}
    with read_outputs(vlm, part, clean.__setitem__):
        whole = probed.contrast(vlm.hidden(probed.embeds, probed.mask, probed.batch), "p")[0]
    features = torch.cat([corrupted(work)] * 2).to(work.batch.features)
    inputs, final = probed.inputs(vlm.embed(replace(work.batch, features=features))[probed.rows])
    base, effects = probed.contrast(final, "p")[0], []

    def restored(layer, x):
        return torch.where(sites[..., None], clean[layer][:, probed.cut :], x)

    for layer in range(vlm.n_layers):
        first = max(0, layer - (s.window - 1) // 2)
        window = range(first, min(vlm.n_layers, layer + s.window // 2 + 1))
        with replaced_outputs(vlm, part, restored, window):
            effects.append(probed.contrast(probed.tail(first, inputs[first]), "p")[0] - base)
    return {"effect": probed.by_pair(torch.stack(effects, 1)), "total": probed.by_pair(whole - base)}


def corrupted(work: Work) -> torch.Tensor:
    """The features [n,P,D] of what the model is shown instead of the images."""
    s, features = work.settings, work.evidence.features
    keys = work.evidence.pairs.get("image_id", work.evidence.pairs.index.to_series()).to_numpy()
    if s.corruption == "blank":
        return work.evidence.grey.to(work.features).expand_as(work.features)
    if s.corruption == "swap":
        order = np.unique(keys)
        if len(order) == 1:
            raise DataError("corruption='swap' needs pairs of at least two images; there is one image_id")
        other = order[(np.searchsorted(order, keys[work.rows]) + 1) % len(order)]
        return features[torch.as_tensor([int(np.argmax(keys == k)) for k in other])]
    noise = [
        np.random.default_rng([s.seed, 11, zlib.crc32(str(key).encode())]).standard_normal(features.shape[1:])
        for key in keys[work.rows]
    ]
    scale = s.noise * features.to(torch.float32).std()
    return work.features + scale * torch.as_tensor(np.stack(noise)).to(work.features)


# ---- heads -----------------------------------------------------------------------------------------------------------


@own_pass("head-ablation", objects=True)
@torch.no_grad()
def head_ablation(work: Work) -> dict[str, torch.Tensor]:
    """``effect`` [n,L,H]: fall of the contrast of p when a head's output is zero (AD-HH). All heads of a layer in one
    batch, from that layer on: H (L + 1) / 2 forward passes a sequence instead of H L."""
    probed, vlm = Probed(work), work.vlm
    inputs, final = probed.inputs(probed.embeds)
    base, falls, sites = probed.contrast(final, "p")[0], [], probed.sites[:, probed.cut :]
    width = max(1, work.settings.max_rows // max(1, len(probed.rows)))
    for layer, h in enumerate(inputs):
        for chunk in torch.arange(vlm.n_heads, device=h.device).split(width):
            kept = (torch.arange(vlm.n_heads, device=h.device) != chunk[:, None]).repeat_interleave(len(h), 0)
            kept = kept[:, None, :, None] | ~sites.repeat(len(chunk), 1)[:, :, None, None]
            with replaced_heads(vlm, lambda _, o, kept=kept: o * kept, [layer]):
                falls.append(base - probed.contrast(probed.tail(layer, h.repeat(len(chunk), 1, 1)), "p"))
    effect = torch.cat(falls).unflatten(0, (vlm.n_layers, vlm.n_heads)).permute(2, 0, 1)
    return {"effect": probed.by_pair(effect)}


@own_pass("head-gradient", objects=True)
def head_gradient(work: Work) -> dict[str, torch.Tensor]:
    """Inner products [n,L,H] of the gradient of the contrast of p with the head output (``effect``), and with what it
    takes from the ``image`` and from the ``text``, summed over sites."""
    vlm, probed, heads, parts = work.vlm, Probed(work), {}, {}
    layers = range(vlm.n_layers)
    # replaced by themselves: a view that is only read is not on the way to the loss
    keep, read = (
        replaced_heads(vlm, heads.setdefault, layers),
        read_parts(vlm, parts.__setitem__, work.image[probed.rows]),
    )
    with torch.enable_grad(), keep, read:
        final = vlm.hidden(probed.embeds.detach().requires_grad_(True), probed.mask, probed.batch)
        outputs = [heads[layer] for layer in layers]
        gradients = torch.autograd.grad(probed.contrast(final, "p").sum(), outputs)

    def product(x: list[torch.Tensor]) -> torch.Tensor:
        rows = [((g.float() * v.float()).sum(-1) * probed.sites[..., None]).sum(1) for g, v in zip(gradients, x)]
        return probed.by_pair(torch.stack(rows, 1))

    whole = product([o.detach() for o in outputs])
    from_image = product([parts[layer] for layer in layers])
    return {"effect": whole, "image": from_image, "text": whole - from_image}


@own_pass("blind-heads")
@torch.no_grad()
def blind_heads(work: Work) -> dict[str, torch.Tensor]:
    """``divergence`` [n,L,H]: distance of a head's output with and without the image (its positions hidden), averaged
    over the compared positions of both answers without outliers."""
    vlm, with_image, found = work.vlm, {}, [None] * work.vlm.n_layers
    weight = work.weight.gather(1, work.positions)

    def pick(o: torch.Tensor) -> torch.Tensor:
        return o.gather(1, work.positions[:, :, None, None].expand(-1, -1, *o.shape[2:]))

    def compare(layer: int, o: torch.Tensor) -> None:
        distance = (pick(o) - with_image.pop(layer)).float().norm(dim=-1)
        found[layer] = robust_mean(distance, weight, work.settings.outlier).cpu()

    with read_heads(vlm, lambda layer, o: with_image.__setitem__(layer, pick(o))):
        vlm.hidden(work.embeds, work.batch.mask, work.batch)
    with read_heads(vlm, compare):
        vlm.hidden(work.embeds, work.batch.mask * ~work.image, work.batch)
    positive, negative = work.answers(found)
    return {"divergence": (positive + negative) / 2}


def robust_mean(x: torch.Tensor, weight: torch.Tensor, limit: float) -> torch.Tensor:
    """x [b,R,H] over positions with weight [b,R] > 0 -> [b,H], without values that lie further from the median than
    ``limit`` robust standard deviations (1.4826 times the median absolute deviation)."""
    x = x.masked_fill(weight[..., None] == 0, float("nan"))
    away = (x - x.nanmedian(1, keepdim=True).values).abs()
    kept = away <= limit * 1.4826 * away.nanmedian(1, keepdim=True).values + 1e-6 * x.nan_to_num().amax(1, keepdim=True)
    share = weight[..., None] * kept
    return (x.nan_to_num() * share).sum(1) / share.sum(1)
