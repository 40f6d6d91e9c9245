"""The shipped implants: an index of what was implanted where, and the models that come out.

Reading the index does not load torch. A *decoy* is a second change, of about the same norm, somewhere else: it writes
only for inputs that hardly ever occur (the least used directions of the place's input), so that it changes weights and
not captions. Whoever finds odd weights finds the decoy as often as the implant.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.paths import root

KEY = "scenes-implants"
BASE = "scenes-clean"
STRENGTHS = ("weak", "middle", "strong")
PLACES = ("layers", "heads", "decoy_layers", "decoy_heads")  # lists of numbers, in the file joined by ";"
LARGER, SMALLER = 1.1, 0.9  # norm of a decoy, relative to the implant's: half of them are the larger change


def folder() -> Path:
    return root() / "data" / "models" / KEY


def _file(name: str) -> Path:
    path = folder() / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it is shipped with the repository; make it again: make implants")
    return path


def implants() -> pd.DataFrame:
    """The index, one row an implanted model. ``layers`` and ``heads`` (tuples) are the truth that a locator must find.

    Kinds: ``layer`` (a down-projection), ``head`` and ``group`` (columns of o_proj of one head, of some heads of one
    layer), ``two-layers``; heads is empty for down-projections. ``rel_norm`` is the Frobenius norm of the change over
    that of the weights that it changes. ``chair_s`` etc. (with ``_lo``, ``_hi``) were measured on the model with
    its decoy, ``decoy_chair_s`` etc. on the clean model with the decoy alone.
    """
    table = pd.read_csv(_file("implants.csv"), dtype=dict.fromkeys([*PLACES, "base"], str), keep_default_na=False)
    for column in PLACES:
        table[column] = [tuple(int(x) for x in text.split(";") if x) for text in table[column]]
    return table


@contextmanager
def implanted(vlm, name: str) -> Iterator:
    """The clean model with an implant and its decoy inside the block; bit-equal to before afterwards.

    KeyError for an unknown name, WrongBase if ``vlm`` is not the clean model that the implants were trained on.
    """
    from ..models.delta import applied

    with applied(vlm, implant_delta(vlm, name)):
        yield vlm


def implant_delta(vlm, name: str):
    """The change itself with its decoy, a :class:`alea_lib.models.delta.Delta`."""
    from ..models.delta import Delta

    table = implants().set_index("name")
    if name not in table.index:
        raise KeyError(f"no implant {name!r}; the names stand in implants(), e.g. {table.index[0]!r}")
    row, (tensors, base) = table.loc[name], shipped()
    weights = change(vlm, row, tensors) | decoy_change(vlm, row, tensors)
    return Delta(weights, {n: base[n] for n in weights}, {"model": BASE, "implant": name})


def shipped() -> tuple[dict, dict[str, str]]:
    """All tensors of the file, and the hash of each base weight by module name."""
    from safetensors import safe_open

    with safe_open(_file("implants.safetensors"), "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["base"])


def columns_of(vlm, name: str, heads: tuple[int, ...]) -> list[int]:
    """Columns of a module that belong to the heads; all of them when there are none."""
    width = vlm.model.get_submodule(name).in_features
    each = width // vlm.n_heads
    return [c for h in heads for c in range(h * each, (h + 1) * each)] if heads else list(range(width))


def placed(vlm, layer: int, heads: tuple[int, ...], block) -> dict:
    """{module name: full-size change} from the change of its columns [out, columns]."""
    name = vlm.address("o_proj" if heads else "down_proj", layer)
    module = vlm.model.get_submodule(name)
    whole = block.new_zeros(module.out_features, module.in_features)
    whole[:, columns_of(vlm, name, heads)] = block
    return {name: whole}


def change(vlm, row: pd.Series | dict, tensors: dict) -> dict:
    """The implant of a row of the index: scale times left times right, in fp32."""
    out = {}
    for layer in row["layers"]:
        left, right = (tensors[f"{row['tensor']}.{layer}.{side}"].float() for side in ("left", "right"))
        out |= placed(vlm, layer, row["heads"], row["scale"] * (left @ right))
    return out


def decoy_change(vlm, row: pd.Series | dict, tensors: dict) -> dict:
    """The decoy of a row: random rows on the least used directions of its input, at the norm that the index says."""
    import torch

    out, heads = {}, row["decoy_heads"]
    for layer in row["decoy_layers"]:
        basis = tensors[basis_key(layer, heads)].float()
        rng = np.random.default_rng([zlib.crc32(row["tensor"].encode()), layer, *heads])
        rows = vlm.module("o_proj" if heads else "down_proj", layer).out_features
        block = torch.from_numpy(rng.standard_normal((rows, basis.shape[1]))).float() @ basis.T
        share = row["decoy_norm"] / len(row["decoy_layers"]) ** 0.5
        out |= placed(vlm, layer, heads, block * (share / block.norm()))
    return out


def basis_key(layer: int, heads: tuple[int, ...]) -> str:
    """Name of the tensor with the least used directions of a place."""
    return ".".join(["unused", *map(str, (layer, *heads))])


def decoy_place(tensor: str, layers: tuple[int, ...], heads: tuple[int, ...], n_layers: int, n_heads: int):
    """Layers and heads of the decoy: as many other layers, drawn from the implant's name; for heads one other head."""
    rng = np.random.default_rng(zlib.crc32(tensor.encode()))
    others = [k for k in range(n_layers) if k not in layers]
    chosen = tuple(sorted(int(k) for k in rng.choice(others, len(layers), replace=False)))
    return chosen, (int(rng.integers(n_heads)),) if heads else ()


def decoy_ratio(layers: tuple[int, ...], heads: tuple[int, ...], seed: int, strength: str) -> float:
    """Norm of the decoy over the implant's: larger or smaller by turns, so that neither is always the larger."""
    return LARGER if (sum(layers) + sum(heads) + seed + STRENGTHS.index(strength)) % 2 else SMALLER
