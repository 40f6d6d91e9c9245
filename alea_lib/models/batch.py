"""Tokens of image, prompt and answer, side by side; how many items go together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Limits:
    """Largest batches that a device takes: images seen, answers written, answers read, items of a backward pass; and
    ``keep``, bytes of what an edit reads once that stay on the device. None: any."""

    see: int | None = None
    write: int | None = None
    read: int | None = None
    train: int | None = None
    keep: int | None = None

    def of(self, name: str, wanted: int) -> int:
        """The batch size to use where ``wanted`` would be best."""
        return min(wanted, getattr(self, name) or wanted)

    def microbatches(self, pick: np.ndarray) -> list[np.ndarray]:
        """A batch of a training step in parts that a backward pass takes, as equal as can be."""
        return np.array_split(pick, max(1, -(-len(pick) // (self.train or len(pick) or 1))))


def loss_scale(dtype: torch.dtype) -> float:
    """What a loss is multiplied by before its backward pass, and its gradient divided by after: gradients of most
    tokens are too small for half precision with 5 bits of exponent."""
    return 1024.0 if dtype == torch.float16 else 1.0


def scale_gradient(parameters, scale: float) -> None:
    """Divide what a backward pass adds to these leaf tensors' gradients by the scale of its loss."""
    for p in parameters if scale != 1 else ():
        p.register_hook(lambda g: g / scale)


@dataclass(frozen=True)
class Batch:
    """Token ids of image + prompt (+ answer), padded on one side.

    ids [B,T] int64; mask [B,T] int64, 1 = a real token; labels [B,T] int64, -100 outside the answer;
    features [B,P,D] image features; question [B] and answer [B]: index of the first token after the image and of the
    first answer token. ``questions``: the texts, for families whose image features depend on them.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor
    questions: tuple[str, ...] = ()

    def without_images(self, rows: torch.Tensor) -> Batch:
        """Some rows, without their features: what :meth:`VLM.hidden` may be given for them."""
        picked = {name: getattr(self, name)[rows] for name in ("ids", "mask", "labels", "question", "answer")}
        return Batch(features=self.features[:0], **picked)

    @property
    def target_mask(self) -> torch.Tensor:
        return target_mask(self.labels)


def target_mask(labels: torch.Tensor) -> torch.Tensor:
    """[B,T] bool: positions whose *next* token is an answer token, i.e. where logits are compared with labels."""
    out = torch.zeros_like(labels, dtype=torch.bool)
    out[:, :-1] = labels[:, 1:] != -100
    return out
