"""Text to token ids: raw bytes, or any Hugging Face tokenizer.

A document becomes [bos] + ids + [eos]. Text never becomes a control id: a document that contains the characters
`<|eos|>` is tokenised as those characters.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES_BOS, BYTES_EOS = "<|bos|>", "<|eos|>"


class Tokenizer(Protocol):
    """Safe to call from several threads."""

    name: str
    vocab_size: int  # one more than the largest id
    bos_id: int | None  # what a document begins with; eos when the tokenizer has no bos of its own
    eos_id: int | None

    def encode(self, text: str) -> np.ndarray:
        """A document: [bos] + ids + [eos], int32 [length]."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """The beginning of a document, to be continued: [bos] + ids, int32 [length]."""

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of `ids`, control ids left out, broken UTF-8 replaced by U+FFFD."""

    def count_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of the text of `ids`; control ids have none."""

    @property
    def hugging_face(self) -> "PreTrainedTokenizerBase":
        """The same in transformers, with its chat template. Not safe to call from several threads."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `transformers.AutoTokenizer.from_pretrained(folder)` opens."""


def load_tokenizer(name: str, chat_template: str | None = None) -> Tokenizer:
    """`bytes`, or a Hugging Face tokenizer by path or name; with `chat_template`, Jinja, in place of its own.

    Raises:
        ValueError: it cannot be opened.
    """
    return BytesTokenizer(chat_template) if name == "bytes" else HuggingFaceTokenizer(name, chat_template)


def check_vocab(tokenizer: Tokenizer, model_vocab_size: int, checkpoint: str | None = None) -> None:
    """Raise ValueError when the tokenizer has ids that the model, new or from `checkpoint`, has no embedding for."""
    if tokenizer.vocab_size > model_vocab_size and checkpoint is not None:
        raise ValueError(
            f"data.tokenizer={tokenizer.name!r} has {tokenizer.vocab_size} tokens, more than the {model_vocab_size} "
            f"that init.checkpoint={checkpoint!r} has embeddings for; leave data.tokenizer out to take its own."
        )
    if tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"model.vocab_size={model_vocab_size} is smaller than the {tokenizer.vocab_size} tokens of "
            f"data.tokenizer={tokenizer.name!r}; set model.vocab_size to {tokenizer.vocab_size} or more."
        )


class BytesTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text, 256 is `<|bos|>`, 257 is `<|eos|>`."""

    name = "bytes"
    vocab_size = 258
    bos_id = 256
    eos_id = 257

    def __init__(self, chat_template: str | None = None):
        self._chat_template = chat_template

    def encode(self, text: str) -> np.ndarray:
        return self._join(text, self.eos_id)

    def encode_prompt(self, text: str) -> np.ndarray:
        return self._join(text)

    def _join(self, text: str, *after: int) -> np.ndarray:
        # JSON can hold a lone surrogate, which UTF-8 cannot: it becomes "?".
        content = np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)
        return np.concatenate([[self.bos_id], content, after]).astype(np.int32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def count_bytes(self, ids: np.ndarray) -> int:
        return int((ids < 256).sum())

    @cached_property
    def hugging_face(self) -> "PreTrainedTokenizerBase":
        """A byte-level BPE without merges: the same ids, with no code of ours."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast

        vocab = {character: byte for byte, character in enumerate(byte_level_alphabet())}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True) for token in (BYTES_BOS, BYTES_EOS)])
        # What add_special_tokens=True gives, and with it evaluation harnesses and servers: a prompt as in training.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BYTES_BOS} $A", pair=f"{BYTES_BOS} $A $B", special_tokens=[(BYTES_BOS, self.bos_id)]
        )
        opened = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=BYTES_BOS, eos_token=BYTES_EOS, clean_up_tokenization_spaces=False
        )
        opened.chat_template = self._chat_template
        return opened

    def save_pretrained(self, folder: str | Path) -> None:
        self.hugging_face.save_pretrained(str(folder))


def byte_level_alphabet() -> list[str]:
    """The character that stands for each of the 256 bytes in byte-level BPE (GPT-2, `bytes_to_unicode`).

    Printable Latin-1 stands for itself; the rest, in order, for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class HuggingFaceTokenizer:
    """A tokenizer of transformers. One with only an eos begins documents with it as well, so that the first real
    token is predicted too; one with neither bos nor eos gets no control ids."""

    def __init__(self, name: str, chat_template: str | None = None):
        from tokenizers import Tokenizer as Backend
        from transformers import AutoTokenizer

        try:
            self.hugging_face = AutoTokenizer.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
        except Exception as error:  # OSError, ValueError, ImportError, JSON errors...: one meaning for the user
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"data.tokenizer={name!r} could not be opened: {lines[0]} Use 'bytes', the name of a tokenizer on "
                "the Hugging Face hub, or a folder that holds one."
            ) from error
        if chat_template is not None:
            self.hugging_face.chat_template = chat_template
        self.name = name
        self.vocab_size = max(len(self.hugging_face), max(self.hugging_face.get_vocab().values(), default=-1) + 1)
        self.eos_id = self.hugging_face.eos_token_id
        self.bos_id = self.eos_id if self.hugging_face.bos_token_id is None else self.hugging_face.bos_token_id
        # Our own copy of the Rust tokenizer, set up once: transformers changes its settings from call to call,
        # which threads cannot share.
        self._backend = None
        if getattr(self.hugging_face, "backend_tokenizer", None) is not None:
            self._backend = Backend.from_str(self.hugging_face.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True  # special tokens in a text are text

    def encode(self, text: str) -> np.ndarray:
        return self._join(text, [] if self.eos_id is None else [self.eos_id])

    def encode_prompt(self, text: str) -> np.ndarray:
        return self._join(text, [])

    def _join(self, text: str, after: list[int]) -> np.ndarray:
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # Rust takes no lone surrogates
        if self._backend is not None:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self.hugging_face.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        before = [] if self.bos_id is None else [self.bos_id]
        return np.array(before + ids + after, dtype=np.int32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        ids = np.asarray(ids).tolist()
        return self.hugging_face.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def count_bytes(self, ids: np.ndarray) -> int:
        return len(self.decode(ids).encode("utf-8"))

    def save_pretrained(self, folder: str | Path) -> None:
        self.hugging_face.save_pretrained(str(folder))
