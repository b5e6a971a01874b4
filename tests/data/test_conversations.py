"""What a row that holds messages must look like; what is wrong with one is said with its file and line."""

import json

import pytest
from chat_helpers import PLAIN, chat_config, chat_tokenizer, make_chats, say, write_chats
from data_helpers import config, open_data, save_dataset, write_jsonl

from qlatrain.data.conversations import MessagesField, without_nulls
from qlatrain.data.sources import open_source

FIELD = MessagesField("messages")


def read(messages: object, **fields):
    return FIELD.document({"messages": messages, **fields}, lambda: "c.jsonl:3")


def user(content: object) -> list[dict]:
    return [{"role": "user", "content": content}, *say("assistant: b")]


def test_what_is_read():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "name": None}
    messages = [*say("system: ", "developer: d", "user: a"), call, {"role": "tool"}, *say("assistant: b")]
    found = read(messages, id=7, tools='[{"name": "f"}]', mood=None)
    assert found.messages[:3] == messages[:3] and found.messages[-1] == messages[-1]
    assert found.messages[3] == {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert found.messages[4] == {"role": "tool", "content": ""}
    assert found.fields == {"id": 7, "tools": [{"name": "f"}]} and found.place() == "c.jsonl:3"
    assert messages[3]["content"] is None, "what was given stays as it is"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    assert read(user(parts)).messages[0]["content"] == parts
    assert read(say("user: a", "assistant: b"), tools=" ").fields == {"tools": []}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "field 'messages' holds null, not messages"),
        ([], "field 'messages' holds an empty list, not messages"),
        ("hello", "field 'messages' holds str, not messages"),
        ({"role": "user"}, "field 'messages' holds dict, not messages"),
        (["hello"], "message 1 is str; every message must be"),
        (
            [*say("user: a"), {"content": "b"}],
            r"message 2 has no role, its keys are \['content'\]; give it one",
        ),
        (say("user: a", "asistant: b"), "message 2 has the role 'asistant', .*; did you mean assistant"),
        (
            say("human: a", "assistant: b"),
            "message 1 has the role 'human', which is not one of system, ",
        ),
        ([{"role": 3, "content": "b"}], "message 1 has the role 3"),
        ([{"role": ["user"], "content": "b"}], r"message 1 has the role \['user'\]"),
        (say("system: a", "user: b"), "has no turn of the assistant, so nothing to learn from"),
        (user(""), r"message 1 \(user\) has no content"),
        (user(" \n"), r"message 1 \(user\) has no content"),
        (user(None), r"message 1 \(user\) has no content"),
        (user([]), r"message 1 \(user\) has no content"),
        (user([{"type": "text", "text": " "}]), r"message 1 \(user\) has no content"),
        (say("user: a", "assistant: "), r"message 2 \(assistant\) has no content"),
        ([*say("user: a"), {"role": "assistant", "content": "", "tool_calls": []}], r"message 2 \(assistant\) has no"),
        (user(5), r"message 1 \(user\) holds int as content; it must be text"),
        (user([{"type": "image", "url": "x"}]), r"message 1 \(user\) holds a part that is not text"),
    ],
)
def test_conversations_that_cannot_be_used(messages, message):
    with pytest.raises(ValueError, match=rf"^c\.jsonl:3:? {message}") as caught:
        read(messages)
    assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"


@pytest.mark.parametrize(
    ("tools", "message"),
    [("[1", "is not JSON"), ("{}", "no list of objects"), ([1], "no list of objects"), (3, "no list of objects")],
)
def test_tools_that_cannot_be_used(tools, message):
    with pytest.raises(ValueError, match=rf"^c\.jsonl:3: field 'tools' (is )?{message}"):
        read(say("user: a", "assistant: b"), tools=tools)


def test_nulls_that_a_table_adds():
    assert without_nulls({"a": None, "b": [{"c": None, "d": 0}, None], "e": ""}) == {"b": [{"d": 0}, None], "e": ""}


GOOD = json.dumps({"messages": say("user: a", "assistant: b")})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": ', r"c\.jsonl:4 is not JSON: .* at column \d+; mend it"),
        ("[1]", r"c\.jsonl:4 is a JSON list; every line must be a JSON object"),
        ('{"text": "a"}', r"c\.jsonl:4 has no field 'messages', its fields are \['text'\]; .* data\.messages_key"),
        (json.dumps({"messages": say("user: a")}), r"c\.jsonl:4 has no turn of the assistant"),
        (json.dumps({"messages": say("human: a")}), r"c\.jsonl:4: message 1 has the role 'human'"),
        (json.dumps({"messages": user("")}), r"c\.jsonl:4: message 1 \(user\) has no content"),
        (
            json.dumps({"messages": say("user: a", "assistant: b"), "tools": [{}]}),
            r"c\.jsonl:4: the chat template of data\.tokenizer='bytes' failed: this template has no form for tools",
        ),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, message, workers):
    (tmp_path / "c.jsonl").write_text("\n".join([GOOD, GOOD, "", line, GOOD]) + "\n")
    settings = config(source="text", files=[str(tmp_path / "c.jsonl")], format="conversations", workers=workers)
    settings.chat_template, settings.validation_fraction, settings.sequence_length = "bos_eos", 0.0, 64
    for seed in range(20):
        try:
            data = open_data(settings, seed)
        except ValueError:
            continue  # the bad line is the first that is looked at
        with data.train as stream:
            for _ in range(2):
                with pytest.raises(ValueError, match=message):
                    stream.next_global_batch(20)
        return
    raise AssertionError("the bad line comes first for every seed")


def test_a_first_line_that_is_wrong_is_met_at_once(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["a"] * 3)
    with pytest.raises(ValueError, match=r"c\.jsonl:1 has no field 'messages'"):
        open_source(config(source="text", files=[path], format="conversations"))
    other = write_chats(tmp_path / "d.jsonl", make_chats(2), turns=make_chats(1)[0])
    opened = open_source(config(source="text", files=[other], format="conversations", messages_key="turns"))
    assert opened[0].messages == make_chats(1)[0]


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_without_messages(tmp_path, streaming):
    folder = save_dataset(tmp_path / "ds", ["a", "b"])
    settings = config(source="hf", dataset=folder, streaming=streaming, format="conversations")
    with pytest.raises(ValueError, match=r"ds' has no field 'messages', its fields are \['other', 'text'\]"):
        open_source(settings)
    settings.messages_key = "text"
    settings.chat_template = "bos_eos"
    with pytest.raises(ValueError, match=r"ds.*: field 'text' holds str, not messages"):
        open_data(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "chats"}, r"data\.format='chats' is not known; use one of text, conversations"),
        ({"too_long": "split"}, r"data\.too_long='split' is not known; use one of cut, drop, error"),
        ({"lookahead": 0}, r"data\.lookahead=0 must be 1"),
        ({"chat_template": None}, r"data\.tokenizer='bytes' has no chat template; name one with data\.chat_template"),
        ({"chat_template": "nothing"}, r"data\.chat_template='nothing' could not be read"),
        ({"source": "stdlib"}, r"data\.source=stdlib holds no conversations"),
        ({"files": []}, r"needs data\.files: a list of paths or globs of \.jsonl, \.parquet\.$"),
        (
            {"sequence_length": 20},
            r"None of the 8 training conversations has a turn of the assistant within data\.sequence_length=20 tokens",
        ),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    chats = [say("user: a long question", "assistant: b")] * 10
    settings = chat_config(tmp_path, "map", chats)
    with pytest.raises(ValueError, match=message):
        open_data(config(**{**vars(settings), **changes}))


def test_no_data_at_all(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "b.jsonl").write_text(" \n \n  \n")
    (tmp_path / "c.txt").write_text("words")
    for name, message in [
        ("a.jsonl", "hold no documents: every file is empty"),
        ("b.jsonl", "There are no conversations to train on: every line is empty"),
        ("c.txt", r"c\.txt' ends in none of \.jsonl, \.parquet; convert or rename it"),
    ]:
        settings = config(source="text", files=[str(tmp_path / name)], format="conversations", chat_template="bos_eos")
        with pytest.raises(ValueError, match=message):
            open_data(settings)


def test_a_template_that_fails_on_the_first_conversation(tmp_path):
    folder = chat_tokenizer(tmp_path / "tokenizer", "{{ raise_exception('no system prompts') }}" + PLAIN)
    settings = chat_config(tmp_path, "map", make_chats(5), tokenizer=folder, chat_template=None)
    with pytest.raises(ValueError, match=r"c\.jsonl:\d: the chat template of .* failed: no system prompts; mend"):
        open_data(settings)
