"""Reference outputs of Hugging Face `transformers` for random weights, for the parity tests.

    python tests/golden/make.py            write clip/, llama/ and llava/ beside this file (needs transformers)
    python tests/golden/make.py --large    write nothing: compare our tower with theirs at ViT-L/14-224 and -336

Each folder holds config.json and model.safetensors as transformers saved them, and reference.safetensors: inputs, and
what transformers' own modules made of them, attention written out ("eager") where ours is fused. Weights are drawn
large enough that no layer is close to the identity.
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

HERE = Path(__file__).parent
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14
)
TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
EAGER = dict(attn_implementation="eager")
IMAGE = 63  # transformers wants its image placeholder inside the vocabulary


def scramble(model, seed):
    """Draw every weight anew: matrices keep the size of what passes through them, norms and biases leave 1 and 0."""
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
    save_file(
        {key: tensor.detach().contiguous() for key, tensor in reference.items()}, HERE / name / "reference.safetensors"
    )
    print(
        f"{name}: {sum(f.stat().st_size for f in (HERE / name).iterdir()):,} bytes, transformers {transformers.__version__}, torch {torch.__version__}"
    )


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
    """Two rows of unlike length, an image in each, the answers supervised; what pads the shorter row is masked."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **EAGER,
    )
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
    projector = llava.model.multi_modal_projector
    write(
        "llava",
        llava,
        {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "logits": out.logits,
            "loss": out.loss,
            "adapter_gradient": projector.linear_1.weight.grad,
        },
    )


@torch.inference_mode()
def compare_large():
    """Our tower against theirs at the real shapes, random weights, fp32."""
    sys.path.insert(0, str(HERE.parents[1]))
    from checkpoint import load_strictly
    from clip_vit import CLIPVisionConfig as OurConfig
    from clip_vit import CLIPVisionTower, vision_tensors

    worst = 0.0
    for side in (224, 336):
        config = CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=side,
            patch_size=14,
            **EAGER,
        )
        theirs = scramble(CLIPVisionModel(config), 4)
        ours = CLIPVisionTower(OurConfig.from_dict(json.loads(config.to_json_string())))
        load_strictly(ours, vision_tensors(theirs.state_dict()), f"ViT-L/14-{side}")
        pixel_values = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(5))
        wanted = theirs(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        error = float((ours(pixel_values) - wanted).abs().max() / wanted.abs().max())
        print(
            f"ViT-L/14-{side}: patches {tuple(wanted.shape)}, max error {error:.2e} of the largest value {float(wanted.abs().max()):.1f}",
            flush=True,
        )
        worst = max(worst, error)
    sys.exit(f"{worst:.2e} is more than 1e-5" if worst > 1e-5 else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--large",
        action="store_true",
        help="compare at ViT-L/14-224 and -336 instead of writing fixtures (about 6 GB of memory)",
    )
    if parser.parse_args().large:
        compare_large()
    else:
        generator = torch.Generator().manual_seed(0)
        make_clip(generator)
        make_llama(generator)
        make_llava(generator)
