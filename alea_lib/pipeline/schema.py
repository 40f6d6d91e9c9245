"""What a profile may say, as typed models."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

from ..core.schema import Dtype, Strict

# of a stage, untyped: names are compared with the notebook's own (``profiles.check_parameters``)
Parameters = Annotated[dict[str, Any], BeforeValidator(lambda values: {} if values is None else values)]


class Needs(Strict):
    """The section ``needs`` of a profile. ``gpu_gib``: memory of the card; ``disk_gib`` for everything, downloads
    included; ``download_gb`` in 10^9 bytes; ``hours``: of all stages; ``parts`` of the world's downloads."""

    gpu_gib: float = Field(0.0, ge=0)
    dtype: Dtype = "float32"
    host_gib: float = Field(0.0, ge=0)
    disk_gib: float = Field(0.0, ge=0)
    download_gb: float = Field(0.0, ge=0)
    hours: float = Field(0.0, ge=0)
    parts: list[str] = []


def _named(variants: Any) -> Any:
    """A list of variants as a mapping of variants to the parameters in which they differ."""
    return dict.fromkeys(variants) if isinstance(variants, list) else variants or {}


class Profile(Strict):
    """data/profiles/<name>.yaml. Plain values serve every stage whose notebook has a parameter of that name; beside
    those named here any other parameter's name may stand (``extra``; ``profiles`` compares it with the notebooks)."""

    model_config = ConfigDict(extra="allow")

    world: str = ""
    model: str = ""
    detector: str = ""
    four_bit: bool = False
    max_new_tokens: int = Field(64, ge=1)
    seed: int = Field(0, ge=0)
    book: bool = True
    note: str = ""
    needs: Needs | None = None
    stages: dict[str, Parameters] = Field(min_length=1)
    variants: dict[str, Annotated[dict[str, Parameters], BeforeValidator(_named)]] = {}
    page_variant: dict[str, str] = {}


Reads = TypeAdapter(dict[str, Annotated[list[str], BeforeValidator(lambda entries: entries or [])]])
