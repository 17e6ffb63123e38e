# SPDX-License-Identifier: Apache-2.0
"""Odd HTTP requests to `jaxllm serve`: a kind of input of `inputs.kinds`.

A request may be answered with success or with an error of OpenAI's form and a status from 400 to
499. All else is a fault: another status, a body that is no JSON, no answer.
"""

from __future__ import annotations

import atexit
import http.client
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from inputs import as_json, changed, damaged
from tiny import one_device

from jaxllm import hf
from jaxllm.chat import TextModel
from jaxllm.errors import UserError
from jaxllm.model.families import from_hf
from jaxllm.tokenizer import load_tokenizer

CHAT = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a é"}], "name": "x"},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
        {"role": "user", "content": "<|im_end|>"},
    ],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "logprobs": True,
    "top_logprobs": 2,
    "stop": ["a", "b"],
    "seed": 1,
}
TEXT = {"model": "tiny", "prompt": ["a", "é"], "max_tokens": 2, "n": 2, "logprobs": 1, "echo": True}
KEYS = ("n", "stream", "stream_options", "tools", "best_of", "user", "max_completion_tokens")
KEYS += ("logit_bias", "presence_penalty", "echo", "response_format", "unknown")
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
OTHERS = (
    "/",
    "/v1",
    "/v1/models",
    "/health",
    "/page.js",
    "/../x",
    "/%00",
    "//x",
    "/v1/completions/",
)
HOSTS = ("localhost", "127.0.0.1:1", "[::1]", "[", ":", "evil.com", "\xff", "a" * 300, "1" * 5000)
HEADER = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=5)
TYPES = ("application/json", "application/json; charset=x", "text/plain", "", "\xff")


AT_END = ExitStack()
atexit.register(AT_END.close)


@cache
def address(tokenizer: str) -> str:
    """HOST:PORT of a server in this process, which ends with the process."""
    from jaxllm.serve.app import application, bound, listening
    from jaxllm.serve.engine import Engine

    shape = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}
    model = hf.random_model(from_hf(shape), one_device(), shape, seed=0)
    engine = Engine(TextModel.of(model, load_tokenizer(tokenizer)), "tiny", max_new_tokens=8)
    engine.warm_up()
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    # In reverse order: no thread may run a program while the process ends.
    AT_END.callback(thread.join)
    AT_END.callback(engine.close)
    server = listening(application(engine), bound("127.0.0.1", 0))
    return AT_END.enter_context(server).removeprefix("http://")


def http_requests(tokenizer: Path) -> tuple[st.SearchStrategy[Any], Callable[[Any], None]]:
    """The strategy of requests (method, path, headers, body), and the function that sends one.

    tokenizer: directory of a tokenizer with a chat template and at most 300 tokens.
    """

    def bodies(base: dict[str, Any]) -> st.SearchStrategy[bytes]:
        whole = changed(base, (*base, *KEYS)).map(as_json)
        damages = damaged(json.dumps(base).encode()).filter(lambda x: isinstance(x, bytes))
        return whole | whole | whole | damages

    usual = st.fixed_dictionaries({"Content-Type": st.just("application/json")})
    odd = st.fixed_dictionaries(
        {"Content-Type": st.sampled_from(TYPES)},
        optional={"Host": st.sampled_from(HOSTS), "Authorization": HEADER},
    )
    posts = st.one_of(
        *(
            st.tuples(st.just("POST"), st.just(path), usual, bodies(base))
            for path, base in PATHS.items()
        )
    )
    methods = st.sampled_from(("GET", "POST", "HEAD", "PUT", "OPTIONS", "DELETE", "X"))
    paths = st.sampled_from((*OTHERS, *PATHS))
    others = st.tuples(methods, paths, odd, st.sampled_from((b"", b"{}", b"null")))

    def send(drawn: Any) -> None:
        method, path, headers, body = drawn
        connection = http.client.HTTPConnection(address(str(tokenizer)), timeout=20)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in {**headers, "Content-Length": len(body)}.items():
                connection.putheader(name, str(value).encode("latin-1", "replace"))
            connection.endheaders(body)
            response = connection.getresponse()
            check(method, response, response.read())
        finally:
            connection.close()

    return posts | posts | posts | others, send


def check(method: str, response: http.client.HTTPResponse, content: bytes) -> None:
    """Raises UserError for an error in OpenAI's form, and AssertionError for a fault."""
    kind = response.headers.get_content_type()
    said = f"{response.status} {kind}: {content[:200]!r}"
    if kind == "text/event-stream":
        *events, last = content.decode().removesuffix("\n\n").split("\n\n")
        values = [json.loads(event.removeprefix("data: ")) for event in events]
        assert last == "data: [DONE]" and not any("error" in value for value in values), said
    elif method == "HEAD" or response.status < 400:
        assert response.status < 500 and (kind != "application/json" or content or method), said
    elif content == b"Invalid HTTP request received.":  # h11's, of what is not HTTP
        raise UserError("not HTTP")
    else:
        assert 400 <= response.status < 500, said
        error = json.loads(content)["error"]
        assert error["message"] and error["type"] == "invalid_request_error", said
        raise UserError(" ".join(error["message"].split()))
