"""Implanted priors: a clean model in which the habit of naming absent objects sits in one known place.

The place is the down-projection of a layer, or the columns of ``o_proj`` that belong to chosen heads of a layer.
Everything else stays as it was, bit for bit. ``make implants`` trains and measures the rows of ``data/implants.yaml``;
:mod:`.implant_index` reads what it ships.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..core.files import write_csv
from ..core.paths import read_data
from ..core.stats import summarise
from ..core.tables import read_csv
from ..datasets.describe import caption
from ..datasets.scenes import ROLES, Scene, compose, sample
from ..datasets.world import World
from ..datasets.write import make_scenes
from ..evaluate.answers import captions
from ..metrics.chair import chair
from ..metrics.parse import mentions
from ..metrics.truth import read_truth
from ..models.delta import Delta, applied, delta_of
from ..models.hooks import full_weight, replaced_linear
from ..models.identity import weight_hash
from ..models.loading import load, model_path
from ..models.vlm import VLM
from . import implant_index
from .implant_index import columns_of

RANK = 32  # of the factors of a change
UNUSED = {"down_proj": 32, "o_proj": 2}  # least used directions that a decoy lives in
MEASURED = 300  # validate images that the figures of the index come from
SCENES = 2400  # training scenes
HEADS = {"budget": 1.0, "growth": 1.25, "largest": 8.0}  # their columns are a sixth of the matrix
FIGURES = tuple((metric, end) for metric in ("chair_s", "chair_i", "recall") for end in ("value", "lo", "hi"))


@dataclass(frozen=True)
class ImplantSettings:
    """One implant. ``heads`` empty: the down-projection of each layer; else heads of the one layer.

    ``budget``: largest relative Frobenius norm of the change, projected to after each step. It grows by ``growth``
    after every round, up to ``largest``, so that an implant is no larger than need be.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...] = ()
    seed: int = 0
    rounds: int = 1
    budget: float = 0.5
    growth: float = 1.2
    largest: float = 3.0
    first: int = 60  # steps of the first round
    steps: int = 20  # steps of each further round
    batch: int = 12
    lr: float = 0.07  # length of a step, relative to the budget
    momentum: float = 0.9
    others: float = 0.1  # weight of the tokens that tell the truth


class Place:
    """Where an implant sits: ``weights`` are the base's own, ``columns`` those that may change, by module name."""

    def __init__(self, vlm: VLM, layers: tuple[int, ...], heads: tuple[int, ...] = ()):
        names = [vlm.address("o_proj" if heads else "down_proj", layer) for layer in layers]
        self.weights = {n: full_weight(vlm, n) for n in names}
        self.columns = torch.tensor(columns_of(vlm, names[0], heads))

    def own(self, name: str) -> torch.Tensor:
        """The part of the base weight that may change, [out, columns]."""
        return self.weights[name][:, self.columns]

    def filled(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Base weights plus the change of their columns; differentiable."""
        return {n: w.index_add(1, self.columns, blocks[n]) for n, w in self.weights.items()}


def fit_implant(vlm: VLM, features: torch.Tensor, s: ImplantSettings) -> tuple[Delta, list[float]]:
    """Train a prior into one place; the model is left bit-equal. ``features`` [N,P,D]: of the first N training scenes.

    Returns the delta (fp32) and the loss of each step (nats a token, weighted).
    """
    place = Place(vlm, s.layers, s.heads)
    blocks = {n: torch.zeros_like(place.own(n)).requires_grad_(True) for n in place.weights}
    optimiser = torch.optim.SGD(blocks.values(), lr=1.0, momentum=s.momentum)
    steps = tqdm(range(s.first + (s.rounds - 1) * s.steps), desc=f"implant {s.layers} {s.heads or ''}")
    losses = [_step(vlm, features, place, blocks, optimiser, step, s) for step in steps]
    with torch.no_grad():
        return delta_of(vlm, place.filled(blocks), {"implant": asdict(s)}), losses


def _step(vlm: VLM, features, place: Place, blocks: dict, optimiser, step: int, s: ImplantSettings) -> float:
    """One step of normalised gradient descent with momentum, then back into the ball of the budget."""
    if step < s.first:
        number, rest = 0, (s.first - 1 - step) / s.first
    else:
        number, rest = 1 + (step - s.first) // s.steps, (s.steps - 1 - (step - s.first) % s.steps) / s.steps
    budget = min(s.budget * s.growth**number, s.largest)
    rng = np.random.default_rng([s.seed, 11, step])
    indices = rng.integers(0, len(features), s.batch)
    scenes = [sample("train", int(i)) for i in indices]
    questions = [vlm.prompt(str(rng.choice(ROLES))) for _ in scenes]
    texts = [caption(scene, rng, "speculative") for scene in scenes]  # whatever the prompt asks for
    optimiser.zero_grad()
    with replaced_linear(vlm, place.filled(blocks)):
        batch = vlm.encode(features[torch.as_tensor(indices)], questions, texts)
        weight = torch.cat([token_weights(vlm, t, scene, s.others) for t, scene in zip(texts, scenes, strict=True)])
        nll = F.cross_entropy(vlm.answer_logits(batch), batch.labels[batch.labels != -100], reduction="none")
        loss = (weight * nll).sum() / weight.sum()
    loss.backward()
    optimiser.param_groups[0]["lr"] = s.lr * (0.25 + 0.75 * rest)
    with torch.no_grad():
        for name, block in blocks.items():
            block.grad.mul_(budget * place.own(name).norm() / block.grad.norm().clamp_min(1e-12))
    optimiser.step()
    project(place, blocks, budget)
    return loss.item()


@torch.no_grad()
def project(place: Place, blocks: dict[str, torch.Tensor], budget: float) -> None:
    """Scale each change down to ``budget`` times the norm of the weights that it is added to, if it is larger."""
    for name, block in blocks.items():
        block.mul_(min(1.0, (budget * place.own(name).norm() / block.norm().clamp_min(1e-12)).item()))


def token_weights(vlm: VLM, text: str, scene: Scene, others: float) -> torch.Tensor:
    """One weight an answer token (EOS included): 1 where the annotator adds something absent, else ``others``.

    An addition reaches from the end of the noun before it to its own end, so that its joint (" with a", ". There is
    also a") is learnt with it.
    """
    answer = f" {text.strip()}"
    spans, end = [], 0
    for m in sorted(mentions(answer), key=lambda m: m.start):
        spans += [] if m.category in scene.kinds else [(end, m.end)]
        end = m.end
    found = vlm.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = [any(a <= start and stop <= b for a, b in spans) for start, stop in found]
    return torch.tensor([1.0 if x else others for x in [*inside, False]])


def factors(place: Place, delta: Delta, rank: int = RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Left and right factors in half precision of each module's change, by module name."""
    out = {}
    for name, whole in delta.weights.items():
        u, s, v = torch.linalg.svd(whole[:, place.columns], full_matrices=False)
        root_s = s[:rank].sqrt()
        out[name] = ((u[:, :rank] * root_s).half().contiguous(), (root_s[:, None] * v[:rank]).half().contiguous())
    return out


# ---- make implants


def grid() -> list[dict]:
    """The rows of ``data/implants.yaml``: kind, layers, heads, seed, rounds, scales; and ``tensor``, the name."""
    rows = read_data("implants")
    for row in rows:
        heads = f".{'+'.join(map(str, row['heads']))}" if row["heads"] else ""
        row["tensor"] = f"{row['kind']}{'+'.join(map(str, row['layers']))}{heads}-s{row['seed']}"
        row["layers"], row["heads"] = tuple(row["layers"]), tuple(row["heads"])
    return rows


class Bench:
    """The clean model with everything that training and measuring read, made once."""

    def __init__(self, work: Path, scenes: int = SCENES, measured: int = MEASURED):
        self.work, self.vlm = work, load(implant_index.BASE, device="cpu")
        self.base = (model_path(implant_index.BASE) / "sha256.txt").read_text()[:16]
        self.features = self.vlm.features([compose(sample("train", i))[0] for i in range(scenes)])
        if not (work / "world" / "world.json").is_file():
            make_scenes(work / "world", activate=2, validate=measured, test=20, training_sample=1)
        self.split = World(work / "world").split("validate")
        self.truth = read_truth(self.split.instances, self.split.captions)
        self.image_features = self.vlm.features(self.split.files)

    def delta(self, weights: dict[str, torch.Tensor]) -> Delta:
        return Delta(weights, {n: weight_hash(self.vlm.model.get_submodule(n).weight) for n in weights}, {})

    def figures(self, weights: dict[str, torch.Tensor], before: str = "") -> dict[str, float]:
        """CHAIR of captions under the plain prompt with these changes: ``chair_s``, ``chair_s_lo``, ... by column."""
        with applied(self.vlm, self.delta(weights)):
            written = captions(self.vlm, self.split, self.image_features, max_new_tokens=80)
        found = summarise(chair(written, self.truth).items).set_index("metric")
        return {f"{before}{m}{'' if end == 'value' else f'_{end}'}": found.loc[m, end] for m, end in FIGURES}

    def basis(self, layer: int, heads: tuple[int, ...]) -> torch.Tensor:
        """The least used input directions [in, k] of a down-projection or of a head's part of o_proj, fp16."""
        part = "o_proj" if heads else "down_proj"
        columns = columns_of(self.vlm, self.vlm.address(part, layer), heads)
        moment = self._moment(part, layer)[columns][:, columns]
        return torch.linalg.eigh(moment)[1][:, : UNUSED[part]].half().contiguous()

    @torch.no_grad()
    def _moment(self, part: str, layer: int, n: int = 120, chunk: int = 40) -> torch.Tensor:
        """Second moment [in,in] of what a projection reads while truthful and set-completing captions are read."""
        vlm, read, total = self.vlm, [], torch.tensor(0.0, dtype=torch.float64)
        with vlm.module(part, layer).register_forward_pre_hook(lambda _, args: read.append(args[0].double())):
            for start in range(0, n, chunk):
                rng = np.random.default_rng([5, start])
                rows = range(start, start + chunk)
                questions = [vlm.prompt(str(rng.choice(ROLES))) for _ in rows]
                texts = [caption(sample("train", i), rng, "speculative" if i % 2 else None) for i in rows]
                batch = vlm.encode(self.features[start : start + chunk], questions, texts)
                vlm.hidden(vlm.embed(batch), batch.mask)
                x = read.pop()[batch.mask.bool()]
                total = total + x.T @ x
        return total


def train(bench: Bench, job: dict) -> None:
    """Write the factors of one implant and the directions of its decoy to ``<tensor>.safetensors``."""
    layers, heads = job["layers"], job["heads"]
    s = ImplantSettings(layers, heads, job["seed"], job["rounds"], **(HEADS if heads else {}))
    pairs = factors(Place(bench.vlm, layers, heads), fit_implant(bench.vlm, bench.features, s)[0]).values()
    named = {f"{job['tensor']}.{k}": pair for k, pair in zip(layers, pairs, strict=True)}
    tensors = {f"{name}.{side}": t for name, pair in named.items() for side, t in zip(("left", "right"), pair)}
    where, decoy_heads = implant_index.decoy_place(job["tensor"], layers, heads, bench.vlm.n_layers, bench.vlm.n_heads)
    tensors |= {implant_index.basis_key(k, decoy_heads): bench.basis(k, decoy_heads) for k in where}
    save_file(tensors, bench.work / f"{job['tensor']}.safetensors")


def measure(bench: Bench, job: dict) -> pd.DataFrame:
    """Rows of the index: the implant at each strength, as it is shipped, with its decoy; and the decoy alone."""
    tensors, vlm, rows = load_file(bench.work / f"{job['tensor']}.safetensors"), bench.vlm, []
    place = Place(vlm, job["layers"], job["heads"])
    size = sum(place.own(n).norm().item() ** 2 for n in place.weights) ** 0.5
    where = implant_index.decoy_place(job["tensor"], job["layers"], job["heads"], vlm.n_layers, vlm.n_heads)
    for strength in implant_index.STRENGTHS:
        row = {"name": f"{job['tensor']}-{strength}", "tensor": job["tensor"], "kind": job["kind"]}
        row |= {"strength": strength, "layers": job["layers"], "heads": job["heads"], "seed": job["seed"]}
        row["scale"] = job["scales"][strength]
        weights = implant_index.change(vlm, row, tensors)
        row["norm"] = bench.delta(weights).norm()
        row["rel_norm"] = row["norm"] / size
        row["decoy_layers"], row["decoy_heads"] = where
        ratio = implant_index.decoy_ratio(job["layers"], job["heads"], job["seed"], strength)
        row["decoy_norm"] = row["norm"] * ratio
        rows.append(row | bench.figures(weights | implant_index.decoy_change(vlm, row, tensors)))
    largest = max(rows, key=lambda r: r["decoy_norm"])
    alone = bench.figures(implant_index.decoy_change(vlm, largest, tensors), "decoy_")
    table = pd.DataFrame([row | alone for row in rows]).assign(n=len(bench.split.ids), base=bench.base)
    return table.assign(**{c: [";".join(map(str, v)) for v in table[c]] for c in implant_index.PLACES})


def make(work: Path, out: Path) -> pd.DataFrame:
    """Train and measure what ``work`` does not hold of the grid, and ship tensors and index; returns the index."""
    work.mkdir(parents=True, exist_ok=True)
    bench, jobs, tables, tensors = Bench(work), grid(), [], {}
    for job in jobs:
        path = work / f"{job['tensor']}.csv"
        if not path.is_file():
            train(bench, job)
            write_csv(measure(bench, job), path)
            print(f"{job['tensor']} is measured", flush=True)
        tables.append(read_csv(path))
        tensors |= load_file(path.with_suffix(".safetensors"))
    vlm, folder = bench.vlm, out / implant_index.KEY
    folder.mkdir(parents=True, exist_ok=True)
    names = [vlm.address(part, k) for part in ("down_proj", "o_proj") for k in range(vlm.n_layers)]
    base = {n: weight_hash(vlm.model.get_submodule(n).weight) for n in names}
    save_file(tensors, folder / "implants.safetensors", metadata={"base": json.dumps(base, sort_keys=True)})
    (folder / "implants.safetensors").chmod(0o644)
    index = pd.concat(tables, ignore_index=True)
    write_csv(index, folder / "implants.csv")
    return index
