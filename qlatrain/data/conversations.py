"""Conversations: what a row that holds `messages` must look like, checked one by one, with the place of a bad one."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from qlatrain.checks import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages that were checked, with at least one turn of the assistant.

    Keys and fields that hold null are left out: a table of `datasets` has every key in every row.
    """

    messages: list[dict]  # role, content and what else the chat template reads, such as tool_calls
    fields: dict  # what else the row holds; the chat template sees it: tools, enable_thinking, ...
    place: Callable[[], str]  # where it stands; asked only when there is an error to report


TextOrConversation = str | Conversation  # a document


@dataclass(frozen=True)
class MessagesField:
    """Rows whose field `key` holds a list of {role, content}."""

    key: str
    setting: str = "data.messages_key"
    what: str = "conversation"
    endings: tuple[str, ...] = (".jsonl", ".parquet")

    @property
    def description(self) -> dict:
        return {"format": "conversations", "messages_key": self.key}

    def columns(self, names: list[str]) -> list[str]:
        return list(names)

    def document(self, row: dict, place: Callable[[], str]) -> Conversation:
        """The conversation in `row`.

        Raises:
            ValueError: it holds no messages or no turn of the assistant, or a message has an unknown role or no
                content. `place()` says where it stands.
        """
        messages = row[self.key]
        if not isinstance(messages, list) or not messages:
            held = "an empty list" if messages == [] else "null" if messages is None else type(messages).__name__
            raise ValueError(
                f"{place()}: field {self.key!r} holds {held}, not messages; it must be a list of "
                '{"role": ..., "content": ...}, and not empty.'
            )
        messages = [checked_message(message, number, place) for number, message in enumerate(messages, 1)]
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError(
                f"{place()} has no turn of the assistant, so nothing to learn from; add its answer or remove the "
                "conversation."
            )
        fields = {key: value for key, value in row.items() if key != self.key and value is not None}
        if "tools" in fields:
            fields["tools"] = checked_tools(fields["tools"], place)
        return Conversation(messages, fields, place)


def checked_message(message: object, number: int, place: Callable[[], str]) -> dict:
    """The `number`th message of a conversation, without the keys that hold null; errors as in `MessagesField`."""
    if not isinstance(message, dict):
        raise ValueError(
            f'{place()}: message {number} is {type(message).__name__}; every message must be {{"role": ..., '
            '"content": ...}.'
        )
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role is None:
        raise ValueError(
            f"{place()}: message {number} has no role, its keys are {sorted(message)}; give it one of "
            f"{', '.join(ROLES)}."
        )
    if role not in ROLES:
        raise ValueError(
            f"{place()}: message {number} has the role {role!r}, which is not one of {', '.join(ROLES)}; "
            f"rename it{nearest(role, ROLES) or '.'}"
        )
    content = message.get("content", "")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(part for part in parts if isinstance(part, str))
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(
                f"{place()}: message {number} ({role}) holds a part that is not text; only text can be learned from."
            )
    if not isinstance(content, str):
        raise ValueError(
            f"{place()}: message {number} ({role}) holds {type(content).__name__} as content; it must be text."
        )
    # A system prompt and the answer of a tool may be empty, and so may the words beside a call of a tool.
    needed = role == "user" or (role == "assistant" and not message.get("tool_calls"))
    if needed and (not content or content.isspace()):
        raise ValueError(
            f"{place()}: message {number} ({role}) has no content; write what was said or remove the conversation."
        )
    return {"content": "", **message}


def checked_tools(tools: object, place: Callable[[], str]) -> list[dict]:
    """Tools as a list; a string is JSON, as tables hold what differs from row to row."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place()}: field 'tools' is not JSON: {error.msg} at column {error.colno}; it must be a list of "
                "JSON schemas."
            ) from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{place()}: field 'tools' is no list of objects; it must be a list of JSON schemas.")
    return tools


def without_nulls(value: object) -> object:
    """`value` without the keys that hold null, at any depth: a row as it was before a table gave it every key."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
