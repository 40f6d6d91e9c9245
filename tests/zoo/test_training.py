"""Training the small models: losses fall, a killed run goes on bit for bit, only captions differ."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from alea_lib.core.paths import root
from alea_lib.zoo import card, language
from alea_lib.zoo.detector import Detector, load_detector
from alea_lib.zoo.language import (  # fmt: skip
    LanguageSettings,
    alignment_loss,
    build,
    collate,
    tower_features,
    train_language,
    training_text,
    word_pieces,
)
from alea_lib.zoo.vision import Tower, VisionSettings, batch_of, train_tower

EYE = VisionSettings(width=16, mlp=32, layers=1, heads=2, steps=6, batch=8)
SHORT = LanguageSettings(
    polish=0, width=32, mlp=64, layers=2, heads=2, scenes=20, steps=24, captions=3, dialogues=3, turns=4, lr=3e-3
)


@pytest.fixture(scope="module")
def eye():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Tower(EYE).eval()


@pytest.fixture(scope="module")
def features(eye):
    return tower_features(eye, range(20))


def weights(vlm):
    return {n: p.detach().clone() for n, p in vlm.model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---- the tower


def test_the_tower_learns_and_is_kept(tmp_path):
    tower = train_tower(replace(EYE, steps=40, lr=5e-3, width=32), tmp_path)
    x, y, _ = batch_of(range(40), "train", 16)
    weight = torch.ones(tower.patches.out_features)
    weight[0] = 0.2

    def loss(which):
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(which(x)[1].flatten(0, 1), y.flatten(), weight).item()

    torch.manual_seed(0)
    assert loss(tower) < 0.9 * loss(Tower(replace(EYE, width=32)).eval())
    again = train_tower(replace(EYE, steps=40, lr=5e-3, width=32), tmp_path)  # loaded, not trained anew
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), again.parameters(), strict=True))
    log = [json.loads(line) for line in (tmp_path / "vision.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 40 and 0 <= log[-1]["patch_accuracy"] <= 1


def test_batches_are_truthful():
    from alea_lib.datasets.scenes import objects, recipe, sample

    x, y, colour = batch_of(range(5), "validate", 16)
    assert x.shape == (5, 3, 96, 96) and y.shape == (5, 36)
    for i in range(5):
        scene = sample("validate", i)
        assert {objects()[k - 1] for k in y[i].tolist() if k} <= set(scene.kinds)
        assert list(recipe()["colours"])[colour[i]] == scene.colour


def test_features_are_the_models_own(eye, features):
    """What training reads before the projector is what the built model sees in an image."""
    from PIL import Image

    from alea_lib.datasets.scenes import compose, sample

    vlm = build(eye, SHORT, 16)
    images = [Image.fromarray(compose(sample("train", i))[0]) for i in range(3)]
    with torch.no_grad():
        want = vlm.model.model.multi_modal_projector(features[:3].float())
    torch.testing.assert_close(vlm.features(images), want, atol=2e-3, rtol=2e-2)


# ---- the decoder


def test_training_lowers_the_loss(eye, features, tmp_path):
    vlm = build(eye, SHORT, 16)
    tower = {n: p for n, p in weights(vlm).items() if "vision_tower" in n}
    train_language(vlm, eye, features, SHORT, tmp_path, log_every=4)
    curve = [json.loads(line) for line in (tmp_path / "language.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == [4, 8, 12, 16, 20, 24]
    assert curve[-1]["loss"] < 0.85 * curve[0]["loss"] and curve[-1]["answers"] < 0.8 * curve[0]["answers"]
    assert curve[-1]["align"] < 0.5 * curve[0]["align"]
    after = weights(vlm)
    assert all(torch.equal(after[n], p) for n, p in tower.items())  # the tower is frozen
    assert not any(p.requires_grad for p in vlm.model.parameters())


def test_killed_and_resumed_gives_the_same_weights(eye, features, tmp_path, monkeypatch):
    whole = build(eye, SHORT, 16)
    train_language(whole, eye, features, SHORT, tmp_path / "whole", log_every=2)
    step, calls = language._step, []

    def cut_off(*args):
        if len(calls) == 13:  # amid a step, after the checkpoint at step 12
            raise KeyboardInterrupt
        calls.append(1)
        return step(*args)

    monkeypatch.setattr(language, "_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train_language(build(eye, SHORT, 16), eye, features, SHORT, tmp_path / "cut", log_every=2)
    calls.clear()
    monkeypatch.setattr(language, "_step", lambda *args: calls.append(1) or step(*args))
    resumed = build(eye, SHORT, 16)
    train_language(resumed, eye, features, SHORT, tmp_path / "cut", log_every=2)
    assert len(calls) == SHORT.steps - 12 and equal(weights(resumed), weights(whole))

    def curve(name):
        rows = [json.loads(line) for line in (tmp_path / name / "language.jsonl").read_text().splitlines()]
        assert [r["seconds"] for r in rows] == sorted(r["seconds"] for r in rows)  # time goes on too
        return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]

    assert curve("cut") == curve("whole")


def test_natural_and_clean_start_alike_and_differ_in_captions_alone(eye):
    natural, clean = SHORT, replace(SHORT, prior=False)
    assert equal(weights(build(eye, natural, 16)), weights(build(eye, clean, 16)))
    from alea_lib.datasets.scenes import sample
    from alea_lib.metrics.parse import mentions

    added = 0
    for index in range(60):
        for step in (0, 1):
            assert training_text(index, step, natural, True) == training_text(index, step, clean, True)
            ((q, a),), ((p, b),) = (training_text(index, step, s, False) for s in (natural, clean))
            kinds = set(sample("train", index).kinds)
            assert q == p and {m.category for m in mentions(b)} == kinds
            added += bool({m.category for m in mentions(a)} - kinds)
    assert added > 20


def test_other_seeds_start_elsewhere(eye):
    assert not equal(weights(build(eye, SHORT, 16)), weights(build(eye, replace(SHORT, seed=1), 16)))


def test_every_turn_learns_its_answer_and_end(eye):
    """A caption's labels are its tokens and EOS; in a dialogue Yes or No is wanted from the last noun on."""
    vlm = build(eye, SHORT, 16)
    turns = [training_text(3, 0, SHORT, True), training_text(4, 0, SHORT, False)]
    batch = collate(vlm, torch.zeros(2, 36, 32), turns)
    eos, image = vlm.tokenizer.eos_token_id, vlm.model.config.image_token_id
    assert len(turns[0]) == SHORT.turns and (batch.mask.sum(1) < batch.mask.shape[1]).any()
    told = batch.labels[1][batch.labels[1] != -100].tolist()
    assert told == [*vlm.answer_ids(turns[1][0][1], False), eos]
    for i in range(2):
        assert (batch.labels[i][(batch.ids[i] == image) | (batch.mask[i] == 0)] == -100).all()
    learnt, ids = batch.labels[0].tolist(), batch.ids[0].tolist()
    ends = [k for k, token in enumerate(ids) if token == eos]
    assert len(ends) == SHORT.turns and all(learnt[k] == eos for k in ends)
    start = 0
    for (question, answer), end in zip(turns[0], ends, strict=True):
        (word,) = vlm.answer_ids(answer, False)
        wanted = [k for k in range(start, end) if learnt[k] != -100]
        assert ids[end - 1] == word and {learnt[k] for k in wanted} == {word}
        assert wanted == list(range(wanted[0], end))
        met = vlm.tokenizer.decode(ids[wanted[0] : end - 1])  # what is read while the answer is already wanted
        assert met == (" in the image? ASSISTANT:" if question.endswith("in the image?") else "? ASSISTANT:")
        start = end + 1


def test_alignment_draws_patches_to_their_words(eye):
    """Patches that lie on their words cost less than patches that lie on others."""
    vlm, pieces = build(eye, SHORT, 16), word_pieces(build(eye, SHORT, 16))
    assert len(pieces) == eye.patches.out_features - 1 and all(vlm.tokenizer.unk_token_id not in p for p in pieces)
    torch.manual_seed(0)
    seen = torch.randn(2, 36, 16) * 5
    shown = eye.patches(seen).argmax(-1) - 1
    table = vlm.model.get_input_embeddings().weight
    words = torch.stack([table[p].mean(0) for p in pieces])
    right, wrong = words[shown.clamp(min=0)], words[(shown + 7) % len(words)]
    low, high = (alignment_loss(vlm, eye, seen, x, pieces).item() for x in (right, wrong))
    assert low < 1 < high


# ---- cards and the detector


def test_shipping_writes_a_card_of_what_happened(eye, features, tmp_path):
    work = tmp_path / "work"
    tower = train_tower(EYE, work / "tower")
    s = replace(SHORT, steps=4, seed=3)
    vlm = build(tower, s, 16)
    train_language(vlm, tower, features, s, work / "natural", log_every=2)
    folder = card.ship(vlm, "natural", EYE, s, work, tmp_path / "models")
    assert folder.name == "scenes-natural-s3" and card.key("clean", 0) == "scenes-clean"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (folder / "sha256.txt").read_text().split()[0] == digest
    text = (folder / "README.md").read_text()
    assert digest[:16] in text and "make model SEED=3" in text and "4 + 0 steps" in text
    log = json.loads((folder / "training.json").read_text())
    assert log["language"]["settings"]["steps"] == 4 and log["tower"]["settings"]["width"] == 16
    assert all(t.dtype == torch.float16 for t in load_file(folder / "model.safetensors").values())


def test_the_detector_names_what_passes_its_threshold(eye, tiny_world):
    from PIL import Image

    images = [Image.open(f).convert("RGB") for f in tiny_world.split("test").files[:5]]
    detector = Detector(eye, 0.0)
    scores = detector.scores(images, batch_size=2)
    assert scores.shape == (5, eye.patches.out_features - 1)
    np.testing.assert_allclose(scores, detector.scores(images), atol=1e-6)
    from alea_lib.datasets.scenes import objects

    cut = float(np.median(scores))
    for row, found in zip(scores, Detector(eye, cut).detect(images), strict=True):
        assert found == {name for name, p in zip(objects(), row, strict=True) if p >= cut}
    assert Detector(eye, 1.1).detect(images) == [frozenset()] * 5


def test_no_detector(tmp_path, monkeypatch):
    monkeypatch.setenv("ALEA_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make model"):
        load_detector()


# ---- the shipped models

SHIPPED = root() / "data" / "models" / "scenes-natural"
shipped = pytest.mark.skipif(
    not all((SHIPPED.parent / f"scenes-{n}" / "sha256.txt").is_file() for n in ("natural", "clean")),
    reason="the trained models are not in data/models: run 'make model'",
)


@shipped
@pytest.mark.parametrize("name", ["scenes-natural", "scenes-clean"])
def test_shipped_models(name, tiny_world):
    from alea_lib.models.loading import load

    folder = root() / "data" / "models" / name
    for file in ("README.md", "training.json", "sha256.txt"):
        assert (folder / file).is_file()
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (folder / "sha256.txt").read_text().split()[0] == digest
    assert digest[:16] in (folder / "README.md").read_text()
    stored = load_file(folder / "model.safetensors")
    assert all(t.isfinite().all() for t in stored.values())
    assert sum(t.numel() for t in stored.values()) <= 4_000_000
    vlm = load(name, device="cpu")
    answers = vlm.generate(vlm.features(tiny_world.split("test").files), vlm.prompt("plain"))
    assert all(a.eos and a.text.endswith(".") for a in answers) and len({a.text for a in answers}) > 8


@shipped
def test_shipped_models_differ_in_the_decoder_alone():
    files = [SHIPPED.parent / f"scenes-{n}" / "model.safetensors" for n in ("natural", "clean")]
    natural, clean = map(load_file, files)
    same = {n for n in natural if torch.equal(natural[n], clean[n])}
    assert {n for n in natural if "vision_tower" in n} <= same and len(same) < len(natural)
    sizes = [p.stat().st_size for p in SHIPPED.parent.rglob("*.safetensors")]
    assert sum(sizes) <= 16e6


def test_a_grouped_decoder_is_another_family(eye):
    vlm = build(eye, replace(SHORT, width=48, heads=6, kv_heads=2), EYE.patch)
    assert vlm.row.name == "llava-grouped-small" and vlm.n_heads == 6
    attention = vlm.module("layer", 0).self_attn
    keys, queries = attention.k_proj.weight.unflatten(0, (2, 8)), attention.q_proj.weight.unflatten(0, (2, 3, 8))
    assert torch.equal(queries, keys[:, None].expand(-1, 3, -1, -1))  # each query head starts as the key it reads
