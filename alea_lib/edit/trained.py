"""What an edit trains: copies of whole matrices, columns of heads, or low-rank factors; the model is not touched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..models.delta import Delta, delta_of, factors_delta
from ..models.hooks import full_weight
from ..models.vlm import VLM
from .settings import EditSettings


@dataclass(frozen=True)
class Trained:
    """``own``: module name -> the base's weight, fp32 [out,in]. ``parameters``: what the optimiser steps, by name.
    ``columns``: module name -> indices of the columns that are trained. ``first``: the lowest edited layer."""

    own: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    columns: dict[str, torch.Tensor]
    rank: int
    first: int

    def weights(self) -> dict[str, torch.Tensor]:
        """Module name -> the weight [out,in] to compute with now, with its gradient path to the parameters."""
        out = {}
        for name, own in self.own.items():
            if self.rank:
                out[name] = own + self.parameters[f"{name}.B"] @ self.parameters[f"{name}.A"]
            elif name in self.columns:
                out[name] = own.index_copy(1, self.columns[name], self.parameters[name].to(own.dtype))
            else:
                out[name] = self.parameters[name]
        return out

    def finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.parameters.values())

    def delta(self, vlm: VLM, info: dict) -> Delta:
        """The change so far, low-rank factors kept as such."""
        if not self.rank:
            return delta_of(vlm, self.weights(), info)
        pairs = {n: (self.parameters[f"{n}.B"], self.parameters[f"{n}.A"]) for n in self.own}
        return factors_delta(vlm, pairs, info)


def trained(vlm: VLM, settings: EditSettings) -> Trained:
    """Copies of what the settings name. ValueError for a layer or head that the model lacks."""
    columns: dict[str, torch.Tensor] = {}
    if settings.modules == "o_proj":
        columns = head_columns(vlm, settings.heads)
        names, layers = list(columns), [layer for layer, _ in settings.heads]
    else:
        layers = list(settings.layers)
        names = [n for layer in layers for n in _matrices(vlm, settings.modules, layer)]
    own = {n: full_weight(vlm, n) for n in names}
    if settings.rank:
        parameters = _factors(own, settings)
    else:
        dtype = torch.float16 if settings.master_dtype == "fp16" else torch.float32
        parameters = {n: (w[:, columns[n]] if n in columns else w).to(dtype, copy=True) for n, w in own.items()}
    for p in parameters.values():
        p.requires_grad_(True)
    return Trained(own, parameters, columns, settings.rank, min(layers))


def _matrices(vlm: VLM, modules: str, layer: int) -> list[str]:
    if modules == "down_proj":
        return [vlm.address("down_proj", layer)]
    found = vlm.module("layer", layer).named_modules()
    return [f"{vlm.address('layer', layer)}.{n}" for n, m in found if isinstance(m, nn.Linear)]


def head_columns(vlm: VLM, heads: tuple[tuple[int, int], ...]) -> dict[str, torch.Tensor]:
    """o_proj module name -> columns that the heads of its layer feed, ascending."""
    out: dict[str, list[int]] = {}
    for layer, head in heads:
        name = vlm.address("o_proj", layer)
        if not 0 <= head < vlm.n_heads:
            raise ValueError(f"head {head} is out of range: {vlm.key} has heads 0 to {vlm.n_heads - 1}")
        width = vlm.model.get_submodule(name).in_features // vlm.n_heads
        out.setdefault(name, []).extend(range(head * width, (head + 1) * width))
    return {n: torch.tensor(sorted(set(c)), device=vlm.device) for n, c in sorted(out.items())}


def _factors(own: dict[str, torch.Tensor], settings: EditSettings) -> dict[str, torch.Tensor]:
    """A uniform in +-1/sqrt(in), as peft starts it, B zero: the first edited model is the base."""
    generator = torch.Generator().manual_seed(settings.seed)
    out = {}
    for name, w in own.items():
        if settings.rank > min(w.shape):
            raise ValueError(f"rank {settings.rank} is more than {name} has: {min(w.shape)}")
        a = (torch.rand(settings.rank, w.shape[1], generator=generator) * 2 - 1) / w.shape[1] ** 0.5
        out[f"{name}.A"], out[f"{name}.B"] = a.to(w.device), torch.zeros(w.shape[0], settings.rank, device=w.device)
    return out
