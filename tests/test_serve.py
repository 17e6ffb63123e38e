# SPDX-License-Identifier: Apache-2.0
"""`jaxllm serve`: OpenAI's API over HTTP, and the chat page."""

import asyncio
import http.client
import json
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from flax import nnx
from runs import MODEL, refused
from starlette.requests import ClientDisconnect
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import jaxllm
from jaxllm import hf
from jaxllm.chat import Streamed, TextModel, generate_text
from jaxllm.cli import main
from jaxllm.config import MeshSection, PeftSection
from jaxllm.data.chat import stop_ids
from jaxllm.mesh import make_mesh
from jaxllm.model.config import LayerKind, ModelConfig, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import from_hf
from jaxllm.peft.files import make_adapter
from jaxllm.report.page import BROWSERS
from jaxllm.sampling import Sampling, generate
from jaxllm.serve import app, decoding
from jaxllm.serve.app import Stream, application, bound, host_of, listening
from jaxllm.serve.decoding import Texts, padded_length
from jaxllm.serve.engine import WAITING, Engine, Job
from jaxllm.serve.protocol import ApiError, ChatRequest, Piece, TextRequest, Usage
from jaxllm.tokenizer import is_settled, token_bytes

POSITIONS = 4096
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is é?"}]


@pytest.fixture(scope="module")
def talker(project, tmp_path_factory):
    """A directory with a model of random weights that never ends an answer by itself."""
    config = MODEL | {"max_position_embeddings": POSITIONS, "tie_word_embeddings": False}
    config["initializer_range"] = 0.4
    mesh = make_mesh(MeshSection(), jax.devices()[:1])
    model = hf.random_model(from_hf(config), mesh, config, seed=3)
    tokenizer = jaxllm.load_tokenizer(project / "tokenizer")
    head = model.head.kernel
    head[...] = head[...].at[:, np.array(stop_ids(tokenizer))].set(0.0)  # logits of 0
    path = str(tmp_path_factory.mktemp("talker") / "model")
    jaxllm.save_hf(model, path, tokenizer=tokenizer)
    return path


@contextmanager
def serving(engine, **options):
    """The address of an engine's server, which runs meanwhile."""
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        with listening(application(engine, **options), bound("127.0.0.1", 0)) as address:
            yield address
    finally:
        engine.close()
        thread.join()


class Recorded(Engine):
    """An engine that keeps its jobs."""

    def submit(self, request, emit):
        self.jobs = [*getattr(self, "jobs", []), super().submit(request, emit)]
        return self.jobs[-1]


@pytest.fixture(scope="module")
def engine(talker):
    return Recorded(TextModel.load(talker).for_decoding(), "talker")


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def sent(address, method, path, body=None, **headers):
    """(status, parsed JSON or bytes, headers) of a request."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    if isinstance(body, dict):
        body = json.dumps(body)
    if body is not None:
        headers = {"Content-Type": "application/json"} | headers
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content, kind = response.read(), response.getheader("content-type", "")
    connection.close()
    return response.status, json.loads(content) if "json" in kind else content, response.headers


# ---- answers


def test_models_and_health(client, address):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.object) == ("talker", "jaxllm", "model")
    assert client.models.retrieve("talker") == model
    with pytest.raises(openai.NotFoundError, match="known: talker"):
        client.models.retrieve("org/other")
    assert sent(address, "GET", "/health")[:2] == (200, {"status": "ok"})


def test_greedy_answers_equal_those_of_generate(client, engine):
    sampling = Sampling(40)
    loaded = engine.loaded
    keys = {"tokenizer": loaded.tokenizer, "sampling": sampling}
    chat, system = CHAT[1]["content"], CHAT[0]["content"]
    (expected,) = generate_text(loaded.model, chat, chat=True, system=system, **keys)
    options = {"model": "talker", "messages": CHAT, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == expected and len(expected) > 40
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 40
    assert whole.usage.prompt_tokens == len(loaded.prompt(CHAT))
    parts = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    assert parts[-1].usage == whole.usage and not parts[-1].choices
    deltas = [part.choices[0].delta for part in parts[:-1]]
    assert "".join(delta.content for delta in deltas) == expected
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [p.choices[0].finish_reason for p in parts[-2:-1]] == ["length"] and len(parts) > 10

    prompts = ["import", "def a():\n    "]
    options = {"model": "talker", "max_tokens": 8, "temperature": 0}
    keys |= {"sampling": Sampling(8)}
    texts = [generate_text(loaded.model, prompt, **keys)[0] for prompt in prompts]
    for form in prompts, loaded.tokenizer(prompts).input_ids:
        found = client.completions.create(prompt=form, **options)
        assert [choice.text for choice in found.choices] == texts


@pytest.mark.sweep
def test_the_same_seed_gives_the_texts_of_generate(client, engine):
    sampling = Sampling(20, temperature=0.8, top_p=0.9, seed=5)
    keys = {"tokenizer": engine.loaded.tokenizer, "sampling": sampling}
    expected = generate_text(engine.loaded.model, ["class A"] * 3, **keys)
    options = {"model": "talker", "prompt": "class A", "max_tokens": 20, "n": 3}
    found = client.completions.create(**options, temperature=0.8, top_p=0.9, seed=5)
    assert [choice.text for choice in found.choices] == expected and len(set(expected)) == 3
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    texts = {client.completions.create(**options).choices[0].text for _ in range(2)}
    assert len(texts) == 2  # without a seed


def test_a_stop_string_ends_an_answer_and_is_never_streamed(client):
    options = {"model": "talker", "messages": CHAT, "max_tokens": 60, "temperature": 0}
    text = client.chat.completions.create(**options).choices[0].message.content
    stop = text[20:26]
    before = text[: text.index(stop)]
    whole = client.chat.completions.create(**options, stop=["never", stop], logprobs=True)
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == (before, "stop")
    named = b"".join(bytes(one.bytes) for one in choice.logprobs.content)
    assert named.decode(errors="replace").startswith(before)
    streamed = ""
    for part in client.chat.completions.create(**options, stop=stop, stream=True):
        streamed += part.choices[0].delta.content
        assert before.startswith(streamed)
    assert streamed == before


def forward_logprobs(engine, tokens):
    """float32 [T, V]: log-probabilities after each token, by a full forward pass."""
    logits = engine.loaded.model(jnp.array([tokens]))[0]
    return np.asarray(jax.nn.log_softmax(logits))


def test_logprobs_equal_a_full_forward_pass(client, engine):
    loaded = engine.loaded
    prompt = loaded.prompt(CHAT)
    (new,) = generate(loaded.model, [prompt], Sampling(30))
    expected = forward_logprobs(engine, [*prompt, *new])[len(prompt) - 1 : -1]
    found = client.chat.completions.create(
        model="talker",
        messages=CHAT,
        max_completion_tokens=30,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
    )
    content = found.choices[0].logprobs.content
    assert [bytes(one.bytes) for one in content] == [token_bytes(loaded.tokenizer, t) for t in new]
    for one, token, logps in zip(content, new, expected, strict=True):
        assert abs(one.logprob - logps[token]) < 1e-4
        best = np.argsort(-logps)[:4]
        assert np.allclose([top.logprob for top in one.top_logprobs], logps[best], atol=1e-4)
        assert one.top_logprobs[0].token == one.token
    parts = client.chat.completions.create(
        model="talker", messages=CHAT, max_tokens=30, temperature=0, logprobs=True, stream=True
    )
    streamed = [one for p in parts for one in p.choices[0].logprobs.content]
    assert [one.logprob for one in streamed] == [one.logprob for one in content]


def test_logprobs_of_a_prompt_equal_a_full_forward_pass(client, engine):
    prompt = "def loads(s):\n    return 'é'"
    tokens = engine.loaded.tokenizer(prompt).input_ids
    options = {"model": "talker", "prompt": prompt, "logprobs": 2, "echo": True}
    (choice,) = client.completions.create(**options, max_tokens=3, temperature=0).choices
    (new,) = generate(engine.loaded.model, [tokens], Sampling(3))
    logps = forward_logprobs(engine, [*tokens, *new])
    expected = [logps[at, token] for at, token in enumerate([*tokens, *new][1:])]
    found = choice.logprobs
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert np.allclose(found.token_logprobs[1:], expected, atol=1e-4)
    assert choice.text.startswith(prompt) and len(found.text_offset) == len(tokens) + 3
    for offset, token in zip(found.text_offset, found.tokens, strict=True):
        if "\ufffd" not in token:
            assert choice.text[offset:].startswith(token)
    (alone,) = client.completions.create(**options, max_tokens=0).choices
    assert alone.text == prompt and alone.finish_reason == "length"
    assert alone.logprobs.token_logprobs == found.token_logprobs[: len(tokens)]


def test_requests_do_not_change_each_other(client):
    def answer(i):
        messages = [{"role": "user", "content": "x" * (1 + 4 * i)}]
        keys = {"temperature": i / 4, "seed": i, "max_tokens": 9 + i, "n": 1 + i % 2}
        found = client.chat.completions.create(model="talker", messages=messages, **keys)
        return [choice.message.content for choice in found.choices]

    alone = [answer(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, range(4))) == alone


def is_cancelled(job):
    """Once the server notices that the client has left."""
    deadline = time.monotonic() + 20
    while not job.cancelled and time.monotonic() < deadline:
        time.sleep(0.01)
    return job.cancelled


def test_a_client_that_leaves_ends_its_answer(client, engine, address):
    options = {"model": "talker", "messages": CHAT, "max_tokens": POSITIONS - 200}

    def ended(job):
        assert is_cancelled(job)
        time.sleep(0.05)
        count = job.usage.completion
        time.sleep(0.1)
        assert job.usage.completion == count < options["max_tokens"]

    stream = client.chat.completions.create(**options, stream=True)
    next(iter(stream))
    stream.close()
    ended(engine.jobs[-1])
    before = len(engine.jobs)
    place = address.removeprefix("http://").rpartition(":")
    with socket.create_connection((place[0], int(place[2]))) as raw:
        body = json.dumps(options).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place[0]}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        while len(engine.jobs) == before:
            time.sleep(0.01)
    ended(engine.jobs[-1])
    assert client.completions.create(model="talker", prompt="a", max_tokens=1).choices


@pytest.mark.sweep
def test_each_of_several_adapters_is_a_model(talker, tmp_path):
    section, folders = PeftSection(method="lora", r=2, target_modules=("q_proj",)), {}
    for seed, name in enumerate(("law", "code")):
        adapter = make_adapter(jaxllm.load_hf(talker).cfg, section)
        model = jaxllm.load_hf(talker, peft=adapter)
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            if path[-1] in ("a", "b"):
                noise = jax.random.normal(jax.random.key(seed), variable.get_value().shape)
                variable.set_value(noise)
        folders[name] = str(tmp_path / name)
        jaxllm.save_adapter(model, folders[name])
    loaded = TextModel.load(talker, adapter=folders)
    keys = {"prompts": ["class A"] * 2, "sampling": Sampling(12), "tokenizer": loaded.tokenizer}
    expected = generate_text(loaded.model, use=["law", "code"], **keys)
    with serving(Engine(loaded, "base", use=[None])) as address:
        assert [m["id"] for m in sent(address, "GET", "/v1/models")[1]["data"]] == [
            *("base", "law", "code")
        ]
        body = {"prompt": "class A", "temperature": 0, "max_tokens": 12}
        found = {
            name: sent(address, "POST", "/v1/completions", body | {"model": name})[1]
            for name in ("base", "law", "code")
        }
    texts = [one["choices"][0]["text"] for one in found.values()]
    assert texts == [generate_text(loaded.model, use=[None], **keys)[0], *expected]
    assert len(set(texts)) == 3 and found["law"]["model"] == "law"


# ---- mistakes

TEXT = {"prompt": "a"}
MESSAGES = {"messages": [{"role": "user", "content": "a"}]}
MISTAKES = [
    ("completions", {}, 400, "prompt", "prompt is missing"),
    ("completions", TEXT | {"tempratur": 1}, 400, "tempratur", "did you mean temperature?"),
    ("completions", TEXT | {"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ("completions", TEXT | {"temperature": "1"}, 400, "temperature", "seen '1'"),
    ("completions", TEXT | {"max_tokens": 10**9}, 400, None, f"{POSITIONS} positions"),
    ("completions", TEXT | {"max_tokens": 0}, 400, "max_tokens", "requires echo"),
    ("completions", TEXT | {"best_of": 2}, 400, "best_of", "not supported"),
    ("completions", TEXT | {"model": "x"}, 404, "model", "known: talker"),
    ("completions", TEXT | {"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
    ("completions", TEXT | {"stop": [""]}, 400, "stop", "at least 1 character"),
    ("completions", TEXT | {"stop": "x" * 1001}, 400, "stop", "at most 1000 characters"),
    ("completions", {"prompt": ""}, 400, None, "no tokens"),
    ("completions", {"prompt": [500]}, 400, "prompt", "not below 500"),
    ("completions", {"prompt": [[1], [-1]]}, 400, "prompt", "prompt"),
    ("completions", {"prompt": ["a"] * 9, "n": 20}, 400, "n", "at most 128"),
    ("completions", "[1]", 400, None, "must be a JSON object"),
    ("completions", '{"prompt": ', 400, None, "malformed JSON"),
    ("completions", '{"prompt": "\\ud800"}', 400, None, "surrogate"),
    ("completions", "[" * 9999, 400, None, "nested too deeply"),
    ("completions", b"\xff", 400, None, "not UTF-8"),
    ("completions", b" " * (8 << 20) + b"{}", 413, None, "8,388,608 bytes"),
    ("chat/completions", MESSAGES | {"tools": [{}]}, 400, "tools", "not supported"),
    ("chat/completions", MESSAGES | {"top_logprobs": 1}, 400, "top_logprobs", "logprobs: true"),
    ("chat/completions", {"messages": []}, 400, "messages", "at least 1 item"),
    ("chat/completions", {"messages": [{"role": "x", "content": ""}]}, 400, None, "role 'x'"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, None, "messages[0]"),
    ("nothing", TEXT, 404, None, "Not Found"),
]


def error_of(found, status):
    """The error of a refused request, in OpenAI's form."""
    assert found[0] == status, found
    assert set(found[1]) == {"error"}
    assert set(found[1]["error"]) == {"message", "type", "param", "code"}
    return found[1]["error"]


@pytest.mark.parametrize("path, body, status, param, words", MISTAKES)
def test_a_mistake_is_answered_in_openais_form(address, path, body, status, param, words):
    for more in {}, {"stream": True}:
        if more and not isinstance(body, dict):
            continue
        body = body | more if isinstance(body, dict) else body
        error = error_of(sent(address, "POST", f"/v1/{path}", body), status)
        is_long = "positions" in error["message"]
        assert (error["code"] == "context_length_exceeded") == is_long
        assert words in error["message"] and error["type"] == "invalid_request_error"
        assert error["param"] == param or path == "nothing"


@pytest.mark.parametrize(
    "kind, body",
    [
        (TextRequest, {"prompt": [0.5] * 9999}),
        (TextRequest, {"prompt": [[0.5] * 9999] * 9}),
        (TextRequest, TEXT | {"stop": [0] * 9999}),
        (ChatRequest, {"messages": [0] * 9999}),
    ],
)
def test_a_list_of_mistakes_is_read_up_to_the_first(kind, body):
    with pytest.raises(ApiError) as caught:
        kind.read(body)
    assert caught.value.__context__.error_count() <= 4  # one for each type that a value may have


def test_null_and_unused_fields_change_nothing(client):
    keys = {"user": "me", "logit_bias": {}, "presence_penalty": 0.0, "stop": None, "seed": None}
    found = client.completions.create(model="talker", prompt="a", max_tokens=2, **keys)
    assert found.usage.completion_tokens == 2


def test_requests_of_other_sites_are_refused(address):
    def status(**headers):
        return sent(address, "POST", "/v1/completions", TEXT, **headers)[0]

    port = address.rpartition(":")[2]
    for host in f"localhost:{port}", "127.0.0.1", "[::1]:5", "LOCALHOST":
        assert status(Host=host) == 200
    evil = ("evil.com", f"evil.com:{port}", "localhost.evil.com", "127.0.0.1.evil.com", "a]b", "")
    for host in evil:
        found = sent(address, "GET", "/", Host=host)
        message = error_of(found, 403)["message"]
        assert "not this server" in message and "JAXLLM_API_KEY" in message
    for kind in "text/plain", "application/x-www-form-urlencoded", "":
        assert status(**{"Content-Type": kind}) == 415
    found = sent(address, "OPTIONS", "/v1/completions", Origin="https://evil.com")
    assert found[0] == 405
    assert not any(name.lower().startswith("access-control") for name in found[2])
    assert host_of("[::1]:80") == "::1" and host_of("a:80") == "a"


def test_a_slow_body_is_refused(address, monkeypatch):
    monkeypatch.setattr(app, "SECONDS", 0.05)
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "10")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408
    connection.close()


def test_a_key_is_required_if_there_is_one(engine):
    with listening(application(engine, key="sécret"), bound("127.0.0.1", 0)) as address:
        for given in {}, {"Authorization": "Bearer x"}, {"Authorization": "sécret".encode()}:
            found = sent(address, "GET", "/v1/models", **given)
            assert error_of(found, 401)["code"] == "invalid_api_key"
            assert sent(address, "GET", "/v1/models", Host="proxy.com", **given)[0] == 401
        assert sent(address, "GET", "/health")[0] == sent(address, "GET", "/")[0] == 200
        given = {"Authorization": "Bearer sécret".encode(), "Host": "proxy.com"}
        assert sent(address, "GET", "/v1/models", **given)[0] == 200
    with listening(application(engine, key="secret"), bound("127.0.0.1", 0)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret")
        assert client.models.list().data


def test_too_many_requests_are_refused(talker, engine):
    full, events = Engine(engine.loaded, "talker"), []  # it does not run yet
    jobs = [full.submit(TextRequest.read(TEXT), events.append) for _ in range(WAITING)]
    with pytest.raises(ApiError, match="try again later"):
        full.submit(TextRequest.read(TEXT), events.append)
    jobs[3].cancel()  # those whose clients have left make room
    jobs.append(full.submit(TextRequest.read(TEXT), events.append))
    with pytest.raises(ApiError, match="try again later"):  # but not without end
        for _ in range(WAITING + 1):
            jobs[-1].cancel()
            jobs.append(full.submit(TextRequest.read(TEXT), events.append))
    full.close()
    full.run()
    assert [event.status for event in events] == [503] * (2 * WAITING)


def test_a_client_that_leaves_before_the_first_part_ends_its_answer(engine):
    job = Job(ChatRequest.read(MESSAGES), "talker", lambda event: None)

    async def parts():
        yield ""

    async def refuse(message):
        raise OSError

    async def leave():
        return {"type": "http.disconnect"}

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    with pytest.raises(ClientDisconnect):
        asyncio.run(Stream(job, parts())(scope, leave, refuse))
    assert job.cancelled


def test_a_request_whose_client_left_while_it_waited_is_not_answered(engine):
    waiting, events = Engine(engine.loaded, "talker"), []  # it does not run yet

    def emit(event):
        events.append(event)
        if isinstance(event, Usage):
            waiting.close()

    gone = waiting.submit(TextRequest.read(TEXT), events.append)
    gone.cancel()
    waiting.submit(TextRequest.read(TEXT | {"max_tokens": 1}), emit)
    waiting.run()
    assert [type(event) for event in events] == [Piece, Usage] and gone.usage.prompt == 0


def test_a_bug_is_a_500_and_the_next_request_is_answered(client, engine, monkeypatch, capsys):
    monkeypatch.setattr(engine, "_sampling", lambda *_: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
        client.completions.create(model="talker", prompt="a")
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.undo()
    assert client.completions.create(model="talker", prompt="a", max_tokens=1).choices


def test_a_model_without_a_template_continues_texts_only(client, engine, monkeypatch):
    monkeypatch.setattr(engine.loaded.tokenizer, "chat_template", None)
    assert client.models.list().data[0].chat is False
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="talker", messages=CHAT)


# ---- decoding

CFG = ModelConfig(
    "llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=256,
    ropes=(Rope(),),
    kinds=(LayerKind(0),),
    layer_kinds=(0, 0),
    initializer_range=0.4,
)
LONG = Rope(
    kind="longrope", original_length=14, short_factor=(1.0,) * 4, long_factor=(2.0, 3.0, 4.0, 5.0)
)
VARIANTS = {
    "plain": (CFG, PeftSection()),
    "longrope": (replace(CFG, ropes=(LONG,)), PeftSection()),
    "prefix": (CFG, PeftSection(method="prefix", num_virtual_tokens=3)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("plain", marks=pytest.mark.sweep),
        "longrope",
        pytest.param("prefix", marks=pytest.mark.sweep),
    ],
)
def test_texts_go_on_as_generate_does_while_their_cache_grows(name, monkeypatch):
    cfg, section = VARIANTS[name]
    monkeypatch.setattr(decoding, "SLOTS", 16)
    monkeypatch.setattr(decoding, "PROMPT", 8)
    model = Decoder(cfg, rngs=nnx.Rngs(3), peft=make_adapter(cfg, section))
    texts, prompt = Texts(model), [5, 9, 2, 7, 1, 1, 30, 44, 8, 3, 22]
    (expected,) = generate(model, [prompt], Sampling(10))
    programs = decoding._advance._cache_size()
    base, found = texts.begin(prompt), []
    for text in base.copy(), base.copy():  # the second is not changed by the first
        new = []
        for step in range(10):
            new.append(texts.next_token(text, Sampling(), step, 0))
            texts.advance(text, new[-1])
        found.append(new)
    assert found == [expected] * 2
    assert 1 <= decoding._advance._cache_size() - programs <= 2  # one for each length of a cache


def test_few_lengths_are_compiled():
    lengths = {padded_length(n, 64) for n in range(1, 1025)}
    assert sorted(lengths) == [64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(padded_length(n, 64) >= n for n in range(1, 1025))


def test_parts_of_a_text_are_whole_characters_without_a_stop_string():
    tokens = list("ab€c STOP d€".encode())

    def parts(stops, count):
        text = Streamed(lambda some: bytes(some).decode(errors="replace"), stops, bool)
        found = []
        for n in range(1, count + 1):
            found.append(text.add(tokens[:n], n == count))
            if text.ended:
                break
        return [part for part in found if part]

    assert parts([], len(tokens)) == list("ab€c STOP d€")
    assert parts(["STOP", "€x"], len(tokens)) == ["a", "b", "€c", " "]
    assert parts([], len(tokens) - 1)[-1] == "\ufffd"  # the end cuts a character
    assert parts(["OPEN"], len(tokens)) == [*"ab€c ST", "OP ", *"d€"]


def fallback() -> PreTrainedTokenizerFast:
    """A tokenizer with the decoder of SentencePiece's: a space of the first word is dropped, and a
    run of bytes that is no text becomes one U+FFFD for each."""
    words = [
        "\u2581",
        "\u2581\u2581",
        "\u2581the",
        "\u2581STOP",
        "ing",
        "n't",
        ".",
        "\u2581é",
        "</s>",
    ]
    names = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="."))
    kinds = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()
    made.decoder = decoders.Sequence([*kinds, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@pytest.mark.parametrize("kind", ["ByteLevel", "ByteFallback"])
def test_a_text_that_is_decoded_in_parts_equals_one_that_is_decoded_whole(kind, project):
    is_bytes = kind == "ByteLevel"
    tokenizer = jaxllm.load_tokenizer(project / "tokenizer") if is_bytes else fallback()
    known, rng = len(tokenizer), np.random.default_rng(0)
    plain = tokenizer("The é of 叫 and 🙂 don't STOP . ").input_ids if is_bytes else [*range(8)]
    sizes: list[int] = []

    def counted(some):
        sizes.append(len(some))
        return tokenizer.decode(some)

    euro = [9 + byte for byte in "€".encode()]  # of SentencePiece
    for noise in (0.0, 0.02, 0.3, 1.0):
        tokens: list[int] = []
        while len(tokens) < 300:
            if rng.random() < noise:
                tokens += rng.integers(0, known, rng.integers(1, 4)).tolist()
            elif is_bytes:
                tokens += plain
            else:
                tokens += euro if rng.random() < 0.2 else [int(rng.choice(plain))]
        for stops in ([], [" STOP S", "\ufffd STOP"]):
            settled = partial(is_settled, tokenizer)
            parts = Streamed(counted, stops, settled)
            whole = Streamed(tokenizer.decode, stops, lambda _: False)
            for n in range(1, len(tokens) + 1):
                last = n == len(tokens)
                assert parts.add(tokens[:n], last) == whole.add(tokens[:n], last), (noise, n)
                assert (parts.shown, parts.ended) == (whole.shown, whole.ended)
        if noise < 0.1:
            assert max(sizes) < 80
        sizes.clear()


def test_a_text_of_a_tokenizer_in_python_is_decoded_whole():
    assert not is_settled(ByT5Tokenizer(), 100)


# ---- the command


def test_the_command_serves_until_ctrl_c(talker, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []

    def use():
        for _ in range(600):
            try:
                found.append(sent(f"http://127.0.0.1:{port}", "POST", "/v1/completions", TEXT))
                break
            except OSError:
                time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=use)
    thread.start()
    assert main(["serve", talker, "--port", str(port)]) == 0
    thread.join()
    assert found[0][0] == 200 and found[0][1]["model"] == talker
    said = capsys.readouterr()
    assert f"serving at http://127.0.0.1:{port}" in said.out
    assert "text: 1 prompt tokens, 16 new" in said.err


def test_mistakes_of_the_command(capsys, talker, tmp_path):
    refused(capsys, ["serve"], "--model")
    refused(capsys, ["serve", str(tmp_path / "none")], "no such directory")
    refused(capsys, ["serve", talker, "--port", "x"], "from 0 to 65535")
    with bound("127.0.0.1", 0) as used:
        port = str(used.getsockname()[1])
        refused(capsys, ["serve", talker, "--port", port], port, "another --port")
    refused(capsys, ["serve", talker, "--host", "256.0.0.1"], "256.0.0.1")


# ---- the page


def test_the_page_loads_its_own_files_only(address):
    status, text, headers = sent(address, "GET", "/")
    assert status == 200 and b"<main" in text
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in "page.css", "page.js":
        assert name.encode() in text
        status, part, headers = sent(address, "GET", f"/{name}")
        assert status == 200 and headers["X-Content-Type-Options"] == "nosniff"
        assert b"http://" not in part and b"https://" not in part


@pytest.fixture
def page(address):
    """The page in a window of a phone's width. Fails for an error on the console, for a breach of
    its policy, and for a request to another server."""
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser_path is None:
        pytest.skip("neither Chromium nor Chrome is installed")
    with sync_api.sync_playwright() as playwright:
        options = {"executable_path": browser_path, "args": ["--no-sandbox"]}
        browser, problems = playwright.chromium.launch(**options), []
        made = browser.new_page(viewport={"width": 360, "height": 640})
        made.on("console", lambda message: problems.append(message.text))
        made.on("pageerror", lambda error: problems.append(str(error)))
        made.on("request", lambda r: None if r.url.startswith(address) else problems.append(r.url))
        made.goto(address)
        yield made
        browser.close()
    assert [problem for problem in problems if not problem.startswith("data:,")] == []


@pytest.mark.sweep
def test_a_chat_in_a_browser(page, engine):
    """Everything by keyboard: settings, a message, its answer, an answer that is stopped."""
    from playwright.sync_api import expect

    page.get_by_role("button", name="Settings").press("Enter")
    page.get_by_label("Max tokens").fill("30")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_role("button", name="Settings").press("Enter")
    message = page.get_by_label("Message", exact=True)
    message.press_sequentially("What")
    message.press("Shift+Enter")
    message.press_sequentially("is é?")
    message.press("Enter")
    page.get_by_text("cut at max tokens").wait_for()
    given = [{"role": "user", "content": "What\nis é?"}]
    prompt = engine.loaded.prompt([{"role": "system", "content": "Be brief."}, *given])
    (new,) = generate(engine.loaded.model, [prompt], Sampling(30))
    expected = engine.loaded.text(new)
    assert page.locator(".assistant .body").first.text_content() == expected
    assert engine.jobs[-1].request.messages[-1] == given[0]
    page.get_by_role("button", name="Settings").press("Enter")
    page.get_by_label("Max tokens").fill("3000")
    page.get_by_role("button", name="Settings").press("Enter")
    message.fill("Again")
    message.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    expect(page.locator(".assistant .body").last).to_have_text(re.compile(r".{20}", re.DOTALL))
    message.press("Escape")
    page.get_by_text("stopped").wait_for()
    roles = [one["role"] for one in engine.jobs[-1].request.messages]
    assert roles == ["system", "user", "assistant", "user"] and is_cancelled(engine.jobs[-1])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="New chat").press("Enter")
    assert page.locator("article").count() == 0


@pytest.mark.sweep
def test_a_message_that_was_not_answered_is_not_sent_again(page, engine):
    """Unless the user sends it: it is in the input again, if nothing else was written there."""
    from playwright.sync_api import expect

    message = page.get_by_label("Message", exact=True)
    later = iter(["", "Second"])  # in the input when the request fails
    chats, error = "**/v1/chat/completions", {"error": {"message": "too bad"}}

    def fail(route):
        message.fill(next(later))
        route.fulfill(body=f"data: {json.dumps(error)}\n\n", content_type="text/event-stream")

    for left in "First", "Second":
        page.route(chats, fail, times=1)
        message.fill("First")
        message.press("Enter")
        page.get_by_text("too bad").wait_for()
        expect(page.locator("article")).to_have_count(0)
        expect(message).to_have_value(left)
    message.press("Enter")
    expect(page.locator(".assistant .body")).to_have_text(re.compile(r"\S"), timeout=30_000)
    message.press("Escape")
    page.get_by_text("stopped").wait_for()
    assert engine.jobs[-1].request.messages == [{"role": "user", "content": "Second"}]
