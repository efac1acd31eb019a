"""`hf-linear-attn serve`: Transformers' own server, with our families known to it."""

import socket

from ..training.number_range import NumberRange
from .parser import Parser, one_of
from .quiet import begin_work

DESCRIPTION = """\
Serve a model over HTTP with OpenAI's protocol: Transformers' own server (`transformers serve`), to which our families are known.
Whole answers and streams at /v1/chat/completions (where the tokenizer has a chat template) and /v1/completions.

Each request is answered by a generate() of its own, one after the other: many conversations are not batched, and the state of a
conversation is not kept between its requests. Only programs of this machine can connect, unless --host says otherwise.
"""

EXAMPLES = """\
examples:
  hf-linear-attn serve
      the small LEAP that comes with the package, at http://127.0.0.1:8000/v1
  hf-linear-attn serve outputs/sft --port 8080 --device cuda --dtype bfloat16
  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
       -d '{"model": "outputs/leap", "prompt": "My fellow citizens", "max_tokens": 40, "stream": true}'
      a request names the model as the command did
"""

DTYPES = ("auto", "float32", "bfloat16", "float16")
LEVELS = ("error", "warning", "info", "debug")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MISSING = "the server needs packages that are not installed: pip install 'hf-linear-attn[serve]'"


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="hf-linear-attn serve", description=DESCRIPTION, epilog=EXAMPLES)
    made.add_checkpoint("folder or Hub name of a causal language model")
    made.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen at (default: 127.0.0.1, this machine alone; there is no password)",
    )  # fmt: skip
    made.add_number("--port", int, NumberRange(least=1, most=65_535), "port to listen at (default: 8000)", 8000)
    made.add_argument(
        "--dtype",
        type=one_of(DTYPES),
        default="auto",
        metavar="|".join(DTYPES),
        help="numbers (default: the checkpoint's)",
    )
    made.add_argument(
        "--log-level",
        type=one_of(LEVELS),
        default="warning",
        metavar="|".join(LEVELS),
        help="of Transformers (default: warning)",
    )
    made.add_device()
    made.add_json()
    return made


def run(arguments: list[str]) -> int:
    """Parse, load, serve until Ctrl-C. Exit codes: 0, 1 for a model or a port that cannot be used, 2 for a wrong call."""
    command = parser()
    given = command.parse(arguments)
    host, port, model = given["host"], given["port"], given["checkpoint"]
    _refuse_used(host, port)
    begin_work(model)
    from ..modeling.shared.compat import run_server
    from .generate import check_writes
    from .result import show

    check_writes(model)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}/v1"
    about = {"model": model, "address": address, "chat": _has_chat_template(model)}
    show(about, "\n".join(_lines(about, host)), given.get("json", False))
    try:
        run_server(
            model, host=host, port=port, device=given["device"], dtype=given["dtype"], log_level=given["log_level"]
        )
    except ModuleNotFoundError as error:
        raise ImportError(f"{MISSING} ({error})") from error
    return 0


def _lines(about: dict, host: str) -> list[str]:
    """What a user has to know before the first request."""
    lines = [f"serving {about['model']} at {about['address']} (Ctrl-C stops)"]
    if about["chat"]:
        lines.append(f"chat: transformers chat {about['model']} {about['address']}")
    else:
        lines.append("its tokenizer has no chat template: /completions answers, /chat/completions does not")
    if host not in LOOPBACK:
        lines.append(f"{host} is not loopback: whoever reaches this machine can use the model, there is no password")
    return lines


def _refuse_used(host: str, port: int) -> None:
    """OSError before anything is loaded where another program has the port, or the machine has no such address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen at {host}, port {port}: {error.strerror or error}; --port takes another one"
            ) from None


def _has_chat_template(model: str) -> bool:
    from ..hub.loading import load_tokenizer

    return getattr(load_tokenizer(model), "chat_template", None) is not None
