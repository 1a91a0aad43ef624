"""How answers in words are compared with the truth: by VQA's annotators, METEOR, a language model (Tab. 5, 6, 10).

A file of its own because nothing here knows of images, boxes or question files: words go in, a score comes out.
"""

import re
import shutil
from collections import Counter
from importlib.util import find_spec

# ----- words


def spaced(text):
    """Lower-case words and numbers of a text, a space on each side of each: what is inside what is then a plain search.

    >>> spaced("It's a Dog."), spaced("...")
    (' it s a dog ', ' ')
    """
    return "".join(f" {word}" for word in re.findall(r"\w+", text.lower())) + " "


def same_words(answer, truth):
    """Say whether an answer is the truth, but for case and punctuation; what is punctuation alone is compared as it is."""
    return answer.strip() == truth.strip() if spaced(truth) == " " else spaced(answer) == spaced(truth)


def contains(answer, truth):
    """Say whether the truth's words stand in an answer, whole and in a row. "Yes and no" contains both.

    >>> contains("The man is left-handed.", "left"), contains("leftover", "left"), contains("a", "?")
    (True, False, False)
    """
    return spaced(truth) != " " and spaced(truth) in spaced(answer)


# ----- VQAv2: ten annotators


PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # and "." apart
NUMBERS = {"none": "0"} | {
    word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
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
# what lacks one apostrophe gets it back; the last one is the official table's own slip
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in APOSTROPHES for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_normal(text):
    """Normalise an answer as the official VQA evaluation does, slips included.

    A mark is deleted if it has a space beside it somewhere, or if the text has a comma between digits; else it becomes a
    space. A full stop goes unless a digit follows (the look-behind is misspelt there and says nothing), and only the first
    32 go: re.UNICODE is passed as their count.

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
    """Score an answer against the annotators': (official, the same with `contains` for equality), each 0..1.

    The mean over the annotators of min(1, matches among the others / 3). Where all annotators agree, nothing is normalised,
    not even case, as in the official evaluation. Time is linear in the answer's length.
    """
    said, *told = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *answers))
    if len(set(told)) > 1:
        said, told = vqa_normal(said), [vqa_normal(text) for text in told]
    count, inside = Counter(told), spaced(said)

    def score(matching):
        total = sum(count[text] for text in matching)
        return (total * min(1, (total - 1) / 3) + (len(told) - total) * min(1, total / 3)) / len(told)

    found = [text for text in count if spaced(text) != " " and spaced(text) in inside]
    return score([text for text in count if text == said]), score(found)


# ----- METEOR


LONGEST_ANSWER = 1000  # words: METEOR's search for matches takes minutes over a book


def require_meteor():
    """Refuse, before anything is asked, where METEOR could not be computed."""
    lacking = [
        what
        for what, there in (("pycocoevalcap", find_spec("pycocoevalcap")), ("java", shutil.which("java")))
        if not there
    ]
    if lacking:
        raise ValueError(
            f"no {' and no '.join(lacking)}; expected both: METEOR 1.5 is a Java program that pycocoevalcap carries; "
            "pip install pycocoevalcap, and install Java 1.8 or later"
        )


def meteor(said, sentences):
    """METEOR 1.5 of answers as a whole, 0..1, as RefCOCO's own evaluation has it: PTB tokens, lower case, `-norm`.

    said       list of {id: answer}, each scored for itself; an empty answer counts as 0. Gives a list of scores.
    sentences  {id: references}, the same ids
    The score is METEOR's of the summed matches, not a mean over answers. White space of every kind is one space before:
    the tokenizer works by lines, and one more of them would shift all that follow. Of an answer, the first LONGEST_ANSWER
    words are read; half of a character, which no file can hold, is "?".
    """
    require_meteor()
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    told = {("truth", name): texts for name, texts in sentences.items()}
    told |= {
        (i, name): [answers[name].encode(errors="replace").decode()]
        for i, answers in enumerate(said)
        for name in sentences
    }
    rows = {
        key: [{"caption": " ".join(text.replace("|||", " ").split()[:LONGEST_ANSWER])} for text in texts]
        for key, texts in told.items()
    }
    tokens, java = PTBTokenizer().tokenize(rows), Meteor()
    references = {name: tokens["truth", name] for name in sentences}
    return [java.compute_score(references, {name: tokens[i, name] for name in sentences})[0] for i in range(len(said))]


SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's way to ask for short answers
