"""The real openai client's responses against the real daemon with a tiny model.

Usage: responses_client.py SOCKET all | whole | begin | finish ID NUMBER
`begin` starts a response in the background, hears some of it, and prints its id, the number of the last event heard and
the text so far; `finish` hears the rest and prints the whole text; `whole` prints the text of the same request.
"""
import json
import sys
import time

import httpx
import openai

client = openai.OpenAI(
    base_url="http://localhost/v1",
    api_key="none",
    max_retries=0,
    http_client=httpx.Client(transport=httpx.HTTPTransport(uds=sys.argv[1]), timeout=60),
)
short = dict(model="default", input="Hello", max_output_tokens=12, temperature=0.7, extra_body={"seed": 3})
# Long enough to be cut.
long = dict(
    model="default", input="Hello", max_output_tokens=3000, temperature=0.7, extra_body={"seed": 5, "ignore_eos": True}
)


def text_of(events):
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def poll(identity):
    while (response := client.responses.retrieve(identity)).status in ("queued", "in_progress"):
        time.sleep(0.05)
    return response


def everything():
    whole = client.responses.create(**short)
    assert whole.status in ("completed", "incomplete") and whole.output[0].role == "assistant", whole
    assert whole.usage.output_tokens <= 12 and whole.usage.input_tokens > 3, whole.usage
    assert whole.store is False, whole
    events = list(client.responses.create(**short, stream=True))
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers)), numbers
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ], kinds
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds
    assert text_of(events) == whole.output_text == events[-1].response.output_text, (events, whole)

    # A chain of stored responses says what a conversation says that the client keeps.
    first = client.responses.create(**short, instructions="Be brief.", store=True)
    second = client.responses.create(**{**short, "input": "And then?"}, previous_response_id=first.id)
    kept = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]
    alone = client.responses.create(**{**short, "input": kept})
    assert second.output_text == alone.output_text, (second, alone)
    # One that is stored tells times while it is answered, and its numbers stay those that the journal gives again.
    told = {**short["extra_body"], "timings_per_token": True, "return_progress": True}
    live = list(client.responses.create(**{**short, "extra_body": told}, stream=True, store=True))
    again = list(client.responses.retrieve(live[-1].response.id, stream=True))
    assert any(hasattr(event, "timings") for event in live if event.type == "response.output_text.delta"), live
    assert not any(hasattr(event, "prompt_progress") for event in live), live
    assert live[-1].sequence_number == again[-1].sequence_number and text_of(again) == text_of(live), (live, again)
    # Another one that goes on from the first leaves the second as it is.
    other = client.responses.create(**{**short, "input": "Why?"}, previous_response_id=first.id)
    assert client.responses.retrieve(second.id).output_text == second.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert client.responses.retrieve(other.id).previous_response_id is not None

    assert refused(openai.NotFoundError, **short, previous_response_id="resp_0")["param"] == "previous_response_id"
    assert refused(openai.BadRequestError, **{**short, "max_output_tokens": 0})["param"] == "max_output_tokens"
    assert refused(openai.ConflictError, delete=first.id)["code"] == "response_in_use"
    client.responses.delete(second.id)
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
        raise AssertionError("it is deleted")
    except openai.NotFoundError as error:
        assert error.body["code"] == "response_not_found", error

    background = client.responses.create(**short, background=True)
    assert poll(background.id).output_text == whole.output_text
    cancelled = client.responses.create(**{**long, "max_output_tokens": 3000}, background=True)
    assert client.responses.cancel(cancelled.id).status == "cancelled"
    assert poll(cancelled.id).status == "cancelled"

    tool = {"type": "function", "name": "stop", "parameters": {"type": "object", "additionalProperties": False}}
    called = client.responses.create(
        **{**short, "max_output_tokens": 200}, tools=[tool], tool_choice={"type": "function", "name": "stop"}
    )
    assert called.output[0].type == "function_call" and called.output[0].name == "stop", called
    assert json.loads(called.output[0].arguments) == {}, called
    result = {"type": "function_call_output", "call_id": called.output[0].call_id, "output": "done"}
    items = [{"role": "user", "content": "Hello"}, called.output[0].model_dump(exclude_none=True), result]
    assert client.responses.create(**{**short, "input": items}, tools=[tool]).output_text is not None
    print("responses: ok")


def refused(kind, delete=None, **arguments):
    try:
        client.responses.delete(delete) if delete else client.responses.create(**arguments)
    except kind as error:
        return error.body
    raise AssertionError(f"{arguments} was not refused with {kind}")


if sys.argv[2] == "all":
    everything()
elif sys.argv[2] == "whole":
    print(repr(client.responses.create(**long).output_text))
elif sys.argv[2] == "begin":
    heard = []
    for event in client.responses.create(**long, background=True, stream=True):
        heard.append(event)
        if len(text_of(heard)) > 200:
            break
    print(heard[0].response.id)
    print(json.dumps([heard[-1].sequence_number, text_of(heard)]))
else:
    number, said = json.loads(sys.argv[4])
    rest = list(client.responses.retrieve(sys.argv[3], stream=True, starting_after=number))
    assert rest[-1].type == "response.incomplete", rest[-1]
    text = said + text_of(rest)
    # Now it is over, it is told from the journal: whole, and from anywhere.
    assert client.responses.retrieve(sys.argv[3]).output_text == text
    again = list(client.responses.retrieve(sys.argv[3], stream=True, starting_after=number))
    assert said + text_of(again) == text
    print(repr(text))
