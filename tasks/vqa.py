"""TODO tasks.vqa."""

from collections import Counter

from evaluate import Item, mean
from tasks.files import asked_of, asked_short, coco_names, find_image, joined, keyed, listed, read_rows
from tasks.words import vqa_normal, vqa_scores

# ----- VQAv2

VQA_QUESTIONS = "VQAv2's v2_OpenEnded_mscoco_*_questions.json"
VQA_ANSWERS = "VQAv2's v2_mscoco_*_annotations.json"


def read_vqa(questions, answers, images, short=False):
    """VQAv2: questions, and ten annotators' answers to them; without those (the test splits) only a submission is made."""
    content, left_out, items = read_rows(questions, VQA_QUESTIONS), Counter(), []
    needs = {"question_id": int, "image_id": int, "question": str}
    rows = keyed(listed(content, "questions", questions, VQA_QUESTIONS), questions, "question_id", needs, VQA_QUESTIONS)
    split = str(content.get("data_subtype", "val2014")).replace("-dev", "")  # test-dev2015 asks about test2015's images
    truth = {}
    if answers is not None:
        told = listed(read_rows(answers, VQA_ANSWERS), "annotations", answers, VQA_ANSWERS)
        needs = {"question_id": int, "answers": list, "answer_type": str, "question_type": str}
        truth, left_over = joined(rows, keyed(told, answers, "question_id", needs, VQA_ANSWERS), questions, answers)
        left_out.update({"annotations of questions that are not asked": left_over} if left_over else {})
    for name, row in rows.items():
        known = {"question_id": row["question_id"]}
        if truth:
            said = [a.get("answer") if isinstance(a, dict) else None for a in truth[name]["answers"]]
            if not said or not all(isinstance(text, str) for text in said):
                raise ValueError(
                    f"{answers}: question {name} has answers {said}; expected a text of each annotator; check the file"
                )
            known |= {
                "answers": said,
                "answer_type": truth[name]["answer_type"],
                "question_type": truth[name]["question_type"],
            }
        path = find_image(images, *coco_names(f"COCO_{split}_{row['image_id']:012d}.jpg", split))
        items.append(Item(name, path, None, asked_short(row["question"], short), known))
    return asked_of(items, questions, images), left_out


def judge_vqa(item, wording):
    """Score an answer by the ten annotators'; `contains` and `normalised` are the same of other readings of the answer."""
    if "answers" in item.truth:
        item.correct, item.truth["contains"] = vqa_scores(item.answer, item.truth["answers"])
        item.truth["normalised"] = vqa_scores(vqa_normal(item.answer), item.truth["answers"])[0]


def vqa_metrics(items):
    """The official figures: over all, of each answer type and question type.

    The official score normalises no answer where all annotators agree: there "Yes." is not "yes". "normalised first"
    normalises every answer, by the official rules, before it is scored.
    """
    scored = [item for item in items if item.correct is not None]
    if not scored:
        return {"questions without annotations": len(items)}
    metrics = {
        "accuracy": mean(item.correct for item in scored),
        "accuracy, normalised first": mean(item.truth["normalised"] for item in scored),
        "contains": mean(item.truth["contains"] for item in scored),
    }
    for key in ("answer_type", "question_type"):
        for kind in sorted({item.truth[key] for item in scored}):
            metrics[f"{key.replace('_', ' ')} {kind}"] = mean(i.correct for i in scored if i.truth[key] == kind)
    return metrics | {"questions": len(scored)}


def vqa_submission(items):
    """EvalAI's format, every question in it; normalised, since the server compares to the letter where annotators agree."""
    return [{"question_id": i.truth["question_id"], "answer": vqa_normal(i.answer)} for i in items]
