"""What the inside of transformers must look like for its functions to be replaced, and what differs from it.

In each of these models the layer calls `causal_conv1d_fn` and `torch_chunk_gated_delta_rule` by the names they have in
its module, and the gated norm as a submodule.
"""

import importlib
import inspect
from dataclasses import dataclass
from types import CodeType, MethodType, ModuleType

from torch import nn

TESTED_VERSIONS = ("5.17", "5.23")
CONVOLUTION = "causal_conv1d_fn"
RULE = "torch_chunk_gated_delta_rule"

SIGNATURES = {
    CONVOLUTION: "hidden_states, weight, bias, activation, **kwargs",
    RULE: (
        "query, key, value, g, beta, chunk_size, initial_state, output_final_state, use_qk_l2norm_in_kernel, **kwargs"
    ),
}
LAYER_SIGNATURE = "self, hidden_states, cache_params, attention_mask, **kwargs"
NORM_SIGNATURE = "self, hidden_states, gate"


@dataclass(frozen=True)
class Family:
    """A model type of transformers, and the classes of its Gated DeltaNet layer and of the gated norm in it."""

    name: str
    layer: str
    norm: str

    @property
    def module_name(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"

    def module(self) -> ModuleType:
        return importlib.import_module(self.module_name)


FAMILIES = (
    Family("qwen3_next", "Qwen3NextGatedDeltaNet", "Qwen3NextRMSNormGated"),
    Family("qwen3_5", "Qwen3_5GatedDeltaNet", "Qwen3_5RMSNormGated"),
    Family("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", "Qwen3_5MoeRMSNormGated"),
    Family("olmo_hybrid", "OlmoHybridGatedDeltaNet", "OlmoHybridRMSNormGated"),
)


def differences(family: Family) -> list[str]:
    """What is not there, has another signature, or is no longer called in a family's module. One phrase for each."""
    try:
        module = family.module()
    except ImportError as error:
        return [f"{family.module_name} cannot be imported ({error})"]
    missing = [name for name in (*SIGNATURES, family.layer, family.norm) if not hasattr(module, name)]
    if missing:
        return [f"{family.module_name}.{name} is missing" for name in missing]
    found = []

    def expect(where: str, function, wanted: str) -> None:
        signature = _signature(function)
        if signature != wanted:
            found.append(f"{family.module_name}.{where} takes ({signature}) instead of ({wanted})")

    for name, wanted in SIGNATURES.items():
        expect(name, getattr(module, name), wanted)
    layer_class, norm_class = getattr(module, family.layer), getattr(module, family.norm)
    expect(f"{family.layer}.forward", layer_class.forward, LAYER_SIGNATURE)
    expect(f"{family.norm}.forward", norm_class.forward, NORM_SIGNATURE)
    code = inspect.unwrap(layer_class.forward).__code__
    found += [
        f"{family.module_name}.{family.layer}.forward no longer calls {name}"
        for name in SIGNATURES
        if name not in code.co_names
    ]
    # renamed boundaries would not be seen by what replaces the functions, and documents would run into each other
    found += [
        f"{family.module_name}.{family.layer}.forward no longer hands on {name}"
        for name in ("cu_seq_lens_q", "cu_seqlens")
        if name not in _strings(code)
    ]
    return found


def differences_in(path: str, layer: nn.Module, family: Family) -> list[str]:
    """What is not as expected in one layer of a model, whose family has no differences. `path` names it."""
    layer_class = getattr(family.module(), family.layer)
    if inspect.unwrap(type(layer).forward) is not inspect.unwrap(layer_class.forward):
        return [f"{path} is a {type(layer).__name__} with a forward of its own"]
    norms = norms_of(layer, family)
    if not norms:
        return [f"{path} holds no {family.norm}"]
    parts = [(path, layer), *((f"{path}'s {family.norm}", norm) for norm in norms)]
    found = [
        f"{where} has had its forward replaced (by kernels from the hub: load the model without use_kernels)"
        for where, part in parts
        if not _runs_its_class(part)
    ]
    conv1d = getattr(layer, "conv1d", None)
    if not hasattr(conv1d, "weight") or not hasattr(conv1d, "bias"):
        found.append(f"{path} has no conv1d with weight and bias")
    elif conv1d.bias is not None:
        found.append(f"{path}.conv1d has a bias, which qlakernels' convolution has not")
    for where, part in parts:
        activation = getattr(part, "activation", None)
        if activation != "silu":
            found.append(f"{where} has activation {activation!r} instead of 'silu'")
    found += [
        f"{where} has no {name}"
        for where, norm in parts[1:]
        for name in ("weight", "variance_epsilon")
        if not hasattr(norm, name)
    ]
    return found


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module, Family]]:
    """(path, layer, family) of every Gated DeltaNet layer in `model`, inside whatever wraps them."""
    by_class = {(family.module_name, family.layer): family for family in FAMILIES}
    found = []
    for path, module in model.named_modules():
        for parent in type(module).__mro__:  # the class may be a subclass that a wrapper made
            family = by_class.get((parent.__module__, parent.__name__))
            if family is not None:
                found.append((path or type(module).__name__, module, family))
                break
    return found


def norms_of(layer: nn.Module, family: Family) -> list[nn.Module]:
    """The gated norms of a layer: more than one where peft trains a copy."""
    norm_class = getattr(family.module(), family.norm)
    return [module for module in layer.modules() if isinstance(module, norm_class)]


def _runs_its_class(module: nn.Module) -> bool:
    """Whether calling `module` comes to the forward of its class, perhaps by way of accelerate's hooks."""
    forward = vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    if forward is None:
        return True
    own = inspect.unwrap(type(module).forward)
    return isinstance(forward, MethodType) and inspect.unwrap(forward.__func__) is own


def _signature(function) -> str:
    """The names of the parameters, with the stars of those that gather."""
    if isinstance(function, nn.Module):  # what the package kernels makes of a function
        function = function.forward
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(stars.get(p.kind, "") + name for name, p in inspect.signature(function).parameters.items())


def _strings(code: CodeType) -> set[str]:
    """Every string among the constants of a function, those in tuples of keyword names too."""
    flat = [x for constant in code.co_consts for x in (constant if isinstance(constant, tuple) else (constant,))]
    return {x for x in flat if isinstance(x, str)}
