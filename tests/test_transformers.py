"""What we save opens in `transformers`, which is no dependency: these run where it is installed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXT
from PIL import Image

from clip_vit import open_image, preprocess
from data import IMAGE_ID, SYSTEM, encode_prefix, encode_question, placeholders
from formats.llava_hf import json_files
from llama import Tokenizer
from model import LocVLM, LocVLMConfig, place_image

transformers = pytest.importorskip("transformers", reason="pip install transformers")

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
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
        {"text_config": replace(TEXT, rope_scaling=LLAMA3)},
    ],
    ids=["linear", "mlp", "tied", "llama3"],
)
def test_a_run_opens_as_llava_hf(make_model, image_file, tmp_path, options):
    """Same image file and prompt: the same ids, pixels, logits and greedy answer; nothing missing, nothing left over."""
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
        x = place_image(x, model.adapter(model.vision_tower(pixel_values)), placeholders(input_ids))
        ours = model.language_model.lm_head(model.language_model.hidden(x))[0]
        wanted = theirs(**inputs).logits[0]
    vocab_size = config.text_config.vocab_size
    assert (ours - wanted[:, :vocab_size]).abs().max() < 1e-4
    assert (wanted[:, vocab_size:].max(-1)[0] < ours.max(-1)[0]).all()  # the added rows never win
    said = theirs.generate(**inputs, max_new_tokens=12)[0, len(ids) :]
    [[answer]] = LocVLM.from_pretrained(tmp_path / "run").generate([image_file], [[QUESTION]], max_new_tokens=12)
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
