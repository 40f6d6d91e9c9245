"""What a locator is, and what it looks at. A locator names its needs; each is collected once, in batches, and shared.

Two kinds of needs: a *reader* reads the one plain pass over all pairs (all readers share it), a *pass* runs
passes of its own (:mod:`alea_lib.locate.causal`). Both turn a batch into one row a pair, so memory grows with the
batch alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from ..core.files import DataError
from ..models.hooks import counted, full_weight, read_attention, read_heads, read_layers
from ..models.vlm import VLM
from .settings import LocateSettings
from .tokens import contrast_weights, encode, pooling_weights, suspects

SYMMETRIES = ("even", "odd", "none")
Cost = int | Callable[[int, int], float]


@dataclass(frozen=True)
class Locator:
    """``function(evidence)`` gives [N,L] (target ``layer``) or [N,L,H] (``head``), larger = more suspect.

    ``symmetry``: what swapping the two answers of each pair (and what is wrong in them) does to the scores: nothing
    (``even``), turn their sign (``odd``), neither. ``needs``: what is collected for it; ``image``: it is meaningless
    without one. ``cost``, ``backward``: forward and backward passes a pair with the standard settings, numbers or
    functions of the numbers of layers and heads.
    """

    name: str
    target: str
    function: Callable
    formula: str
    source: str
    symmetry: str
    needs: tuple[str, ...] = ()
    image: bool = False
    cost: Cost = 0
    backward: Cost = 0

    def passes(self, layers: int, heads: int) -> tuple[float, float]:
        """Forward and backward passes a pair that the row claims for a model of this size."""
        forward, backward = (float(c(layers, heads) if callable(c) else c) for c in (self.cost, self.backward))
        return forward, backward


LAYER_LOCATORS: dict[str, Locator] = {}
HEAD_LOCATORS: dict[str, Locator] = {}
TARGETS = {"layer": LAYER_LOCATORS, "head": HEAD_LOCATORS}
READERS: dict[str, Callable] = {}
PASSES: dict[str, Callable] = {}


def _register(target: str, name: str, function: Callable | None = None, **facts):
    """Register a function, or what is decorated; ``facts``: the other fields of its row."""
    if function is None:
        return partial(_register, target, name, **facts)
    if facts["symmetry"] not in SYMMETRIES or name in TARGETS[target]:
        raise ValueError(f"{target} locator {name!r}: a new name, and a symmetry among {SYMMETRIES}")
    TARGETS[target][name] = Locator(name, target, function, **facts)
    return function


layer_locator, head_locator = partial(_register, "layer"), partial(_register, "head")


def reader(function: Callable) -> Callable:
    """Register a reader: ``(work, out)``, a generator that reads a forward pass and fills ``out``."""
    READERS[function.__name__] = contextmanager(function)
    return function


def own_pass(function: Callable) -> Callable:
    """Register a pass under its name (with hyphens): ``work -> {name: tensor with one row a pair}``."""
    PASSES[function.__name__.replace("_", "-")] = function
    return function


class Work:
    """One batch of ``n`` pairs, the ``n`` positives first and then the ``n`` negatives, with what is computed of it."""

    final: torch.Tensor  # what the plain pass ends in, after the last norm

    def __init__(self, evidence: Evidence, rows: np.ndarray):
        self.evidence, self.n = evidence, len(rows)
        self.vlm, self.settings = evidence.vlm, evidence.settings
        part = evidence.pairs.iloc[rows]
        self.texts = (part["positive"].tolist(), part["negative"].tolist(), part["wrong"].tolist())
        features = torch.cat([evidence.features[torch.as_tensor(rows)]] * 2)
        self.batch = encode(self.vlm, features, self.texts[0] + self.texts[1], self.settings)
        self.image = self.batch.ids == self.vlm.image_id  # [2n,T] bool: image positions
        with torch.no_grad():
            self.embeds = self.vlm.embed(self.batch)  # [2n,T,D]
        # [2n,T]: positions whose states are compared; [2n,R]: those with a weight in order, short rows filled up
        self.weight = pooling_weights(self.vlm, self.batch, *self.texts, self.settings)
        width = int((self.weight > 0).sum(1).max())
        self.positions = (self.weight > 0).long().topk(width, dim=1).indices.sort(dim=1).values

    @cached_property
    def contrast(self) -> torch.Tensor:
        """[2n,T]: label positions of the objects that causal locators compare."""
        return contrast_weights(self.vlm, self.batch, *self.texts, self.settings)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """x [2n,T,...] -> its weighted mean over positions [2n,...], fp32 on the CPU."""
        return torch.einsum("bt,bt...->b...", self.weight, x.float()).cpu()

    def answers(self, layers: dict[int, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Tensors [2n,...] by layer -> [n,L,...] of the positives and of the negatives."""
        return torch.stack([layers[i] for i in range(self.vlm.n_layers)], 1).split(self.n)


class Evidence:
    """``evidence[need]``: a dict of arrays with one row a pair, collected when first asked for.

    ``spent``: one row for each pass over the pairs: its needs, forwards, backwards (sequences through the whole
    language model) and seconds. ``costs``: the same by need.
    """

    def __init__(self, vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, settings: LocateSettings):
        check(features, pairs)
        self.vlm, self.features, self.pairs, self.settings = vlm, features, pairs.reset_index(drop=True), settings
        self.spent: list[dict] = []
        self.costs: dict[str, dict[str, float]] = {}
        self._got: dict[str, dict[str, np.ndarray]] = {}

    @cached_property
    def grey(self) -> torch.Tensor:
        """Features [1,P,D] of an image that shows nothing."""
        return self.vlm.features([Image.new("RGB", (336, 336), (128, 128, 128))])

    def weight(self, part: str, layer: int) -> torch.Tensor:
        """A copy in fp32 of the weight [out,in] of ``down_proj`` or ``o_proj`` of a layer."""
        return full_weight(self.vlm, self.vlm.address(part, layer))

    def __getitem__(self, need: str) -> dict[str, np.ndarray]:
        self.collect([need])
        return self._got[need]

    def collect(self, needs: Iterable[str]) -> None:
        """Collect what is not there yet: all readers in one pass, then each pass of its own."""
        missing = [n for n in dict.fromkeys(needs) if n not in self._got]
        if unknown := set(missing) - set(READERS) - set(PASSES):
            raise KeyError(f"unknown needs {sorted(unknown)}; there are {sorted({*READERS, *PASSES})}")
        if self.settings.pooling == "object" or set(missing) & set(PASSES):
            for row in self.pairs.itertuples():  # an error now, not after minutes
                suspects(self.vlm, row.positive, row.negative, row.wrong)
        if readers := [n for n in missing if n in READERS]:
            self._run(readers, "the plain pass")
        for name in missing:
            if name in PASSES:
                self._run([name], name)

    def _run(self, needs: list[str], progress: str) -> None:
        """Run readers, or one pass, over the batches; join the rows and count what it costs."""
        parts: dict[tuple[str, str], list[torch.Tensor]] = {}
        size = self.vlm.limits.of("train", self.settings.batch_size)  # some locators want gradients
        started = time.perf_counter()
        with counted(self.vlm) as count:
            for start in tqdm(range(0, len(self.pairs), size), desc=f"locate: {progress}", leave=False):
                work = Work(self, np.arange(start, min(start + size, len(self.pairs))))
                found_by = _plain_pass(work, needs) if needs[0] in READERS else {needs[0]: PASSES[needs[0]](work)}
                for need, found in found_by.items():
                    for key, value in found.items():
                        parts.setdefault((need, key), []).append(value.detach().float().cpu())
        for (need, key), values in parts.items():
            self._got.setdefault(need, {})[key] = torch.cat(values).numpy()
        seconds = time.perf_counter() - started
        cost = {"forwards": count.forwards, "backwards": count.backwards, "seconds": seconds}
        self.costs |= dict.fromkeys(needs, cost)
        self.spent.append({"needs": ", ".join(needs), **cost})


@torch.no_grad()
def _plain_pass(work: Work, readers: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What readers find in one plain pass."""
    out: dict[str, dict[str, torch.Tensor]] = {name: {} for name in readers}
    with ExitStack() as stack:
        for name in readers:
            stack.enter_context(READERS[name](work, out[name]))
        work.final = work.vlm.hidden(work.embeds, work.batch.mask, work.batch)
    return out


def check(features: torch.Tensor, pairs: pd.DataFrame) -> None:
    """DataError if pairs and features do not fit a locator."""
    if missing := [c for c in ("positive", "negative", "wrong") if c not in pairs]:
        raise DataError(f"pairs lack the columns {missing}: make them with `activate`")
    if len(pairs) == 0 or len(pairs) != len(features):
        raise DataError(f"{len(pairs)} pairs and features of {len(features)} images: one image a pair, at least one")
    for column in ("positive", "negative"):
        if (empty := pairs[column].str.strip() == "").any():
            raise DataError(f"pair {int(np.argmax(empty))} has an empty {column} answer: leave it out")


# ---- readers of the plain pass ---------------------------------------------------------------------------------------


@reader
def states(work: Work, out: dict) -> Iterator[None]:
    """``positive``, ``negative`` [n,L,D]: pooled states after each layer. ``geometry`` [n,L+1,3]: distance, mean norm
    and cosine of the two, the input embeddings first; with padded pooling each averaged over positions."""
    vlm, padded = work.vlm, work.settings.pooling == "padded"
    pooled, shapes = {}, {}

    def compared(h: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        if padded:
            return geometry(*h.float().split(work.n)).mean(1).cpu()
        return geometry(*mean.split(work.n))

    def take(layer: int, h: torch.Tensor) -> None:
        pooled[layer] = work.pooled(h)
        shapes[layer] = compared(h, pooled[layer])

    with read_layers(vlm, take):
        yield
    if work.settings.final_norm:
        take(vlm.n_layers - 1, work.final)
    out["positive"], out["negative"] = work.answers(pooled)
    out["geometry"] = torch.stack(
        [compared(work.embeds, work.pooled(work.embeds)), *(shapes[i] for i in range(vlm.n_layers))], 1
    )


def geometry(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[...,D] twice -> [...,3]: distance, mean norm, cosine (1 where both are zero)."""
    norms = a.norm(dim=-1), b.norm(dim=-1)
    product = norms[0] * norms[1]
    cosine = torch.where(product > 0, (a * b).sum(-1) / product.clamp_min(1e-30), 1.0)
    return torch.stack([(a - b).norm(dim=-1), (norms[0] + norms[1]) / 2, cosine], -1)


@reader
def heads(work: Work, out: dict) -> Iterator[None]:
    """``positive``, ``negative`` [n,L,H,D/H]: pooled head outputs."""
    pooled = {}
    with read_heads(work.vlm, lambda layer, o: pooled.__setitem__(layer, work.pooled(o))):
        yield
    out["positive"], out["negative"] = work.answers(pooled)


@reader
def attention(work: Work, out: dict) -> Iterator[None]:
    """Attention on the image, averaged over the compared positions, of the positives and the negatives.

    ``mass`` [n,2,L,H]: its share. ``entropy`` [n,2,L,H]: entropy in nats of its distribution over image positions.
    """
    found = {}
    weight = work.weight.gather(1, work.positions)

    def take(layer: int, p: torch.Tensor) -> None:
        on_image = p * work.image[:, None, None, :]
        mass = on_image.sum(-1)
        entropy = torch.special.entr(on_image / mass[..., None].clamp_min(1e-30)).sum(-1)
        found[layer] = torch.einsum("br,xbhr->bxh", weight, torch.stack([mass, entropy])).cpu()

    with read_attention(work.vlm, take, work.positions):
        yield
    both = torch.stack(work.answers(found), 1)  # [n, 2 answers, L, 2 measures, H]
    out["mass"], out["entropy"] = both.unbind(3)
