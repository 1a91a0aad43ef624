"""Fixtures that the tests share: real material, a tokenizer trained on the spot, a small random model, no HTML pages."""

import json
import os
import random
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

from clip_vit import CLIPVisionConfig
from data import LOC_PROMPTS, REV_PROMPTS, SYSTEM
from formats.tokenizer_json import JSONTokenizer
from llama import LlamaConfig, Tokenizer
from model import LocVLM, LocVLMConfig
from tiny import shapes
from tiny.moving import draw_clip

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and so would its programs
REAL = Path(os.environ.get("LOCVLM_REAL", ROOT / "../shared/real"))

VISION = CLIPVisionConfig(  # 2 x 2 patches
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28
)
TEXT = LlamaConfig(
    vocab_size=400, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512,
)  # fmt: skip


def free_port():
    """Return a port that nobody listens on, for processes of a test to meet."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def mask_of(clip, index):
    """Paint the segments of a frame as COCO's panoptic PNGs encode them: id = R + 256 G + 65536 B, 0 for no segment."""
    (width, height), scale = clip.scene.size, shapes.SCALE
    # ids are the same in all frames, grow with the number of the shape, and fill all three bytes of a pixel
    ids = [70_000 * number + shapes.CATEGORY_IDS[shape.name] for number, shape in enumerate(clip.scene.shapes, start=1)]
    image = clip.scene.paint("L", 0, clip.parts(index, range(1, len(ids) + 1)))
    ids = np.array([0, *ids])[np.asarray(image).reshape(height, scale, width, scale).max((1, 3))]  # (H, W): touched at all
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))


def write_panoptic(folder, indices, seed=0):
    """Write training clips of tiny.moving as a segmenter would: CLIP.json, and a folder CLIP of one mask per frame beside it."""
    categories = [{"id": i, "name": name, "isthing": 1} for name, i in shapes.CATEGORY_IDS.items()]
    for number in indices:
        clip, into, annotations = draw_clip(random.Random(f"{seed} clip train {number}")), folder / f"{number + 1:012d}", []
        into.mkdir(parents=True)
        for index in range(len(clip.tracks[0])):
            mask, segments = mask_of(clip, index), []
            mask.save(into / f"{index:02d}.png")
            _, *counts = zip(*np.unique(np.asarray(mask) @ [1, 256, 65536], return_counts=True), strict=True)  # 0: no segment
            for (_, shape, (x1, y1, x2, y2)), (i, area) in zip(clip.boxes(index), counts, strict=True):
                row = {"id": int(i), "category_id": shapes.CATEGORY_IDS[shape.name], "area": int(area), "iscrowd": 0}
                segments.append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
            annotations.append({"file_name": f"{index:02d}.png", "segments_info": segments})
        into.with_suffix(".json").write_text(json.dumps({"annotations": annotations, "categories": categories}))


@pytest.fixture
def real():
    """Return real("llama/stories260K"): the path of real material, or skip the test if it is missing."""

    def find(name):
        if not (REAL / name).exists():
            pytest.skip(f"no {REAL / name}: set LOCVLM_REAL to the folder of real material")
        return REAL / name

    return find


@pytest.fixture(scope="session")
def chromium():
    """Return the path of a Chromium, or skip the test."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    return path or pytest.skip(f"none of {', '.join(names)} on the path: apt-get install chromium-headless-shell")


def train_tokenizer(folder, extra=""):
    """Train a sentencepiece model of 400 pieces with LLaMA's settings: single digits, bytes for unknown characters."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = "It is located at (0, 1, 2, 3)", "There is a red circle. 4 5 6 7 8 9"
    lines = [SYSTEM, *LOC_PROMPTS, *REV_PROMPTS, *answers, extra] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=400,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    return Tokenizer(folder)


def write_json_tokenizer(folder, kind):
    """Train a byte-level BPE of 380 pieces. kind: "smollm2" (single digits, an unused bos) or "llama3" (a pattern, bos)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    bos, eos = {"smollm2": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>")}[kind]
    model = Tokenizer(models.BPE())
    first = pre_tokenizers.Digits(individual_digits=True)
    if kind == "llama3":
        words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        first = pre_tokenizers.Split(Regex(words + rest), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm2")
    model.pre_tokenizer, model.decoder = pre_tokenizers.Sequence([first, level]), decoders.ByteLevel()
    lines = [SYSTEM, *LOC_PROMPTS, *REV_PROMPTS, "It is located at (0, 1, 2, 3)"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"initial_alphabet": alphabet, "show_progress": False}
    model.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=380, special_tokens=[bos, eos], **how))
    if kind == "llama3":
        template = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B", "special_tokens": [(bos, model.token_to_id(bos))]}
        model.post_processor = processors.TemplateProcessing(**template)
    model.save(str(folder / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": eos}
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return JSONTokenizer(folder)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_model(tokenizer):
    """Return make_model(adapter="linear", tokenizer=..., ...): a LocVLM with random weights, the same ones every time."""

    def make(**options):
        torch.manual_seed(0)
        pieces, parts = options.pop("tokenizer", tokenizer), {"vision_config": VISION, "text_config": TEXT}
        model = LocVLM(LocVLMConfig(**{**parts, **options})).eval()
        model.tokenizer = pieces
        return model

    return make


@pytest.fixture
def page():
    """Let evaluate.py write its HTML page in this test."""


@pytest.fixture(autouse=True)
def no_page(request, monkeypatch):
    """Skip the HTML page of an evaluation, which a process of its own writes, unless a test uses the fixture `page`."""
    if "page" not in request.fixturenames:
        monkeypatch.setattr("evaluate.write_page", lambda run: None)


@pytest.fixture
def coco(tmp_path):
    """A COCO folder of two images: a crowd, two dogs, a box without area, one over the edge, categories with gaps."""
    for number, size in ((1, (100, 80)), (2, (64, 64))):
        Image.new("RGB", size, "grey").save(tmp_path / f"{number}.png")
    instances = {
        "images": [
            {"id": 7, "file_name": "1.png", "width": 100, "height": 80},
            {"id": 9, "file_name": "2.png", "width": 64, "height": 64},
        ],
        "categories": [
            {"id": 1, "name": "person"},
            {"id": 17, "name": "cat"},
            {"id": 18, "name": "dog"},
            {"id": 90, "name": "toothbrush"},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 17, "bbox": [10.5, 20, 30, 40], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 18, "bbox": [0, 0, 10, 10], "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 18, "bbox": [50, 50, 10, 10], "iscrowd": 0},
            {"id": 4, "image_id": 7, "category_id": 1, "bbox": [5, 5, 50, 50], "iscrowd": 1},
            {"id": 5, "image_id": 9, "category_id": 90, "bbox": [5, 5, 0, 10], "iscrowd": 0},
            {"id": 6, "image_id": 9, "category_id": 1, "bbox": [60, 5, 30, 10], "iscrowd": 0},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    return tmp_path


LLAVA = [
    {
        "id": "a",
        "image": "1.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}],
    },
    {
        "id": "b",
        "conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}],
        "model": "x",
    },
]


LOCALIZE = [
    {
        "id": "7-loc",
        "image": "1.png",
        "size": [100, 80],
        "objective": "loc",
        "names": ["cat"],
        "descriptions": ["cat that is grey"],
        "box_px": [[10.5, 20, 40.5, 60]],
        "conversations": LLAVA[0]["conversations"],
    },
    {
        "id": "7-neg",
        "image": "1.png",
        "size": [100, 80],
        "objective": "neg",
        "names": ["kite"],
        "descriptions": [None],
        "box_px": [None],
        "conversations": LLAVA[0]["conversations"],
    },
]
