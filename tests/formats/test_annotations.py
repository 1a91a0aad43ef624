"""From annotations to ids and labels."""

import json
import random
import zipfile
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

import data
from clip_vit import CLIPVisionConfig, image_size, open_image
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
    (tmp_path / "x.json").write_text(
        '{"images": [{"id": 1, "width": 5, "height": 5}], "annotations": [], "categories": []}'
    )
    with pytest.raises(ValueError, match="lacks images with .*file_name"):
        read_coco(tmp_path / "x.json", tmp_path)
    (tmp_path / "x.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="not JSON"):
        read_coco(tmp_path / "x.json", tmp_path)
    (tmp_path / "x.json").write_text('[{"id": 1, "image": "a.jpg", "conversations": [{"from": "gpt", "value": "hi"}]}]')
    with pytest.raises(ValueError, match="human and gpt"):
        data.read_llava(tmp_path / "x.json", tmp_path)


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


def test_half_of_the_negatives_borrow_a_description():
    """As prepare.py localize writes them; with names alone, none."""
    descriptions = {"car": ["car that is red"], "bus": ["bus that is far away"]}
    for words, share in (("description", 0.5), ("mixed", 0.5), ("name", 0.0)):
        wording, rng = Wording(CoordFormat("ivb"), objectives=("neg",), words=words), random.Random(0)
        asked = [
            q for _ in range(400) for _, q, _ in draw_questions(RECORD, wording, rng, descriptions) if "tie" not in q
        ]
        borrowed = sum("that is" in question for question in asked) / len(asked)
        assert abs(borrowed - share) < 0.05, words


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
        pack(list(range(300)), [encode_segment(tokenizer, "plain", [("", "A red circle, a cup and a dog")])], 290)
    with pytest.raises(ValueError, match="raise max_length"):
        prefix = encode_prefix(tokenizer, "v1", 4)
        pack(prefix, [encode_segment(tokenizer, "v1", [("Where is the object?", "It.")])], len(prefix) + 5)


def test_what_is_drawn_depends_on_seed_epoch_and_index_alone(coco, tokenizer):
    records, _ = read_coco(coco / "instances.json", coco)

    def examples(seed):
        return Examples(records, tokenizer, CLIPVisionConfig(image_size=28), Wording(CoordFormat("ivb", 28)), seed=seed)

    one, same = examples(0), examples(0)
    same.batch([5])  # a draw in between changes nothing
    first, ids = one.batch([0, 1, 2, 3])
    again, _ = same.batch([0, 1, 2, 3])
    assert all((first[key] == again[key]).all() for key in first)
    assert sorted(ids[:2]) == sorted(ids[2:]) == ["7", "9"], "every epoch visits every image once"


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


def examples_of(records, tokenizer, **how):
    return Examples(records, tokenizer, CLIPVisionConfig(image_size=28), Wording(CoordFormat("ivb", 28)), **how)


def test_what_several_files_say_of_an_image_becomes_one_record(coco):
    """Boxes, captions, conversations and descriptions share the image's prefix; text alone stays a record of its own."""
    captions = {"images": [{"id": 7, "file_name": "1.png", "width": 100, "height": 80}]}
    captions["annotations"] = [{"image_id": 7, "caption": "A grey cat. "}]
    for name, content in (("captions", captions), ("llava", LLAVA), ("localize", LOCALIZE)):
        (coco / f"{name}.json").write_text(json.dumps(content))
    sources = data.join_sources(f"{coco}/localize.json@{coco}*2", coco, coco / "instances.json", coco / "captions.json")
    records, _ = data.read_records([*sources, (coco / "llava.json", coco, 1.0)])
    assert [record.image and record.image.name for record in records] == ["1.png", "2.png", None]
    cat = records[0]
    assert cat.objects == (Object("cat", (10.5, 20, 40.5, 60), "cat that is grey"),)
    assert cat.captions == ("A grey cat.",) and cat.conversations == ((("What?", "A."),),)
    assert "kite" in cat.absent and "cat" not in cat.absent and cat.weight == 2
    assert records[2].conversations == ((("Say hi.", "Hi."),),)


def test_a_batch_mixes_rows_with_and_without_an_image(coco, tokenizer):
    """Text alone is tokenised as one text; its row has no place for an image, and a batch may hold none at all."""
    (coco / "llava.json").write_text(json.dumps(LLAVA))
    examples = examples_of(data.read_records([(coco / "llava.json", coco, 1.0)])[0], tokenizer)
    batch, ids = examples.batch([0, 1])
    assert sorted(ids) == ["a", "b"] and batch["pixel_values"].shape == (1, 3, 28, 28)
    rows = (batch["input_ids"] == IMAGE_ID).sum(1).tolist()
    assert sorted(rows) == [0, 4] and rows[ids.index("a")] == 4
    text = examples.row([r.id for r in examples.records].index("b"), 0)[0]["input_ids"]
    assert text == [1, *tokenizer.encode(data.SYSTEM + " USER: Say hi. ASSISTANT:"), *tokenizer.encode("Hi."), 2]
    alone, _ = examples_of(examples.records[-1:], tokenizer).batch([0])
    assert alone["pixel_values"].shape == (0, 3, 28, 28)


def test_images_are_read_out_of_a_zip(coco):
    with zipfile.ZipFile(coco / "images.zip", "w") as archive:
        archive.write(coco / "1.png", "sub/1.png")
        archive.writestr("2.png", b"no image")
    assert open_image(coco / "images.zip/sub/1.png").size == image_size(coco / "images.zip/sub/1.png") == (100, 80)
    with pytest.raises(FileNotFoundError, match="no image file .*zip/3.png"):
        image_size(coco / "images.zip/3.png")
    with pytest.raises(ValueError, match="zip/2.png cannot be read"):
        image_size(coco / "images.zip/2.png")
    with zipfile.ZipFile(coco / "packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(coco / "1.png", "1.png")
    whole = bytearray((coco / "packed.zip").read_bytes())
    whole[50:60] = b"damaged..."
    (coco / "packed.zip").write_bytes(whole)
    for look in (open_image, image_size):
        with pytest.raises(ValueError, match="packed.zip/1.png cannot be read"):
            look(coco / "packed.zip/1.png")
    (coco / "cut.zip").write_bytes((coco / "images.zip").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.zip is not a whole zip"):
        open_image(coco / "cut.zip/2.png")


def test_weights_say_how_often_an_epoch_draws_an_image(tokenizer):
    records = [replace(RECORD, id=str(i), weight=weight) for i, weight in enumerate([1, 2.5, 0.5, 1] * 5)]
    examples = examples_of(records, tokenizer)
    assert examples.epoch_length == 25
    for epoch in range(4):
        drawn = Counter(examples.order(epoch * 25 + place)[0] for place in range(25))
        for index, record in enumerate(records):
            assert abs(drawn[index] - record.weight) < 1, (epoch, index, drawn[index])
    orders = [[examples.order(epoch * 25 + place) for place in range(25)] for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] and [i for i, _ in orders[0]] != [i for i, _ in orders[1]]


def test_benchmarks_images_are_found_in_any_schema_and_excluded(coco, capsys):
    """COCO's ids agree across years, whatever the file is called."""
    (coco / "pope.json").write_text(
        '{"image": "COCO_val2014_000000000007.jpg"}\n{"image": "COCO_val2014_000000000009.jpg"}\n'
    )
    (coco / "vqa.json").write_text(json.dumps({"questions": [{"image_id": 9, "question_id": 1}]}))
    (coco / "ids.txt").write_text("000000000012.jpg\n7\n")
    assert data.image_ids(coco / "pope.json") == {7, 9} and data.image_ids(coco / "vqa.json") == {9}
    assert data.image_ids_of(f"{coco}/vqa.json,{coco}/ids.txt") == {7, 9, 12}
    (coco / "null.json").write_text('[{"image": null, "image_id": 9}, {"imageId": "2405722"}]')
    assert data.image_ids(coco / "null.json") == {9}, "GQA's ids are Visual Genome's"
    (coco / "none.json").write_text('{"image": "GCC_train_000000001.jpg"}')
    with pytest.raises(ValueError, match="names no COCO image"):
        data.image_ids(coco / "none.json")

    instances = json.loads((coco / "instances.json").read_text())
    for image in instances["images"]:
        image["file_name"] = f"{image['id']:012d}.jpg"
    (coco / "train.json").write_text(json.dumps(instances))
    records, left_out = data.read_records([(coco / "train.json", coco, 1.0)], {9})
    assert [record.id for record in records] == ["7"] and left_out["images that --exclude lists"] == 1
    data.main(["overlap", "--data", f"{coco}/train.json@{coco}", f"{coco}/pope.json", f"{coco}/vqa.json"])
    out = capsys.readouterr().out
    assert "pope.json: 2 of its 2" in out and "vqa.json: 1 of its 1" in out


@pytest.mark.parametrize(
    "damage, words",
    [
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "human and gpt in turn"),
        ({"image": 7}, "expected strings"),
        ({"image": "../1.png"}, "leaves the images folder"),
        ({"image": None}, "expected strings"),
        ({"objective": "loc", "names": ["cat"], "box_px": [[0, 0, 5, 5]], "descriptions": [None]}, "lacks its size"),
        (LOCALIZE[0] | {"box_px": [[0, 0, 5, 500]]}, "inside it"),
        ({"objective": "loc", "names": ["cat"], "box_px": [[0, float("nan"), 5, 5]], "size": [9, 9]}, "lacks its size"),
        (LOCALIZE[0] | {"box_px": [[0, float("nan"), 5, 5]]}, "inside it"),
        (LOCALIZE[0] | {"box_px": ["10.5 20 40.5 60"]}, "inside it"),
        (LOCALIZE[0] | {"size": [9]}, "lacks its size"),
        (LOCALIZE[0] | {"descriptions": None}, "of one length"),
        (LOCALIZE[0] | {"names": None}, "of one length"),
        (LOCALIZE[0] | {"names": [7]}, "expected text"),
        (LOCALIZE[0] | {"objective": ["loc"]}, "expected text"),
        (LOCALIZE[1] | {"names": None}, "lacks its size"),
        ({"objective": "caption", "size": [9, 9], "box_px": [0, 0, 5, 5], "name": "cat"}, "expected text"),
    ],
)
def test_a_bad_row_is_named_by_check_and_left_out_and_counted(coco, damage, words):
    (coco / "x.json").write_text(json.dumps([*LLAVA, {**LLAVA[0], **damage}]))
    (problem,) = check(coco / "x.json", coco)
    assert problem.startswith("row 2: ") and words in problem
    records, left_out = data.read_llava(coco / "x.json", coco)
    assert len(records) == 2 and left_out.total() == 1 and words in next(iter(left_out))


def test_an_image_of_two_hundred_megapixels_is_refused_by_its_head(tmp_path):
    """Neither look decodes it: a small file can stand for gigabytes."""
    Image.new("1", (20000, 10000)).save(tmp_path / "large.png")
    for look in (open_image, image_size):
        with pytest.raises(ValueError, match="large.png cannot be read.*decompression bomb"):
            look(tmp_path / "large.png")


def test_a_row_about_a_clip_among_images_is_named(coco):
    clip = {"id": "v", "video": "v.mp4", "conversations": LLAVA[0]["conversations"]}
    (coco / "x.json").write_text(json.dumps([LLAVA[0], clip]))
    (problem,) = check(coco / "x.json", coco)
    records, left_out = data.read_file(coco / "x.json", coco)
    assert "row 1: is about the clip v.mp4" in problem and len(records) == left_out.total() == 1


def test_captions_are_checked_and_what_is_wrong_with_them_counted(coco):
    images = [
        {"id": i, "file_name": name, "width": 100, "height": 80}
        for i, name in enumerate(("1.png", "../1.png", "3.png"))
    ]
    said = [(0, "A cat."), (0, None), (0, " "), (1, "A cat."), (2, "A dog."), (9, "Nothing.")]
    captions = {"images": images, "annotations": [{"image_id": i, "caption": text} for i, text in said]}
    (coco / "captions.json").write_text(json.dumps(captions))
    records, left_out = data.read_file(coco / "captions.json", coco)
    assert [record.captions for record in records] == [("A cat.",), ("A dog.",)]
    assert left_out == {
        "captions that are no text": 2,
        "captions of unknown images": 1,
        "images whose path leaves their folder": 1,
    }
    problems = check(coco / "captions.json", coco)
    assert len(problems) == 2 + 2 and any("leaves" in problem for problem in problems), problems


@pytest.mark.parametrize("content", ["5", "null", '"text"', "[5]", "[]", "{}", '{"annotations": [5]}'])
def test_json_of_no_schema_is_refused_by_name(coco, content):
    (coco / "x.json").write_text(content)
    with pytest.raises(ValueError, match="x.json"):
        data.read_file(coco / "x.json", coco)


def test_few_negatives_leave_no_image_without_a_question(tokenizer):
    """With half a negative for each object, an image of none still has one to ask for; with none at all, nothing."""
    bare = replace(RECORD, objects=(), conversations=())
    for ratio, least in ((0.25, 1), (1.0, 1), (0.0, 0)):
        wording = Wording(CoordFormat("ivb"), neg_ratio=ratio)
        counts = {len(draw_questions(bare, wording, random.Random(seed))) for seed in range(40)}
        assert counts == {least}, ratio
    alone = Wording(CoordFormat("ivb"), objectives=("neg",), neg_ratio=0.25)
    assert {len(draw_questions(RECORD, alone, random.Random(seed))) for seed in range(40)} == {1}


def test_a_box_within_a_pixel_of_the_corner_is_not_asked_for(tokenizer):
    """Its numbers read as fractions; it stops nothing."""
    corner = replace(RECORD, objects=(Object("cup", (0, 0, 1, 1)), Object("dog", (0, 0, 0.9, 0.9))))
    wider = replace(RECORD, objects=(Object("cup", (0, 0, 1.5, 1.5)),))
    for location, drawn in (("box", 2), ("point", 0)):
        assert (
            len(draw_questions(wider, Wording(CoordFormat("ivb"), ("loc", "rev"), location), random.Random(0))) == drawn
        )
        wording = Wording(CoordFormat("ivb"), objectives=("loc", "rev"), location=location)
        assert draw_questions(corner, wording, random.Random(0)) == []


def test_a_text_that_speaks_of_an_image_names_one(coco):
    row = {"id": "c", "conversations": LLAVA[0]["conversations"]}
    assert "names none" in data.row_problem(row)


def test_a_question_longer_than_the_context_is_told_before_training(coco, tokenizer):
    long = replace(RECORD, conversations=((("word " * 300, "Yes."),), (("Q?", "word " * 300),)))
    with pytest.raises(ValueError, match="1 conversations.*raise --max-length"):
        examples_of([long], tokenizer, max_length=200)
    alone = Record("2", None, (0, 0), conversations=long.conversations[:1])  # no image before it
    asked = tokenizer.encode("\n" + alone.conversations[0][0][0] + " ASSISTANT:")
    room = len(encode_prefix(tokenizer, "v1", 0)) + len(asked) + 2
    assert examples_of([alone], tokenizer, max_length=room).left_out == 0
    examples = examples_of([long], tokenizer, max_length=200, skip_bad=True)
    assert examples.left_out == 1 and len(examples.records[0].conversations) == 1


def test_data_without_anything_to_say_is_refused(coco, tokenizer):
    records, _ = read_coco(coco / "instances.json", coco)
    with pytest.raises(ValueError, match="nothing|none of 2"):
        Examples(records, tokenizer, CLIPVisionConfig(image_size=28), Wording(CoordFormat("ivb", 28)), template="plain")
