"""Let a language model judge answers about clips, by Video-ChatGPT's protocol (Tab. 6, 7), with its prompts, judge_*.txt.

Every run writes NAME.requests.jsonl, rows of OpenAI's batch format. --judgements reads the replies from a file; --judge-url
asks an OpenAI-compatible endpoint, and NAME.judgements.jsonl keeps each reply, so that no answer is judged twice.
"""

import ast
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from evaluate import mean
from formats.files import write_rows
from formats.journal import open_journal, read_journal, write_line
from tasks.files import FOLDER, read_rows
from tasks.words import bare

PROMPTS = {role: (FOLDER / f"judge_{role}.txt").read_text("utf-8").strip() for role in ("system", "user")}
NO_REDIRECT = HTTPRedirectHandler()
NO_REDIRECT.redirect_request = lambda *args: None  # a redirection would carry the key elsewhere


def judge_answers(job, items, folder, args):
    """Judge all answers of a job, as the options say: (figures, who judged), or ({}, None) without a judge."""
    requests, path = list(judge_requests(items, args.judge_model)), folder / f"{job.name}.requests.jsonl"
    if args.judgements and not args.fresh and path.is_file():
        before, now = ([(row["custom_id"], row["body"]["messages"]) for row in rows] for rows in (read_journal(path), requests))
        if before != now:
            fix = "leave out --judgements to write requests about these answers, or count the replies anyway with --fresh"
            raise ValueError(f"{path} holds requests about other answers than these; {fix}")
    write_rows(path, requests)
    if args.judgements:
        rows = read_rows(args.judgements, "the judge's replies: JSON lines with custom_id and response")
        return read_judgements(rows, items), {"model": args.judge_model, "file": args.judgements}
    if not args.judge_url:
        return {}, None
    hashes = {row["custom_id"]: sha256(json.dumps([args.judge_url, row["body"]]).encode()).hexdigest() for row in requests}
    journal_path = folder / f"{job.name}.judgements.jsonl"
    with open_journal(journal_path) as journal:
        if args.fresh:
            journal.truncate(0)
        kept = [row for row in read_journal(journal_path) if row.get("request") == hashes.get(row["custom_id"], "")]
        replies = ask_judge(args.judge_url, os.environ.get("OPENAI_API_KEY"), args.judge_model, items, kept)
        for row in tqdm(replies, desc="judge", disable=None):
            kept.append(row | {"request": hashes[row["custom_id"]]})
            write_line(journal, kept[-1])
    return read_judgements(kept, items), {"model": args.judge_model, "url": args.judge_url}


def judge_requests(items, model="gpt-3.5-turbo"):
    """Yield a request per answered item, rows of OpenAI's batch format."""
    for item in items:
        facts = {"question": bare(item.question), "truth": item.truth["answer"], "answer": item.answer}
        body = {"model": model, "messages": [{"role": role, "content": PROMPTS[role].format(**facts)} for role in PROMPTS]}
        yield {"custom_id": item.id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def reply_of(row):
    """Return the judge's reply in a row of OpenAI's batch output, or None if the row says that the request failed."""
    try:
        content = row["response"]["body"]["choices"][0]["message"]["content"]
        return content if isinstance(content, str) else ""
    except (KeyError, TypeError, IndexError):
        return None


def parse_judgement(reply):
    """Read the {'pred': 'yes', 'score': 4.8} that a reply of up to 10,000 characters holds: (True, 4), or None. Scores: 0..5"""
    try:
        judgement = ast.literal_eval(reply[reply.find("{") : reply.rfind("}") + 1] if len(reply) <= 10_000 else "{}")
        pred, score = judgement["pred"].lower(), int(judgement["score"])
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, OverflowError, MemoryError, RecursionError):
        return None
    return ("yes" in pred, score) if 0 <= score <= 5 and ("yes" in pred or "no" in pred) else None


def read_judgements(rows, items):
    """Join a judge's replies, rows of OpenAI's batch output, to items by id: {name: share of the valid replies, or count}."""
    by_id, replies = {item.id: item for item in items}, {}
    for index, row in enumerate(rows):
        name, reply = str(row.get("custom_id") if isinstance(row, dict) else None), reply_of(row)
        if name not in by_id:
            raise ValueError(f"judgement {index} has custom_id {name[:80]!r}, which no question has; is it another run's?")
        if reply is not None:  # else the request failed; another row may hold its reply
            if name in replies:
                raise ValueError(f"custom_id {name} comes twice among the judgements; remove one of them")
            replies[name] = parse_judgement(reply)
    valid = {name: judgement for name, judgement in replies.items() if judgement}
    for name, (is_right, score) in valid.items():
        by_id[name].measured["judged"] = {"right": is_right, "score": score}
    return {
        "judge accuracy": mean(is_right for is_right, _ in valid.values()),
        "judge score, as a share of 5": sum(score for _, score in valid.values()) / 5 / len(valid) if valid else float("nan"),
        "judged": len(valid), "judge unparsable": len(replies) - len(valid), "judge missing": len(items) - len(replies),
    }  # fmt: skip


def ask_judge(url, key, model, items, done=(), workers=4, retries=5, wait=1.0):
    """Ask an OpenAI-compatible endpoint to judge the items that no row of `done` replies to. Yield rows as they arrive."""
    if key and not re.fullmatch(r"[!-~]+", key):
        raise ValueError("OPENAI_API_KEY holds blanks, line ends or other characters outside ASCII; set it to the key alone")
    if not re.match(r"https?://", url):
        raise ValueError(f"the judge's address {url} must begin with http:// or https://")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    send = partial(send_request, url=f"{url.rstrip('/')}/chat/completions", headers=headers, retries=retries, wait=wait)
    answered = {row["custom_id"] for row in done if reply_of(row) is not None}
    pending = [row for row in judge_requests(items, model) if row["custom_id"] not in answered]
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(pending), workers):
            replies = list(pool.map(send, pending[start : start + workers]))
            yield from (reply for reply in replies if isinstance(reply, dict))  # also those beside one that failed
            if failures := [reply for reply in replies if isinstance(reply, ValueError)]:
                raise failures[0]


def send_request(row, url, headers, retries, wait):
    """Return a row of OpenAI's batch output, or a ValueError."""
    request = Request(url, json.dumps(row["body"]).encode(), headers)
    for attempt in range(retries):
        time.sleep(min(60, wait * 2 ** (attempt - 1)) if attempt else 0)  # longer after each try
        try:
            with build_opener(NO_REDIRECT).open(request, timeout=60) as response:
                reply = {"custom_id": row["custom_id"], "response": {"status_code": 200, "body": json.load(response)}}
            if reply_of(reply) is not None:
                return reply
            problem = f"a reply without choices: {str(reply['response']['body'])[:200]}"
        except HTTPError as error:
            problem = f"{error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
            if error.code not in (408, 409, 429) and error.code < 500:
                break  # no repetition improves a wrong key or an unknown model
        except (OSError, ValueError, HTTPException) as error:  # no connection, timeout, half a reply, no JSON
            problem = repr(error)
    problem = f"no judgement of {row['custom_id']} in {attempt + 1} tries ({problem})"
    return ValueError(f"{url}: {problem}; check address, key and model, or repeat the command later: it resumes")
