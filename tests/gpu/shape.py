"""The architecture of LLaVA-1.5 with random weights, built layer by layer in 4 bits: the host never holds it."""

from __future__ import annotations

import torch
from torch import nn

from alea_lib.models.families import family
from alea_lib.models.loading import Reader, keep_trainable_on_cpu
from alea_lib.models.vlm import VLM

from .settings import Size

PATCH = 14
STD = 0.02


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the GPU has it (Ampere and later), half precision on older ones, fp32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def random_llava(size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0) -> VLM:
    """A model of that size in NF4 with double quantisation, but for the parts that `load` too keeps in full: vision
    tower, projector, head, and the down-projections of the last ``size.edited`` layers.

    Words are the small world's, so that only a few of the vocabulary's tokens are ever read or decoded.
    """
    from accelerate import init_empty_weights
    from transformers import LlavaForConditionalGeneration

    reader = _reader(size)
    with init_empty_weights(include_buffers=False):  # parameters without memory; buffers are small, and right already
        model = LlavaForConditionalGeneration(config(size, reader.tokenizer))
    row = family("llava", small=size.decoder[0] < 1024, text="llama")
    kept = [row.down_proj.format(i=i) for i in edited_layers(size)]
    materialise(model, (*row.unquantised, *kept), device, dtype, seed)
    return VLM(model, reader, row, f"random-{size.name}")


def edited_layers(size: Size) -> tuple[int, ...]:
    """The last ones."""
    layers = size.decoder[2]
    return tuple(range(layers - size.edited, layers))


def config(size: Size, tokenizer):
    """The numbers of llava-1.5-7b-hf's configuration, or of a smaller model of the same shape."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    def shape(width: int, mlp: int, layers: int, heads: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }

    text = LlamaConfig(
        **shape(*size.decoder),
        num_key_value_heads=size.decoder[3],
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**shape(*size.tower), image_size=size.image, patch_size=PATCH),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(size.image // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _reader(size: Size) -> Reader:
    from transformers import CLIPImageProcessorPil

    from alea_lib.zoo.text import build_tokenizer

    crop = {"height": size.image, "width": size.image}
    return Reader(build_tokenizer(), CLIPImageProcessorPil(size={"shortest_edge": size.image}, crop_size=crop))


def materialise(model: nn.Module, full: tuple[str, ...], device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Give every parameter of an empty model random values on the device, one module at a time; linear modules whose
    name does not begin with one of ``full`` are quantised at once. RuntimeError if one is left without values."""
    generator = torch.Generator(device).manual_seed(seed)

    def values(name: str, shape) -> torch.Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape, device=device, dtype=dtype)
        if "norm" in name:
            return torch.ones(shape, device=device, dtype=dtype)
        return torch.empty(shape, device=device, dtype=dtype).normal_(0, STD, generator=generator)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.startswith(full):
            model.set_submodule(name, _quantised(module, values(name, module.weight.shape), dtype))
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(values(f"{name}.{key}", parameter.shape), requires_grad=False)
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer if buffer is None else buffer.to(device)
    if device.type == "cpu":
        keep_trainable_on_cpu(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if left := [name for name, tensor in tensors if tensor.device.type != device.type]:
        raise RuntimeError(f"{len(left)} tensors have no values on {device}: {left[:3]}")


def _quantised(module: nn.Linear, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    options = {"quant_type": "nf4", "compress_statistics": True}
    new = bitsandbytes.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=dtype, device="meta", **options
    )
    packed = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=new, **options)
    new.weight = packed.to(weight.device)  # quantises
    return new.eval()
