"""Fixtures: a tiny random model and a tiny world, each built once. Heavy imports wait until needed."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


def build_tiny(seed: int = 0):
    """A LLaVA of 4 layers of width 64 with random weights, in the vocabulary of the scenes world."""
    import torch

    from alea_lib.zoo.language import LanguageSettings, build
    from alea_lib.zoo.vision import Tower, VisionSettings

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tower = Tower(VisionSettings(width=32, mlp=64, layers=2, heads=2))
    vlm = build(tower, LanguageSettings(seed=seed, width=64, mlp=128, layers=4, heads=4), 16)
    with torch.no_grad():  # the usual initialisation is too flat for a model that must depend on what it sees
        for name, parameter in vlm.model.named_parameters():
            if parameter.dim() > 1 and "vision_tower" not in name:
                parameter.mul_(4)
    return vlm


@pytest.fixture(scope="session")
def tiny():
    return build_tiny()


@pytest.fixture(scope="session")
def other():
    """A second model of the same shape with other weights."""
    return build_tiny(1)


@pytest.fixture(autouse=True)
def _untouched(request):
    """No test may leave the shared models changed: parameters, hooks, replaced forwards."""
    models = [request.getfixturevalue(n) for n in ("tiny", "other") if n in request.fixturenames]
    before = [_state(vlm) for vlm in models]
    yield
    for vlm, state in zip(models, before, strict=True):
        assert _state(vlm) == state, "this test left the shared model changed"


def _state(vlm) -> list:
    """Sums of the parameters, hooks of this library (transformers keeps some of its own), flags."""
    hooks = []
    for name, module in vlm.model.named_modules():
        found = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks += [name for hook in found if getattr(hook, "__module__", "").startswith("alea_lib")]
        hooks += [f"{name}.forward"] * ("forward" in module.__dict__)
    parameters = [
        (n, p.double().sum().item(), p.requires_grad, p.grad is None) for n, p in vlm.model.named_parameters()
    ]
    return [parameters, hooks, vlm.model.training, vlm.model.config.get_text_config()._attn_implementation]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    from alea_lib.datasets.write import make_scenes

    return make_scenes(
        tmp_path_factory.mktemp("world") / "world",
        activate=6, validate=4, test=16, pope_images=6, training_sample=30,
    )  # fmt: skip


@pytest.fixture(scope="session")
def seen(tiny, tiny_world):
    """Image features of the activate split, [6, P, D]."""
    return tiny.features(tiny_world.split("activate").files)


@pytest.fixture(scope="session")
def told(tiny_world):
    """Six captions of different lengths, one for each image of the activate split."""
    return [
        "There is a cup.",
        "A kitchen scene shows a knife and a spoon. There is also a bowl.",
        "There are two cups with an apple. There is a dog.",
        "A street scene on a blue background shows a car.",
        "There is a bus. There is a cat with a bowl. On the left there is a horse.",
        "There is a pair of scissors.",
    ]


@pytest.fixture
def bits():
    """All parameters and buffers of a model as bytes, for bit-equality."""

    def read(vlm):
        named = [*vlm.model.named_parameters(), *vlm.model.named_buffers()]
        return {n: (t.dtype, t.detach().cpu().contiguous().numpy().tobytes()) for n, t in named}

    return read
