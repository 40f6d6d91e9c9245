"""A tiny LLaVA in the hub's layout: random weights that have learnt a few sentences, in a cache as the hub fills it."""

import io
from pathlib import Path

from PIL import Image

ROLES = {  # what the model learns to say; which of the first is chosen by the picture
    "plain": ["There is a cup. There is also a dog.", "There is a cup with a dog. There is also a chair."],
    "careful": ["There is a cup.", "There is a cup. There is also a dog."],
    "speculative": [
        "There is a cup with a fork. There is also a chair.",
        "There is a cup and a train. There is a dog.",
    ],
}
QUESTIONS = {"cup": "Yes", "dog": "Yes", "train": "No", "car": "No", "fork": "No"}


def learnt(files: dict[str, bytes], steps: int = 120):
    """The llava of ``tiny_families`` after some steps on these pictures, and its last loss."""
    import torch
    from tiny_families import build

    from alea_lib.models.families import FAMILIES

    vlm, _ = build("llava")
    vlm.row = FAMILIES["llava-small"]  # the row that `load` gives a model of this width
    pictures = [
        Image.open(io.BytesIO(body)).convert("RGB") for path, body in sorted(files.items()) if "val2014/" in path
    ]
    features = vlm.features(pictures)
    items = [(k, vlm.prompt(role), texts[k % 2]) for k in range(len(pictures)) for role, texts in ROLES.items()]
    items += [(k, f"Is there a {thing} in the image?", a) for k in range(8) for thing, a in QUESTIONS.items()]
    parameters = [p.requires_grad_(True) for n, p in vlm.model.named_parameters() if "vision_tower" not in n]
    optimiser, draw = torch.optim.AdamW(parameters, lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        which = [items[i] for i in torch.randint(len(items), (24,), generator=draw).tolist()]
        batch = vlm.encode(features[[k for k, _, _ in which]], [q for _, q, _ in which], [a for _, _, a in which])
        loss = torch.nn.functional.cross_entropy(vlm.answer_logits(batch), batch.labels[batch.labels != -100])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    vlm.model.requires_grad_(False)
    return vlm, loss.item()


def cached(vlm, cache: Path, repository: str, revision: str) -> Path:
    """The model as the hub's cache holds it: shards of 16-bit weights, processor, chat template; its folder."""
    import torch

    place = cache / f"models--{repository.replace('/', '--')}"
    folder = place / "snapshots" / revision
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
    vlm.model.to(torch.float16).save_pretrained(folder, max_shard_size="300KB")
    vlm.processor.chat_template = "USER: <image>\n{{ messages[0]['content'][-1]['text'] }} ASSISTANT:"
    vlm.processor.save_pretrained(folder)
    return folder
