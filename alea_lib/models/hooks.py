"""Read or replace what happens inside a model, always undone at the end, also after an exception.

Addresses come from the family row (:mod:`alea_lib.models.families`); a site that never fired is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from .vlm import VLM

Take = Callable[[int, torch.Tensor], None]
Change = Callable[[int, torch.Tensor], torch.Tensor]
Layers = Iterable[int] | None  # None: all
Block = AbstractContextManager[None]


class SilentHook(RuntimeError):
    """A hook that was set but never reached: the module did not run in this forward pass."""


def read_outputs(vlm: VLM, part: str, take: Take, layers: Layers = None) -> Block:
    """Call ``take(layer, out)`` with the output [B,T,D] of a part (``layer``, ``down_proj``, ``o_proj``) of each layer;
    that of ``layer`` is before any final norm."""
    return _hooked(vlm, part, take, layers)


def read_layers(vlm: VLM, take: Take, layers: Layers = None) -> Block:
    """Call ``take(layer, h)`` with the output h [B,T,D] of each decoder layer."""
    return _hooked(vlm, "layer", take, layers)


def read_heads(vlm: VLM, take: Take, layers: Layers = None) -> Block:
    """Call ``take(layer, o)`` with the head outputs o [B,T,H,D/H] of each layer, before ``o_proj`` mixes them."""
    return _hooked(vlm, "o_proj", take, layers, heads=True)


def replaced_outputs(vlm: VLM, part: str, change: Change, layers: Iterable[int]) -> Block:
    """Let the part of these layers give ``change(layer, out)`` [B,T,D] instead of its output ``out``."""
    return _hooked(vlm, part, change, layers, replaces=True)


def replaced_heads(vlm: VLM, change: Change, layers: Iterable[int]) -> Block:
    """Let ``o_proj`` of these layers read ``change(layer, o)`` [B,T,H,D/H] instead of the head outputs ``o``."""
    return _hooked(vlm, "o_proj", change, layers, heads=True, replaces=True)


@contextmanager
def _hooked(vlm: VLM, part: str, call, layers: Layers, heads: bool = False, replaces: bool = False) -> Iterator[None]:
    """``call(layer, x)`` with the output of a part of each layer, or with its input by ``heads``; ``replaces``: what it
    returns takes the place of x."""
    wanted, fired = range(vlm.n_layers) if layers is None else list(layers), set()

    def before(layer: int, x: torch.Tensor):
        fired.add(layer)
        new = call(layer, x.unflatten(-1, (vlm.n_heads, -1)))
        return new.flatten(-2) if replaces else None

    def after(layer: int, x: torch.Tensor):
        fired.add(layer)
        new = call(layer, x)
        return new if replaces else None

    with ExitStack() as stack:
        for layer in wanted:
            module = vlm.module(part, layer)
            if heads:
                handle = module.register_forward_pre_hook(lambda _, args, layer=layer: before(layer, args[0]))
            else:
                handle = module.register_forward_hook(lambda _, args, x, layer=layer: after(layer, x))
            stack.callback(handle.remove)
        yield
        if silent := sorted(set(wanted) - fired):
            raise SilentHook(f"{part} of layers {silent} of {vlm.key} did not run: run a forward pass inside the block")


@contextmanager
def _forward_replaced(modules: dict[torch.nn.Module, Callable]) -> Iterator[None]:
    """Let modules run other functions; afterwards each has the forward back that it had before, be it its class's."""
    with ExitStack() as stack:
        for module, forward in modules.items():
            if "forward" in module.__dict__:
                stack.callback(setattr, module, "forward", module.forward)
            else:
                stack.callback(module.__dict__.pop, "forward", None)
            module.forward = forward
        yield


@contextmanager
def started_at(vlm: VLM, layer: int, h: torch.Tensor) -> Iterator[None]:
    """Let the language model run from ``layer`` on, with ``h`` [B,T,D] as that layer's input.

    The layers below are passed over, whatever embeddings of the same shape go in; masks, positions and the final norm
    are the model's own, so the result equals a whole pass in which ``h`` came out of the layers below.
    """

    with _forward_replaced({vlm.module("layer", i): _PassedOver(h) for i in range(layer)}):
        yield


@dataclass(frozen=True)
class _PassedOver:
    """The forward of a layer that is passed over, whatever goes in."""

    h: torch.Tensor

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        return self.h


@contextmanager
def counted(vlm: VLM) -> Iterator[SimpleNamespace]:
    """Count the sequences that pass through the language model: ``forwards`` and ``backwards``, layer by layer, so that
    a pass through half of the layers is half a pass."""
    count = SimpleNamespace(forwards=0.0, backwards=0.0)

    def hook(module, args, output):
        if isinstance(module.forward, _PassedOver):
            return
        count.forwards += len(output) / vlm.n_layers
        if output.requires_grad:
            output.register_hook(lambda g: setattr(count, "backwards", count.backwards + len(g) / vlm.n_layers))

    with ExitStack() as stack:
        for layer in range(vlm.n_layers):
            stack.callback(vlm.module("layer", layer).register_forward_hook(hook).remove)
        yield count


@contextmanager
def replaced_linear(vlm: VLM, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let linear modules compute with other weights, {module name: [out, in]}; the model's own stay untouched.

    The weights may be fp32 leaf tensors that require grad (master copies), whatever the model's dtype or
    quantisation: they are cast to the input's dtype at each call. Blocks may be nested; of two weights for one module
    the inner one counts.
    """

    forwards = {}
    for name, weight in weights.items():
        module = vlm.model.get_submodule(name)
        forwards[module] = partial(_linear, weight=weight, bias=module.bias)
    with _forward_replaced(forwards):
        yield


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype), bias)


def full_weight(vlm: VLM, name: str) -> torch.Tensor:
    """A detached fp32 copy of a linear module's weight [out, in], dequantised where the base is 4-bit."""
    weight = vlm.model.get_submodule(name).weight
    if weight.dtype == torch.uint8:
        import bitsandbytes

        weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.detach().float().clone()


def read_attention(vlm: VLM, take: Take, rows: torch.Tensor) -> Block:
    """Call ``take(layer, p)`` with the attention p [B,H,R,K] of the query positions ``rows`` [B,R] of each layer.

    The output still comes from the fused kernel; only these rows' softmax is computed beside it, one layer at a time.
    """

    def attend(module, query, key, value, mask, scaling, fused):
        take(module.layer_idx, _row_scores(module, query, key, mask, scaling, rows).softmax(-1))
        return fused(query, key, value, mask)

    return _attention(vlm, attend)


def read_parts(vlm: VLM, take: Take, keys: torch.Tensor) -> Block:
    """Call ``take(layer, part)`` with what the key positions ``keys`` [B,K] bool add to the head outputs, [B,T,H,D/H].

    Head outputs are sums over keys of attention times value; the rest of the sum is the head output minus the part.
    The part is detached from any graph.
    """

    def attend(module, query, key, value, mask, scaling, fused):
        with torch.no_grad():
            take(module.layer_idx, fused(query, key, value * keys[:, None, :, None], mask))
        return fused(query, key, value, mask)

    return _attention(vlm, attend)


def weighed_attention(
    vlm: VLM, weigh: Callable[[int, torch.Tensor], torch.Tensor | None], layers: Layers = None
) -> Block:
    """Let the last position of each pass attend with the weights ``weigh(layer, scores)`` [B,H,K] in these layers.

    ``scores`` [B,H,K]: its scaled products with all keys, those in the cache first, fp32, masked ones -inf or near it.
    Their softmax as weights changes nothing; weights need not sum to 1; None leaves a layer of a pass as it is. The
    other positions of a prompt come from the fused kernel. While writing with padding on the left, the last position
    is the newest token's.
    """
    wanted = range(vlm.n_layers) if layers is None else list(layers)

    def attend(module, query, key, value, mask, scaling, fused):
        weights, last = None, query.shape[2] - 1
        if module.layer_idx in wanted:
            rows = torch.full((len(query), 1), last, device=query.device)
            weights = weigh(module.layer_idx, _row_scores(module, query, key, mask, scaling, rows)[:, :, 0])
        if weights is None:
            return fused(query, key, value, mask)
        new = (weights.to(value.dtype)[:, :, None] @ _for_each_query_head(module, value)).transpose(1, 2)
        return torch.cat([fused(query, key, value, mask)[:, :last], new], 1) if last else new

    return _attention(vlm, attend)


@contextmanager
def _attention(vlm: VLM, attend: Callable) -> Iterator[None]:
    """Let ``attend`` give the head outputs [B,T,H,D/H] of the language model's attention.

    Its arguments: module, query [B,H,T,D/H], key, value, mask, scaling, and the function ``fused`` of the four in the
    middle that the block was entered with, so that blocks may be nested.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = vlm.model.config.get_text_config()._attn_implementation
    own, fired = f"alea_{before}", set()
    under = ALL_ATTENTION_FUNCTIONS[before] if before.startswith("alea_") else sdpa_attention_forward

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        def fused(q, k, v, mask):
            return under(module, q, k, v, mask, dropout=dropout, scaling=scaling, **kwargs)[0]

        fired.add(module.layer_idx)
        return attend(module, query, key, value, attention_mask, scaling, fused), None

    # Without a mask function of the same name the mask would silently be None: padded rows come out wrong.
    ALL_ATTENTION_FUNCTIONS.register(own, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(own, sdpa_mask)
    vlm.model.set_attn_implementation({"text_config": own})
    try:
        yield
    finally:
        vlm.model.set_attn_implementation({"text_config": before})
    if not fired:
        raise SilentHook(f"no attention of {vlm.key} ran: run a forward pass inside the block")


def _row_scores(module, query, key, mask, scaling: float, rows: torch.Tensor) -> torch.Tensor:
    """Scaled products of the chosen query rows [B,R] with all keys, masked, fp32 [B,H,R,K]."""
    key = _for_each_query_head(module, key).float()
    index = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    scores = query.gather(2, index).float() @ key.transpose(2, 3) * scaling
    if mask is None:  # the rows are the last ones of all positions: those before them are in the cache
        cached = key.shape[2] - query.shape[2]
        allowed = torch.arange(key.shape[2], device=rows.device) <= rows[:, None, :, None] + cached
    else:
        allowed = mask.expand(len(rows), -1, -1, -1).gather(2, rows[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
        if allowed.dtype != torch.bool:
            return scores + allowed
    return scores.masked_fill(~allowed, float("-inf"))


def _for_each_query_head(module, x: torch.Tensor) -> torch.Tensor:
    """Keys or values [B,G,K,D/H] of shared heads, repeated to one a query head, [B,H,K,D/H]."""
    return x.repeat_interleave(getattr(module, "num_key_value_groups", 1), dim=1)
