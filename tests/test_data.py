"""From annotations to ids and labels."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import LLAVA

import data
from clip_vit import CLIPVisionConfig
from coords import CoordFormat
from data import (
    IGNORE,
    IMAGE_ID,
    Examples,
    Object,
    Record,
    Wording,
    collate,
    draw_questions,
    encode_prefix,
    encode_segment,
    pack,
)
from formats.annotations import read_file, read_records
from llama import Tokenizer
from model import LocVLMConfig


def test_only_objects_alone_of_their_category_are_asked_for(coco):
    """Sec. 3.3: two dogs are out, and a crowd counts as many."""
    records, _ = read_file(coco / "instances.json", coco)
    assert [(o.name, o.box_px) for o in records[0].objects] == [("cat", (10.5, 20, 40.5, 60))]
    assert records[0].present == ("cat", "dog", "person") and records[0].absent == ("toothbrush",)


def test_bad_boxes_are_skipped_and_counted(coco):
    records, skipped = read_file(coco / "instances.json", coco)
    assert records[1].objects == () and sum(skipped.values()) == 2
    assert "cat" in records[1].absent and "person" in records[1].present, (
        "what is annotated is not absent, whatever its box"
    )


def test_another_schema_is_refused_by_name(tmp_path):
    (tmp_path / "x.json").write_text('{"id": 1}')
    with pytest.raises(ValueError, match="x.json lacks"):
        read_file(tmp_path / "x.json", tmp_path)
    (tmp_path / "x.json").write_text(
        '{"images": [{"id": 1, "width": 5, "height": 5}], "annotations": [], "categories": []}'
    )
    with pytest.raises(ValueError, match="lacks images with .*file_name"):
        read_file(tmp_path / "x.json", tmp_path)
    (tmp_path / "x.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="neither JSON"):
        read_file(tmp_path / "x.json", tmp_path)
    (tmp_path / "x.json").write_text('[{"id": 1, "image": "a.jpg", "conversations": [{"from": "gpt", "value": "hi"}]}]')
    with pytest.raises(ValueError, match="human and gpt"):
        read_file(tmp_path / "x.json", tmp_path)


CONFIG = LocVLMConfig(CLIPVisionConfig(image_size=28))
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
        data.LOC_PROMPTS[3].format(category="cup", repr=data.LOCATIONS["box"])
        == "Provide a (x1,y1,x2,y2) bbox for the the object described cup?"
    )
    assert data.LOC_PROMPTS[0].format(category="cup", repr=data.LOCATIONS["point"]) == (
        "Where is the object described cup located in image in terms of (cx,cy) point?"
    )
    assert data.REV_PROMPTS[1].format(loc="(1, 2, 3, 4)") == "Provide a caption for object at (1, 2, 3, 4)?"
    assert (len(data.LOC_PROMPTS), len(data.REV_PROMPTS)) == (5, 3)


def test_each_objective_asks_what_the_paper_asks():
    """LocPred and RevLoc once for each object, as many NegPred; what is not wanted is not drawn."""
    pairs = draw_questions(RECORD, Wording(CoordFormat("ivb")), random.Random(0))
    assert sorted(kind for kind, *_ in pairs) == ["loc", "loc", "neg", "neg", "rev", "rev"]
    answers = {kind: [answer for k, _, _, answer in pairs if k == kind] for kind in data.OBJECTIVES}
    assert "It is located at (4, 52, 13, 63)" in answers["loc"] and set(answers["neg"]) == {
        "There is no such object in the image"
    }
    assert "There is a cup." in answers["rev"]
    assert all(
        kind == "neg"
        for kind, *_ in draw_questions(RECORD, Wording(CoordFormat("ivb"), objectives=("neg",)), random.Random(0))
    )


def test_representation_location_and_words_are_flags_of_the_run():
    def draw(**flags):
        wording = Wording(CoordFormat(flags.pop("kind", "ivb")), **flags)
        return " ".join(q + a for _, _, q, a in draw_questions(RECORD, wording, random.Random(1)))

    assert "(0.0179, 0.2321, 0.0580, 0.2812)" in draw(kind="nfp")
    assert "(0, 4, 3, 11, 6, 0)" in draw(kind="diga")
    assert "(8, 58)" in draw(location="point") and "(cx,cy) point" in draw(location="point")
    assert "There is a cup that is red." in draw(words="description") and "dog" in draw(words="description")


def test_half_of_the_negatives_borrow_a_description():
    """As tools.prefcoco writes them; with names alone, none."""
    descriptions = {"car": ["car that is red"], "bus": ["bus that is far away"]}
    for words, share in (("description", 0.5), ("mixed", 0.5), ("name", 0.0)):
        wording, rng = Wording(CoordFormat("ivb"), objectives=("neg",), words=words), random.Random(0)
        drawn = [q for _ in range(400) for _, _, q, _ in draw_questions(RECORD, wording, rng, descriptions)]
        asked = [q for q in drawn if "tie" not in q]
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
    assert not any("cup" in question + answer for _, _, question, answer in pairs) and any(
        "dog" in question for _, _, question, _ in pairs
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
    starts = [row["segment_of"].index(s) for s in (1, 2)]
    assert [row["positions"][s] for s in starts] == [len(prefix)] * 2, "each segment continues from the prefix"


def test_stage_one_supervises_the_caption_alone(tokenizer):
    ids, labels = encode_segment(tokenizer, "plain", [("Describe it.", "There is a red circle")])
    assert ids == labels == tokenizer.encode("There is a red circle\n")
    assert encode_prefix(tokenizer, "plain", 2) == [tokenizer.bos_token_id, IMAGE_ID, IMAGE_ID]


def test_an_answer_without_room_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="raise max_length in train.PRESETS"):
        pack(list(range(300)), [encode_segment(tokenizer, "plain", [("", "A red circle, a cup and a dog")])], 290)
    with pytest.raises(ValueError, match="raise max_length in train.PRESETS"):
        prefix = encode_prefix(tokenizer, "v1", 4)
        pack(prefix, [encode_segment(tokenizer, "v1", [("Where is the object?", "It.")])], len(prefix) + 5)


def test_what_is_drawn_depends_on_seed_epoch_and_index_alone(coco, tokenizer):
    records, _ = read_file(coco / "instances.json", coco)

    def examples(seed):
        return Examples(records, tokenizer, CONFIG, Wording(CoordFormat("ivb", 28)), seed=seed)

    one, same = examples(0), examples(0)
    same.batch([5])  # a draw in between changes nothing
    first, ids = one.batch([0, 1, 2, 3])
    again, _ = same.batch([0, 1, 2, 3])
    assert all((first[key] == again[key]).all() for key in first)
    assert sorted(ids[:2]) == sorted(ids[2:]) == ["7", "9"], "every epoch visits every image once"


def examples_of(records, tokenizer, **how):
    return Examples(records, tokenizer, CONFIG, Wording(CoordFormat("ivb", 28)), **how)


def test_a_batch_mixes_rows_with_and_without_an_image(coco, tokenizer):
    """Text alone is tokenised as one text; its row has no place for an image, and a batch may hold none at all."""
    (coco / "llava.json").write_text(json.dumps(LLAVA))
    examples = examples_of(read_records([(coco / "llava.json", coco, 1.0)])[0], tokenizer)
    batch, ids = examples.batch([0, 1])
    assert sorted(ids) == ["a", "b"] and batch["pixel_values"].shape == (1, 3, 28, 28)
    rows = (batch["input_ids"] == IMAGE_ID).sum(1).tolist()
    assert sorted(rows) == [0, 4] and rows[ids.index("a")] == 4
    text = examples.row([r.id for r in examples.records].index("b"), 0)[0]["input_ids"]
    assert text == [1, *tokenizer.encode(data.SYSTEM + " USER: Say hi. ASSISTANT:"), *tokenizer.encode("Hi."), 2]
    alone, _ = examples_of(examples.records[-1:], tokenizer).batch([0])
    assert alone["pixel_values"].shape == (0, 3, 28, 28)


def test_rows_are_padded_to_few_lengths_beside_a_gpu(tokenizer, monkeypatch):
    """To 128 if a row is packed, as FlexAttention likes it, else to 32. The answers stay where they are."""
    rows = [pack([1], [([5, 6, 7], [IGNORE, 6, 7])], 200), pack([1, 2], [([5] * 150, [5] * 150)], 200)]
    plain = collate(rows)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    padded = collate(rows)
    assert padded["input_ids"].shape == padded["positions"].shape == (2, 160) and torch.equal(padded["targets"], plain["targets"])
    assert torch.equal(padded["input_ids"][:, :152], plain["input_ids"]) and not padded["input_ids"][:, 152:].any()
    packed = pack([1], [([5, 6, 7], [IGNORE, 6, 7])] * 2, 200)
    assert collate(rows[:1])["input_ids"].shape == (1, 32) and collate([packed])["input_ids"].shape == (1, 128)


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
    seven = examples_of([replace(RECORD, id=str(i), weight=0.6 if i == 7 else 1) for i in range(8)], tokenizer)
    drawn = [seven.order(i) for i in range(8 * 50)]  # 7.6 rounds up to 8 rows: one of weight 1 may come twice
    assert len({index for index, _ in drawn}) == 8 and len(set(drawn)) == len(drawn), "with another text"


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


def test_a_question_longer_than_the_context_is_told_before_training(coco, tokenizer):
    long = replace(RECORD, conversations=((("word " * 300, "Yes."),), (("Q?", "word " * 300),)))
    with pytest.raises(ValueError, match="1 conversations.*--skip-bad"):
        examples_of([long], tokenizer, max_length=200)
    alone = Record("2", None, (0, 0), conversations=long.conversations[:1])  # no image before it
    asked = tokenizer.encode(tokenizer.space + alone.conversations[0][0][0] + " ASSISTANT:")
    room = len(encode_prefix(tokenizer, "v1", 0)) + len(asked) + 1  # and one token of the answer
    assert examples_of([alone], tokenizer, max_length=room).left_out == 0
    with pytest.raises(ValueError, match="1 conversations"):
        examples_of([alone], tokenizer, max_length=room - 1)
    examples = examples_of([long], tokenizer, max_length=200, skip_bad=True)
    assert examples.left_out == 1 and len(examples.records[0].conversations) == 1


def test_data_without_anything_to_say_is_refused(coco, tokenizer):
    records, _ = read_file(coco / "instances.json", coco)
    with pytest.raises(ValueError, match="none of 2 images has what this stage needs: captions"):
        Examples(records, tokenizer, CONFIG, Wording(CoordFormat("ivb", 28)), template="plain")


def test_stage_one_reads_llavas_chat_as_captions(coco, tokenizer):
    """CC3M's chat.json: a question that only asks for a description, and the caption as its answer. Texts have no image."""
    (coco / "chat.json").write_text(json.dumps(LLAVA))
    examples = examples_of(read_records([(coco / "chat.json", coco, 1.0)])[0], tokenizer, template="plain")
    assert [record.id for record in examples.records] == ["a"]
    row, caption = examples.row(0, 0)[0], tokenizer.encode("A.\n")
    assert row["input_ids"] == [1, *[data.IMAGE_ID] * 4, *caption] and row["labels"] == [data.IGNORE] * 5 + caption


def test_shares_of_conversations_and_descriptions(tokenizer):
    talks = tuple(((f"Q{i}?", "A."),) for i in range(9))
    examples = examples_of([replace(RECORD, conversations=talks)], tokenizer, questions=4, instruct_share=0.34)
    counts = [sum(turns in talks for turns in examples.draw_turns(examples.records[0], random.Random(i))) for i in range(400)]
    assert set(counts) == {1, 2} and abs(sum(counts) / 400 - 4 * 0.34) < 0.1
    wording, rng, cup = Wording(CoordFormat("ivb"), words="mixed"), random.Random(0), data.Object("cup", None, "a red cup")
    assert 160 < sum(wording.words_for(cup, rng) == "cup" for _ in range(400)) < 240


def test_a_row_holds_at_most_its_budget_of_tokens(tokenizer):
    """Long conversations fill the row; which segments they displace is chance, so each kind keeps some of its share."""
    talks = tuple((("Tell me. " + "word " * 20, f"Answer {i}. " + "word " * 20),) for i in range(4))
    record = replace(RECORD, conversations=talks)
    examples = examples_of([record], tokenizer, max_length=420, questions=8, instruct_share=0.5)
    rows = [examples.text_row(record, epoch) for epoch in range(60)]
    assert max(len(row["input_ids"]) for row in rows) <= 420
    texts = [tokenizer.decode([i for i in row["input_ids"] if i >= 0]) for row in rows]
    assert all(any(words in text for text in texts) for words in ("word word", "located at", "no such object", "There is a"))
    segments = [encode_segment(tokenizer, "v1", [(f"Question {i}?", "It.")]) for i in range(9)]
    prefix, size = encode_prefix(tokenizer, "v1", 4), len(segments[0][0])
    row = pack(prefix, segments, len(prefix) + 3 * size + 1)
    assert row["segment_of"][-1] == 3 and len(row["input_ids"]) == len(prefix) + 3 * size
