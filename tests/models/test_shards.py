"""Sharded checkpoints in and out, what a dtype does, and that nothing is read of files that do not fit."""

import json

import pytest
import torch
from model_helpers import OLMO, assert_same_bits, config_of, small_config, small_model, stored, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlatrain.models import from_pretrained, huggingface, save_pretrained, shards
from qlatrain.models.huggingface import weights
from qlatrain.models.shards import Stored, read_headers, read_tensors

FAMILIES = {"qwen3_5_text": {}, "olmo_hybrid": OLMO}
LIMIT = 20_000
INDEX = "model.safetensors.index.json"
families = pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES.keys())


@pytest.fixture
def sharded(tmp_path):
    save_pretrained(small_model(), tmp_path, max_shard_bytes=LIMIT)
    return tmp_path


def rewrite_index(folder, change):
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


@families
@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_ours_open_in_transformers(changes, tied, tmp_path):
    ours = small_model(tie_word_embeddings=tied, **changes)
    save_pretrained(ours, tmp_path, max_shard_bytes=LIMIT)
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(files) > 2 and [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in stored(tmp_path).values())
    for file in files:
        held = load_file(file)
        assert sum(x.nbytes for x in held.values()) <= LIMIT or len(held) == 1
        assert all(index["weight_map"][name] == file.name for name in held)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(dict(hf.named_parameters()), dict(ours.named_parameters()))
    assert_same_bits(weights(from_pretrained(tmp_path)), weights(ours))


@families
@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_transformers_open_here(changes, tied, tmp_path):
    save_pretrained(small_model(tie_word_embeddings=tied, **changes), tmp_path / "ours")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    hf.save_pretrained(tmp_path / "theirs", max_shard_size=LIMIT)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    back = from_pretrained(tmp_path / "theirs")
    assert_same_bits(dict(back.named_parameters()), dict(hf.named_parameters()))
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    assert all(x.requires_grad and x.device.type == "cpu" for x in back.parameters())


def test_one_file_where_shards_were(sharded):
    model = small_model(seed=1)
    save_pretrained(model, sharded)
    assert sorted(file.name for file in sharded.iterdir()) == ["config.json", "model.safetensors"]
    save_pretrained(model, sharded, max_shard_bytes=LIMIT)
    assert not (sharded / "model.safetensors").exists()
    assert_same_bits(weights(from_pretrained(sharded)), weights(model))


@families
def test_a_dtype_spares_the_gates(changes, tmp_path):
    """bfloat16 out and in, and float32 from it: the decay parameters lose nothing on the way."""
    ours = small_model(**changes)
    save_pretrained(ours, tmp_path / "half", dtype=torch.bfloat16)
    assert config_of(tmp_path / "half")["dtype"] == "bfloat16"
    expected = {name: x.to(x.dtype) for name, x in weights(small_model(**changes).bfloat16()).items()}
    half = from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert_same_bits(weights(half), expected)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16, torch.float32}
    wide = from_pretrained(tmp_path / "half")
    assert_same_bits(weights(wide), {name: x.float() for name, x in expected.items()})
    save_pretrained(half, tmp_path / "again")
    assert_same_bits(stored(tmp_path / "again"), stored(tmp_path / "half"))
    assert config_of(tmp_path / "again") == config_of(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_no_dtype_for_parameters(sharded):
    with pytest.raises(ValueError, match=r"dtype=torch\.int8 holds no fractions: give torch\.float32"):
        from_pretrained(sharded, dtype=torch.int8)


def test_the_model_is_whole_before_the_first_tensor_is_read(sharded, monkeypatch):
    """One tensor at a time, each to its place: no second copy of the model."""
    files = []

    def spy(tensors, device):
        for stored_tensor, tensor in read(tensors, device):
            files.append(stored_tensor.file.name)
            yield stored_tensor, tensor

    read = huggingface.read_tensors
    monkeypatch.setattr(huggingface, "read_tensors", spy)
    model = from_pretrained(sharded)
    assert len(files) == len(weights(model)) and files == sorted(files), "a shard was opened twice"


def test_a_file_is_mapped_and_nothing_more(sharded, monkeypatch):
    """Told a device, safetensors brings tensors there through page-locked memory of their size, which torch keeps."""
    devices = []

    def spy(*arguments, device="cpu"):
        devices.append(device)
        return safe_open(*arguments, device=device)

    monkeypatch.setattr(shards, "safe_open", spy)
    tensors = dict(read_tensors(read_headers(sharded).values(), "meta"))
    assert set(devices) == {"cpu"} and {tensor.device.type for tensor in tensors.values()} == {"meta"}


def test_nothing_is_read_of_what_does_not_fit(sharded, monkeypatch):
    monkeypatch.setattr(huggingface, "read_tensors", lambda *_: pytest.fail("tensor data was read"))
    monkeypatch.setattr(Stored, "read", lambda _: pytest.fail("tensor data was read"))
    config = config_of(sharded)
    (sharded / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    with pytest.raises(
        ValueError, match=r"of another shape: lm_head\.weight \[61, 36\] for \[60, 36\], model\.embed_to"
    ):
        from_pretrained(sharded)


# ---------------------------------------------------------------- files that are not right


def test_a_shard_that_is_not_there(sharded):
    gone = sorted(set(json.loads((sharded / INDEX).read_text())["weight_map"].values()))[1]
    (sharded / gone).unlink()
    with pytest.raises(ValueError, match=rf"index\.json names {gone}, which .* does not hold: copy all of its files"):
        from_pretrained(sharded)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_a_truncated_shard(sharded, kept):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read: "):
        from_pretrained(sharded)


def test_an_index_of_other_files(sharded):
    rewrite_index(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"index\.json does not say that model\.norm\.weight is in model-0"):
        from_pretrained(sharded)
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    held = next(file for file in files if "model.norm.weight" in load_file(sharded / file))
    rewrite_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": held, "extra": files[0]}))
    with pytest.raises(ValueError, match=r"index\.json names extra, which its files do not hold"):
        from_pretrained(sharded)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b.safetensors"}}',
     '{"weight_map": {"a": "b.bin"}}'],
)  # fmt: skip
def test_a_broken_index(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json cannot be read: "):
        from_pretrained(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle(tmp_path, name):
    save_pretrained(small_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=rf"holds {name} and no safetensors: a pickle can run code when it is opened"):
        from_pretrained(tmp_path)


def test_quantised_weights(tmp_path):
    save_pretrained(small_model(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.float8_e4m3fn)
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int8)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r": of a dtype that is not read: lm_head\.weight F8_E4M3, model\.norm\.weight I8$"
    ):
        from_pretrained(tmp_path)
    sizes = {name: x.nbytes for name, x in state.items()}
    assert {name: x.nbytes for name, x in read_headers(tmp_path).items()} == sizes


def test_a_tied_head_that_is_written_twice(tmp_path):
    ours = small_model(tie_word_embeddings=True)
    save_pretrained(ours, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    back = from_pretrained(tmp_path)
    assert_same_bits(weights(back), weights(ours))
    assert back.lm_head.weight is back.model.embed_tokens.weight
    state["lm_head.weight"][0, 0] += 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"ties the head to the embedding, but lm_head\.weight is not model\.embed_tok"
    ):
        from_pretrained(tmp_path)


# ---------------------------------------------------------------- configs that are not right


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "olmoe"])
def test_mixtures_of_experts(sharded, model_type):
    (sharded / "config.json").write_text(json.dumps(config_of(sharded) | {"model_type": model_type}))
    with pytest.raises(
        ValueError, match=rf"holds a mixture of experts \('{model_type}'\), and those are not there yet"
    ):
        from_pretrained(sharded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "36"}, "has hidden_size='36', which cannot be"),
        ({"num_attention_heads": 0}, "has num_attention_heads=0, which cannot be"),
        ({"attention_bias": 1}, "has attention_bias=1, which cannot be"),
        ({"rms_norm_eps": [1]}, r"has rms_norm_eps=\[1\], which cannot be"),
        ({"layer_types": "full_attention"}, "has layer_types='full_attention', which cannot be"),
        ({"layer_types": ["full_attention"]}, "has 1 layer_types for num_hidden_layers=2"),
        ({"rope_parameters": [3]}, r"has rope_parameters=\[3\], which cannot be"),
        ({"rope_parameters": {"rope_theta": "x"}}, "has rope_theta='x', which cannot be"),
        ({"rope_parameters": {"rope_theta": None}}, "describe a model: model.rope_theta=null, no positions, needs"),
        ({"num_key_value_heads": 3}, "describe a model: model.num_attention_heads=4 is not a multiple of model.num"),
    ],
)
def test_values_that_cannot_be(sharded, changes, message):
    (sharded / "config.json").write_text(json.dumps(config_of(sharded) | changes))
    with pytest.raises(ValueError, match=message):
        from_pretrained(sharded)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_broken_config(sharded, content):
    (sharded / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json (cannot be read: |holds no JSON object)"):
        from_pretrained(sharded)


def test_what_a_config_may_leave_out(tmp_path):
    ours = small_model()
    save_pretrained(ours, tmp_path)
    config = config_of(tmp_path)
    for name in ("tie_word_embeddings", "initializer_range", "attention_bias"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    back = from_pretrained(tmp_path)
    assert back.config.initializer_range == small_config().initializer_range
    with torch.no_grad():
        assert torch.equal(back(tokens(1, 20)), ours(tokens(1, 20)))
