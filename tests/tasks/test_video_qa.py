"""Questions about clips, from the files of four sets."""

import json

import pytest
from benchmark_helpers import answered, read, touch, write

from tasks.words import SHORT


def test_activitynet_qas_real_files_are_joined_and_counted_by_type(real, tmp_path):
    folder = real("formats/activitynet-qa")
    rows = json.loads((folder / "test_q.json").read_text())
    names = sorted({row["video_name"] for row in rows})
    clips = touch(tmp_path / "clips", *[f"v_{name}.mp4" for name in names[1:]])
    items, skipped = read("activitynet-qa", folder / "test_q.json", folder / "test_a.json", clips)
    gone = sum(row["video_name"] == names[0] for row in rows)
    assert len(rows) == 8000 and len(names) == 800 and len(items) == 8000 - gone
    [(reason, count)] = skipped.items()
    assert "1 clips that are not in" in reason and names[0] in reason and count == gone
    truth = {row["question_id"]: row["answer"] for row in json.loads((folder / "test_a.json").read_text())}
    metrics = answered("activitynet-qa", items, *[truth[item.id].upper() + "." for item in items])
    assert metrics["exact match"] == metrics["contains"] == 1 and metrics["exact match, temporal relationship"] == 1
    assert len([name for name in metrics if name.startswith("exact match, ")]) == 9
    with pytest.raises(FileNotFoundError, match="none of the 800 clips"):
        read("activitynet-qa", folder / "test_q.json", folder / "test_a.json", touch(tmp_path / "no", "a.mp4")
        )
    with pytest.raises(ValueError, match="holds no answers"):
        read("activitynet-qa", folder / "test_q.json", None, clips)
    listed = [{"id": 1, "video_id": 7, "question": "what is it", "answer": ["dog", "a dog"]}]
    (tmp_path / "val_qa.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="val_qa.json holds no answers, one text each"):
        read("msrvtt-qa", tmp_path / "val_qa.json", None, clips)


def test_tgif_qas_real_table_is_read(real, tmp_path):
    path = real("formats/tgif-qa/Test_frameqa_question.csv")
    gifs = {line.split("\t")[0] for line in path.read_text().splitlines()[1:]}
    clips = touch(tmp_path, *[f"{name}.gif" for name in gifs])
    items, skipped = read("tgif-qa", path, None, clips)
    assert len(items) == 12623 and len(gifs) == 6861 and not skipped
    assert items[0].truth == {"answer": "cookie", "type": "object"} and items[0].id == "FRAMEQA1159"
    for content in (b"gif_name\tanswer\n\xff", b"x" * 200_000):  # of another encoding; a field beyond csv's limit
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(ValueError, match="bad.csv (cannot be read|is not text)"):
            read("tgif-qa", tmp_path / "bad.csv", None, clips)


def test_tables_with_tabs_or_commas_are_read_under_any_suffix(tmp_path):
    """In the released table, a quotation mark is a letter; in one saved again with commas, it encloses a field."""
    row = {"gif_name": "g1", "question": 'what says "hi, you" ?', "answer": "dog", "type": "0", "vid_id": "F1"}
    touch(tmp_path, "g1.gif")
    for suffix in ("csv", "CSV", "tsv", "TSV", "txt"):
        for sign, quoted in (("\t", row["question"]), (",", '"what says ""hi, you"" ?"')):
            lines = [sign.join(row), sign.join([*row.values()]).replace(row["question"], quoted)]
            (tmp_path / f"q.{suffix}").write_text("\r\n".join(lines) + "\r\n", newline="")
            [item], _ = read("tgif-qa", tmp_path / f"q.{suffix}", None, tmp_path)
            assert (item.id, item.question, item.truth) == ("F1", row["question"], {"answer": "dog", "type": "object"})


def test_msvd_and_msrvtt_clips_go_by_their_numbers(tmp_path):
    rows = [{"id": 7, "video_id": 1451, "question": "what is it?", "answer": "dog", "category_id": 3}]
    path = write(tmp_path / "val_qa.json", rows)
    for name, clip in (("msvd-qa", "vid1451.avi"), ("msrvtt-qa", "video1451.mp4")):
        [item], _ = read(name, path, None, touch(tmp_path / name, clip))
        assert item.id == "7" and item.image.name == clip and item.truth == {"answer": "dog"}
        write(tmp_path / "named.json", [rows[0] | {"video_id": clip.partition(".")[0]}])  # as others repack it
        assert read(name, tmp_path / "named.json", None, tmp_path / name)[0][0].image == item.image
    (tmp_path / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1451\n")
    [item], _ = read("msvd-qa", path, None, touch(tmp_path / "tube", "-4wsuPCjDBc_5_15.avi"))
    assert item.image.name == "-4wsuPCjDBc_5_15.avi"
    metrics = answered("msvd-qa", [item], "A hot dog!")
    assert metrics == {"exact match": 0.0, "contains": 1.0, "questions": 1}
    told = [{"question_id": "9", "answer": "x", "type": "\u00b2"}]  # a digit, and no number
    questions = [{"video_name": "video1451", "question": "what?", "question_id": "9"}]  # as Video-LLaVA repacks it
    files = write(tmp_path / "test_q.json", questions), write(tmp_path / "a.json", told)
    assert read("activitynet-qa", *files, tmp_path / "msrvtt-qa")[0][0].truth == {"answer": "x"}
    files = write(tmp_path / "test_q.json", questions), write(tmp_path / "a.json", [{"answer": "x", "question_id": 9}])
    [item], _ = read("msrvtt-qa", *files, tmp_path / "msrvtt-qa", short=True)
    assert item.truth == {"answer": "x"} and item.question == "what?" + SHORT
