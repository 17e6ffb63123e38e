# SPDX-License-Identifier: Apache-2.0
"""`jaxllm serve`: a model behind an OpenAI-compatible HTTP API, and a chat page.

protocol.py   requests and responses: JSON <-> values
decoding.py   one text at a time, in few compiled programs
engine.py     the queue of requests; generates in the main thread
app.py        routes, checks and the server, in a thread of its own
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from jaxllm.errors import UserError


def flags(parser: Any, integer: Callable[[int, int], Any]) -> None:
    """Adds the flags of the command to those of a model."""
    parser.usage = "jaxllm serve [--model] DIR [--port N] [--key value ...]"
    flag = parser.flag
    about = "address to listen on; another one makes the server reachable from other machines"
    flag("--host", about, default="127.0.0.1", metavar="ADDRESS")
    flag("--port", "port; 0 = any free one", type=integer(0, 65535), default=8000, metavar="N")
    about = "default of max_tokens for chats"
    flag("--max_new_tokens", about, type=integer(1, 2**31 - 1), default=1024, metavar="N")


def command(options: Any, adapters: dict[str, str], use: Sequence[Any]) -> None:
    """Serves the model of the options until Ctrl-C. Raises UserError without the extra `serve`."""
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"jaxllm serve needs {package}: pip install 'jaxllm[serve]'")
    from jaxllm.compilation import use_cache
    from jaxllm.serve.app import serve

    use_cache()
    serve(
        options.model,
        options.host,
        options.port,
        use=use,
        max_new_tokens=options.max_new_tokens,
        adapter=adapters,
        dtype=options.dtype,
        template=options.template,
    )
