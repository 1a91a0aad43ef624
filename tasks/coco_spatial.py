"""COCO-Spatial as its authors released it (Tab. 4 has the paper's own rule: `evaluate.py --task spatial`).

Files      coco_spatial.json, from github.com/kahnchana/locvlm; COCO's val2014
Questions  "Which side of the dog is the cat?" for each of the file's pairs (left object, right object) that do not overlap and
           whose categories the image has once. The answer is always right, so each is also asked of the mirror image
Score      the right word is in the answer; strict: and its opposite is not

    python -m tasks coco-spatial runs/b2 --questions coco_spatial.json --images val2014

    >>> item = Item("9:0-1", None, None, "Which side of the dog is the cat?", {"word": "right"}, "To the left or right.")
    >>> judge_spatial(item, None); item.correct, item.truth["strict"]
    (True, False)
"""

from collections import Counter

from evaluate import Item, Task, flip_consistency, judge_spatial, mean, mirror
from formats.schema import box_from_xywh, box_problem
from tasks.files import coco_names, find_image, list_under, read_rows, rows_by_id

PROMPT = "Which side of the {obj_1} is the {obj_2}?"  # of the released code; App. E words it otherwise
FILE = "the authors' coco_spatial.json"


def read_entry(image_id, entry, names, path):
    """Read what the file says about one image: (file name, size, bboxes, names of the objects, pairs)."""
    try:
        objects, size = entry["annotations"], (int(entry["width"]), int(entry["height"]))
        objects_names = [names[o["category_id"]] for o in objects]
        pairs = [(left, right) for left, right in entry.get("good_pairs") or ()]
        [objects[i] for pair in pairs for i in pair]  # raises IndexError
        return str(entry["file_name"]), size, [o.get("bbox") for o in objects], objects_names, pairs
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path}: image {image_id} is invalid ({error!r}); it needs file_name, width, height, annotations and good_pairs "
            "that point into them"
        ) from None


def read_coco_spatial(args, wording):
    content = read_rows(args.questions, FILE)
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict):
        raise ValueError(f"{args.questions} has no dictionary 'data'; it should be {FILE}. Is it COCO's own file?")
    categories = list_under(content, "categories", args.questions, FILE)
    categories = rows_by_id(categories, args.questions, "id", {"id": int, "name": str}, FILE)
    names = {c["id"]: c["name"] for c in categories.values()}
    items, skipped = [], Counter()
    for image_id, entry in data.items():
        file_name, size, bboxes, objects, pairs = read_entry(image_id, entry, names, args.questions)
        skipped.update({"images without pairs": 1} if not pairs else {})
        path = find_image(args.images, *coco_names(file_name, "val2014")) if pairs else None
        for left, right in pairs:
            if problem := box_problem(bboxes[left], size) or box_problem(bboxes[right], size):
                skipped[f"pairs where a box {problem.split(' of size')[0]}"] += 1
                continue
            boxes_px = [box_from_xywh(bboxes[left]), box_from_xywh(bboxes[right])]
            if objects.count(objects[left]) > 1 or objects.count(objects[right]) > 1:
                skipped["pairs of a category that the image has twice"] += 1
            elif boxes_px[0][2] >= boxes_px[1][0]:
                skipped["pairs that are not left and right of each other"] += 1
            else:
                question = PROMPT.format(obj_1=objects[left], obj_2=objects[right])
                truth = {"word": "right", "boxes_px": boxes_px}
                items.append(Item(f"{image_id}:{left}-{right}", path, size, question, truth))
                items.append(mirror(items[-1]))
    return items, skipped


def coco_spatial_metrics(items):
    metrics = {"accuracy": mean(item.correct for item in items)}
    for name, word in (("right (the image)", "right"), ("left (its mirror image)", "left")):
        metrics[name] = mean(item.correct for item in items if item.truth["word"] == word)
    return metrics | {
        "flip consistency": flip_consistency(items),
        "strict": mean(item.truth["strict"] for item in items),
        "neither word": mean(not item.correct and not item.truth["opposite"] for item in items),
        "questions": len(items),
    }


TASKS = {
    "coco-spatial": Task(
        read_coco_spatial, judge_spatial, coco_spatial_metrics, (PROMPT,), "questions: the authors' coco_spatial.json",
    )
}  # fmt: skip
