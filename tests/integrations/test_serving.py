"""Transformers' own server, with this package imported in its process, answers for a saved folder, whole and in a stream."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from common.families import ROWS, first_rows
from common.tiny import word_tokenizer
from transformers import AutoTokenizer

from hf_linear_attn import PACKAGED_MODEL
from hf_linear_attn.cli.main import main
from hf_linear_attn.cli.serve import _lines, parser

pytestmark = pytest.mark.thorough

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


@contextlib.contextmanager
def started(words: list[str], port: int):
    """The address of a server that these words start, when it answers; stopped at the end."""
    process = subprocess.Popen(
        [sys.executable, *words, "--port", str(port), "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
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


@pytest.fixture(scope="module")
def server():
    """The address of `transformers serve`, started as its own command would start it."""
    with started(["-c", START, "serve", "--host", "127.0.0.1"], free_port()) as url:
        yield url


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


def streamed(url: str, body: dict) -> str:
    """The text of a stream of events."""
    events = post(url, {**body, "stream": True})
    parts = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    return "".join(part["choices"][0].get("text") or "" for part in parts if part.get("choices"))


def test_our_command_serves_the_packaged_model():
    """`hf-linear-attn serve`: a whole answer, the same as a stream, and OpenAI's client."""
    port = free_port()
    body = {"model": PACKAGED_MODEL, "prompt": "My fellow citizens", "max_tokens": 6, "temperature": 0.0}
    with started(["-m", "hf_linear_attn_cli", "serve"], port) as url:
        text = json.loads(post(f"{url}/v1/completions", body))["choices"][0]["text"]
        assert text.split()
        assert streamed(f"{url}/v1/completions", body).split() == text.split()
        openai = pytest.importorskip("openai")
        found = openai.OpenAI(base_url=f"{url}/v1", api_key="none").completions.create(**body)
        assert found.choices[0].text.split() == text.split()


def test_what_the_page_says_runs(tmp_path, monkeypatch, capsys):
    """docs/howto/serve.md: its curl commands, its client, and a conversation in the terminal, on a model with a chat template."""
    shutil.copytree(PACKAGED_MODEL, tmp_path / "outputs" / "sft")
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED_MODEL)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "outputs" / "sft")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "howto" / "serve.md").read_text()
    blocks = [textwrap.dedent(found).strip() for found in re.findall(r"^(?: {4}.*\n|\n(?= {4}))+", page, flags=re.M)]
    with started(["-m", "hf_linear_attn_cli", "serve", "outputs/sft"], free_port()) as url:
        blocks = [block.replace("http://127.0.0.1:8000", url) for block in blocks]
        curls = [block.replace("\\\n", " ") for block in blocks if block.startswith("curl ")]
        for call in curls if shutil.which("curl") else ():
            answer = subprocess.run([*shlex.split(call), "-sS"], capture_output=True, text=True, timeout=120).stdout
            assert '"choices"' in answer
            assert answer.startswith("data: ") == ('"stream": true' in call)
        assert len(curls) == 2
        pytest.importorskip("openai")
        (client,) = (block for block in blocks if "import OpenAI" in block)
        capsys.readouterr()
        exec(compile(client, "serve.md", "exec"), {})
        assert capsys.readouterr().out.strip()
        (chat,) = (block for block in blocks if block.startswith("transformers chat"))
        command = [
            sys.executable,
            "-c",
            "from transformers.cli.transformers import main; main()",
            *shlex.split(chat)[1:],
        ]
        online = {**os.environ, "HF_HUB_OFFLINE": "0"}  # offline, its client refuses every address, this machine's, too
        talk = subprocess.run(
            command, input="Hello\nn\n!exit\n", env=online, capture_output=True, text=True, timeout=120
        )
        assert talk.returncode == 0, talk.stderr[-2000:]  # an answer cut at its limit asks whether to go on: n
        assert "tok/s" in talk.stdout  # the client ends an answer with its speed


def test_our_command_listens_on_loopback_and_refuses_what_it_cannot_serve(capsys, tmp_path):
    """Before anything is loaded: a folder that is not there, a port that is taken; then a model that writes no text."""
    assert parser().parse([])["host"] == "127.0.0.1"
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(tmp_path / "absent")])
    assert stop.value.code == 2
    assert "there is no folder" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "--port takes another one" in capsys.readouterr().err
    next(row for row in ROWS if row.name == "danet-encoder").build("AutoModelForMaskedLM").save_pretrained(tmp_path)
    assert main(["serve", str(tmp_path), "--port", str(free_port())]) == 1
    assert "writes no text" in capsys.readouterr().err


def test_what_is_not_loopback_is_said():
    about = {"model": "m", "address": "http://0.0.0.0:8000/v1", "chat": True}
    assert "transformers chat m http://0.0.0.0:8000/v1" in "\n".join(_lines(about, "0.0.0.0"))
    assert "there is no password" in "\n".join(_lines(about, "0.0.0.0"))
    assert "there is no password" not in "\n".join(_lines(about, "127.0.0.1"))
