"""What's Up: which of two or four captions that differ in a preposition is right? About COCO's val2017, or photos made for it.

Files      coco_qa_one_obj.json, coco_qa_two_obj.json with val2017; controlled_images_dataset.json (A) with controlled_images,
           controlled_clevr_dataset.json (B) with controlled_clevr. From github.com/amitakamath/whatsup_vlms
Questions  [image id, right caption, wrong caption], or {"image_path", "caption_options": [right, wrong, wrong, wrong]}.
           whats-up: the model is asked for a caption, and the likelihoods are compared, in sum and per token (a sum prefers
           short captions). whats-up-asked: "Is there a mug under a table in the image?" with each caption
Score      rows that are right, by preposition: the likeliest caption is the right one; asked, yes to it and no to the others.
           A and B also by pairs of photos (left and right, or the other two) and sets of four, all of which must be right
Run        python -m tasks whats-up runs/b2 --questions controlled_images_dataset.json --images controlled_images --with-blind
    >>> item = Item("0 likelihood", None, None, "...", {"caption": "A mug on a table"}, "A mug under a table")
    >>> judge_choice(item, None); item.correct
    False
"""

import math
import re
from pathlib import Path

from evaluate import HAL_PROMPT, Item, Task, judge_hal, mean, says_no
from tasks.files import find_image, read_rows
from tasks.words import same_words

FILE = "What's Up's coco_qa_*_obj.json, [[image id, right caption, wrong caption]], or controlled_*_dataset.json"
PROMPT = "Provide a one-sentence caption for the provided image."  # LLaVA-1.5's for captions
SCORES = {"likelihood": sum, "per token": mean}  # of log p of a caption's tokens


def read_captions(args):
    """Yield (number of the row, image path, captions, what is known about the row). The first caption is the right one."""
    content = read_rows(args.questions, FILE)
    for number, row in enumerate(content if isinstance(content, list) and content else [content]):
        is_photo = isinstance(row, dict)
        options = row.get("caption_options") if is_photo else None
        row = [row.get("image_path"), *(options if isinstance(options, list) else [])] if is_photo else row
        image, *captions = row if isinstance(row, list) and row else [None]
        is_text = all(isinstance(caption, str) and "\n" not in caption for caption in captions)
        if not (isinstance(image, str if is_photo else str | int) and is_text and 1 < len(captions) == len(set(captions))):
            raise ValueError(f"{args.questions}: row {number} is {str(row)[:120]}; is this another file? It should be {FILE}")
        name, words = Path(image) if is_photo else Path(f"val2017/{image:0>12}.jpg"), [caption.split() for caption in captions]
        own = [word for word in words[0] if all(word not in others for others in words[1:])]
        objects = name.stem.split("_")  # mug_left_of_table.jpeg
        facts = {"row": number, "word": " ".join(own), "of": len(captions)}
        facts |= {"objects": f"{objects[0]} {objects[-1]}"} if is_photo else {}
        yield number, find_image(args.images, name.name, name.parent.name), captions, facts


def read_choices(args, wording):
    """Write the request for a caption, then the captions to choose from, a line each. The model reads the request alone."""
    items = []
    for number, path, captions, facts in read_captions(args):
        question = "\n".join([PROMPT, *captions])
        items += [Item(f"{number} {by}", path, None, question, {"caption": captions[0], "by": by, **facts}) for by in SCORES]
    return items, {}


def choose(model, images, groups):
    """Choose each item's caption, see evaluate.Task."""
    captions = [list(dict.fromkeys(line for item in group for line in item.question.split("\n")[1:])) for group in groups]
    scored = model.log_likelihood(images, [[(PROMPT, caption) for caption in of_image] for of_image in captions])
    log_p = [dict(zip(of_image, scores, strict=True)) for of_image, scores in zip(captions, scored, strict=True)]
    return [[likeliest(item, of_image) for item in group] for group, of_image in zip(groups, log_p, strict=True)]


def likeliest(item, log_p):
    if any(math.isnan(sum(tokens)) for tokens in log_p.values()):
        raise ValueError(f"question {item.id}: a caption's log-likelihood is not a number; try another --dtype")
    return max(item.question.split("\n")[1:], key=lambda caption: SCORES[item.truth["by"]](log_p[caption]))


def judge_choice(item, wording):
    item.correct = same_words(item.answer, item.truth["caption"])


def read_questions(args, wording):
    """Turn each caption into a question to answer with yes or no."""
    items = []
    for number, path, captions, facts in read_captions(args):
        for place, caption in enumerate(captions):
            thing = re.sub("(?i)^a photo of ", "", caption).strip().rstrip(".")
            question, label = f"Is there {thing[:1].lower()}{thing[1:]} in the image?", "no" if place else "yes"
            items.append(Item(f"{number} {place}", path, None, question, {"label": label, **facts}))
    return items, {}


def shares(name, rows):
    """Return the shares of rows that are right, also by preposition, and of pairs and sets. rows: [(is right, facts)]"""
    metrics, pairs, sets = {name: mean(right for right, _ in rows)}, {}, {}
    for word in sorted({facts["word"] for _, facts in rows}):
        metrics[f"{name}, {word}"] = mean(right for right, facts in rows if facts["word"] == word)
    for right, facts in rows:
        if "objects" in facts:
            sets.setdefault(facts["objects"], []).append(right)
            pairs.setdefault((facts["objects"], facts["word"] in ("left", "right")), []).append(right)
    for what, groups, size in (("pairs", pairs, 2), ("sets", sets, 4)):  # --limit may cut some
        if whole := [all(group) for group in groups.values() if len(group) == size]:
            metrics[f"{name}, {what}"] = mean(whole)
    return metrics


def choice_metrics(items):
    metrics = {"chance": mean(1 / item.truth["of"] for item in items)}
    for name in SCORES:
        metrics |= shares(name, [(item.correct, item.truth) for item in items if item.truth["by"] == name])
    return metrics | {"rows": len(items) // len(SCORES)}


def question_metrics(items):
    rows = {}
    for item in items:
        rows.setdefault(item.truth["row"], []).append(item)
    metrics = {"chance": mean(0.5 ** len(row) for row in rows.values())}
    metrics |= shares("yes and no", [(all(item.correct for item in row), row[0].truth) for row in rows.values()])
    for label in ("yes", "no"):
        metrics[f"questions to answer {label}"] = mean(item.correct for item in items if item.truth["label"] == label)
    return metrics | {"says yes": mean(not says_no(item.answer) for item in items), "rows": len(rows), "questions": len(items)}


FILES = "questions: coco_qa_{one,two}_obj.json, controlled_images_dataset.json (A) or controlled_clevr_dataset.json (B)"
TASKS = {
    "whats-up": Task(read_choices, judge_choice, choice_metrics, (PROMPT,), FILES, choose=choose),
    "whats-up-asked": Task(read_questions, judge_hal, question_metrics, (HAL_PROMPT,), FILES),
}
