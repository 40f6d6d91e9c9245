"""Data files read through typed models, with one-line errors for what they may not say."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from .paths import RunError, nearest

T = TypeVar("T")
Dtype = Literal["float32", "float16", "bfloat16"]


class Strict(BaseModel):
    """No unknown keys, no conversion of types, no change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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
        fields = _inside(kind, above).model_fields
        at = "".join(f"{name}: " for name in above)
        if error["type"] == "missing":
            return f"{at}lacks {key}"
        return f"{at}has no entry {key}{nearest([key], fields)}; there are {', '.join(sorted(fields))}"
    field = getattr(kind, "model_fields", {}).get(path[-1] if path else "")
    wanted = field.description if field and field.description else error["msg"].removeprefix("Input should be ")
    return f"{': '.join(path) or 'all of it'} is {error['input']!r}, it must be {wanted}"


def _inside(kind: Any, path: list[str]) -> Any:
    """The model of a section inside a model."""
    for name in path:
        annotation = kind.model_fields[name].annotation
        kind = next(k for k in (annotation, *get_args(annotation)) if isinstance(k, type) and issubclass(k, BaseModel))
    return kind
