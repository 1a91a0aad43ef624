"""The language model as judge: requests, replies, an endpoint."""

import json
import math
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from benchmark_helpers import LONG

from evaluate import Item
from formats.files import write_rows
from tasks.judge import ask_judge, judge_answers, judge_requests, parse_judgement, read_judgements
from tasks.words import SHORT


def talked(count=3):
    return [Item(f"q{n}", None, None, f"What {n}?{SHORT}", {"answer": "dog"}, "a {'pred'} dog") for n in range(count)]


def reply(name, text):
    return {"custom_id": name, "response": {"body": {"choices": [{"message": {"content": text}}]}}}


def test_judge_requests_are_video_chatgpts_prompts_in_openais_batch_format():
    [row] = judge_requests(talked(1), "judge-1")
    assert (row["custom_id"], row["method"], row["url"]) == ("q0", "POST", "/v1/chat/completions")
    system, user = row["body"]["messages"]
    assert system["content"].startswith("You are an intelligent chatbot") and row["body"]["model"] == "judge-1"
    assert "Question: What 0?\nCorrect Answer: dog\nPredicted Answer: a {'pred'} dog\n\n" in user["content"]
    assert user["content"].endswith("your response should look like this: {'pred': 'yes', 'score': 4.8}.")


def test_judgements_are_joined_by_id_and_what_cannot_be_read_is_counted():
    items = talked(6)
    rows = [
        reply("q3", "{'pred': 'no', 'score': 1}"),
        reply("q0", "{'pred': 'yes', 'score': 4.8}"),
        reply("q1", "Sure! Yes, 5 of 5"),
        reply("q4", "```python\n{'pred': 'Yes', 'score': 5}\n```"),
        {"custom_id": "q5", "response": None, "error": {"message": "rate limit"}},
        {"custom_id": "q3", "response": None, "error": {"message": "asked again in vain"}},
    ]
    metrics = read_judgements(rows, items)
    assert metrics == {
        "judge accuracy": 2 / 3,
        "judge score, as a share of 5": pytest.approx((1 + 4 + 5) / 15),
        "judged": 3,
        "judge unparsable": 1,
        "judge missing": 2,
    }
    assert items[0].measured["judged"] == {"right": True, "score": 4} and "judged" not in items[1].measured
    with pytest.raises(ValueError, match="q0 comes twice"):
        read_judgements([*rows, rows[1]], items)
    with pytest.raises(ValueError, match="'q9', which no question has"):
        read_judgements([reply("q9", "")], items)
    assert math.isnan(read_judgements([], items)["judge accuracy"])


@pytest.mark.parametrize("reply, judgement", [
    ("{'pred': 'yes', 'score': 4.8}", (True, 4)), ('{"pred": "yes", "score": 5}', (True, 5)), ("{'pred': 'no', 'score': 0}", (False, 0)),
    ("{'pred': 'YES.', 'score': '3'}", (True, 3)), ("{'pred': 'yes/no', 'score': 2}", (True, 2)), ("{'score': 1, 'pred': 'not'}", (False, 1)),
    ("{'pred': 'yes', 'score': 4, 'why': {'a': 1}}", (True, 4)), ("{'pred': 'Yes', 'score': -0.5}", (True, 0)),
    ('{"pred": "yes", "score": true, }', None), ("{'pred': 'yes', 'score': '4.8'}", None), ("{'pred': yes, 'score': 4}", None),
])  # fmt: skip
def test_replies_are_read_as_video_chatgpts_script_reads_them(reply, judgement):
    """Fixed values: ast.literal_eval, int(score), "yes" in pred.lower(); where that fails, the script asks again for ever."""
    assert parse_judgement(reply) == judgement


def test_no_reply_breaks_the_parser():
    for text in (
        "",
        "{",
        "}{",
        "{'pred': 'yes'}",
        "{'pred': 1, 'score': 2}",
        "{'pred': 'yes', 'score': 'x'}",
        "{1, 2}",
    ):
        assert parse_judgement(text) is None
    for text in ("{'pred': 'yes', 'score': 1e999}", "{'pred': 'maybe', 'score': 3}", "{'pred': 'yes', 'score': -1}"):
        assert parse_judgement(text) is None
    for text in ("{" + "[" * 9000 + "}", "{'pred': " + "-" * 9000 + "}", "{" + LONG + "}", "{'a': __import__('os')}"):
        assert parse_judgement(text) is None


@pytest.fixture
def endpoint():
    """An endpoint that answers with the codes it is told, then 200: gives (address, codes, what was asked, with which key)."""
    codes, asked, keys = [], [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            keys.append(self.headers["Authorization"])
            code = codes.pop(0) if codes else 200
            content = {"choices": [{"message": {"content": "{'pred': 'yes', 'score': 3}"}}]}
            if code == 0:
                code, content = 200, {"choices": []}
            cut_short, code = code == 1, 200 if code == 1 else code
            self.send_response(code)
            if code == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            if cut_short:
                self.send_header("Content-Length", "9999")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", codes, asked, keys
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_again_where_it_failed_and_not_where_it_answered(endpoint):
    url, codes, asked, keys = endpoint
    codes += [500, 429, 0, 1]  # and a reply that breaks off
    items = talked(4)
    done = list(ask_judge(url, "secret", "judge-1", items[:2], workers=1, wait=0.001))
    assert [row["custom_id"] for row in done] == ["q0", "q1"] and len(asked) == 6
    assert asked[0][0] == "/v1/chat/completions" and set(keys) == {"Bearer secret"}
    done += ask_judge(url + "/", "secret", "judge-1", items, done, wait=0.001)
    assert sorted(row["custom_id"] for row in done) == ["q0", "q1", "q2", "q3"] and len(asked) == 8
    assert read_judgements(done, items)["judge accuracy"] == 1
    assert list(ask_judge(url, None, "judge-1", items, done)) == [] and len(asked) == 8


def test_replies_count_for_the_answers_and_the_endpoint_that_they_are_about(endpoint, tmp_path):
    url, _, asked, _ = endpoint
    job, options = SimpleNamespace(name="x"), {"judge_model": "judge-1", "judgements": None, "judge_url": url, "fresh": False}

    def judge(items=None, **changes):
        return judge_answers(job, items or talked(2), tmp_path, SimpleNamespace(**options | changes))[0]["judge accuracy"]

    for more, count in (({}, 2), ({}, 2), ({"judge_url": url + "/"}, 4), ({"judge_url": url + "/", "fresh": True}, 6)):
        assert judge(**more) == 1 and len(asked) == count
    write_rows(tmp_path / "replies.jsonl", [reply("q0", "{'pred': 'yes', 'score': 5}")])
    given = {"judgements": str(tmp_path / "replies.jsonl"), "judge_url": None}
    assert judge(**given) == 1
    other = [replace(item, answer="a submarine") for item in talked(2)]
    with pytest.raises(ValueError, match="x.requests.jsonl holds requests about other answers"):
        judge(other, **given)
    assert judge(other, **given, fresh=True) == 1


def test_what_is_judged_while_one_question_fails_is_kept(endpoint):
    """Two at a time: the first is refused for good, the other's judgement comes before the error, and no third is asked."""
    url, codes, asked, _ = endpoint
    codes += [401]
    told = []
    with pytest.raises(ValueError, match="401"):
        for row in ask_judge(url, "secret", "judge-1", talked(40), workers=2, wait=0.001):
            told.append(row)
    assert len(told) == len(asked) - 1 < 39


def test_a_key_that_no_header_can_hold_is_refused_unseen(endpoint):
    for key in ("sk-secret\r", "sk secret", "sk-\u00e9"):
        with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
            list(ask_judge(endpoint[0], key, "judge-1", talked(1)))
        assert "sk" not in str(error.value)


def test_an_endpoint_that_refuses_or_never_answers_is_an_error_that_names_it(endpoint):
    url, codes, asked, _ = endpoint
    for code in (401, 404, 302):
        codes += [code]
        with pytest.raises(ValueError, match=f"{code} .*check address, key and model"):
            list(ask_judge(url, "secret", "judge-1", talked(1), wait=0.001))
    assert len(asked) == 3, "what is refused for good is asked once"
    codes += [503] * 9
    with pytest.raises(ValueError, match="in 3 tries .503"):
        list(ask_judge(url, "k", "judge-1", talked(1), retries=3, wait=0.001))
    with pytest.raises(ValueError, match="in 2 tries"):
        list(ask_judge("http://127.0.0.1:9/v1", "k", "judge-1", talked(1), retries=2, wait=0.001))
    with pytest.raises(ValueError, match="must begin with http"):
        list(ask_judge("ftp://host", "k", "judge-1", talked(1)))
