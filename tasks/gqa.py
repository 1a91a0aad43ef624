"""TODO tasks.gqa."""

from collections import Counter
from pathlib import Path

from evaluate import Item, mean
from tasks.files import asked_of, asked_short, find_image, joined, keyed, read_rows
from tasks.words import contains

# ----- GQA

GQA_FILE = "GQA's {testdev,val,...}_balanced_questions.json"


def gqa_rows(content, path):
    """GQA's questions by id, from the content of an official file."""
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{path} is no dictionary of questions; expected {GQA_FILE}; is it LLaVA's form? It holds no answers"
        )
    rows = [row | {"question_id": name} if isinstance(row, dict) else row for name, row in content.items()]
    return keyed(rows, path, "question_id", {"question": str, "answer": str, "imageId": str}, GQA_FILE)


def read_gqa(questions, answers, images, short=False):
    """GQA: its official file, or LLaVA's JSON lines of the same questions, which need the official file for the answers.

    Only balanced questions count, as in the official evaluation: 12,578 of testdev.
    """
    content, left_out, items = read_rows(questions, GQA_FILE), Counter(), []
    if isinstance(content, dict):
        rows = gqa_rows(content, questions)
        asked = {name: (row["question"], f"{row['imageId']}.jpg") for name, row in rows.items()}
        truth = gqa_rows(read_rows(answers, GQA_FILE), answers) if answers else rows
    else:
        needs = {"question_id": str | int, "image": str, "text": str}
        rows = keyed(content, questions, "question_id", needs, "LLaVA's llava_gqa_testdev_balanced.jsonl")
        asked = {name: (row["text"], row["image"]) for name, row in rows.items()}
        if answers is None:
            raise ValueError(f"{questions} holds no answers; expected them in {GQA_FILE}; give it as --answers")
        truth = gqa_rows(read_rows(answers, GQA_FILE), answers)
    truth, left_over = joined(asked, truth, questions, answers)
    for name, (text, image) in asked.items():
        if not truth[name].get("isBalanced", True):
            left_out["questions that are not balanced"] += 1
            continue
        path = find_image(images, image, f"images/{image}", f"{Path(image).stem}.png")  # the last: the shapes world's
        items.append(Item(name, path, None, asked_short(text, short), {"answer": truth[name]["answer"]}))
    left_out.update({"answers to questions that are not asked": left_over} if left_over else {})
    return asked_of(items, questions, images), left_out


def judge_gqa(item, wording):
    """Right if the answer, in lower case without its full stop, is the truth (LLaVA's way); `contains`: if that is in it."""
    item.correct = item.answer.strip().rstrip(".").lower() == item.truth["answer"]
    item.truth["contains"] = item.correct or contains(item.answer, item.truth["answer"])


def exact_metrics(items):
    """Exact match and contains, over all and, where questions have a type, over each."""
    metrics = {"exact match": mean(i.correct for i in items), "contains": mean(i.truth["contains"] for i in items)}
    for kind in sorted({item.truth["type"] for item in items if "type" in item.truth}):
        here = [item for item in items if item.truth["type"] == kind]
        metrics[f"exact match, {kind}"] = mean(item.correct for item in here)
        metrics[f"contains, {kind}"] = mean(item.truth["contains"] for item in here)
    return metrics | {"questions": len(items)}


def gqa_submission(items):
    return [{"questionId": item.id, "prediction": item.answer.strip().rstrip(".").lower()} for item in items]
