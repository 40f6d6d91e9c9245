"""The result of an edit: weight differences by module name, which model they belong to, and how to apply them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .checkpoint import write_safetensors
from .hooks import full_weight
from .identity import config_hash, weight_hash
from .vlm import VLM


class WrongBase(ValueError):
    """A delta was applied to a model that it was not computed on."""


@dataclass(frozen=True)
class Delta:
    """``weights``: module name -> difference, fp32 [out, in]. ``base``: module name -> hash of the base weight.
    ``factors``: for a low-rank edit, module name -> (B [out, r], A [r, in]); the difference is their product."""

    weights: dict[str, torch.Tensor]
    base: dict[str, str]
    info: dict
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def norm(self) -> float:
        """Frobenius norm over all matrices."""
        return sum(w.double().square().sum().item() for w in self.weights.values()) ** 0.5

    def relative(self, vlm: VLM) -> dict[str, float]:
        """Norm of each matrix's change over the norm of the weight that it is added to."""
        return {n: (w.norm() / full_weight(vlm, n).norm().cpu()).item() for n, w in self.weights.items()}


def delta_of(vlm: VLM, weights: dict[str, torch.Tensor], info: dict) -> Delta:
    """New weights minus the model's own."""
    own = {name: full_weight(vlm, name) for name in weights}
    return Delta(
        {n: (w.detach().float() - own[n]).cpu() for n, w in weights.items()},
        {n: weight_hash(w) for n, w in own.items()},
        {**identity(vlm), **info},
    )


def factors_delta(vlm: VLM, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], info: dict) -> Delta:
    """The delta whose differences are the products of low-rank factors."""
    kept = {n: tuple(f.detach().float().cpu() for f in pair) for n, pair in factors.items()}
    base = {n: weight_hash(full_weight(vlm, n)) for n in kept}
    return Delta({n: b @ a for n, (b, a) in kept.items()}, base, {**identity(vlm), **info}, kept)


def identity(vlm: VLM) -> dict[str, str]:
    """Which model a delta belongs to: the key it was loaded by, the hub's revision, and a hash of its configuration."""
    return {"model": vlm.key, "revision": vlm.revision, "config": config_hash(vlm.model.config)}


def verify(vlm: VLM, delta: Delta) -> None:
    """WrongBase when the delta was computed on another model, RuntimeError for a 4-bit module."""
    source, config = delta.info.get("model"), delta.info.get("config")
    if config and config != config_hash(vlm.model.config):
        raise WrongBase(f"{vlm.key} has another configuration than {source}, which this delta is of")
    for name in delta.weights:
        try:
            weight = vlm.model.get_submodule(name).weight
        except AttributeError as error:
            raise WrongBase(f"{vlm.key} has no module {name!r}: the delta was computed on {source}") from error
        if weight.dtype == torch.uint8:
            raise RuntimeError(
                f"{name} is stored in 4 bits, where a small change is lost in rounding; load the model with "
                f"its layer among edited_layers"
            )
        if weight_hash(weight) != delta.base[name]:
            raise WrongBase(
                f"{name} of {vlm.key} is not the weight that this delta was computed on ({source}); "
                "load that model, undo other edits first"
            )


@contextmanager
def applied(vlm: VLM, delta: Delta | None, verified: bool = False) -> Iterator[VLM]:
    """The edited model inside the block: same modules, shapes and dtypes; bit-equal to the base afterwards.

    ``None`` applies nothing, so that the base runs through the same code. The originals are kept as copies and put
    back, never subtracted. Raises what :func:`verify` raises before anything is changed; ``verified``: the caller has
    called it already, which hashes every edited matrix.
    """
    if delta and not verified:
        verify(vlm, delta)
    saved: dict[str, torch.Tensor] = {}
    try:
        for name, change in delta.weights.items() if delta else ():
            weight = vlm.model.get_submodule(name).weight
            saved[name] = weight.detach().clone()
            weight.data = (weight.data.float() + change.to(weight.device)).to(weight.dtype)
        yield vlm
    finally:
        for name, original in saved.items():
            vlm.model.get_submodule(name).weight.data = original


def scaled(delta: Delta, strength: float, names: Iterable[str] | None = None) -> Delta:
    """A share of an edit: ``strength`` times the difference (0 the base, 1 the edit), of these modules alone if named.

    KeyError for a module that the delta does not change.
    """
    names = list(delta.weights) if names is None else list(names)
    if unknown := sorted(set(names) - set(delta.weights)):
        raise KeyError(f"this delta does not change {unknown}; it changes {sorted(delta.weights)}")
    return replace(delta, weights={n: strength * delta.weights[n] for n in names}, factors={})


def edited_layers(vlm: VLM, delta: Delta) -> dict[int, list[str]]:
    """Decoder layer -> names of its modules that a delta changes."""
    inside = {i: f"{vlm.address('layer', i)}." for i in range(vlm.n_layers)}
    found = {i: [name for name in delta.weights if name.startswith(start)] for i, start in inside.items()}
    return {i: names for i, names in found.items() if names}


def save_delta(delta: Delta, path: Path) -> None:
    """Safetensors with the base's hashes and the run's settings in the metadata; written atomically."""
    # one key: safetensors writes several in no fixed order, and equal deltas should be equal files
    meta = {"delta": json.dumps({"base": delta.base, "info": delta.info}, sort_keys=True)}
    full = {n: w.contiguous() for n, w in delta.weights.items() if n not in delta.factors}
    parts = {f"{n}.{k}": f.contiguous() for n, pair in delta.factors.items() for k, f in zip("BA", pair)}
    write_safetensors({**full, **parts}, path, meta)


def load_delta(path: Path) -> Delta:
    """FileNotFoundError or ValueError (truncated, not a delta) with what to do."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no delta at {path}: run notebook 05_edit for that method first")
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
            stored = {k: f.get_tensor(k) for k in f.keys()}
        about = json.loads(meta["delta"])
        factors = {n: (stored.pop(f"{n}.B"), stored.pop(f"{n}.A")) for n in about["base"] if f"{n}.A" in stored}
        weights = {n: factors[n][0] @ factors[n][1] if n in factors else stored[n] for n in about["base"]}
        return Delta(weights, about["base"], about["info"], factors)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is not a whole delta file ({error}); make it again with notebook 05_edit") from error
