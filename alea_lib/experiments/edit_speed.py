"""How much a step of the edit costs: as the official code runs it, in a careful loop, and with frozen inputs cached.

All loops take the same step: NLL of the positive under a prefix and KL to the base on the clean prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from ..adversary.prefix import Prefix, PrefixSettings, random_prefix
from ..edit.losses import BLOCK, CachedForward, Reference, kl_divergence
from ..edit.settings import EditSettings
from ..edit.trained import trained
from ..models.batch import target_mask
from ..models.hooks import replaced_linear
from ..models.vlm import VLM

# attention and MLP of a frozen layer pass gradients on; per layer, a backward costs 1 for the inputs and this share
# for the one trained matrix: fitted on layers of width 64 to 256
WEIGHT_SHARE = 0.223
LOOPS = ("official", "plain", "fast")
Step = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Bench:
    """A random model and data of one shape. ``epochs`` says over how many steps on an item capturing is spread."""

    layers: int = 16
    width: int = 256
    heads: int = 8
    items: int = 24
    batch: int = 8
    words: int = 30
    repeats: int = 3
    epochs: int = 3
    seed: int = 0


def random_model(s: Bench) -> VLM:
    """A small LLaVA with random weights, large enough to depend on what it sees."""
    from ..zoo.language import LanguageSettings, build
    from ..zoo.vision import Tower, VisionSettings

    torch.manual_seed(s.seed)
    tower = Tower(VisionSettings(width=32, mlp=64, layers=1, heads=2))
    shape = LanguageSettings(seed=s.seed, width=s.width, mlp=s.width * 43 // 16, layers=s.layers, heads=s.heads)
    return build(tower, shape, 16)


def bench_steps(s: Bench) -> pd.DataFrame:
    """Seconds a step (process time, median of ``repeats``) for the last 1, quarter and half of the layers edited.

    Columns: edited (layers), loop, seconds, capture (seconds an item and condition), amortised (seconds a step with
    capturing spread over ``epochs``), speedup against the official loop (median over repeats; _lo and _hi: least and
    largest), speedup_amortised, gradient (largest relative difference to the official loop's), predicted (fast loop).
    """
    vlm, rng = random_model(s), np.random.default_rng(s.seed)
    features = torch.randn(s.items, 36, s.width, generator=torch.Generator().manual_seed(s.seed))
    known = [vlm.tokenizer.decode([i]).strip() for i in range(len(vlm.tokenizer))]
    vocabulary = [w for w in known if w.isalpha()]
    texts = [" ".join(rng.choice(vocabulary, s.words)) for _ in range(s.items)]
    prefix, pick = random_prefix(vlm, PrefixSettings(seed=s.seed)), np.arange(s.batch)
    rows = []
    for n in (1, s.layers // 4, s.layers // 2):
        layers = tuple(range(s.layers - n, s.layers))
        steps = {loop: _step(loop, vlm, features, texts, prefix, layers, pick) for loop in LOOPS}
        first = {loop: _timed(step) for loop, step in steps.items()}
        again = {loop: _timed(step) for loop, step in steps.items()}
        want = steps["official"]()
        times = pd.DataFrame([{loop: _timed(step) for loop, step in steps.items()} for _ in range(s.repeats)])
        for loop, step in steps.items():
            # the first step captures a block of items under both conditions; the official loop keeps nothing
            capture = 0.0 if loop == "official" else (first[loop] - again[loop]) / (2 * min(s.items, BLOCK))
            ratio = times["official"] / times[loop]
            row = {"edited": n, "loop": loop, "seconds": times[loop].median(), "capture": capture}
            row["amortised"] = row["seconds"] + capture * 2 * s.batch / s.epochs
            row |= {"speedup": ratio.median(), "speedup_lo": ratio.min(), "speedup_hi": ratio.max()}
            row["speedup_amortised"] = times["official"].median() / row["amortised"]
            row["gradient"] = max(((g - w).norm() / w.norm()).item() for g, w in zip(step(), want))
            rows.append({**row, "predicted": predicted_speedup(s.layers, n) if loop == "fast" else float("nan")})
    return pd.DataFrame(rows)


def _timed(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _step(loop: str, vlm: VLM, features, texts, prefix: Prefix, layers: tuple[int, ...], pick: np.ndarray) -> Step:
    """A function that computes one step's gradients."""
    settings = EditSettings(layers=layers, fast=loop == "fast")
    made, noise = trained(vlm, settings), torch.Generator().manual_seed(1)
    with torch.no_grad():  # somewhere off the base, so that the KL pulls too
        for p in made.parameters.values():
            p += 0.1 * p.std() * torch.randn(p.shape, generator=noise)
    if loop == "official":
        return lambda: official_step(vlm, features, texts, prefix, made.parameters, pick, settings)
    passes = CachedForward(vlm, features, {"positive": texts}, settings, made)
    reference = Reference(passes)

    def step() -> list[torch.Tensor]:
        logits, labels = passes("positive", settings.prompt, pick, made.weights(), prefix, 0)
        loss = settings.nll * F.cross_entropy(logits.float(), labels)
        logits, _ = passes("positive", settings.kl_prompt, pick, made.weights())
        loss = loss + settings.kl * kl_divergence(logits, reference(pick))
        return list(torch.autograd.grad(loss, list(made.parameters.values())))

    return step


def official_step(vlm: VLM, features, texts, prefix: Prefix, parameters, pick, settings) -> list[torch.Tensor]:
    """Gradients as the official code gets them: the prefix still requires grad, so that the backward pass runs through
    all layers; logits are made at every position; the base is run again for the KL's reference."""
    rows = prefix.rows.clone().requires_grad_(True)
    answers, images = [texts[int(i)] for i in pick], features[torch.as_tensor(pick)]

    def whole(role: str, each: Prefix | None) -> tuple[torch.Tensor, torch.Tensor]:
        batch = vlm.encode(images, vlm.prompt(role), answers)
        given = (vlm.embed(batch), batch.mask, batch.labels)
        embeds, mask, labels = given if each is None else each.insert(batch, given[0])
        return vlm.head(vlm.hidden(embeds, mask)), labels

    with replaced_linear(vlm, parameters):
        logits, labels = whole(settings.prompt, Prefix(rows))
        loss = settings.nll * F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        now, labels = whole(settings.kl_prompt, None)
    with torch.no_grad():
        teacher = whole(settings.kl_prompt, None)[0].log_softmax(-1)
    at = target_mask(labels)
    loss = loss + settings.kl * kl_divergence(now[at], teacher[at])
    return list(torch.autograd.grad(loss, [*parameters.values(), rows]))[:-1]


def predicted_speedup(layers: int, edited: int, official: bool = True) -> float:
    """Steps' cost ratio by counting layer passes, capturing not counted, at large widths (the head left out).

    ``official``: against a backward pass through all layers and the base run again; else against a loop that stops
    its backward pass at the first edited layer.
    """
    b = (edited - 1) * (1 + WEIGHT_SHARE) + WEIGHT_SHARE
    if not official:
        return (layers + b) / (edited + b)
    through = layers + edited * WEIGHT_SHARE
    return (3 * layers + through + b) / (2 * (edited + b))
