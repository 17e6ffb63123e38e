# SPDX-License-Identifier: Apache-2.0
"""Records of every layout as conversations, pairs, judged answers and prompts."""

import json

import pytest

from jaxllm.config import DataSection, Source
from jaxllm.data.conversations import (
    USER_TEMPLATES,
    parse_conversation,
    parse_judged,
    parse_pair,
    parse_prompt,
)

AT = "a.jsonl:7"


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def chat(record, columns=None, **data):
    return parse_conversation(record, Source("", columns=columns or {}), DataSection(**data), AT)


def messages(record, **data):
    return chat(record, **data)["messages"]


# ---- conversations

Q_A = [user("q"), says("a")]


@pytest.mark.parametrize(
    ("record", "want"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, Q_A),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            [system("s"), user("q\ni"), says("a")],
        ),
        (
            {"instruction": "q2", "output": "a2", "history": [["q", "a"]], "system": None},
            [*Q_A, user("q2"), says("a2")],
        ),
        ({"messages": Q_A}, Q_A),
        ({"messages": json.dumps(Q_A)}, Q_A),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, Q_A),
        ({"conversations": Q_A}, Q_A),
        ({"prompt": "q", "completion": "a"}, Q_A),
        ({"prompt": Q_A[:1], "completion": Q_A[1:], "messages": None}, Q_A),
        ({"prompt": Q_A[0], "completion": Q_A[1]}, Q_A),
        ({"question": "q", "answer": "a"}, Q_A),
    ],
)
def test_every_layout_becomes_messages(record, want):
    assert chat(record) == {"messages": want, "tools": None, "notes": []}


def test_columns_are_renamed():
    assert messages({"ask": "q", "say": "a"}, columns={"prompt": "ask", "completion": "say"}) == Q_A


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "a", "id": 2}, "found the columns text, id; a conversation needs messages"),
        ({"prompt": "a"}, "found the columns prompt"),
        ({"messages": []}, "a conversation must be a list of messages; saw \\[\\]"),
        ({"messages": "hello"}, "messages is not JSON.*saw 'hello'"),
        ({"messages": ["hello"]}, "a message must be an object with role and content"),
        ({"messages": [{"role": "user"}]}, "a message's content is NoneType, not a string"),
        (
            {"messages": [{"from": "function_call", "value": "[1]"}]},
            "a tool call must have a name and arg",
        ),
        ({"messages": Q_A, "tools": "get"}, "tools is not JSON"),
        ({"messages": Q_A, "tools": 5}, "tools must be a list of JSON schemas; saw 5"),
        ({"messages": Q_A, "tools": [5]}, "tools must be a list of JSON schemas"),
        ({"messages": Q_A, "system": 5}, "system is int, not a string: 5"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, r"a message has the role \['user'\]"),
        ({"messages": '["\\ud83d"]'}, "messages is not JSON: .* lone surrogate"),
        *(
            ({"instruction": "q", "output": "a", "history": history}, "history must be a list of")
            for history in (5, [None], [["a"]], [["a", "b", "c"]], ["ab"])
        ),
        ({"instruction": ["q"], "output": "a"}, "instruction is list, not a string"),
        ({"instruction": 3, "input": "i", "output": "a"}, "instruction is int, not a string: 3"),
        ({"instruction": "q", "input": 3, "output": "a"}, "input is int, not a string"),
        ({"instruction": "q", "output": 3}, "a message's content is int, not a string"),
        *(
            (
                {"messages": [user("q"), says("a") | {"tool_calls": calls}]},
                "a tool call must have a name",
            )
            for calls in (5, "get", [5], [{"function": None}], [{"function": {"name": 1}}])
        ),
    ],
)
def test_a_record_that_is_no_conversation_says_what_was_found(record, words):
    with pytest.raises(ValueError, match=f"^{AT}: {words}"):
        chat(record)


def test_a_record_nested_too_deeply_is_named():
    deep = {}
    for _ in range(2000):
        deep = {"a": deep}
    calls = [{"name": "f", "arguments": deep}]
    for bad in ({"tools": [{"name": "f", "parameters": deep}]}, {"role": deep}, {"x": deep}):
        record = {"messages": [user("q"), says("a") | bad]} | bad
        with pytest.raises(ValueError, match=f"^{AT}: the record is nested too deeply"):
            chat(record)
    for read in (pair, feedback):
        sides = {"chosen": says("a") | {"tool_calls": calls}, "rejected": "b", "label": True}
        with pytest.raises(ValueError, match=f"^{AT}: the record is nested too deeply"):
            read(sides | {"prompt": "q", "messages": [user("q"), sides["chosen"]]})


@pytest.mark.parametrize("column", ["images", "image", "videos", "video", "audios", "audio"])
def test_a_column_beside_text_is_refused_unless_dropped(column):
    for value in (["x.png"], {"bytes": b"", "path": None}, "x.png"):
        record = {"messages": Q_A, column: value}
        with pytest.raises(ValueError, match=rf"^{AT}: .*column {column} .*columns: \[{column}\]"):
            chat(record)
        assert messages(record, drop_columns=(column,)) == Q_A
    for nothing in ([], None, "", {}):
        assert messages({"messages": Q_A, column: nothing}) == Q_A


def test_a_dropped_column_is_as_if_it_were_not_there():
    both = {"messages": [user("x"), says("y")], "prompt": "q", "completion": "a"}
    assert messages(both, drop_columns=("messages", "none")) == Q_A
    with pytest.raises(
        ValueError, match="columns maps prompt to x, but the record's columns are completion"
    ):
        chat({"x": "q", "completion": "a"}, columns={"prompt": "x"}, drop_columns=("x",))
    found = parse_prompt(
        {"prompt": "q", "x": 1, "y": 2}, Source(""), DataSection(drop_columns=("x",)), AT
    )
    assert found.columns == {"y": 2}


# ---- system messages


@pytest.mark.parametrize("first", [system("s"), {"role": "developer", "content": "s "}])
def test_a_system_column_that_repeats_the_system_message_stands_once(first):
    assert messages({"system": "s", "messages": [first, *Q_A]}) == [first, *Q_A]
    with pytest.raises(ValueError, match=f"^{AT}: the column system is 't', but the messages"):
        chat({"system": "t", "messages": [first, *Q_A]})


# ---- what is learned

TURNS = [user("a"), says("b"), user("c"), says("d")]


@pytest.mark.parametrize("name", ["loss_mask", "loss_masks", "weights", "loss_weights", "train"])
def test_a_list_of_a_record_weighs_its_answers(name):
    for values in ([0, 1], [False, True], [0, 0, 1, 1], [None, 0, None, True], "[0, 1]"):
        got = messages({"messages": TURNS, name: values, "system": "s"})
        assert [m.get("weight") for m in got] == [None, None, 0, None, 1]
    with pytest.raises(
        ValueError, match=f"^{AT}: {name} has 3 values, but there are 4 messages, 2 of them"
    ):
        chat({"messages": TURNS, name: [0, 1, 1]})
    assert messages({"messages": TURNS, name: [0, 1, 1]}, drop_columns=(name,)) == TURNS
    with pytest.raises(ValueError, match=f"^{AT}: .*{name} is 'x'; use true, false or a number"):
        chat({"messages": TURNS, name: ["x", 1]})


def test_a_list_that_contradicts_a_message_is_named_and_one_value_told():
    muted = [TURNS[0], TURNS[1] | {"train": False}, *TURNS[2:]]
    assert messages({"messages": muted, "loss_mask": [0, 1]})[1]["weight"] == 0
    with pytest.raises(
        ValueError, match=f"^{AT}: a message has the loss weight 1 in loss_mask and 0 else"
    ):
        chat({"messages": muted, "loss_mask": [1, 1]})
    assert "the column loss is a single value" in chat({"messages": Q_A, "loss": 2.5})["notes"][0]


def test_answers_inside_a_prompt_are_not_learned():
    shots = {"prompt": TURNS[:3], "completion": "d"}
    assert messages(shots) == [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    weighed = [TURNS[0], TURNS[1] | {"weight": 0.5}, TURNS[2]]
    assert messages(shots | {"prompt": weighed})[1]["weight"] == 0.5
    assert [m.get("weight") for m in messages(shots | {"weights": [1, 0]})] == [None, 1, None, 0]


def test_a_prompt_that_the_completion_repeats_stands_once():
    for completion in ([user("q"), says("a")], [system("s"), user("q"), says("a")]):
        assert messages({"prompt": "q", "completion": completion}) == completion
    assert messages({"prompt": [system("s")], "completion": Q_A}) == [system("s"), *Q_A]
    with pytest.raises(
        ValueError, match=f"^{AT}: the prompt ends with 'p', but the messages of completion begin"
    ):
        chat({"prompt": "p", "completion": Q_A})


# ---- user_template


def test_user_template_rewrites_the_last_user_turn_from_columns():
    record = {"question": "who?", "answer": "Ada", "context": ["p {x}", "q"]}
    got = messages(record, user_template="{context} -> {question}")
    assert got == [user("p {x}\n\nq -> who?"), says("Ada")]
    for asked in ("q", [{"type": "text", "text": "q"}]):
        rag = messages({"messages": [user(asked), says("a")], "context": "c"}, user_template="rag")
        assert rag[0]["content"] == USER_TEMPLATES["rag"].format(question="q", context="c")
    with pytest.raises(ValueError, match=rf"^{AT}: user_template .*KeyError\('context'\)"):
        chat({"messages": Q_A}, user_template="rag")


@pytest.mark.parametrize("template", ["{question.x}", "{question[a]}", "{question", "{0}", "{q:d}"])
def test_a_user_template_that_does_not_fit_names_the_record(template):
    with pytest.raises(
        ValueError, match=f"^{AT}: user_template .* cannot be filled in: .*columns are mess"
    ):
        chat({"messages": Q_A, "q": "text"}, user_template=template)


# ---- pairs


def pair(record, columns=None, **data):
    return parse_pair(record, Source("", columns=columns or {}), DataSection(**data), AT)


SIDES = {
    "strings": {"chosen": "yes", "rejected": "no"},
    "messages": {"chosen": says("yes"), "rejected": says("no")},
    "lists": {"chosen": [says("yes")], "rejected": [says("no")]},
    "from and value": {
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "whole": {"chosen": [user("why?"), says("yes")], "rejected": [user("why?"), says("no")]},
    "one whole": {"chosen": [user("why?"), says("yes")], "rejected": "no"},
}
ASKED = {
    "question": {"question": "why?"},
    "prompt": {"prompt": "why?"},
    "prompt, messages": {"prompt": [user("why?")]},
    "instruction": {"instruction": "why?", "input": ""},
    "messages": {"messages": [user("why?")]},
    "messages as JSON": {"messages": json.dumps([user("why?")])},
    "conversations": {"conversations": [{"from": "human", "value": "why?"}]},
    "with white space": {"prompt": "why?\n"},
    "with the chosen answer": {"messages": [user("why?"), says("yes")]},
}


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES.keys())
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_every_layout_is_the_same_pair(asked, sides):
    found = pair(asked | sides)
    assert [m["content"].strip() for m in found.prompt] == ["why?"]
    assert (found.chosen, found.rejected) == ([says("yes")], [says("no")])
    assert (
        found.has_preference and found.margin == 0.0 and found.tools is None and found.notes == []
    )


def test_history_system_input_tools_margin_and_renamed_columns():
    record = {"instruction": "why?", "input": "here", "history": [["a", "b"]], "system": "be good"}
    record |= {"good": "yes", "bad": "no", "margin": 2, "tools": [{"name": "f"}]}
    found = pair(record, columns={"chosen": "good", "rejected": "bad"})
    assert found.prompt == [system("be good"), user("a"), says("b"), user("why?\nhere")]
    assert (found.chosen, found.rejected, found.margin) == ([says("yes")], [says("no")], 2.0)
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]


YES, NO = [says("yes")], [says("no")]
S, U = system("be short"), user("why?")
MORE = [says("so"), U]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": [S, U], "chosen": YES, "rejected": NO}, [S, U]),
        ({"prompt": "why?", "chosen": [S, U, *YES], "rejected": [S, U, *NO]}, [S, U]),
        ({"prompt": [U], "chosen": [S, U, *YES], "rejected": [S, U, *NO]}, [S, U]),
        ({"prompt": [S, U], "chosen": [U, *YES], "rejected": [U, *NO]}, [S, U]),
        ({"prompt": [S], "chosen": [U, *YES], "rejected": [U, *NO]}, [S, U]),
        ({"system": "be short", "chosen": [U, *YES], "rejected": [U, *NO]}, [S, U]),
        ({"system": "be short", "chosen": [S, U, *YES], "rejected": [S, U, *NO]}, [S, U]),
        ({"system": "be short", "prompt": "why?", "chosen": [U, *YES], "rejected": "no"}, [S, U]),
        # the prompt is the first question of what both answers share
        (
            {"prompt": "a", "chosen": [*TURNS[:3], *YES], "rejected": [*TURNS[:3], *NO]},
            TURNS[:3],
        ),
        # the answers begin in the middle of the prompt, and share an answer more
        (
            {"prompt": [S, U], "chosen": [U, *MORE, *YES], "rejected": [U, *MORE, *NO]},
            [S, U, *MORE],
        ),
        ({"prompt": [U], "chosen": [*MORE, *YES], "rejected": [*MORE, *NO]}, [U, *MORE]),
        # one answer repeats the whole prompt
        ({"prompt": TURNS[:3], "chosen": [*TURNS[:3], *YES], "rejected": NO}, TURNS[:3]),
    ],
)
def test_what_was_asked_stands_once_wherever_it_is_said(record, prompt):
    found = pair(record)
    assert found.prompt == prompt
    assert (found.chosen, found.rejected) == (YES, NO)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ([*TURNS[:3], says("yes")], [*TURNS[:3], says("no")], TURNS[:3]),
        # what they go on to say is of the answers, whatever is in common there
        ([user("a"), says("yes"), user("c")], [user("a"), says("no"), user("c")], TURNS[:1]),
        # one is the beginning of the other: each keeps an answer
        ([user("a"), says("b")], [user("a"), says("b"), user("c"), says("d")], TURNS[:1]),
        # equal: no preference, but a pair that can be counted
        ([user("a"), says("b")], [user("a"), says("b")], TURNS[:1]),
    ],
)
def test_whole_conversations_have_their_common_beginning_as_prompt(chosen, rejected, prompt):
    for beside in ({}, {"messages": chosen}, {"prompt": "a"}):
        found = pair({"chosen": chosen, "rejected": rejected} | beside)
        assert found.prompt == prompt
        assert found.prompt + found.chosen == chosen and found.prompt + found.rejected == rejected
        assert found.has_preference == (chosen != rejected)


def test_an_answer_beside_the_pair_is_told():
    found = pair({"messages": [U, says("so")], "chosen": "yes", "rejected": "no"})
    assert found.prompt == [U] and found.notes == [
        "the answer at the end of the prompt is ignored; the pair's answers are used"
    ]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"prompt": "how?", "chosen": [U, *YES], "rejected": [U, *NO]},
            "the prompt ends with 'how.', but the messages of "
            "chosen and rejected begin with 'why.'",
        ),
        (
            {"prompt": [system("be kind"), U], "chosen": [S, U, *YES], "rejected": [S, U, *NO]},
            "the prompt ends with 'why.', but the messages of "
            "chosen and rejected begin with 'be short'",
        ),
        (
            {"prompt": "why?", "chosen": [user("how?"), *YES], "rejected": "no"},
            "chosen begins with the user message 'how.', but the prompt does not end with it",
        ),
        (
            {"prompt": "why?", "chosen": "yes", "rejected": [S, U, *NO]},
            "rejected begins with the system message 'be short'",
        ),
        (
            {"chosen": [S, user("a"), *YES], "rejected": [S, user("b"), *NO]},
            "chosen begins with the user message 'a'",
        ),
        (
            {"prompt": "why?", "chosen": [U], "rejected": "no"},
            "chosen begins with the user message",
        ),
        (
            {"system": "be kind", "chosen": [S, U, *YES], "rejected": [S, U, *NO]},
            "the column system is 'be kind', but the messages begin with 'be short'",
        ),
    ],
)
def test_places_that_contradict_each_other_about_what_was_asked_are_named(record, words):
    with pytest.raises(ValueError, match=f"^{AT}: {words}"):
        pair(record)


def test_two_texts_without_a_prompt_stay_texts():
    found = pair({"chosen": "Q: a A: yes", "rejected": "Q: a A: no", "margin": 0.5})
    assert found.prompt is None and found.margin == 0.5
    cells = {"chosen": "Q: a A: yes", "rejected": "Q: a A: no", "margin": " 0.5"}
    assert pair(cells).margin == 0.5
    assert (found.chosen, found.rejected) == ("Q: a A: yes", "Q: a A: no")


def test_answers_that_begin_with_the_prompts_words_are_not_cut():
    found = pair({"prompt": "yes", "chosen": "yes I do", "rejected": "yes or no"})
    assert (found.chosen, found.rejected) == ([says("yes I do")], [says("yes or no")])


def test_a_template_rewrites_what_was_asked_last():
    record = {"prompt": "why?", "context": ["x", "y"], "chosen": "yes", "rejected": "no"}
    found = pair(record, user_template="{question} in {context}")
    assert found.prompt == [user("why? in x\n\ny")]


BOTH = {"chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "why?", "rejected": "no"}, "chosen is missing; found the columns prompt"),
        ({"prompt": "why?", "chosen": "yes"}, "rejected is missing; .*map others with columns"),
        (BOTH | {"prompt": "why?", "rejected": None}, "rejected is missing"),
        (BOTH | {"prompt": "why?", "margin": "two"}, "margin is 'two'; it must be a number"),
        (BOTH | {"prompt": "why?", "margin": float("nan")}, "margin is nan"),
        (BOTH | {"prompt": "why?", "margin": 10**400}, "margin is 1000"),
        (BOTH | {"prompt": "why?", "chosen": 5}, "a message's content is int, not a string"),
        (BOTH | {"messages": "why?"}, "messages is not JSON"),
        (BOTH | {"prompt": "why?", "images": ["x.png"]}, "the column images is not empty"),
        (
            {"chosen": YES, "rejected": NO},
            "found no prompt, and chosen and rejected begin with different",
        ),
        (
            {"chosen": YES[0], "rejected": NO[0]},
            "found no prompt, and chosen and rejected begin with different",
        ),
    ],
)
def test_a_pair_that_does_not_fit_names_its_line(record, words):
    with pytest.raises(ValueError, match=f"^{AT}: {words}"):
        pair(record)


def test_an_answer_that_only_calls_or_thinks_says_something():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    thought = {"role": "assistant", "content": "", "reasoning": "r"}
    assert pair({"prompt": "q", "chosen": call, "rejected": thought}).has_preference
    assert not pair({"prompt": "q", "chosen": call, "rejected": says(None)}).has_preference


# ---- judged answers and prompts


def feedback(record, **data):
    return parse_judged(record, Source(""), DataSection(**data), AT)


@pytest.mark.parametrize(
    ("label", "good"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        ("kto_tag", True),
        ("True", True),  # a cell of CSV
        ("0", False),
    ],
)
def test_an_answer_is_good_or_bad(label, good):
    said = {"label": label} if label != "kto_tag" else {"kto_tag": True}
    found, judged = feedback({"prompt": "why?", "completion": "yes"} | said)
    assert judged is good and found["messages"] == [user("why?"), says("yes")]


def test_what_was_asked_of_a_judged_answer_stands_once():
    record = {"system": "be short", "prompt": [S, U], "completion": [U, *YES], "label": True}
    assert feedback(record)[0]["messages"] == [S, U, *YES]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "label is None; it must be true or false"),
        ({"label": "yes"}, "label is 'yes'"),
        ({"label": 0.5}, "label is 0.5"),
        (
            {"label": True, "messages": [user("a")]},
            "the last message is judged, so it must be the assistant's",
        ),
    ],
)
def test_a_label_that_is_none_names_its_line(change, words):
    with pytest.raises(ValueError, match=f"^{AT}: {words}"):
        feedback({"prompt": "why?", "completion": "yes"} | change)


PROMPTS = {name: asked for name, asked in ASKED.items() if not name.startswith("with")}


@pytest.mark.parametrize("asked", PROMPTS.values(), ids=PROMPTS.keys())
def test_prompts_of_every_layout_and_without_their_answer(asked):
    def prompt(record):
        return parse_prompt(record, Source(""), DataSection(), AT)

    found = prompt(asked | {"answer": "42"})
    assert found.messages == [user("why?")] and found.columns["answer"] == "42"
    text = isinstance(asked.get("prompt", asked.get("question")), str)
    assert found.text == ("why?" if text else [user("why?")])
    assert prompt({"messages": [user("why?"), says("so")]}).messages == [user("why?")]
    assert prompt({"system": "be short", "prompt": [S, U]}).messages == [S, U]
    assert prompt({"prompt": [U | {"id": 1}]}).notes
    with pytest.raises(ValueError, match=rf"^{AT}: found the columns answer; a prompt needs"):
        prompt({"answer": "42"})
    with pytest.raises(ValueError, match=rf"^{AT}: the prompt has only assistant messages"):
        parse_prompt({"prompt": [says("so")]}, Source(""), DataSection(), AT)
