"""How locators look at a model: one set of options for all of them, and the official code's choice of options."""

from __future__ import annotations

from dataclasses import dataclass

CHOICES = {"pooling": ("mean", "object", "padded"), "grounded": ("positive", "negative"), "sites": ("all", "answer")}


@dataclass(frozen=True)
class LocateSettings:
    """Options that all locators share. ValueError for a value that does not exist.

    What the model sees:

    * ``prompt``: prompt role before the answers; None = no question and no chat format.
    * ``image``: False = no image positions at all (locators that need the image then refuse).

    Which tokens are compared:

    * ``pooling``: ``mean``: over the answer's own tokens. ``object``: over the first tokens of its objects, those of
      ``wrong`` in the negative and the rest in the positive (an answer without any: all its tokens).
      ``padded``: official code, position by position over the whole padded batch, prompt and padding
      counted.
    * ``final_norm``: True = the last layer is taken after the final norm, as an entry of ``hidden_states`` is.

    Causal locators: contrast of the hallucinated and the grounded objects' probabilities:

    * ``grounded``: the answer whose truthful objects are compared with the negative's wrong ones: ``positive``, or
      ``negative`` itself (AD-HH: one sequence a pair instead of two).
    * ``sites``: positions that are ablated, attributed or restored: ``all``, or from the one that predicts the
      ``answer``'s first token on.

    The rest:

    * ``batch_size``: pairs in a batch; memory grows with it, never with the number of pairs.
    * ``max_rows``: largest number of sequences in one forward pass of a batched ablation.
    * ``seed``: of the random controls.
    """

    prompt: str | None = "plain"
    image: bool = True
    pooling: str = "mean"
    final_norm: bool = False
    grounded: str = "positive"
    sites: str = "all"
    batch_size: int = 8
    max_rows: int = 64
    seed: int = 0

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")


DEFAULT = LocateSettings()
# What the official code does: the two texts alone, padded together and compared position by position; raw L2; the last
# entry after the final norm; the union of each pair's best layer over 50 pairs.
OFFICIAL = LocateSettings(prompt=None, image=False, pooling="padded", final_norm=True, batch_size=50)
OFFICIAL_LOCATOR, OFFICIAL_PAIRS, OFFICIAL_RULE = "raw-l2", 50, "union"
