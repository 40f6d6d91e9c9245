"""VHR (He et al. 2025): heads whose output depends on the image are turned up; the first token says which."""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..models.batch import Batch
from ..models.hooks import replaced_heads
from ..models.vlm import VLM
from .common import Columns, at_depth
from .registry import Baseline, register


@dataclass(frozen=True)
class VhrSettings:
    """``alpha``: factor of the chosen heads' outputs. ``share``: of a layer's heads that are chosen, at least one.
    ``layers``: of a model with 32, the published second one and last 14."""

    alpha: float = 2.0
    share: float = 0.5
    layers: tuple[int, ...] = (1, *range(18, 32))


def vision_aware(seeing: torch.Tensor, blind: torch.Tensor, share: float) -> torch.Tensor:
    """Head outputs [B,H,D/H] at one position, with and without the image -> bool [B,H]: the ``share`` of heads of the
    largest divergence |seeing - blind|, but none whose output without the image is longer than the layer's mean by more
    than a standard deviation."""
    length = blind.float().norm(dim=-1)
    odd = length > length.mean(1, keepdim=True) + length.std(1, keepdim=True)
    divergence = (seeing - blind).float().norm(dim=-1).masked_fill(odd, 0.0)
    top = divergence.topk(max(1, round(share * divergence.shape[1])), dim=1).indices
    return torch.zeros_like(odd).scatter(1, top, True) & (divergence > 0)


@torch.no_grad()
def chosen_heads(
    vlm: VLM, batch: Batch, embeds: torch.Tensor, mask: torch.Tensor, layers: list[int], s: VhrSettings
) -> dict[int, torch.Tensor]:
    """Layer -> bool [B,H] at the prompt's last position, from one pass of the prompts with and without their images.

    A layer's heads are judged after those of the layers below have been turned up.
    """
    image = pad(Columns(vlm, batch).image, (0, mask.shape[1] - batch.ids.shape[1]))
    both, found, n = torch.arange(len(mask), device=mask.device).repeat(2), {}, len(mask)

    def choose(layer: int, o: torch.Tensor) -> torch.Tensor:
        found[layer] = vision_aware(o[:n, -1], o[n:, -1], s.share)
        return turned_up(o, torch.cat([found[layer], torch.zeros_like(found[layer])]), s.alpha)

    with replaced_heads(vlm, choose, layers):
        vlm.hidden(embeds[both], torch.cat([mask, mask * ~image]), batch.without_images(both))
    return found


def turned_up(o: torch.Tensor, heads: torch.Tensor, alpha: float) -> torch.Tensor:
    """Head outputs o [B,T,H,D/H] with those of ``heads`` [B,H] at the last position times ``alpha``."""
    factor = 1 + (alpha - 1) * heads.to(o.dtype)
    factor = factor.repeat_interleave(len(o) // len(heads), 0)  # beams of an item follow one another
    return torch.cat([o[:, :-1], o[:, -1:] * factor[:, None, :, None]], 1)


def vhr(s: VhrSettings, vlm, batch, embeds, mask):
    """Decoding under these settings."""
    layers = sorted({at_depth(layer, vlm.n_layers) for layer in s.layers})
    found = chosen_heads(vlm, batch, embeds, mask, layers, s)
    with replaced_heads(vlm, lambda layer, o: turned_up(o, found[layer], s.alpha), layers):
        yield {}


GRID = ({}, {"alpha": 1.5}, {"alpha": 3.0}, {"share": 0.2}, {"layers": tuple(range(16, 32))})
register(
    Baseline("vhr", "decoding", vhr, VhrSettings(), GRID, "heads whose output depends on the image are turned up",
             "VHR: He et al. 2025 (ACL)")
)  # fmt: skip
