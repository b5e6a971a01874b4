"""A small real chat tokenizer, templates with and without marks, and conversations."""

import json

import numpy as np
from data_helpers import config
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from qlatrain.config import DataConfig
from qlatrain.data.conversations import Conversation

PLAIN = (  # as Qwen2.5 writes it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(folder, template: str | dict | None) -> str:
    """Byte-level BPE with merges across white space, and offsets that leave white space out, as GPT-2's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user\nhello there\n\nassistant\n\nhello\n\n user\n the hello"] * 3, trainer)
    backend.add_tokens([AddedToken("<think>", special=False)])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    hf.chat_template = template
    hf.save_pretrained(str(folder))
    return str(folder)


def say(*turns: str) -> list[dict]:
    """Messages from `role: content`."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def conversation(*turns: str, **fields) -> Conversation:
    return Conversation(say(*turns), fields, lambda: "chats.jsonl:7")


def make_chats(count: int, seed: int = 0) -> list[list[dict]]:
    """Distinct conversations of very different lengths, of one to three exchanges, some with a system prompt."""
    generator = np.random.default_rng(seed)
    chats = []
    for i in range(count):
        turns = ["system: be brief"] if i % 3 == 0 else []
        for j in range(1 + i % 3):
            turns += [f"user: {i}?", f"assistant: {i}.{j} " + "y" * int(generator.integers(0, 40))]
        chats.append(say(*turns))
    return chats


def write_chats(path, chats: list, **fields) -> str:
    path.write_text("".join(json.dumps({"messages": chat, **fields}) + "\n" for chat in chats))
    return str(path)


def chat_config(tmp_path, kind: str, chats: list, **changes) -> DataConfig:
    """A config for `chats` as `map` (jsonl) or `stream` (a dataset saved to disk, streamed), in bytes."""
    changes = {"format": "conversations", "sequence_length": 320, "lookahead": 8, "chat_template": "bos_eos", **changes}
    if kind == "map":
        return config(source="text", files=[write_chats(tmp_path / "c.jsonl", chats)], **changes)
    from datasets import Dataset

    Dataset.from_dict({"messages": chats, "id": list(range(len(chats)))}).save_to_disk(str(tmp_path / "ds"))
    return config(source="hf", dataset=str(tmp_path / "ds"), streaming=True, **changes)
