"""Questions about clips (Tab. 6, 7): ActivityNet-QA, MSRVTT-QA, MSVD-QA and TGIF-QA's frame questions.

Files      activitynet-qa: test_q.json and test_a.json (github.com/MILVLG/activitynet-qa); msrvtt-qa, msvd-qa: val_qa.json or
           test_qa.json (github.com/xudejing/video-question-answering); tgif-qa: Test_frameqa_question.csv
           (github.com/YunseokJANG/tgif-qa). Or, for all four, Video-LLaVA's test_q.json and test_a.json.
           --images is a folder of clips, each a video file or a folder of frames
Questions  the file's own text: {"video_name": "1QIUV7WYKXg", "question": "is the athlete wearing trousers", ...}. Those about
           missing clips are skipped and counted
Score      the paper's figures are a language model's judgement (judge.py). Beside it: exact match, ignoring case and
           punctuation, and `contains`

    python -m tasks activitynet-qa runs/vid --questions test_q.json --answers test_a.json --images videos

    >>> item = Item("7", None, None, "what is the man doing?", {"answer": "dance"}, "Dance!")
    >>> judge_video_qa(item, None); item.correct
    True
"""

import csv
from collections import Counter
from functools import partial
from pathlib import Path

from evaluate import Item, Task, paper_rows
from formats.annotations import find_clips
from formats.clips import naming
from formats.files import require_file, some
from tasks.files import match_answers, read_rows, rows_by_id
from tasks.judge import judge_answers
from tasks.words import add_short, contains, exact_metrics, same_words

FILE = "[{video_name, question, question_id}] (ActivityNet-QA), [{id, video_id, question, answer}] or TGIF-QA's table"
ANSWERS = "[{answer, type, question_id}]"
TABLE = "TGIF-QA's *_frameqa_question.csv, tabs between its columns"
ACTIVITYNET_TYPES = ("motion", "spatial relationship", "temporal relationship", "yes/no", "color", "object", "location")
ACTIVITYNET_TYPES += ("number", "other")
TGIF_TYPES = ("object", "number", "color", "location")


def read_table(path):
    """Read TGIF-QA's table as rows of the other schemas."""
    require_file(path, TABLE)
    with naming(path, UnicodeDecodeError, csv.Error), open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    needs = {"vid_id": str, "gif_name": str, "question": str, "answer": str}
    rows = rows_by_id(rows, path, "vid_id", needs, TABLE)
    return {name: row | {"video_name": row["gif_name"]} for name, row in rows.items()}


def read_questions(path, answers, prefix):
    """Read the questions of any of the four sets: {id: row} with video_name, question and, if no `answers` follow, answer."""
    if Path(path).suffix == ".csv":
        return read_table(path)
    content = read_rows(path, FILE)
    first = content[0] if isinstance(content, list) and content and isinstance(content[0], dict) else {}
    if "video_id" in first and "question_id" not in first:
        needs = {"id": str | int, "video_id": str | int, "question": str, "answer": str}
        rows = rows_by_id(content, path, "id", needs, FILE)
        return {name: row | {"video_name": row.get("video") or f"{prefix}{row['video_id']}"} for name, row in rows.items()}
    rows = rows_by_id(content, path, "question_id", {"question_id": str | int, "video_name": str, "question": str}, FILE)
    if answers is None:
        raise ValueError(f"{path} holds no answers; pass {ANSWERS} as --answers")
    return rows


def clip_finder(images, questions):
    """Return a function: clip's name -> path or None. MSVD's youtube_mapping.txt, beside the questions, has other names."""
    clips, mapping = find_clips(images), Path(questions).with_name("youtube_mapping.txt")
    lines = [line.split() for line in mapping.read_text(encoding="utf-8").splitlines()] if mapping.is_file() else []
    other = {line[1]: line[0] for line in lines if len(line) == 2}
    return lambda name: next((clips[key] for key in (name, f"v_{name}", other.get(name)) if key in clips), None)


def read_video_qa(args, wording, types=(), prefix=""):
    """Read questions and answers, and find each clip.

    types   names of the question types, which the files number
    prefix  before the number that stands for a clip: vid1451.avi (MSVD), video7010.mp4 (MSRVTT)
    """
    rows, skipped = read_questions(args.questions, args.answers, prefix), Counter()
    truth = rows
    if args.answers:
        needs = {"question_id": str | int, "answer": str | int}
        answers = rows_by_id(read_rows(args.answers, "test_a.json"), args.answers, "question_id", needs, ANSWERS)
        truth, left_over = match_answers(rows, answers, args.questions, args.answers)
        skipped.update({"answers to questions that are not asked": left_over} if left_over else {})
    items, missing, find_clip = [], Counter(), clip_finder(args.images, args.questions)
    for name, row in rows.items():
        path = find_clip(row["video_name"])
        if path is None:
            missing[row["video_name"]] += 1
            continue
        facts = {"answer": str(truth[name]["answer"])}
        if types and str(truth[name].get("type", "")).isdecimal():
            number = int(truth[name]["type"])
            facts["type"] = types[number] if number < len(types) else f"type {number}"
        items.append(Item(name, path, None, add_short(row["question"], args.short), facts))
    names = some(list(missing))
    if not items:
        raise FileNotFoundError(
            f"none of the {len(missing)} clips of {args.questions} is in {args.images} ({names}), as file or folder of frames"
        )
    if missing:
        skipped[f"questions about {len(missing)} clips that are not in {args.images} ({names})"] = missing.total()
    return items, skipped


def judge_video_qa(item, wording):
    item.correct = same_words(item.answer, item.truth["answer"])
    item.truth["contains"] = item.correct or contains(item.answer, item.truth["answer"])


def video_task(files, rows, types=(), prefix=""):
    read = partial(read_video_qa, types=types, prefix=prefix)
    return Task(
        read, judge_video_qa, exact_metrics, ("{question}",), files, ("short",), paper_rows(("judge accuracy",), *rows),
        after=judge_answers,
    )  # fmt: skip


QA_FILES = (
    "questions: val_qa.json, [{id, video_id, question, answer}], or test_q.json with answers: test_a.json (Video-LLaVA's)"
)
TASKS = {
    "activitynet-qa": video_task(
        "questions: test_q.json; answers: test_a.json",
        (
            ("LLaVA-v1, one frame", 28.7),
            ("LLaVA-v1.5, one frame", 31.5),
            ("LocVLM-B, one frame", 29.2),
            ("LocVLM-L, one frame", 32.1),
            ("Video-ChatGPT", 35.2),
            ("LocVLM-Vid-B", 37.4),
            ("LocVLM-Vid-B+", 38.2),
        ),
        types=ACTIVITYNET_TYPES,
    ),
    "msrvtt-qa": video_task(QA_FILES, (("Video-ChatGPT", 49.3), ("LocVLM-Vid-B", 51.2)), prefix="video"),
    "msvd-qa": video_task(QA_FILES, (("Video-ChatGPT", 64.9), ("LocVLM-Vid-B", 66.1)), prefix="vid"),
    "tgif-qa": video_task(
        "questions: Test_frameqa_question.csv; or test_q.json with answers: test_a.json",
        (("Video-ChatGPT", 51.4), ("LocVLM-Vid-B", 51.8)), types=TGIF_TYPES,
    ),
}  # fmt: skip
