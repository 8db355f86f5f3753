"""A judge behind an endpoint: what it is asked, how verdicts count, and what failures do."""

import http.server
import json
import re
import threading
import time

import numpy as np
import pytest
from jobs import make_job, open_inputs
from runs import ROOT

from dpojax.algorithms.rewards import open_rewards
from dpojax.config.load import apply_override, from_config_dict, load_config_file
from dpojax.config.online import JUDGE_PROMPTS
from dpojax.errors import ConfigError
from dpojax.generation import chat_endpoint
from dpojax.generation.judge import Judge, column_text, read_judge_prompt, verdict

OWN = f"{ROOT}/experiments/own_algorithm/reinforce.py:REINFORCE"


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def longer_wins(text):
    """A fair judge: the longer answer wins, equally long ones tie."""
    first = re.search(r"A:\n(.*?)\n\n", text, re.DOTALL)[1]
    second = re.search(r"B:\n(.*?)\n\n", text, re.DOTALL)[1]
    if len(first) == len(second):
        return "Preferred: tie"
    return f"B is wordy. Preferred: {'A' if len(first) > len(second) else 'B'}"


class Server(http.server.ThreadingHTTPServer):
    """Answers as `behave(number, text)` says: bytes, a status, or a function of the handler."""

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.asked = []
        self.headers = []
        self.times = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is what some tests are about."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers.append((self.path, dict(self.headers)))
            self.server.times.append(time.monotonic())
            number = len(self.server.asked)
        answer = self.server.behave(number, text)
        if callable(answer):
            answer(self)
            return
        status, headers, data = answer if isinstance(answer, tuple) else (200, {}, answer)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(chat_endpoint, "FIRST_PAUSE_S", 0.01)
    started = []

    def start(behave):
        started.append(Server(behave))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def fair(number, text):
    return completion(longer_wins(text))


def make_judge(server, folder, **settings):
    values = load_config_file("tldr")
    own = {"terms": f"judge:{server.url}", "judge_model": "m", "judge_timeout_s": 5.0}
    for key, value in (own | settings).items():
        apply_override(values, f"reward.{key}", str(value))
    section = from_config_dict(values).reward

    def write(change):
        change()

    return Judge(server.url, section, folder / "cache" / "judge.jsonl", write)


def against(*others):
    return [{"chosen": other} for other in others]


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ("A is better.\nPreferred: A", 1.0),
        ("Preferred: B", 0.0),
        ("preferred: **tie**", 0.5),
        ('Preferred: "B".', 0.0),
        ("At first preferred: A. No,\nPreferred: B", 0.0),
        ("I like A.", None),
        ("Preferred: C", None),
        ("Preferred: Apple", None),
        ("", None),
    ],
)
def test_the_last_verdict_of_a_reply_counts(reply, share):
    assert verdict(reply) == share


def test_both_orders_are_asked_and_a_judge_that_likes_the_first_says_nothing(serve, tmp_path):
    server = serve(lambda number, text: completion("Preferred: A"))
    judge = make_judge(server, tmp_path)
    assert judge(["p"], ["x"], against("y")) == [0.5]
    texts = [body["messages"][0]["content"] for body in server.asked]
    assert len(texts) == 2 and texts[0] != texts[1]


def test_responses_are_compared_with_the_column_and_ties_count_half(serve, tmp_path):
    judge = make_judge(serve(fair), tmp_path)
    scores = judge(["p"] * 4, ["long", "a", "bb", "x"], [*against("s", "long", "cc"), {}])
    assert scores == [1.0, 0.0, 0.5, None]


def test_without_a_column_a_prompts_responses_are_compared_with_each_other(serve, tmp_path):
    judge = make_judge(serve(fair), tmp_path, judge_against="")
    rows = [{}] * 5
    scores = judge(["p", "p", "q", "p", "r"], ["a", "bb", "alone", "ccc", "alone"], rows)
    assert scores == [0.0, 0.5, None, 1.0, None]


def test_equal_texts_tie_without_a_call(serve, tmp_path):
    server = serve(fair)
    assert make_judge(server, tmp_path)(["p"], [" same "], against("same")) == [0.5]
    assert not server.asked


def test_a_verdict_that_names_neither_is_no_number(serve, tmp_path):
    def behave(number, text):
        return completion("Both are fine." if "strange" in text else longer_wins(text))

    judge = make_judge(serve(behave), tmp_path)
    assert judge(["p", "p"], ["strange", "long"], against("s", "s")) == [None, 1.0]


def test_a_column_of_messages_or_a_transcript_is_its_answer():
    assert column_text([{"role": "assistant", "content": "x"}], "p") == "x"
    assert column_text("p y", "p") == " y"
    assert column_text(None, "p") is None and column_text(3, "p") is None


# --- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JUDGE_PROMPTS)
def test_a_shipped_prompt_holds_the_texts_as_they_are(serve, tmp_path, name):
    server = serve(fair)
    judge = make_judge(server, tmp_path, judge_prompt=name)
    judge(["post {first} {x}"], ["one"], against("three {prompt}"))
    for body in server.asked:
        text = body["messages"][0]["content"]
        assert "post {first} {x}" in text and "three {prompt}" in text
        assert body["model"] == "m" and body["temperature"] == 0
    assert server.headers[0][0] == "/v1/chat/completions"


def test_a_prompt_of_ones_own_holds_all_fields(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("{prompt} {first}")
    with pytest.raises(ConfigError, match=r"the text lacks \{second\}"):
        read_judge_prompt(str(path))
    with pytest.raises(ConfigError, match=r"reward.judge_prompt is 'nothing'"):
        read_judge_prompt("nothing")


def test_the_key_comes_from_the_environment_and_is_written_nowhere(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-of-mine")
    server = serve(fair)
    make_judge(server, tmp_path, judge_key="MY_KEY")(["p"], ["x"], against("yy"))
    assert server.headers[0][1]["Authorization"] == "Bearer secret-of-mine"
    assert "secret" not in (tmp_path / "cache/judge.jsonl").read_text()
    other = serve(fair)
    make_judge(other, tmp_path, judge_key="NO_SUCH_KEY")(["p"], ["x"], against("yy"))
    assert "Authorization" not in other.headers[0][1]


@pytest.mark.parametrize("url", ["ftp://h/v1", "nothing", "http://user:pass@h/v1", "http://"])
def test_an_address_that_is_none_is_refused(url):
    settings = chat_endpoint.EndpointSettings(url, "m", "", 1.0, 0, 0, 0)
    with pytest.raises(ConfigError, match="must be an address"):
        chat_endpoint.ChatEndpoint(settings)


# --- what is kept ---------------------------------------------------------------------------------


def test_a_question_is_paid_for_once(serve, tmp_path):
    server = serve(fair)
    first = make_judge(server, tmp_path)(["p"], ["x"], against("yy"))
    assert len(server.asked) == 2
    with (tmp_path / "cache/judge.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    again = make_judge(server, tmp_path)(["p"], ["x"], against("yy"))
    assert first == again == [0.0] and len(server.asked) == 2
    make_judge(server, tmp_path, judge_model="other")(["p"], ["x"], against("yy"))
    assert len(server.asked) == 4


def test_a_spent_budget_ends_the_run_and_counts_what_was_paid_before(serve, tmp_path):
    server = serve(fair)
    assert make_judge(server, tmp_path, judge_max_calls=2)(["p"], ["x"], against("yy")) == [0.0]
    judge = make_judge(server, tmp_path, judge_max_calls=2)
    with pytest.raises(ConfigError, match=r"reward\.judge_max_calls is 2"):
        judge(["p"], ["x"], against("zzz"))
    assert len(server.asked) == 2
    assert judge(["p"], ["x"], against("yy")) == [0.0]  # what is kept costs nothing


def test_the_rate_is_kept(serve, tmp_path):
    server = serve(fair)
    judge = make_judge(server, tmp_path, judge_calls_per_minute=300)
    judge(["p"] * 3, ["x"] * 3, against("yy", "zzz", "wwww"))
    assert len(server.times) == 6
    assert server.times[-1] - server.times[0] > 0.8  # five gaps of 0.2 s


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"Retry-After": "0.05"}, b"slow down"),
        (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b""),
        (500, {}, b"oops"),
        (503, {}, b""),
        b"{not json",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        b"[" * 10_000,
        b"",
        b"x" * (chat_endpoint.MAX_REPLY_BYTES + 10),
    ],
)
def test_what_another_try_mends_is_tried_again(serve, tmp_path, failure):
    server = serve(lambda number, text: failure if number <= 2 else fair(number, text))
    assert make_judge(server, tmp_path)(["p"], ["x"], against("yy")) == [0.0]
    assert len(server.asked) == 4


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404])
def test_what_no_try_mends_is_said_at_once(serve, tmp_path, status):
    server = serve(lambda number, text: (status, {"Location": "http://127.0.0.1:9/"}, b"no"))
    with pytest.raises(ConfigError, match=f"answers with status {status}: 'no'"):
        make_judge(server, tmp_path, judge_threads=1)(["p"], ["x"], against("yy"))
    assert len(server.asked) <= 2


def hang(handler):
    time.sleep(3)


def drip(handler):
    """A byte now and then, for ever: no socket's time-out ever comes."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def hang_up(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")


@pytest.mark.parametrize("misbehave", [hang, drip, hang_up])
def test_a_call_ends_at_its_deadline_whatever_the_server_does(serve, tmp_path, misbehave):
    server = serve(lambda number, text: misbehave if number <= 2 else fair(number, text))
    judge = make_judge(server, tmp_path, judge_timeout_s=0.5)
    began = time.monotonic()
    assert judge(["p"], ["x"], against("yy")) == [0.0]
    assert time.monotonic() - began < 2.5


def test_slow_chunks_that_arrive_in_time_are_a_reply(serve, tmp_path):
    def slow(handler):
        data = completion("Preferred: tie")
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for i in range(0, len(data), 20):
            handler.wfile.write(data[i : i + 20])
            handler.wfile.flush()
            time.sleep(0.02)

    assert make_judge(serve(lambda n, t: slow), tmp_path)(["p"], ["x"], against("yy")) == [0.5]


def test_one_question_without_a_reply_is_no_number_and_none_at_all_is_an_error(serve, tmp_path):
    def behave(number, text):
        return (500, {}, b"") if "bad" in text else fair(number, text)

    judge = make_judge(serve(behave), tmp_path, judge_retries=1)
    assert judge(["p", "p"], ["bad", "x"], against("yy", "yy")) == [None, 0.0]
    with pytest.raises(ConfigError, match=r"answers with status 500 \(2 tries\), on all of 2"):
        judge(["p"], ["bad"], against("z"))


# --- in a run -------------------------------------------------------------------------------------


def test_a_judge_is_tried_before_the_training_and_stands_among_the_terms(serve, files, tmp_path):
    server = serve(fair)
    own = {
        "data.train": files / "train.jsonl",
        "data.max_prompt_tokens": 512,
        "tokenizer": files / "tokenizer.model",
        "stages": OWN,
        "sft.num_steps": 0,
        "reward.terms": f"judge:{server.url}",
        "reward.judge_model": "m",
    }
    job = make_job(tmp_path / "w", **own)
    rewards = open_rewards(job, open_inputs(job))
    assert server.asked
    assert not (tmp_path / "w/cache/judge.jsonl").exists()  # before the run may change its workdir
    job.commit()
    assert (tmp_path / "w/cache/judge.jsonl").exists()
    scored = rewards(["p"], ["longer"], [{"chosen": "s"}])
    np.testing.assert_array_equal(scored.total, [1.0])
    with pytest.raises(ConfigError, match=r"reward.judge_against is 'best', which none"):
        job = make_job(tmp_path / "v", **own, **{"reward.judge_against": "best"})
        open_rewards(job, open_inputs(job))
