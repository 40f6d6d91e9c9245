"""Nullu (Yang et al. 2025): the directions in which hallucinated and grounded answers differ are taken out of what the
MLPs of the upper layers write. A weight edit without training: two forward passes a pair, one decomposition a layer."""

from dataclasses import asdict, dataclass

import pandas as pd
import torch

from ..locate.evidence import Evidence
from ..locate.settings import LocateSettings
from ..models.delta import Delta, factors_delta
from ..models.hooks import full_weight
from ..models.vlm import VLM
from .common import at_depth
from .registry import Baseline, register


@dataclass(frozen=True)
class NulluSettings:
    """``rank``: directions a layer; a direction is one in a model of any width, so the published 4 are kept. ``first``:
    the lowest edited layer of a model with 32."""

    rank: int = 4
    first: int = 16


def fit_nullu(vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, settings: NulluSettings) -> Delta:
    """The edit, of low rank; the model is left bit-equal.

    d [N,D]: state after the layer, mean over the negative's tokens, minus the same of the positive; V [D,rank]: right
    singular vectors of d, the largest first; the layer's down-projection W [D,M] becomes (1 - V V^T) W. ``features``
    [N,P,D] and ``pairs`` (positive, negative, wrong) are of the same images. ValueError for a rank that the pairs do
    not have.
    """
    limit = min(len(pairs), vlm.model.config.get_text_config().hidden_size)
    if not 0 <= settings.rank <= limit:
        raise ValueError(f"rank is {settings.rank}: {len(pairs)} pairs of this model have 0 to {limit} directions")
    states = Evidence(vlm, features, pairs, LocateSettings())["states"]
    difference = torch.as_tensor(states["negative"] - states["positive"]).double()
    factors = {}
    for layer in range(at_depth(settings.first, vlm.n_layers), vlm.n_layers) if settings.rank else ():
        name = vlm.address("down_proj", layer)
        directions = torch.linalg.svd(difference[:, layer], full_matrices=False).Vh[: settings.rank]
        directions = directions.float().to(vlm.device)
        factors[name] = (-directions.T, directions @ full_weight(vlm, name))
    return factors_delta(vlm, factors, {"nullu": asdict(settings)})


GRID = ({}, {"rank": 1}, {"rank": 2}, {"rank": 8}, {"rank": 16})
register(
    Baseline("nullu", "delta", fit_nullu, NulluSettings(), GRID,
             "directions of the pairs taken out of down-projections", "Nullu: Yang et al. 2025 (CVPR)")
)  # fmt: skip
