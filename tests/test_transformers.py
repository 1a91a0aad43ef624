"""What we save opens in `transformers`, which is no dependency: these run where it is installed."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXT, VISION, write_json_tokenizer
from PIL import Image

from clip_vit import CLIPVisionTower, open_image, preprocess
from data import IMAGE_ID, SYSTEM, encode_prefix, encode_question, find_places
from formats.llava_hf import json_files
from formats.tokenizer_json import JSONTokenizer
from llama import Llama, LlamaConfig, Tokenizer, read_tokenizer
from model import LocVLM, LocVLMConfig, place_image

transformers = pytest.importorskip("transformers", reason="pip install transformers")

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LATER_CLIP = replace(VISION, hidden_act="gelu", image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.6, 0.7))  # than OpenAI's
QUESTION = "Where is the object described red circle located in image in terms of (x1,y1,x2,y2) bbox?"


@pytest.fixture
def image_file(tmp_path):
    """A picture of odd size, no noise: resizing must agree where there is something to see."""
    y, x = np.mgrid[0:45, 0:75]
    pixels = np.stack([x * 3, y * 5, (x // 9 + y // 7) % 2 * 255], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": "linear", "geometry": "squash"},
        {"adapter": "mlp2x_gelu", "geometry": "crop"},
        {"adapter": "linear", "geometry": "pad", "text_config": replace(TEXT, tie_word_embeddings=True)},
        {"text_config": replace(TEXT, rope_scaling=LLAMA3), "tokenizer": "llama3"},  # it has rows to spare
        {"text_config": replace(TEXT, model_type="qwen2", vocab_size=380), "tokenizer": "smollm2", "vision_config": LATER_CLIP},
        {"text_config": replace(TEXT, attention_bias=True)},
    ],
    ids=["linear", "mlp", "tied", "llama3", "qwen2", "bias"],
)
def test_a_run_opens_as_llava_hf(make_model, image_file, tmp_path, options):
    """Same image file and prompt: the same ids, pixels, logits and greedy answer; nothing missing, nothing left over."""
    if kind := options.get("tokenizer"):
        options = options | {"tokenizer": write_json_tokenizer(tmp_path / kind, kind)}
    model = make_model(**options)
    model.save_pretrained(tmp_path / "run", stage=2)
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "run", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "run")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    written_out = [
        {"role": "user", "content": f"<image>\n{QUESTION}"}
    ]  # as some harnesses do, through the tokenizer alone
    alone = processor.tokenizer.apply_chat_template(written_out, add_generation_prompt=True, tokenize=False)
    assert alone == prompt
    inputs = processor(images=Image.open(image_file), text=prompt, return_tensors="pt")

    tokenizer, config = model.tokenizer, model.config
    ids = encode_prefix(tokenizer, "v1", config.vision_config.num_patches) + encode_question(tokenizer, QUESTION)
    assert inputs["input_ids"][0].tolist() == [len(tokenizer) if i == IMAGE_ID else i for i in ids]
    pixel_values = preprocess(open_image(image_file), config.vision_config, config.geometry)[None]
    assert (pixel_values - inputs["pixel_values"]).abs().max() < 1 / 255
    with torch.no_grad():
        input_ids = torch.tensor([ids])
        x = model.language_model.embed_tokens(input_ids.clamp(min=0))
        x = place_image(x, model.adapter(model.vision_tower(pixel_values)), find_places(input_ids))
        ours = model.language_model.lm_head(model.language_model.hidden(x))[0]
        wanted = theirs(**inputs).logits[0]
    vocab_size = config.text_config.vocab_size
    assert (ours - wanted[:, :vocab_size]).abs().max() < 1e-4
    assert (wanted[:, vocab_size:] < ours.max(-1, keepdim=True)[0]).all()  # the added rows never win
    said = theirs.generate(**inputs, max_new_tokens=12)[0, len(ids) :]
    again = LocVLM.from_pretrained(tmp_path / "run")
    assert again.config == config
    [[answer]] = again.generate([image_file], [[QUESTION]], max_new_tokens=12)
    said = [i for i in said.tolist() if i != tokenizer.eos_token_id]
    assert tokenizer.decode(said).strip() == answer


def test_the_tokenizer_we_write_is_sentencepiece(real, tmp_path):
    """LLaMA's 32,000 pieces as tokenizer.json: the same ids, images at the front, in the middle and twice."""
    from tokenizers import Tokenizer as HFTokenizer

    tokenizer = Tokenizer(real("llama/tokenizer-llama"))
    image = len(tokenizer)
    files = json_files(LocVLMConfig(), tokenizer, image, image + 64)
    theirs = HFTokenizer.from_str(json.dumps(files["tokenizer.json"]))
    for prompt in (
        f"{SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:",
        "<image>\nWhat is at (4, 52, 13, 63)?",
        "before <image> between <image>\nafter",
        "  two  spaces, été, 東京, 🙂, a\ttab and\n\nlines  ",
        "It is located at (0.0195, 0.2344, 0.0586, 0.2832)",
    ):
        chunks = [tokenizer.encode(chunk) for chunk in prompt.split("<image>")]
        ours = [1] + chunks[0] + [i for chunk in chunks[1:] for i in [image, *chunk]]
        assert theirs.encode(prompt).ids == ours, prompt


def strings(count, seed=0):
    """Draw texts of words, numbers, blanks, other scripts and emojis, 3,000 of which hold about everything twice."""
    rng = random.Random(seed)
    parts = ["It is located at", "(4, 52, 13, 63)", "0.0195", "1234567", " ", "  ", "\n", "\n\n", "\t", "été", "東京", "🙂👍🏽",
             "don't", "I'LL", "x=1;", "\u00a0", "e\u0301", "ﬁ", "ASSISTANT:", "USER:", "<b>", "▁", "a", "Ünï", "\r\n", "...",
             "!?", "/home/x_y", "κόσμε", "مرحبا"]  # fmt: skip
    return ["".join(rng.choice(("", " ")) + rng.choice(parts) for _ in range(rng.randint(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece as json", "smollm2", "llama3"])
def test_a_tokenizer_agrees_on_thousands_of_strings(tokenizer, tmp_path, kind):
    """The ids of `transformers` with bos where it adds one, and the text that it makes of ids."""
    if kind == "sentencepiece":
        (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
        theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    elif kind == "sentencepiece as json":  # as TinyLlama's pair: what we export, alone
        files = json_files(LocVLMConfig(), tokenizer, len(tokenizer), len(tokenizer) + 64)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_text(json.dumps(files[name]))
    else:
        write_json_tokenizer(tmp_path, kind)
    if kind != "sentencepiece":
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path)
    assert isinstance(ours, Tokenizer if kind == "sentencepiece" else JSONTokenizer)
    bos, texts = [] if ours.bos_token_id is None else [ours.bos_token_id], strings(3000)
    if kind == "sentencepiece":  # transformers 5 drops one of the blanks at the start; the hub's tokenizer.json does not
        texts = [text for text in texts if not text.startswith((" ", "▁"))]
    wanted = theirs(texts, add_special_tokens=kind != "sentencepiece")["input_ids"]
    for text, ids in zip(texts, wanted, strict=True):
        assert bos * (kind != "sentencepiece") + ours.encode(text) == ids, repr(text)
    assert [ours.decode(ids) for ids in wanted[:300]] == theirs.batch_decode(wanted[:300], skip_special_tokens=True)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eos_token_id, 0 if kind == "smollm2" else bos[0])


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_biases_load(tmp_path, kind):
    """Qwen2 has biases in q, k and v; a LLaMA may have them in o too, by its config. The same logits, read twice."""
    config = transformers.Qwen2Config if kind == "qwen2" else transformers.LlamaConfig
    shape = {k: v for k, v in vars(TEXT).items() if k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "max_position_embeddings")}  # fmt: skip
    shape |= {"attention_bias": True} if kind == "llama" else {"sliding_window": 32, "use_sliding_window": False}
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config(**shape))
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            tensor.normal_(std=0.2 if "bias" in name else 0.1)
    theirs.save_pretrained(tmp_path)
    ours, input_ids = Llama.from_pretrained(tmp_path), torch.randint(0, TEXT.vocab_size, (2, 40))
    names = {name.split(".")[-2] for name in ours.state_dict() if name.endswith("bias")}
    assert names == ({"q_proj", "k_proj", "v_proj"} | ({"o_proj"} if kind == "llama" else set()))
    with torch.no_grad():
        assert (ours(input_ids) - theirs(input_ids).logits).abs().max() < 1e-5
    assert LlamaConfig.from_dict(json.loads((tmp_path / "config.json").read_text())).model_type == kind


@pytest.mark.parametrize("whole", [False, True], ids=["tower", "CLIP"])
def test_a_later_clip_loads(tmp_path, image_file, whole):
    """The exact gelu of LAION's and MetaCLIP's, and their image processor's own mean: the same pixels and patches."""
    shape = {key: value for key, value in vars(LATER_CLIP).items() if not key.startswith("image_") or key == "image_size"}
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    config = transformers.CLIPConfig(vision_config=shape, text_config=text) if whole else transformers.CLIPVisionConfig(**shape)
    theirs = (transformers.CLIPModel if whole else transformers.CLIPVisionModel)(config).eval()
    theirs.save_pretrained(tmp_path)
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)  # in 5, without torchvision
    statistics = {"image_mean": LATER_CLIP.image_mean, "image_std": LATER_CLIP.image_std}
    processor = processor(**statistics, size={"shortest_edge": 28}, crop_size=28)
    processor.save_pretrained(tmp_path)
    ours = CLIPVisionTower.from_pretrained(tmp_path)
    assert ours.config == LATER_CLIP
    pixel_values = preprocess(open_image(image_file), ours.config, "crop")[None]
    assert (pixel_values - processor(Image.open(image_file), return_tensors="pt")["pixel_values"]).abs().max() < 2 / 255
    with torch.no_grad():
        tower = theirs.vision_model if whole else theirs
        wanted = tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert (ours(pixel_values) - wanted).abs().max() < 1e-5
