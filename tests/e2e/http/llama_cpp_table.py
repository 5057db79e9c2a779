"""The assertions of llama.cpp's own server tests, as far as they do not depend on its models' words, against the real
daemon with a tiny chatting model. Usage: llama_cpp_table.py SOCKET TABLE

A check is named as the test there; TABLE (packaging/compatibility.md) must have a row for it that says the same of it:
`same` is what llama.cpp's test asserts, `different` what is answered here instead. Not a check: what the table says is not
there yet. Needs Python alone.
"""
import concurrent.futures
import http.client
import json
import re
import socket
import sys

CONTEXT = 512
BOOK = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book"}]
CHECKS = []


def check(verdict, *names):
    """Declares what a function shows of llama.cpp's tests of these names."""

    def declared(action):
        CHECKS.extend((name, verdict, action) for name in names)
        return action

    return declared


class Answer:
    def __init__(self, response, body):
        self.status, self.headers, self.text = response.status, response.headers, body.decode()

    @property
    def body(self):
        return json.loads(self.text)

    @property
    def events(self):
        """The chunks of a stream, whose end is in order."""
        data = re.findall(r"^data: (.*)$", self.text, re.M)
        assert data[-1] == "[DONE]", self.text
        return [json.loads(event) for event in data[:-1]]


def ask(method, path, body=None):
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(sys.argv[1])
    connection.request(method, path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    return Answer(response, response.read())


def chat(messages=BOOK, **fields):
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    return ask("POST", "/v1/chat/completions", body)


def complete(prompt="I believe the meaning of life is", **fields):
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    return ask("POST", "/v1/completions", body)


def refused(answer, param=None, status=400):
    assert answer.status == status and "message" in answer.body["error"], answer.text
    assert param is None or answer.body["error"]["param"] == param, answer.text


def text(answer):
    assert answer.status == 200, answer.text
    return answer.body["choices"][0]["text"]


@check("same", "basic: server_start_simple", "security: public_endpoint over the Unix socket")
def _():
    assert ask("GET", "/health").status == 200 and ask("GET", "/v1/models").status == 200


@check("different", "basic: server_props")
def _():
    props = ask("GET", "/props").body
    assert "model_path" in props and "params" not in props["default_generation_settings"], props
    assert props["default_generation_settings"]["n_ctx"] == CONTEXT, props


@check("same", "basic: server_models")
def _():
    models = ask("GET", "/v1/models").body["data"]
    assert [model["id"] for model in models] == ["default"], models


@check("different", "basic: server_slots", "basic: no_ui")
def _():
    refused(ask("GET", "/slots"), status=404)
    there = ask("GET", "/")
    assert there.status == 200 and there.text == "sparsed is running", there.text


@check("same", "chat_completion: chat_completion", "chat_completion: chat_completion_with_openai_library")
def _():
    answer = chat().body
    choice = answer["choices"][0]
    assert "cmpl" in answer["id"] and choice["message"]["role"] == "assistant", answer
    assert choice["finish_reason"] == "length" and choice["message"]["content"], answer
    assert answer["usage"]["completion_tokens"] == 8 and answer["usage"]["prompt_tokens"] > 20, answer
    assert "system_fingerprint" not in answer, answer


@check("different", "chat_completion: cached_tokens")
def _():
    long = [{"role": "user", "content": "x" * 200}]
    cached = [chat(long).body["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert cached[0] < 64 and cached[1] % 64 == 0 and cached[1] >= 128, cached


@check("same", "chat_completion: stream")
def _():
    events = chat(stream=True, stream_options={"include_usage": True}).events
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    ends = [event["choices"][0]["finish_reason"] for event in events if event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""} and not any("role" in delta for delta in deltas[1:]), deltas
    assert "content" not in deltas[-1] and ends[-1] == "length" and not any(ends[:-1]), (deltas, ends)
    assert len({event["id"] for event in events}) == 1 and events[-1]["usage"]["completion_tokens"] == 8, events
    assert "".join(delta.get("content", "") for delta in deltas) == chat().body["choices"][0]["message"]["content"]


@check("different", "chat_completion: chat_template", "chat_completion: verbose_debug")
def _():
    assert "__verbose" not in chat(verbose=True).body


@check("same", "chat_completion: response_format")
def _():
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    answer = chat(response_format=form, max_tokens=200, ignore_eos=False).body
    assert json.loads(answer["choices"][0]["message"]["content"])["n"] in (1, 2), answer
    form = {"type": "json_object", "schema": {"const": "42"}}
    answer = chat(response_format=form, max_tokens=200, ignore_eos=False).body
    assert json.loads(answer["choices"][0]["message"]["content"]) == "42", answer
    for wrong in ({"type": "json_object", "schema": 123}, {"type": "json_object", "schema": {"type": 123}},
                  {"type": "json_object", "schema": {"type": "hiccup"}}, {"type": "sound"}):
        refused(chat(response_format=wrong))


@check("different", "chat_completion: assistant_prefill")
def _():
    begun = [*BOOK, {"role": "assistant", "content": "Whill"}]
    def tokens(**fields):
        body = {"messages": begun, **fields}
        return ask("POST", "/v1/chat/completions/input_tokens", body).body["input_tokens"]

    assert tokens() > tokens(continue_final_message=True), "a new answer has its own beginning"


@check("same", "chat_completion: continue_final_message", "chat_completion: token_count")
def _():
    count = ask("POST", "/v1/chat/completions/input_tokens", {"messages": BOOK})
    assert count.status == 200 and count.body["input_tokens"] > 5, count
    begun = [*BOOK, {"role": "assistant", "content": "Whill"}]
    answer = chat(begun, continue_final_message=True, max_tokens=8)
    # The tiny model's tokens are bytes.
    assert answer.body["usage"]["prompt_tokens"] == count.body["input_tokens"] + len("Whill"), answer


@check("different", "chat_completion: json_schema")
def _():
    assert chat(json_schema={"const": "42"}).body["choices"][0]["message"]["content"] != '"42"'
    refused(chat(json_schema={"const": "42"}, strict=True), "json_schema")


@check("different", "chat_completion: grammar")
def _():
    refused(chat(grammar='root ::= "a"{5,5}'), "grammar")
    answer = chat(grammar="start: /a{5}/", max_tokens=20, ignore_eos=False).body
    assert answer["choices"][0]["message"]["content"] == "aaaaa", answer


@check("same", "chat_completion: invalid_grammar")
def _():
    refused(chat(grammar="start: ("), "grammar")


@check("same", "chat_completion: invalid_chat_completion_req")
def _():
    for messages in ("string", None, [{"role": "user"}], [{"role": "who", "content": "x"}], [123], [None], []):
        refused(chat(messages))


@check("same", "chat_completion: logprobs", "chat_completion: logprobs_stream")
def _():
    def right(tokens):
        for token in tokens:
            assert token["logprob"] <= 0 and token["bytes"] is not None and len(token["top_logprobs"]) == 10, token
        return "".join(token["token"] for token in tokens)

    choice = chat(logprobs=True, top_logprobs=10).body["choices"][0]
    said = [bytes(token["bytes"]) for token in choice["logprobs"]["content"]]
    assert b"".join(said).decode(errors="replace") == choice["message"]["content"], choice
    assert len(right(choice["logprobs"]["content"])) >= 8
    events = chat(logprobs=True, top_logprobs=10, stream=True).events
    logprobs = [event["choices"][0].get("logprobs") for event in events]
    assert right([one for each in logprobs if each for one in each["content"]]) == right(choice["logprobs"]["content"])


@check("different", "chat_completion: logit_bias")
def _():
    refused(chat(logit_bias=[["what", -100]]))
    assert complete(logit_bias={"97": 100}).body["choices"][0]["text"] == "a" * 8


@check("different", "chat_completion: context_size_exceeded", "chat_completion: context_size_exceeded_stream")
def _():
    for stream in (False, True):
        answer = chat([{"role": "user", "content": "x" * 2 * CONTEXT}], stream=stream)
        refused(answer)
        assert answer.body["error"]["code"] == "context_length_exceeded", answer.text
        assert str(CONTEXT) in answer.body["error"]["message"], answer.text


@check("same", "chat_completion: multiple_choices")
def _():
    choices = chat(n=2).body["choices"]
    assert len(choices) == 2 and all(choice["finish_reason"] == "length" for choice in choices), choices


@check("different", "completion: completion", "completion: completion_stream")
def _():
    refused(ask("POST", "/completion", {"prompt": "x", "n_predict": 4}), status=404)
    answer = complete(return_tokens=True).body
    assert answer["timings"]["predicted_n"] == 8 and answer["timings"]["prompt_n"] > 0, answer
    assert len(answer["choices"][0]["tokens"]) == 8 and all(type(id) is int for id in answer["choices"][0]["tokens"])


@check("same", "completion: stream_vs_non_stream", "completion: with_openai_library", "completion: stream_with_openai_library")
def _():
    events = complete(stream=True).events
    assert "".join(event["choices"][0]["text"] for event in events) == text(complete())
    assert events[-1]["choices"][0]["finish_reason"] == "length", events


@check("same", "completion: stream_with_openai_library_stops")
def _():
    whole = text(complete(max_tokens=40))
    stop = whole[10:12]
    events = complete(max_tokens=40, stop=[stop], stream=True).events
    assert "".join(event["choices"][0]["text"] for event in events) == whole[: whole.find(stop)]
    assert events[-1]["choices"][0]["finish_reason"] == "stop", events


@check("same", "completion: consistent_result_same_seed")
def _():
    assert len({text(complete(seed=42, temperature=1)) for _ in range(4)}) == 1


@check("same", "completion: different_result_different_seed")
def _():
    assert len({text(complete(seed=seed, temperature=1, max_tokens=30)) for seed in range(4)}) == 4


@check("same", "completion: cache_vs_nocache_prompt")
def _():
    long = "I believe the meaning of life is " * 6
    assert text(complete(long)) == text(complete(long))


@check("same", "completion: nocache_long_input_prompt", "ctx_shift: disabled_long_prompt")
def _():
    refused(complete("I believe the meaning of life is" * 32))


@check("same", "completion: json_prompt_mtm_error_when_not_supported", "completion: json_prompt_no_mtmd")
def _():
    refused(complete({"prompt_string": "x", "multimodal_data": ["eA=="]}))
    assert complete("I believe the meaning of life is").status == 200


@check("same", "completion: with_tokens_input")
def _():
    words = "I believe the meaning of life is"
    tokens = ask("POST", "/tokenize", {"content": words}).body["tokens"]
    for prompt in (tokens, [tokens], [words], words):
        assert len(complete(prompt).body["choices"]) == 1
    for prompt in ([tokens, tokens], [words, words]):
        choices = complete(prompt).body["choices"]
        assert [choice["index"] for choice in choices] == [0, 1], choices
        assert choices[0]["text"] == choices[1]["text"] == text(complete(words)), choices


@check("different", "completion: with_tokens_input, mixed")
def _():
    refused(complete(["x", [1, 2]]), "prompt")
    refused(complete([1, 2, "x"]), "prompt")


@check("same", "completion: parallel_slots", "completion: unified")
def _():
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda n: complete("x" * (20 * n + 1), max_tokens=20).body, range(12)))
    assert all(answer["timings"]["predicted_n"] == 20 for answer in answers), answers


@check("different", "ctx_shift: enabled")
def _():
    answer = complete("x" * (CONTEXT - 20), max_tokens=96).body
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == CONTEXT, answer


@check("same", "ctx_shift: disabled_short_prompt", "ctx_shift: disabled_stream")
def _():
    assert complete("Hi how are you", max_tokens=12).body["usage"]["completion_tokens"] == 12
    events = complete("Hi how are you", max_tokens=64, stream=True).events
    assert events[-1]["choices"][0]["finish_reason"] == "length", events


@check("different", "ignore_eos: populates_logit_bias", "ignore_eos: false_no_logit_bias")
def _():
    assert complete(ignore_eos=True, max_tokens=100).body["usage"]["completion_tokens"] == 100


@check("same", "tokenize: tokenize_detokenize")
def _():
    content = "What is the capital of France ?"
    tokens = ask("POST", "/tokenize", {"content": content}).body["tokens"]
    assert len(tokens) > 5 and ask("POST", "/detokenize", {"tokens": tokens}).body["content"].strip() == content


@check("same", "tokenize: with_pieces")
def _():
    tokens = ask("POST", "/tokenize", {"content": "This is a test", "with_pieces": True}).body["tokens"]
    assert all(token["id"] > 0 and len(token["piece"]) > 0 for token in tokens), tokens


@check("same", "compat_oai_responses: responses_with_openai_library", "compat_oai_responses: stream_with_openai_library")
def _():
    answer = ask("POST", "/v1/responses", {"input": "Hello", "max_output_tokens": 8}).body
    item = answer["output"][0]
    assert answer["id"].startswith("resp_") and item["id"].startswith("msg_"), answer
    assert answer["usage"]["output_tokens"] <= 8 and item["content"][0]["type"] == "output_text", answer


@check("same", "embedding: invalid_input")
def _():
    refused(ask("POST", "/v1/embeddings", {"input": ""}))


@check("same", "metrics: prometheus_format", "metrics: predicted_total_matches_requests")
def _():
    def metrics():
        said = ask("GET", "/metrics").text
        for name in ("requests_processing", "prompt_tokens_total", "tokens_predicted_total", "n_decode_total"):
            name = name.removesuffix("_total") if f"# TYPE llamacpp:{name} " not in said else name
            assert f"# TYPE llamacpp:{name} " in said and f"# HELP llamacpp:{name} " in said, said
        return int(re.search(r"^llamacpp:tokens_predicted_total{[^}]*} (\d+)$", said, re.M)[1])

    # Counts are told after a step, answers in it: some looks may come too early.
    before = max(metrics() for _ in range(5))
    complete(max_tokens=7)
    assert any(metrics() == before + 7 for _ in range(50)), (before, metrics())


@check("same", "metrics: timings_are_finite")
def _():
    timings = complete().body["timings"]
    assert timings["prompt_ms"] > 0 and all(value is not None and value >= 0 for value in timings.values()), timings


def rows(table):
    """The table's tests and what it says of each."""
    lines = (line.split("|")[1:3] for line in table.splitlines() if line.startswith("| "))
    for names, verdict in ((names.strip(), verdict.strip()) for names, verdict in lines):
        file, _, tests = names.partition(": ")
        yield from ((f"{file}: {test}", verdict) for test in tests.split("; "))


def main():
    with open(sys.argv[2]) as file:
        said = dict(rows(file.read()))
    wrong = []
    for name, verdict, action in CHECKS:
        try:
            action()
        except (AssertionError, KeyError, IndexError, ValueError, TypeError) as error:
            wrong.append(f"{name}: {type(error).__name__} at line {error.__traceback__.tb_next.tb_lineno}: {str(error)[:600]}")
        if said.get(name) != verdict:
            wrong.append(f"{name}: the table says {said.get(name)}, it is {verdict}")
    unchecked = {name for name, verdict in said.items() if verdict in ("same", "different")} - {name for name, _, _ in CHECKS}
    print("\n".join(wrong), file=sys.stderr)
    assert not wrong
    print(f"llama.cpp's table: {len(CHECKS)} checks, {len(unchecked)} rows by other tests: ok")


main()
