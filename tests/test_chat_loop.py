# SPDX-License-Identifier: Apache-2.0
"""Completions as text, and a chat in a terminal."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from runs import DEVICES, ENV, MODEL

import jaxllm
from jaxllm import hf
from jaxllm.chat import COMMANDS, Conversation, cut, piped, typed
from jaxllm.config import MeshSection
from jaxllm.data.chat import stop_ids
from jaxllm.mesh import make_mesh
from jaxllm.model.families import from_hf


def test_text_is_cut_before_the_first_stop_string():
    assert cut("one two three", ["three", "two"]) == ("one ", True)
    assert cut("one", ["two"]) == ("one", False)


# ---- commands


def test_commands_change_the_conversation(tmp_path):
    chat = Conversation(None)
    assert chat.run("/save", "x") == "nothing to save yet"
    chat.add("user", "Hello")
    chat.add("assistant", "Hi ä")
    assert chat.run("/system", "Be\nterse.") == "system message replaced"
    system = {"role": "system", "content": "Be\nterse."}
    assert chat.messages == [system, *chat.turns] and len(chat.turns) == 2
    assert chat.run("/save", "") == "write /save FILE"
    file = tmp_path / "chats.jsonl"
    for _ in range(2):  # a file is never replaced
        assert chat.run("/save", str(file)) == f"3 messages appended to {file}"
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    assert saved == [{"messages": chat.messages}] * 2
    missing = chat.run("/save", str(tmp_path / "no" / "x"))
    assert missing == f"not saved: {tmp_path}/no/x: No such file or directory"
    assert chat.run("/clear", "") == "conversation cleared" and chat.messages == [system]
    assert chat.run("/system", "") == "system message removed" and chat.messages == []
    assert "/hlp is not a command (/help)" in chat.run("/hlp", "")
    for name in COMMANDS:
        assert name in chat.run("/help", "")


def test_without_a_terminal_lines_are_messages_up_to_an_empty_one(monkeypatch):
    lines = iter(["one", "/help", " ", "two"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert list(piped()) == ["one", "/help"]


# ---- a terminal

PROMPT = ">\x08"  # as it is drawn before anything is typed
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"
PASTE = "\x1b[200~{}\x1b[201~"
# The leader of a session gets the terminal that it opens, and so its Ctrl-C.
START = "import os, sys; os.open(os.ttyname(0), os.O_RDWR)\n"
START += "from jaxllm.cli import main; sys.exit(main())"


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *args: str):
        self.keys, screen = pty.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        env = ENV | os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        env["XLA_FLAGS"] = f"{DEVICES}1"
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *args],
            env=env | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
        )
        os.close(screen)
        self.seen = self.new = ""

    def press(self, keys: str) -> None:
        self.new = ""
        os.write(self.keys, keys.encode())

    def wait(self, shown, seconds: float = 60.0) -> str:
        """What the terminal shows since `press`, once `shown` is true of it."""
        deadline = time.monotonic() + seconds
        while not shown(self.new):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.keys], [], [], 0.1)[0]:
                try:
                    text = os.read(self.keys, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    text = ""
                assert text or shown(self.new), self.seen
                plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
                self.seen += plain
                self.new += plain
        return self.new

    def enter(self, keys: str, words: str) -> str:
        """Enters a line; waits for the words and then the prompt."""
        self.press(keys + "\r")
        return self.wait(lambda new: words in new and PROMPT in new.rpartition(words)[2], 20)

    def interrupt(self, keys: str) -> None:
        """Enters a message, and stops its answer by Ctrl-C while it is written."""
        self.press(keys + "\r")
        self.wait(lambda new: len(new) > 400)
        self.press(CTRL_C)
        self.wait(lambda new: PROMPT in new)


@pytest.fixture(scope="module")
def talker(project, tmp_path_factory):
    """A model of random weights that never ends an answer by itself."""
    config = MODEL | {"max_position_embeddings": 8192}
    mesh = make_mesh(MeshSection(), jax.devices()[:1])
    model = hf.random_model(from_hf(config), mesh, config, seed=3)
    tokenizer = jaxllm.load_tokenizer(project / "tokenizer")
    ends = np.array(stop_ids(tokenizer))
    table = model.embed.embedding  # also the head, so that their logits are 0
    table[...] = table[...].at[ends].set(0.0)
    path = str(tmp_path_factory.mktemp("talker") / "model")
    jaxllm.save_hf(model, path, tokenizer=tokenizer)
    return path


def test_exit_ends_the_chat(monkeypatch):
    lines = iter(["hi", " ", "/exit", "never read"])
    session = SimpleNamespace(prompt=lambda _: next(lines))
    monkeypatch.setattr("prompt_toolkit.PromptSession", lambda: session)
    assert list(typed(Conversation(None))) == ["hi"]


def test_a_chat_in_a_terminal(talker, tmp_path):
    options = ("--max_new_tokens", "1000", "--system", "Be brief.")
    terminal = Terminal("chat", "--model", talker, *options)
    try:
        begin = terminal.wait(lambda new: PROMPT in new)
        words = r"model: qwen3, \d\d,\d{3} parameters, float32; chat template: the tokenizer's"
        assert re.search(words, begin)
        assert "/save FILE" in terminal.enter("/help", "end, as Ctrl-D does")
        terminal.interrupt("import os")
        saved = str(tmp_path / "chat.jsonl")
        terminal.enter(f"/save {saved}", "3 messages appended")
        terminal.enter("/clear", "conversation cleared")
        terminal.press("\r")  # an empty line is no message
        terminal.wait(lambda new: new.count(PROMPT) == 2)
        terminal.interrupt(UP * 3)  # /clear, /save, import os
        terminal.enter("/system You are terse.", "system message replaced")
        terminal.enter(f"/save {saved}", "3 messages appended")
        terminal.enter("/clear", "conversation cleared")
        terminal.interrupt(PASTE.format("two\nlines"))
        terminal.press("half a message" + CTRL_C)
        terminal.wait(lambda new: PROMPT in new)
        terminal.enter(f"/save {saved}", "3 messages appended")
        terminal.press(CTRL_D)
        assert terminal.process.wait(20) == 0
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
            terminal.process.wait()
        os.close(terminal.keys)
    chats = [json.loads(line)["messages"] for line in open(saved)]
    assert [[m["role"] for m in chat] for chat in chats] == [["system", "user", "assistant"]] * 3
    assert [chat[1]["content"] for chat in chats] == ["import os", "import os", "two\nlines"]
    systems = ["Be brief.", "You are terse.", "You are terse."]
    assert [chat[0]["content"] for chat in chats] == systems
    tokenizer = jaxllm.load_tokenizer(talker)
    assert all(0 < len(tokenizer(chat[2]["content"]).input_ids) < 1000 for chat in chats)
