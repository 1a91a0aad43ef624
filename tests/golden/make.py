"""Reference outputs of Hugging Face `transformers` for random weights, for the parity tests.

    python -m tests.golden.make            write clip/, llama/ and llava/ beside this file (needs transformers)
    python -m tests.golden.make --large    write nothing: compare with transformers at the shapes of LLaVA-1.5

Each folder holds config.json and model.safetensors as transformers saved them, and reference.safetensors: inputs, and the
outputs of transformers' own modules, with attention written out ("eager") where ours is fused. Weights are drawn large enough
that no layer is close to the identity.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from clip_vit import CLIPVisionConfig as OurVision
from clip_vit import CLIPVisionTower
from data import IMAGE_ID, find_places
from formats.weights import Stored, build, sort_tensors
from llama import Llama
from llama import LlamaConfig as OurText
from model import ADAPTERS, LocVLM, place_image

HERE = Path(__file__).parent
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
)
TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EAGER = dict(attn_implementation="eager")
IMAGE = 63  # transformers needs an image placeholder inside the vocabulary


def scramble(model, seed):
    """Draw every weight at random: matrices keep the size of their input, norms and biases move away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * (1.0 if "embed_tokens" in name or "position" in name else p[0].numel() ** -0.5))
            else:
                p.copy_(0.1 * noise + float("norm" in name and name.endswith("weight")))
    return model.eval()


def write(name, model, reference):
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    reference = {key: tensor.detach().contiguous() for key, tensor in reference.items()}
    save_file(reference, HERE / name / "reference.safetensors")
    size = sum(file.stat().st_size for file in (HERE / name).iterdir())
    print(f"{name}: {size:,} bytes, transformers {transformers.__version__}, torch {torch.__version__}")


def make_clip(generator):
    tower = scramble(CLIPVisionModel(CLIPVisionConfig(**VISION, **EAGER)), 1)
    pixel_values = torch.randn(2, 3, 28, 28, generator=generator)
    hidden = tower(pixel_values, output_hidden_states=True).hidden_states
    write("clip", tower, {"pixel_values": pixel_values, "patches": hidden[-2][:, 1:]})


def make_llama(generator):
    llama = scramble(LlamaForCausalLM(LlamaConfig(**TEXT, **EAGER)), 2)
    input_ids = torch.randint(3, 60, (2, 12), generator=generator)
    write("llama", llama, {"input_ids": input_ids, "logits": llama(input_ids).logits})


def make_llava(generator):
    """Make two rows of different length, an image in each, the answers supervised; padding is masked."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE,
        projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default", **EAGER,
    )  # fmt: skip
    llava = scramble(LlavaForConditionalGeneration(config), 3)
    pixel_values = torch.randn(2, 3, 28, 28, generator=generator)
    words = torch.randint(3, 60, (2, 11), generator=generator)
    input_ids = torch.cat([torch.tensor([[1, 5]] * 2), torch.full((2, 4), IMAGE), words], dim=1)  # (2, 17)
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 13:], attention_mask[1, 13:] = 0, 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :10] = -100
    out = llava(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, labels=labels)
    out.loss.backward()
    inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    gradient = llava.model.multi_modal_projector.linear_1.weight.grad
    write("llava", llava, {**inputs, "logits": out.logits, "loss": out.loss, "adapter_gradient": gradient})


def config_of(config):
    return json.loads(config.to_json_string())


def parts_of(theirs):
    """Sort the tensors of a transformers model into our three parts."""
    stored = {k: Stored(tuple(v.shape), lambda a, b, v=v: v[a:b], HERE) for k, v in theirs.state_dict().items()}
    return sort_tensors(stored, "transformers")


def compare(name, ours, theirs):
    """Print the largest error as a fraction of the largest value, and return it."""
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{name} {tuple(theirs.shape)}: largest error {error:.2e} of the largest value", flush=True)
    return error


@torch.inference_mode()
def compare_large():
    """Compare with transformers at the real shapes, random weights, fp32: the tower at 224 px, a whole LLaVA-1.5 at 336 px."""
    large = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    config = CLIPVisionConfig(**large, image_size=224, **EAGER)
    theirs = scramble(CLIPVisionModel(config), 4)
    tower = build(lambda: CLIPVisionTower(OurVision.from_dict(config_of(config))), parts_of(theirs)["vision_tower"], "")
    pixel_values = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    reference = theirs(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
    errors = [compare("ViT-L/14-224", tower(pixel_values), reference)]
    del theirs, tower

    text = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=32064)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **large, "image_size": 336, **EAGER},
        text_config={"model_type": "llama", "num_key_value_heads": 32, "rms_norm_eps": 1e-5, **text, **EAGER},
        image_token_index=32000,
        **EAGER,
    )
    theirs = scramble(LlavaForConditionalGeneration(config), 6)
    parts, described = parts_of(theirs), config_of(config)
    model = LocVLM.join(
        build(lambda: CLIPVisionTower(OurVision.from_dict(described)), parts["vision_tower"], ""),
        build(lambda: ADAPTERS["mlp2x_gelu"](1024, 4096), parts["adapter"], ""),
        Llama.from_stored(OurText.from_dict(described), parts["language_model"], ""),
        None,
    )
    pixel_values = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(7))
    reference = theirs.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
    errors.append(compare("ViT-L/14-336", model.vision_tower(pixel_values), reference))
    words = torch.randint(3, 32000, (1, 40), generator=torch.Generator().manual_seed(8))
    errors.append(compare("LLaMA, width 4096", model.language_model(words), theirs(input_ids=words).logits))
    ids = torch.cat([words[:, :8], torch.full((1, 576), 32000), words[:, 8:]], dim=1)
    x = model.language_model.embed_tokens(ids)
    x = place_image(x, model.adapter(model.vision_tower(pixel_values)), find_places(ids.masked_fill(ids == 32000, IMAGE_ID)))
    ours = model.language_model.lm_head(model.language_model.hidden(x))
    errors.append(compare("LLaVA-1.5, two layers", ours, theirs(input_ids=ids, pixel_values=pixel_values).logits))
    sys.exit(f"{max(errors):.2e} is more than 1e-5" if max(errors) > 1e-5 else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    large = "compare at the shapes of LLaVA-1.5 instead of writing fixtures (about 9 GB of memory)"
    parser.add_argument("--large", action="store_true", help=large)
    if parser.parse_args().large:
        compare_large()
    else:
        generator = torch.Generator().manual_seed(0)
        make_clip(generator)
        make_llama(generator)
        make_llava(generator)
