"""Hashes that say whether two models, weights or lists of texts are the same."""

from __future__ import annotations

import hashlib
import json

import torch


def config_hash(config) -> str:
    """Hash of a configuration without what may differ between two loads of the same model."""
    loose = ("dtype", "torch_dtype", "quantization_config", "transformers_version", "_name_or_path", "use_cache")

    def bare(value):
        return {k: bare(v) for k, v in value.items() if k not in loose} if isinstance(value, dict) else value

    return hash_text([json.dumps(bare(config.to_dict()), sort_keys=True, default=str)])


def weight_hash(weight: torch.Tensor) -> str:
    """sha256 of the fp32 bytes of a weight, first 16 hex digits."""
    return hashlib.sha256(weight.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def hash_text(texts: list[str]) -> str:
    """sha256 of a list of texts, first 16 hex digits."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
