"""LoRA on parameters (`target_parameters`), mostly stacks of experts' matrices.

For E experts, `lora_A` [E·r, in] holds the rows of each expert together and `lora_B` [out, r·E] holds its
columns apart: column k·E + e is column k of expert e (PEFT 0.21 lora/layer.py,
ParamWrapper.get_delta_weight). Whether the product is the update or its transpose is decided by the shapes;
it depends on the versions of PEFT and transformers that trained the adapter. Several parameters of one module
are nested wrappers, the last registered one outermost: `experts.base_layer.lora_A` is the first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import permutations

from lorafuse.adapters.reading.check_tensors import shape_of
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.keys import Modules
from lorafuse.adapters.reading.lora_pair import Pair
from lorafuse.adapters.reading.modules import Leaves, take
from lorafuse.adapters.updates import Choice, Update
from lorafuse.errors import AdapterError, listed, shown
from lorafuse.patches.experts import Stack
from lorafuse.patches.target import Parameter

# The order in which transformers' expert modules register their matrices.
_REGISTERED = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")

Scaling = Callable[[str, int], float]  # (parameter, rank) → scale
Ordinary = Callable[[str, Leaves], list[Update]]  # (module, its leaves) → LoRA on the module's own weight


@dataclass(frozen=True)
class Wrapper:
    """One level of nested wrappers: the keys of its factors, and their (out, in)."""

    key_a: str
    key_b: str
    out_in: tuple[int, int]
    n_ranks: int  # of all experts


def choices(adapter: AdapterDir, modules: Modules, scaling: Scaling, ordinary: Ordinary) -> list[Choice]:
    """LoRA on parameters; takes its leaves. A target without a module's name, as PEFT writes them itself,
    says nothing of the modules that have this parameter: there the checkpoint decides."""
    targets = adapter.config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise AdapterError(
            f"{adapter.folder / CONFIG}: target_parameters is {shown(targets)}, expected a list of names."
        )
    result = []
    for module in [module for module in modules if not module.endswith(".base_layer")]:
        ends = {target.rpartition(".")[2]: None for target in targets if _targeted(module, target)}
        names = sorted(ends, key=lambda name: _REGISTERED.index(name) if name in _REGISTERED else 0)
        nested = f"{module}.base_layer" in modules
        if names or nested:
            plain = [] if nested else _plain(adapter, modules[module], module, names, targets, ordinary)
            if plain is None:
                continue
            wrappers = _take(adapter, modules, module)
            if len(names) < len(wrappers):
                raise AdapterError(
                    f"{adapter.file}: {shown(module)} has LoRA on {len(wrappers)} parameters, but "
                    f"target_parameters in {CONFIG} names {listed(names) or 'none'} of it."
                )
            parameters = tuple(f"{module}.{name}" for name in names)
            keys = tuple(key for wrapper in wrappers for key in (wrapper.key_a, wrapper.key_b))
            if wrappers:
                own = tuple(dict.fromkeys(update.parameter for update in plain))
                settle = partial(_settle_kind, plain, partial(_settle, adapter, wrappers, scaling))
                bare = any("." not in target for target in targets)
                result.append(Choice((*own, *parameters), keys, settle, len(wrappers) if bare else None))
    return result


def _plain(
    adapter: AdapterDir,
    leaves: Leaves,
    module: str,
    names: list[str],
    targets: list[str],
    ordinary: Ordinary,
) -> list[Update] | None:
    """What the factors of a module are if they are those of its own weight: none where a target names the
    module, None where LoRA on a parameter cannot have these leaves."""
    if any("." in target and _targeted(module, target) for target in targets):
        return []
    factors = [leaves.get(leaf) for leaf in ("lora_A.weight", "lora_B.weight")]
    if len(leaves) != 2 or any(key is None or len(shape_of(adapter, key)) != 2 for key in factors):
        return None
    return ordinary(module, dict(leaves)) if "weight" not in names else []


def _settle_kind(
    plain: list[Update],
    settle: Callable[[Mapping[str, Parameter]], list[Update]],
    parameters: Mapping[str, Parameter],
) -> list[Update]:
    """The module's own weight, if it has one."""
    return plain if any(update.parameter in parameters for update in plain) else settle(parameters)


def _targeted(module: str, target: str) -> bool:
    """PEFT compares whole names and ends after a dot."""
    return f".{module}.{target.rpartition('.')[2]}".endswith(f".{target}")


def _take(adapter: AdapterDir, modules: Modules, module: str) -> list[Wrapper]:
    """The wrappers of a module, outermost first."""
    wrappers = []
    while module in modules:
        leaves = modules[module]
        keys = take(adapter, module, leaves, ("lora_A.weight", "lora_B.weight"))
        if keys is None:
            break
        key_a, key_b = keys
        pair = Pair(adapter, key_a, key_b)
        pair.check(convolutions=False)
        wrappers.append(
            Wrapper(key_a, key_b, (shape_of(adapter, key_b)[0], shape_of(adapter, key_a)[1]), pair.rank)
        )
        module = f"{module}.base_layer"
    return wrappers


def _settle(
    adapter: AdapterDir, wrappers: list[Wrapper], scaling: Scaling, parameters: Mapping[str, Parameter]
) -> list[Update]:
    """Which wrapper belongs to which parameter, and in which orientation."""
    names = list(parameters)
    ways = [
        way
        for way in permutations(names, len(wrappers))
        if all(_fits(w, parameters[n]) for w, n in zip(wrappers, way, strict=True))
    ]
    if len(ways) > 1:  # several parameters of the same size: the last registered one is outermost
        ways = [way for way in ways if list(way) == sorted(way, key=names.index, reverse=True)]
    if len(ways) != 1:
        shapes = listed(f"{name} {list(parameter.shape)}" for name, parameter in parameters.items())
        factors = listed(f"{w.key_a} and {w.key_b} ({w.out_in[0]} × {w.out_in[1]})" for w in wrappers)
        how = "fit more than one of" if ways else "do not fit"
        raise AdapterError(
            f"{adapter.file}: {factors} {how} {shapes}; is the adapter for another base?", misfit=True
        )
    pairs = list(zip(wrappers, ways[0], strict=True))
    known = {
        _in_memory(w, parameters[n]) for w, n in pairs if len(parameters[n].shape) == 3 and not _is_square(w)
    }
    return [_update(adapter, wrapper, name, parameters[name], known, scaling) for wrapper, name in pairs]


def _fits(wrapper: Wrapper, parameter: Parameter) -> bool:
    *n_experts, d1, d2 = parameter.shape if len(parameter.shape) in (2, 3) else (0, 0)
    divides = not n_experts or wrapper.n_ranks % n_experts[0] == 0
    return divides and wrapper.out_in in ((d1, d2), (d2, d1))


def _is_square(wrapper: Wrapper) -> bool:
    return wrapper.out_in[0] == wrapper.out_in[1]


def _in_memory(wrapper: Wrapper, parameter: Parameter) -> bool:
    """Whether the product of a wrapper that is not square is the transpose of the update of the parameter in
    memory."""
    return (wrapper.out_in != parameter.shape[1:]) != parameter.parts[0].transposed


def _update(
    adapter: AdapterDir,
    wrapper: Wrapper,
    name: str,
    parameter: Parameter,
    known: set[bool],
    scaling: Scaling,
) -> Update:
    keys = (wrapper.key_a, wrapper.key_b)
    if len(parameter.shape) == 2:
        scale = scaling(name, wrapper.n_ranks)
        return Update(name, keys, make=lambda target: Pair(adapter, *keys).patch(scale, target))
    n_experts = parameter.shape[0]
    rank = wrapper.n_ranks // n_experts
    transposed = wrapper.out_in != parameter.shape[1:]
    if _is_square(wrapper):
        in_memory = known.pop() if len(known) == 1 else _by_version(adapter, name, parameter)
        transposed = in_memory != parameter.parts[0].transposed
    stack = Stack(
        adapter.store,
        adapter.file,
        (wrapper.key_a, wrapper.key_b),
        rank=rank,
        n_experts=n_experts,
        scale=scaling(name, rank),
        transposed=transposed,
    )
    return Update(name, keys, make=stack.patch, stacked=True)


def _by_version(adapter: AdapterDir, name: str, parameter: Parameter) -> bool:
    """The orientation of square matrices when the adapter has no others: PEFT up to 0.18 took a stack for (E,
    in, out), later versions for (E, out, in) except where transformers 5 says that it is (E, in, out)."""
    version = str(adapter.config.get("peft_version") or "0.0").split(".")
    number = tuple(int(part) if part.isdecimal() else 0 for part in version[:2])
    if number < (0, 19) and not parameter.either_way:
        return True
    if parameter.in_out or parameter.either_way:
        raise AdapterError(
            f"{adapter.file}: the matrices of {shown(name)} are square, and PEFT {shown('.'.join(version))} "
            "stores their update in one orientation with transformers 4 and in the other with 5; the adapter "
            "does not say which it was."
        )
    return False
