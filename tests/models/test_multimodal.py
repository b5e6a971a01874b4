"""The text half of a `qwen3_5` checkpoint: loaded alone, and written back among the other halves."""

import json

import pytest
import torch
from model_helpers import (
    VOCABULARY,
    assert_close_by_name,
    assert_same_bits,
    config_of,
    gradients,
    randomize,
    small_config,
    small_model,
    stored,
    tokens,
)
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
)

from qlatrain.models import from_pretrained, save_pretrained
from qlatrain.models.hf_config import to_hf_config
from qlatrain.models.huggingface import weights

VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": 36,
    "patch_size": 4,
    "num_position_embeddings": 4,
}
LIMITS = {"one file": 10**9, "shards": 20_000}


def whole_model(tied=False, **changes):
    """Transformers' model with an image tower, no parameter at its initial value."""
    text = to_hf_config(small_config(tie_word_embeddings=tied, **changes), bos_token_id=3, eos_token_id=5)
    text["rope_parameters"] |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    ids = dict.fromkeys(("image_token_id", "video_token_id"), VOCABULARY - 1)
    config = Qwen3_5Config(text_config=text, vision_config=VISION, tie_word_embeddings=tied, **ids)
    model = Qwen3_5ForConditionalGeneration(config)
    randomize(model)
    return model


def write_whole(folder, limit=10**9, **changes):
    model = whole_model(**changes)
    model.save_pretrained(folder, max_shard_size=limit)
    save_file(
        {"mtp.fc.weight": torch.randn(36, 72), "mtp.norm.weight": torch.randn(36).half()}, folder / "mtp.safetensors"
    )
    index = folder / "model.safetensors.index.json"
    if not index.exists():  # one file becomes the first of two shards
        (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
        names = [name for name in stored(folder) if not name.startswith("mtp.")]
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001.safetensors")}))
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(("mtp.fc.weight", "mtp.norm.weight"), "mtp.safetensors")
    index.write_text(json.dumps(content))
    return model


def without(names, *prefixes):
    return {name: x for name, x in names.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS.keys())
def test_logits_and_gradients(tied, limit, tmp_path):
    hf = write_whole(tmp_path, limit, tied=tied, layer_pattern=["gdn", "gdn", "attn"], num_hidden_layers=3)
    ours = from_pretrained(tmp_path)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    input_ids = tokens(2, 75) % (VOCABULARY - 1)  # none of them an image's
    logits, expected = ours(input_ids), hf(input_ids=input_ids, use_cache=False).logits
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() <= 1e-4
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    got = gradients(ours, (logits * direction).sum())
    text = [name for name, _ in hf.named_parameters() if "visual" not in name]
    wanted = torch.autograd.grad((expected * direction).sum(), [hf.get_parameter(name) for name in text])
    names = [name.replace("language_model.", "") for name in text]
    assert_close_by_name(got, dict(zip(names, wanted, strict=True)), 1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS.keys())
def test_the_whole_is_written_again(tied, limit, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    write_whole(source, tied=tied)
    ours = from_pretrained(source)
    save_pretrained(ours, folder, source=source, max_shard_bytes=limit)
    assert (len(list(folder.glob("*.safetensors"))) == 1) == (limit == 10**9)
    assert_same_bits(stored(folder), stored(source))
    assert config_of(folder) == config_of(source)
    assert list(config_of(folder)) == list(config_of(source))
    assert_same_bits(weights(from_pretrained(folder)), weights(ours))


def test_what_was_trained_is_what_is_written(tmp_path):
    """The text is ours, the rest theirs, and transformers opens both."""
    source, folder = tmp_path / "source", tmp_path / "folder"
    write_whole(source)
    ours = from_pretrained(source)
    randomize(ours, seed=7)
    save_pretrained(ours, folder, source=source, max_shard_bytes=20_000)
    text = ("model.language_model.", "lm_head.")
    assert_same_bits(without(stored(folder), *text), without(stored(source), *text))
    hf = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(hf) is Qwen3_5ForConditionalGeneration
    for name, x in weights(ours).items():
        theirs = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        assert torch.equal(hf.get_parameter(theirs), x), name
    image = {name: x for name, x in hf.state_dict().items() if "visual" in name}
    assert image and all(torch.equal(x, stored(source)[name]) for name, x in image.items())


def test_the_text_half_on_its_own(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    write_whole(source, tied=True)
    config = config_of(source)
    config["text_config"]["tie_word_embeddings"] = False  # what the whole says counts
    (source / "config.json").write_text(json.dumps(config))
    ours = from_pretrained(source)
    save_pretrained(ours, folder)
    hf = AutoModelForCausalLM.from_pretrained(folder)
    assert type(hf) is Qwen3_5ForCausalLM
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    assert (hf.config.bos_token_id, hf.config.eos_token_id) == (3, 5)
    assert hf.config.rope_parameters["mrope_section"] == [1, 1, 0]
    assert_same_bits(dict(hf.named_parameters()), dict(ours.named_parameters()))


def test_the_text_half_as_transformers_takes_it_out(tmp_path):
    """It keeps the prefix of the whole in the names."""
    write_whole(tmp_path / "source")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    hf.save_pretrained(tmp_path / "text")
    assert config_of(tmp_path / "text")["model_type"] == "qwen3_5_text"
    ours = from_pretrained(tmp_path / "text")
    assert_same_bits(dict(ours.named_parameters()), dict(hf.named_parameters()))
    assert_same_bits(weights(ours), weights(from_pretrained(tmp_path / "source")))


def test_the_dtype_that_is_written_is_said(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    write_whole(source)
    config = config_of(source)
    config["text_config"]["dtype"], config["torch_dtype"] = "float32", config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    save_pretrained(from_pretrained(source), folder, 7, 8, source=source, dtype=torch.bfloat16)
    written = config_of(folder)
    assert written["dtype"] == written["text_config"]["dtype"] == "bfloat16" and "torch_dtype" not in written
    assert (written["text_config"]["bos_token_id"], written["text_config"]["eos_token_id"]) == (7, 8)
    text = {name: x for name, x in stored(folder).items() if name.startswith("model.language_model.")}
    assert all((x.dtype == torch.float32) == name.endswith(("A_log", "dt_bias")) for name, x in text.items())
    assert stored(folder)["mtp.norm.weight"].dtype == torch.float16


def test_another_source(tmp_path):
    write_whole(tmp_path / "source")
    ours = from_pretrained(tmp_path / "source")
    save_pretrained(small_model(intermediate_size=40), tmp_path / "other")
    with pytest.raises(ValueError, match=r"is a checkpoint of another model \(intermediate_size 40 there, 52 here\)"):
        save_pretrained(ours, tmp_path / "folder", source=tmp_path / "other")
    with pytest.raises(ValueError, match="is the folder to write, and is read meanwhile: write to another folder"):
        save_pretrained(ours, tmp_path / "source", source=tmp_path / "source")
    assert not (tmp_path / "folder").exists()
    assert_same_bits(weights(from_pretrained(tmp_path / "source")), weights(ours))


def test_a_part_that_is_not_known_is_left_over(tmp_path):
    write_whole(tmp_path)
    save_file({"model.audio.weight": torch.zeros(3)}, tmp_path / "audio.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.audio.weight"] = "audio.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"does not fit the model: left over: model\.audio\.weight$"):
        from_pretrained(tmp_path)


def test_no_text_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5"}))
    with pytest.raises(ValueError, match=r"config\.json of a qwen3_5 model lacks text_config"):
        from_pretrained(tmp_path)
