"""Training projector and decoder of a small LLaVA over a frozen vision tower, on captions and questions."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from ..datasets.describe import caption, questions
from ..datasets.scenes import ROLES, compose, objects, sample
from ..models import checkpoint
from ..models.batch import Batch
from ..models.families import FAMILIES, family
from ..models.vlm import VLM
from .text import build_processor, pixels
from .vision import Tower, one_cycle, write_row

ROLE_P = (0.3, 0.4, 0.3)  # careful, plain, speculative
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


@dataclass(frozen=True)
class LanguageSettings:
    """One decoder. ``prior``: captions by annotators who complete sets (natural) or truthful ones (clean)."""

    seed: int = 0
    prior: bool = True
    width: int = 192
    mlp: int = 448
    layers: int = 6
    heads: int = 6
    kv_heads: int = 0  # 0: one a head; else a Mistral decoder, whose query heads share keys and values in groups
    scenes: int = 14_000
    steps: int = 1300
    captions: int = 16  # sequences with a caption in a batch
    dialogues: int = 16  # sequences with questions in a batch
    turns: int = 8  # questions of a dialogue
    lr: float = 1.5e-3
    polish: int = 300  # further steps, learning rate falling in a line to 0, three captions to a dialogue
    polish_lr: float = 8e-4
    align: float = 0.1  # weight of the alignment of projected patches with the word that names them


def build(tower: Tower, s: LanguageSettings, patch: int) -> VLM:
    """A ``LlavaForConditionalGeneration`` with the tower's weights and a decoder initialised from the seed."""
    processor = build_processor(patch)
    vision = CLIPVisionConfig(**tower.clip.config.to_diff_dict())
    text = _decoder(s, len(processor.tokenizer))
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=len(processor.tokenizer) - 1,
        image_seq_length=(vision.image_size // patch) ** 2, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(s.seed)
    model = LlavaForConditionalGeneration(config)
    own = dict(model.model.vision_tower.named_parameters())
    theirs = {k.removeprefix("vision_model."): v for k, v in tower.clip.named_parameters()}
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(theirs[name.removeprefix("vision_model.")])
        for layer in model.model.language_model.layers[:2]:  # attention starts by similarity: queries equal keys
            _same_queries(layer.self_attn, s)
    for key, value in SPECIAL.items():
        setattr(model.generation_config, key, value)
    return VLM(model, processor, family("llava", small=True, text=text.model_type), "training")


def _decoder(s: LanguageSettings, vocabulary: int) -> LlamaConfig | MistralConfig:
    shape = {
        "vocab_size": vocabulary, "hidden_size": s.width, "intermediate_size": s.mlp, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads or s.heads,
        "max_position_embeddings": 512, "tie_word_embeddings": False, **SPECIAL,
    }  # fmt: skip
    return MistralConfig(**shape, sliding_window=None) if s.kv_heads else LlamaConfig(**shape)


def _same_queries(attention: nn.Module, s: LanguageSettings) -> None:
    """Make each query head the key head that it reads."""
    queries, keys = attention.q_proj.weight, attention.k_proj.weight
    if not s.kv_heads:
        queries.mul_(3.0)
        keys.copy_(queries)
    else:
        keys.mul_(3.0)
        heads = keys.unflatten(0, (s.kv_heads, -1)).repeat_interleave(s.heads // s.kv_heads, 0)
        queries.copy_(heads.flatten(0, 1))


@torch.no_grad()
def tower_features(tower: Tower, indices, chunk: int = 250) -> torch.Tensor:
    """Features [N,P,D] in half precision of training scenes (before the projector)."""
    out = []
    for start in range(0, len(indices), chunk):
        images = np.stack([compose(sample("train", i))[0] for i in indices[start : start + chunk]])
        out.append(tower(pixels(images))[0].half())
    return torch.cat(out)


def training_text(index: int, step: int, s: LanguageSettings, asked: bool) -> list[tuple[str, str]]:
    """The turns (question, answer) of one training sequence. ``natural`` and ``clean`` differ in the caption alone."""
    rng = np.random.default_rng([s.seed, 9, step, index])
    scene = sample("train", index)
    if asked:
        return questions(scene, rng, s.turns)
    role = str(rng.choice(ROLES, p=ROLE_P))
    return [(FAMILIES["llava-small"].prompts[role], caption(scene, rng, role if s.prior else None))]


def collate(vlm: VLM, features: torch.Tensor, turns: list[list[tuple[str, str]]]) -> Batch:
    """Multi-turn sequences: the first turn has the image; each answer ends with EOS."""
    rows = [_turn_ids(vlm, features.shape[1], t) for t in turns]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), vlm.tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, wanted) in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, : len(row)] = torch.tensor(wanted)
    nowhere = torch.zeros(len(rows), dtype=torch.int64)  # no prefix is put into training sequences
    return Batch(ids, mask, labels, features, nowhere, nowhere)


def _turn_ids(vlm: VLM, n_image: int, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and labels. In a dialogue Yes or No is wanted from the question's last noun on, not only at its end, so
    that the gradient reaches the place where the word is met."""
    ids, labels = [], []
    for i, (question, answer) in enumerate(turns):
        prompt = _ids(vlm, f"USER: {question} ASSISTANT:") if i else vlm.prompt_ids(question, n_image)
        reply = vlm.answer_ids(answer, eos=True)
        early = 0
        if len(turns) > 1:
            early = len(_ids(vlm, f"{' in the image' if question.endswith('in the image?') else ''}? ASSISTANT:"))
        ids += prompt + reply
        labels += [-100] * (len(prompt) - early) + [reply[0]] * early + reply
    return ids, labels


def _ids(vlm: VLM, text: str) -> list[int]:
    return vlm.tokenizer(text, add_special_tokens=False)["input_ids"]


def word_pieces(vlm: VLM) -> list[list[int]]:
    """Token ids of each category's name, in the order of ``objects()``."""
    return [_ids(vlm, f" {name}") for name in objects()]


def alignment_loss(vlm: VLM, tower: Tower, features: torch.Tensor, projected: torch.Tensor, pieces) -> torch.Tensor:
    """Cross-entropy of a projected patch's cosine with the words, against what the tower says that it shows."""
    with torch.no_grad():
        label = tower.patches(features).argmax(-1) - 1
    front = label >= 0
    table = vlm.model.get_input_embeddings().weight
    words = F.normalize(torch.stack([table[p].mean(0) for p in pieces]), dim=-1)
    return F.cross_entropy(F.normalize(projected[front], dim=-1) @ words.T / 0.1, label[front])


def train_language(
    vlm: VLM, tower: Tower, features: torch.Tensor, s: LanguageSettings, folder: Path, log_every: int = 100
) -> None:
    """Train in place, with a checkpoint and a logged curve; a run that was cut off goes on where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {n: p for n, p in vlm.model.named_parameters() if "vision_tower" not in n}
    for p in parameters.values():
        p.requires_grad_(True)
    optimiser, schedule = one_cycle(parameters.values(), s.lr, s.steps, weight_decay=0.05)
    kept_at, tag = folder / "checkpoint.safetensors", json.dumps(asdict(s))
    done = checkpoint.resume(kept_at, parameters, optimiser, tag)
    for _ in range(min(done, s.steps)):
        schedule.step()
    path = folder / "language.jsonl"
    kept = [row for row in map(json.loads, path.read_text().splitlines()) if row["step"] <= done] if done else []
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    started = time.time() - (kept[-1]["seconds"] if kept else 0.0)
    pieces, total = word_pieces(vlm), np.zeros(3)
    with path.open("a") as log:
        for step in range(done, s.steps + s.polish):
            for group in optimiser.param_groups if step >= s.steps else ():
                group["lr"] = s.polish_lr * (1 - (step - s.steps) / s.polish)
            total += _step(vlm, tower, features, s, step, parameters, optimiser, pieces)
            if step < s.steps:
                schedule.step()
            if (step + 1) % log_every == 0:
                losses = zip(("loss", "answers", "align"), (total / log_every).round(5).tolist(), strict=True)
                write_row(log, {"step": step + 1, **dict(losses), "seconds": round(time.time() - started, 1)})
                total[:] = 0.0
                checkpoint.save(kept_at, step + 1, parameters, optimiser, tag)
    vlm.model.requires_grad_(False)


def _step(
    vlm: VLM, tower: Tower, features: torch.Tensor, s: LanguageSettings, step: int, parameters: dict, optimiser, pieces
) -> np.ndarray:
    """One step on captions and dialogues (two passes: their lengths differ). Returns the three losses."""
    rng = np.random.default_rng([s.seed, 8, step])
    losses = []
    optimiser.zero_grad()
    shift = s.dialogues // 2 if step >= s.steps else 0
    for asked, n in ((False, s.captions + shift), (True, s.dialogues - shift)):
        indices = rng.integers(0, len(features), n)
        patches = features[torch.as_tensor(indices)].float()
        projected = vlm.model.model.multi_modal_projector(patches)
        batch = collate(vlm, projected, [training_text(int(i), step, s, asked) for i in indices])
        loss = F.cross_entropy(vlm.answer_logits(batch), batch.labels[:, 1:][batch.target_mask[:, :-1]])
        align = alignment_loss(vlm, tower, patches, projected, pieces)
        (loss + s.align * align).backward()
        losses.append(loss.item())
    nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimiser.step()
    return np.array([*losses, align.item()])
