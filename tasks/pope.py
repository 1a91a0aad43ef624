"""TODO tasks.pope."""

from collections import Counter

from evaluate import Item, hal_metrics, mean
from tasks.files import asked_of, coco_names, find_image, keyed, read_rows
from tasks.words import spaced

# ----- POPE

POPE_VERSIONS = {3000: "the present files", 2910: "the old random file, LLaVA's"}


def read_pope(questions, answers, images):
    """POPE, of which the files are JSON lines or arrays; the questions are the file's, to the letter."""
    needs = {"question_id": int | str, "image": str, "text": str, "label": str}
    rows = keyed(read_rows(questions, "a file of POPE"), questions, "question_id", needs, "a file of POPE")
    items = []
    for name, row in rows.items():
        if row["label"] not in ("yes", "no"):
            raise ValueError(
                f"{questions}: question {name} has label {row['label']!r}; expected yes or no; check the file"
            )
        path = find_image(images, *coco_names(row["image"], "val2014"))
        items.append(Item(name, path, None, row["text"], {"label": row["label"]}))
    return asked_of(items, questions, images), Counter()


def pope_metrics(items):
    """The five figures, how often an answer says neither word, and which released version this is, told by its count."""
    neither = mean(not {"yes", "no", "not"} & set(spaced(item.answer).split()) for item in items)
    version = POPE_VERSIONS.get(len(items), "as many as in neither released version")
    return hal_metrics(items) | {"neither yes nor no": neither, f"questions ({version})": len(items)}
