"""VQAv2 (Tab. 5): open questions about COCO images, each answered by ten people.

Files      v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json, from visualqa.org; COCO's val2014.
           The test splits have no annotations: a run on them writes NAME.submission.json for EvalAI. Or lmms-lab's
           validation-*.parquet, with annotations and images
Questions  the file's own text; with --short, followed by LLaVA-1.5's request for a single word
Score      mean over the annotators of min(1, matches among the others / 3), by type of answer and question. As officially, no
           answer is normalised if all annotators agree: "Yes." is not "yes" there; "normalised first" always does
Run        python -m tasks vqa runs/b2 --questions v2_..._questions.json --answers v2_..._annotations.json --images val2014
    >>> item = Item("0", None, None, "What animal is it?", {"answers": ["cat"] * 2 + ["dog"] * 8}, "A cat.")
    >>> judge_vqa(item, None); round(item.correct, 2)
    0.6
"""

from pathlib import Path

from evaluate import Item, Task, mean, paper_rows
from tasks.files import Rows, find_image, keys_of, match_answers, read_rows
from tasks.words import PROMPTS, add_short, vqa_normal, vqa_scores

QUESTIONS = Rows("v2_OpenEnded_mscoco_*_questions.json", {"question_id": int, "image_id": int, "question": str}, "questions")
NEEDS = {"question_id": int, "answers": list, "answer_type": str, "question_type": str}
ANNOTATIONS = Rows("v2_mscoco_*_annotations.json", NEEDS, "annotations")


def read_vqa(args, wording):
    content, items, truth, skipped = read_rows(args.questions, QUESTIONS.file), [], {}, {}
    if "question_type" in keys_of(content):  # lmms-lab's
        year = "test2015" if Path(args.questions).name.startswith("test") else "val2014"
        content = {"questions": content, "annotations": content, "data_subtype": year}
        truth = ANNOTATIONS.read(args.questions, content) if content["annotations"][0].get("answers") else {}
    rows = QUESTIONS.read(args.questions, content)
    split = str(content.get("data_subtype", "val2014")).replace("-dev", "")  # test-dev2015 asks about test2015's images
    if args.answers:
        truth, skipped = match_answers(rows, ANNOTATIONS, args, "annotations of questions that are not asked")
    for name, row in rows.items():
        facts = {"question_id": row["question_id"]}
        if truth:
            answers = [a.get("answer") if isinstance(a, dict) else None for a in truth[name]["answers"]]
            if not answers or not all(isinstance(text, str) for text in answers):
                file = args.answers or args.questions
                raise ValueError(f"{file}: question {name} has answers {answers}, not one text per annotator")
            facts |= {"answers": answers} | {key: truth[name][key] for key in ("answer_type", "question_type")}
        path = find_image(args.images, f"COCO_{split}_{row['image_id']:012d}.jpg", split)
        items.append(Item(name, path, None, add_short(row["question"], args.short), facts))
    return items, skipped


def judge_vqa(item, wording):
    """Score an answer by the ten annotators'; `contains` and `normalised` are the same score of a more tolerant comparison."""
    if "answers" in item.truth:
        item.correct, item.measured["contains"] = vqa_scores(item.answer, item.truth["answers"])
        item.measured["normalised"] = vqa_scores(vqa_normal(item.answer), item.truth["answers"])[0]


def vqa_metrics(items):
    if items[0].correct is None:
        return {"questions without annotations": len(items)}
    metrics = {"accuracy": mean(item.correct for item in items)}
    metrics["accuracy, normalised first"] = mean(item.measured["normalised"] for item in items)
    metrics["contains"] = mean(item.measured["contains"] for item in items)
    for key, kind in sorted({(key, item.truth[key]) for item in items for key in ("answer_type", "question_type")}):
        metrics[f"{key.replace('_', ' ')} {kind}"] = mean(i.correct for i in items if i.truth[key] == kind)
    return metrics | {"questions": len(items)}


TASKS = {"vqa": Task(
    read_vqa, judge_vqa, vqa_metrics, PROMPTS, options=("short",), paper=paper_rows("vqa"),
    files="questions: v2_OpenEnded_mscoco_val2014_questions.json; answers: v2_mscoco_val2014_annotations.json; or .parquet",
    # for EvalAI; normalised, because its server compares letter by letter if annotators agree
    submission=lambda items: [{"question_id": i.truth["question_id"], "answer": vqa_normal(i.answer)} for i in items],
)}  # fmt: skip
