"""Conversations through `build_data`: order, resuming, processes, validation, and what is too long."""

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_helpers import MARKED, chat_config, chat_tokenizer, make_chats, say, write_chats
from data_helpers import as_values, config, open_data, pieces, predicted, take_rows

from qlatrain.data import IGNORE_INDEX, Counts
from qlatrain.data.formats import ConversationFormat
from qlatrain.data.packing import Position
from qlatrain.data.tokenizer import load_tokenizer

KINDS = ["map", "stream"]
BOS, EOS = 256, 257


def saved(stream) -> dict:
    """The position as it comes back from a checkpoint."""
    return json.loads(json.dumps(stream.state_dict()))


def with_(settings, **changes):
    return config(**{**vars(settings), **changes})


def tokens_of(chat: list[dict]) -> list[int]:
    return [i for m in chat for i in [BOS, *f"{m['role']}\n{m['content']}".encode(), EOS]]


def answers(chat: list[dict]) -> list[int]:
    return [i for m in chat if m["role"] == "assistant" for i in [*m["content"].encode(), EOS]]


def segments(batches) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of each segment that is not padding."""
    parts = [part for batch in batches for part in pieces(batch)]
    return [(ids.tolist(), labels[labels != IGNORE_INDEX].tolist()) for ids, labels in parts if len(set(ids)) > 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_is_every_training_conversation_once(tmp_path, kind, shuffle):
    chats = make_chats(45)
    data = open_data(chat_config(tmp_path, kind, chats, shuffle=shuffle))
    with data.train as stream:
        train = sorted(stream.documents())
        found = []
        while len(found) < 2 * len(train):
            found += segments(stream.next_global_batch(1))
    assert 0 < len(train) < 45
    by_tokens = {tuple(tokens_of(chat)): chat for chat in chats}
    for ids, targets in found:
        assert targets == answers(by_tokens[tuple(ids)])
    rendered = [data.tokenizer.hugging_face.decode(ids) for ids, _ in found]
    assert sorted(rendered[: len(train)]) == sorted(rendered[len(train) : 2 * len(train)]) == train
    held_out = list(data.validation.documents())
    assert sorted([*train, *held_out]) == sorted(data.tokenizer.hugging_face.decode(tokens_of(chat)) for chat in chats)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lookahead", [1, 8, 100])
@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_resume_from_every_position_gives_the_same_rows(tmp_path, kind, lookahead, too_long):
    settings = chat_config(tmp_path, kind, make_chats(24), lookahead=lookahead, sequence_length=96, too_long=too_long)
    with open_data(settings).train as stream:
        states, rows, counts = [saved(stream)], [], [stream.counts]
        while states[-1]["blocks"][states[-1]["following"][0]]["epoch"] < 3:
            rows += take_rows(stream, 1)
            states.append(saved(stream))
            counts.append(stream.counts)
    assert counts[-1].cut > 0 if too_long == "cut" else counts[-1].dropped > 0
    assert len(rows) > 20
    with open_data(settings).train as inline, open_data(with_(settings, workers=3)).train as threaded:
        for at in range(len(rows) - 1):
            for stream in (inline, threaded):
                stream.load_state_dict(states[at])
                assert saved(stream) == states[at] and stream.counts == counts[at]
                assert take_rows(stream, 2) == rows[at : at + 2]
                assert saved(stream) == states[at + 2] if at + 2 < len(states) else True
                assert stream.counts == counts[at + 2]
        inline.load_state_dict(states[3])
        assert take_rows(inline, len(rows) - 3) == rows[3:]


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_one_global_batch(tmp_path, kind):
    settings = chat_config(tmp_path, kind, make_chats(30))
    with open_data(settings).train as stream:
        whole = take_rows(stream, 16)
        state, counts = saved(stream), stream.counts
    for world_size, micro_rows in [(1, 8), (2, 2), (4, 1), (8, 1)]:
        streams = [open_data(with_(settings, workers=world_size % 3)).train for _ in range(world_size)]
        found = []
        for _ in range(2):
            for rank, stream in enumerate(streams):
                for batch in stream.next_global_batch(8, rank, world_size, micro_rows):
                    assert batch.input_ids.shape == (1, micro_rows * 320)
                    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
                    found += [(ids[at : at + 320], labels[at : at + 320]) for at in range(0, len(ids), 320)]
        assert found == [row[:2] for row in whole]
        for stream in streams:
            assert saved(stream) == state and stream.counts == counts
            stream.close()


def test_what_is_counted(tmp_path):
    chats = [say("user: a", f"assistant: {'b' * size}") for size in (10, 40, 200, 20)] + [
        say(f"user: {'a' * 200}", "assistant: b")  # its answer lies behind the end of the row
    ]
    assert [len(tokens_of(chat)) for chat in chats[:4]] == [30, 60, 220, 40]
    for too_long, rows, expected in [
        # 30 + 60, the beginning of 220, 40 + the first of the next epoch; what is left of the fifth has no target
        ("cut", 3, {"packed": 5, "cut": 1, "dropped": 1, "tokens": 90 + 100 + 70, "padding": 10 + 30}),
        ("drop", 2, {"packed": 4, "cut": 0, "dropped": 2, "tokens": 90 + 70, "padding": 10 + 30}),
    ]:
        settings = chat_config(
            tmp_path, "map", chats, validation_fraction=0.0, shuffle=False, too_long=too_long, sequence_length=100
        )
        with open_data(with_(settings, lookahead=1)).train as stream:
            batch = stream.next_global_batch(rows)[0]
            counts = stream.counts
        assert counts == Counts(**expected, targets=batch.num_targets)
        assert sum(len(ids) for ids, _ in segments([batch])) == counts.tokens
        assert counts.fill == counts.tokens / (100 * rows)
    with (
        open_data(with_(settings, too_long="error")).train as stream,
        pytest.raises(ValueError, match=r"c\.jsonl:3 is 220 tokens long, more than data\.sequence_length=100; make"),
    ):
        take_rows(stream, 4)


def test_a_cut_conversation_keeps_the_targets_that_are_left():
    form = ConversationFormat(load_tokenizer("bytes", open_template()), 20, 4, "cut")
    chat = say("user: a", "assistant: bcdefghijklmnop")
    packed = form.tokenise(Position(), conversation_of(chat))
    assert packed.cut and packed.tokens.tolist() == tokens_of(chat)[:20]
    # "<bos>user\na<eos><bos>assistant\n" is 8 + 11 tokens: the last of them predicts b, the token behind it c.
    assert packed.labels.tolist() == [IGNORE_INDEX] * 18 + [ord("b"), ord("c")]
    longest = ConversationFormat(load_tokenizer("bytes", open_template()), len(tokens_of(chat)), 4, "error")
    whole = longest.tokenise(Position(), conversation_of(chat))
    assert not whole.cut and [i for i in whole.labels.tolist() if i != IGNORE_INDEX] == answers(chat)


def open_template() -> str:
    from qlatrain.data import read_chat_template

    return read_chat_template("bos_eos")


def conversation_of(chat: list[dict]):
    from qlatrain.data.conversations import Conversation

    return Conversation(chat, {}, lambda: "here")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "micro_rows"), [(1, 3), (2, 2), (8, 1)])
def test_every_held_out_conversation_is_counted_once(tmp_path, kind, world_size, micro_rows):
    chats = make_chats(60)
    data = open_data(chat_config(tmp_path, kind, chats))
    ranks = [data.validation.batches(1000, micro_rows, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for step in zip(*ranks, strict=True) for batch in step]
    held_out = list(data.validation.documents())
    by_text = {data.tokenizer.hugging_face.decode(tokens_of(chat)): chat for chat in chats}
    expected = sorted((tokens_of(by_text[text]), answers(by_text[text])) for text in held_out)
    assert sorted(segments(batches)) == expected
    targets = [i for _, targets in expected for i in targets]
    assert sorted(predicted(batches)) == sorted(targets)
    text_bytes = sum(i < 256 for i in targets)
    assert data.validation.bytes_per_token(1000) == pytest.approx(text_bytes / len(targets))
    counts = data.validation.counts(1000)
    assert (counts.packed, counts.cut, counts.dropped) == (len(held_out), 0, 0)
    assert counts.fill > 0.7 and counts.targets == len(targets)
    first = data.validation.batches(2, 8)
    assert len(first) == 1 and first[0].input_ids.shape == (1, 2 * 320)


def test_no_held_out_conversation_fits(tmp_path):
    settings = chat_config(tmp_path, "map", [*make_chats(9), *[say("user: " + "a" * 500, "assistant: b")] * 30])
    for seed in range(50):
        data = open_data(with_(settings, validation_fraction=0.03), seed)
        if "a" * 500 in next(data.validation.documents()):
            with pytest.raises(ValueError, match="No document with text is held out"):
                data.validation.batches(4, 4)
            return
    raise AssertionError("no seed holds out a long one")


def test_a_hugging_face_tokenizer_and_its_own_template(tmp_path):
    folder = chat_tokenizer(tmp_path / "tokenizer", MARKED)
    settings = chat_config(tmp_path, "map", make_chats(30), tokenizer=folder, chat_template=None)
    data = open_data(settings)
    hf = data.tokenizer.hugging_face
    with data.train as stream:
        found = segments(stream.next_global_batch(8))
    by_tokens = {tuple(hf.apply_chat_template(chat)["input_ids"]): chat for chat in make_chats(30)}
    for ids, targets in found:
        said = [m["content"] for m in by_tokens[tuple(ids)] if m["role"] == "assistant"]
        assert hf.decode(targets) == "".join(f"{content}<|im_end|>" for content in said)
    prompt = data.chat.encode_prompt(say("user: hello"))
    assert hf.decode(prompt) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    data.tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).hugging_face.chat_template == MARKED


def test_positions_of_other_settings_are_refused(tmp_path):
    settings = chat_config(tmp_path, "map", make_chats(30))
    with open_data(settings).train as stream:
        take_rows(stream, 3)
        state = saved(stream)
    template = tmp_path / "other.jinja"
    template.write_text(open_template() + "{# other #}")
    for changes, what in [
        ({"lookahead": 9}, "lookahead was 8 and is 9"),
        ({"too_long": "drop"}, "too_long was 'cut' and is 'drop'"),
        ({"chat_template": str(template)}, "chat_template was '.*' and is '.*'"),
        ({"format": "text", "text_key": "messages"}, "format was 'conversations' and is None"),
    ]:
        try:
            other = open_data(with_(settings, **changes))
        except ValueError as error:
            assert "holds list, not text" in str(error) and changes["format"] == "text"
            continue
        with other.train as stream, pytest.raises(ValueError, match=what):
            stream.load_state_dict(state)


def test_tables_give_what_the_lines_hold(tmp_path):
    """Nulls that a table adds to a row, and tools as JSON text, are as if they were not there."""
    call = {"name": "search", "arguments": {"query": "x"}}
    chats = [
        say("user: a", "assistant: b"),
        [
            {"role": "user", "content": "find x"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "found"},
        ],
    ]
    chats[1][1]["tool_calls"].append(
        {"type": "function", "function": {"name": "open", "arguments": {"page": 3}}}  # another argument: nulls in both
    )
    tools = [{"name": "search"}, {"name": "open"}]
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
        "{% generation %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}{{ eos_token }}"
        "{% endgeneration %}{% endfor %}"
    )
    lines = [{"messages": chats[0]}, {"messages": chats[1], "tools": tools}]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pq.write_table(
        pa.table({"messages": chats, "tools": [None, json.dumps(tools)], "id": [1, 2]}), tmp_path / "t.parquet"
    )
    from datasets import load_dataset

    load_dataset("parquet", data_files=str(tmp_path / "t.parquet"), split="train").save_to_disk(str(tmp_path / "ds"))
    found = []
    for changes in [
        {"source": "text", "files": [str(path)]},
        {"source": "text", "files": [str(tmp_path / "t.parquet")]},
        {"source": "hf", "dataset": str(tmp_path / "ds")},
        {"source": "hf", "dataset": str(tmp_path / "ds"), "streaming": True},
    ]:
        settings = config(format="conversations", chat_template=str(template), validation_fraction=0.0, **changes)
        with open_data(settings).train as stream:
            found.append(sorted(stream.documents()))
    assert "search" in found[0][1] and '"page": 3' in found[0][1] and "null" not in found[0][1]
    assert [sorted(map(sorted, texts)) for texts in found] == [sorted(map(sorted, found[0]))] * 4


def test_empty_lines_are_no_conversations(tmp_path):
    path = tmp_path / "c.jsonl"
    write_chats(path, make_chats(6))
    path.write_text("\n \n".join(path.read_text().splitlines()) + "\n  \n")
    settings = config(source="text", files=[str(path)], format="conversations", chat_template="bos_eos")
    with open_data(with_(settings, validation_fraction=0.0, sequence_length=200)).train as stream:
        assert len(list(stream.documents())) == 6
        while stream.counts.packed < 12:
            take_rows(stream, 1)
        assert stream.counts.dropped == 0


def test_rows_and_batches_do_not_depend_on_threads(tmp_path):
    settings = chat_config(tmp_path, "map", make_chats(40))
    runs = []
    for workers in (0, 1, 4):
        with open_data(with_(settings, workers=workers)).train as stream:
            runs.append([(as_values(stream.next_global_batch(n)[0]), saved(stream)) for n in [1, 4, 2, 7, 1] * 3])
    assert runs[0] == runs[1] == runs[2]


def test_no_segment_changes_with_its_neighbours(tmp_path):
    """The model sees a conversation in a packed row as it sees it alone: positions and boundaries begin again."""
    batch = open_data(chat_config(tmp_path, "map", make_chats(30))).train.next_global_batch(4)[0]
    ends = batch.cu_seqlens.tolist()
    positions = batch.position_ids[0].numpy()
    assert all((positions[a:b] == np.arange(b - a)).all() for a, b in pairwise(ends))
    assert set(range(0, 4 * 320 + 1, 320)) <= set(ends), "a row ends where a segment ends"
