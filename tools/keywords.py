"""TODO tools.keywords."""

import argparse
import math
import re
import sys

from tasks.files import read_rows
from tasks.refcoco import convert_refs

# ----- left and right in training conversations (App. F)

PHRASES = ("{}", "the {}", "{} side", "to the {}")


def read_talk(path):
    """Read conversations as lists of texts, one a turn: LLaVA's JSON, or its JSON lines of instruction and output."""
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
                f"{path}: row {index} is {str(row)[:120]}; expected conversations, or instruction and output; convert it"
            ) from None
    return talks


def keywords(talks):
    """Count the paper's phrases (Tab. 14): {phrase: (conversations that have it, share of conversations, of turns)}.

    talks  conversations, each a list of its questions and answers
    Whole words, in any case. Sec. 4.2 parts the same counts by question and answer turns (0.37 % and 1.13 % for left and
    right), App. F by conversations (2.02 % and 6.25 %): both are given.
    """
    texts, turns = ["\n".join(talk).lower() for talk in talks], sum(map(len, talks))
    table = {}
    for phrase in PHRASES:
        for side in ("left", "right"):
            said = phrase.format(side)
            count = sum(bool(re.search(rf"\b{said}\b", text)) for text in texts)
            table[said] = (
                count,
                count / len(texts) if texts else math.nan,
                count / turns if turns else math.nan,
            )
    return table


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("refs", help="make RefCOCO's pickle JSON, with its boxes")
    sub.add_argument("pickle", help="refs(unc).p, refs(umd).p")
    sub.add_argument("out", help="JSON to write")
    sub.add_argument("--instances", help="instances.json (default: beside the pickle)")
    sub = commands.add_parser("keywords", help="count left and right in conversations")
    sub.add_argument("file", help="LLaVA-format JSON")
    args = parser.parse_args(argv)
    if args.command == "refs":
        print(f"{args.out}: {convert_refs(args.pickle, args.out, args.instances)} refs")
        return
    talks = read_talk(args.file)
    print(f"{args.file}: {len(talks)} conversations, {sum(map(len, talks))} turns")
    print(f"{'phrase':16}{'conversations':>14}{'% of them':>12}{'% of turns':>12}")
    for phrase, (count, of_talks, of_turns) in keywords(talks).items():
        print(f"{phrase:16}{count:14d}{100 * of_talks:12.2f}{100 * of_turns:12.3f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"benchmarks.py: {error}")
