"""A conversation to token ids by the tokenizer's own chat template, and which of them are the assistant's.

The assistant's part of the rendered text is what the template puts between {% generation %} and {% endgeneration %}.
In a template without them, a turn is what rendering the messages up to it adds to the prompt before it. Either way it
ends with the control token that ends a turn, when the template writes one: a model has to learn to stop.

Only the template writes control tokens. Those that stand in a message are tokenised as the characters they are.
"""

import re
import threading
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path

import numpy as np

from qlatrain.data.conversations import Conversation
from qlatrain.data.sources import digest
from qlatrain.data.text_files import first_line
from qlatrain.data.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "chat_templates"
MARK = "\ufdd0"  # behind the first character of a control token in a message; no character of any text
NOT_FIELDS = {
    "messages",
    "conversations",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
}
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MACRO = re.compile(r"\{%[-+]?\s*macro\b.*?\bendmacro\s*[-+]?%\}", re.DOTALL)
# transformers compiles a template once for the process, and keeps in it how far its rendering has come.
RENDERING = threading.Lock()


def read_chat_template(name: str) -> str:
    """The Jinja template in the file `name`, or the one of that name that comes with qlatrain.

    Raises:
        ValueError: there is none, or it is not UTF-8.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.jinja"))
    path = SHIPPED / f"{name}.jinja" if name in shipped else Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.chat_template={name!r} could not be read: {first_line(error)}; name a file with a Jinja template, "
            f"or one of {', '.join(shipped)}."
        ) from error


class Chat:
    """The chat template of a tokenizer. Safe to call from several threads.

    Raises:
        ValueError: the tokenizer has no chat template, or one whose assistant's part cannot be found.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._hf = tokenizer.hugging_face
        self._name = tokenizer.name
        templates = self._hf.chat_template
        if not templates:
            raise ValueError(
                f"data.tokenizer={self._name!r} has no chat template; name one with data.chat_template: a file, or "
                f"one of {', '.join(sorted(path.stem for path in SHIPPED.glob('*.jinja')))}."
            )
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            if any(GENERATION.search(macro) for macro in MACRO.findall(template)):
                raise ValueError(
                    f"The chat template of data.tokenizer={self._name!r} has {{% generation %}} inside a macro, where "
                    "transformers cannot tell its place; write it outside, in a file named by data.chat_template."
                )
        self.description = {"chat_template": digest(templates)}
        special = {token.content for token in self._hf.added_tokens_decoder.values() if token.special}
        control = sorted(filter(None, special | {*self._hf.all_special_tokens}), key=lambda token: (-len(token), token))
        self._control_tokens = tuple(control)
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._marked = re.compile("|".join(re.escape(token[0] + MARK + token[1:]) for token in control) or "(?!)")
        # Our own copies of the Rust tokenizer, as in HuggingFaceTokenizer: one that reads control tokens, one that
        # takes them for text.
        self._backend = self._text_backend = None
        if getattr(self._hf, "backend_tokenizer", None) is not None:
            self._backend, self._text_backend = self._copy(False), self._copy(True)

    def encode(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Its ids, int32 [length], and which of them are the assistant's, bool [length]: at least one.

        Raises:
            ValueError: the template fails, or renders nothing of the assistant's, or renders the messages up to a turn
                otherwise than in the whole.
        """
        messages, fields = self._mark(conversation.messages), self._mark(conversation.fields)
        text, spans = self._turns(messages, fields, conversation)
        bounds = [bound for span in spans for bound in span]
        assert all(a <= b for a, b in pairwise(bounds)), f"turns overlap: {spans}"
        ids, starts = self._tokenise(text, bounds, conversation)
        # Of a token that reaches over the beginning of a turn, part is in the prompt: the model does not write it.
        targets = np.searchsorted(np.array(bounds), starts, side="right") % 2 == 1
        if not targets.any():
            raise ValueError(
                f"{conversation.place()}: the chat template of data.tokenizer={self._name!r} renders nothing of the "
                "assistant's; mend it in a file named by data.chat_template."
            )
        return ids, targets

    def encode_prompt(self, messages: list[dict], **fields: object) -> np.ndarray:
        """Messages to be answered, up to where the assistant begins to write: int32 [length]."""
        conversation = Conversation(messages, fields, lambda: "The prompt")
        text, _ = self._render(self._mark(messages), self._mark(fields), conversation, add_generation_prompt=True)
        return self._tokenise(text, [], conversation)[0]

    def text(self, conversation: Conversation) -> str:
        """The rendered conversation, control tokens included."""
        return self._render(conversation.messages, conversation.fields, conversation)[0]

    def _copy(self, control_tokens_are_text: bool):
        from tokenizers import Tokenizer as Backend

        copy = Backend.from_str(self._hf.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.post_processor = None  # of what it does only moved offsets would be left
        copy.encode_special_tokens = control_tokens_are_text
        return copy

    def _mark(self, value: object) -> object:
        """`value` with a mark in each control token of its strings."""
        if isinstance(value, str):
            return self._control.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
        if isinstance(value, dict):
            return {key: self._mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._mark(item) for item in value]
        return value

    def _turns(
        self, messages: list[dict], fields: dict, conversation: Conversation
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and from which to which of its characters the turns of the assistant are."""
        text, spans = self._render(messages, fields, conversation)
        if spans is not None:
            return text, [self._with_end_token(text, *span) for span in spans]
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._render(messages[:number], fields, conversation, add_generation_prompt=True)
            through = text
            if number + 1 < len(messages):
                through, _ = self._render(messages[: number + 1], fields, conversation)
            after_last = not spans or len(prompt) >= spans[-1][1]
            if not (after_last and through.startswith(prompt) and text.startswith(through)):
                raise ValueError(
                    f"{conversation.place()}: the chat template of data.tokenizer={self._name!r} renders the messages "
                    f"up to message {number + 1} otherwise than in the whole, so what the assistant wrote cannot be "
                    "found; give a template that marks it with {% generation %} by data.chat_template."
                )
            spans.append((len(prompt), len(prompt) + self._up_to_end_token(through[len(prompt) :])))
        return text, spans

    def _render(
        self, messages: list[dict], fields: dict, conversation: Conversation, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """What `apply_chat_template` tokenises, and the spans of {% generation %}; None when the template has none."""
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        fields = {key: value for key, value in fields.items() if key not in NOT_FIELDS}
        try:
            with RENDERING:
                template = self._hf.get_chat_template(tools=fields.get("tools"))
                marks = GENERATION.search(template) is not None
                (text,), spans = render_jinja_template(
                    [messages],
                    chat_template=template,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=add_generation_prompt,
                    **{**fields, **self._hf.special_tokens_map},
                )
        except TemplateSyntaxError as error:
            raise ValueError(
                f"The chat template of data.tokenizer={self._name!r} is not Jinja at line {error.lineno}: "
                f"{first_line(error)}; mend it, or name another with data.chat_template."
            ) from error
        except Exception as error:  # a template can raise anything, and mostly its own message
            raise ValueError(
                f"{conversation.place()}: the chat template of data.tokenizer={self._name!r} failed: "
                f"{first_line(error)}; mend the conversation, or name another template with data.chat_template."
            ) from error
        return text, spans[0] if marks else None

    def _with_end_token(self, text: str, start: int, end: int) -> tuple[int, int]:
        """The span with the control token behind it, unless it ends with one."""
        if not text[start:end].rstrip().endswith(self._control_tokens) and (found := self._control.match(text, end)):
            end = found.end()
        return start, end

    def _up_to_end_token(self, turn: str) -> int:
        """Characters of a turn up to the control token at its end: nobody reads the white space behind that one."""
        stripped = turn.rstrip()
        return len(stripped) if stripped.endswith(self._control_tokens) else len(turn)

    def _tokenise(self, text: str, bounds: list[int], conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the rendered text, int32 [length], and the character where each begins, int64 [length]."""
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # Rust takes no lone surrogates
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for found in self._marked.finditer(text):
            self._add(text[at : found.start()], at, bounds, ids, starts, conversation)
            token = found[0].replace(MARK, "", 1)
            as_text = self._encode_text(token)
            ids += as_text
            starts += [found.start()] * len(as_text)
            at = found.end()
        self._add(text[at:], at, bounds, ids, starts, conversation)
        return np.array(ids, dtype=np.int32), np.array(starts, dtype=np.int64)

    def _add(
        self, piece: str, at: int, bounds: list[int], ids: list[int], starts: list[int], conversation: Conversation
    ) -> None:
        """Add the tokens of `piece`, which begins at character `at`."""
        if self._backend is not None:
            encoded = self._backend.encode(piece, add_special_tokens=False)
            ids += encoded.ids
            starts += [at + start for start, _ in encoded.offsets]
            return
        # A tokenizer in Python does not say where its tokens are: those before each border are counted.
        tokens = self._hf.encode(piece, add_special_tokens=False, verbose=False)
        counted, border = 0, at
        for bound in bounds[bisect_right(bounds, at) : bisect_right(bounds, at + len(piece))]:
            before = self._hf.encode(piece[: bound - at], add_special_tokens=False, verbose=False)
            if before != tokens[: len(before)]:
                raise ValueError(
                    f"{conversation.place()}: data.tokenizer={self._name!r} joins characters over the border of a "
                    "turn, and being written in Python does not say where; use a tokenizer that has a tokenizer.json."
                )
            starts += [border] * (len(before) - counted)
            counted, border = len(before), bound
        ids += tokens
        starts += [border] * (len(tokens) - counted)

    def _encode_text(self, token: str) -> list[int]:
        """A control token as the characters it is made of."""
        control_id = self._hf.convert_tokens_to_ids(token)
        ids = self._plain(token)
        # Some read it all the same: one in Python when it stands alone, others when it is not marked as special.
        return self._plain(token[:1]) + self._plain(token[1:]) if control_id in ids else ids

    def _plain(self, text: str) -> list[int]:
        if self._text_backend is not None:
            return self._text_backend.encode(text, add_special_tokens=False).ids
        return self._hf.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
