"""Compare answers in words with the truth: exact match, VQA's ten annotators, METEOR (Tab. 5, 6, 10)."""

import re
import shutil
from collections import Counter
from importlib.util import find_spec

from evaluate import mean

SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's request for a short answer


def add_short(question, short):
    """Return a question with LLaVA-1.5's request for a short answer, or without."""
    return question.removesuffix(SHORT) + SHORT * short


# ----- words


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
    metrics = {"exact match": mean(i.correct for i in items), "contains": mean(i.truth["contains"] for i in items)}
    for kind in sorted({item.truth["type"] for item in items if "type" in item.truth}):
        of_kind = [item for item in items if item.truth["type"] == kind]
        metrics[f"exact match, {kind}"] = mean(item.correct for item in of_kind)
        metrics[f"contains, {kind}"] = mean(item.truth["contains"] for item in of_kind)
    return metrics | {"questions": len(items)}


# ----- VQAv2: ten annotators

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # and "." apart
NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
""".split()
# a word without one of its apostrophes gets it back; "somebodyd" is the official table's own mistake
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in APOSTROPHES for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_normal(text):
    """Normalise an answer as the official VQA evaluation does, mistakes included.

    A mark is deleted if it has a space beside it somewhere, or if the text has a comma between digits; else it becomes a
    space. Full stops are deleted unless a digit follows (the official look-behind is misspelt and has no effect), but only
    the first 32: there, re.UNICODE is passed as the count.

    >>> vqa_normal("The Two-way street."), vqa_normal("1,000 dont"), vqa_normal("3.5")
    ('2 way street', "1000 don't", '3.5')
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    deleted = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if deleted or f"{mark} " in text or f" {mark}" in text else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    kept = [word for word in (NUMBERS.get(word, word) for word in out.lower().split()) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def vqa_scores(answer, answers):
    """Score an answer against the annotators': (official score, the same score if containing counts as a match), each 0..1.

    The score is the mean over the annotators of min(1, matches among the others / 3). If all annotators agree, nothing is
    normalised, not even case, as in the official evaluation. The time is linear in the answer's length.

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

    contained = [text for text in count if spaced(text) != " " and spaced(text) in words]
    return score([text for text in count if text == answer]), score(contained)


# ----- METEOR

LONGEST_ANSWER = 1000  # words: METEOR's search for matches takes minutes over a book


def require_meteor():
    """Raise ValueError, before any question is answered, if METEOR cannot be computed."""
    missing = [] if find_spec("pycocoevalcap") else ["pycocoevalcap"]
    missing += [] if shutil.which("java") else ["java"]
    if missing:
        raise ValueError(
            f"no {' and no '.join(missing)}: METEOR 1.5 is a Java program inside pycocoevalcap; "
            "pip install pycocoevalcap, and install Java 1.8 or later"
        )


def meteor(answers, sentences):
    """Compute METEOR 1.5, 0..1, as RefCOCO's own evaluation does: PTB tokens, lower case, `-norm`. Return a list of scores.

    answers    list of {id: answer}, each scored by itself; an empty answer counts as 0
    sentences  {id: references}, the same ids
    The score is METEOR's of all matches together, not a mean over answers. All white space becomes single spaces: the tokenizer
    reads lines, and an extra one would shift all that follow. Only the first LONGEST_ANSWER words of an answer count. Half of a
    surrogate pair, which no file can hold, becomes "?".
    """
    require_meteor()
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = {("reference", name): references for name, references in sentences.items()}
    for i, by_id in enumerate(answers):
        texts |= {(i, name): [by_id[name].encode(errors="replace").decode()] for name in sentences}
    rows = {
        key: [{"caption": " ".join(text.replace("|||", " ").split()[:LONGEST_ANSWER])} for text in some]
        for key, some in texts.items()
    }
    tokens, java = PTBTokenizer().tokenize(rows), Meteor()
    references = {name: tokens["reference", name] for name in sentences}
    return [java.compute_score(references, {name: tokens[i, name] for name in sentences})[0] for i in range(len(answers))]
