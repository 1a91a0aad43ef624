"""TODO tasks.judge."""

import ast
import hashlib
import http.client
import json
import math
import os
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

from formats.eval_folder import of_clips, write_rows
from formats.journal import open_journal, read_journal, write_line
from tasks.__main__ import read_rows
from tasks.words import SHORT


def judgeable(job):
    """Say whether a job is what the paper lets a language model judge: clips, and answers in words (Tab. 6, 7)."""
    return of_clips(job) and all("answer" in item.truth for item in job.items)


def judge_of(job, items, folder, args):
    """Let a language model judge answers about clips: (its figures, what it was), ({}, None) where none is asked.

    Its requests are written for any run. What it said is kept row by row, so that no answer is judged twice.
    """
    if not judgeable(job):
        return {}, None
    requests = judge_requests(items, args.judge_model)
    write_rows(folder / f"{job.name}.requests.jsonl", requests)
    if args.judgements:
        rows = read_rows(args.judgements, ("custom_id",))
        return read_judgements(rows, items), {"model": args.judge_model, "file": args.judgements}
    if not args.judge_url:
        return {}, None
    wanted = {r["custom_id"]: hashlib.sha256(json.dumps(r["body"]).encode()).hexdigest() for r in requests}
    path, key = folder / f"{job.name}.judgements.jsonl", os.environ.get("OPENAI_API_KEY")
    with open_journal(path) as journal:
        kept = [row for row in read_journal(path) if row.get("request") == wanted.get(row["custom_id"], "")]
        for row in tqdm(ask_judge(args.judge_url, key, args.judge_model, items, kept), desc="judge", disable=None):
            kept.append(row | {"request": wanted[row["custom_id"]]})
            write_line(journal, kept[-1])
    return read_judgements(kept, items), {"model": args.judge_model, "url": args.judge_url}


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
