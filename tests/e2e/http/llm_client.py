"""The command `llm` against the real daemon with a tiny model, through a local port. Usage: llm_client.py PORT KEY

`llm` speaks to addresses only, so it gets the daemon's TCP door; its models stand in a file as its manual has it.
"""
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

port, key = sys.argv[1:]
home = tempfile.TemporaryDirectory()
models = pathlib.Path(home.name, "extra-openai-models.yaml")
models.write_text(
    f"""- model_id: box
  model_name: default
  api_base: http://127.0.0.1:{port}/v1
  api_key_name: box
  supports_tools: true
  supports_schema: true
"""
)
environment = {**os.environ, "LLM_USER_PATH": home.name}


def command(*arguments):
    return [sys.executable, "-m", "llm", *arguments]


def run(*arguments, **options):
    done = subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


run("keys", "set", "box", "--value", key)
assert "box" in run("models"), run("models")
few = ["-o", "max_tokens", "12", "-o", "seed", "3", "-o", "temperature", "0.7"]
whole = run("-m", "box", "--no-stream", *few, "Hello")
assert whole.strip() and run("-m", "box", *few, "Hello").strip() == whole.strip(), whole
assert run("-m", "box", "-c", *few, "And then?").strip()
number = '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false}'
formed = run("-m", "box", "--schema", number, "-o", "max_tokens", "200", "Hello")
assert json.loads(formed)["n"] in (1, 2), formed
assert run("-m", "box", "-T", "llm_version", *few, "Hello").strip()

# Interrupted in the middle, it has cancelled; the next one is served.
endless = subprocess.Popen(
    command("-m", "box", "-o", "max_tokens", "3000", "Hello"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
)
endless.stdout.read(1)
endless.send_signal(signal.SIGINT)
endless.communicate(timeout=60)
assert run("-m", "box", *few, "Hello").strip() == whole.strip()
print("llm: ok")
