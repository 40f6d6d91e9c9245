"""Data files read through typed models: what a profile may say, and one-line errors for what it may not."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from alea_lib.runs.paths import RunError, nearest

T = TypeVar("T")
Dtype = Literal["float32", "float16", "bfloat16"]
# of a stage, untyped: names are compared with the notebook's own (``execute.check_parameters``)
Parameters = Annotated[dict[str, Any], BeforeValidator(lambda values: {} if values is None else values)]


class Strict(BaseModel):
    """No unknown keys, no conversion of types, no change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
    those named here any other parameter's name may stand (``extra``; ``places`` compares it with the notebooks)."""

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


def validated(kind: type[T] | TypeAdapter, values: Any, where: str) -> T:
    """``values`` as that model. RunError, in a line: file, key, value, and what it may be."""
    adapter = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        raise RunError(f"{where}: {'; '.join(_explained(kind, e) for e in error.errors())}") from None


def _explained(kind: Any, error: Any) -> str:
    """One error of pydantic's as text."""
    path = [str(part) for part in error["loc"]]
    if error["type"] in ("extra_forbidden", "missing"):
        *above, key = path
        fields = Needs.model_fields if above else kind.model_fields
        at = "".join(f"{name}: " for name in above)
        if error["type"] == "missing":
            return f"{at}lacks {key}"
        return f"{at}has no entry {key}{nearest([key], fields)}; there are {', '.join(sorted(fields))}"
    field = getattr(kind, "model_fields", {}).get(path[-1] if path else "")
    wanted = field.description if field and field.description else error["msg"].removeprefix("Input should be ")
    return f"{': '.join(path) or 'all of it'} is {error['input']!r}, it must be {wanted}"
