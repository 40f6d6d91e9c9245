"""Sequences whose named objects are looked at: their contrast, and passes that start at any layer."""

from __future__ import annotations

import torch

from ..models.hooks import read_layers, started_at
from .evidence import Work


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
        first = work.batch.answer[self.rows, None] - 1
        self.answer = torch.arange(self.mask.shape[1], device=first.device) >= first
        self.sites, self.cut = self.mask.bool(), 0
        if work.settings.sites == "answer":
            self.sites, self.cut = self.sites & self.answer, int(first.min())
        self.cache = None

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
            layer.keys, layer.values = layer.keys[:, :, : self.cut], layer.values[:, :, : self.cut]

        def update(keys, values, layer, *args, **kwargs):
            own = cache.layers[layer]
            times = len(keys) // len(own.keys)
            before = (x.repeat(times, 1, 1, 1) for x in (own.keys, own.values))
            return tuple(torch.cat([old, new], 2) for old, new in zip(before, (keys, values)))

        cache.update = update
        self.cache = cache
        return final

    def tail(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """Final states [m*k,T - cut,D] when ``layer`` reads ``h`` of that shape."""
        times = len(h) // len(self.mask)
        batch = self.batch.without_images(torch.arange(len(self.mask), device=h.device).repeat(times))
        with started_at(self.vlm, layer, h):
            return self.vlm.hidden(h, self.mask.repeat(times, 1), batch, self.cache, self.cut)
