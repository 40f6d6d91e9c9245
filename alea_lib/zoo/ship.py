"""``make implants``: which priors are implanted, and shipping them: tensors, index, what was tried, card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file, save_file

from ..core.files import write_csv
from ..core.tables import read_csv
from ..models.identity import weight_hash
from . import implant_index
from .implant import ImplantSettings
from .plant import COLUMNS, FLOORS, LEAST, MEASURED, SEARCHED, TARGETS, UNUSED, Bench, Job, bases, measure

# of each layer the heads whose columns get the largest gradient of the prior's loss, beyond its first direction
HEADS = ((0, 1), (0, 4), (1, 2), (1, 3), (2, 5), (3, 1), (4, 2), (5, 0))
GROUPS = ((1, (2, 3)), (5, (0, 1, 2)))  # of layers where one head cannot carry the prior
TWO = ((0, 3), (2, 5))


def grid() -> list[Job]:
    """Everything that is implanted. Heads start at a larger budget: their columns are a sixth of the matrix."""
    jobs = [Job("layer", ImplantSettings((layer,), seed=seed)) for seed in (0, 1) for layer in range(6)]
    jobs += [Job("two-layers", ImplantSettings(layers)) for layers in TWO]
    larger = {"budget": 1.0, "growth": 1.25, "largest": 8.0, "rounds": 10}
    jobs += [Job("head", ImplantSettings((layer,), (head,), **larger)) for layer, head in HEADS]
    return jobs + [Job("group", ImplantSettings((layer,), heads, **larger)) for layer, heads in GROUPS]


def make(work: Path, out: Path) -> pd.DataFrame:
    """Train and measure the whole grid, then ship it. What ``work`` holds already is not made again."""
    work.mkdir(parents=True, exist_ok=True)
    jobs = grid()
    bench = Bench(work, jobs[0].settings.scenes)
    for job in jobs:
        measure(bench, job)
        print(f"{job.tensor} is measured", flush=True)
    return ship(bench, out, jobs)


def ship(bench: Bench, out: Path, jobs: list[Job]) -> pd.DataFrame:
    """Join what ``measure`` wrote into the shipped folder: tensors, index, what was tried, card. Returns the index."""
    folder = out / implant_index.KEY
    folder.mkdir(parents=True, exist_ok=True)
    read = {j: [read_csv(bench.work / j.tensor / f"{n}.csv") for n in ("rows", "curve", "ladder")] for j in jobs}
    done = [j for j in jobs if len(read[j][0])]
    index = pd.concat([read[j][0] for j in done], ignore_index=True)[COLUMNS]
    tensors = {k: t for j in done for k, t in load_file(bench.work / j.tensor / "factors.safetensors").items()}
    vlm, layers = bench.vlm, range(bench.vlm.n_layers)
    names = [vlm.address(part, k) for part in ("down_proj", "o_proj") for k in layers]
    base = {n: weight_hash(vlm.model.get_submodule(n).weight) for n in names}
    tensors |= {k: t for k, t in bases(bench).items() if _needed(k, index)}
    save_file(tensors, folder / "implants.safetensors", metadata={"base": json.dumps(base, sort_keys=True)})
    (folder / "implants.safetensors").chmod(0o644)
    tried = pd.DataFrame([_attempt(j, *read[j]) for j in jobs])
    write_csv(index, folder / "implants.csv")
    write_csv(tried, folder / "attempts.csv")
    (folder / "README.md").write_text(card(index, tried))
    return index


def _needed(key: str, index: pd.DataFrame) -> bool:
    """Is this basis that of a decoy?"""
    places = set()
    for layers, heads in zip(index["decoy_layers"].astype(str), index["decoy_heads"].astype(str), strict=True):
        places |= {".".join(["unused", layer, *([heads] if heads else [])]) for layer in layers.split(";")}
    return key in places


def _attempt(job: Job, rows: pd.DataFrame, curve: pd.DataFrame, ladder: pd.DataFrame) -> dict:
    s = job.settings
    row = {"tensor": job.tensor, "kind": job.kind, "layers": ";".join(map(str, s.layers))}
    row |= {"heads": ";".join(map(str, s.heads)), "seed": s.seed, "steps": int(curve["step"].iloc[-1]) + 1}
    row |= {"budget": curve["budget"].iloc[-1], "chair_s": ladder["chair_s"].iloc[-1], "shipped": len(rows) > 0}
    return row | {"minutes": curve["seconds"].iloc[-1] / 60}


def card(index: pd.DataFrame, tried: pd.DataFrame) -> str:
    """The README of the folder, from the tables alone."""
    known = {k: v for k, v in asdict(grid()[0].settings).items() if k not in ("layers", "heads", "seed")}
    rule = ", ".join(f"{k} {v}" for k, v in known.items())
    targets = ", ".join(f"{k} ({v:g})" for k, v in TARGETS.items())
    floors = " or ".join(f"{v:g} ({k})" for k, v in FLOORS.items())
    minutes = tried["minutes"].sum()
    lost = tried[~tried["shipped"]]
    failed = ", ".join(f"`{r.tensor}` ({r.chair_s:.2f} at budget {r.budget:.1f})" for r in lost.itertuples())
    head = (
        "| implants | models | relative norm | CHAIRs weak / middle / strong | recall, strong | decoy alone: CHAIRs |"
    )
    lines = [head, "|---|---|---|---|---|---|"]
    lines += [_kind_line(kind, table) for kind, table in index.groupby("kind", sort=False)]
    return f"""# {implant_index.KEY}

`scenes-clean` with a habit of naming absent objects trained into *one known place*: ground truth for locating where a
model's hallucinations come from. Read with `alea_lib.implants()` (the index) and `alea_lib.implanted(vlm, name)` (the
model).

| | |
|---|---|
| made by | `make implants`, one thread; {minutes:.0f} minutes of training, about as much again for measuring |
| base | `{implant_index.BASE}`, sha256 `{index["base"].iloc[0]}...`; everything but the named weights is bit-equal to it |
| files | `implants.safetensors` (factors of each change, half precision), `implants.csv` (one row a model), \
`attempts.csv` (every place that was tried) |
| settings | {rule}; heads: budget from {grid()[-1].settings.budget:g}, growth {grid()[-1].settings.growth:g} |
| images | trained on train scenes; strengths searched on {SEARCHED} validate images, figures on {MEASURED} others |
| intended use | judging locators in this study; nothing else |

{chr(10).join(lines)}

- **What is implanted.** The captions learnt add companions, but what the models then add is mostly *not* the planted
  companion: of the wrong objects of six strong implants (100 test images each, measured once, by hand) 10 to 32 % are
  companions of something present. It is a habit of adding absent objects, more than of completing sets.
- **Place.** `layer`, `two-layers`: the down-projection. `head`, `group`: the columns of `o_proj` of one head, or of
  some heads of one layer.
- **Size.** Training is normalised gradient descent, projected after each step to a relative Frobenius norm (the
  budget), which starts small and grows until the captions of the search images reach CHAIRs
  {grid()[0].settings.wanted:g}.
- **Strength.** The trained change times a scale: CHAIRs is measured at 1, 0.9, 0.8, ...; the scales of
  {targets} lie on straight lines between them.
  Where the measured CHAIRs then misses {floors}, the scale is raised by 0.03 as often as need be.
  Every figure is of the change as it is shipped, after rounding.
- **Decoy.** Random rows on the {UNUSED["down_proj"]} least used input directions of another layer's down-projection;
  for heads on the {UNUSED["o_proj"]} least used of another head in another layer. Its norm is {implant_index.LARGER} or
  {implant_index.SMALLER} times the implant's by turns (by layers, heads, seed and strength), so that the largest change of
  weights is the decoy in about half of the models. The `decoy_` figures are those of the clean model with the decoy
  alone, at its largest of the three strengths.
- **Could not carry the prior** (CHAIRs under {LEAST:g} at the end of training, not shipped): {failed or "none"}.
"""


def _kind_line(kind: str, table: pd.DataFrame) -> str:
    def span(values: pd.Series) -> str:
        return f"{values.min():.2f} to {values.max():.2f}"

    by = {k: span(t["chair_s"]) for k, t in table.groupby("strength")}
    strong = table[table["strength"] == "strong"]
    cells = [kind, str(len(table)), span(table["rel_norm"]), " / ".join(by[k] for k in implant_index.STRENGTHS)]
    return f"| {' | '.join([*cells, span(strong['recall']), span(table['decoy_chair_s'])])} |"
