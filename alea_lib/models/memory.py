"""What a model, an edit and its files take: bytes counted from a configuration, before anything is loaded.

Imports no torch. A hub model's configuration is read from ``data/shapes``, so that nothing is downloaded. Tests compare
the counts with models that are really built, and with LLaVA-1.5-7B's on torch's meta device.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..core.paths import RunError, root

HALF, FULL = 2, 4  # bytes of a number
BLOCK, NESTED = 64, 256  # numbers that share a scale in NF4, and scales that share one when quantised twice
CONTEXT = 600 << 20  # what CUDA itself takes, and what a step uses for a moment: assumed, not counted
MASTERS = {"adamw": 5, "sgd": 3}  # fp32 copies of a trained matrix: the base's, the master, its gradient, the moments
ITEMS = 1500  # pairs of the paper's edit


@dataclass(frozen=True)
class Shape:
    """Sizes of a vision-language model with a Llama-like decoder and a CLIP tower. ``places``: image positions."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_width: int  # of the keys: a head's width times the heads of keys and values
    vocabulary: int
    tied: bool
    places: int
    vision_layers: int
    vision_width: int
    vision_mlp: int
    patch: int
    patches: int  # of the tower, its class token not counted


def read_shape(model: str) -> Shape:
    """The shape of a model by key, folder or hub name. RunError with what to do when its configuration is not there."""
    places = (root() / "data" / "models" / model, Path(model), root() / "data" / "shapes" / f"{Path(model).name}.json")
    for path in places:
        found = path / "config.json" if path.is_dir() else path
        if found.is_file():
            return shape(json.loads(found.read_text(encoding="utf-8")))
    raise RunError(f"the sizes of {model} are not known: save its config.json as data/shapes/{Path(model).name}.json")


def shape(config: dict) -> Shape:
    """The shape in a LLaVA-like configuration. RunError names what the configuration lacks."""
    try:
        text, vision = config["text_config"], config["vision_config"]
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        heads = text["num_attention_heads"]
        return Shape(
            layers=text["num_hidden_layers"],
            width=text["hidden_size"],
            mlp=text["intermediate_size"],
            heads=heads,
            kv_width=text["hidden_size"] // heads * (text.get("num_key_value_heads") or heads),
            vocabulary=text["vocab_size"],
            tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            places=config.get("image_seq_length") or patches,
            vision_layers=vision["num_hidden_layers"],
            vision_width=vision["hidden_size"],
            vision_mlp=vision["intermediate_size"],
            patch=vision["patch_size"],
            patches=patches,
        )
    except KeyError as error:
        raise RunError(f"the sizes cannot be read: the configuration has no {error}; see data/shapes") from None


# ---- parameters ------------------------------------------------------------------------------------------------------


def matrices(s: Shape) -> dict[str, int]:
    """Numbers in each linear matrix of one decoder layer."""
    square, key = s.width * s.width, s.width * s.kv_width
    mlp = s.width * s.mlp
    return {"q_proj": square, "k_proj": key, "v_proj": key, "o_proj": square, "gate_proj": mlp, "up_proj": mlp,
            "down_proj": mlp}  # fmt: skip


def parameters(s: Shape) -> dict[str, int]:
    """Numbers in each part of the model; ``decoder`` are the linear matrices of all its layers."""
    d, m = s.vision_width, s.vision_mlp
    tower_layer = 4 * (d * d + d) + 2 * d * m + m + d + 4 * d
    tower = 3 * s.patch**2 * d + d + (s.patches + 1) * d + 4 * d + s.vision_layers * tower_layer
    return {
        "decoder": s.layers * sum(matrices(s).values()),
        "norms": (2 * s.layers + 1) * s.width,
        "embeddings": s.vocabulary * s.width,
        "head": 0 if s.tied else s.vocabulary * s.width,
        "vision": tower,
        "projector": d * s.width + s.width + s.width * s.width + s.width,
    }


def nf4_bytes(numbers: int) -> int:
    """A matrix in NF4 with double quantisation, its scales and code tables included."""
    scales = -(-numbers // BLOCK)
    return -(-numbers // 2) + scales + FULL * (-(-scales // NESTED)) + FULL * (1 + 16 + 256)


def model_bytes(s: Shape, four_bit: bool, edited: int = 0, each: int = HALF) -> int:
    """The loaded model. ``four_bit``: the decoder's matrices in NF4 but for the down-projections of ``edited`` layers;
    the rest in ``each`` bytes a number."""
    counts = parameters(s)
    whole = sum(counts.values())
    if not four_bit:
        return whole * each
    layer = matrices(s)
    packed = s.layers * sum(nf4_bytes(n) for n in layer.values()) - edited * nf4_bytes(layer["down_proj"])
    return (whole - counts["decoder"] + edited * layer["down_proj"]) * each + packed


# ---- an edit ---------------------------------------------------------------------------------------------------------


def trained_bytes(s: Shape, layers: int, rank: int = 0, optimiser: str = "adamw") -> int:
    """What an edit of so many down-projections adds: masters, gradients, moments, and the base's weights in fp32."""
    numbers = matrices(s)["down_proj"]
    if not rank:
        return layers * numbers * FULL * MASTERS[optimiser]
    factors = rank * (numbers // s.width + s.width)
    # the base's own, and its sum with the product
    return layers * FULL * (2 * numbers + (MASTERS[optimiser] - 1) * factors)


def activation_bytes(s: Shape, layers: int, tokens: int, batch: int = 1, trained: int = 0, each: int = HALF) -> int:
    """What autograd keeps for a step through ``layers`` decoder layers of frozen matrices; ``trained`` of them keep
    the input of their down-projection too. Attention by sdpa, no checkpointing."""
    attention = (2 * s.width + 2 * s.kv_width) * each + FULL * s.heads
    norms = 2 * (s.width + 1) * FULL
    return batch * tokens * (layers * (attention + norms + 3 * s.mlp * each) + trained * s.mlp * each)


def logits_bytes(s: Shape, positions: int) -> int:
    """Logits of the scored positions in fp32: softmax, loss and their gradients hold four copies at once."""
    return positions * s.vocabulary * FULL * 4


def prefix_bytes(s: Shape, length: int) -> int:
    """A soft prefix with its gradient and moments, fp32."""
    return length * s.width * FULL * 4


def kl_reference_bytes() -> dict[str, int]:
    """Memory of the KL's reference for the paper's edit of LLaVA-1.5-7B: final states of 200 tokens an answer, against
    their logits."""
    width, count = 4096, ITEMS * 200 * HALF
    return {"states": count * width, "logits": count * 32064, "inputs": cache_bytes(ITEMS, 876, width)}


def cache_bytes(items: int, tokens: int, width: int, each: int = HALF) -> int:
    """Memory of captured inputs: e.g. 1,500 items of 876 positions at width 4096 in half precision take 10.8 GB."""
    return items * tokens * width * each


def kv_bytes(s: Shape, tokens: int, sequences: int = 1, each: int = HALF) -> int:
    """Keys and values of all layers while an answer is written."""
    return 2 * s.layers * s.kv_width * each * tokens * sequences


def features_bytes(s: Shape, images: int, each: int = HALF) -> int:
    """Image features, on disk or in memory."""
    return images * s.places * s.width * each


# ---- whole steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a model is loaded and edited, as far as memory depends on it. ``edited``: layers whose down-projection is
    trained; ``first``: the lowest of them; ``unquantised``: layers whose down-projection is not packed (an edit
    needs its own). ``tokens``: of a sequence, ``answer`` of them scored."""

    four_bit: bool = True
    edited: int = 4
    first: int = 28
    unquantised: int = 32
    batch: int = 1
    tokens: int = 750
    answer: int = 130
    answers: int = 2  # of an image that the adversary compares
    prefix_length: int = 5
    write_batch: int = 8
    max_new_tokens: int = 512
    each: int = HALF


def edit_peak(s: Shape, p: Plan) -> int:
    """Largest memory of a step of the edit: model, trained matrices and one term's graph."""
    graph = activation_bytes(s, s.layers - p.first, p.tokens, p.batch, p.edited, p.each)
    own = trained_bytes(s, p.edited) + p.edited * matrices(s)["down_proj"] * p.each
    return _loaded(s, p) + own + graph + logits_bytes(s, p.batch * p.answer)


def prefix_peak(s: Shape, p: Plan) -> int:
    """Largest memory of a step of the adversary: its gradient passes through all layers, but only through prefix and
    answer; the keys and values of what stands before are there twice, as read and joined to the answer's."""
    rows = p.batch * p.answers
    graph = activation_bytes(s, s.layers, p.answer + p.prefix_length, rows, each=p.each)
    graph += kv_bytes(s, p.tokens - p.answer, 2 * rows, p.each)
    return _loaded(s, p) + graph + prefix_bytes(s, p.prefix_length) + logits_bytes(s, rows * p.answer)


def write_peak(s: Shape, p: Plan) -> int:
    """Largest memory while answers are written."""
    length = p.tokens - p.answer + p.max_new_tokens
    return _loaded(s, p) + kv_bytes(s, length, p.write_batch, p.each) + logits_bytes(s, p.write_batch)


def _loaded(s: Shape, p: Plan) -> int:
    return model_bytes(s, p.four_bit, p.unquantised, each=p.each) + CONTEXT


def peak(s: Shape, p: Plan) -> dict[str, int]:
    """Bytes of GPU memory by step."""
    return {"write": write_peak(s, p), "prefix": prefix_peak(s, p), "edit": edit_peak(s, p)}
