"""LOCATE, layers: one row a locator, evidence in, scores [N,L] out, larger = more suspect.

p and n are the pooled states of the positive and the negative after a layer, d = n - p. The *contrast* of a pair is
the mean (log-)probability of the negative's wrong objects minus that of the positive's truthful ones.
"""

from __future__ import annotations

import numpy as np

from .evidence import Evidence, layer_locator

TOP = 4  # directions of the singular value decomposition (Nullu)
PAPER = "ALEAHallu (arXiv 2512.21999)"

layer_locator(
    "relative-l2", lambda e: _relative(e)[:, 1:], needs=("states",), cost=2, symmetry="even",
    formula=r"$|d| / \frac{1}{2}(|p| + |n|)$", source="this study: the paper's distance, free of the growth of norms",
)  # fmt: skip
# the official code feeds the distance padded text without the image
layer_locator(
    "raw-l2", lambda e: e["states"]["geometry"][:, 1:, 0], needs=("states",), cost=2, symmetry="even",
    formula="$|d|$", source=f"{PAPER}, official code",
)  # fmt: skip
layer_locator(
    "cosine", lambda e: 1 - e["states"]["geometry"][:, 1:, 2], needs=("states",), cost=2, symmetry="even",
    formula=r"$1 - \cos(p, n)$", source="this study: direction alone",
)  # fmt: skip
layer_locator(
    "increment", lambda e: np.diff(_relative(e), axis=1), needs=("states",), cost=2, symmetry="even",
    formula=r"$r_l - r_{l-1}$, $r$ the relative L2", source="this study: where the distance is made, not where it is",
)  # fmt: skip
layer_locator(
    "whitened", lambda e: _by_layer(whitened, e), needs=("states",), cost=2, symmetry="even",
    formula=r"$\sqrt{d^T \Sigma^{-1} d}$, $\Sigma$ shrunk", source="Ledoit and Wolf 2004 (the shrinkage)",
)  # fmt: skip
layer_locator(
    "svd-energy", lambda e: _by_layer(top_energy, e), needs=("states",), cost=2, symmetry="even",
    formula=r"$|V_k^T d|^2 / \overline{|d|^2}$, $V_k$ the top-$k$ right singular vectors of all $d$", source="Nullu",
)  # fmt: skip
layer_locator(
    "probe", lambda e: _by_layer(left_out, e), needs=("states",), cost=2, symmetry="even",
    formula="accuracy of a ridge probe on the pair left out", source="linear probing",
)  # fmt: skip
layer_locator(
    "tracing", lambda e: e["tracing"]["effect"], needs=("tracing",), image=True, cost=lambda L, H: 4 + (L + 1),
    symmetry="odd", formula="contrast(grey image, MLP$_l$ restored) - contrast(grey image), of $p$",
    source="causal tracing (Meng et al. 2022)",
)  # fmt: skip
layer_locator(
    "ablation", lambda e: e["mlp-ablation"]["effect"], needs=("mlp-ablation",), cost=lambda L, H: 2 + (L + 1),
    symmetry="odd", formula=r"contrast - contrast(MLP$_l$ ablated), of $\log p$", source="this study: the causal form",
)  # fmt: skip
layer_locator(
    "gradient", lambda e: e["mlp-gradient"]["effect"], needs=("mlp-gradient",), cost=2, backward=2, symmetry="odd",
    formula=r"$\langle \nabla_{m_l} \mathrm{contrast}, m_l \rangle$, $m_l$ the MLP's output, of $\log p$",
    source="attribution patching: the first-order form of ablation",
)  # fmt: skip
# how much more spread the layer's image attention is while the negative is read; mean over heads
layer_locator(
    "attention-entropy", lambda e: np.diff(e["attention"]["entropy"].mean(-1), axis=1)[:, 0], needs=("attention",),
    image=True, cost=2, symmetry="odd", formula=r"$H_n - H_p$, entropy of attention over image positions",
    source="this study",
)  # fmt: skip
layer_locator(
    "random", lambda e: same_for_all(e, np.random.default_rng([e.settings.seed, 5]).permutation(e.vlm.n_layers)),
    symmetry="even", formula="a random order, the same for every pair", source="control",
)  # fmt: skip
for _name, _formula, _sign in (("first", "$-l$", -1), ("last", "$l$", 1), ("all", "0", 0)):
    layer_locator(
        _name, lambda e, sign=_sign: same_for_all(e, sign * np.arange(e.vlm.n_layers)),
        symmetry="even", formula=_formula, source="control",
    )  # fmt: skip


@layer_locator(
    "weight-norm", symmetry="even", formula=r"$| \|W_l\| - \mathrm{median}_{m \neq l} \|W_m\| |$, down-projections",
    source="control: odd weights, whatever they do",
)  # fmt: skip
def weight_norm(e: Evidence) -> np.ndarray:
    """How far the norm of the layer's down-projection is from the median of the others'."""
    norms = [e.weight("down_proj", layer).norm().item() for layer in range(e.vlm.n_layers)]
    return same_for_all(e, outlying(np.array(norms)))


def same_for_all(e: Evidence, scores: np.ndarray) -> np.ndarray:
    """Scores of the places, the same for each pair: [N, *places]."""
    return np.tile(np.asarray(scores, dtype=float), (len(e.pairs), *[1] * np.ndim(scores)))


def outlying(values: np.ndarray) -> np.ndarray:
    """Distance of each value from the median of the others; 0 for a single one."""
    flat = values.ravel()
    out = [abs(v - np.median(np.delete(flat, i))) if flat.size > 1 else 0.0 for i, v in enumerate(flat)]
    return np.reshape(out, values.shape)


def _relative(e: Evidence) -> np.ndarray:
    """|p - n| / mean(|p|, |n|), [N, L+1], the input embeddings first; 0 where both states are zero."""
    distance, norm = e["states"]["geometry"][..., 0], e["states"]["geometry"][..., 1]
    return np.divide(distance, norm, out=np.zeros_like(distance), where=norm > 0)


def _by_layer(function, e: Evidence) -> np.ndarray:
    """A function of p and n [N,D], applied to the states of each layer -> [N,L]."""
    p, n = e["states"]["positive"].astype(float), e["states"]["negative"].astype(float)
    return np.stack([function(p[:, i], n[:, i]) for i in range(p.shape[1])], axis=1)


def whitened(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Mahalanobis distance under the covariance of all states of the layer."""
    x = np.concatenate([p, n])
    x = x - x.mean(0)
    _, singular, directions = np.linalg.svd(x, full_matrices=False)
    values = singular**2 / len(x)
    share, mean = shrinkage(x, values), max(values.sum() / x.shape[1], 1e-30)
    d = n - p
    inside = d @ directions.T
    rest = np.maximum((d**2).sum(1) - (inside**2).sum(1), 0)  # outside the span the covariance is the target alone
    return np.sqrt((inside**2 / ((1 - share) * values + share * mean)).sum(1) + rest / (share * mean))


def shrinkage(x: np.ndarray, values: np.ndarray) -> float:
    """Ledoit and Wolf's share of the scaled identity in the covariance of centred rows x [n,D] with these eigenvalues,
    kept between 0.01 and 1 (few rows would leave it singular)."""
    n, width = x.shape
    spread = (values**2).sum() / width - (values.sum() / width) ** 2
    noise = ((x**2).sum(1) ** 2).sum() / width / n**2 - (values**2).sum() / width / n
    return float(np.clip(noise / max(spread, 1e-30), 0.01, 1.0))


def top_energy(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Energy of a pair's difference in the top-k subspace; the mean over pairs is the top-k share of all energy."""
    d = n - p
    top = np.linalg.svd(d, full_matrices=False)[2][:TOP]
    return ((d @ top.T) ** 2).sum(1) / max((d**2).sum(1).mean(), 1e-30)


def left_out(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Share of a pair's answers that a linear probe trained on all other pairs tells right (0, 1/2, 1).

    Ridge regression of +1 (negative) and -1 (positive) in dual form, where leaving out a pair has a closed form; the
    ridge is the mean eigenvalue of the Gram matrix. States are centred over all answers (without labels).
    """
    x = np.concatenate([p, n])
    x = x - x.mean(0)
    gram, y, pairs = x @ x.T, np.repeat([-1.0, 1.0], len(p)), len(p)
    inverse = np.linalg.inv(gram + np.eye(len(x)) * max(np.trace(gram) / len(x), 1e-30))
    alpha, right = inverse @ y, np.zeros(pairs)
    for i in range(pairs):
        both = [i, i + pairs]
        guess = y[both] - np.linalg.solve(inverse[np.ix_(both, both)], alpha[both])
        right[i] = np.where(np.abs(guess) < 1e-9, 0.5, guess * y[both] > 0).mean()
    return right
