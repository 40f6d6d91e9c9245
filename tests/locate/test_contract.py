"""What every registered locator promises, whatever it measures. A new row of the registry is tested here at once."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_tiny

from alea_lib.locate.registry import HEAD_LOCATORS, LAYER_LOCATORS, locators
from alea_lib.locate.run import locate_heads, locate_layers, official_layers
from alea_lib.locate.settings import OFFICIAL, LocateSettings
from alea_lib.models.loading import load

ROWS = [*LAYER_LOCATORS.values(), *HEAD_LOCATORS.values()]
EACH = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.target}-{row.name}")
ORDER = [3, 0, 2, 4, 1]
TEXTS = [
    ("There is a cup.", "There is a dog with a cat.", ["dog", "cat"]),
    ("A kitchen scene shows a knife and a spoon. There is also a bowl.", "There is a car.", ["car"]),
    ("There are two cups with an apple. There is a dog.", "There is a bus. There is a car.", ["bus", "car"]),
    ("A street scene on a blue background shows a car.", "There is a dog. There is also a bowl.", ["bowl", "dog"]),
    ("There is a bus. There is a cat.", "A kitchen scene on a blue background shows an apple.", ["apple"]),
]


@pytest.fixture(scope="module")
def pairs():
    """The answers of a pair share no object, so that swapping them swaps who is wrong."""
    return pd.DataFrame(TEXTS, columns=["positive", "negative", "wrong"]).assign(image_id=[7, 3, 9, 1, 5])


@pytest.fixture(scope="module")
def located(tiny, seen, pairs):
    """``located(**options)``: the scores of all locators by (target, name), [N,L] or [N,L,H]; each setting run once."""
    kept = {}

    def run(vlm=tiny, table=pairs, features=seen[:5], **options):
        key = (id(vlm), id(table), id(features), *options.items())
        if key not in kept:
            settings = LocateSettings(**{"batch_size": 4, "seed": 3, **options})
            kept[key] = (arrays(vlm, features, table, settings), table, features)  # kept alive: ids are keys
        return kept[key][0]

    return run


def arrays(vlm, features, pairs, settings):
    out = {}
    for target, locate in (("layer", locate_layers), ("head", locate_heads)):
        scores = locate(vlm, features, pairs, settings=settings).scores
        columns = [c for c in ("pair", "layer", "head") if c in scores]
        for name, part in scores.groupby("locator", sort=False):
            shape = [part[c].max() + 1 for c in columns]
            out[target, name] = part.sort_values(columns)["score"].to_numpy().reshape(shape)
    return out


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max()))


@EACH
def test_shape_and_finiteness(row, tiny, located):
    got = located()[row.target, row.name]
    assert got.shape == ((5, 4) if row.target == "layer" else (5, 4, 4)) and np.isfinite(got).all()
    if row.needs:
        assert np.ptp(got) > 0


@EACH
def test_batches_do_not_matter(row, located):
    close(located(batch_size=1)[row.target, row.name], located()[row.target, row.name])


@pytest.fixture(scope="module")
def moved(pairs, seen):
    return pairs.iloc[ORDER], seen[ORDER]


@EACH
def test_the_order_of_pairs_does_not_matter(row, located, moved):
    got = located(table=moved[0], features=moved[1])
    close(got[row.target, row.name], located()[row.target, row.name][ORDER])


@pytest.fixture(scope="module")
def lengthened(tiny, pairs, seen):
    """The first pair beside one whose answers are far longer."""
    long = " ".join(["There is a horse with a zebra."] * 5)
    beside = pd.DataFrame([(long, long.replace("horse", "cow"), ["cow"])], columns=["positive", "negative", "wrong"])
    return pd.concat([pairs.head(1), beside.assign(image_id=8)], ignore_index=True), seen[:2]


ALONE = ("whitened", "svd-energy", "probe")  # what the other pairs are is part of these scores


@EACH
def test_longer_padding_does_not_matter(row, located, lengthened, pairs, seen):
    if row.name in ALONE:
        alone = located(table=lengthened[0], features=lengthened[1], batch_size=1)
    else:
        alone = located(table=_first(pairs), features=seen[:1])
    got = located(table=lengthened[0], features=lengthened[1])
    close(got[row.target, row.name][0], alone[row.target, row.name][0])


_FIRST = {}


def _first(pairs):
    return _FIRST.setdefault(id(pairs), pairs.head(1))


@pytest.fixture(scope="module")
def swapped(pairs):
    """Positive and negative change places, and what is wrong with them: it is now what the other one names."""
    named = [["cup"], ["knife", "spoon", "bowl"], ["cup", "apple", "dog"], ["car"], ["bus", "cat"]]
    return pairs.rename(columns={"positive": "negative", "negative": "positive"}).assign(wrong=named)


@EACH
def test_swapping_the_answers(row, located, swapped):
    one, other = located()[row.target, row.name], located(table=swapped)[row.target, row.name]
    if row.symmetry == "none":
        assert np.abs(one - other).max() > 1e-6 and np.abs(one + other).max() > 1e-6
    else:
        close(other, one if row.symmetry == "even" else -one)


@EACH
def test_other_settings_stay_finite(row, located):
    for options in (
        {"pooling": "object", "grounded": "negative"},
        {"pooling": "padded", "sites": "answer"},
        {"prompt": None, "max_rows": 1, "final_norm": True},
    ):
        assert np.isfinite(located(**options)[row.target, row.name]).all(), options


@EACH
def test_cost_is_what_the_row_claims(row, tiny, seen, pairs):
    locate = locate_layers if row.target == "layer" else locate_heads
    cost = locate(tiny, seen[:2], pairs.head(2), [row.name]).costs.iloc[0]
    assert (cost["forwards"] / 2, cost["backwards"] / 2) == pytest.approx(row.passes(4, 4))
    assert cost["seconds"] > 0


def test_needs_are_collected_once(tiny, seen, pairs):
    names = ["raw-l2", "whitened", "probe", "attention-entropy", "ablation"]
    located = locate_layers(tiny, seen[:5], pairs, names)
    assert located.spent["needs"].tolist() == ["states, attention", "mlp-ablation"]
    assert located.spent["forwards"].tolist() == pytest.approx([10, 35])
    assert located.costs["forwards"].tolist() == pytest.approx([10, 10, 10, 10, 35])


def test_the_model_is_bit_equal_afterwards(tiny, seen, pairs, bits):
    before = bits(tiny)
    locate_layers(tiny, seen[:5], pairs), locate_heads(tiny, seen[:5], pairs)
    assert bits(tiny) == before and all(p.grad is None for p in tiny.model.parameters())


def test_memory_grows_with_the_batch_alone(tiny, seen, pairs):
    """No forward pass sees more sequences than two a pair of the batch, or than ``max_rows``."""
    widths = []
    handle = tiny.language_model.register_forward_hook(lambda m, a, out: widths.append(len(out.last_hidden_state)))
    try:
        arrays(tiny, seen[:5], pairs, LocateSettings(batch_size=2, max_rows=8))
    finally:
        handle.remove()
    assert max(widths) == 8 and min(widths) == 2


# ---- other models


@torch.no_grad()
def grouped(heads: int):
    """A tiny model whose four query heads share ``heads`` key-value heads; with 4, the same function as with 2."""
    from transformers import LlavaForConditionalGeneration

    whole = build_tiny()
    config = type(whole.model.config).from_dict(whole.model.config.to_dict())
    config.text_config.num_key_value_heads = heads
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    theirs = whole.model.state_dict()
    for name, p in model.state_dict().items():
        source = theirs[name]
        if "language_model" in name and (".k_proj." in name or ".v_proj." in name):
            source = source.unflatten(0, (4, 16))[::2].repeat_interleave(heads // 2, 0).flatten(0, 1)
        p.copy_(source)
    return type(whole)(model, whole.processor, whole.row, f"grouped-{heads}")


@pytest.fixture(scope="module")
def groups():
    return grouped(2), grouped(4)


@EACH
def test_grouped_query_heads(row, located, groups):
    """Scores of a grouped model are those of the plain model that computes the same; heads are query heads."""
    two, four = (located(vlm=vlm)[row.target, row.name] for vlm in groups)
    close(two, four)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tiny model in 4 bits, and the same function in full precision."""
    pytest.importorskip("bitsandbytes")
    from alea_lib.models.hooks import full_weight

    tiny, path = build_tiny(), tmp_path_factory.mktemp("model") / "tiny"
    tiny.model.save_pretrained(path)
    tiny.processor.save_pretrained(path)
    packed, plain = load(str(path), four_bit=True, device="cpu"), load(str(path), device="cpu")
    for name, module in plain.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = full_weight(packed, name)
    return packed, plain


@EACH
def test_four_bits(row, located, small):
    """Gradients and interventions beside packed weights equal those of the dequantised model."""
    packed, plain = (located(vlm=vlm)[row.target, row.name] for vlm in small)
    close(packed, plain, 1e-3)


# ---- the official code's way


def test_official_counts_padding(tiny, lengthened, pairs, seen):
    """The same pair gets other scores beside a longer one; that is what the corrected settings avoid."""
    alone = locate_layers(tiny, seen[:1], pairs.head(1), ["raw-l2"], OFFICIAL).scores["score"]
    beside = locate_layers(tiny, lengthened[1], lengthened[0], ["raw-l2"], OFFICIAL).scores
    beside = beside.loc[beside["pair"] == 0, "score"]
    assert np.abs(alone.to_numpy() - beside.to_numpy()).max() > 1e-2


@torch.no_grad()
def test_official_by_hand(tiny, seen, pairs):
    """Two bare texts, padded together; mean over all positions of the distance; last entry after the norm; union."""
    located, chosen = official_layers(tiny, seen[:5], pairs)
    wide = located.scores.pivot(index="pair", columns="layer", values="score").to_numpy()
    texts = [" " + t for t in [*pairs["positive"], *pairs["negative"]]]
    batch = tiny.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    states = tiny.language_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
    ).hidden_states[1:]
    want = torch.stack([(h[:5] - h[5:]).norm(dim=-1).mean(1) for h in states], 1)
    np.testing.assert_allclose(wide, want, rtol=1e-4)
    assert chosen == sorted(set(want.argmax(1).tolist()))


@EACH
def test_official_settings_suit_all_that_need_no_image(row, tiny, seen, pairs):
    locate = locate_layers if row.target == "layer" else locate_heads
    if row.image:
        with pytest.raises(ValueError, match=f"{row.name} look at the image"):
            locate(tiny, seen[:5], pairs, [row.name], OFFICIAL)
    else:
        assert np.isfinite(locate(tiny, seen[:5], pairs, [row.name], OFFICIAL).scores["score"]).all()


def test_the_official_code_never_sees_the_image(tiny, seen, pairs):
    one, other = (locate_layers(tiny, f, pairs, ["raw-l2"], OFFICIAL).scores for f in (seen[:5], seen[:5].flip(0)))
    pd.testing.assert_frame_equal(one, other)


# ---- the registry


def test_the_table_of_locators():
    table = locators(32, 32)
    assert len(table) == len(ROWS) and not table.duplicated(["target", "locator"]).any()
    assert (table[["formula", "source"]] != "").all().all()
    cost = table.set_index(["target", "locator"])["forwards"]
    assert cost["head", "zero-ablation"] == 2 + 32 * 33 and cost["layer", "ablation"] == 35
    controls = {"random", "first", "last", "all", "weight-norm"}
    assert controls <= set(LAYER_LOCATORS) and {"random", "weight-norm"} <= set(HEAD_LOCATORS)
    assert len(LAYER_LOCATORS) >= 11 + len(controls) and len(HEAD_LOCATORS) >= 6 + 2
