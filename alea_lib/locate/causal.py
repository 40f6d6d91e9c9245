"""Passes that intervene or differentiate: what each MLP and each head does to the probability of the named objects.

The quantity is always the *contrast* of a pair: mean (log-)probability of the negative's wrong objects minus that of
the truthful objects (:func:`alea_lib.locate.tokens.contrast_weights`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..models.hooks import (
    read_heads,
    read_layers,
    read_outputs,
    read_parts,
    replaced_heads,
    replaced_outputs,
    started_at,
)
from .evidence import Work, own_pass

if TYPE_CHECKING:
    from transformers import DynamicCache

OUTLIER = 3.0  # robust standard deviations from which a token of the vision-aware divergence is dropped


class Probed:
    """The m sequences of a batch that hold an object of the contrast.

    ``sites`` [m,T] bool: where outputs are ablated, attributed or restored. When they are the answers' positions, whole
    passes keep the keys and values of the ``cut`` positions before, and tail passes run over the T - cut others alone.
    """

    def __init__(self, work: Work):
        self.vlm, self.n = work.vlm, work.n
        self.rows = (work.contrast != 0).any(1).nonzero()[:, 0]
        self.pair = self.rows % work.n
        self.weight, self.labels = work.contrast[self.rows], work.batch.labels[self.rows]
        self.batch = work.batch.without_images(self.rows)
        self.mask, self.embeds = work.batch.mask[self.rows], work.embeds[self.rows]
        self.sites, self.cut = self.mask.bool(), 0
        if work.settings.sites == "answer":
            first = work.batch.answer[self.rows, None] - 1
            self.sites &= torch.arange(self.mask.shape[1], device=first.device) >= first
            self.cut = int(first.min())
        self.cache: DynamicCache | None = None

    def contrast(self, hidden: torch.Tensor, of: str) -> torch.Tensor:
        """Final states [m*k,T or T - cut,D], the sequences k times over -> weighted sums of ``p`` or ``logp`` [k,m]."""
        k, cut = len(hidden) // len(self.rows), self.mask.shape[1] - hidden.shape[1]
        row, at = self.weight.nonzero(as_tuple=True)
        logits = self.vlm.head(hidden.unflatten(0, (k, -1))[:, row, at - 1 - cut]).float()
        value = logits.log_softmax(-1).gather(-1, self.labels[row, at].expand(k, -1)[..., None])[..., 0]
        value = (value if of == "logp" else value.exp()) * self.weight[row, at]
        return value.new_zeros(k, len(self.rows)).index_add(1, row, value)

    def by_pair(self, x: torch.Tensor) -> torch.Tensor:
        """x [m,...], one row a sequence -> [n,...]: the sum over a pair's sequences."""
        return x.new_zeros(self.n, *x.shape[1:]).index_add(0, self.pair, x)

    def inputs(self, embeds: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """A whole pass: the input of each layer and the final states, each [m,T - cut,D]."""
        outputs = [embeds]
        with read_layers(self.vlm, lambda layer, h: outputs.append(h)):
            final = self.vlm.hidden(embeds, self.mask, self.batch) if not self.cut else self._kept(embeds)
        return [h[:, self.cut :] for h in outputs[:-1]], final[:, self.cut :]

    def _kept(self, embeds: torch.Tensor) -> torch.Tensor:
        """The whole pass, after which ``cache`` holds the positions before the cut and never grows."""
        from transformers import DynamicCache

        cache = DynamicCache()
        final = self.vlm.hidden(embeds, self.mask, self.batch, cache)
        for layer in cache.layers:
            assert layer.keys is not None and layer.values is not None
            layer.keys, layer.values = layer.keys[:, :, : self.cut], layer.values[:, :, : self.cut]

        def update(keys, values, layer, *args, **kwargs):
            own = cache.layers[layer]
            times = len(keys) // len(own.keys)
            before = (x.repeat(times, 1, 1, 1) for x in (own.keys, own.values))
            return tuple(torch.cat([old, new], 2) for old, new in zip(before, (keys, values)))

        vars(cache)["update"] = update
        self.cache = cache
        return final

    def tail(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """Final states [m*k,T - cut,D] when ``layer`` reads ``h`` of that shape."""
        times = len(h) // len(self.mask)
        batch = self.batch.without_images(torch.arange(len(self.mask), device=h.device).repeat(times))
        with started_at(self.vlm, layer, h):
            return self.vlm.hidden(h, self.mask.repeat(times, 1), batch, self.cache, self.cut)


# ---- MLPs ------------------------------------------------------------------------------------------------------------


@own_pass
@torch.no_grad()
def mlp_ablation(work: Work) -> dict[str, torch.Tensor]:
    """``effect`` [n,L]: fall of the contrast of log p when the layer's MLP gives nothing."""
    probed = Probed(work)
    inputs, final = probed.inputs(probed.embeds)
    base, falls, sites = probed.contrast(final, "logp")[0], [], probed.sites[:, probed.cut :]
    for layer, h in enumerate(inputs):
        with replaced_outputs(work.vlm, "down_proj", lambda _, x: x.masked_fill(sites[..., None], 0), [layer]):
            falls.append(base - probed.contrast(probed.tail(layer, h), "logp")[0])
    return {"effect": probed.by_pair(torch.stack(falls, 1))}


@own_pass
def mlp_gradient(work: Work) -> dict[str, torch.Tensor]:
    """``effect`` [n,L]: <gradient of the contrast of log p, MLP output>, summed over sites."""
    probed, found = Probed(work), {}
    with torch.enable_grad(), read_outputs(work.vlm, "down_proj", found.__setitem__):
        final = work.vlm.hidden(probed.embeds.detach().requires_grad_(True), probed.mask, probed.batch)
        outputs = [found[layer] for layer in range(work.vlm.n_layers)]
        gradients = torch.autograd.grad(probed.contrast(final, "logp").sum(), outputs)
    products = [((g.float() * x.detach().float()).sum(-1) * probed.sites).sum(1) for g, x in zip(gradients, outputs)]
    return {"effect": probed.by_pair(torch.stack(products, 1))}


# ---- causal tracing --------------------------------------------------------------------------------------------------


@own_pass
@torch.no_grad()
def tracing(work: Work) -> dict[str, torch.Tensor]:
    """``effect`` [n,L]: rise of the contrast of p when the layer's MLP is put back to its clean output while the model
    reads a grey image."""
    vlm, probed = work.vlm, Probed(work)
    sites = probed.sites[:, probed.cut :]
    clean: dict[int, torch.Tensor] = {}
    with read_outputs(vlm, "down_proj", clean.__setitem__):
        vlm.hidden(probed.embeds, probed.mask, probed.batch)
    grey = work.evidence.grey.to(work.batch.features).expand_as(work.batch.features)
    inputs, final = probed.inputs(vlm.embed(replace(work.batch, features=grey))[probed.rows])
    base, effects = probed.contrast(final, "p")[0], []

    def restored(layer, x):
        return torch.where(sites[..., None], clean[layer][:, probed.cut :], x)

    for layer, h in enumerate(inputs):
        with replaced_outputs(vlm, "down_proj", restored, [layer]):
            effects.append(probed.contrast(probed.tail(layer, h), "p")[0] - base)
    return {"effect": probed.by_pair(torch.stack(effects, 1))}


# ---- heads -----------------------------------------------------------------------------------------------------------


@own_pass
@torch.no_grad()
def head_ablation(work: Work) -> dict[str, torch.Tensor]:
    """``effect`` [n,L,H]: fall of the contrast of p when a head's output is zero (AD-HH). All heads of a layer in
    one batch, from that layer on: H (L + 1) / 2 forward passes a sequence instead of H L."""
    probed, vlm = Probed(work), work.vlm
    inputs, final = probed.inputs(probed.embeds)
    base, falls, sites = probed.contrast(final, "p")[0], [], probed.sites[:, probed.cut :]
    width = max(1, work.settings.max_rows // max(1, len(probed.rows)))
    for layer, h in enumerate(inputs):
        for chunk in torch.arange(vlm.n_heads, device=h.device).split(width):
            kept = (torch.arange(vlm.n_heads, device=h.device) != chunk[:, None]).repeat_interleave(len(h), 0)
            kept = kept[:, None, :, None] | ~sites.repeat(len(chunk), 1)[:, :, None, None]

            def off(_, o, kept=kept):
                return o * kept

            with replaced_heads(vlm, off, [layer]):
                falls.append(base - probed.contrast(probed.tail(layer, h.repeat(len(chunk), 1, 1)), "p"))
    effect = torch.cat(falls).unflatten(0, (vlm.n_layers, vlm.n_heads)).permute(2, 0, 1)
    return {"effect": probed.by_pair(effect)}


@own_pass
def head_gradient(work: Work) -> dict[str, torch.Tensor]:
    """Inner products [n,L,H] of the gradient of the contrast of p with the head output (``effect``), and with what it
    takes from the ``image`` and from the ``text``, summed over sites."""
    vlm, probed, heads, parts = work.vlm, Probed(work), {}, {}
    layers = range(vlm.n_layers)
    # replaced by themselves: a view that is only read is not on the way to the loss
    keep = replaced_heads(vlm, heads.setdefault, layers)
    read = read_parts(vlm, parts.__setitem__, work.image[probed.rows])
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


@own_pass
@torch.no_grad()
def blind_heads(work: Work) -> dict[str, torch.Tensor]:
    """``divergence`` [n,L,H]: distance of a head's output with and without the image (its positions hidden), averaged
    over the compared positions of both answers without outliers."""
    vlm, with_image, found = work.vlm, {}, {}
    weight = work.weight.gather(1, work.positions)

    def pick(o: torch.Tensor) -> torch.Tensor:
        return o.gather(1, work.positions[:, :, None, None].expand(-1, -1, *o.shape[2:]))

    def compare(layer: int, o: torch.Tensor) -> None:
        distance = (pick(o) - with_image.pop(layer)).float().norm(dim=-1)
        found[layer] = robust_mean(distance, weight, OUTLIER).cpu()

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
