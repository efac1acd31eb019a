"""Transformers' own server, with this package imported in its process, answers for a saved folder, whole and in a stream."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from common.families import first_rows
from common.tiny import word_tokenizer

pytest.importorskip("fastapi", reason="needs the server's packages: pip install hf-linear-attn[serve]")
pytest.importorskip("uvicorn", reason="needs the server's packages: pip install hf-linear-attn[serve]")

START = (
    "import sys, hf_linear_attn; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def post(url: str, body: dict) -> str:
    """The text of the answer; an error of the server's shows what it said."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.code}: {error.read().decode()[:2000]}") from error


@pytest.fixture(scope="module")
def server():
    """The address of `transformers serve`, started as its own command would start it."""
    port = free_port()
    command = [sys.executable, "-c", START, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).read()
                break
            except OSError:
                assert process.poll() is None, process.stdout.read()[-3000:]
                time.sleep(0.5)
        else:
            pytest.fail("the server did not start within two minutes")
        yield url
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


@first_rows
def test_chat(row, server, tmp_path):
    """`/v1/chat/completions`: the whole answer, and the same in a stream of events."""
    row.causal_lm().save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    body = {
        "model": str(tmp_path),
        "messages": [{"role": "user", "content": "w5 w6 w7"}],
        "max_tokens": 6,
        "temperature": 0.0,
    }
    whole = json.loads(post(f"{server}/v1/chat/completions", {**body, "stream": False}))
    text = whole["choices"][0]["message"]["content"]
    assert text.split()
    events = post(f"{server}/v1/chat/completions", {**body, "stream": True})
    parts = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    streamed = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part.get("choices"))
    assert streamed.split() == text.split()
