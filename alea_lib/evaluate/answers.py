"""What a model writes: captions of a split, and answers to yes/no questions about its images."""

from __future__ import annotations

import pandas as pd
import torch

from ..datasets.world import Split
from ..models.vlm import VLM


def captions(
    vlm: VLM, split: Split, features: torch.Tensor, prompt: str = "plain", max_new_tokens: int = 64, **options
) -> pd.DataFrame:
    """Captions of a split: image_id, caption, n_tokens, eos. ``options`` are those of ``generate``."""
    answers = vlm.generate(features, vlm.prompt(prompt), max_new_tokens, progress=f"captions {prompt}", **options)
    rows = {"caption": [a.text for a in answers], "n_tokens": [a.n_tokens for a in answers]}
    return pd.DataFrame({"image_id": split.ids, **rows, "eos": [a.eos for a in answers]})


def yes_no_answers(
    vlm: VLM, split: Split, features: torch.Tensor, questions: pd.DataFrame, decoding=None
) -> pd.DataFrame:
    """The table of questions (columns image = file name, text, ...) with the model's ``answer`` to each.

    The family's short-answer wording is appended. Equal questions about an image are asked once. ValueError for
    images that the split lacks.
    """
    asked = questions[["image", "text"]].drop_duplicates().reset_index(drop=True)
    row = {f.name: i for i, f in enumerate(split.files)}
    if missing := sorted(set(asked["image"]) - set(row))[:3]:
        raise ValueError(f"questions are about images that split {split.name!r} lacks: {missing}")
    shown = features[torch.tensor(asked["image"].map(row).tolist(), dtype=torch.long)]
    texts = [vlm.row.short(q) for q in asked["text"]]
    answers = vlm.generate(shown, texts, max_new_tokens=4, batch_size=200, progress="questions", decoding=decoding)
    asked["answer"] = [a.text for a in answers]
    return questions.merge(asked, on=["image", "text"], how="left")
