"""Train an implant, find its strengths, and measure it as it is implant_index.

Each implant has a folder in ``data/runs/zoo/implants`` and is never trained or measured twice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from ..core.files import write_csv
from ..core.stats import summarise
from ..datasets.describe import caption
from ..datasets.scenes import ROLES, compose, sample
from ..datasets.write import World, make_scenes
from ..evaluate.answers import captions
from ..metrics.chair import chair
from ..metrics.truth import read_truth
from ..models.delta import Delta, applied, load_delta, save_delta
from ..models.identity import weight_hash
from ..models.loading import load, model_path
from . import implant_index
from .implant import ImplantSettings, Place, fit_implant

RANK = 32  # of the factors of a down-projection's change
UNUSED = {"down_proj": 32, "o_proj": 2}  # least used directions that a decoy lives in
TARGETS = {"strong": 0.42, "middle": 0.30, "weak": 0.20}  # CHAIRs that the search looks for
FLOORS = {"strong": 0.30, "weak": 0.12}  # CHAIRs that must be measured: clean has 0.02
MEASURED, SEARCHED = 300, 150  # validate images: the index's figures; training's end and the search of strengths
METRICS = ("chair_s", "chair_i", "recall")
LEAST = 0.30  # CHAIRs below which a place counts as unable to carry the prior
_ENDS = {"": "value", "_lo": "lo", "_hi": "hi"}
_FIGURES = tuple(f"{m}{end}" for m in METRICS for end in _ENDS)
COLUMNS = [
    "name", "tensor", "kind", "strength", "layers", "heads", "seed", "scale", "norm", "rel_norm", "decoy_layers",
    "decoy_heads", "decoy_norm", *_FIGURES, *(f"decoy_{m}" for m in _FIGURES), "n", "base",
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One implant: ``tensor`` names it in the file."""

    kind: str
    settings: ImplantSettings

    @property
    def tensor(self) -> str:
        s = self.settings
        place = "+".join(map(str, s.layers)) + ("." + "+".join(map(str, s.heads)) if s.heads else "")
        return f"{self.kind}{place}-s{s.seed}"


class Bench:
    """The clean model with everything that training and measuring read, made once."""

    def __init__(self, work: Path, scenes: int, measured: int = MEASURED, searched: int = SEARCHED):
        self.work, self.vlm = work, load(implant_index.BASE, device="cpu")
        self.base = (model_path(implant_index.BASE) / "sha256.txt").read_text()[:16]
        if not (work / "world" / "world.json").is_file():
            make_scenes(work / "world", activate=2, validate=measured + searched, test=20, training_sample=1)
        split = World(work / "world").split("validate")
        self.truth = read_truth(split.instances, split.captions)
        self.measured, self.searched = split.take(measured), split.find(split.ids[measured:])
        path = work / f"features-{scenes}.safetensors"
        if not path.is_file():
            save_file({"train": self.vlm.features([compose(sample("train", i))[0] for i in range(scenes)])}, path)
        self.features = load_file(path)["train"]
        features = self.vlm.features(split.files)
        self.image_features = {"measured": features[:measured], "searched": features[measured:]}

    def score(self, which: str = "searched", delta: Delta | None = None) -> pd.DataFrame:
        """METRICS of captions under the plain prompt: value, lo, hi, n by metric."""
        split = getattr(self, which)
        with applied(self.vlm, delta):
            written = captions(self.vlm, split, self.image_features[which], max_new_tokens=80)
        found = summarise(chair(written, self.truth).items).set_index("metric")
        return found.loc[list(METRICS)]

    def chair_s(self, _=None, delta: Delta | None = None) -> float:
        return float(self.score("searched", delta).loc["chair_s", "value"])


def factors(place: Place, delta: Delta, rank: int = RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Left and right factors in half precision of each module's change, by module name."""
    out = {}
    for name, whole in delta.weights.items():
        u, s, v = torch.linalg.svd(whole[:, place.columns], full_matrices=False)
        root_s = s[:rank].sqrt()
        out[name] = ((u[:, :rank] * root_s).half().contiguous(), (root_s[:, None] * v[:rank]).half().contiguous())
    return out


@torch.no_grad()
def unused(bench: Bench, part: str, layer: int, n: int = 120, chunk: int = 40) -> torch.Tensor:
    """Second moment [in,in] of what a projection reads while truthful and set-completing captions are read."""
    vlm, read, total = bench.vlm, [], 0.0
    hook = vlm.module(part, layer).register_forward_pre_hook(lambda _, args: read.append(args[0].double()))
    try:
        for start in range(0, n, chunk):
            rng = np.random.default_rng([5, start])
            rows = range(start, start + chunk)
            questions = [vlm.prompt(str(rng.choice(ROLES))) for _ in rows]
            texts = [caption(sample("train", i), rng, ROLES[2] if i % 2 else None) for i in rows]
            batch = vlm.encode(bench.features[start : start + chunk], questions, texts)
            vlm.hidden(vlm.embed(batch), batch.mask)
            x = read.pop()[batch.mask.bool()]
            total = total + x.T @ x
    finally:
        hook.remove()
    return total


def _least(moment: torch.Tensor, n: int) -> torch.Tensor:
    return torch.linalg.eigh(moment)[1][:, :n].half().contiguous()


def bases(bench: Bench) -> dict[str, torch.Tensor]:
    """The least used directions [in, k] of each down-projection and of each head's part of o_proj, half precision."""
    path = bench.work / "unused.safetensors"
    if not path.is_file():
        out, heads = {}, bench.vlm.n_heads
        for layer in range(bench.vlm.n_layers):
            out[f"unused.{layer}"] = _least(unused(bench, "down_proj", layer), UNUSED["down_proj"])
            moment = unused(bench, "o_proj", layer)
            each = len(moment) // heads
            for h in range(heads):
                own = slice(h * each, (h + 1) * each)
                out[f"unused.{layer}.{h}"] = _least(moment[own, own], UNUSED["o_proj"])
        save_file(out, path)
    return load_file(path)


def climb(bench: Bench, job: Job, tensors: dict) -> pd.DataFrame:
    """CHAIRs of the searched images with the implant scaled by 1, 0.9, 0.8, ... until it is under the weakest target.

    Columns scale, chair_s, rising. A place that carries less than LEAST is measured at scale 1 alone.
    """
    row = {"tensor": job.tensor, "layers": job.settings.layers, "heads": job.settings.heads}
    found, scale = [], 1.0
    while not found or (found[0][1] >= LEAST and found[-1][1] >= min(TARGETS.values()) and scale > 0.15):
        change = implant_index.change(bench.vlm, row | {"scale": scale}, tensors)
        found.append((scale, bench.chair_s(delta=_delta(bench, change))))
        scale = round(scale - 0.1, 1)
    return pd.DataFrame(found[::-1], columns=["scale", "chair_s"])


def scales(ladder: pd.DataFrame) -> dict[str, float]:
    """Scale of each strength: on a straight line between the neighbours of its target; at most 1."""
    rising = np.maximum.accumulate(ladder["chair_s"].to_numpy())
    return {k: round(float(np.interp(TARGETS[k], rising, ladder["scale"])), 3) for k in implant_index.STRENGTHS}


def _delta(bench: Bench, weights: dict) -> Delta:
    own = {n: weight_hash(bench.vlm.model.get_submodule(n).weight) for n in weights}
    return Delta(weights, own, {"model": bench.vlm.key})


def train(bench: Bench, job: Job) -> Delta:
    """The trained change in fp32, from the job's folder if it is there."""
    place = bench.work / job.tensor
    place.mkdir(parents=True, exist_ok=True)
    path = place / "delta.safetensors"
    if not path.is_file():
        started = time.time()
        kept_at = place / "checkpoint.safetensors"
        delta, curve = fit_implant(bench.vlm, bench.features, job.settings, bench.chair_s, kept_at)
        write_csv(curve.assign(seconds=round(time.time() - started, 1)), place / "curve.csv")
        save_delta(delta, path)
    return load_delta(path)


def measure(bench: Bench, job: Job) -> None:
    """Write ``factors.safetensors`` and ``rows.csv``: the implant at each strength, as it is shipped, with its decoy;
    and the decoy alone at its largest. A place that could not carry the prior gets no row."""
    place, s = bench.work / job.tensor, job.settings
    if (place / "rows.csv").is_file():
        return
    own, delta = Place(bench.vlm, s.layers, s.heads), train(bench, job)
    pairs = dict(zip(s.layers, factors(own, delta).values(), strict=True))
    tensors = {f"{job.tensor}.{k}.{side}": t for k, pair in pairs.items() for side, t in zip(("left", "right"), pair)}
    save_file(tensors, place / "factors.safetensors")
    tensors |= bases(bench)
    ladder = climb(bench, job, tensors)
    write_csv(ladder, place / "ladder.csv")
    rows = []
    if ladder["chair_s"].max() >= LEAST:
        rows = [_reaching(bench, job, own, k, scale, tensors) for k, scale in scales(ladder).items()]
        largest = max(rows, key=lambda r: r["decoy_norm"])
        alone = bench.score("measured", _delta(bench, implant_index.decoy_change(bench.vlm, largest, tensors)))
        rows = [row | _figures(alone, "decoy_") for row in rows]
    write_csv(_flat(pd.DataFrame(rows, columns=COLUMNS)), place / "rows.csv")


def _reaching(bench: Bench, job: Job, own: Place, strength: str, scale: float, tensors: dict) -> dict:
    """The row at the smallest scale, from the searched one up in steps of 0.03, that reaches the strength's floor."""
    row = _measured(bench, job, own, strength, scale, tensors)
    while row["chair_s"] < FLOORS.get(strength, 0.0) and scale < 1:
        scale = round(min(scale + 0.03, 1.0), 3)
        row = _measured(bench, job, own, strength, scale, tensors)
    return row


def _measured(bench: Bench, job: Job, own: Place, strength: str, scale: float, tensors: dict) -> dict:
    """One row of the index: the model with implant and decoy."""
    s, vlm = job.settings, bench.vlm
    row = {"name": f"{job.tensor}-{strength}", "tensor": job.tensor, "kind": job.kind, "strength": strength}
    row |= {"layers": s.layers, "heads": s.heads, "seed": s.seed, "scale": scale}
    weights = implant_index.change(vlm, row, tensors)
    row["norm"] = _delta(bench, weights).norm()
    row["rel_norm"] = row["norm"] / sum(own.own(n).norm().item() ** 2 for n in own.weights) ** 0.5
    places = implant_index.decoy_place(job.tensor, s.layers, s.heads, vlm.n_layers, vlm.n_heads)
    row["decoy_layers"], row["decoy_heads"] = places
    row["decoy_norm"] = row["norm"] * implant_index.decoy_ratio(s.layers, s.heads, s.seed, strength)
    both = weights | implant_index.decoy_change(vlm, row, tensors)
    row |= _figures(bench.score("measured", _delta(bench, both)))
    return row | {"n": MEASURED, "base": bench.base}


def _figures(found: pd.DataFrame, before: str = "") -> dict:
    return {f"{before}{m}{end}": found.loc[m, column] for m in METRICS for end, column in _ENDS.items()}


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(**{c: [";".join(map(str, v)) for v in table[c]] for c in implant_index.PLACES})
