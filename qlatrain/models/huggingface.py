"""The model as a Hugging Face checkpoint: `config.json` and safetensors, in one file or in shards.

Read and written are the families of `hf_config.py`, under the names of `weight_names.py`. What is written opens with
transformers' `from_pretrained` without our code; the one exception is Qwen with `allow_neg_eigval`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qlatrain.config import KernelConfig, ModelConfig
from qlatrain.models.hf_config import from_hf_config, kept_config, read_config, text_config
from qlatrain.models.hybrid import HybridForCausalLM
from qlatrain.models.layers import DeltaRuleMixer
from qlatrain.models.shards import FLOATS, INDEX, SINGLE, Pending, Stored, read_headers, read_tensors, write_shards
from qlatrain.models.weight_names import is_beside_the_text, parameter_of, stored_as

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_SHARD_BYTES = 5_000_000_000


def weights(model: HybridForCausalLM) -> dict[str, torch.Tensor]:
    """Name → tensor, each storage once: a tied head is left out, as transformers does."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state[HEAD]
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def checkpoint_config(folder: str | Path) -> dict:
    """The content of a checkpoint's `config.json`; ValueError where the folder is none, or of another family."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint: it needs config.json and {SINGLE} (or {INDEX})")
    return read_config(Path(folder))


def from_pretrained(
    path: str | Path,
    kernel: KernelConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> HybridForCausalLM:
    """Opens what `save_pretrained` or transformers has written, of a family in `hf_config.py`.

    Each tensor goes from its file to its place, so that host memory holds one shard at the most.

    Args:
        path: the folder.
        kernel: which backend each operator runs.
        device: where the parameters are to be.
        dtype: of the parameters; float32 when None, whatever the files hold. `A_log` and `dt_bias` are always float32.

    Raises:
        ValueError: not such a checkpoint, of another family, unreadable, or with tensors missing, left over or of
            another shape, all of them listed; nothing has been loaded then.
    """
    folder, dtype = Path(path), dtype or torch.float32
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} holds no fractions: give torch.float32 or torch.bfloat16")
    hf = checkpoint_config(folder)
    config = from_hf_config(hf, str(folder))
    with torch.device("meta"):
        model = HybridForCausalLM(config, kernel)
    pieces = _pieces(read_headers(folder), hf["model_type"])
    copied_head = pieces.pop(HEAD, None) if config.tie_word_embeddings else None
    _refuse_misfit(
        {name: list(x.shape) for name, x in weights(model).items()},
        {name: _stacked_shape(held) for name, held in pieces.items()},
        str(folder),
        [f"{x.name} {x.dtype}" for held in pieces.values() for x in held if x.dtype not in FLOATS],
    )
    if copied_head:
        _check_copied_head(copied_head[0], pieces[EMBEDDING][0], folder)
    _materialise(model.to(dtype), device)
    places = dict(_places(weights(model), pieces))
    with torch.no_grad():
        for stored, tensor in read_tensors(places, device):
            places[stored].copy_(tensor)
    model.checkpoint_config = text_config(hf, str(folder))
    return model


def save_pretrained(
    model: HybridForCausalLM,
    folder: str | Path,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    source: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `config.json` and the weights into `folder`. The caller makes the whole folder atomic.

    Args:
        model: a new one, or a loaded one, whose config is kept where it says more than `ModelConfig`.
        folder: where to; tokenizer and image processor are the caller's to add.
        bos_token_id, eos_token_id: the tokenizer's; None keeps those of a loaded checkpoint.
        source: the checkpoint the model was loaded from. What it holds beside the text model (vision, MTP) is copied
            from its files; without it a `qwen3_5` model becomes a `qwen3_5_text` checkpoint.
        max_shard_bytes: larger models are written in several files.
        dtype: of the tensors of the model; as they are when None. `A_log` and `dt_bias` are always float32.

    Raises:
        ValueError: `source` is the same folder, unreadable, or a checkpoint of another model.
    """
    folder = Path(folder)
    kept, beside = model.checkpoint_config, []
    if source is not None:
        kept, beside = _source(model.config, Path(source), folder)
    dtype_name = str(dtype or model.lm_head.weight.dtype).removeprefix("torch.")
    config = kept_config(kept, model.config, bos_token_id, eos_token_id, dtype_name)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, [*_pending(model, config["model_type"], dtype), *beside], max_shard_bytes)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def trained_weights(model: HybridForCausalLM) -> dict[str, torch.Tensor]:
    """As `weights`, without what asks for no gradient."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in weights(model).items() if name in trained}


def load_weights(model: HybridForCausalLM, state: dict[str, torch.Tensor], source: str) -> None:
    """Copies `state` into what is trained of the model; nothing is loaded unless every name and shape fits.

    Raises:
        ValueError: listing all that is missing, left over or of another shape.
    """
    own = trained_weights(model)
    _refuse_misfit(*({name: list(x.shape) for name, x in held.items()} for held in (own, state)), source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _refuse_misfit(own: dict[str, list], found: dict[str, list], source: str, dtypes: Sequence[str] = ()) -> None:
    both = sorted(own.keys() & found.keys())
    faults = [
        ("missing", sorted(own.keys() - found.keys())),
        ("left over", sorted(found.keys() - own.keys())),
        ("of another shape", [f"{name} {found[name]} for {own[name]}" for name in both if found[name] != own[name]]),
        ("of a dtype that is not read", sorted(dtypes)),
    ]
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in faults if names)
    if told:
        raise ValueError(f"{source} does not fit the model: {told}")


def _pieces(headers: dict[str, Stored], model_type: str) -> dict[str, list[Stored]]:
    """Parameter → the tensors that make it up, in the order in which they are stacked along the first axis."""
    placed: dict[str, list[tuple[int, Stored]]] = {}
    for stored in headers.values():
        if not is_beside_the_text(stored.name, model_type):
            name, place = parameter_of(stored.name, model_type)
            placed.setdefault(name, []).append((place, stored))
    return {name: [x for _, x in sorted(held, key=lambda item: item[0])] for name, held in placed.items()}


def _stacked_shape(held: list[Stored]) -> list:
    shapes = [list(x.shape) for x in held]
    if len(shapes) == 1:
        return shapes[0]
    if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
        return shapes
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]]


def _check_copied_head(head: Stored, embedding: Stored, folder: Path) -> None:
    """Some programs write a tied head a second time; that is fine as long as it says the same."""
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype) or not torch.equal(head.read(), embedding.read()):
        raise ValueError(f"{folder}: config.json ties the head to the embedding, but {HEAD} is not {EMBEDDING}")


def _materialise(model: HybridForCausalLM, device: torch.device | str) -> None:
    """Gives the parameters of a model on the meta device unset memory on `device`, a tied one once."""
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(torch.empty_like(parameter, device=device)))
    model.tie_head()


def _places(own: dict[str, torch.Tensor], pieces: dict[str, list[Stored]]) -> Iterator[tuple[Stored, torch.Tensor]]:
    """Each stored tensor with the part of the parameter it fills."""
    for name, held in pieces.items():
        if len(held) == 1:
            yield held[0], own[name]
        else:
            yield from zip(held, own[name].split([x.shape[0] for x in held]), strict=True)


def _pending(model: HybridForCausalLM, model_type: str, dtype: torch.dtype | None) -> Iterator[Pending]:
    for name, whole in weights(model).items():
        parts = stored_as(name, model.config, model_type)
        kept = name.rpartition(".")[2] in DeltaRuleMixer.FLOAT32_PARAMETERS
        to = whole.dtype if dtype is None or kept else dtype
        rows = [len(whole) if rows is None else rows for _, rows in parts]
        for (stored, _), tensor in zip(parts, whole.split(rows), strict=True):
            yield Pending(stored, tensor.numel() * to.itemsize, partial(tensor.to, to))


def _source(config: ModelConfig, source: Path, folder: Path) -> tuple[dict, list[Pending]]:
    """The config of the source, and what it holds beside the text model; ValueError where that is another model."""
    if source.resolve() == folder.resolve():
        raise ValueError(f"source={source} is the folder to write, and is read meanwhile: write to another folder")
    hf = read_config(source)
    theirs, ours = asdict(from_hf_config(hf, config.name)), asdict(config) | {"layer_pattern": config.layer_kinds}
    other = [f"{key} {theirs[key]} there, {value} here" for key, value in ours.items() if theirs[key] != value]
    if other:
        raise ValueError(f"source={source} is a checkpoint of another model ({'; '.join(other)})")
    beside = [x for x in read_headers(source).values() if is_beside_the_text(x.name, hf["model_type"])]
    return hf, [Pending(x.name, x.nbytes, x.read) for x in beside]
