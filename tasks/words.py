"""Compare answers in words with the truth: exact match, VQA's ten annotators, METEOR (Tab. 5, 6, 10)."""

import re
import shutil
from collections import Counter
from importlib.util import find_spec

from evaluate import mean
from tasks.files import FOLDER

SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's request for a short answer
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # and "." apart
NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
CONTRACTIONS = dict(line.split() for line in (FOLDER / "contractions.txt").read_text("utf-8").splitlines())  # dont: don't
LONGEST_ANSWER = 1000  # words that METEOR reads: its search for matches takes minutes over a book


def add_short(question, short):
    """Return a question with LLaVA-1.5's request for a short answer, or without."""
    return question.removesuffix(SHORT) + SHORT * short


def spaced(text):
    """Return the words and numbers of a text in lower case, each with a space on both sides, so that `in` finds whole words.

    >>> spaced("It's a Dog."), spaced("...")
    (' it s a dog ', ' ')
    """
    return "".join(f" {word}" for word in re.findall(r"\w+", text.lower())) + " "


def same_words(answer, truth):
    """Return True if an answer is the truth, ignoring case and punctuation (unless the truth is punctuation alone)."""
    return answer.strip() == truth.strip() if spaced(truth) == " " else spaced(answer) == spaced(truth)


def contains(answer, truth):
    """Return True if the truth's words are in an answer, whole and next to each other. "Yes and no" contains both.

    >>> contains("The man is left-handed.", "left"), contains("leftover", "left"), contains("a", "?")
    (True, False, False)
    """
    return spaced(truth) != " " and spaced(truth) in spaced(answer)


def exact_metrics(items):
    """Count exact match and `contains` over all items and, if questions have a type, over each type."""
    kinds, metrics = sorted({item.truth["type"] for item in items if "type" in item.truth}), {}
    groups = {"": items} | {f", {kind}": [i for i in items if i.truth.get("type") == kind] for kind in kinds}
    for name, group in groups.items():
        metrics[f"exact match{name}"] = mean(item.correct for item in group)
        metrics[f"contains{name}"] = mean(item.truth["contains"] for item in group)
    return metrics | {"questions": len(items)}


def vqa_normal(text):
    """Normalise an answer as the official VQA evaluation does, mistakes included.

    A mark is deleted if it has a space beside it somewhere, or if the text has a comma between digits; else it becomes a space.
    Full stops before no digit are deleted, the first 32 only: re.UNICODE is passed as the count.

    >>> vqa_normal("The Two-way street."), vqa_normal("1,000 dont"), vqa_normal("3.5")
    ('2 way street', "1000 don't", '3.5')
    """
    text = out = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if has_comma or f"{mark} " in text or f" {mark}" in text else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out, count=32).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_scores(answer, answers):
    """Score an answer against the annotators': (official score, the same score if containing counts as a match), each 0..1.

    The mean over the annotators of min(1, matches among the others / 3). If all agree, nothing is normalised, not even case, as
    in the official evaluation. The time is linear in the answer's length.

    >>> vqa_scores("cat", ["cat"] * 3 + ["dog"] * 7)  # three annotators have two others who agree, seven have three
    (0.9, 0.9)
    """
    answer, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *answers))
    if len(set(answers)) > 1:
        answer, answers = vqa_normal(answer), [vqa_normal(text) for text in answers]
    count, words = Counter(answers), spaced(answer)

    def score(matching):
        total = sum(count[text] for text in matching)
        return (total * min(1, (total - 1) / 3) + (len(answers) - total) * min(1, total / 3)) / len(answers)

    return score({answer}), score(text for text in count if spaced(text) != " " and spaced(text) in words)


def require_meteor():
    """Raise ValueError, before any question is answered, if METEOR cannot be computed."""
    missing = [] if find_spec("pycocoevalcap") else ["pycocoevalcap"]
    missing += [] if shutil.which("java") else ["java"]
    if missing:
        fix = "pip install pycocoevalcap, and install Java 1.8 or later"
        raise ValueError(f"no {' and no '.join(missing)}: METEOR 1.5 is a Java program inside pycocoevalcap; {fix}")


def meteor(answers, sentences):
    """Compute METEOR 1.5, 0..1, as RefCOCO's own evaluation does: PTB tokens, lower case, `-norm`. Return a list of scores.

    answers    list of {id: answer}, each scored by itself: METEOR's of all matches together, not a mean over answers
    sentences  {id: references}, the same ids
    """
    require_meteor()
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def row(text):  # one line, or all that follow would shift; half of a surrogate pair, which no file can hold, becomes "?"
        text = text.encode(errors="replace").decode().replace("|||", " ")
        return {"caption": " ".join(text.split()[:LONGEST_ANSWER])}

    texts = {("reference", name): references for name, references in sentences.items()}
    texts |= {(i, name): [by_id[name]] for i, by_id in enumerate(answers) for name in sentences}
    tokens, java = PTBTokenizer().tokenize({key: list(map(row, texts[key])) for key in texts}), Meteor()
    references = {name: tokens["reference", name] for name in sentences}
    return [java.compute_score(references, {name: tokens[i, name] for name in sentences})[0] for i in range(len(answers))]
