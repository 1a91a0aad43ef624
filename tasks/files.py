"""Read the files of benchmarks: rows of JSON, JSON lines, tables or parquet, joined by id, and images under their names."""

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from formats import files
from formats.files import naming, read_text, require_file, some
from formats.images import has_image
from formats.parquet import is_parquet, read_parquet
from formats.schema import leaves_folder

FOLDER = Path(__file__).parent  # also holds texts
ROW_KEYS = {"question_id", "questionId", "expression", "caption", "id", "custom_id"}  # a row has one, a dictionary of rows none


def read_rows(path, expected):
    """Read JSON, JSON lines, parquet, or a table with a header (.csv, .tsv, .txt). expected: what the file should be"""
    if is_parquet(path):
        return read_parquet(path)
    if Path(path).suffix.lower() not in (".csv", ".tsv", ".txt"):
        content = files.read_rows(path, expected)
        return [content] if isinstance(content, dict) and ROW_KEYS & content.keys() else content
    text = read_text(require_file(path, expected))
    # between tabs, a quotation mark is a part of the text
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if "\t" in text.partition("\n")[0] else {"strict": True}
    with naming(path, csv.Error):
        return list(csv.DictReader(io.StringIO(text, newline=""), **style))


def keys_of(content):
    """Return the keys of the first of a list of rows, which tell one kind of file from another."""
    are_rows = isinstance(content, list) and content and all(isinstance(row, dict) for row in content)
    return content[0].keys() if are_rows else set()


def of_split(rows, key, args):
    """Return the rows of the split that --split names, or all if they are of one. Raise ValueError if it is unclear which."""
    splits = Counter(row.get(key) for row in rows)
    if args.split is None and len(splits) > 1 or args.split is not None and args.split not in splits:
        names = ", ".join(f"{name} ({count})" for name, count in splits.items())
        raise ValueError(f"{args.questions} has the splits {names}; choose one of them with --split")
    return [row for row in rows if args.split in (None, row.get(key))]


@dataclass(frozen=True)
class Rows:
    """A kind of file with rows, a list or a dictionary {id: row}, and what is required of them."""
    file: str  # its description, for error messages
    needs: dict  # {key that each row needs: type}; "a|b": the first of these that any row has. The first key holds a row's id
    under: str | None = None  # key of the rows, if they are a part of the file

    def keys_in(self, rows):
        """Return {key: type} of `needs`, with the alternatives that the rows have."""
        held = {key for row in rows if isinstance(row, dict) for key in row}
        choices = {tuple(keys.split("|")): kind for keys, kind in self.needs.items()}
        return {next((key for key in keys if key in held), keys[-1]): kind for keys, kind in choices.items()}

    def read(self, path, content=None):
        """Return {id as text: row} of a file (or its content). Raise ValueError for rows of another schema or a repeated id."""
        rows = read_rows(path, self.file) if content is None else content
        if self.under:
            rows = rows.get(self.under) if isinstance(rows, dict) else None
        if not rows or not isinstance(rows, list | dict):
            what = f"rows under {self.under!r}" if self.under else "rows"
            raise ValueError(f"{path} has no {what}; is this another file? It should be {self.file}")
        found, needs = {}, self.keys_in(rows if isinstance(rows, list) else rows.values())
        key = next(iter(needs))
        for place, row in enumerate(rows) if isinstance(rows, list) else rows.items():
            if not isinstance(row, dict) or not all(isinstance(row.get(need), kind) for need, kind in needs.items()):
                wanted = f"is this another file? It should be {self.file}: rows with {', '.join(needs)}"
                raise ValueError(f"{path}: row {place} is {str(row)[:120]}; {wanted}")
            name = str(row[key] if isinstance(rows, list) else place)
            if name in found:
                raise ValueError(f"{path} has {key} {name} twice; are two files in one?")
            found[name] = row
        return found


def match_answers(questions, kind, args, left_over="answers to questions that are not asked"):
    """Return {id: row with the answer} of all questions, from --answers if given, and a Counter {left_over: other rows}."""
    if not args.answers and any(not isinstance(row.get("answer"), str | int) for row in questions.values()):
        raise ValueError(f"{args.questions} holds no answers, one text each; pass {kind.file} as --answers")
    answers = kind.read(args.answers) if args.answers else questions
    if missing := [name for name in questions if name not in answers]:
        problem = f"no answer to {len(missing)} of the {len(questions)} questions of {args.questions} ({some(missing)})"
        raise ValueError(f"{args.answers} has {problem}; do the two files belong together?")
    return {name: answers[name] for name in questions}, +Counter({left_over: len(answers) - len(questions)})  # + drops a 0


def find_image(images, name, folder="."):
    """Try an image's possible names in a folder or zip. Return the first path that exists, else that of the given name."""
    images = images or ""  # --score needs none
    number = re.sub(r".*(?=\d{12}\.jpg$)", "", name)  # of a COCO image: its name since 2017
    names = (name, f"{folder}/{name}", number, f"{Path(name).stem}.png")  # .png: the shapes world's
    if any(map(leaves_folder, names)):
        raise ValueError(f"the image name {name} leads out of {images}; correct the file of questions")
    paths = [Path(images) / name for name in names]
    return next(filter(has_image, paths), paths[0])
