"""Count left and right in training conversations (App. F, Tab. 14).

    python -m tools.keywords llava_instruct_80k.json

Divides the conversations with a word by all turns (Sec. 4.2: 0.37 and 1.13 % for left and right) and by all conversations
(App. F: 2.02 and 6.25 %).

file  LLaVA-format JSON
"""

import math
import re

from tasks.files import read_rows
from tools import command


def read_talk(path):
    """Read conversations as lists of texts, one per turn: LLaVA's JSON, or its JSON lines of instruction and output."""
    rows, talks = read_rows(path, "LLaVA's conversations"), []
    for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
        try:
            has_turns = "conversations" in row
            talks.append([turn["value"] for turn in row["conversations"]] if has_turns else [row["instruction"], row["output"]])
            "".join(talks[-1])  # raises TypeError if one is not a text
        except (KeyError, TypeError):
            lacks = "without conversations, or instruction and output"
            raise ValueError(f"{path}: row {index} is {str(row)[:99]}, {lacks}") from None
    return talks


def keywords(talks):
    """Count whole phrases, in any case: {phrase: (conversations with it, these over all conversations, over all turns)}."""
    texts, turns, table = ["\n".join(talk).lower() for talk in talks], sum(map(len, talks)), {}
    for phrase in (pattern.format(side) for pattern in ("{}", "the {}", "{} side", "to the {}") for side in ("left", "right")):
        count = sum(bool(re.search(rf"\b{phrase}\b", text)) for text in texts)
        table[phrase] = (count, *(count / total if total else math.nan for total in (len(texts), turns)))
    return table


def print_keywords(file, /):
    talks = read_talk(file)
    print(f"{file}: {len(talks)} conversations, {sum(map(len, talks))} turns")
    print(f"{'phrase':16}{'conversations':>14}{'% of them':>12}{'% of turns':>12}")
    for phrase, (count, per_talk, per_turn) in keywords(talks).items():
        print(f"{phrase:16}{count:14d}{100 * per_talk:12.2f}{100 * per_turn:12.3f}")


main = command(__name__, print_keywords)
