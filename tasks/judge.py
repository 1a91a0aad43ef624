"""Let a language model judge answers about clips, by Video-ChatGPT's protocol (Tab. 6, 7).

Every run writes NAME.requests.jsonl, rows of OpenAI's batch format. --judgements reads the replies from a file; --judge-url
asks an OpenAI-compatible endpoint, and NAME.judgements.jsonl keeps each reply, so that no answer is judged twice.
"""

import ast
import hashlib
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

from tqdm import tqdm

from formats.files import write_rows
from formats.journal import open_journal, read_journal, write_line
from tasks.files import read_lines
from tasks.words import SHORT

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
LONGEST_REPLY = 10_000  # characters; a longer reply is no dictionary


def judge_answers(job, items, folder, args):
    """Judge all answers of a job, as the options say: (figures, who judged), or ({}, None) without a judge."""
    requests = judge_requests(items, args.judge_model)
    write_rows(folder / f"{job.name}.requests.jsonl", requests)
    if args.judgements:
        rows = read_lines(args.judgements, ("custom_id",))
        return read_judgements(rows, items), {"model": args.judge_model, "file": args.judgements}
    if not args.judge_url:
        return {}, None
    hashes = {row["custom_id"]: hashlib.sha256(json.dumps(row["body"]).encode()).hexdigest() for row in requests}
    path, key = folder / f"{job.name}.judgements.jsonl", os.environ.get("OPENAI_API_KEY")
    with open_journal(path) as journal:
        kept = [row for row in read_journal(path) if row.get("request") == hashes.get(row["custom_id"], "")]
        for row in tqdm(ask_judge(args.judge_url, key, args.judge_model, items, kept), desc="judge", disable=None):
            kept.append(row | {"request": hashes[row["custom_id"]]})
            write_line(journal, kept[-1])
    return read_judgements(kept, items), {"model": args.judge_model, "url": args.judge_url}


def judge_requests(items, model="gpt-3.5-turbo"):
    """Make a request per answered item: rows of OpenAI's batch format."""
    rows = []
    for item in items:
        question = item.question.removesuffix(SHORT)
        prompt = JUDGE_USER.format(question=question, truth=item.truth["answer"], answer=item.answer)
        messages = [{"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": prompt}]
        body = {"model": model, "messages": messages}
        rows.append({"custom_id": item.id, "method": "POST", "url": "/v1/chat/completions", "body": body})
    return rows


# ----- replies


def reply_of(row):
    """Return the judge's reply in a row of OpenAI's batch output, or None if the row says that the request failed."""
    try:
        content = row["response"]["body"]["choices"][0]["message"]["content"]
    except (KeyError, TypeError, IndexError):
        return None
    return content if isinstance(content, str) else ""


def parse_judgement(reply):
    """Read {'pred': 'yes', 'score': 4} in a judge's reply: (is right, score 0..5), or None if there is no such dictionary.

    As in Video-ChatGPT, 4.8 counts as 4. Text around the dictionary, such as a code fence, is ignored.

    >>> [parse_judgement(reply) for reply in ("{'pred': 'yes', 'score': 4.8}", "Yes, 5", "{'pred': 'no', 'score': 9}")]
    [(True, 4), None, None]
    """
    start, end = reply.find("{"), reply.rfind("}")
    if start < 0 or len(reply) > LONGEST_REPLY:
        return None
    try:
        judgement = ast.literal_eval(reply[start : end + 1])
        pred, score = judgement["pred"].lower(), int(judgement["score"])
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, OverflowError, MemoryError, RecursionError):
        return None
    if not 0 <= score <= 5 or not ("yes" in pred or "no" in pred):
        return None
    return "yes" in pred, score


def read_judgements(rows, items):
    """Join a judge's replies to items by id: {name: share or count}. Valid ones also go to item.truth["judged"].

    rows  of OpenAI's batch output, as `ask_judge` yields them: custom_id, response.body.choices
    Accuracy and score are over valid replies; invalid and missing ones are counted beside them.
    Raise ValueError for an id that belongs to no item, or that occurs twice.
    """
    by_id, replies = {item.id: item for item in items}, {}
    for index, row in enumerate(rows):
        name = row.get("custom_id") if isinstance(row, dict) else None
        if name not in by_id:
            raise ValueError(
                f"judgement {index} has custom_id {str(name)[:80]!r}, which no question has; was it made for another run?"
            )
        if replies.get(name) is not None and reply_of(row) is not None:
            raise ValueError(f"custom_id {name} comes twice among the judgements; remove one of them")
        if replies.get(name) is None:  # else a failed request after a reply
            replies[name] = reply_of(row)
    parsed = {name: parse_judgement(reply) for name, reply in replies.items() if reply is not None}
    valid = {name: judgement for name, judgement in parsed.items() if judgement}
    for name, (is_right, score) in valid.items():
        by_id[name].truth["judged"] = {"right": is_right, "score": score}
    count = len(valid)
    rights, points = (sum(values) for values in zip(*valid.values(), strict=True)) if valid else (math.nan, math.nan)
    return {
        "judge accuracy": rights / max(1, count),
        "judge score, as a share of 5": points / 5 / max(1, count),
        "judged": count,
        "judge unparsable": len(parsed) - count,
        "judge missing": len(items) - len(parsed),
    }


# ----- an endpoint


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirection: it would carry the key elsewhere."""

    def redirect_request(self, *args):
        return None


def ask_judge(url, key, model, items, done=(), workers=4, retries=5, wait=1.0, timeout=60):
    """Ask an OpenAI-compatible endpoint to judge answered items. Yield rows for `read_judgements` as they arrive.

    url    without /chat/completions: https://api.openai.com/v1
    key    sent as a bearer token; None for a server that needs none
    done   rows of earlier replies: those answers are not judged again
    A request is tried `retries` times, after waits of `wait` seconds, doubled each time, at most a minute. Errors that a
    repetition cannot cure (a wrong key, an unknown model) are not retried. Raise ValueError.
    """
    if key and not re.fullmatch(r"[!-~]+", key):
        raise ValueError("OPENAI_API_KEY holds blanks, line ends or other characters outside ASCII; set it to the key alone")
    if not re.match(r"https?://", url):
        raise ValueError(f"the judge's address {url} must begin with http:// or https://")
    url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    opener, failures = urllib.request.build_opener(NoRedirect), []
    send = partial(send_request, url=url, headers=headers, opener=opener, retries=retries, wait=wait, timeout=timeout)

    def attempt(row):
        try:
            return None if failures else send(row)
        except ValueError as error:
            failures.append(error)

    answered, pool = {row["custom_id"] for row in done if reply_of(row) is not None}, ThreadPoolExecutor(workers)
    pending = [row for row in judge_requests(items, model) if row["custom_id"] not in answered]
    try:
        for future in as_completed([pool.submit(attempt, row) for row in pending]):
            if reply := future.result():  # also those that were under way when another failed
                yield reply
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        raise failures[0]


def send_request(row, url, headers, opener, retries, wait, timeout):
    """Send a request until it is answered: a row of OpenAI's batch output. Raise ValueError if it is refused or times out."""
    request = urllib.request.Request(url, json.dumps(row["body"]).encode(), headers)
    for attempt in range(retries):
        if attempt:
            time.sleep(min(60, wait * 2 ** (attempt - 1)))
        try:
            with opener.open(request, timeout=timeout) as response:
                body = json.load(response)
            reply = {"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}}
            if reply_of(reply) is not None:
                return reply
            problem = f"a reply without choices: {str(body)[:200]}"
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
            if error.code not in (408, 409, 429) and error.code < 500:
                raise ValueError(f"{url} answers {problem}; check address, key and model") from None
        except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, timeout, half a reply, no JSON
            problem = repr(error)
    raise ValueError(
        f"{url}: no judgement of {row['custom_id']} in {retries} tries ({problem}); run the same command later: it resumes"
    )
