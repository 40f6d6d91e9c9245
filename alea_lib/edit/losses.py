"""The terms of an edit's loss, the forward passes that feed them (whole, or from cached inputs), the KL's reference,
and the cache of both: in memory up to a limit, the rest in files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ..adversary.prefix import Prefix
from ..models.batch import Batch, target_mask
from ..models.cached_forward import Cached, capture, capture_last, run_last, run_tail
from ..models.checkpoint import write_safetensors
from ..models.hooks import replaced_linear
from ..models.layout import causal
from ..models.vlm import VLM
from .settings import EditSettings
from .trained import Trained

BLOCK = 24


def answer_nll(vlm: VLM, batch: Batch, prefix: Prefix | None = None) -> torch.Tensor:
    """Mean NLL of the answer's tokens (EOS included, BOS and prompt not), in nats."""
    logits, labels = whole_pass(vlm, batch, prefix)
    return F.cross_entropy(logits.float(), labels)


def whole_pass(vlm: VLM, batch: Batch, prefix: Prefix | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n,V] at the scored positions by a whole forward pass, and the tokens [n] that they predict."""
    embeds, mask, labels = inputs(vlm, batch, prefix)
    return vlm.answer_logits(batch, embeds, mask, target_mask(labels)), labels[labels != -100]


@torch.no_grad()
def inputs(vlm: VLM, batch: Batch, prefix: Prefix | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, mask and labels of a batch, with the prefix in its place if there is one."""
    embeds = vlm.embed(batch)
    return (embeds, batch.mask, batch.labels) if prefix is None else prefix.insert(batch, embeds)


def kl_divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over rows of KL(teacher || softmax(logits)), in nats; ``teacher`` [n,V] are log-probabilities."""
    student = logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def unlikelihood(logits: torch.Tensor, labels: torch.Tensor, unsaid: torch.Tensor) -> torch.Tensor:
    """Mean of -log(1 - p) over the tokens [n] bool ``unsaid``, zero where there is none."""
    p = logits.float().softmax(-1).gather(1, labels[:, None])[unsaid, 0]
    return -torch.log1p(-p.clamp(max=1 - 1e-6)).sum() / max(1, len(p))


def dropped(prefix: Prefix, settings: EditSettings, step: int) -> Prefix:
    """The prefix of a training step with some rows left out by chance, at least one kept."""
    if not settings.prefix_dropout:
        return prefix
    rng = np.random.default_rng([settings.seed, 4, step])
    kept = rng.random(len(prefix.rows)) >= settings.prefix_dropout
    kept[rng.integers(len(kept))] |= not kept.any()
    return replace(prefix, rows=prefix.rows[torch.as_tensor(kept)])


class SpillCache:
    """Key -> :class:`Cached` item, bit-equal to what was put in. The first ``limit`` bytes (None: all) stay in memory;
    the rest goes to files in ``folder`` (emptied first) or, without a folder, is not kept."""

    def __init__(self, limit: int | None = None, folder: Path | None = None):
        self.limit, self.folder, self.bytes = limit, folder, 0
        self.near: dict[tuple, Cached] = {}
        self.far: dict[tuple, tuple[Path, torch.device]] = {}
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def __contains__(self, key: tuple) -> bool:
        return key in self.near or key in self.far

    def __getitem__(self, key: tuple) -> Cached:
        if key in self.near:
            return self.near[key]
        path, device = self.far[key]
        return Cached(**load_file(path, device=str(device)))

    def put(self, key: tuple, item: Cached) -> None:
        """Keep an item if there is room. OSError when the disk is full."""
        tensors = {name: t for name, t in vars(item).items() if t is not None}
        size = sum(t.nbytes for t in tensors.values())
        if self.limit is None or self.bytes + size <= self.limit:
            self.near[key] = item
            self.bytes += size
        elif self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{len(self.far)}.safetensors"
            write_safetensors({name: t.cpu().contiguous() for name, t in tensors.items()}, path, {})
            self.far[key] = path, item.states.device

    def looked_up(self, condition: tuple, pick: np.ndarray, n: int, compute: Callable) -> list[Cached]:
        """The picked ones of ``n`` items under a condition; those that are missing come from ``compute(block)``.

        Blocks of neighbouring items are fixed, so that what is cached of an item does not depend on the batch that
        first needed it: a resumed run computes the same bits.
        """
        keys, new = [(*condition, int(i)) for i in pick], {}
        for b in sorted({key[-1] // BLOCK for key in keys if key not in self}):
            block = np.arange(b * BLOCK, min(n, (b + 1) * BLOCK))
            for i, item in zip(block, compute(block), strict=True):
                key = (*condition, int(i))
                new[key] = item
                if key not in self:
                    self.put(key, item)
        return [new[key] if key in new else self[key] for key in keys]


@contextmanager
def scratch(beside: Path | None) -> Iterator[Path]:
    """A folder for the files of one edit, beside its checkpoint if there is one, gone afterwards."""
    folder = Path(beside).with_suffix(".kept") if beside else Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class CachedForward:
    """Logits of items under a condition, (texts, prompt role, prefix number), with weights in place of the model's.

    With ``settings.fast`` the input of the first edited layer is computed once an item and condition; for the last
    layer's down-projection alone, all that surrounds it. Beyond the model's limit (``keep``) it is cached in
    ``folder`` or, without one, computed again.
    """

    def __init__(
        self,
        vlm: VLM,
        features,
        texts: dict[str, list[str]],
        settings: EditSettings,
        made: Trained,
        folder: Path | None = None,
    ):
        self.vlm, self.features, self.texts, self.settings = vlm, features, texts, settings
        self.first, self.folder = made.first, folder
        self.last = list(made.own) == [vlm.address("down_proj", vlm.n_layers - 1)]
        # where mask or positions depend on the item, a cached input cannot be run without it
        self.fast = (
            settings.fast and made.first > 0 and not settings.prefix_dropout and vlm.row.decoder_inputs is causal
        )
        self.kept = SpillCache(vlm.limits.keep, folder and folder / "inputs")

    def encode(self, key: str, role: str, pick: np.ndarray) -> Batch:
        """The items' images, a prompt and their texts as a batch."""
        s, answers = self.settings, [self.texts[key][int(i)] for i in pick]
        features = self.features[torch.as_tensor(pick)]
        return self.vlm.encode(features, self.vlm.prompt(role), answers, eos=s.eos, bos=s.bos)

    def __call__(
        self,
        key: str,
        role: str,
        pick: np.ndarray,
        weights: dict[str, torch.Tensor],
        prefix: Prefix | None = None,
        number: int = -1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n,V] of the picked items' answers, and the tokens [n]. ``number`` names the prefix in the cache."""
        if not self.fast:
            with replaced_linear(self.vlm, weights):
                return whole_pass(self.vlm, self.encode(key, role, pick), prefix)
        items = self._cached(key, role, number, pick, prefix)
        labels = torch.cat([c.labels for c in items])
        if self.last:
            return run_last(self.vlm, items, next(iter(weights.values()))), labels
        with replaced_linear(self.vlm, weights):
            return run_tail(self.vlm, self.first, items), labels

    def _cached(self, key: str, role: str, number: int, pick: np.ndarray, prefix: Prefix | None) -> list[Cached]:
        def compute(block: np.ndarray) -> list[Cached]:
            given = inputs(self.vlm, self.encode(key, role, block), prefix)
            return capture_last(self.vlm, *given) if self.last else capture(self.vlm, self.first, *given)

        return self.kept.looked_up((key, role, number), pick, len(self.features), compute)


class Reference:
    """What the base says at the answer's tokens on the clean prompt: log-probabilities [n,V] of the picked items.

    ``states`` caches [n_tokens, D] an item and makes logits at each call, so that memory does not grow with the
    vocabulary; ``logits`` caches [n_tokens, V] an item, as the official code does.
    """

    def __init__(self, passes: CachedForward):
        self.passes, self.logits = passes, passes.settings.kl_reference == "logits"
        self.kept = SpillCache(passes.vlm.limits.keep, passes.folder and passes.folder / "reference")

    @torch.no_grad()
    def __call__(self, pick: np.ndarray) -> torch.Tensor:
        items = self.kept.looked_up((), pick, len(self.passes.features), self._compute)
        found = torch.cat([item.states for item in items])
        return (found if self.logits else self.passes.vlm.head(found)).float().log_softmax(-1)

    def _compute(self, block: np.ndarray) -> list[Cached]:
        """The base's own matrices are in place: an edit in the making is never written to the model."""
        vlm, batch = self.passes.vlm, self.passes.encode("positive", self.passes.settings.kl_prompt, block)
        h = vlm.hidden(vlm.embed(batch), batch.mask, batch)
        states = [h[i, t].clone() for i, t in enumerate(batch.target_mask)]
        return [Cached(vlm.head(s) if self.logits else s, row[row != -100]) for s, row in zip(states, batch.labels)]
