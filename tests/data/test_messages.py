# SPDX-License-Identifier: Apache-2.0
"""Messages, tools and calls as other programs write them."""

import json

import datasets
import pytest

from jaxllm.config import DataSection, Source
from jaxllm.data.conversations import parse_conversation
from jaxllm.data.messages import message_text
from jaxllm.data.sources import locate, read, records

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def chat(*messages, tools=None, **data):
    record = {"messages": list(messages)} | ({} if tools is None else {"tools": tools})
    return parse_conversation(record, Source(""), DataSection(**data), "f:1")


def message(given, **data):
    """A message between a question and an answer, as it is read."""
    return chat(USER, given, ANSWER, **data)["messages"][1]


def refused(given, words, **data):
    with pytest.raises(ValueError, match=rf"^f:1: .*{words}"):
        message(given, **data)


# ---- roles


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("system", "system"),
        ("developer", "developer"),
        ("human", "user"),
        ("prompter", "user"),
        ("User", "user"),
        ("model", "assistant"),
        ("gpt", "assistant"),
        ("bot", "assistant"),
        ("CHATBOT", "assistant"),
        ("observation", "tool"),
        ("ipython", "tool"),
        ("function", "tool"),
        ("function-response", "tool"),
        ("tool_response", "tool"),
    ],
)
def test_roles_of_other_programs_are_known(theirs, ours):
    assert message({"role": theirs, "content": "x"}) == {"role": ours, "content": "x"}
    assert message({"from": theirs, "value": "x"}) == {"role": ours, "content": "x"}


@pytest.mark.parametrize("role", ["tool_call", "function_call", "function-call"])
def test_a_role_for_calls_is_an_assistant_that_calls(role):
    call = {"name": "f", "arguments": {"x": 1}}
    want = {"type": "function", "function": call}
    for content in (json.dumps(call), call, [call], json.dumps([call])):
        got = message({"role": role, "content": content})
        assert got == {"role": "assistant", "content": "", "tool_calls": [want]}
    refused(
        {"role": role, "content": "f(x)"},
        f"the content of a {role} is not JSON .accepted are a call's name and arguments",
    )


def test_a_role_that_is_not_known_is_named_and_can_be_mapped():
    turn = {"role": "environment", "content": "x"}
    refused(turn, "the role 'environment'; accepted are system, user, .*data.roles: {ROLE")
    assert message(turn, roles={"environment": "tool"})["role"] == "tool"
    assert message({"role": "bot", "content": "x"}, roles={"bot": "user"})["role"] == "user"


# ---- what is learned


@pytest.mark.parametrize(
    "key",
    ["weight", "loss", "loss_weight", "loss_mask", "loss_scale", "train", "training", "trainable"],
)
@pytest.mark.parametrize(("value", "weight"), [(False, 0), (True, 1), (0, 0), (0.5, 0.5), (2, 2)])
def test_flags_of_other_programs_are_the_weight(key, value, weight):
    assert message(ANSWER | {key: value}) == ANSWER | {"weight": weight}


@pytest.mark.parametrize("value", ["yes", [0, 1], -1, float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("key", ["weight", "train"])
def test_a_flag_that_is_no_weight_is_named(key, value):
    refused(ANSWER | {key: value}, f"a message's {key} is .*; use true, false or a number >= 0")


def test_flags_that_contradict_each_other_are_named():
    refused(
        ANSWER | {"weight": 1, "train": False},
        "has different loss weights: weight 1, train 0; keep",
    )
    assert message(ANSWER | {"weight": 1, "train": True, "loss": None})["weight"] == 1


@pytest.mark.parametrize("key", ["train_detail", "mask", "masked"])
def test_what_says_otherwise_what_is_learned_is_refused_unless_dropped(key):
    refused(
        ANSWER | {key: [{"begin_offset": 0}]},
        f"{key}, which is not supported.*drop_columns: .{key}",
    )
    assert message(ANSWER | {key: [1]}, drop_columns=(key,)) == ANSWER
    assert message(ANSWER | {key: None}) == ANSWER


def test_a_weight_that_nothing_reads_is_told():
    assert "user message has a loss weight" in chat(USER | {"train": True}, ANSWER)["notes"][0]
    assert chat(USER | {"train": False}, ANSWER | {"train": True})["notes"] == []


# ---- reasoning


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_key(key):
    assert message(ANSWER | {key: "r"}) == ANSWER | {"reasoning_content": "r"}
    assert message(ANSWER | {key: ""}) == message(ANSWER | {key: None}) == ANSWER
    refused(ANSWER | {key: {"effort": "low"}}, f"a message's {key} is dict, not a string")


def test_reasoning_in_two_keys_stands_once_or_is_refused():
    assert message(ANSWER | {"reasoning": "r", "thinking": "r"})["reasoning_content"] == "r"
    refused(
        ANSWER | {"reasoning": "r", "thinking": "s"}, "different reasoning in thinking and reas"
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "r"},
        {"type": "reasoning", "text": "r"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "r"}]},
    ],
)
def test_parts_that_think_are_reasoning(part):
    text = {"type": "text", "text": "a"}
    want = {"role": "assistant", "content": [text], "reasoning_content": "r"}
    assert message({"role": "assistant", "content": [part, text]}) == want


# ---- content


def test_parts_of_text_stay_parts_and_a_string_a_string():
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    given = [
        parts[0] | {"image": None, "cache_control": None},
        {"type": "input_text"} | {"text": "parts"},
    ]
    got = message({"role": "user", "content": given})
    assert got == {"role": "user", "content": parts}
    assert message_text(got) == "two parts" and message_text(USER) == "q"
    assert message({"role": "user", "content": []})["content"] == ""


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image", "image": "x.png"}, "'image'"),
        ({"type": "image", "text": "a picture"}, "'image'"),
        ({"type": "input_audio", "input_audio": {}}, "'input_audio'"),
        ({"type": "tool_use", "name": "f"}, "'tool_use'"),
        ({"type": "text", "text": None}, "'text'"),
        ("words", "'str'"),
    ],
)
def test_a_part_that_is_not_text_is_refused_with_its_type(part, kind):
    refused({"role": "user", "content": [part]}, f"a content part has the type {kind}")


def test_images_of_a_message_are_refused_unless_dropped():
    refused(USER | {"images": ["x.png"]}, r"a message has images, .*data.drop_columns: \[images\]")
    assert message(USER | {"images": ["x.png"]}, drop_columns=("images",)) == USER
    assert message(USER | {"images": [], "audio": None})["content"] == "q"


@pytest.mark.parametrize("content", ["", None, "  ", []])
def test_an_empty_answer_is_told_and_one_under_another_key_refused(content):
    empty = {"role": "assistant", "content": content}
    assert chat(USER, empty)["notes"] == ["an assistant message is empty"]
    for key in ("text", "response", "function_calls", "tool_call"):
        refused(empty | {key: "words"}, f"an assistant message has only {key}, which")
    assert chat(USER, empty | {"text": "x", "weight": 0})["messages"][1]["weight"] == 0
    assert chat(USER, empty | {"reasoning": "r"})["notes"] == []


def test_a_missing_content_names_the_keys_that_are_there():
    refused(
        {"role": "user", "text": "q"}, "content is NoneType, not a string; its other keys .* text"
    )


def test_an_unknown_key_is_told_once_and_left_for_the_template():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    known = ANSWER | {"name": "x", "tool_call_id": "1", "reasoning_content": "r"}
    got = chat(USER, known | {"tool_calls": [call]}, USER | {"id": 5}, ANSWER | {"id": 6})
    assert got["notes"] == ["a message has the key 'id', which only chat templates use"]
    assert got["messages"][2]["id"] == 5
    assert chat(USER | {"id": 5}, ANSWER, drop_columns=("id",))["messages"][0] == USER
    assert chat(USER, ANSWER | {"annotations": [], "refusal": None})["notes"] == []


# ---- tools and calls

CALL = {"name": "get", "arguments": {"city": "Rome"}}


def test_calls_and_tools_take_the_form_that_templates_read():
    want = {"type": "function", "function": CALL}
    for calls in ([want], [CALL], json.dumps([want]), [CALL | {"type": "function"}]):
        got = message({"role": "assistant", "content": None, "tool_calls": calls})
        assert got == {"role": "assistant", "content": "", "tool_calls": [want]}
    text = {"name": "get", "arguments": '{"city": "Rome"}'}
    got = message({"role": "assistant", "content": None, "tool_calls": [{"function": text}]})
    assert got["tool_calls"] == [{"function": text}]  # as given: the renderer turns it
    got = message(ANSWER | {"tool_calls": [CALL | {"id": "7"}]})["tool_calls"]
    assert got == [want | {"id": "7"}]
    assert message(ANSWER | {"tool_calls": []}) == ANSWER


def test_the_older_function_call_is_a_tool_call():
    for given in (CALL, CALL | {"arguments": json.dumps(CALL["arguments"])}):
        want = [{"type": "function", "function": given}]
        for value in (given, json.dumps(given)):
            got = message({"role": "assistant", "content": None, "function_call": value})
            assert got == {"role": "assistant", "content": "", "tool_calls": want}
    refused(ANSWER | {"function_call": CALL, "tool_calls": [CALL]}, "calls in tool_calls and funct")
    record = {"messages": [USER, ANSWER], "functions": [{"name": "get", "parameters": {}}]}
    found = parse_conversation(record, Source(""), DataSection(), "f:1")["tools"]
    assert found == [{"type": "function", "function": {"name": "get", "parameters": {}}}]


@pytest.mark.parametrize("given", [None, "", " ", {}])
def test_a_call_without_arguments_has_an_empty_object(given):
    call = {"type": "function", "function": {"name": "get", "arguments": given}}
    got = message({"role": "assistant", "content": None, "tool_calls": [call]})["tool_calls"]
    assert got[0]["function"]["arguments"] == {}


@pytest.mark.parametrize("given", [7, ["Rome"], "[1]"])
def test_arguments_that_are_no_object_are_refused(given):
    calls = [{"function": {"name": "get", "arguments": given}}]
    refused({"role": "assistant", "content": None, "tool_calls": calls}, "not an object")


def test_arguments_that_are_no_json_stay_text():
    got = message(ANSWER | {"tool_calls": [CALL | {"arguments": "city=Rome"}]})
    assert got["tool_calls"][0]["function"]["arguments"] == "city=Rome"


# What a table makes of two records with other tools and arguments.
PROPERTIES = {
    "city": {"type": "string", "enum": None, "default": None},
    "unit": {"type": "string", "enum": ["C", None], "default": None},
    "days": None,
}
TOOL = {"name": "get", "parameters": {"type": "object", "properties": PROPERTIES, "required": None}}
ARGUMENTS = {"city": None, "unit": None, "days": None, "more": [{"x": 1, "y": None}, None]}
SPARSE = {
    "messages": [USER, {"role": "assistant", "content": None, "name": None, "tool_calls": [
        {"id": None, "type": "function", "function": {"name": "get", "arguments": ARGUMENTS}}
    ]}],
    "tools": [{"type": "function", "function": TOOL, "strict": None}],
}  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "saved", "strings", "arguments"])
def test_nulls_of_a_table_are_dropped_in_every_container(form, tmp_path):
    record = SPARSE
    if form == "strings":
        record = {name: json.dumps(value) for name, value in SPARSE.items()}
    if form == "arguments":
        record = json.loads(json.dumps(SPARSE))
        function = record["messages"][1]["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(ARGUMENTS)
    file = tmp_path / {"json": "a.json", "parquet": "a.parquet", "saved": "a"}.get(form, "a.jsonl")
    if form == "parquet":
        datasets.Dataset.from_list([record, record]).to_parquet(str(file))
    elif form == "saved":
        datasets.Dataset.from_list([record, record]).save_to_disk(str(file))
    else:
        file.write_text(json.dumps([record] if form == "json" else record))
    source = Source(str(file))
    table = read(locate(source), tmp_path)
    at, found = next(records(table[:1], [0], str(file)))
    got = parse_conversation(found, source, DataSection(), at)
    function = {"name": "get", "arguments": {"unit": None, "more": [{"x": 1}, None]}}
    assert got["messages"][1]["tool_calls"] == [{"type": "function", "function": function}]
    assert got["messages"][1].keys() == {"role", "content", "tool_calls"}
    properties = {
        "city": {"type": "string"},
        "unit": {"type": "string", "enum": ["C", None], "default": None},
    }
    parameters = {"type": "object", "properties": properties}
    function = {"name": "get", "parameters": parameters}
    assert got["tools"] == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("schema", "stays"),
    [
        ({"type": ["string", "null"]}, True),
        ({"type": "string", "nullable": True}, True),
        ({"enum": ["a", None]}, True),
        ({"const": None}, True),
        ({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}, True),
        ({"$ref": "#/$defs/Maybe"}, True),
        ({"title": "Anything", "default": None}, True),
        ({"type": "string"}, False),
        ({"type": "string", "default": None, "const": None}, False),
        ({"enum": ["a"], "default": None}, False),
        ({}, False),
    ],
)
def test_a_null_stays_where_the_schema_names_it(schema, stays):
    properties = {"x": schema, "in": {"type": "object", "properties": {"x": schema}}}
    properties["many"] = {"type": "array", "items": {"properties": {"x": schema}}}
    defs = {"Maybe": {"oneOf": [{"type": "integer"}, {"type": "null"}]}}
    tool = {"name": "f", "parameters": {"properties": properties, "$defs": defs}}
    given = {"x": None, "in": {"x": None}, "many": [{"x": None}]}
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": given}]}
    got = chat(USER, call, tools=[tool])
    read_as = got["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert read_as == (given if stays else {"in": {}, "many": [{}]})
    kept = got["tools"][0]["function"]["parameters"]["properties"]["x"]
    assert kept == (schema if stays else {k: v for k, v in schema.items() if v is not None})


def test_a_schema_that_refers_to_itself_ends():
    loop = {"$ref": "#/$defs/A"}
    tool = {"name": "f", "parameters": {"properties": {"x": loop}, "$defs": {"A": loop}}}
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": None}}]}
    got = chat(USER, call, tools=[tool])["messages"][1]["tool_calls"][0]
    assert got["function"]["arguments"] == {}
