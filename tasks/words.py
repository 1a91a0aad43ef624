"""Compare answers in words with the truth: exact match, VQA's ten annotators, METEOR (Tab. 5, 6, 10)."""

import re
import shutil
from importlib.util import find_spec

from evaluate import mean
from tasks.files import FOLDER

SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's request for a short answer
PROMPTS = ("{question}",)  # the file's own text
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # and "." apart
REPLACED = dict(line.split() for line in (FOLDER / "vqa_words.txt").read_text("utf-8").splitlines())  # two: 2, dont: don't


def bare(question):
    """Return a question without the request for a short answer that the files of some releases hold."""
    return re.sub(rf"\s*{re.escape(SHORT.strip())}\s*$", "", question)


def add_short(question, short):
    return bare(question) + SHORT * short


def spaced(text):
    """Return " it s a dog " of "It's a Dog.": words between spaces, so that `in` finds whole words."""
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


def judge_exact(item, wording, is_same=same_words):
    """Judge by exact match. `contains` also counts answers in sentences."""
    item.correct = is_same(item.answer, item.truth["answer"])
    item.measured["contains"] = item.correct or contains(item.answer, item.truth["answer"])


def exact_metrics(items):
    """Count exact match and `contains` over all items and, if questions have a type, over each type."""
    metrics = {}
    for kind in [None, *sorted({item.truth["type"] for item in items if "type" in item.truth})]:
        group, name = [item for item in items if kind in (None, item.truth.get("type"))], f", {kind}" if kind else ""
        metrics[f"exact match{name}"] = mean(item.correct for item in group)
        metrics[f"contains{name}"] = mean(item.measured["contains"] for item in group)
    return metrics | {"questions": len(items)}


def vqa_normal(text):
    """Normalise an answer as the official VQA evaluation does, mistakes included: "The Two-way street." -> "2 way street"."""
    text = out = text.replace("\n", " ").replace("\t", " ").strip()
    has_comma = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:  # deleted if it has a space beside it somewhere, or if the text has a comma between digits
        out = out.replace(mark, "" if has_comma or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # officially, re.UNICODE is passed as the count
    return " ".join(REPLACED.get(word, word) for word in out.lower().split() if word not in ("a", "an", "the"))


def vqa_scores(answer, answers):
    """Score an answer by the annotators', 0..1: (official score, the same score if containing counts as a match)."""
    answer, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *answers))
    if len(set(answers)) > 1:  # else nothing is normalised, not even case
        answer, answers = vqa_normal(answer), [vqa_normal(text) for text in answers]

    def score(matching):  # of each annotator: how many of the others match?
        total = sum(text in matching for text in answers)
        return (total * min(1, (total - 1) / 3) + (len(answers) - total) * min(1, total / 3)) / len(answers)
    return score({answer}), score({text for text in set(answers) if contains(answer, text)})


def require_meteor():
    """Raise ValueError, before any question is answered, if METEOR cannot be computed."""
    if not (find_spec("pycocoevalcap") and shutil.which("java")):
        raise ValueError("METEOR 1.5 is a Java program in a package: pip install pycocoevalcap, and install Java 1.8 or later")


def meteor(answers, sentences):
    """Compute METEOR 1.5, 0..1, of all {id: answer} and {id: sentences}, as RefCOCO's own evaluation: PTB tokens, `-norm`."""
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def plain(text):  # officially, references lose what is not ASCII: man’s -> mans
        return row(text.encode("ascii", "ignore").decode())

    def row(text):  # one line, or all that follow would shift; half of a surrogate pair, which no file can hold, becomes "?"
        words = text.encode(errors="replace").decode().replace("|||", " ").split()
        return {"caption": " ".join(words[:1000])}  # METEOR's search for matches takes minutes over a book
    references = PTBTokenizer().tokenize({name: list(map(plain, texts)) for name, texts in sentences.items()})
    return Meteor().compute_score(references, PTBTokenizer().tokenize({name: [row(answers[name])] for name in sentences}))[0]
