"""GQA (Tab. 5): compositional questions about everyday photos.

Files      testdev_balanced_questions.json and images.zip, from cs.stanford.edu/people/dorarad/gqa; or LLaVA's JSON lines of the
           same questions, with the official file as --answers; or lmms-lab's testdev_balanced_instructions/*.parquet, with
           testdev_balanced_images/*.parquet as --images
Questions  {"201307251": {"question": "Is it overcast?", "answer": "yes", "imageId": "n161313", ...}}
Score      exact match in LLaVA's way: lower case, without the last full stop. `contains` also counts answers in sentences. By
           type as officially, where the file has types: "binary" is every question that is no query, also "left or right?"
Run        python -m tasks gqa runs/l2-vqa --questions testdev_balanced_questions.json --images gqa/images --short
    >>> item = Item("201307251", None, None, "Is it overcast?", {"answer": "yes"}, "Yes, it is.")
    >>> judge_gqa(item, None); item.correct, item.measured["contains"]
    (False, True)
"""

from collections import Counter

from evaluate import Item, Task, mean, paper_rows
from tasks.files import Rows, find_image, keys_of, match_answers, read_rows
from tasks.words import PROMPTS, add_short, exact_metrics, judge_exact

LMMS_LAB = Rows("lmms-lab's *_instructions/*.parquet", {"id": str, "question": str, "answer": str, "imageId": str})
OFFICIAL = Rows("GQA's *_balanced_questions.json", {"question": str, "answer": str, "imageId": str})
LLAVA = Rows("LLaVA's llava_gqa_testdev_balanced.jsonl", {"question_id": str | int, "image": str, "text": str})


def read_gqa(args, wording):
    """Read balanced questions only, as the official evaluation does: 12,578 in testdev."""
    content, skipped, items = read_rows(args.questions, OFFICIAL.file), Counter(), []
    kind = OFFICIAL if isinstance(content, dict) else LMMS_LAB if "imageId" in keys_of(content) else LLAVA
    rows = kind.read(args.questions, content)
    truth, left_over = match_answers(rows, OFFICIAL, args)
    for name, row in rows.items():
        if not truth[name].get("isBalanced", True):
            skipped["questions that are not balanced"] += 1
            continue
        text, image = (row["text"], row["image"]) if kind is LLAVA else (row["question"], f"{row['imageId']}.jpg")
        facts = {"answer": truth[name]["answer"], "types": types_of(truth[name])}
        items.append(Item(name, find_image(args.images, image, "images"), None, add_short(text, args.short), facts))
    return items, skipped + left_over


def types_of(row):
    """Return the types of a question that the official script counts by: binary or open, and the file's own three."""
    types = row.get("types") if isinstance(row.get("types"), dict) else {}
    kinds = [f"{key} {types[key]}" for key in ("structural", "semantic", "detailed") if types.get(key)]
    return ["open" if types["structural"] == "query" else "binary", *kinds] if types.get("structural") else kinds


def gqa_metrics(items):
    metrics, kinds = exact_metrics(items), sorted({kind for item in items for kind in item.truth["types"]})
    return metrics | {f"exact match, {k}": mean(i.correct for i in items if k in i.truth["types"]) for k in kinds}


def normal(answer):
    return answer.strip().rstrip(".").lower()


def judge_gqa(item, wording):
    judge_exact(item, wording, lambda answer, truth: normal(answer) == truth)


FILES = "questions: testdev_balanced_questions.json; or LLaVA's .jsonl, and answers: testdev_balanced_questions.json"
TASKS = {"gqa": Task(read_gqa, judge_gqa, gqa_metrics, PROMPTS, FILES, ("short",), paper_rows("gqa"),
                     submission=lambda items: [{"questionId": i.id, "prediction": normal(i.answer)} for i in items])}
