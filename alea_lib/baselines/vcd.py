"""VCD (Leng et al., CVPR 2024): what the model would also say of a noisy image counts against a token."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.vlm import VLM
from .common import Stream, plausible, with_features
from .registry import Baseline, Views, register


@dataclass(frozen=True)
class VcdSettings:
    """``alpha``: weight of the contrast (0: plain decoding). ``step``: of the 1,000 of the diffusion's noising."""

    alpha: float = 1.0
    step: int = 500
    seed: int = 0


def noised_share(step: int) -> float:
    """How much of an image's variance is left after so many of 1,000 steps (official code: sigmoid schedule)."""
    if not 0 <= step < 1000:
        raise ValueError(f"step is {step}, it must be 0 to 999")
    betas = torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    return (1 - betas).cumprod(0)[step].item()


def noised(vlm: VLM, files: list[Path], s: VcdSettings) -> torch.Tensor:
    """Features [N,P,D] of the images under diffusion noise, added to the pixels as the model sees them, each image
    with a seed of its own."""
    left = noised_share(s.step)

    def change(index: range, pixels: torch.Tensor) -> torch.Tensor:
        each = pixels.numel() // len(index)
        noise = [torch.randn(each, generator=torch.Generator().manual_seed(s.seed * 1_000_003 + i)) for i in index]
        return left**0.5 * pixels + (1 - left) ** 0.5 * torch.stack(noise).view_as(pixels).to(pixels)

    return vlm.features(files, change=change)


def vcd(s: VcdSettings, vlm, batch, embeds, mask, views: Views | None = None):
    """Logits (1 + alpha) l(image) - alpha l(noisy image), among the plausible tokens of l(image)."""
    if views is None:
        raise ValueError("vcd needs the noisy images: call baseline.with_views(vlm, files, features) first")
    noisy = Stream(vlm, *with_features(vlm, batch, embeds, mask, views.of(batch.features)))

    def contrasted(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return plausible(scores, (1 + s.alpha) * scores - s.alpha * noisy(ids))

    yield {"logits_processor": [contrasted]}


register(
    Baseline("vcd", "decoding", vcd, VcdSettings(), ({"alpha": 0.5}, {}, {"step": 999}),
             "contrast with a noisy image", "Leng et al. 2024, official code", view=noised)
)  # fmt: skip
