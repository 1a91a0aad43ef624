"""Read the files of benchmarks: rows of JSON or JSON lines, joined by id, and images under the names that they go by.

In all functions, `expected` describes the right file, for error messages.
"""

import json
import re
from pathlib import Path

from formats.files import require_file, some
from formats.images import has_image
from formats.schema import leaves_folder


def read_rows(path, expected):
    """Read JSON or JSON lines, whatever the file's name ends in. A file of one row is a list of one."""
    path = require_file(path, expected)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        is_row = isinstance(content, dict) and not {"question_id", "expression"}.isdisjoint(content)
        return [content] if is_row else content
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}); it should be {expected}") from None
    except json.JSONDecodeError:
        rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON text may hold U+2028
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is neither JSON nor JSON lines (line {number}: {error}); was its download cut short? It should be "
                f"{expected}"
            ) from None
    return rows


def read_lines(path, keys):
    """Read JSON lines whose values under `keys` are strings."""
    rows = []
    for number, line in enumerate(require_file(path, "JSON lines").read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
            is_valid = all(isinstance(rows[-1][key], str) for key in keys)
        except (json.JSONDecodeError, TypeError, KeyError, IndexError):
            is_valid = False
        if not is_valid:
            raise ValueError(f"{path}: line {number} is {line[:80]}, not JSON with strings under {', '.join(keys)}")
    return rows


def rows_by_id(rows, path, key, needs, expected):
    """Return {id as text: row}. Raise ValueError for rows of another schema or a repeated id. needs: {key: its type}"""
    if not isinstance(rows, list) or not rows:
        content = f"a JSON {type(rows).__name__}" if rows else "nothing"
        raise ValueError(f"{path} holds {content}; it should be {expected}")
    found = {}
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in needs.items()):
            raise ValueError(
                f"{path}: row {index} is {str(row)[:120]}; is this another file? It should be {expected}: "
                f"rows with {', '.join(needs)}"
            )
        if str(row[key]) in found:
            raise ValueError(f"{path} has {key} {row[key]} twice; are two files in one?")
        found[str(row[key])] = row
    return found


def list_under(content, key, path, expected):
    """Return the list under a key of a file's content."""
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{path} has no list {key!r}; is this another file? It should be {expected}")
    return content[key]


def match_answers(questions, answers, path, answers_path):
    """Return {id: answer} of all questions, and how many answers have no question. Raise ValueError if an answer is missing."""
    missing = [name for name in questions if name not in answers]
    if missing:
        raise ValueError(
            f"{answers_path} has no answer to {len(missing)} of the {len(questions)} questions of {path} ({some(missing)}); "
            "do the two files belong together?"
        )
    return {name: answers[name] for name in questions}, len(answers) - len(questions)


def find_image(images, *names):
    """Return an image's path in a folder or zip, by the first of its possible names that exists, else by the first name."""
    if any(leaves_folder(name) for name in names):
        raise ValueError(f"the image name {names[0]} leads out of {images}; correct the file of questions")
    paths = [Path(images) / name for name in names]
    return next((path for path in paths if has_image(path)), paths[0])


def coco_names(file_name, folder):
    """Return a COCO image's possible names: its own, inside its year's folder, and its number alone (as in 2017).

    >>> coco_names("COCO_val2014_000000000042.jpg", "val2014")[1:]
    ('val2014/COCO_val2014_000000000042.jpg', '000000000042.jpg')
    """
    number = re.search(r"\d{12}\.jpg$", file_name)
    return file_name, f"{folder}/{file_name}", number[0] if number else file_name
