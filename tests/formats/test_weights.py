"""Checkpoints on disk: one random model under every naming gives the same logits, and damaged ones are refused by name."""

import json
import pickle
import shutil
import subprocess
import sys
import weakref
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from conftest import ROOT, TEXT
from safetensors.torch import load_file, save_file

from clip_vit import CLIPVisionConfig, CLIPVisionTower
from formats import weights
from formats.llava_hf import geometry_of
from formats.weights import Stored, build, open_tensors, sort_tensors, weights_sha256, write_tensors
from llama import Llama, LlamaConfig, read_tokenizer, rotary_frequencies
from model import LocVLM, LocVLMConfig

VISION = CLIPVisionConfig(  # heads of 64, as in every CLIP: files without a config are read by that
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=1, image_size=28
)
CLIP_PREFIX, LLAMA_PREFIX = "vision_model.", "model."


@pytest.fixture
def model(tokenizer):
    """A random LocVLM with the adapter of LLaVA v1.5."""
    torch.manual_seed(1)
    model = LocVLM(LocVLMConfig(VISION, TEXT, "mlp2x_gelu")).eval()
    model.tokenizer = tokenizer
    return model


def outputs(model):
    """What a checkpoint must give again: visual tokens of a picture, and logits of a text."""
    torch.manual_seed(2)
    pixel_values, input_ids = torch.randn(1, 3, 28, 28), torch.randint(3, TEXT.vocab_size, (1, 9))
    with torch.no_grad():
        visual = model.adapter(model.vision_tower(pixel_values))
        return visual, model.language_model(input_ids)[..., : TEXT.vocab_size]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


def named(part, prefix):
    """A part's tensors under `prefix`; a head keeps its bare name, as in HF's files."""
    return {(k if k.startswith("lm_head") else prefix + k): v.detach().clone() for k, v in part.state_dict().items()}


def write_folder(folder, tensors, config=None, how="safetensors"):
    """Write tensors and config.json: one safetensors file, one .bin, or two shards of either with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    suffix, stem = (".bin", "pytorch_model") if "bin" in how else (".safetensors", "model")
    save = torch.save if "bin" in how else save_file
    if "sharded" not in how:
        save(tensors, folder / (stem + suffix))
        return folder
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002{suffix}"
        save({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def text_config(config=TEXT):
    return {"model_type": "llama", "hidden_act": "silu", **asdict(config)}


# ----- namings


def openai_state(tower):
    """The tower as OpenAI's state dict has it: fused query, key and value, other names, a text side beside it."""
    state = {"visual.proj": torch.ones(2, 2), "logit_scale": torch.ones(()), "token_embedding.weight": torch.ones(3, 2)}
    ours = dict(tower.state_dict())
    for layer in range(VISION.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [ours.pop(f"encoder.layers.{layer}.self_attn.{p}_proj.{kind}") for p in "qkv"]
            state[f"visual.transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    renames = (
        ("embeddings.class_embedding", "class_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("embeddings.patch_embedding", "conv1"),
        ("pre_layrnorm", "ln_pre"),
        ("post_layernorm", "ln_post"),
        ("encoder.layers", "transformer.resblocks"),
        ("self_attn", "attn"),
        ("layer_norm", "ln_"),
        ("fc1", "c_fc"),
        ("fc2", "c_proj"),
    )
    for name, tensor in ours.items():
        for our, theirs in renames:
            name = name.replace(our, theirs)
        state["visual." + name] = tensor
    return state


@pytest.mark.parametrize("naming", ["bare", "vision_model", "whole CLIP", "bin", "openai"])
def test_a_tower_loads_under_every_naming(model, tmp_path, naming):
    """HF's with and without prefix and text tower, safetensors and .bin, and OpenAI's state dict."""
    tower, config = model.vision_tower, {"model_type": "clip_vision_model", **asdict(VISION)}
    if naming == "openai":
        torch.save(openai_state(tower), tmp_path / "ViT.pt")
        path = tmp_path / "ViT.pt"
    else:
        tensors = named(tower, "" if naming == "bare" else CLIP_PREFIX)
        if naming == "whole CLIP":
            tensors |= {"text_model.x": torch.ones(1), "logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2)}
            config = {"model_type": "clip", "vision_config": config}
        tensors["vision_model.embeddings.position_ids"] = torch.arange(5)
        path = write_folder(tmp_path / "clip", tensors, config, "bin" if naming == "bin" else "safetensors")
    again = CLIPVisionTower.from_pretrained(path)
    assert again.config == VISION
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("where", ["file", "folder", "beside other names"])
def test_open_clip_loads_with_its_own_config(tmp_path, where):
    """OpenAI's names, with heads of another size, the exact gelu, and another mean: what the shapes do not say."""
    shape = replace(VISION, num_attention_heads=2, hidden_act="gelu", image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    torch.manual_seed(0)
    tower, file = CLIPVisionTower(shape), tmp_path / "open_clip_model.safetensors"
    save_file(openai_state(tower), file)
    with pytest.raises(FileNotFoundError, match="open_clip_config.json"):
        CLIPVisionTower.from_pretrained(file)
    vision = {"image_size": 28, "layers": 3, "width": 64, "patch_size": 14, "head_width": 32, "patch_dropout": 0.0}
    config = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    if where == "beside other names":  # as timm's repositories
        save_file({"blocks.0.x": torch.ones(1)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch32_clip_224"}')
        assert [*weights_sha256(tmp_path)] == ["open_clip_config.json", "open_clip_model.safetensors"]
    again = CLIPVisionTower.from_pretrained(file if where == "file" else tmp_path)
    assert again.config == shape and all(map(torch.equal, tower.parameters(), again.parameters()))
    for changes, words in (({"no_ln_pre": True}, "unsupported vision_cfg {'no_ln_pre': True}"), ({"width": None}, "no width")):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision | changes}}))
        with pytest.raises(ValueError, match=words):
            CLIPVisionTower.from_pretrained(file)


def meta_state(llama, shards):
    """The decoder as Meta's consolidated.NN.pth have it: rotary pairs side by side, rows or columns cut into shards."""
    heads, kv_heads, size = TEXT.num_attention_heads, TEXT.num_key_value_heads, TEXT.head_dim

    def interleaved(weight, heads):
        return weight.view(heads, 2, size // 2, -1).transpose(1, 2).reshape(weight.shape)

    names = {"embed_tokens": "tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq"}
    names |= {
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
    }
    names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
    files = [{"rope.freqs": torch.ones(2)} for _ in range(shards)]
    for name, tensor in llama.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor, heads if "q_proj" in name else kv_heads)
        by_column = any(part in name for part in ("embed_tokens", "o_proj", "down_proj"))
        for our, theirs in names.items():
            name = name.replace(our, theirs)
        for number, file in enumerate(files):
            cut = tensor if tensor.ndim == 1 else tensor.chunk(shards, dim=int(by_column))[number]
            file[name] = cut.clone()
    return files


@pytest.mark.parametrize(
    "naming", ["safetensors", "sharded safetensors", "bin", "sharded bin", "bare", "meta 1", "meta 2"]
)
def test_a_llama_loads_under_every_naming(model, tmp_path, naming):
    """HF's files of all four kinds, the same without `model.`, and Meta's in one shard and in two."""
    llama, folder = model.language_model, tmp_path / "llama"
    if naming.startswith("meta"):
        folder.mkdir()
        params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6, "vocab_size": -1}
        (folder / "params.json").write_text(json.dumps(params))
        for number, state in enumerate(meta_state(llama, int(naming[-1]))):
            torch.save(state, folder / f"consolidated.{number:02d}.pth")
        shutil.copyfile(model.tokenizer.path, tmp_path / "tokenizer.model")
        assert len(read_tokenizer(folder)) == len(model.tokenizer)  # beside the models' folders
    else:
        tensors = named(llama, "" if naming == "bare" else LLAMA_PREFIX)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        write_folder(folder, tensors, text_config(), naming)
    again = Llama.from_pretrained(folder)
    input_ids = torch.arange(3, 20)[None]
    assert torch.equal(llama(input_ids), again(input_ids))


def llava_tensors(model, naming):
    """The whole model under the names of one of the LLaVA families."""
    adapter = {k: v.detach().clone() for k, v in model.adapter.state_dict().items()}
    original = {"linear_1": "0", "linear_2": "2"}
    vision, language, projector, head = {
        "original": (
            "model.vision_tower.vision_tower.vision_model.",
            "model.",
            "model.mm_projector.",
            "lm_head.weight",
        ),
        "llava-hf": (
            "vision_tower.vision_model.",
            "language_model.model.",
            "multi_modal_projector.",
            "language_model.lm_head.weight",
        ),
        "4.52": (
            "model.vision_tower.vision_model.",
            "model.language_model.",
            "model.multi_modal_projector.",
            "lm_head.weight",
        ),
        "5": ("model.vision_tower.", "model.language_model.", "model.multi_modal_projector.", "lm_head.weight"),
    }[naming]
    tensors = named(model.vision_tower, vision)
    for name, tensor in adapter.items():
        layer, kind = name.split(".")
        tensors[projector + (original[layer] if naming == "original" else layer) + "." + kind] = tensor
    for name, tensor in model.language_model.state_dict().items():
        tensors[head if name == "lm_head.weight" else language + name] = tensor.detach().clone()
    return tensors


@pytest.mark.parametrize("naming", ["original", "llava-hf", "4.52", "5"])
def test_a_llava_loads_under_every_naming(model, tmp_path, naming):
    """LLaVA's own names with the tower inside, llava-hf's, transformers 4.52's and 5's: the same visual tokens and logits."""
    nested = {"text_config": text_config(), "vision_config": {"model_type": "clip_vision_model", **asdict(VISION)}}
    config = {**text_config(), "model_type": "llava", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
    if naming != "original":
        config = {"model_type": "llava", "vision_feature_layer": -2, **nested}
    folder = write_folder(tmp_path / "llava", llava_tensors(model, naming), config)
    shutil.copyfile(model.tokenizer.path, folder / "tokenizer.model")
    again = LocVLM.from_pretrained(folder).eval()
    assert same(model, again)
    assert again.config.geometry == ("pad" if naming == "original" else "crop")
    assert torch.equal(Llama.from_pretrained(folder).lm_head.weight, model.language_model.lm_head.weight)


@pytest.mark.parametrize("added", [0, 3, 4])
def test_a_llava_of_the_first_kind_takes_its_tower_from_another_folder(tokenizer, tmp_path, added):
    """Linear projector, no tower inside, and words added to the vocabulary that its config does not tell."""
    torch.manual_seed(1)
    text = replace(TEXT, vocab_size=TEXT.vocab_size + added)
    model = LocVLM(LocVLMConfig(VISION, text)).eval()
    model.tokenizer = tokenizer
    tensors = named(model.language_model, LLAMA_PREFIX)
    tensors |= {"model.mm_projector." + k.split(".")[1]: v.detach() for k, v in model.adapter.state_dict().items()}
    config = {**text_config(), "model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14"}
    folder = write_folder(tmp_path / "llava", tensors, config, "sharded bin")
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    clip = write_folder(tmp_path / "clip", named(model.vision_tower, CLIP_PREFIX), asdict(VISION))
    with pytest.raises(ValueError, match="openai/clip-vit-large-patch14"):
        LocVLM.from_pretrained(folder)
    again = LocVLM.from_pretrained(folder, vision=clip).eval()
    assert same(model, again) and again.config.text_config.vocab_size == text.vocab_size
    again.save_pretrained(tmp_path / "run")
    assert same(model, LocVLM.from_pretrained(tmp_path / "run"))


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_a_stage_1_projector_loads_alone(model, tokenizer, tmp_path, kind):
    """LLaVA's mm_projector.bin, both kinds, onto a tower and a LLaMA of their own folders."""
    adapter = LocVLM(LocVLMConfig(VISION, TEXT, kind)).adapter
    theirs = {"linear_1": "0.", "linear_2": "2."} if kind == "mlp2x_gelu" else {"linear_1": ""}
    state = {
        f"model.mm_projector.{theirs[k.split('.')[0]]}{k.split('.')[1]}": v for k, v in adapter.state_dict().items()
    }
    torch.save(state, tmp_path / "mm_projector.bin")
    clip = write_folder(tmp_path / "clip", named(model.vision_tower, CLIP_PREFIX), asdict(VISION))
    llama = write_folder(tmp_path / "llama", named(model.language_model, LLAMA_PREFIX), text_config())
    shutil.copyfile(tokenizer.path, llama / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"mm_vision_select_layer": -1}')
    with pytest.raises(ValueError, match="unsupported mm_vision_select_layer = -1"):
        LocVLM.from_parts(clip, llama, tmp_path / "mm_projector.bin")
    (tmp_path / "config.json").unlink()
    again = LocVLM.from_parts(clip, llama, tmp_path / "mm_projector.bin")
    assert again.config.adapter == kind
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.adapter.parameters(), strict=True))
    again.save_pretrained(tmp_path / "run")  # a run holds a linear adapter with an identity behind it
    of_run = LocVLM.from_parts(clip, llama, tmp_path / "run")
    assert of_run.config.adapter == kind
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), of_run.adapter.parameters(), strict=True))


def test_shards_and_their_index_are_written_and_replaced(tmp_path):
    """Above the limit a checkpoint becomes shards with an index; written again in one file, that one counts."""
    tensors = {f"layers.{i}.weight": torch.full((10, 10), float(i)) for i in range(5)}
    write_tensors(tmp_path / "model.safetensors", tensors, shard_bytes=900)
    assert (
        len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3 and not (tmp_path / "model.safetensors").exists()
    )
    assert all(torch.equal(stored.read(), tensors[name]) for name, stored in open_tensors(tmp_path).items())
    write_tensors(tmp_path / "model.safetensors", {"layers.0.weight": torch.ones(3)})
    assert [stored.shape for stored in open_tensors(tmp_path).values()] == [(3,)]


def test_shards_old_and_new_are_never_read_as_one_model(tmp_path, monkeypatch):
    """Killed after its second shard, a save over another leaves what is refused by name, not a mixture."""
    tensors = {f"layers.{i}.weight": torch.full((10, 10), float(i)) for i in range(5)}
    path, written, save_file = tmp_path / "model.safetensors", [], weights.save_file

    def killed(shard, *args, **how):
        written.append(shard)
        if len(written) == 3:
            raise KeyboardInterrupt
        save_file(shard, *args, **how)

    write_tensors(path, tensors, shard_bytes=900)
    monkeypatch.setattr(weights, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {name: tensor + 1 for name, tensor in tensors.items()}, shard_bytes=900)
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00003.safetensors, but no \*.index.json"):
        open_tensors(tmp_path)


def test_loading_draws_no_first_weights():
    """Drawing on the meta device imports torch._dynamo: a second of each start of evaluate.py."""
    code = "import sys; from model import LocVLM; LocVLM.from_parts('tiny/clip', 'tiny/llama'); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_loading_holds_one_piece_beside_the_model(monkeypatch):
    """While a module is filled, what was read is let go before more is read, in pieces that cover every row once."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 4 * 32 * 10)
    alive, most = [], 0
    shapes = {k: tuple(v.shape) for k, v in Llama(TEXT).state_dict().items()}

    def read_rows(shape, start, stop):
        nonlocal most
        tensor = torch.ones(shape, dtype=torch.float16)[start:stop].clone()
        assert tensor.numel() <= max(32 * 10, *shape)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    stored = {k: Stored(shape, partial(read_rows, shape), None) for k, shape in shapes.items()}
    llama = build(lambda: Llama(TEXT), stored, "counted")
    assert most <= 2 and len(alive) > 2 * len(shapes)  # the last piece, and the one being read
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" and (p == 1).all() for p in llama.parameters())
    with torch.device("meta"):
        big = LocVLM(LocVLMConfig(CLIPVisionConfig(), LlamaConfig()))
    counts = [p.numel() for p in big.parameters()]
    assert sum(counts) > 7e9 and (sum(counts) + 2 * max(counts)) / sum(counts) < 1.1


def test_rotations_scaled_as_transformers_scales_them():
    """Frequencies of head size 16 from transformers' ROPE_INIT_FUNCTIONS, for both kinds of scaling and all three spellings."""
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    base = {"hidden_size": 64, "num_attention_heads": 4}
    for config, wanted in (
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, LINEAR),
        ({"rope_scaling": {"rope_type": "llama3", **llama3}}, LLAMA3),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **llama3}}, LLAMA3),
    ):
        frequencies = rotary_frequencies(LlamaConfig.from_dict({**base, **config}), "cpu")
        assert torch.allclose(frequencies, torch.tensor(wanted), rtol=1e-6)


LINEAR = [0.25, 0.079056941, 0.025, 0.0079056947, 0.0025, 0.00079056947, 0.00025, 7.9056947e-05]
LLAMA3 = [1.0, 0.24438459, 0.013042256, 0.0039528473, 0.00125, 0.00039528473, 0.000125, 3.9528473e-05]


# ----- damage


class Harm:
    """A pickle that would run code."""

    def __reduce__(self):
        return (open, ("/tmp/locvlm_was_here", "w"))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def to_bin(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


DAMAGE = {
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        r"another shape: norm.weight \(31,\), expected \(32,\)",
    ),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "1 tensors missing: norm.weight"),
    "six unexpected": (
        lambda f: rewrite(f, lambda t: t.update({f"model.layers.{i}.x": torch.ones(1) for i in range(6)})),
        "6 tensors unexpected: .* and 1 more",
    ),
    "another model": (
        lambda f: rewrite(f, lambda t: t.update({"transformer.h.0.weight": torch.ones(1)})),
        "transformer.h.0.weight are no tensors of a CLIP",
    ),
    "config of another size": (lambda f: edit_config(f, intermediate_size=96), "does config.json belong to these weights"),
    "config with fewer layers": (lambda f: edit_config(f, num_hidden_layers=1), "unexpected: layers.1"),
    "NaN": (
        lambda f: rewrite(f, lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "model.safetensors: norm.weight holds NaN",
    ),
    "truncated safetensors": (lambda f: cut(f / "model.safetensors"), "model.safetensors cannot be read"),
    "pointer": (lambda f: pointer(f / "model.safetensors"), "Git LFS pointer.*git lfs pull"),
    "pointer for a config": (lambda f: pointer(f / "config.json"), "config.json is a Git LFS pointer"),
    "pickle that runs code": (lambda f: to_bin(f, pickle.dumps({"a": Harm()}, protocol=2)), "a pickle that wants"),
    "truncated bin": (lambda f: to_bin(f, b"PK\3\4" + bytes(100)), "pytorch_model.bin is damaged; download it again"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights in"),
    "int8": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        "norm.weight is torch.int8, a quantised or packed tensor",
    ),
    "fp8": (
        lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})),
        "lm_head.weight is torch.float8_e4m3fn, a quantised",
    ),
    "LoRA": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "adapter_config.json").write_text("{}")),
        "adapter_config.json, a LoRA; merge it",
    ),
    "GGUF": (lambda f: (f / "model.safetensors").rename(f / "llama.Q4_K_M.gguf"), "Q4_K_M.gguf, GGUF, quantised"),
    "GPTQ": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "unsupported quantization_config.*gptq"),
    "text for a number": (lambda f: edit_config(f, hidden_size="32"), "hidden_size '32', which is not a number; correct"),
    "scaling without factor": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "linear"}), "rope_scaling .* lacks the number factor; correct",
    ),
    "shards without index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors, but no .*index.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name(model, tmp_path, damage):
    """One line that names the file or the tensor, and what to do."""
    harm, hint = DAMAGE[damage]
    folder = write_folder(tmp_path / "llama", named(model.language_model, LLAMA_PREFIX), text_config())
    harm(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=hint) as raised:
        Llama.from_pretrained(folder)
    assert "\n" not in str(raised.value) and "; " in str(raised.value)


def test_a_name_is_there_once_and_its_numbers_fit(tmp_path):
    """Of two namings of one tensor, none is preferred in silence. float16 ends at 65504."""
    save_file({"model.norm.weight": torch.zeros(2), "language_model.model.norm.weight": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="two.safetensors holds norm.weight twice, once as "):
        sort_tensors(open_tensors(tmp_path / "two.safetensors"), "two.safetensors")
    save_file({"weight": torch.full((2, 2), 1e5)}, tmp_path / "large.safetensors")
    make, stored = partial(torch.nn.Linear, 2, 2, bias=False), open_tensors(tmp_path / "large.safetensors")
    assert build(make, stored, "large").weight.max() == 1e5
    with pytest.raises(ValueError, match="weight holds NaN, infinity or more than torch.float16 holds"):
        build(make, stored, "large", torch.float16)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_learned_scalar_is_read_as_any_tensor(tmp_path, file):
    """As an adapter of your own may have: no rows to read piece by piece."""
    class Scaled(torch.nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.scale = torch.nn.Parameter(torch.tensor(0.5))

    saved = Scaled().state_dict()
    torch.save(saved, tmp_path / file) if file.endswith("bin") else save_file(saved, tmp_path / file)
    loaded = build(Scaled, open_tensors(tmp_path), tmp_path).state_dict()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved) and loaded["scale"].shape == ()


def test_a_file_of_more_than_a_state_dict_is_refused(tmp_path):
    torch.save({"model": {"weight": torch.ones(2)}, "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="dict of model, step, no tensors by name; save the state_dict alone"):
        open_tensors(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds a dict, no tensors by name"):
        open_tensors(tmp_path)


def test_a_pickle_does_not_run(tmp_path):
    """What a malicious file asks for is not done."""
    target = tmp_path / "was_here"

    class Touch:
        def __reduce__(self):
            return (open, (str(target), "w"))

    for name, write in (
        ("old.bin", lambda p: p.write_bytes(pickle.dumps(Touch(), 2))),
        ("new.bin", lambda p: torch.save({"a": Touch()}, p)),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match="a pickle that wants"):
            open_tensors(tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize("how", ["sharded safetensors", "sharded bin"])
def test_a_missing_shard_is_named(model, tmp_path, how):
    folder = write_folder(tmp_path / "llama", named(model.language_model, LLAMA_PREFIX), text_config(), how)
    shard = next(folder.glob("*-00002-of-00002.*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        Llama.from_pretrained(folder)


def test_a_missing_shard_of_metas_is_named(model, tmp_path):
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6}
    (tmp_path / "params.json").write_text(json.dumps(params))
    torch.save(meta_state(model.language_model, 2)[0], tmp_path / "consolidated.00.pth")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards, consolidated.00.pth to .01.pth; complete the download"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_feature_layer": -1},
        {"vision_feature_select_strategy": "full"},
        {"mm_projector_type": "resampler"},
        {"projector_hidden_act": "relu"},
    ],
)
def test_features_that_are_read_elsewhere_are_refused(model, tmp_path, changes):
    model.save_pretrained(tmp_path / "run")
    edit_config(tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=next(iter(changes))):
        LocVLM.from_pretrained(tmp_path / "run")


def test_images_cut_into_tiles_are_refused(model, tmp_path):
    """LLaVA-1.6's anyres shows the model more than one square."""
    config = {**text_config(), "model_type": "llava", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "anyres"}
    folder = write_folder(tmp_path / "llava", llava_tensors(model, "original"), config)
    shutil.copyfile(model.tokenizer.path, folder / "tokenizer.model")
    with pytest.raises(ValueError, match="anyres"):
        LocVLM.from_pretrained(folder)


def test_a_head_that_the_file_holds_is_used_whatever_the_config_says(model, tmp_path):
    """tie_word_embeddings beside another head: the file's. Beside an equal one: tied."""
    llama = model.language_model
    folder = write_folder(tmp_path / "llama", named(llama, LLAMA_PREFIX), text_config() | {"tie_word_embeddings": True})
    read, ids = Llama.from_pretrained(folder), torch.arange(3, 12)[None]
    assert not read.config.tie_word_embeddings and torch.equal(read(ids), llama(ids))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    tied = Llama.from_pretrained(folder)
    assert tied.config.tie_word_embeddings and tied.lm_head.weight is tied.embed_tokens.weight


def test_a_single_file_goes_before_an_index_that_was_left_over(model, tmp_path):
    folder = write_folder(tmp_path / "llama", named(model.language_model, LLAMA_PREFIX), text_config(), "sharded")
    (index,) = folder.glob("*.index.json")
    for shard in folder.glob("*-of-*"):
        save_file({name: torch.zeros_like(t) for name, t in load_file(shard).items()}, shard)
    save_file(named(model.language_model, LLAMA_PREFIX), folder / "model.safetensors")
    assert index.exists() and torch.equal(Llama.from_pretrained(folder).norm.weight, model.language_model.norm.weight)


def test_weights_that_are_a_difference_are_refused(tmp_path):
    (tmp_path / "vicuna-7b-delta-v1.1").mkdir()
    with pytest.raises(ValueError, match="difference to LLaMA's weights"):
        open_tensors(tmp_path / "vicuna-7b-delta-v1.1")


def test_a_tokenizer_with_more_pieces_than_the_embedding_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "run")
    write_folder(tmp_path / "llama", named(Llama(replace(TEXT, vocab_size=300)), LLAMA_PREFIX), text_config(replace(TEXT, vocab_size=300)))
    shutil.copy(model.tokenizer.path, tmp_path / "llama")
    with pytest.raises(ValueError, match="has 400 pieces, more than the 300 rows of the embedding"):
        LocVLM.from_parts(tmp_path / "run", tmp_path / "llama")


@pytest.mark.parametrize(
    "name, content, words",
    [("tokenizer.model", "AA== 0\nAQ== 1\n", "LLaMA-3's tiktoken file"), ("tokenizer.txt", "{}", "no file .*tokenizer.model.*or its tokenizer.json")],
)  # fmt: skip
def test_another_kind_of_tokenizer_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "processor, geometry",
    [({"do_pad": True, "size": {"shortest_edge": 28}}, "pad"), ({"do_center_crop": False, "size": {"height": 28, "width": 28}}, "squash"),
     ({"do_center_crop": True, "size": {"shortest_edge": 28}}, "crop"), (None, "crop"),
     ({"do_center_crop": True, "size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}}, "squash")],
)  # fmt: skip
@pytest.mark.parametrize("version", (4, 5))
def test_the_geometry_is_read_where_transformers_4_and_5_write_it(tmp_path, capsys, processor, geometry, version):
    names = {4: "preprocessor_config.json", 5: "processor_config.json"}
    if processor:
        (tmp_path / names[version]).write_text(json.dumps(processor if version == 4 else {"image_processor": processor}))
    (tmp_path / ("processor_config.json" if version == 4 else "other.json")).write_text('{"patch_size": 14}')
    assert geometry_of(tmp_path, {"vision_config": {}}) == geometry
    for key, value in (("do_normalize", False), ("do_rescale", False), ("resample", 2)):
        with pytest.raises(ValueError, match=f"unsupported {key} = {value} in preprocessor_config.json"):
            CLIPVisionConfig.from_dict({}, {**(processor or {}), "size": 224, "crop_size": 224, key: value})
    assert ("images are cropped to a square" in capsys.readouterr().out) == (processor is None)
