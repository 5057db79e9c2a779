"""A small strict engine with OpenAI's interface, whose base path says what goes wrong: /NAME/v1/...

Prints the ports of HTTP and, with a certificate and key as arguments, of HTTPS. GET /seen tells for each NAME how many
requests came (posts), what the last one was (body, authorization), and how many were left in the middle (left).
"""

import collections
import http.server
import json
import ssl
import sys
import threading
import time

SEEN = collections.defaultdict(lambda: {"posts": 0, "left": 0, "body": None, "authorization": None})
LOCK = threading.Lock()
OPENAI = {
    "model", "messages", "prompt", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop", "n",
    "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice",
    "response_format", "parallel_tool_calls", "reasoning_effort",
}
VLLM = OPENAI | {"top_k", "min_p", "repetition_penalty", "ignore_eos", "chat_template_kwargs", "structured_outputs"}
# More than what the daemon takes of one event.
HUGE = 2 << 20


class Engine(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def whole(self, status, value, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        self.wfile.write(body)

    def error(self, status, message, headers=None, **more):
        self.whole(status, {"error": {"message": message, "type": "x", **more}}, **(headers or {}))

    def stream(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def write(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def say(self, value):
        self.write(b"data: %s\n\n" % (value if isinstance(value, bytes) else json.dumps(value).encode()))

    def delta(self, finish=None, **delta):
        self.say({"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    def complete(self, reason="stop"):
        self.delta(reason)
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        self.say({"id": "x", "choices": [], "usage": usage})
        self.say(b"[DONE]")
        self.write(b"")

    def drop(self):
        self.close_connection = True

    def do_GET(self):
        _, name, *rest = self.path.split("/")
        if self.path == "/seen":
            return self.whole(200, SEEN)
        if rest != ["v1", "models"]:
            return self.error(404, "no such path")
        if name == "gone":
            return self.drop()
        model = {"id": "there", "object": "model", "owned_by": "somebody" if name == "plain" else "vllm"}
        return self.whole(200, {"object": "list", "data": [{**model, "max_model_len": 4096}]})

    def do_POST(self):
        _, name, *rest = self.path.split("/")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK:
            seen = SEEN[name]
            seen["posts"] += 1
            n = seen["posts"]
            seen["body"], seen["authorization"] = body, self.headers["Authorization"]
        known = OPENAI if name == "plain" else VLLM
        if rest[:1] != ["v1"] or rest[1:] not in (["chat", "completions"], ["completions"]):
            return self.error(404, "no such path")
        if not set(body) <= known or body["model"] != "there" or body["stream"] is not True:
            return self.error(400, f"unknown: {sorted(set(body) - known)}")
        try:
            getattr(self, f"on_{name}", self.on_good)(n, body)
        except (BrokenPipeError, ConnectionResetError):
            with LOCK:
                seen["left"] += 1
            self.drop()

    def on_good(self, _, body):
        self.stream()
        self.write(b": a comment\r\n\r\n")
        self.delta(role="assistant", content="")
        self.delta(reasoning_content="hm")
        if body.get("tools"):
            call = {"index": 0, "id": "c", "type": "function", "function": {"name": "light", "arguments": ""}}
            self.delta(tool_calls=[call])
            for part in ['{"on":', " true}"]:
                self.delta(tool_calls=[{"index": 0, "function": {"arguments": part}}])
            return self.complete("tool_calls")
        self.delta(content="Hel")
        self.delta(content="lo")
        return self.complete()

    def on_talks(self, n, _):
        """Whatever it is told to call."""
        self.on_good(n, {})

    def on_drops_twice(self, n, body):
        if n > 2:
            return self.on_good(n, body)
        if n == 2:
            self.stream()
            self.delta(role="assistant", content="")
        return self.drop()

    def on_drops(self, *_):
        self.drop()

    def on_drops_later(self, *_):
        self.stream()
        self.delta(content="Hel")
        self.drop()

    def on_ends_early(self, *_):
        self.stream()
        self.delta(content="Hel")
        self.write(b"")

    def wait(self):
        # Until the other end has closed.
        while self.connection.recv(1):
            pass
        raise ConnectionResetError

    def on_hangs(self, *_):
        self.wait()

    def on_hangs_later(self, *_):
        self.stream()
        self.delta(content="Hel")
        self.wait()

    def on_pings(self, *_):
        self.stream()
        while True:
            self.write(b": still here\n\n")
            time.sleep(0.05)

    def on_garbage(self, *_):
        self.stream()
        self.say(b"{no JSON")

    def on_huge(self, *_):
        self.stream()
        self.write(b"data: " + b"x" * HUGE)

    def on_page(self, *_):
        self.whole(200, {"choices": []})

    def on_busy_twice(self, n, body):
        if n > 2:
            return self.on_good(n, body)
        return self.error(429 if n == 1 else 503, "later", {"Retry_After": 0})

    def on_busy(self, *_):
        self.error(503, "later", {"Retry_After": 60})

    def on_refuses(self, *_):
        self.error(400, "must be cheerful", param="messages[0]", code=400)

    def on_too_long(self, *_):
        self.error(400, "This model's maximum context length is 4096 tokens.", code=400)

    def on_locked(self, *_):
        self.error(401, f"wrong key: {self.headers['Authorization']}")

    def on_fails(self, *_):
        self.error(500, f"header {self.headers['Authorization']} broke me")

    def on_endless(self, *_):
        self.stream()
        while True:
            self.delta(content="x" * 1000)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        pass


def main():
    servers = [Server(("127.0.0.1", 0), Engine)]
    if len(sys.argv) == 3:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[1], sys.argv[2])
        secure = Server(("127.0.0.1", 0), Engine)
        secure.socket = context.wrap_socket(secure.socket, server_side=True, do_handshake_on_connect=False)
        servers.append(secure)
    print(*(server.server_address[1] for server in servers), flush=True)
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    servers[0].serve_forever()


main()
