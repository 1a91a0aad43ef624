"""TODO tasks.files."""

import json
import re
from pathlib import Path

from formats.clips import is_clip
from formats.files import require_file, some
from formats.images import has_image
from formats.schema import leaves
from tasks.words import SHORT

# ----- benchmarks: items from their original files


def read_rows(path, expected):
    """Read a benchmark's file: JSON, or JSON lines, whatever it is named. A single row is a list of one."""
    path = require_file(path, expected)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        alone = isinstance(content, dict) and not {"question_id", "expression"}.isdisjoint(content)
        return [content] if alone else content
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); expected {expected}; check the file") from None
    except json.JSONDecodeError:
        rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON text may hold U+2028
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is neither JSON nor JSON lines (line {number}: {error}); expected {expected}; was its download "
                "cut short?"
            ) from None
    return rows


def keyed(rows, path, key, needs, expected):
    """Give rows by their id as text; refuse another schema, and an id that comes twice. needs: {key: its type}"""
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"{path} holds {f'a JSON {type(rows).__name__}' if rows else 'nothing'}; expected {expected}; check it"
        )
    found = {}
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in needs.items()):
            raise ValueError(
                f"{path}: row {index} is {str(row)[:120]}; expected {expected}: rows with {', '.join(needs)}; is this "
                "another file?"
            )
        if str(row[key]) in found:
            raise ValueError(f"{path} has {key} {row[key]} twice; expected each once; are two files in one?")
        found[str(row[key])] = row
    return found


def listed(content, key, path, expected):
    """Give the list under a key of a file's content."""
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{path} has no list {key!r}; expected {expected}; is this another file?")
    return content[key]


def joined(questions, answers, path, answers_path):
    """Say of each question what its answer is, by id; refuse where one has none. Gives also how many answers are left over."""
    lacking = [name for name in questions if name not in answers]
    if lacking:
        raise ValueError(
            f"{answers_path} has no answer to {len(lacking)} of the {len(questions)} questions of {path} ({some(lacking)}); "
            "expected one for each, by id; do the two files belong together?"
        )
    return {name: answers[name] for name in questions}, len(answers) - len(questions)


def find_image(images, *names):
    """Find an image in a folder or a zip under the first of its names that is there, else give the path of the first name."""
    if any(leaves(name) for name in names):
        raise ValueError(f"{names[0]} leads out of {images}; expected a name inside it; correct the file that says so")
    paths = [Path(images) / name for name in names]
    return next((path for path in paths if has_image(path)), paths[0])


def coco_names(file_name, folder):
    """The names that a COCO image goes by on disk: as it is called, in its year's folder, or with its number alone (2017)."""
    number = re.search(r"\d{12}\.jpg$", file_name)
    return file_name, f"{folder}/{file_name}", number[0] if number else file_name


def require_images(paths, source, images):
    """Refuse where an image or clip that the file `source` asks about is not in the folder or zip `images`."""
    paths = dict.fromkeys(path for path in paths if path)
    missing = [path.name for path in paths if not (path.exists() if is_clip(path) else has_image(path))]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(paths)} images of {source} are not in {images} ({some(missing)}); expected all of "
            "them, in that folder or zip; check it, or complete the download"
        )


def asked_of(items, source, images):
    """Give a reader's items; refuse where there is nothing to ask, or an image is missing."""
    if not items:
        raise ValueError(f"{source} gives no question; expected some; is this the right file, or split?")
    require_images((item.image for item in items), source, images)
    return items


def asked_short(question, short):
    """A question with LLaVA-1.5's request for a short answer behind it, or without."""
    return question.removesuffix(SHORT) + SHORT * short
