"""From annotations to ids and labels."""

import json
import random

import pytest
from PIL import Image

import data
from coords import CoordFormat
from data import (
    IGNORE,
    IMAGE_ID,
    Examples,
    Object,
    Record,
    Wording,
    check,
    draw_questions,
    encode_prefix,
    encode_segment,
    pack,
    read_coco,
)
from llama import Tokenizer


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


def test_only_objects_alone_of_their_category_are_asked_for(coco):
    """Sec. 3.3: two dogs are out, and a crowd counts as many."""
    records, _ = read_coco(coco / "instances.json", coco)
    assert [(o.name, o.box_px) for o in records[0].objects] == [("cat", (10.5, 20, 40.5, 60))]
    assert records[0].present == ("cat", "dog", "person") and records[0].absent == ("toothbrush",)


def test_bad_boxes_are_left_out_and_counted(coco):
    records, left_out = read_coco(coco / "instances.json", coco)
    assert records[1].objects == () and sum(left_out.values()) == 2
    assert "cat" in records[1].absent and "person" in records[1].present, (
        "what is annotated is not absent, whatever its box"
    )


def test_check_names_each_problem(coco):
    """Missing, truncated and resized images, bad boxes, unknown ids, a path that leaves the folder."""
    instances = json.loads((coco / "instances.json").read_text())
    Image.effect_noise((90, 90), 90).convert("RGB").save(coco / "3.jpg")
    (coco / "3.jpg").write_bytes((coco / "3.jpg").read_bytes()[:800])
    instances["images"] += [
        {"id": 20, "file_name": "3.jpg", "width": 90, "height": 90},
        {"id": 21, "file_name": "gone.jpg", "width": 9, "height": 9},
        {"id": 22, "file_name": "../x.jpg", "width": 9, "height": 9},
        {"id": 23, "file_name": "1.png", "width": 80, "height": 100},
    ]
    instances["annotations"] += [
        {"id": 7, "image_id": 7, "category_id": 5, "bbox": [1, 1, 2, 2]},
        {"id": 8, "image_id": 99, "category_id": 1, "bbox": [1, 1, 2, 2]},
        {"id": 9, "image_id": 7, "category_id": 1, "bbox": [1, float("nan"), 2, 2]},
    ]
    (coco / "instances.json").write_text(json.dumps(instances))
    problems = check(coco / "instances.json", coco)
    for words in (
        "annotation 5",
        "annotation 6",
        "annotation 7: no category 5",
        "annotation 8: no image 99",
        "annotation 9",
        "3.jpg cannot be read",
        "gone.jpg",
        "../x.jpg leaves",
        "image 23",
    ):
        assert any(words in problem for problem in problems), words
    assert len(problems) == 9


def test_check_finds_real_photos_clean(real):
    folder = real("coco-sample")
    assert check(folder / "annotations/instances_train2017.json", folder / "images") == []


def test_another_schema_is_refused_by_name(tmp_path):
    (tmp_path / "x.json").write_text('[{"id": 1}]')
    with pytest.raises(ValueError, match="x.json lacks"):
        read_coco(tmp_path / "x.json", tmp_path)
    (tmp_path / "x.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="not JSON"):
        read_coco(tmp_path / "x.json", tmp_path)
    (tmp_path / "x.json").write_text('[{"id": 1, "image": "a.jpg", "conversations": [{"from": "gpt", "value": "hi"}]}]')
    with pytest.raises(ValueError, match="human and gpt"):
        list(data.read_llava(tmp_path / "x.json"))


RECORD = Record(
    "1",
    "x.png",
    (448, 448),
    (Object("cup", (8, 104, 26, 126), "cup that is red"), Object("dog", (200, 200, 400, 440))),
    ("cup", "dog"),
    ("car", "tie", "bus"),
    conversations=((("What is it?", "A cup."),),),
)


def test_the_templates_are_the_papers_to_the_letter():
    assert (
        data.LOC_PROMPTS[3].format(category="cup", repr=data.REPR["box"])
        == "Provide a (x1,y1,x2,y2) bbox for the the object described cup?"
    )
    assert data.LOC_PROMPTS[0].format(category="cup", repr=data.REPR["point"]) == (
        "Where is the object described cup located in image in terms of (cx,cy) point?"
    )
    assert data.REV_PROMPTS[1].format(loc="(1, 2, 3, 4)") == "Provide a caption for object at (1, 2, 3, 4)?"
    assert (len(data.LOC_PROMPTS), len(data.REV_PROMPTS)) == (5, 3)


def test_each_objective_asks_what_the_paper_asks():
    """LocPred and RevLoc once for each object, as many NegPred; what is not wanted is not drawn."""
    pairs = draw_questions(RECORD, Wording(CoordFormat("ivb")), random.Random(0))
    assert sorted(kind for kind, _, _ in pairs) == ["loc", "loc", "neg", "neg", "rev", "rev"]
    answers = {kind: [answer for k, _, answer in pairs if k == kind] for kind in data.OBJECTIVES}
    assert "It is located at (4, 52, 13, 63)" in answers["loc"] and set(answers["neg"]) == {
        "There is no such object in the image"
    }
    assert "There is a cup." in answers["rev"]
    assert all(
        kind == "neg"
        for kind, _, _ in draw_questions(RECORD, Wording(CoordFormat("ivb"), objectives=("neg",)), random.Random(0))
    )


def test_representation_location_and_words_are_flags_of_the_run():
    def draw(**flags):
        wording = Wording(CoordFormat(flags.pop("kind", "ivb")), **flags)
        return " ".join(q + a for _, q, a in draw_questions(RECORD, wording, random.Random(1)))

    assert "(0.0179, 0.2321, 0.0580, 0.2812)" in draw(kind="nfp")
    assert "(0, 4, 3, 11, 6, 0)" in draw(kind="diga")
    assert "(8, 58)" in draw(location="point") and "(cx,cy) point" in draw(location="point")
    assert "There is a cup that is red." in draw(words="description") and "dog" in draw(words="description")


def test_what_the_crop_does_not_show_is_not_asked_for():
    record = Record(
        "1",
        "x.png",
        (400, 100),
        (Object("cup", (0, 0, 50, 50)), Object("dog", (180, 20, 220, 80))),
        ("cup", "dog"),
        ("car",),
    )
    pairs = draw_questions(record, Wording(CoordFormat("ivb", geometry="crop")), random.Random(0))
    assert not any("cup" in question + answer for _, question, answer in pairs) and any(
        "dog" in question for _, question, _ in pairs
    )


def test_what_is_built_turn_by_turn_equals_the_joined_text(tokenizer):
    """Each piece is tokenised on its own, and yet the ids are those of the whole conversation between two images' places."""
    turns = [("Where is it?", "It is located at (4, 52, 13, 63)"), ("Sure?", "Yes.")]
    ids, labels = encode_segment(tokenizer, "v1", turns)
    eos = [tokenizer.eos_token_id]
    whole = (
        tokenizer.encode("\nWhere is it? ASSISTANT: It is located at (4, 52, 13, 63)")
        + eos
        + tokenizer.encode("USER: Sure? ASSISTANT: Yes.")
        + eos
    )
    assert ids == whole
    supervised = [token for token in labels if token != IGNORE]
    assert (
        tokenizer.decode(supervised) == "It is located at (4, 52, 13, 63) Yes."
        and supervised.count(tokenizer.eos_token_id) == 2
    )


def test_llamas_own_tokenizer_joins_them_the_same(real):
    """protocols: '(4, 52, 13, 63)' is 15 pieces; 'USER: ' ends in a lone space, the question starts with one and a line end."""
    tokenizer = Tokenizer(real("llama/tokenizer-llama"))
    ids, _ = encode_segment(tokenizer, "v1", [("Where is it?", "It is located at (4, 52, 13, 63)")])
    assert ids == tokenizer.encode("\nWhere is it? ASSISTANT: It is located at (4, 52, 13, 63)") + [2]
    assert ids[:2] == [29871, 13] and encode_prefix(tokenizer, "v1", 3)[-4:] == [29871] + [IMAGE_ID] * 3
    kinds = {
        kind: len(
            encode_segment(
                tokenizer,
                "v1",
                [("", "It is located at " + CoordFormat(kind).encode_box((10, 120, 30, 145), (512, 512)))],
            )[0]
        )
        - len(tokenizer.encode("\n ASSISTANT:"))
        - 1
        for kind in ("nfp", "ivb", "diga")
    }
    assert kinds == {"nfp": 36, "ivb": 19, "diga": 23}


def test_prompt_and_image_carry_no_loss(tokenizer):
    prefix = encode_prefix(tokenizer, "v1", 4)
    row = pack(
        prefix,
        [encode_segment(tokenizer, "v1", [("Q?", "It.")]), encode_segment(tokenizer, "v1", [("R?", "There.")])],
        512,
    )
    assert row["labels"][: len(prefix)] == [IGNORE] * len(prefix)
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORE, token)
    starts = [row["segments"].index(s) for s in (1, 2)]
    assert [row["positions"][s] for s in starts] == [len(prefix)] * 2, "each segment continues from the prefix"


def test_stage_one_supervises_the_caption_alone(tokenizer):
    ids, labels = encode_segment(tokenizer, "plain", [("Describe it.", "There is a red circle")])
    assert ids == labels == tokenizer.encode("There is a red circle\n")
    assert encode_prefix(tokenizer, "plain", 2) == [tokenizer.bos_token_id, IMAGE_ID, IMAGE_ID]


def test_an_answer_without_room_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="raise max_length"):
        prefix = encode_prefix(tokenizer, "v1", 4)
        pack(prefix, [encode_segment(tokenizer, "v1", [("Where is the object?", "It.")])], len(prefix) + 5)


def test_what_is_drawn_depends_on_seed_epoch_and_index_alone(coco, tokenizer):
    records, _ = read_coco(coco / "instances.json", coco)
    from clip_vit import CLIPVisionConfig

    def examples(seed):
        return Examples(records, tokenizer, CLIPVisionConfig(image_size=28), Wording(CoordFormat("ivb", 28)), seed=seed)

    one, same = examples(0), examples(0)
    same.batch([5])  # a draw in between changes nothing
    first, ids = one.batch([0, 1, 2, 3])
    again, _ = same.batch([0, 1, 2, 3])
    assert all((first[key] == again[key]).all() for key in first)
    assert sorted(ids[:2]) == sorted(ids[2:]) == ["7", "9"], "every epoch visits every image once"


def test_data_without_anything_to_say_is_refused(coco, tokenizer):
    from clip_vit import CLIPVisionConfig

    records, _ = read_coco(coco / "instances.json", coco)
    with pytest.raises(ValueError, match="nothing|none of 2"):
        Examples(records, tokenizer, CLIPVisionConfig(image_size=28), Wording(CoordFormat("ivb", 28)), template="plain")
