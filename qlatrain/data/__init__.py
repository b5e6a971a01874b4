"""Documents → token ids → packed batches, and the position to resume from."""

from dataclasses import dataclass

from qlatrain.config import DataConfig
from qlatrain.data.order import IndexedOrder, StreamedOrder
from qlatrain.data.packing import IGNORE_INDEX, PackedBatch
from qlatrain.data.sources import open_source
from qlatrain.data.stream import TrainStream
from qlatrain.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from qlatrain.data.validation import ValidationSet

__all__ = [
    "IGNORE_INDEX",
    "PackedBatch",
    "Tokenizer",
    "TrainData",
    "TrainStream",
    "ValidationSet",
    "build_data",
    "check_vocab",
    "load_tokenizer",
]


@dataclass(frozen=True)
class TrainData:
    tokenizer: Tokenizer
    train: TrainStream
    validation: ValidationSet | None  # None when nothing is held out


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
    tokenizer = load_tokenizer(config.tokenizer)
    source = open_source(config)
    if config.streaming:
        order = StreamedOrder(source, seed, config.validation_fraction, config.shuffle, config.shuffle_block)
    else:
        order = IndexedOrder(source, seed, config.validation_fraction, config.shuffle)
    train = TrainStream(order, tokenizer, config.sequence_length, config.interleave, config.workers)
    validation = ValidationSet(order, tokenizer, config.sequence_length) if config.validation_fraction > 0 else None
    return TrainData(tokenizer, train, validation)
