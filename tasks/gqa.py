"""GQA (Tab. 5): compositional questions about everyday photos.

Files      testdev_balanced_questions.json and images.zip, from cs.stanford.edu/people/dorarad/gqa; or LLaVA's JSON lines of the
           same questions, with the official file as --answers
Questions  the file's own text, {"201307251": {"question": "Is it overcast?", "answer": "yes", "imageId": "n161313", ...}};
           with --short, followed by LLaVA-1.5's request for a single word
Score      exact match in LLaVA's way: lower case, without the last full stop. `contains` also counts answers in sentences, as
           LLaVA-v1 and LocVLM-B give them

    python -m tasks gqa runs/l2 --questions testdev_balanced_questions.json --images gqa/images --short

    >>> item = Item("201307251", None, None, "Is it overcast?", {"answer": "yes"}, "Yes, it is.")
    >>> judge_gqa(item, None); item.correct, item.truth["contains"]
    (False, True)
"""

from collections import Counter
from pathlib import Path

from evaluate import Item, Task, paper_rows
from tasks.files import find_image, match_answers, read_rows, rows_by_id
from tasks.words import add_short, contains, exact_metrics

FILE = "GQA's {testdev,val,...}_balanced_questions.json"


def official_rows(content, path):
    """Return the questions of an official file by id."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} is no dictionary of questions; it should be {FILE}. LLaVA's form holds no answers")
    rows = [row | {"question_id": name} if isinstance(row, dict) else row for name, row in content.items()]
    return rows_by_id(rows, path, "question_id", {"question": str, "answer": str, "imageId": str}, FILE)


def read_gqa(args, wording):
    """Read balanced questions only, as the official evaluation does: 12,578 in testdev."""
    content, skipped, items = read_rows(args.questions, FILE), Counter(), []
    if isinstance(content, dict):
        rows = official_rows(content, args.questions)
        questions = {name: (row["question"], f"{row['imageId']}.jpg") for name, row in rows.items()}
    else:
        needs = {"question_id": str | int, "image": str, "text": str}
        rows = rows_by_id(content, args.questions, "question_id", needs, "LLaVA's llava_gqa_testdev_balanced.jsonl")
        questions = {name: (row["text"], row["image"]) for name, row in rows.items()}
        if args.answers is None:
            raise ValueError(f"{args.questions} holds no answers; pass {FILE} as --answers")
    truth = official_rows(read_rows(args.answers, FILE), args.answers) if args.answers else rows
    truth, left_over = match_answers(questions, truth, args.questions, args.answers)
    for name, (text, image) in questions.items():
        if not truth[name].get("isBalanced", True):
            skipped["questions that are not balanced"] += 1
            continue
        # the shapes world's images are PNG
        path = find_image(args.images, image, f"images/{image}", f"{Path(image).stem}.png")
        items.append(Item(name, path, None, add_short(text, args.short), {"answer": truth[name]["answer"]}))
    skipped.update({"answers to questions that are not asked": left_over} if left_over else {})
    return items, skipped


def normal(answer):
    return answer.strip().rstrip(".").lower()


def judge_gqa(item, wording):
    item.correct = normal(item.answer) == item.truth["answer"]
    item.truth["contains"] = item.correct or contains(item.answer, item.truth["answer"])


def submission(items):
    return [{"questionId": item.id, "prediction": normal(item.answer)} for item in items]


TASKS = {
    "gqa": Task(
        read_gqa, judge_gqa, exact_metrics, ("{question}",),
        "questions: testdev_balanced_questions.json; or LLaVA's .jsonl, and answers: testdev_balanced_questions.json",
        options=("short",), submission=submission,
        paper=paper_rows(  # * tuned on VQA data
            ("exact match",),
            ("LLaVA-v1", 44.7),
            ("LocVLM-B", 47.3),
            ("LLaVA-v1.5", 48.7),
            ("LocVLM-L", 50.2),
            ("LLaVA-v1.5 *", 62.0),
            ("LocVLM-L *", 63.5),
        ),
    )
}  # fmt: skip
