"""Left and right in training conversations."""

import json

import pytest

from tools.keywords import keywords, main, read_talk


def write(path, content, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
    return path


def test_keywords_are_counted_once_a_conversation_over_both_denominators(tmp_path, capsys):
    talks = [
        ["Who is there?", "A cat on the left, to the LEFT of a dog. On the left side, too."],
        ["What is right?", "You are right.", "And left?", "The leftovers."],
        ["Nothing?", "Nothing: rightly so, upright."],
        ["q", "a"],
    ]
    table = keywords(talks)
    assert table["left"] == (2, 2 / 4, 2 / 10) and table["right"] == (1, 1 / 4, 1 / 10)
    assert table["the left"][0] == table["left side"][0] == table["to the left"][0] == 1
    assert table["the right"][0] == 0
    rows = [{"conversations": [{"from": "human", "value": text} for text in talk]} for talk in talks]
    main([str(write(tmp_path / "llava.json", rows))])
    out = capsys.readouterr().out
    assert "4 conversations, 10 turns" in out
    assert ["left", "2", "50.00", "20.000"] in [line.split() for line in out.splitlines()]


def test_keywords_of_real_llava_samples(real):
    talks = read_talk(real("formats/llava/coco2014_val_gpt4_qa_30x3.jsonl"))
    table = keywords(talks)
    assert len(talks) == 90 and table["left"][0] == 11 and table["to the right"][0] == 3
    with pytest.raises(ValueError, match="without conversations, or instruction and output"):
        read_talk(real("formats/llava/qa90_gpt4_answer.jsonl"))


def test_a_turn_without_text_is_named(tmp_path):
    with pytest.raises(ValueError, match="row 0 is .*without conversations"):
        read_talk(write(tmp_path / "talk.json", [{"conversations": [{"value": None}]}]))
