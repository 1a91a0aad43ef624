"""COCO-Spatial as its authors released it (Tab. 4 has the paper's own rule: `evaluate.py --task spatial`).

Files      coco_spatial.json, from github.com/kahnchana/locvlm; COCO's val2014
Questions  "Which side of the dog is the cat?" for each of the file's pairs (left object, right object) that do not overlap and
           whose categories the image has once. The answer is always right, so each is also asked of the mirror image
Score      the right word is in the answer; strict: and its opposite is not
Run        python -m tasks coco-spatial runs/b2 --questions coco_spatial.json --images val2014
    >>> item = Item("9:0-1", None, None, "Which side of the dog is the cat?", {"word": "right"}, "To the left or right.")
    >>> judge_spatial(item, None); item.correct, item.measured["strict"]
    (True, False)
"""

from collections import Counter

from evaluate import Item, Task, flip_consistency, judge_spatial, mean, mirror
from formats.schema import try_box
from tasks.files import Rows, find_image, read_rows

PROMPT = "Which side of the {obj_1} is the {obj_2}?"  # of the released code; App. E words it otherwise
FILE = "the authors' coco_spatial.json"
CATEGORIES = Rows(FILE, {"id": int, "name": str}, "categories")
IMAGES = Rows(FILE, {"file_name": str}, "data")


def read_coco_spatial(args, wording):
    content, items, skipped = read_rows(args.questions, FILE), [], Counter()
    entries, categories = IMAGES.read(args.questions, content), CATEGORIES.read(args.questions, content)
    names = {row["id"]: row["name"] for row in categories.values()}
    for image_id, entry in entries.items():
        try:
            annotations, size = entry["annotations"], (int(entry["width"]), int(entry["height"]))
            objects = [(names[annotation["category_id"]], annotation.get("bbox")) for annotation in annotations]
            pairs = [(left, right, objects[left], objects[right]) for left, right in entry.get("good_pairs") or ()]
        except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
            needs = "width, height, annotations and good_pairs that point into them"
            raise ValueError(f"{args.questions}: image {image_id} is invalid ({error!r}); it needs {needs}") from None
        if not pairs:
            skipped["images without pairs"] += 1
            continue
        path, count = find_image(args.images, entry["file_name"], "val2014"), Counter(name for name, _ in objects)
        for left, right, (name_1, bbox_1), (name_2, bbox_2) in pairs:
            boxes_px = [try_box(bbox, size, skipped, "pairs") for bbox in (bbox_1, bbox_2)]
            if None in boxes_px:
                continue
            if count[name_1] > 1 or count[name_2] > 1:
                skipped["pairs of a category that the image has twice"] += 1
            elif boxes_px[0][2] >= boxes_px[1][0]:
                skipped["pairs that are not left and right of each other"] += 1
            else:
                truth, question = {"word": "right", "boxes_px": boxes_px}, PROMPT.format(obj_1=name_1, obj_2=name_2)
                items.append(Item(f"{image_id}:{left}-{right}", path, size, question, truth))
                items.append(mirror(items[-1]))
    return items, skipped


def coco_spatial_metrics(items):
    right, left = (mean(item.correct for item in items if item.truth["word"] == word) for word in ("right", "left"))
    metrics = {"accuracy": mean(item.correct for item in items), "right (the image)": right, "left (its mirror image)": left}
    metrics |= {"flip consistency": flip_consistency(items), "strict": mean(item.measured["strict"] for item in items)}
    metrics["neither word"] = mean(not item.correct and not item.measured["opposite"] for item in items)
    return metrics | {"questions": len(items)}


TASKS = {"coco-spatial": Task(read_coco_spatial, judge_spatial, coco_spatial_metrics, (PROMPT,), f"questions: {FILE}")}
