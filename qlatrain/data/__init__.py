"""Documents → token ids → packed batches, and the position to resume from."""

from dataclasses import dataclass

from qlatrain.config import DataConfig
from qlatrain.data.chat import Chat, read_chat_template
from qlatrain.data.formats import TOO_LONG, ConversationFormat, TextFormat
from qlatrain.data.order import IndexedOrder, StreamedOrder
from qlatrain.data.packing import IGNORE_INDEX, Counts, PackedBatch
from qlatrain.data.sources import open_source
from qlatrain.data.stream import TrainStream
from qlatrain.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from qlatrain.data.validation import ValidationSet

__all__ = [
    "IGNORE_INDEX",
    "Chat",
    "Counts",
    "PackedBatch",
    "Tokenizer",
    "TrainData",
    "TrainStream",
    "ValidationSet",
    "build_data",
    "check_vocab",
    "load_tokenizer",
    "read_chat_template",
]


FORMATS = ("text", "conversations")


@dataclass(frozen=True)
class TrainData:
    tokenizer: Tokenizer
    train: TrainStream
    validation: ValidationSet | None  # None when nothing is held out
    chat: Chat | None = None  # of conversations: makes prompts


def build_data(config: DataConfig, seed: int) -> TrainData:
    """Open the corpus that `config` describes; `seed` decides the split and the order. Close `train` after use.

    Raises:
        ValueError: a setting is out of range, the corpus or the tokenizer cannot be opened, or it is too small.
    """
    if config.sequence_length < 2:
        raise ValueError(f"data.sequence_length={config.sequence_length} must be 2 tokens or more.")
    if not 0 <= config.validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction} must be at least 0 and below 1: it is the part "
            "of the documents that is held out."
        )
    if config.workers < 0:
        raise ValueError(f"data.workers={config.workers} must be 0 (no threads) or more.")
    if config.shuffle_block < 1:
        raise ValueError(f"data.shuffle_block={config.shuffle_block} must be 1 document or more.")
    if config.interleave < 1:
        raise ValueError(f"data.interleave={config.interleave} must be 1 (one document after the other) or more.")
    if config.format not in FORMATS:
        raise ValueError(f"data.format={config.format!r} is not known; use one of {', '.join(FORMATS)}.")
    if config.too_long not in TOO_LONG:
        raise ValueError(f"data.too_long={config.too_long!r} is not known; use one of {', '.join(TOO_LONG)}.")
    if config.lookahead < 1:
        raise ValueError(f"data.lookahead={config.lookahead} must be 1 (rows in the order of the documents) or more.")
    template = None if config.chat_template is None else read_chat_template(config.chat_template)
    tokenizer = load_tokenizer(config.tokenizer, template)
    if config.format == "conversations":
        form = ConversationFormat(tokenizer, config.sequence_length, config.lookahead, config.too_long)
    else:
        form = TextFormat(tokenizer, config.sequence_length, config.interleave)
    source = open_source(config)
    if config.streaming:
        order = StreamedOrder(source, seed, config.validation_fraction, config.shuffle, config.shuffle_block)
    else:
        order = IndexedOrder(source, seed, config.validation_fraction, config.shuffle)
    train = TrainStream(order, form, config.workers)
    validation = ValidationSet(order, form) if config.validation_fraction > 0 else None
    return TrainData(tokenizer, train, validation, form.chat if config.format == "conversations" else None)
