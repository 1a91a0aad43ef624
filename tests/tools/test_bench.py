"""`python -m tools.bench`: both sides run, and their losses and answers agree, on a model of a few weights. No time is judged."""

import sys

import pytest

from clip_vit import CLIPVisionConfig
from llama import LlamaConfig
from model import LocVLMConfig
from tools import bench

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LLAMA = LlamaConfig(1000, 32, 64, 2, 2, max_position_embeddings=2048)
MODEL = LocVLMConfig(CLIPVisionConfig(32, 64, 2, 2, image_size=56), LLAMA, bench.ADAPTER)


@pytest.mark.parametrize(("name", "options"), [
    ("training", {"allocator": "default", "images": 2, "questions": 2, "steps": 1}),
    ("generation", {"tokens": 4}),
    ("evaluation", {"images": 2, "questions": 2, "tokens": 4}),
])  # fmt: skip
def test_both_sides_agree(name, options, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    for config in ("TRAINED", "GENERATING", "EVALUATED"):
        monkeypatch.setattr(bench, config, MODEL)
    bench.write_random_model(MODEL, tmp_path)
    theirs = "theirs, 3 rows at a time" if name == "evaluation" else "theirs"
    (figures, ours), (their_figures, answers) = (
        getattr(bench, f"measure_{name}")(side, tmp_path, **options) for side in ("ours", theirs)
    )
    assert ours == answers and len(ours) == {"training": 1, "generation": 1, "evaluation": 4}[name]
    assert figures.keys() == their_figures.keys() and all(value > 0 for value in figures.values())
