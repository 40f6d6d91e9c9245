"""Hand-made models whose guilty layer and head are known by construction.

Every projection is zero but what the tests set. Dimensions of the residual stream: 0 = "this is text", 1 = "this is an
image patch", 2 = logit of wrong objects, 3 = logit of truthful ones, 4 = written by attention, 5 = "a word that only
negatives hold", 6 = "this is the first patch". Features of a picture are ``picture``; a grey one gives zeros.
"""

import torch
from conftest import build_tiny

TEXT, IMAGE, WRONG, RIGHT, CARRIED, BAD, FIRST = range(7)
POSITIVE, NEGATIVE = " There is a cup.", " There is a dog."
PATCHES = 36


def blank_model():
    """Four layers of four heads that do nothing; " dog" is told by WRONG, " cup" by RIGHT."""
    vlm = build_tiny()
    layers = vlm.language_model.layers
    word = {w: vlm.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in ("dog", "cup")}
    with torch.no_grad():
        for module in [*vlm.model.model.multi_modal_projector.modules()]:
            if isinstance(module, torch.nn.Linear):
                module.weight.zero_(), module.bias.zero_()
        for layer in layers:
            for p in layer.parameters():
                if p.dim() > 1:
                    p.zero_()
        table, head = vlm.model.get_input_embeddings().weight, vlm.head.weight
        table.zero_(), head.zero_()
        table[:, TEXT] = 1.0
        table[word["dog"], BAD] = 1.0
        head[word["dog"], WRONG], head[word["cup"], RIGHT] = 1.0, 1.0
    return vlm


def picture(n: int = 1) -> torch.Tensor:
    """Features [n,P,64] of n pictures: patches are patches, the first one is first, and none is text."""
    x = torch.zeros(n, PATCHES, 64)
    x[:, :, IMAGE] = 1.0
    x[:, 0, FIRST] = 1.0
    return x


@torch.no_grad()
def mlp_writes(vlm, layer: int, reads: int, writes: int, strength: float = 1.0) -> None:
    """The layer's MLP adds to ``writes`` where ``reads`` is on."""
    mlp = vlm.language_model.layers[layer].mlp
    mlp.gate_proj.weight[0, reads] = mlp.up_proj.weight[0, reads] = 1.0
    mlp.down_proj.weight[writes, 0] = strength


@torch.no_grad()
def head_writes(vlm, layer: int, head: int, reads: int, writes: int, strength: float = 1.0) -> None:
    """The head adds the average of ``reads`` over what it attends to (evenly, unless told otherwise) to ``writes``."""
    attention, at = vlm.language_model.layers[layer].self_attn, head * 16
    attention.v_proj.weight[at, reads] = 1.0
    attention.o_proj.weight[writes, at] = strength


@torch.no_grad()
def head_looks(vlm, layer: int, head: int, query: int, key: int, strength: float) -> None:
    """Positions where ``query`` is on attend to those where ``key`` is on (in the rotary pair that hardly turns)."""
    attention, at = vlm.language_model.layers[layer].self_attn, head * 16 + 7
    attention.q_proj.weight[at, query] = strength
    attention.k_proj.weight[at, key] = strength
