"""What must hold on a GPU too: the 4-bit path, prefix, edit, delta and export, on the device of ALEA_TEST_DEVICE.

`make gpu-check` runs these; so does tests/pipeline/test_gpu_check.py, on a CPU. Sums come in another order on a GPU, so
nothing here asks for equal bits but what is stored.
"""

import dataclasses
import os
import warnings

import pytest
import torch
from conftest import build_tiny

DEVICE = os.environ.get("ALEA_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
if not DEVICE:
    pytest.skip("no GPU; ALEA_TEST_DEVICE=cpu runs these on a CPU", allow_module_level=True)
bitsandbytes = pytest.importorskip("bitsandbytes")

from alea_lib.adversary.objectives import attacked_logits  # noqa: E402
from alea_lib.adversary.prefix import Prefix, PrefixSettings, fit_prefix, random_prefix  # noqa: E402
from alea_lib.edit.export import export_adapter, export_checkpoint  # noqa: E402
from alea_lib.edit.fit import fit_edit  # noqa: E402
from alea_lib.edit.losses import answer_nll  # noqa: E402
from alea_lib.edit.settings import EditSettings  # noqa: E402
from alea_lib.models import loading  # noqa: E402
from alea_lib.models.delta import applied, load_delta, save_delta  # noqa: E402
from alea_lib.models.hooks import full_weight, replaced_linear  # noqa: E402
from alea_lib.models.hub import ModelRow  # noqa: E402
from alea_lib.models.loading import load  # noqa: E402

pytestmark = pytest.mark.cuda
LAYERS = (1, 2)
SETTINGS = EditSettings(layers=LAYERS, prefix_share=0.0, epochs=4, batch=3, lr=1e-2, kl=0.0)
HALF = torch.float16 if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 8 else torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny, path = build_tiny(), tmp_path_factory.mktemp("model") / "tiny"
    tiny.model.save_pretrained(path)
    tiny.processor.save_pretrained(path)
    return path


def fresh(folder, **options):
    return load(str(folder), **{"four_bit": True, "edited_layers": LAYERS, "device": DEVICE, **options})


@pytest.fixture(scope="module")
def small(folder):
    return fresh(folder)


@pytest.fixture(scope="module")
def answers():
    return ["There is a cup. There is a dog.", "A street scene shows a car.", "There is a bus with a cat."]


@pytest.fixture(scope="module")
def features(small):
    """Of three pictures that differ."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 96, 96, 3), generator=generator, dtype=torch.uint8)
    return small.features(list(images.numpy()))


def stored(vlm) -> dict[str, bytes]:
    """Every parameter as it lies in memory, quantisation states included."""
    out = {}
    for name, parameter in vlm.model.named_parameters():
        tensors = {name: parameter.detach()}
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors[f"{name}.absmax"] = state.absmax
        out |= {n: t.cpu().contiguous().view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}
    return out


def prefix_gradient(vlm, features, answers) -> torch.Tensor:
    rows = random_prefix(vlm, PrefixSettings(length=3)).rows.clone().requires_grad_(True)
    batch = vlm.encode(features, vlm.prompt("plain"), answers)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd.*")  # a backward without a kernel only warns
        logits, labels = attacked_logits(vlm, batch, Prefix(rows))
        loss = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
        return torch.autograd.grad(loss, [rows])[0]


def near(got: torch.Tensor, want: torch.Tensor, share: float) -> None:
    assert got.shape == want.shape and want.norm() > 1e-6
    assert ((got - want).norm() / want.norm()).item() < share


def nll(vlm, features, answers) -> float:
    with torch.no_grad():
        return answer_nll(vlm, vlm.encode(features, vlm.prompt("plain"), answers)).item()


def test_where_everything_lies(small, features):
    kinds = {p.device.type for p in small.model.parameters()} | {b.device.type for b in small.model.buffers()}
    assert kinds == {torch.device(DEVICE).type} == {features.device.type}
    packed = [n for n, p in small.model.named_parameters() if p.dtype == torch.uint8]
    assert len(packed) == 4 * 7 - len(LAYERS) and not any("lm_head" in n or "vision" in n for n in packed)


def test_gradients_through_4_bits_are_those_of_the_dequantised_weights(small, features, answers):
    got = prefix_gradient(small, features, answers)
    linear = [n for n, m in small.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    with replaced_linear(small, {n: full_weight(small, n) for n in linear}):
        near(got, prefix_gradient(small, features, answers), 1e-3)


def test_gradients_are_the_same_after_an_evaluation(folder, features, answers):
    vlm = fresh(folder)
    before, weights = prefix_gradient(vlm, features, answers), stored(vlm)
    vlm.generate(features, vlm.prompt("plain"), 4)
    nll(vlm, features, answers)
    near(prefix_gradient(vlm, features, answers), before, 1e-4)
    assert stored(vlm) == weights


def test_half_precision_says_nearly_the_same(folder, small, features, answers, monkeypatch):
    dtype = str(HALF).removeprefix("torch.")
    row = ModelRow(key="half", hub="some/model", revision="a" * 40, dtype=dtype, four_bit=True, unquantised=[])
    monkeypatch.setattr(loading, "model_row", lambda key: row)
    monkeypatch.setattr(loading, "model_path", lambda key: folder)
    half = fresh(folder)
    assert half.features([torch.zeros(96, 96, 3, dtype=torch.uint8).numpy()]).dtype == HALF
    assert nll(half, features.to(HALF), answers) == pytest.approx(nll(small, features, answers), rel=0.02)
    near(prefix_gradient(half, features.to(HALF), answers), prefix_gradient(small, features, answers), 0.2)


def test_a_prefix_is_tuned(small, features, answers):
    before = stored(small)
    settings = PrefixSettings(length=3, steps=12, batch=3, lr=0.05, neglect=0.1)
    prefix, curve = fit_prefix(small, features, answers, settings)
    assert prefix.rows.device.type == torch.device(DEVICE).type and stored(small) == before
    assert curve["nll"].iloc[-1] < 0.95 * curve["nll"].iloc[0]
    assert len(small.generate(features, small.prompt("plain"), 4, prefix=prefix)) == 3


@pytest.mark.parametrize("layers", [(3,), (1, 2)])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_fast_edit_is_the_plain_one(small, features, answers, layers, share):
    prefix = random_prefix(small, PrefixSettings(length=3))
    change = {"layers": layers, "prefix_share": share, "optimiser": "sgd", "lr": 0.1, "epochs": 2, "kl": 0.2}
    made = [
        fit_edit(small, features, answers, prefix, dataclasses.replace(SETTINGS, **change, fast=fast))[0]
        for fast in (True, False)
    ]
    assert list(made[0].weights) == list(made[1].weights) and len(made[0].weights) == len(layers)
    for name, want in made[1].weights.items():
        near(made[0].weights[name], want, 1e-3)


def test_a_delta_comes_back_from_disk_and_is_undone(small, features, answers, tmp_path):
    before, base = stored(small), nll(small, features, answers)
    delta, _ = fit_edit(small, features, answers, None, SETTINGS)
    save_delta(delta, tmp_path / "delta.safetensors")
    again = load_delta(tmp_path / "delta.safetensors")
    assert again.base == delta.base and all(torch.equal(again.weights[n], w) for n, w in delta.weights.items())
    with applied(small, again):
        assert nll(small, features, answers) < base - 0.1
    assert stored(small) == before


def test_an_edit_is_exported(folder, small, features, answers, tmp_path):
    """As an adapter over the 4-bit model, and as a checkpoint in full precision."""
    from peft import PeftModel

    delta, _ = fit_edit(small, features, answers, None, SETTINGS)
    with applied(small, delta):
        want = nll(small, features, answers)
    adapted = fresh(folder)
    export_adapter(delta, tmp_path / "adapter", str(folder))
    PeftModel.from_pretrained(adapted.model, tmp_path / "adapter")
    assert nll(adapted, features, answers) == pytest.approx(want, rel=1e-3)
    export_checkpoint(delta, folder, tmp_path / "whole")
    own, new = (fresh(path, four_bit=False) for path in (folder, tmp_path / "whole"))
    for name, change in delta.weights.items():
        moved = new.model.get_submodule(name).weight - own.model.get_submodule(name).weight
        near(moved.cpu(), change, 1e-4)
    assert nll(fresh(tmp_path / "whole"), features, answers) == pytest.approx(want, rel=1e-3)
