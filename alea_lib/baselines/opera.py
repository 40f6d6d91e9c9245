"""OPERA (Huang et al. 2024): beam search that distrusts answers which lean on one of their own tokens, and goes back.

Attention is the last layer's, the largest of its heads, each row made to sum to 1. Each beam's likeliest next tokens
are tried: what the tried token looks at ends a triangle of what the answer's tokens look at among themselves. The
largest product along a column of it is the token's penalty; for the first tokens it is minus the share on the image.
When one column has been the largest in more than ``threshold`` steps of every beam, the answer goes back to the token
behind it and may not take the same ones again; that token is chosen among all, without penalty (official code).

Unlike the official code, which writes one answer at a time: columns that were the largest follow their beam, not their
place among the beams; products are computed from logarithms; an item that goes back is written again, with what is now
ruled out, together with others of its batch that go back.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LogitsProcessorList

from ..models.batch import Batch
from ..models.hooks import weighed_attention
from ..models.vlm import VLM
from .common import Columns
from .registry import Baseline, register

PUBLISHED_WORDS = 100  # of a caption of LLaVA-1.5-7B
CEILING = 700.0  # of a penalty's logarithm: what double precision holds


@dataclass(frozen=True)
class OperaSettings:
    """``candidates``: next tokens tried in each beam. ``scale``: factor of an attention share before products are taken
    (0: no penalty). ``damping``: factor of a product. ``first``: so many tokens are weighed by the image, and the
    answer never goes back behind them. ``threshold``: steps, more of which make it go back. ``times``: how often to the
    same place (0: it never goes back). ``words``: length of captions, see :func:`at_length`."""

    beams: int = 5
    candidates: int = 5
    scale: float = 50.0
    damping: float = 1e-7
    first: int = 10
    threshold: int = 15
    times: int = 5
    words: int = PUBLISHED_WORDS


def at_length(s: OperaSettings) -> OperaSettings:
    """Settings for captions of ``words`` words: what counts tokens keeps its share of the length, rounded (``first``,
    ``threshold``), and as a product of so many fewer factors is that power of the published, so is ``damping``."""
    share = s.words / PUBLISHED_WORDS
    return replace(s, first=round(s.first * share), threshold=round(s.threshold * share), damping=s.damping**share,
                   words=PUBLISHED_WORDS)  # fmt: skip


def column_scores(attention: torch.Tensor, scale: float, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest column product [...] of attention [...,n,n] of the answer's tokens on one another, and its column.

    A column's product: ``damping`` times its entries from the diagonal down, each times ``scale``; at most e^700,
    in double precision.
    """
    logs = torch.where(torch.ones_like(attention).tril() > 0, (scale * attention.double()).log(), 0.0).sum(-2)
    largest, column = (logs + math.log(damping)).max(-1)
    return largest.clamp(max=CEILING).exp(), column


class Kept(DynamicCache):
    """A cache with which the beams' attention ``rows`` [R,t,t] and largest ``columns`` [R,t] change places."""

    def __init__(self, n: int, device: torch.device):
        super().__init__()
        self.rows = torch.zeros(n, 0, 0, device=device)
        self.columns = torch.zeros(n, 0, dtype=torch.int64, device=device)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.rows, self.columns = self.rows[beam_idx], self.columns[beam_idx]


class Past:
    """What an item remembers: ``banned`` beginnings of answers, and how many ``times`` it went back to which place."""

    def __init__(self):
        self.banned: set[tuple[int, ...]] = set()
        self.times: Counter[int] = Counter()

    def goes_back(self, column: int, said: list[list[list[int]]], limit: int) -> bool:
        """Go back behind the token ``column``, or to it once that was done ``limit`` times. ``said[t]``: the item's
        beams of t tokens. False if there is nothing else to choose."""
        for place in (column + 1, column):
            if self.times[place] < limit and place + 1 < len(said):
                self.times[place] += 1
                self.banned |= {tuple(beam) for beam in said[place + 1]}
                return True
        return False

    def ruled_out(self, beams: list[list[int]]) -> list[tuple[int, int]]:
        """Which token in which beam may not follow now."""
        return [(i, b[-1]) for i, beam in enumerate(beams) for b in sorted(self.banned) if b[:-1] == tuple(beam)]


class Watch:
    """The logits processor of one beam search over some items of a batch, ``beams`` rows each."""

    def __init__(self, s: OperaSettings, vlm: VLM, batch: Batch, mask: torch.Tensor, pasts: list[Past]):
        rows = torch.arange(len(mask), device=mask.device).repeat_interleave(s.beams)
        self.s, self.vlm, self.pasts, self.mask = s, vlm, pasts, mask[rows]
        self.batch, self.columns = batch.without_images(rows), Columns(vlm, batch)
        self.cache, self.newest = Kept(len(rows), mask.device), mask.new_empty(0)
        self.said: list[list[list[list[int]]]] = [[] for _ in pasts]
        self.back: set[int] = set()

    def look(self, layer: int, scores: torch.Tensor) -> None:
        """Keep the newest token's attention [R,K]."""
        largest = scores.softmax(-1).amax(1)
        self.newest = largest / largest.sum(-1, keepdim=True)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if t := ids.shape[1]:
            self.cache.rows = torch.cat([pad(self.cache.rows, (0, 1)), self.newest[:, None, -t:]], 1)
        likely, tokens = scores.topk(self.s.candidates)
        penalty, column = self.penalty(self.tried(tokens))
        penalised = torch.full_like(scores, -torch.inf, dtype=torch.float64)
        penalised.scatter_(1, tokens, likely.double() - penalty)
        for said, beams in zip(self.said, ids.unflatten(0, (-1, self.s.beams)).tolist(), strict=True):
            said.append(beams)
        self.note(column)
        # what other processors ruled out stays out, and its probability is not given to the candidates
        return self.ruled(scores, penalised).log_softmax(-1).float() + scores.logsumexp(-1, keepdim=True)

    def tried(self, tokens: torch.Tensor) -> torch.Tensor:
        """What each candidate [R,C] would look at, [R,C,K]: one pass a candidate, which the cache then forgets."""
        read, looks = self.cache.get_seq_length(), []
        mask = pad(self.mask, (0, read + 1 - self.mask.shape[1]), value=1)
        for token in tokens.T:
            self.vlm.hidden(self.vlm.model.get_input_embeddings()(token[:, None]), mask, self.batch, self.cache, read)
            self.cache.crop(-1)
            looks.append(self.newest)
        return torch.stack(looks, 1)

    def penalty(self, looks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Penalties [R,C] of candidates that look so, and the largest columns [R,C]."""
        n = self.cache.rows.shape[1] + 1
        before = pad(self.cache.rows, (0, 1))[:, None].expand(-1, looks.shape[1], -1, -1)
        triangle = torch.cat([before, looks[:, :, None, -n:]], 2)
        largest, column = column_scores(triangle, self.s.scale, self.s.damping)
        on_image = (looks * self.columns.of_image(looks)).sum(-1)
        return (-on_image if n <= self.s.first else largest), column

    def note(self, column: torch.Tensor) -> None:
        """Remember the columns [R,C] that were the largest, and which items go ``back`` for them."""
        self.cache.columns = torch.cat([self.cache.columns, column.mode(-1).values[:, None]], 1)
        beams = self.cache.columns.unflatten(0, (-1, self.s.beams))
        now = beams[:, :, -1].mode(-1).values
        often = ((beams == now[:, None, None]).sum(-1) > self.s.threshold).all(-1)
        for item in (often & (now >= self.s.first)).nonzero().ravel().tolist():
            if item not in self.back and self.pasts[item].goes_back(int(now[item]), self.said[item], self.s.times):
                self.back.add(item)

    def ruled(self, scores: torch.Tensor, penalised: torch.Tensor) -> torch.Tensor:
        """``penalised`` [R,V], but all tokens' ``scores`` without the banned ones where an item has come back, and
        nothing but the end for items that have yet to."""
        for item, past in enumerate(self.pasts):
            own = slice(item * self.s.beams, (item + 1) * self.s.beams)
            if item in self.back:
                penalised[own] = -torch.inf
                penalised[own, self.vlm.end_id] = 0.0
            elif banned := past.ruled_out(self.said[item][-1]):
                penalised[own] = scores[own].double()
                for beam, token in banned:
                    penalised[own.start + beam, token] = -torch.inf
        return penalised


class Search:
    """What ``generate`` calls instead of its own loop: its beam search, again for the items that go back."""

    def __init__(self, s: OperaSettings, vlm: VLM, batch: Batch, mask: torch.Tensor):
        self.s, self.vlm, self.batch, self.mask = s, vlm, batch, mask
        self.watch: Watch | None = None

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **options):
        """Token ids [B,t] of the answers, with transformers' arguments of a custom ``generate``."""
        pasts, todo, out = [Past() for _ in self.mask], list(range(len(self.mask))), {}
        while todo:
            items = torch.tensor(todo, device=self.mask.device)
            batch = self.batch.without_images(items)
            self.watch = Watch(self.s, self.vlm, batch, self.mask[items], [pasts[i] for i in todo])
            rows = (items[:, None] * self.s.beams + torch.arange(self.s.beams, device=items.device)).ravel()
            own = {k: of_rows(v, rows, len(input_ids)) for k, v in options.items()}
            own["past_key_values"] = self.watch.cache
            processors = LogitsProcessorList([*logits_processor, self.watch])
            given = (input_ids[rows], processors, stopping_criteria, generation_config)
            new = type(model)._beam_search(model, *given, **own)
            out |= {item: ids for i, (item, ids) in enumerate(zip(todo, new)) if i not in self.watch.back}
            todo = [todo[i] for i in sorted(self.watch.back)]
        return pad_sequence([out[i] for i in sorted(out)], True, self.vlm.tokenizer.pad_token_id)


def of_rows(value, rows: torch.Tensor, n: int):
    """Some rows of an option of the language model; positions in space and time [3,n,T] have them second."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape[:2] == (3, n) and value.dim() == 3 and not value.is_floating_point():
        return value[:, rows]
    return value[rows] if len(value) == n else value


def opera(s: OperaSettings, vlm, batch, embeds, mask):
    """Decoding under these settings."""
    if min(s.beams, s.candidates, s.words) < 1 or s.scale < 0 or not 0 < s.damping <= 1:
        raise ValueError(f"beams, candidates and words are at least 1, scale at least 0, damping in (0, 1]: {s}")
    search = Search(at_length(s), vlm, batch, mask)
    with weighed_attention(vlm, lambda *args: search.watch.look(*args), [vlm.n_layers - 1]):
        yield {"num_beams": s.beams, "custom_generate": search, **positions(vlm, batch, mask)}


def positions(vlm: VLM, batch: Batch, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Positions of the prompt that count padding, as :meth:`VLM.hidden` counts those of a tried token; left to itself,
    ``generate`` counts without. Families with positions of their own have them already."""
    if "position_ids" in (vlm.row.generate_inputs or vlm.row.decoder_inputs)(vlm, mask, batch):
        return {}
    return {"position_ids": torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)}


# as published; for captions of the small world's 25 words, also with a milder scale, also without going back
GRID = ({}, {"words": 25}, {"words": 25, "scale": 20.0}, {"words": 25, "times": 0})
register(
    Baseline("opera", "decoding", opera, OperaSettings(), GRID, "beams; leaning on one's own words costs; going back",
             "OPERA: Huang et al. 2024 (CVPR), official code")
)  # fmt: skip
