"""How answers in words are compared with the truth: by VQA's annotators, METEOR, a language model (Tab. 5, 6, 10).

A file of its own because nothing here knows of images, boxes or question files: words go in, a score comes out.
"""

import ast
import http.client
import json
import math
import re
import shutil
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
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


# ----- a language model as judge, in Video-ChatGPT's protocol

JUDGE_SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for question-answer pairs. "
    "Your task is to compare the predicted answer with the correct answer and determine if they match meaningfully. "
    "Here's how you can accomplish the task:------##INSTRUCTIONS: "
    "- Focus on the meaningful match between the predicted answer and the correct answer.\n"
    "- Consider synonyms or paraphrases as valid matches.\n"
    "- Evaluate the correctness of the prediction compared to the answer."
)
JUDGE_USER = (
    "Please evaluate the following video-based question-answer pair:\n\n"
    "Question: {question}\nCorrect Answer: {truth}\nPredicted Answer: {answer}\n\n"
    "Provide your evaluation only as a yes/no and score where the score is an integer value between 0 and 5, with 5 indicating "
    "the highest meaningful match. Please generate the response in the form of a Python dictionary string with keys 'pred' and "
    "'score', where value of 'pred' is  a string of 'yes' or 'no' and value of 'score' is in INTEGER, not STRING."
    "DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary string. "
    "For example, your response should look like this: {{'pred': 'yes', 'score': 4.8}}."
)
SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's way to ask for short answers
LONGEST_REPLY = 10_000  # characters of a judge's reply; a longer one is no dictionary


def judge_requests(items, model="gpt-3.5-turbo"):
    """Make a judge's requests of answered items: rows of OpenAI's batch format, one an item, to be written as JSON lines."""
    return [
        {
            "custom_id": item.id,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": model,
                "messages": [
                    {"role": "system", "content": JUDGE_SYSTEM},
                    {
                        "role": "user",
                        "content": JUDGE_USER.format(
                            question=item.question.removesuffix(SHORT), truth=item.truth["answer"], answer=item.answer
                        ),
                    },
                ],
            },
        }
        for item in items
    ]


def reply_of(row):
    """What the judge said in a row of OpenAI's batch output; None where the row says that the request failed."""
    try:
        content = row["response"]["body"]["choices"][0]["message"]["content"]
    except (KeyError, TypeError, IndexError):
        return None
    return content if isinstance(content, str) else ""


def parse_judgement(reply):
    """Read {'pred': 'yes', 'score': 4} in a judge's reply: (right?, score 0..5), or None where it is nothing of the kind.

    As in Video-ChatGPT, 4.8 is 4. A fence around the dictionary is forgiven.

    >>> parse_judgement("{'pred': 'yes', 'score': 4.8}"), parse_judgement("Yes, 5"), parse_judgement("{'pred': 'no', 'score': 9}")
    ((True, 4), None, None)
    """
    start, end = reply.find("{"), reply.rfind("}")
    if start < 0 or len(reply) > LONGEST_REPLY:
        return None
    try:
        said = ast.literal_eval(reply[start : end + 1])
        pred, score = said["pred"].lower(), int(said["score"])
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, OverflowError, MemoryError, RecursionError):
        return None
    if not 0 <= score <= 5 or not ("yes" in pred or "no" in pred):
        return None
    return "yes" in pred, score


def read_judgements(rows, items):
    """Join a judge's replies to items by id and count: {name: share or count}. Sets item.truth["judged"] where it is parsable.

    rows  of OpenAI's batch output, as `ask_judge` gives them: custom_id, response.body.choices
    Accuracy and score are over what could be parsed; what could not, and what has no reply, is counted beside them.
    Raises ValueError for an id that no item has, or that comes twice.
    """
    by_id, replies = {item.id: item for item in items}, {}
    for index, row in enumerate(rows):
        name = row.get("custom_id") if isinstance(row, dict) else None
        if name not in by_id:
            raise ValueError(
                f"judgement {index} has custom_id {str(name)[:80]!r}, which no question has; expected replies to this run's "
                "requests; were they made of another run?"
            )
        if replies.get(name) is not None and reply_of(row) is not None:
            raise ValueError(f"custom_id {name} comes twice among the judgements; expected once; keep one of them")
        replies[name] = (
            reply_of(row) if replies.get(name) is None else replies[name]
        )  # a failed request may come before
    said = {name: parse_judgement(reply) for name, reply in replies.items() if reply is not None}
    judged = {name: told for name, told in said.items() if told}
    for name, (right, score) in judged.items():
        by_id[name].truth["judged"] = {"right": right, "score": score}
    count = len(judged)
    rights, points = (sum(told) for told in zip(*judged.values(), strict=True)) if judged else (math.nan, math.nan)
    return {
        "judge accuracy": rights / max(1, count),
        "judge score, as a share of 5": points / 5 / max(1, count),
        "judged": count,
        "judge unparsable": len(said) - count,
        "judge missing": len(items) - len(said),
    }


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirection: the key would go along."""

    def redirect_request(self, *args):
        return None


def ask_judge(url, key, model, items, done=(), workers=4, retries=5, wait=1.0, timeout=60):
    """Ask an OpenAI-compatible endpoint to judge answered items: yields rows as `read_judgements` reads them, as they come.

    url    up to and without /chat/completions: https://api.openai.com/v1
    key    sent as a bearer token; None for a server of one's own that wants none
    done   rows that are there already: what they answer is not asked again
    A request is tried `retries` times, after waits of `wait` seconds and twice as long each time, at most a minute; what
    the endpoint refuses for good (a wrong key, an unknown model) is not tried again. Raises ValueError.
    """
    if key and not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            "the judge's key holds blanks or line ends; expected one word of ASCII; set OPENAI_API_KEY anew"
        )
    opener = urllib.request.build_opener(NoRedirect)
    answered = {row["custom_id"] for row in done if reply_of(row) is not None}
    url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    if not re.match(r"https?://", url):
        raise ValueError(f"judge's address {url}; expected http:// or https://; write it whole")

    def ask(row):
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(url, json.dumps(row["body"]).encode(), headers)
        for attempt in range(retries):
            if attempt:
                time.sleep(min(60, wait * 2 ** (attempt - 1)))
            try:
                with opener.open(request, timeout=timeout) as response:
                    body = json.load(response)
                told = {"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}}
                if reply_of(told) is not None:
                    return told
                problem = f"a reply without choices: {str(body)[:200]}"
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise ValueError(
                        f"{url} answers {problem}; expected a judgement; check address, key and model"
                    ) from None
            # no connection, no time, half a reply, no JSON
            except (OSError, ValueError, http.client.HTTPException) as error:
                problem = repr(error)
        raise ValueError(
            f"{url}: no judgement of {row['custom_id']} in {retries} tries ({problem}); expected one; run again later: what "
            "is answered is not asked again"
        )

    def attempt(row):
        try:
            return None if failures else ask(row)
        except ValueError as error:
            failures.append(error)

    failures, pool = [], ThreadPoolExecutor(workers)
    wanted = [row for row in judge_requests(items, model) if row["custom_id"] not in answered]
    try:
        for done in as_completed([pool.submit(attempt, row) for row in wanted]):
            if told := done.result():  # what was under way when another failed is kept
                yield told
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        raise failures[0]
