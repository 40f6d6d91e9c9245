"""Budgets against what is really built: parameters, NF4, what autograd keeps, files; and the page."""

import dataclasses
import json

import pandas as pd
import pytest
import torch
from conftest import build_tiny

from alea_lib.core.paths import RunError, root
from alea_lib.models import memory as budget
from alea_lib.models.hooks import replaced_linear
from alea_lib.models.memory import Plan, read_shape

SEVEN = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture(scope="module")
def small():
    return build_tiny()


@pytest.fixture(scope="module")
def sizes(small):
    return budget.shape(json.loads(small.model.config.to_json_string(use_diff=False)))


def counted(model) -> dict[str, int]:
    out = dict.fromkeys(("decoder", "norms", "embeddings", "head", "vision", "projector"), 0)
    for name, p in model.named_parameters():
        part = "vision" if "vision_tower" in name else "projector" if "projector" in name else None
        part = part or ("head" if name.startswith("lm_head") else "embeddings" if "embed_tokens" in name else None)
        out[part or ("norms" if "norm" in name else "decoder")] += p.numel()
    return out


def meta(name: str):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_dict(json.loads((root() / "data" / "shapes" / f"{name}.json").read_text()))
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


def test_parameters_of_a_built_model(small, sizes):
    assert budget.parameters(sizes) == counted(small.model)


def test_parameters_of_the_shipped_model():
    from safetensors import safe_open

    with safe_open(root() / "data/models/scenes-natural/model.safetensors", "pt") as f:
        total = sum(f.get_tensor(k).numel() for k in f.keys())
    assert sum(budget.parameters(read_shape("scenes-natural")).values()) == total


@pytest.mark.parametrize("name, total", [("llava-1.5-7b-hf", 7_063_427_072), ("llava-1.5-13b-hf", None)])
def test_parameters_of_the_real_sizes(name, total):
    found = budget.parameters(read_shape(f"llava-hf/{name}"))
    assert found == counted(meta(name))
    assert total in (None, sum(found.values()))


@pytest.mark.parametrize("rows, columns", [(64, 128), (128, 64), (96, 40), (512, 640)])
def test_nf4_as_bitsandbytes_packs_it(rows, columns):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = bitsandbytes.nn.Params4bit(
        torch.randn(rows, columns), requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to("cpu")
    state = weight.quant_state
    tensors = [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert budget.nf4_bytes(rows * columns) == sum(t.nbytes for t in tensors)


def test_bytes_of_a_loaded_model(small, sizes, tmp_path):
    pytest.importorskip("bitsandbytes")
    from alea_lib.models.loading import load

    small.model.save_pretrained(tmp_path)
    small.processor.save_pretrained(tmp_path)
    for four_bit, edited in ((False, 0), (True, 0), (True, 2)):
        vlm = load(str(tmp_path), four_bit, tuple(range(edited)), device="cpu")
        stored = 0
        for p in vlm.model.parameters():
            stored += p.nbytes
            if (state := getattr(p, "quant_state", None)) is not None:
                stored += sum(t.nbytes for t in (state.absmax, state.code, state.offset))
                stored += state.state2.absmax.nbytes + state.state2.code.nbytes
        assert budget.model_bytes(sizes, four_bit, edited, each=4) == stored


def test_four_bits_of_the_real_size():
    """4.127 bits a number in the decoder, and the rest in half precision: 4.20 GiB."""
    shape = read_shape(SEVEN)
    assert budget.model_bytes(shape, True) / 2**30 == pytest.approx(4.20, abs=0.01)
    assert budget.model_bytes(shape, False) / 2**30 == pytest.approx(13.16, abs=0.01)
    more = budget.model_bytes(shape, True, 32) - budget.model_bytes(shape, True)
    assert more == 32 * (45_088_768 * 2 - budget.nf4_bytes(45_088_768))


@pytest.mark.parametrize("edited", [(), (2,), (0, 1, 2, 3)])
def test_what_autograd_keeps(small, sizes, seen, told, edited):
    """Storages saved for the backward pass through the decoder's layers, parameters and the head's not counted."""
    batch = small.encode(seen[:2], small.prompt("plain"), [told[1]] * 2)
    weights = {small.address("down_proj", i): torch.zeros(64, 128, requires_grad=True) for i in edited}
    own = {p.untyped_storage().data_ptr() for p in small.model.parameters()}
    own |= {w.untyped_storage().data_ptr() for w in weights.values()}
    saved: dict[int, int] = {}

    def pack(t):
        place = t.untyped_storage()
        if place.data_ptr() not in own:
            saved[place.data_ptr()] = place.nbytes()
        return t

    embeds = small.embed(batch).requires_grad_(True)
    with replaced_linear(small, weights), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = small.hidden(embeds, batch.mask, batch)
    tokens = batch.ids.shape[1]
    want = budget.activation_bytes(sizes, 4, tokens, 2, trained=len(edited), each=4)
    assert sum(saved.values()) == pytest.approx(want, rel=0.15), hidden.shape


def test_what_the_real_size_keeps():
    """Measured once on a CPU with 7B's shapes, bfloat16, 876 positions: 110.5 MiB a frozen layer, 129 a trained one."""
    shape = read_shape(SEVEN)
    assert budget.activation_bytes(shape, 1, 876) / 2**20 == pytest.approx(110.5, rel=0.01)
    assert budget.activation_bytes(shape, 1, 876, trained=1) / 2**20 == pytest.approx(129, rel=0.01)


def test_keys_and_values(small, sizes, seen):
    batch = small.encode(seen[:3], small.prompt("plain"), side="left")
    past = small.language_model(inputs_embeds=small.embed(batch), use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    assert budget.kv_bytes(sizes, batch.ids.shape[1], 3, each=4) == stored
    assert budget.kv_bytes(read_shape(SEVEN), 1) == 512 << 10


def test_features(small, sizes, seen):
    assert budget.features_bytes(sizes, 6, each=4) == seen.nbytes


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_trained_matrices(small, sizes, seen, told, optimiser):
    """Masters, gradients, the optimiser's moments and the base's own weights of a run after its first step."""
    from alea_lib.edit.fit import _Run
    from alea_lib.edit.settings import EditSettings

    settings = EditSettings(layers=(1, 2), prefix_share=0, kl=0, epochs=1, batch=6, optimiser=optimiser)
    run = _Run(small, seen, told, None, [], settings, None)
    run.step(0)
    stored = sum(w.nbytes for w in run.trained.own.values())
    for p in run.trained.parameters.values():
        stored += p.nbytes + p.grad.nbytes
        state = run.optimiser.state[p].values()
        stored += sum(t.nbytes for t in state if torch.is_tensor(t) and t.dim() > 0)
    assert budget.trained_bytes(sizes, 2, optimiser=optimiser) == stored


def test_reference_of_the_kl():
    assert budget.kl_reference_bytes() == {
        "states": 1500 * 200 * 4096 * 2, "logits": 1500 * 200 * 32064 * 2, "inputs": 1500 * 876 * 4096 * 2
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"batch": 2}, {"edited": 5}, {"first": 20}, {"tokens": 900}, {"unquantised": 33}])
def test_peaks_grow_with_what_they_hold(change):
    shape, plan = read_shape(SEVEN), Plan()
    assert budget.edit_peak(shape, dataclasses.replace(plan, **change)) > budget.edit_peak(shape, plan)


def test_peaks_of_the_profiles_fit_their_cards():
    shape = read_shape(SEVEN)
    found = budget.peak(shape, Plan(edited=4, first=28, batch=1, unquantised=4))
    assert found["edit"] < 12 * 2**30  # four down-projections of LLaVA-1.5-7B
    assert budget.peak(shape, Plan(batch=8, write_batch=100))["write"] > 24 * 2**30  # batches must be limited


def test_unknown_model_and_broken_configuration():
    with pytest.raises(RunError, match="sizes of nobody/nothing are not known.*data/shapes/nothing.json"):
        read_shape("nobody/nothing")
    with pytest.raises(RunError, match="no 'text_config'"):
        budget.shape({})


# ---- the page


def test_the_page_is_made_of_what_is_computed(monkeypatch, tmp_path):
    from alea_lib.pipeline import budget_page

    told = budget_page.markdown()
    assert "| all parameters (million) | 7,063.4 |" in told and "| NF4, scales quantised again (GiB) | 4.21 |" in told
    assert (
        "nan" not in told
        and "hours" not in told
        and "generated/budget.md" in (root() / "book" / "budget.md").read_text()
    )
    assert budget_page.measured(tmp_path) is None


def test_the_page_sums_up_what_a_dry_run_lists():
    from alea_lib.pipeline import budget_page
    from alea_lib.pipeline.preview import preview

    table, found = budget_page.study_table().set_index("profile"), preview("llava-1.5-7b")
    assert table.loc["llava-1.5-7b", "GPU, GiB"] == f"{found.stages['gpu_gib'].max():.1f}"
    assert (table["GPU, GiB"].astype(float) < [24, 16]).all() and (table["downloads, GB"].astype(float) > 13).all()


def test_measured_costs_stand_beside_the_computed(tmp_path):
    from gpu.costs import COLUMNS

    from alea_lib.pipeline import budget_page

    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "environment.json").write_text('{"gpu": "Some Card"}')
    step = {"setting": "plain", "seconds": 0.1372, "unit": "step", "lo": 0.1338, "hi": 0.1462, "repeats": 16}
    rows = [
        {"what": "edit, plain", **step, "peak_gib": 9.034, "reserved_gib": 10.574},
        {"what": "generation", "setting": "edited", "seconds": 1.5, "unit": "token", "peak_gib": 6.341},
        {"what": "generation", "setting": "edited / base", "ratio": 0.99964, "lo": 0.998, "hi": 1.0031, "repeats": 6},
        {"what": "prefix", "note": "left out: the time was used up"},
    ]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(tmp_path / "card" / "costs.csv", index=False)
    found, card = budget_page.measured(tmp_path), "Some Card"
    gib = {name: f"{n / 2**30:.2f}" for name, n in budget_page.checked_peaks().items()}
    assert found.values.tolist() == [
        [
            "edit, plain",
            "plain",
            "137 ms per step (134 to 146)",
            "16",
            "9.03",
            gib["edit, plain"],
            "10.57",
            "Some Card",
        ],
        ["generation", "edited", "1.5 s per token", "1", "6.34", gib["generation, edited"], "", card],
        ["generation", "edited / base", "1.000 (0.998 to 1.003)", "6", "", "", "", card],
        ["prefix", "left out: the time was used up", "", "", "", "", "", card],
    ]


def test_the_sizes_of_the_gpu_check_are_those_that_its_memory_is_computed_for():
    from gpu import costs, shape
    from gpu.settings import SIZES

    from alea_lib.pipeline import budget_page

    size, plan = SIZES["7b"], budget_page.CHECKED
    last = shape.edited_layers(size)
    assert (len(last), last[0], size.batch) == (plan.edited, plan.first, plan.batch) and plan.unquantised == len(last)
    assert (size.written, size.new_tokens) == (plan.write_batch, plan.max_new_tokens)
    texts = costs.made_pairs(size.items, size.sentences)["positive"].tolist()
    tokens = shape._reader(size).tokenizer(texts, add_special_tokens=False).input_ids
    assert max(map(len, tokens)) == plan.answer
    table = budget_page.measured(root() / "data" / "results")
    capture = table.loc[table["act"] == "capture", "how"].tolist()
    assert capture == [f"before layer 28, {plan.tokens} positions"] * len(capture) and capture


def test_memory_on_a_gpu_is_at_most_what_is_computed():
    """Committed tables of `make gpu-check`: nobody whose card passes the checks before a study runs out of memory."""
    from alea_lib.pipeline import budget_page

    table = budget_page.measured(root() / "data" / "results")
    both = table[(table["computed"] != "") & (table["act"] != "build")]
    over = both["peak GiB"].astype(float) - both["computed"].astype(float)
    assert len(both) >= 6 and over.max() <= 0, both[over > 0].to_string()


def test_the_pages_peaks_fit_the_cards_they_name():
    from alea_lib.pipeline import budget_page

    table = budget_page.peak_table()
    for room, name in ((14.5, "16 GB"), (22, "24 GB")):
        assert table[table[""].str.startswith(name)]["7B"].astype(float).max() < room
