"""Corpora and streams that the data tests share. Documents are made so that every token says where it is from."""

import json
from itertools import pairwise

import numpy as np

from qlatrain.config import DataConfig
from qlatrain.data import IGNORE_INDEX, build_data


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of very different lengths: shorter than a row, and several rows long."""
    sizes = np.random.default_rng(seed).integers(1, 90, size=count)
    return [f"{i}:" + "".join(chr(97 + (i + j) % 26) for j in range(size)) for i, size in enumerate(sizes)]


def write_jsonl(path, texts: list[str], text_key: str = "text") -> str:
    path.write_text("".join(json.dumps({text_key: text}) + "\n" for text in texts))
    return str(path)


def save_dataset(folder, texts: list[str]) -> str:
    from datasets import Dataset

    Dataset.from_dict({"text": texts, "other": list(range(len(texts)))}).save_to_disk(str(folder))
    return str(folder)


def config(**changes) -> DataConfig:
    """Small, and without interleaving, so that the order of tokens can be told from the order of documents."""
    defaults = {"name": "test", "sequence_length": 32, "workers": 0, "validation_fraction": 0.2, "shuffle_block": 7}
    return DataConfig(**{**defaults, "interleave": 1, **changes})


def corpus(tmp_path, kind: str, texts: list[str], **changes) -> DataConfig:
    """A config for `texts` as `map` (jsonl) or `stream` (a dataset saved to disk, streamed)."""
    if kind == "map":
        return config(source="text", files=[write_jsonl(tmp_path / "c.jsonl", texts)], **changes)
    return config(source="hf", dataset=save_dataset(tmp_path / "ds", texts), streaming=True, **changes)


def open_data(settings: DataConfig, seed: int = 0):
    return build_data(settings, seed)


def take_rows(stream, count: int) -> list[tuple]:
    """The next `count` rows, one global batch each, as plain values that compare."""
    return [as_values(stream.next_global_batch(1)[0]) for _ in range(count)]


def as_values(batch) -> tuple:
    return (batch.input_ids[0].tolist(), batch.labels[0].tolist(), batch.cu_seqlens.tolist())


def pieces(batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(input_ids, labels) of each segment."""
    ids, labels, ends = batch.input_ids[0].numpy(), batch.labels[0].numpy(), batch.cu_seqlens.tolist()
    return [(ids[a:b], labels[a:b]) for a, b in pairwise(ends)]


def predicted(batches) -> list[int]:
    """All targets in order."""
    return [label for batch in batches for label in batch.labels[0].tolist() if label != IGNORE_INDEX]
