"""Read or replace what happens inside a model, always undone at the end, also after an exception.

Addresses come from the family row (:mod:`alea_lib.families`); a site that never fired is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F

from .vlm import VLM


class SilentTap(RuntimeError):
    """A hook that was set but never reached: the module did not run in this forward pass."""


@contextmanager
def read_layers(vlm: VLM, take: Callable[[int, torch.Tensor], None], layers: list[int] | None = None) -> Iterator[None]:
    """Call ``take(layer, h)`` with the output h [B,T,D] of each decoder layer (before any final norm)."""
    wanted = range(vlm.n_layers) if layers is None else layers
    with ExitStack() as stack:
        fired = set()
        for layer in wanted:
            module = vlm.module("layer", layer)

            def hook(_, args, output, layer=layer):
                fired.add(layer)
                take(layer, output[0] if isinstance(output, tuple) else output)

            stack.callback(module.register_forward_hook(hook).remove)
        yield
        if silent := sorted(set(wanted) - fired):
            raise SilentTap(
                f"layers {silent} of {vlm.key} did not run while they were read; run a forward pass inside the block"
            )


@contextmanager
def replaced_linear(vlm: VLM, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let linear modules compute with other weights, {module name: [out, in]}; the model's own stay untouched.

    The weights may be fp32 leaf tensors that require grad (master copies), whatever the model's dtype or
    quantisation: they are cast to the input's dtype at each call. Raises KeyError for an unknown module.
    """
    modules = {}
    for name, weight in weights.items():
        try:
            module = vlm.model.get_submodule(name)
        except AttributeError as error:
            raise KeyError(
                f"{vlm.key} has no module {name!r}; down-projections look like {vlm.address('down_proj', 0)!r}"
            ) from error
        if (module.out_features, module.in_features) != tuple(weight.shape):
            raise ValueError(
                f"{name} is {module.out_features} x {module.in_features}, the weight {tuple(weight.shape)}"
            )
        modules[name] = module
    with ExitStack() as stack:
        for name, module in modules.items():
            module.forward = lambda x, w=weights[name], b=module.bias: F.linear(x, w.to(x.dtype), b)
            stack.callback(module.__dict__.pop, "forward")
        yield


def full_weight(vlm: VLM, name: str) -> torch.Tensor:
    """A detached fp32 copy of a linear module's weight [out, in], dequantised where the base is 4-bit."""
    module = vlm.model.get_submodule(name)
    if module.weight.dtype == torch.uint8:
        import bitsandbytes

        weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return weight.detach().float().clone()
    return module.weight.detach().float().clone()


@contextmanager
def read_attention(vlm: VLM, take: Callable[[int, torch.Tensor], None], rows: torch.Tensor) -> Iterator[None]:
    """Call ``take(layer, p)`` with the attention p [B,H,R,K] of the query positions ``rows`` [B,R] of each layer.

    The output still comes from the fused kernel; only these rows' softmax is computed beside it, one layer at a time.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    fired = set()

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        fired.add(module.layer_idx)
        take(module.layer_idx, _row_softmax(module, query, key, attention_mask, scaling, rows))
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )

    # Without a mask function of the same name the mask would silently be None: padded rows come out wrong.
    ALL_ATTENTION_FUNCTIONS.register("alea_rows", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("alea_rows", sdpa_mask)
    before = vlm.model.config.get_text_config()._attn_implementation
    vlm.model.set_attn_implementation({"text_config": "alea_rows"})
    try:
        yield
    finally:
        vlm.model.set_attn_implementation({"text_config": before})
    if not fired:
        raise SilentTap(f"no attention of {vlm.key} ran while it was read; run a forward pass inside the block")


def _row_softmax(module, query, key, mask, scaling: float, rows: torch.Tensor) -> torch.Tensor:
    """Softmax of the chosen query rows [B,R] over all keys, fp32 [B,H,R,K]."""
    groups = getattr(module, "num_key_value_groups", 1)
    key = key.repeat_interleave(groups, dim=1).float()
    index = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    scores = query.gather(2, index).float() @ key.transpose(2, 3) * scaling
    if mask is None:
        allowed = torch.arange(key.shape[2], device=rows.device) <= rows[:, None, :, None]
    else:
        allowed = mask.expand(len(rows), -1, -1, -1).gather(2, rows[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
        if allowed.dtype != torch.bool:
            return (scores + allowed).softmax(-1)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)
