"""Questions about clips (Tab. 6, 7): ActivityNet-QA, MSRVTT-QA, MSVD-QA and TGIF-QA's frame questions.

Files      activitynet-qa: test_q.json and test_a.json (github.com/MILVLG/activitynet-qa); msrvtt-qa, msvd-qa: val_qa.json or
           test_qa.json (github.com/xudejing/video-question-answering); tgif-qa: Test_frameqa_question.csv (github.com/
           YunseokJANG/tgif-qa); or, for all four, Video-LLaVA's test_q.json and test_a.json. Missing clips are skipped
Questions  {"video_name": "1QIUV7WYKXg", "question": "is the athlete wearing trousers", "question_id": "1QIUV7WYKXg_3"}
Score      a language model's judgement (judge.py), the paper's; exact match, ignoring case and punctuation; and `contains`
Run        python -m tasks activitynet-qa runs/vid --questions test_q.json --answers test_a.json --images videos
    >>> item = Item("7", None, None, "what is the man doing?", {"answer": "dance"}, "Dance!")
    >>> judge_exact(item, None); item.correct
    True
"""

from collections import Counter
from functools import partial
from pathlib import Path

from evaluate import Item, Task, paper_rows
from formats.clips import find_clips
from formats.files import read_json, read_text, some
from tasks.files import FOLDER, Rows, match_answers
from tasks.judge import judge_answers
from tasks.words import PROMPTS, add_short, exact_metrics, judge_exact

FILE = "[{video_name, question, question_id}] (ActivityNet-QA), [{id, video_id, question, answer}] or TGIF-QA's table"
IDS, CLIPS = "question_id|vid_id|id", "video_name|gif_name|video_id"  # of ActivityNet-QA, TGIF-QA, MSRVTT-QA and MSVD-QA
QUESTIONS = Rows(FILE, {IDS: str | int, CLIPS: str | int, "question": str})
ANSWERS = Rows("[{answer, type, question_id}]", {"question_id": str | int, "answer": str | int})


def read_video_qa(args, wording, types, prefix):
    """Read questions and answers, and find each clip. video_qa.json has `types`, the names of question types that the files
    number, and `prefix`, what is before a clip's number in its file name: video7010.mp4, vid1451.avi"""
    rows, items, missing = QUESTIONS.read(args.questions), [], Counter()
    truth, skipped = match_answers(rows, ANSWERS, args)
    clips = find_clips(args.images) if args.images else {}  # --score needs none
    mapping = Path(args.questions).with_name("youtube_mapping.txt")  # MSVD's other names
    lines = [line.split() for line in read_text(mapping).splitlines()] if mapping.is_file() else []
    other = {line[1]: line[0] for line in lines if len(line) == 2}
    for name, row in rows.items():
        clip = str(row.get("video_name") or row.get("gif_name") or prefix + str(row.get("video_id")).removeprefix(prefix))
        names = [key for key in (clip, f"v_{clip}", other.get(clip)) if key in clips]
        if args.images and not names:
            missing[clip] += 1
            continue
        facts, kind = {"answer": str(truth[name]["answer"])}, str(truth[name].get("type", ""))
        if types and kind.isdecimal():
            facts["type"] = types[int(kind)] if int(kind) < len(types) else f"type {int(kind)}"
        path = clips[names[0]] if names else Path(clip)
        items.append(Item(name, path, None, add_short(row["question"], args.short), facts, is_clip=True))
    where = f"in {args.images} ({some(list(missing))})"
    if not items:
        raise FileNotFoundError(f"none of the {len(missing)} clips of {args.questions} is {where}, as file or folder of frames")
    return items, skipped + Counter({f"questions about {len(missing)} clips that are not {where}": missing.total()})


TASKS = {}
for name, about in read_json(FOLDER / "video_qa.json").items():
    files, read = about.pop("files"), partial(read_video_qa, **about)
    TASKS[name] = Task(read, judge_exact, exact_metrics, PROMPTS, files, ("short",), paper_rows(name), after=judge_answers)
