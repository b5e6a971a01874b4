"""`use_qlatrain_kernels`: puts qlakernels into transformers' layers, says where, and takes it out again.

How. The layers look their functions up in their module, which all models share; so each function there is replaced by
one that chooses: a layer that is marked, or any layer while a handle holds everywhere, gets ours, every other layer
transformers'. A mark is a forward pre-hook on the layer and on its gated norm, which adds a keyword to the call:
it works wherever a module is called, so under gradient checkpointing, accelerate's hooks, peft and torch.compile. When
no handle is left, transformers' module holds its own functions again.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from types import MethodType
from typing import NamedTuple, Self

import transformers
from torch import nn

from qlakernels.backends import backend_names
from qlatrain.checks import check_choice
from qlatrain.integrations.transformers import operators
from qlatrain.integrations.transformers.families import (
    CONVOLUTION,
    FAMILIES,
    RULE,
    TESTED_VERSIONS,
    Family,
    differences,
    differences_in,
    layers_of,
    norms_of,
)

logger = logging.getLogger(__name__)

KEYWORD = "qlatrain_backend"  # what a mark adds to a call
MOST_DIFFERENCES = 5  # that a message lists; every layer of a model may have the same


class Replaced(NamedTuple):
    """`operator` of qlakernels runs in `count` modules of class `module`; None: in all there are and will be."""

    module: str
    operator: str
    count: int | None


class Mark:
    """A forward pre-hook that has the module it is on run through a backend."""

    def __init__(self, backend: str, active: bool = True):
        self.backend, self.active = backend, active

    def __call__(self, module, args, kwargs):
        return (args, kwargs | {KEYWORD: self.backend}) if self.active else None

    def __deepcopy__(self, memo) -> Self:
        return self  # a copy of a model is undone with the model

    def __reduce__(self):
        return Mark, (self.backend, False)  # a pickled model knows nothing of it


class Handle:
    """What `use_qlatrain_kernels` did. A context manager: leaving it undoes it.

    replaced: each class of modules, the operator that runs in it, and how many there are.
    backend: that was asked for.
    """

    def __init__(self, where: str, replaced: list[Replaced], mark: Mark):
        self.replaced = tuple(replaced)
        self.backend = mark.backend
        self._where, self._mark = where, mark
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Takes away what this call put in; what other calls put in stays. A second time does nothing."""
        self._mark.active = False
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __str__(self) -> str:
        modules: dict[tuple[str, int | None], list[str]] = {}
        for module, operator, count in self.replaced:
            modules.setdefault((module, count), []).append(operator)
        listed = "; ".join(
            f"{', '.join(names)} in {'every' if count is None else count} {module}"
            for (module, count), names in modules.items()
        )
        return f"{self._where}: qlakernels (backend {self.backend}) runs {listed}"


def use_qlatrain_kernels(model_or_nothing: nn.Module | None = None, *, backend: str = "auto") -> Handle:
    """Runs the Gated DeltaNet layers of transformers' qwen3_next, qwen3_5, qwen3_5_moe and olmo_hybrid on qlakernels.

    Replaced are the gated delta rule over many tokens, the short causal convolution before it and the gated RMSNorm
    behind it, forward and backward. Decoding one token from a cache stays transformers'. Weights and parameter names
    are untouched. Packed documents are kept apart in both where the model is called with `cu_seq_lens_q` (or `seq_idx`,
    which costs a wait for the device in each layer).

    Args:
        model_or_nothing: the model whose layers are replaced, also inside a wrapper such as peft's; no other model is
            affected. None: every model of these families in this process, made before or afterwards. A model that
            accelerate has already spread over devices keeps transformers' norm then: give the model.
        backend: of the gated delta rule, `auto` or a name. The convolution and the norm take their backend of the same
            name where they have one, and otherwise choose themselves. Which one runs is logged once by qlakernels.

    Returns:
        The handle. `.replaced` lists what was replaced, `.undo()` puts it back; `with` does so at its end. A model that
        is given twice runs through the later call's backend until that is undone, then through the earlier one's.

    Raises:
        ValueError: the backend is not known; the model has none of these layers; or transformers, or one of the layers,
            is not inside as expected. The message says what differs, and then nothing at all has been replaced.
    """
    check_choice("backend", backend, ("auto", *backend_names("gated_delta_rule")))
    if model_or_nothing is None:
        layers, families, where = [], list(FAMILIES), "every model"
    else:
        layers, where = _layers(model_or_nothing), type(model_or_nothing).__name__
        families = [family for family in FAMILIES if any(family == found for _, _, found in layers)]
    found = [difference for family in families for difference in differences(family) + _displaced(family)]
    if not found:
        found = [difference for layer in layers for difference in differences_in(*layer)]
    if found:
        if len(found) > MOST_DIFFERENCES:
            found[MOST_DIFFERENCES:] = [f"and {len(found) - MOST_DIFFERENCES} more"]
        raise ValueError(
            f"nothing was replaced, as transformers {transformers.__version__} is not as expected (tested with "
            f"{' and '.join(TESTED_VERSIONS)}): {'; '.join(found)}"
        )

    mark = Mark(backend)
    handle = Handle(where, _replaced(layers, families), mark)
    for family in families:
        _hold(family)
        handle._undo.append(functools.partial(_let_go, family))
    if model_or_nothing is None:
        _everywhere.append(mark)
        handle._undo.append(functools.partial(_everywhere.remove, mark))
    for _, layer, family in layers:
        norms = norms_of(layer, family)
        for norm in norms:
            _see_through_accelerate(norm)
        for module in (layer, *norms):
            handle._undo.append(module.register_forward_pre_hook(mark, with_kwargs=True).remove)
    logger.info("%s; transformers %s, tested with %s", handle, transformers.__version__, " and ".join(TESTED_VERSIONS))
    return handle


def _layers(model: nn.Module) -> list[tuple[str, nn.Module, Family]]:
    names = ", ".join(family.name for family in FAMILIES)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(model).__name__} is not a model: give a transformers model of {names}, or nothing")
    layers = layers_of(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Gated DeltaNet layer of transformers' {names}")
    return layers


def _replaced(layers: list[tuple[str, nn.Module, Family]], families: list[Family]) -> list[Replaced]:
    replaced = []
    for family in families:
        own = [layer for _, layer, found in layers if found == family]
        count = len(own) if layers else None
        norms = sum(len(norms_of(layer, family)) for layer in own) if layers else None
        replaced += [
            Replaced(family.layer, "chunk_gated_delta_rule", count),
            Replaced(family.layer, "causal_conv1d", count),
            Replaced(family.norm, "rms_norm_gated", norms),
        ]
    return replaced


# What is in transformers' modules now: for each family the number of handles that need it and (owner, name, theirs,
# ours); and the marks that hold for every model, of which the last counts.
_held: dict[Family, tuple[int, list[tuple[object, str, Callable, Callable]]]] = {}
_everywhere: list[Mark] = []


def _hold(family: Family) -> None:
    """Puts the functions that choose in the place of a family's, unless they are there."""
    count, places = _held.get(family, (0, []))
    if not places:
        module = family.module()
        norm_class = getattr(module, family.norm)
        for owner, name, choosing in (
            (module, CONVOLUTION, _choosing_function(getattr(module, CONVOLUTION), operators.causal_conv1d_fn)),
            (module, RULE, _choosing_function(getattr(module, RULE), operators.chunk_gated_delta_rule)),
            (norm_class, "forward", _choosing_norm(norm_class.forward)),
        ):
            places.append((owner, name, getattr(owner, name), choosing))
            setattr(owner, name, choosing)
    _held[family] = count + 1, places


def _let_go(family: Family) -> None:
    """The last handle of a family puts its functions back, where nobody else has put something in their place."""
    count, places = _held.pop(family)
    if count > 1:
        _held[family] = count - 1, places
        return
    for owner, name, theirs, ours in places:
        if getattr(owner, name) is ours:
            setattr(owner, name, theirs)


def _displaced(family: Family) -> list[str]:
    """What somebody else has put in the place of the functions that choose: they would not be called."""
    _, places = _held.get(family, (0, []))
    return [
        f"{family.module_name}'s {name} was replaced by something else since an earlier call"
        for owner, name, _, ours in places
        if getattr(owner, name) is not ours
    ]


def _chosen(backend: str | None) -> str | None:
    """The backend of a call: its mark's, else the one that holds everywhere; None: transformers' own function."""
    if backend is None and _everywhere:
        return _everywhere[-1].backend
    return backend


@functools.cache  # one for each function: what was bound to a module earlier is then the same again
def _choosing_function(theirs: Callable, ours: Callable) -> Callable:
    def choosing(*args, **kwargs):
        backend = _chosen(kwargs.pop(KEYWORD, None))
        return theirs(*args, **kwargs) if backend is None else ours(*args, backend=backend, **kwargs)

    choosing.__name__ = ours.__name__
    choosing.__signature__ = inspect.signature(theirs.forward if isinstance(theirs, nn.Module) else theirs)
    return choosing


@functools.cache
def _choosing_norm(theirs: Callable) -> Callable:
    @functools.wraps(theirs)
    def forward(self, hidden_states, gate, **kwargs):
        backend = _chosen(kwargs.pop(KEYWORD, None))
        if backend is None:
            return theirs(self, hidden_states, gate, **kwargs)
        return operators.rms_norm_gated(self, hidden_states, gate, backend=backend, **kwargs)

    return forward


def _see_through_accelerate(norm: nn.Module) -> None:
    """Where accelerate's hooks keep a bound forward, binds the one that chooses; without a mark it is theirs."""
    for name in ("forward", "_old_forward"):
        if isinstance(vars(norm).get(name), MethodType):
            setattr(norm, name, MethodType(type(norm).forward, norm))
