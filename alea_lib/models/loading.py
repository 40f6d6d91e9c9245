"""Load a model of a known family by key: a folder of data/models, a row of data/hub.yaml, or a name on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..core.paths import root
from .batch import Limits
from .families import family
from .hub import ModelRow, model_row, snapshot, switched_off
from .vlm import VLM


def model_path(key: str) -> Path | str:
    """Where a model is: ``data/models/<key>`` when that exists; for a key of data/hub.yaml the folder of its pinned
    revision, downloaded if need be; else a folder or a hub name as given."""
    local = root() / "data" / "models" / key
    if local.is_dir():
        return local
    pinned = model_row(key)
    return snapshot(pinned) if pinned else key


def load(
    key: str,
    four_bit: bool = False,
    edited_layers: tuple[int, ...] | None = (),
    device: str | None = None,
    edited_parts: tuple[str, ...] = ("down_proj",),
) -> VLM:
    """Load a model by key, in float32; a key of data/hub.yaml as its row says, whatever else is given.

    ``four_bit``: bitsandbytes NF4 with double quantisation for the linear layers, but for the ``edited_parts``
    (``down_proj``, ``o_proj``) of ``edited_layers`` (None: all layers): an edit needs its matrices unquantised. More
    parts than those of a row may be kept so. Weights are read shard by shard, straight to the device.
    FileNotFoundError for an unknown key.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    pinned, path = model_row(key), model_path(key)
    if isinstance(path, str) and switched_off() and not Path(path).is_dir():
        known = sorted(p.name for p in (root() / "data" / "models").glob("*") if (p / "config.json").is_file())
        raise FileNotFoundError(f"no model {key!r} in data/models (there are {known}) and the hub is switched off")
    config = AutoConfig.from_pretrained(path)
    text = config.get_text_config()
    row = family(config.model_type, small=text.hidden_size < 1024, text=text.model_type)
    dtype = getattr(torch, pinned.dtype) if pinned else torch.float32
    options = {"device_map": {"": device or ("cuda" if torch.cuda.is_available() else "cpu")}}
    four_bit = pinned.four_bit if pinned else four_bit
    if four_bit:
        layers = range(text.num_hidden_layers)
        kept = {(part, i) for part in edited_parts for i in (layers if edited_layers is None else edited_layers)}
        kept |= {(part, i) for part in (pinned.unquantised if pinned else ()) for i in layers}
        names = [getattr(row, part).format(i=i) for part, i in sorted(kept)]
        options["quantization_config"] = _nf4([*row.unquantised, *names], dtype)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **options)
    if four_bit:
        keep_trainable_on_cpu(model)
    vlm = VLM(model, _processor(path), row, key)
    return _as_pinned(vlm, pinned) if pinned else vlm


def _as_pinned(vlm: VLM, row: ModelRow) -> VLM:
    """Revision, batch limits and cache of a row."""
    keep = int(row.keep_gib * 2**30) if row.keep_gib else None
    vlm.revision, vlm.limits = row.revision, Limits(row.see, row.write, row.read, row.train or None, keep)
    vlm.cache = root() / "data" / "runs" / "features" if row.cache else None
    return vlm


def layers_of(key: str) -> int:
    """How many decoder layers a model has, from its configuration alone."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_path(key)).get_text_config().num_hidden_layers


@dataclass(frozen=True)
class Reader:
    """Tokenizer and image processor alone, where a whole processor cannot be made (those of families that also take
    videos need torchvision)."""

    tokenizer: object
    image_processor: object


def _processor(path):
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    try:
        return AutoProcessor.from_pretrained(path, backend="pil")
    except ImportError:
        return Reader(AutoTokenizer.from_pretrained(path), AutoImageProcessor.from_pretrained(path, backend="pil"))


def _nf4(full_precision: list[str], dtype: torch.dtype):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=full_precision,
    )


def keep_trainable_on_cpu(model: nn.Module) -> int:
    """Forbid bitsandbytes' in-place repacking on CPUs with AVX512-BF16, which silently breaks every later gradient."""
    import bitsandbytes

    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for m in layers:
        m.support_avx512bf16_for_cpu = False
    return len(layers)
