"""Count left and right in training conversations (App. F, Tab. 14).

    python -m tools.keywords llava_instruct_80k.json

Sec. 4.2 divides by question and answer turns (0.37 % and 1.13 % for left and right), App. F by conversations (2.02 % and
6.25 %): both are printed.
"""

import argparse
import math
import re
import sys

from tasks.files import read_rows

PHRASES = ("{}", "the {}", "{} side", "to the {}")


def read_talk(path):
    """Read conversations as lists of texts, one per turn: LLaVA's JSON, or its JSON lines of instruction and output."""
    rows, talks = read_rows(path, "LLaVA's conversations"), []
    for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
        try:
            if "conversations" in row:
                talks.append([turn["value"] for turn in row["conversations"]])
            else:
                talks.append([row["instruction"], row["output"]])
            if not all(isinstance(text, str) for text in talks[-1]):
                raise TypeError
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}: row {index} is {str(row)[:120]}, without conversations, or instruction and output"
            ) from None
    return talks


def keywords(talks):
    """Count whole phrases, in any case: {phrase: (conversations that contain it, share of conversations, of turns)}."""
    texts, turns = ["\n".join(talk).lower() for talk in talks], sum(map(len, talks))
    table = {}
    for phrase in (pattern.format(side) for pattern in PHRASES for side in ("left", "right")):
        count = sum(bool(re.search(rf"\b{phrase}\b", text)) for text in texts)
        table[phrase] = (count, *(count / total if total else math.nan for total in (len(texts), turns)))
    return table


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="LLaVA-format JSON")
    args = parser.parse_args(argv)
    talks = read_talk(args.file)
    print(f"{args.file}: {len(talks)} conversations, {sum(map(len, talks))} turns")
    print(f"{'phrase':16}{'conversations':>14}{'% of them':>12}{'% of turns':>12}")
    for phrase, (count, of_talks, of_turns) in keywords(talks).items():
        print(f"{phrase:16}{count:14d}{100 * of_talks:12.2f}{100 * of_turns:12.3f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"tools.keywords: {error}")
