"""Whether this machine can carry a profile to its end: card, memory, disk, packages, downloads. No torch, no net."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from alea_lib.runs import places
from alea_lib.runs.places import RunError
from alea_lib.runs.rows import DTYPES, ModelRow

MARGIN = 2.0  # GiB of disk to leave free
BF16 = 8.0  # compute capability from which a card has bfloat16


@dataclass(frozen=True)
class Needs:
    """The section ``needs`` of a profile. ``card``: the one that times are computed for. ``gpu_gib``: memory of the
    card; ``disk_gib`` for everything, downloads included; ``download_gb`` in 10^9 bytes; ``parts`` of the world's
    downloads."""

    card: str = ""
    gpu_gib: float = 0.0
    dtype: str = "float32"
    host_gib: float = 0.0
    disk_gib: float = 0.0
    download_gb: float = 0.0
    hours: float = 0.0
    parts: tuple[str, ...] = ()
    stated: bool = False


@dataclass(frozen=True)
class Check:
    """``found`` says what there is, and when it is not ``ok`` what is needed and how to mend it."""

    what: str
    ok: bool
    found: str


@dataclass(frozen=True)
class Gpu:
    """A card as its driver reports it."""

    name: str
    gib: float
    capability: float


def read_needs(profile: str, asked: dict) -> Needs:
    """The profile's needs. RunError for a name or value that cannot be meant."""
    where, section = f"data/profiles/{profile}.yaml: needs", asked.get("needs")
    if section is None:
        return Needs()
    known = {f.name for f in dataclasses.fields(Needs)} - {"stated"}
    if unknown := sorted(set(section) - known):
        raise RunError(f"{where} has no entry {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    needs = Needs(**{**section, "parts": tuple(section.get("parts", ())), "stated": True})
    _check_card(where, needs.card)
    if needs.dtype not in DTYPES:
        raise RunError(f"{where}: dtype is {needs.dtype!r}, it must be one of {', '.join(DTYPES)}")
    return needs


def _check_card(where: str, card: str) -> None:
    from alea_lib.workload import CARDS

    if card and card not in CARDS:
        raise RunError(f"{where}: no card {card!r}; there are {', '.join(CARDS)} (alea_lib/workload.py)")


def require(profile: str) -> None:
    """Nothing starts that cannot finish: RunError with every check that fails. A profile without needs has none."""
    if places.load_profile(profile).get("needs") is None:
        return
    from alea_lib.runs.preview import preview

    failed = [c for c in preview(profile).checks if not c.ok]
    if failed:
        told = "; ".join(f"{c.what}: {c.found}" for c in failed)
        raise RunError(f"profile {profile} cannot reach its end here, so nothing was started: {told}")


def run_checks(needs: Needs, key: str, row: ModelRow | None, peak_gib: float, left: float) -> list[Check]:
    """All checks of a profile that states needs. ``peak_gib``: computed memory; ``left``: bytes still to be written."""
    if not needs.stated:
        return []
    found = [_disk(needs, left), _host(needs)]
    if needs.gpu_gib:
        card = gpu()
        found += [_card(needs, card), _computed(needs, card, peak_gib), _torch(), _dtype(needs, row, card)]
    if row and row.four_bit:
        found.append(_package("bitsandbytes", "pip install -e .[fourbit]"))
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
    return shutil.disk_usage(places.root()).free / 2**30


def host_gib() -> float:
    return psutil.virtual_memory().total / 2**30


def version(package: str) -> str:
    """Installed version, "" without."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _disk(needs: Needs, left: float) -> Check:
    want = (left / 2**30 if left else needs.disk_gib) + MARGIN
    free = free_gib()
    how = "" if free >= want else "; make room: runs of other profiles (data/runs) can be made again"
    return Check("free disk", free >= want, f"{free:.1f} GiB, {want:.1f} GiB are still to be written{how}")


def _host(needs: Needs) -> Check:
    there = host_gib()
    how = "" if there >= needs.host_gib else "; take a machine with more, or another profile"
    return Check("host memory", there >= needs.host_gib, f"{there:.1f} GiB, {needs.host_gib:g} GiB needed{how}")


def _card(needs: Needs, card: Gpu | None) -> Check:
    if card is None:
        return Check("GPU", False, f"none found (nvidia-smi does not answer); {needs.gpu_gib:g} GiB are needed")
    ok = card.gib >= needs.gpu_gib
    how = "" if ok else "; a profile for smaller cards may fit, see data/profiles"
    return Check("GPU", ok, f"{card.name}, {card.gib:.1f} GiB, {needs.gpu_gib:g} GiB needed{how}")


def _computed(needs: Needs, card: Gpu | None, peak: float) -> Check:
    """The largest step fits the card, or without one what the profile says a card must have."""
    room = card.gib if card else needs.gpu_gib
    ok = math.isnan(peak) or peak <= room
    how = "" if ok else "; lower write or train in the model's row (data/hub.yaml)"
    return Check("largest step", ok, ("not known" if math.isnan(peak) else f"{peak:.1f} of {room:.1f} GiB") + how)


def _torch() -> Check:
    found = version("torch")
    ok = bool(found) and not found.endswith("+cpu")
    how = "" if ok else "; install a build of PyTorch for CUDA: pip install torch (no TORCH_INDEX)"
    return Check("PyTorch", ok, (found or "not installed") + how)


def _dtype(needs: Needs, row: ModelRow | None, card: Gpu | None) -> Check:
    dtype = row.dtype if row else needs.dtype
    if dtype != needs.dtype:
        return Check("computation", False, f"the model's row says {dtype}, the profile {needs.dtype}: make them agree")
    lacks = dtype == "bfloat16" and card is not None and card.capability < BF16
    told = f"{dtype} on compute capability {card.capability:g}" if card else dtype
    how = f", which has none (from {BF16:g} on): use a row and a profile with float16 (llava-1.5-7b-t4)"
    return Check("computation", not lacks, told + (how if lacks else ""))


def _package(name: str, how: str) -> Check:
    found = version(name)
    return Check(name, bool(found), found or f"not installed: {how}")


def _weights(key: str, row: ModelRow | None) -> Check:
    if row is None:
        there = (places.root() / "data" / "models" / key).is_dir()
        return Check("model", there, f"data/models/{key}" + ("" if there else " is not there"))
    if in_cache(row):
        return Check("model", True, f"{row.hub} is in the cache")
    from alea_lib.hub import switched_off

    off = switched_off()
    how = "not in the cache, and the hub is switched off: call with HF_HUB_OFFLINE=0" if off else "will be downloaded"
    return Check("model", not off, f"{row.hub}: {how}")


def in_cache(row: ModelRow) -> bool:
    """True when every shard of the pinned revision was downloaded."""
    from huggingface_hub import try_to_load_from_cache

    def place(name: str) -> str | None:
        found = try_to_load_from_cache(row.hub, name, revision=row.revision)
        return found if isinstance(found, str) else None

    index = place("model.safetensors.index.json")
    if index is None:
        return place("model.safetensors") is not None
    with open(index, encoding="utf-8") as file:
        return all(place(name) for name in set(json.load(file)["weight_map"].values()))
