"""Whether this machine can carry a profile to its end: card, memory, disk, packages, downloads. No torch, no net."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import subprocess
from typing import NamedTuple

import psutil

from ..core import paths
from ..models.hub import ModelRow, in_cache, switched_off
from .profiles import Needs

MARGIN = 2.0  # GiB of disk to leave free
BF16 = 8.0  # compute capability from which a card has bfloat16


class Check(NamedTuple):
    """``found`` says what there is, and when it is not ``ok`` what is needed and what to do."""

    what: str
    ok: bool
    found: str


class Gpu(NamedTuple):
    """A card as its driver reports it."""

    name: str
    gib: float
    capability: float


def run_checks(
    needs: Needs, key: str, row: ModelRow | None, peak_gib: float, left: float, seconds: float
) -> list[Check]:
    """All checks of a profile's needs. ``peak_gib``: computed memory; ``left``: bytes still to be written;
    ``seconds``: of the stages still to run. Each is nan where it is not known."""
    found = [_disk(needs, left), _host(needs)]
    if needs.hours:
        found.append(_hours(needs, seconds))
    if needs.gpu_gib:
        card = gpu()
        found += [_card(needs, card), _computed(needs, card, peak_gib), _torch(), _dtype(needs, row, card)]
    if row and row.four_bit:
        there = version("bitsandbytes")
        found.append(_check("bitsandbytes", bool(there), there or "not installed", "pip install -e .[fourbit]"))
    return [*found, _weights(key, row)]


def gpu() -> Gpu | None:
    """The first card, asked of its driver's own program; None without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        name, mib, capability = (part.strip() for part in done.stdout.splitlines()[0].rsplit(",", 2))
        return Gpu(name, float(mib) / 1024, float(capability))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def free_gib() -> float:
    return shutil.disk_usage(paths.root()).free / 2**30


def host_gib() -> float:
    return psutil.virtual_memory().total / 2**30


def version(package: str) -> str:
    """Installed version, "" without."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _check(what: str, ok: bool, found: str, otherwise: str) -> Check:
    return Check(what, ok, found if ok else f"{found}; {otherwise}")


def _disk(needs: Needs, left: float) -> Check:
    want = (needs.disk_gib if math.isnan(left) else left / 2**30) + MARGIN
    found = f"{free_gib():.1f} GiB, {want:.1f} GiB are still to be written"
    how = "make room: runs of other profiles (data/runs) can be made again"
    return _check("free disk", free_gib() >= want, found, how)


def _host(needs: Needs) -> Check:
    found = f"{host_gib():.1f} GiB, {needs.host_gib:g} GiB needed"
    return _check("host memory", host_gib() >= needs.host_gib, found, "take a machine with more, or another profile")


def _hours(needs: Needs, seconds: float) -> Check:
    """The stages still to run end in the time that the profile allows for, where all were measured."""
    if math.isnan(seconds):
        return Check("time", True, f"unknown: not every stage was measured ({needs.hours:g} h allowed)")
    found = f"{seconds / 3600:.1f} h still to run, {needs.hours:g} h allowed"
    how = "lower the stages' sizes, or raise needs.hours in the profile"
    return _check("time", seconds <= needs.hours * 3600, found, how)


def _card(needs: Needs, card: Gpu | None) -> Check:
    if card is None:
        return Check("GPU", False, f"none found (nvidia-smi does not answer); {needs.gpu_gib:g} GiB are needed")
    found = f"{card.name}, {card.gib:.1f} GiB, {needs.gpu_gib:g} GiB needed"
    return _check("GPU", card.gib >= needs.gpu_gib, found, "a profile for smaller cards may fit, see data/profiles")


def _computed(needs: Needs, card: Gpu | None, peak: float) -> Check:
    """The largest step fits the card, or without one what the profile says a card must have."""
    if math.isnan(peak):
        return Check("largest step", True, "not known")
    room = card.gib if card else needs.gpu_gib
    how = "lower write or train in the model's row (data/hub.yaml)"
    return _check("largest step", peak <= room, f"{peak:.1f} of {room:.1f} GiB", how)


def _torch() -> Check:
    found = version("torch")
    how = "install a build of PyTorch for CUDA: pip install torch (no TORCH_INDEX)"
    return _check("PyTorch", bool(found) and not found.endswith("+cpu"), found or "not installed", how)


def _dtype(needs: Needs, row: ModelRow | None, card: Gpu | None) -> Check:
    dtype = row.dtype if row else needs.dtype
    if dtype != needs.dtype:
        return Check("computation", False, f"the model's row says {dtype}, the profile {needs.dtype}: make them agree")
    found = f"{dtype} on compute capability {card.capability:g}" if card else dtype
    lacks = dtype == "bfloat16" and card is not None and card.capability < BF16
    how = f"it has none (from {BF16:g} on): use a row and a profile with float16 (llava-1.5-7b-t4)"
    return _check("computation", not lacks, found, how)


def _weights(key: str, row: ModelRow | None) -> Check:
    if row is None:
        there = (paths.root() / "data" / "models" / key).is_dir()
        return Check("model", there, f"data/models/{key}" + ("" if there else " is not there"))
    if in_cache(row):
        return Check("model", True, f"{row.hub} is in the cache")
    found = f"{row.hub}: {'not in the cache' if switched_off() else 'will be downloaded'}"
    return _check("model", not switched_off(), found, "the hub is switched off: call with HF_HUB_OFFLINE=0")
