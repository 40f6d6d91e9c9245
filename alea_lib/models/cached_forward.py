"""Frozen-layer reuse: compute once what does not change, then run only the layers that do.

An edit of layer L and above leaves the input of L as it was. ``capture`` keeps that input for each item; ``run_tail``
runs the layers from L on, for the scored positions' logits. When only the last layer's down-projection is edited,
even its attention is frozen: ``capture_last`` keeps the residual and the MLP's activation at the scored positions,
and ``run_last`` is two matrix products. Gradients are those of the whole forward pass, but for the order of sums.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from .batch import target_mask
from .hooks import replaced_linear, started_at
from .vlm import VLM


@dataclass(frozen=True)
class Cached:
    """One item. ``states`` [t,D]: the input of the first edited layer; or, for the last layer's down-projection
    alone, [n,D] its residual at the scored positions beside ``activation`` [n,M]. ``scored`` [t] bool, ``labels``
    [n]: the positions whose logits count, and the tokens that they predict."""

    states: torch.Tensor
    labels: torch.Tensor
    scored: torch.Tensor | None = None
    activation: torch.Tensor | None = None


class _Reached(Exception):
    """The layer whose input is wanted."""


@torch.no_grad()
def layer_input(vlm: VLM, layer: int, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What enters a decoder layer, [B,T,D]; nothing above it is run."""

    def reached(_, args):
        raise _Reached(args[0])

    handle = vlm.module("layer", layer).register_forward_pre_hook(reached)
    try:
        vlm.hidden(embeds, mask)
    except _Reached as found:
        return found.args[0]
    finally:
        handle.remove()
    raise AssertionError(f"layer {layer} did not run")


def capture(vlm: VLM, layer: int, embeds: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> list[Cached]:
    """The inputs of ``layer`` for each item of a padded batch (either side), without padding."""
    h, wanted = layer_input(vlm, layer, embeds, mask), target_mask(labels)
    real = mask.bool()
    return [Cached(h[i, real[i]].clone(), labels[i, labels[i] != -100], wanted[i, real[i]]) for i in range(len(h))]


def run_tail(vlm: VLM, layer: int, items: list[Cached]) -> torch.Tensor:
    """Logits [n,V] at the scored positions of the items, in order, from layer ``layer`` on. Padded on the right."""
    h = torch.nn.utils.rnn.pad_sequence([c.states for c in items], batch_first=True)
    mask = torch.zeros(h.shape[:2], dtype=torch.int64, device=h.device)
    wanted = torch.zeros_like(mask, dtype=torch.bool)
    for i, item in enumerate(items):
        mask[i, : len(item.states)] = 1
        wanted[i, : len(item.states)] = torch.as_tensor(item.scored)
    with started_at(vlm, layer, h):
        return vlm.head(vlm.hidden(h, mask)[wanted])


@torch.no_grad()
def capture_last(vlm: VLM, embeds: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> list[Cached]:
    """For an edit of the last layer's down-projection alone: its residual and its input at the scored positions."""
    last = vlm.n_layers - 1
    name, wanted, kept = vlm.address("down_proj", last), target_mask(labels), {}

    def residual(_, args, output):
        kept["residual"] = output[wanted].clone()

    def activation(_, args):
        kept["activation"] = args[0][wanted].clone()

    module = vlm.model.get_submodule(name)
    zero = torch.zeros(module.out_features, module.in_features, device=embeds.device)
    with ExitStack() as stack:
        stack.enter_context(replaced_linear(vlm, {name: zero}))  # what the layer gives without its MLP
        stack.callback(vlm.module("layer", last).register_forward_hook(residual).remove)
        stack.callback(module.register_forward_pre_hook(activation).remove)
        vlm.hidden(embeds, mask)
    sizes = wanted.sum(1).tolist()
    parts = zip(kept["residual"].split(sizes), kept["activation"].split(sizes), labels)
    return [Cached(r, row[row != -100], activation=a) for r, a, row in parts]


def run_last(vlm: VLM, items: list[Cached], weight: torch.Tensor) -> torch.Tensor:
    """Logits [n,V] with the last layer's down-projection ``weight`` [out,in]."""
    residual, activation = (torch.cat([getattr(c, k) for c in items]) for k in ("states", "activation"))
    h = residual + activation @ weight.to(activation.dtype).T
    return vlm.head(final_norm(vlm, h))


def final_norm(vlm: VLM, h: torch.Tensor) -> torch.Tensor:
    """The norm before the head, of states [n,D]: each its own sequence of one, with every layer passed over."""
    with started_at(vlm, vlm.n_layers, h[:, None]):
        return vlm.hidden(h[:, None], torch.ones(len(h), 1, dtype=torch.int64, device=h.device))[:, 0]
