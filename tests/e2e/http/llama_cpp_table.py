"""The assertions of llama.cpp's own server tests, as far as they do not depend on its models' words, against the real
daemon with a tiny chatting model. Usage: llama_cpp_table.py SOCKET TABLE

A check is named as the test there; TABLE (packaging/compatibility.md) must have a row for it that says the same of it:
`same` is what llama.cpp's test asserts, `different` what is answered here instead. Not a check: what the table says is not
there yet. Needs Python alone.
"""
import concurrent.futures
import http.client
import itertools
import json
import re
import socket
import sys

CONTEXT = 512
BOOK = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book"}]
CHECKS = []
# What no request had before begins with one of these.
FRESH = itertools.count(100)


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


def native(path="/completion", **fields):
    body = {"prompt": "I believe the meaning of life is", "n_predict": 8, "temperature": 0, "ignore_eos": True, **fields}
    return ask("POST", path, body)


def pieces(answer):
    """The chunks of a stream of llama.cpp's own, which has no end but its last chunk."""
    assert answer.status == 200, answer.text
    all = [json.loads(event) for event in re.findall(r"^data: (.*)$", answer.text, re.M)]
    assert [piece["stop"] for piece in all] == [False] * (len(all) - 1) + [True], answer.text
    return all


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
    assert ask("GET", "/models").body["data"] == models and ask("GET", "/v1/health").status == 200


@check("different", "basic: model_aliases_and_tags")
def _():
    model = ask("GET", "/v1/models").body["data"][0]
    assert model["id"] == "default" and set(model["aliases"]) == {"tinyllama-2", "code"} and "tags" not in model, model
    for name in ("tinyllama-2", "code", "default"):
        assert complete(model=name).body["model"] == name
    refused(complete(model="fim"), "model", status=404)


@check("different", "basic: server_slots", "basic: no_ui", "metrics: slots_idle_after_completion")
def _():
    slots = ask("GET", "/slots")
    refused(slots, status=501)
    assert "/v1/status" in slots.body["error"]["message"], slots.text
    complete()
    status = lambda: ask("GET", "/v1/status").body["models"][0]
    idle = lambda: status()["running"] == 0 and status()["kv_blocks_used"] == 0
    assert any(idle() for _ in range(50)), status()
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


@check("same", "chat_completion: apply_chat_template")
def _():
    said = [{"role": "system", "content": "You are a test."}, {"role": "user", "content": "Hi there"}]
    body = ask("POST", "/apply-template", {"messages": said}).body
    assert body["prompt"] == (
        "<|im_start|>system\nYou are a test.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    ), body
    # As tokens it is the same prompt again.
    assert complete(body["tokens"]).body["choices"][0]["text"] == chat(said).body["choices"][0]["message"]["content"]


@check("same", "chat_completion: timings_per_token")
def _():
    events = chat(stream=True, stream_options={"include_usage": True}, timings_per_token=True).events
    assert "timings" not in events[0] and events[0]["choices"][0]["delta"]["role"] == "assistant", events[0]
    for event in events[1:]:
        assert not event["choices"] or "role" not in event["choices"][0]["delta"], event
        for name in ("prompt_per_second", "predicted_per_second", "predicted_n"):
            assert event["timings"][name] >= 0, event
    told = [event["timings"]["predicted_n"] for event in events[1:]]
    assert told == sorted(told) and told[-1] == 8 and not events[-1]["choices"], told


@check("same", "chat_completion: return_progress", "metrics: timings_on_prompt_progress")
def _():
    # A step of this daemon carries 256 tokens; the model's are bytes.
    long = [{"role": "user", "content": f"{next(FRESH)} " + "This is a test" * 22}]
    for times in range(2):
        events = chat(long, stream=True, return_progress=True, timings_per_token=True).events
        told = [(event["prompt_progress"], event["timings"]) for event in events if "prompt_progress" in event]
        (first, start), (last, end) = told[0], told[-1]
        assert first["processed"] == first["cache"] and (first["cache"] > 0) == (times > 0), told
        assert (start["prompt_n"], start["prompt_ms"], start["predicted_n"]) == (0, 0, 0), start
        assert last["processed"] == last["total"] > 300 and end["prompt_ms"] > 0, told
        for (one, before), (other, after) in zip(told, told[1:]):
            assert one["total"] == other["total"] and one["cache"] == other["cache"] and one["processed"] < other["processed"]
            assert before["prompt_ms"] <= after["prompt_ms"] and min(after.values()) >= 0, told
        assert len(told) == (2 if times else 3), told


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


@check("same", "chat_completion: json_schema")
def _():
    for schema in ({"const": "42"}, '{"const": "42"}'):
        answer = chat(json_schema=schema, max_tokens=20, ignore_eos=False).body
        assert answer["choices"][0]["message"]["content"] == '"42"', answer
    assert native(json_schema={"const": "42"}, n_predict=20, ignore_eos=False).body["content"] == '"42"'


@check("same", "vllm and sglang: structured_outputs, guided_json and its kin, regex")
def _():
    def said(**fields):
        return chat(max_tokens=40, ignore_eos=False, **fields).body["choices"][0]["message"]["content"]

    for field in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]}):
        assert said(**field) in ("yes", "no"), field
    for field in ({"structured_outputs": {"regex": "a{3}/b?"}}, {"guided_regex": "a{3}/b?"}, {"regex": "a{3}/b?"}):
        assert said(**field) in ("aaa/", "aaa/b"), field
    for field in ({"structured_outputs": {"json": {"const": 1}}}, {"guided_json": {"const": 1}}):
        assert said(**field) == "1", field


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


@check("same", "completion: completion", "completion: completion_stream", "completion: prompt_cache")
def _():
    for path in ("/completion", "/completions"):
        for with_tokens in (False, True):
            answer = native(path, return_tokens=with_tokens, cache_prompt=False).body
            timings = answer["timings"]
            assert timings["predicted_n"] == 8 and timings["prompt_n"] + timings["cache_n"] == 32, answer
            assert answer["stop"] is True and answer["truncated"] is False and type(answer["has_new_line"]) is bool, answer
            assert answer["content"] == text(complete()) and answer["stop_type"] == "limit", answer
            assert len(answer["tokens"]) == (8 if with_tokens else 0) and all(type(id) is int for id in answer["tokens"])
    *middle, last = pieces(native(stream=True, seed=7))
    assert all(len(piece["tokens"]) > 0 and all(type(id) is int for id in piece["tokens"]) for piece in middle), middle
    assert "".join(piece["content"] for piece in [*middle, last]) == text(complete())
    assert last["timings"]["predicted_n"] == 8 and last["stop_type"] == "limit" and last["truncated"] is False, last
    settings = last["generation_settings"]
    assert (settings["n_predict"], settings["seed"], settings["stream"]) == (8, 7, True), settings


@check("different", "completion: completion, defaults and samplers of llama.cpp's own")
def _():
    settings = ask("POST", "/completion", {"prompt": "x", "n_predict": 1}).body["generation_settings"]
    assert (settings["temperature"], settings["top_p"], settings["repeat_penalty"]) == (1, 1, 1), settings
    assert "adaptive_target" not in settings, settings
    for field in ({"mirostat": 2}, {"typical_p": 0.5}, {"xtc_probability": 0.1}, {"n_predict": 0}):
        refused(native(**field), *field)


@check("same", "completion: stop_type")
def _():
    whole = native(n_predict=40).body["content"]
    for stream in (False, True):
        answer = native(n_predict=40, stop=[whole[10:12]], stream=stream)
        last = pieces(answer)[-1] if stream else answer.body
        assert (last["stop_type"], last["stopping_word"]) == ("word", whole[10:12]), last
    full = native(prompt="x" * (CONTEXT - 20), n_predict=-1).body
    assert (full["stop_type"], full["truncated"], full["tokens_predicted"]) == ("limit", True, 20), full


@check("same", "completion: response_fields")
def _():
    answer = native(response_fields=[]).body
    assert answer["content"] and "generation_settings" in answer, answer
    names = ["content", "generation_settings/n_predict", "prompt"]
    answer = native(response_fields=names).body
    assert answer["generation_settings/n_predict"] == 8 and answer["content"], answer
    assert answer["prompt"] == "I believe the meaning of life is" and sorted(answer) == sorted(names), answer


@check("same", "completion: n_probs", "completion: n_probs_stream")
def _():
    def right(tokens, n):
        assert len(tokens) == n, tokens
        for token in tokens:
            assert len(token["top_logprobs"]) == 10, token
            for one in (token, *token["top_logprobs"]):
                assert type(one["id"]) is int and type(one["token"]) is str and type(one["bytes"]) is list, one
                assert one["logprob"] <= 0, one

    right(native(n_probs=10).body["completion_probabilities"], 8)
    *middle, _ = pieces(native(n_probs=10, stream=True))
    for piece in middle:
        right(piece["completion_probabilities"], 1)


@check("different", "completion: n_probs_post_sampling", "completion: n_probs_post_backend_sampling")
def _():
    refused(native(n_probs=10, post_sampling_probs=True), "post_sampling_probs")


@check("different", "completion: logit_bias")
def _():
    assert native(logit_bias=[[97, 100]]).body["content"] == "a" * 8
    assert native(logit_bias={"97": 100}).body["content"] == "a" * 8
    said = ask("POST", "/tokenize", {"content": native().body["content"]}).body["tokens"]
    answer = native(logit_bias=[[id, False] for id in said], return_tokens=True).body
    assert not set(answer["tokens"]) & set(said), answer
    refused(native(logit_bias=[[" the ", -100]]), "logit_bias")


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
    refused(native(prompt={"prompt_string": "x", "multimodal_data": ["eA=="]}), "prompt")
    words = "I believe the meaning of life is"
    assert native(prompt={"prompt_string": words}).body["content"] == native(prompt=words).body["content"]


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
        answers = native(prompt=prompt).body
        assert type(answers) is list and len(answers) == 2, answers
        assert answers[0]["content"] == answers[1]["content"] == text(complete(words)), answers


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
    answer = ask("POST", "/v1/responses", {"input": "Hello", "max_output_tokens": 8, "temperature": 0}).body
    item = answer["output"][0]
    assert answer["id"].startswith("resp_") and item["id"].startswith("msg_"), answer
    assert answer["usage"]["output_tokens"] <= 8 and item["content"][0]["type"] == "output_text", answer


@check("same", "compat_oai_responses: stream_with_llama_telemetry")
def _():
    body = {"input": "This is a test" * 10, "max_output_tokens": 8, "temperature": 0.8, "stream": True,
            "timings_per_token": True, "return_progress": True, "ignore_eos": True, "seed": 1}
    events = [json.loads(event) for event in re.findall(r"^data: (.*)$", ask("POST", "/responses", body).text, re.M)]
    progress = [event for event in events if "prompt_progress" in event]
    assert progress and all(event["type"] == "response.in_progress" for event in progress), events
    for event in progress:
        assert event["prompt_progress"]["total"] > 0, event
        assert event["prompt_progress"]["processed"] >= event["prompt_progress"]["cache"], event
    timed = [event for event in events if "timings" in event]
    assert all({"prompt_per_second", "predicted_per_second"} <= set(event["timings"]) for event in timed), timed
    assert any(event["type"] == "response.output_text.delta" for event in timed), timed
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers)), numbers
    # An answer that its limit has cut ends as OpenAI has it.
    assert events[-1]["type"] == "response.incomplete" and "usage" in events[-1]["response"] and "timings" in events[-1]


@check("same", "embedding: invalid_input")
def _():
    refused(ask("POST", "/v1/embeddings", {"input": ""}))


@check("different", "infill, rerank, lora: all")
def _():
    refused(ask("POST", "/infill", {"input_prefix": "x", "input_suffix": "y"}), status=501)
    refused(ask("POST", "/rerank", {"query": "x", "documents": ["y"]}), status=501)
    refused(ask("GET", "/lora-adapters"), status=501)


@check("same", "metrics: prompt_processed_and_cached")
def _():
    def counted(name):
        return int(re.search(rf"^llamacpp:{name}_total{{[^}}]*}} (\d+)$", ask("GET", "/metrics").text, re.M)[1])

    names = {"prompt_tokens": "prompt_n", "prompt_tokens_cached": "cache_n"}
    before = {name: max(counted(name) for _ in range(5)) for name in names}
    done = [native(prompt="the quick brown fox jumps over the lazy dog" * 3, n_predict=4).body["timings"] for _ in range(2)]
    assert done[1]["cache_n"] > 0, done
    for name, told in names.items():
        expected = before[name] + sum(timings[told] for timings in done)
        assert any(counted(name) == expected for _ in range(50)), (name, before, counted(name), done)


@check("same", "metrics: prometheus_format", "metrics: predicted_total_matches_requests")
def _():
    def metrics():
        said = ask("GET", "/metrics").text
        for name in ("requests_processing", "requests_deferred", "prompt_tokens_total", "prompt_tokens_cached_total",
                     "prompt_seconds_total", "tokens_predicted_total", "tokens_predicted_seconds_total", "n_decode_total",
                     "prompt_tokens_seconds", "predicted_tokens_seconds"):
            name = name.removesuffix("_total") if f"# TYPE llamacpp:{name} " not in said else name
            assert f"# TYPE llamacpp:{name} " in said and f"# HELP llamacpp:{name} " in said, said
        return [float(re.search(rf"^llamacpp:{name}{{[^}}]*}} ([0-9.]+)$", said, re.M)[1])
                for name in ("requests_processing", "tokens_predicted_total")]

    # Counts are told after a step, answers in it: some looks come too early, while the last answer still counts as running.
    _, before = next(said for said in (metrics() for _ in range(1000)) if said[0] == 0)
    complete(max_tokens=7)
    assert any(metrics()[1] == before + 7 for _ in range(50)), (before, metrics())


@check("same", "metrics: timings_are_finite", "metrics: generation_rate_excludes_first_token")
def _():
    for n in (1, 8):
        timings = native(n_predict=n).body["timings"]
        assert timings["prompt_ms"] > 0 and timings["prompt_per_token_ms"] > 0, timings
        assert all(value is not None and value >= 0 for value in timings.values()), timings
        rate = 1e3 / timings["predicted_ms"] * (n - 1) if n > 1 else 0
        assert timings["predicted_n"] == n and abs(timings["predicted_per_second"] - rate) < 1e-6, timings
        assert n > 1 or timings["predicted_per_token_ms"] == 0, timings


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
