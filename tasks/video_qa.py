"""TODO tasks.video_qa."""

import csv
from collections import Counter
from functools import partial
from pathlib import Path

from evaluate import Item
from formats.annotations import find_clips
from formats.clips import naming
from formats.files import require_file, some
from tasks.files import asked_short, joined, keyed, read_rows
from tasks.gqa import exact_metrics
from tasks.registry import Benchmark
from tasks.words import contains, same_words

# ----- questions about videos

VIDEO_FILE = (
    "[{video_name, question, question_id}] (ActivityNet-QA), [{id, video_id, question, answer}] or TGIF-QA's table"
)
ACTIVITYNET_TYPES = ("motion", "spatial relationship", "temporal relationship")
ACTIVITYNET_TYPES += ("yes/no", "color", "object", "location", "number", "other")
TGIF_TYPES = ("object", "number", "color", "location")


def read_table(path):
    """Read TGIF-QA's table, tabs between columns, as rows of the other schemas."""
    require_file(path, "TGIF-QA's *_frameqa_question.csv")
    with naming(path, UnicodeDecodeError, csv.Error), open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    needs = {"vid_id": str, "gif_name": str, "question": str, "answer": str}
    rows = keyed(rows, path, "vid_id", needs, "TGIF-QA's *_frameqa_question.csv, tabs between its columns")
    return {name: row | {"video_name": row["gif_name"]} for name, row in rows.items()}


def read_video_qa(questions, answers, images, short=False, types=(), prefix=""):
    """Questions about clips, of any of the four sets: {id: row}s joined, and each clip found under one of its names.

    prefix  before the number that stands for a clip: vid1451.avi (MSVD), video7010.mp4 (MSRVTT). A youtube_mapping.txt
            beside the questions says by which other names MSVD's are kept.
    Video-LLaVA's repacked files have ActivityNet-QA's schema for all four. Questions about clips that are not there are
    left out and counted; where none is there, it is refused.
    """
    if Path(questions).suffix == ".csv":
        rows = truth = read_table(questions)
    else:
        content = read_rows(questions, VIDEO_FILE)
        first = content[0] if isinstance(content, list) and content and isinstance(content[0], dict) else {}
        if "video_id" in first and "question_id" not in first:
            needs = {"id": str | int, "video_id": str | int, "question": str, "answer": str}
            rows = truth = keyed(content, questions, "id", needs, VIDEO_FILE)
            rows = {
                name: row | {"video_name": row.get("video") or f"{prefix}{row['video_id']}"}
                for name, row in rows.items()
            }
        else:
            needs = {"question_id": str | int, "video_name": str, "question": str}
            rows = truth = keyed(content, questions, "question_id", needs, VIDEO_FILE)
            if answers is None:
                raise ValueError(
                    f"{questions} holds no answers; expected [{{answer, type, question_id}}]; give it as --answers"
                )
    left_out = Counter()
    if answers is not None:
        needs = {"question_id": str | int, "answer": str | int}
        told = keyed(read_rows(answers, "test_a.json"), answers, "question_id", needs, "[{answer, type, question_id}]")
        truth, left_over = joined(rows, told, questions, answers)
        left_out.update({"answers to questions that are not asked": left_over} if left_over else {})
    clips, mapping = find_clips(images), Path(questions).with_name("youtube_mapping.txt")
    lines = [line.split() for line in mapping.read_text(encoding="utf-8").splitlines()] if mapping.is_file() else []
    other = {line[1]: line[0] for line in lines if len(line) == 2}
    items, missing = [], {}
    for name, row in rows.items():
        clip = row["video_name"]
        path = next((clips[key] for key in (clip, f"v_{clip}", other.get(clip)) if key in clips), None)
        if path is None:
            missing[clip] = missing.get(clip, 0) + 1
            continue
        known = {"answer": str(truth[name]["answer"])}
        if types and str(truth[name].get("type", "")).isdecimal():
            number = int(truth[name]["type"])
            known["type"] = types[number] if number < len(types) else f"type {number}"
        items.append(Item(name, path, None, asked_short(row["question"], short), known))
    if not items:
        raise FileNotFoundError(
            f"none of the {len(missing)} clips of {questions} is in {images} ({some(list(missing))}); expected each under that "
            "name, as a file or a folder of frames; check the folder"
        )
    if missing:
        left_out[f"questions about {len(missing)} clips that are not in {images} ({some(list(missing))})"] = sum(
            missing.values()
        )
    return items, left_out


def judge_video_qa(item, wording):
    """Right if the answer is the truth but for case and punctuation; the paper's figures are a language model's judgement."""
    item.correct = same_words(item.answer, item.truth["answer"])
    item.truth["contains"] = item.correct or contains(item.answer, item.truth["answer"])


def video_benchmark(files, types=(), prefix=""):
    read = partial(read_video_qa, types=types, prefix=prefix)
    return Benchmark(read, judge_video_qa, exact_metrics, ("{question}",), files, options=("short",))


QA_FILES = "questions: val_qa.json, [{id, video_id, question, answer}], or test_q.json with answers: test_a.json (Video-LLaVA's)"
