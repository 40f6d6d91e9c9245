"""LOCATE, heads: one row a locator, evidence in, scores [N,L,H] out, larger = more suspect.

o is a head's output before ``o_proj``, [D/H] a position. Contrast: see :mod:`alea_lib.locate.layers`; here of p.
"""

from __future__ import annotations

import numpy as np

from .evidence import Evidence, head_locator
from .layers import PAPER, outlying, same_for_all

head_locator(
    "zero-ablation", lambda e: e["head-ablation"]["effect"], needs=("head-ablation",),
    cost=lambda L, H: 2 + H * (L + 1), symmetry="odd", formula="contrast - contrast($o = 0$)", source="AD-HH",
)  # fmt: skip
head_locator(
    "gradient", lambda e: e["head-gradient"]["effect"], needs=("head-gradient",), cost=2, backward=2, symmetry="odd",
    formula=r"$\langle \nabla_o \mathrm{contrast}, o \rangle$", source="first-order form of zero-ablation",
)  # fmt: skip
# positive exactly where the signature of hallucination holds: what the head takes from the image speaks against the
# wrong objects, what it takes from the text for them (image < 0 < text)
head_locator(
    "route", lambda e: np.minimum(e["head-gradient"]["text"], -e["head-gradient"]["image"]), needs=("head-gradient",),
    image=True, cost=2, backward=2, symmetry="none",
    formula=r"$\min(\langle \nabla, o_{text} \rangle, -\langle \nabla, o_{image} \rangle)$", source="CRG",
)  # fmt: skip
# the less a head's output changes when the image is hidden, the more suspect
head_locator(
    "vhd", lambda e: -e["blind-heads"]["divergence"], needs=("blind-heads",), image=True, cost=4, symmetry="even",
    formula=r"$-\|o - o_{\mathrm{no\ image}}\|$, outlying tokens dropped", source="VHR: vision-aware head divergence",
)  # fmt: skip
# the less a head looks at the image while the answers are read, the more suspect
head_locator(
    "image-attention", lambda e: -e["attention"]["mass"].mean(1), needs=("attention",), image=True, cost=2,
    symmetry="even", formula=r"$-\sum_{k \in image} a_k$", source="VAR, IAF: share of attention on the image",
)  # fmt: skip
head_locator(
    "output-difference", lambda e: np.linalg.norm(e["heads"]["negative"] - e["heads"]["positive"], axis=-1),
    needs=("heads",), cost=2, symmetry="even", formula=r"$\|o_n - o_p\|$, pooled",
    source=f"{PAPER}: its distance, head by head",
)  # fmt: skip


@head_locator("random", symmetry="even", formula="a random order, the same for every pair", source="control")
def random(e: Evidence) -> np.ndarray:
    """One random order of all heads."""
    order = np.random.default_rng([e.settings.seed, 6]).permutation(e.vlm.n_layers * e.vlm.n_heads)
    return same_for_all(e, order.reshape(e.vlm.n_layers, e.vlm.n_heads))


@head_locator(
    "weight-norm", symmetry="even", formula=r"$| \|W_h\| - \mathrm{median} |$, columns of the output projection",
    source="control: odd weights, whatever they do",
)  # fmt: skip
def weight_norm(e: Evidence) -> np.ndarray:
    """How far the norm of a head's columns of ``o_proj`` is from the median of all other heads'."""
    norms = []
    for layer in range(e.vlm.n_layers):
        columns = e.weight("o_proj", layer).unflatten(1, (e.vlm.n_heads, -1))
        norms.append(columns.square().sum((0, 2)).sqrt().cpu().numpy())
    return same_for_all(e, outlying(np.stack(norms)))
