"""A composed configuration against what its command and the constructors in it expect: all faults at once."""

from __future__ import annotations

import difflib
import importlib
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from panoptic_ibs import expectations
from panoptic_ibs.errors import ConfigError
from panoptic_ibs.extras import LOGGERS, lack
from panoptic_ibs.schemas import Fault, shown, told

from . import schema
from .schema import Component

if TYPE_CHECKING:
    from omegaconf import DictConfig

Steps = tuple[str | int, ...]
_GIVEN = {"classes", "levels", "reader", "rank", "world_size"}  # parameters that the program itself fills
_HYDRAS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([\w./]+(?:\[\d+\])*)(?:,[^}]*)?\}")


def check_configuration(config: DictConfig, command: str) -> None:
    """Make sure that a composed configuration is sound, before anything runs.

    Args:
        config: as Hydra composed it, with or without its ``hydra`` node.
        command: name of the configuration: ``config`` (train), ``evaluate``, ``predict``, ``convert``.

    Raises:
        ConfigError: it is not; every fault has its dotted key, its value and what is expected.
    """
    from omegaconf import OmegaConf, flag_override

    with flag_override(config, ["struct", "readonly"], False):
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    own._set_parent(None)
    if missing := sorted(OmegaConf.missing_keys(own)):
        raise ConfigError(f"{missing[0]} is not set: give {missing[0]}=VALUE.")
    found = faults_in_configuration(OmegaConf.to_container(own, resolve=True), OmegaConf.to_container(own), command)
    _raise(found)


def check_changes(description: Mapping[str, Any], changes: Mapping[str, Any], key: str = "overrides") -> None:
    """Make sure that what is changed in the plain description of a network is sound.

    Args:
        description: with the changes, see :func:`panoptic_ibs.construction.build_model`.
        changes: the changed options alone, nested as they are in it.
        key: where the changes stand in the configuration.

    Raises:
        ConfigError: it is not; all faults, by key.
    """
    if not changes:
        return
    checker = Checker()
    for part in ("backbone", "head"):
        checker.component(Component(), description[part], (part,))
    rest = {k: v for k, v in description.items() if k not in ("backbone", "head")}
    checker.value(schema.Model, rest, ())
    checker.unreported(description, ())
    _raise([Fault((key, *f.steps), f.text) for f in checker.faults if _touched(changes, f.steps)])


def _touched(changes: Any, steps: Steps) -> bool:
    for step in steps:
        if not isinstance(changes, Mapping):
            return True
        if step not in changes:
            return False
        changes = changes[step]
    return True


def _raise(found: Sequence[Fault]) -> None:
    if found:
        raise ConfigError(told("configuration", found))


def faults_in_configuration(resolved: Any, raw: Any, command: str) -> list[Fault]:
    """All faults of a configuration in plain containers, each under the key where the value stands.

    Args:
        resolved: without interpolations.
        raw: with them: a value that is interpolated is at fault where it comes from.
        command: see :func:`check_configuration`.
    """
    checker = Checker()
    known = expectations.fields_of(schema.COMMANDS[command])
    unknown = [k for k in resolved if k not in known and not _referred(str(k), raw)]
    checker.options(known, {k: v for k, v in resolved.items() if k in known or k in unknown}, (), "the configuration")
    checker.unreported(resolved, ())
    checker.faults += _machine(resolved) + _endless(resolved)
    by_source: dict[Steps, Fault] = {}
    for fault in checker.faults:
        steps = source_of(raw, fault.steps)
        by_source.setdefault(steps, Fault(steps, fault.text))
    return list(by_source.values())


def _machine(resolved: Mapping[str, Any]) -> list[Fault]:
    """What this machine lacks: optional libraries, a device."""
    return _libraries(resolved) or _device(resolved)


def _libraries(resolved: Mapping[str, Any]) -> list[Fault]:
    """Loggers whose libraries are not installed."""
    wanted = resolved.get("logger")
    used = [name for name, options in wanted.items() if options is not None] if isinstance(wanted, Mapping) else []
    told = {name: lack(*LOGGERS[name]) for name in used if name in LOGGERS}
    return [Fault(("logger", name), f"was asked for, but {text}") for name, text in told.items() if text]


def _device(resolved: Mapping[str, Any]) -> list[Fault]:
    """The device that is wanted, where there is none."""
    trainer = resolved.get("trainer")
    wanted = trainer.get("accelerator") if isinstance(trainer, Mapping) else None
    if wanted not in ("gpu", "cuda", "mps"):
        return []
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    usable = {"cuda": CUDAAccelerator.is_available(), "mps": MPSAccelerator.is_available()}
    if usable.get(wanted, any(usable.values())):
        return []
    text = f"is {shown(wanted)}; no such device can be used on this machine: set trainer=cpu or trainer=auto"
    return [Fault(("trainer", "accelerator"), text)]


def _endless(resolved: Mapping[str, Any]) -> list[Fault]:
    """Training that nothing ends: then its schedule has no length."""
    trainer = resolved.get("trainer")
    if not isinstance(trainer, Mapping) or "head" not in resolved:  # an evaluation trains nothing
        return []
    if trainer.get("max_steps", -1) != -1 or trainer.get("max_epochs", -1) != -1:
        return []
    return [Fault(("trainer", "max_steps"), "is -1; expected: a whole number >= 1, as trainer.max_epochs is -1, too")]


def source_of(raw: Any, steps: Steps) -> Steps:
    """The place where a value stands: interpolations on the way to it are followed."""
    for _ in range(20):  # interpolations in a ring do not resolve, so they never come here
        node, walked = raw, 0
        for walked, step in enumerate(steps):
            reference = _REFERENCE.fullmatch(node) if isinstance(node, str) else None
            if reference:
                steps = (*_steps(reference[1]), *steps[walked:])
                break
            try:
                node = node[step]
            except (KeyError, IndexError, TypeError):
                return steps
        else:
            reference = _REFERENCE.fullmatch(node) if isinstance(node, str) else None
            if reference is None:
                return steps
            steps = _steps(reference[1])
    return steps


def _steps(dotted: str) -> Steps:
    return tuple(int(word) if word.isdecimal() else word for word in re.findall(r"[^.\[\]]+", dotted))


def _referred(key: str, raw: Any) -> bool:
    """Whether an interpolation refers to a key, as configurations of a user's own may."""
    if isinstance(raw, Mapping):
        return any(_referred(key, value) for value in raw.values())
    if isinstance(raw, list):
        return any(_referred(key, value) for value in raw)
    return isinstance(raw, str) and re.search(rf"[{{:]{re.escape(key)}[.}}\[,]", raw) is not None


class Checker:
    """Walks through plain containers and collects faults."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def options(self, known: Mapping[str, Any], value: Mapping[Any, Any], steps: Steps, owner: str) -> None:
        """Check that all keys are known, and their values."""
        for key, entry in value.items():
            if key in known and key not in _GIVEN:
                self.value(known[key], entry, (*steps, key))
            else:
                self.faults.append(Fault((*steps, key), _unknown(str(key), known, owner)))

    def value(self, annotation: Any, value: Any, steps: Steps) -> None:
        """Check a value against an annotation, with everything in it."""
        if component := _mark(annotation, Component):
            if value is None and expectations.allows_null(annotation):
                return
            if isinstance(value, Mapping) or not _alternatives(annotation):
                self.component(component, value, steps)
                return
        is_node = isinstance(value, Mapping) and value.get("_target_") is not None
        if is_node and expectations.takes_object(annotation):
            self.component(Component(), value, steps)
            return
        described = _described(annotation)
        if described is not None and isinstance(value, Mapping) and not is_node:
            known = _fields(described)
            if described in schema.OTHER_KEYS:
                known = {**dict.fromkeys(value, schema.OTHER_KEYS[described]), **known}
            mark = expectations.options_of(annotation)
            self.options({**dict.fromkeys(value, Any), **known} if mark and mark.partly else known, value, steps,
                         _name(described))  # fmt: skip
            return
        found = expectations.faults(annotation, value, steps)
        self.faults += found
        if not found:
            self.inside(annotation, value, steps)

    def inside(self, annotation: Any, value: Any, steps: Steps) -> None:
        """Check nodes with ``_target_`` that lie in free containers, such as ``data.presets.resize``."""
        if isinstance(value, Mapping):
            entry = expectations.entry_annotation(annotation)
            for key, child in value.items():
                self.value(entry, child, (*steps, key))
        elif isinstance(value, list):
            for number, child in enumerate(value):
                if isinstance(child, Mapping | list):
                    self.value(Any, child, (*steps, number))

    def component(self, mark: Component, value: Any, steps: Steps) -> None:
        """Check a node with ``_target_``."""
        if not isinstance(value, Mapping):
            self.faults.append(Fault(steps, f"is {shown(value)}; expected: a group of options with _target_"))
            return
        target = value.get("_target_") or mark.fallback
        if target is None:
            self.faults.append(Fault((*steps, "_target_"), "is missing: choose an option of the group"))
            return
        try:
            made = _imported(target)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            reason = f"expected: what can be imported ({error})"
            self.faults.append(Fault((*steps, "_target_"), f"is {shown(target)}; {reason}"))
            return
        known = {**expectations.fields_of(made), **schema.LOOSELY_TYPED.get(target, dict)()}
        given = {k: v for k, v in value.items() if k not in _HYDRAS and k not in mark.extra}
        if value.get("_target_") is not None:
            given |= {k: v for k, v in value.items() if k in mark.extra and k in known}
        if expectations.open_ended(made):
            known = {**{str(k): Any for k in given}, **known}
        self.options(known, given, steps, target)

    def unreported(self, value: Any, steps: Steps) -> None:
        """Numbers that no result file could hold: NaN and infinity."""
        if isinstance(value, Mapping):
            for key, child in value.items():
                self.unreported(child, (*steps, key))
        elif isinstance(value, list | tuple):
            for number, child in enumerate(value):
                self.unreported(child, (*steps, number))
        elif isinstance(value, float) and not math.isfinite(value) and all(f.steps != steps for f in self.faults):
            self.faults.append(Fault(steps, f"is {value}; expected: a finite number"))


def _mark(annotation: Any, kind: type[Any]) -> Any:
    marks = getattr(annotation, "__metadata__", ())
    if found := next((m for m in marks if isinstance(m, kind)), None):
        return found
    return next((m for a in expectations.members(annotation) if (m := _mark(a, kind))), None)


def _alternatives(annotation: Any) -> list[Any]:
    """What else than a component and null an annotation has room for."""
    return [m for m in expectations.members(annotation) if m is not type(None) and not _mark(m, Component)]


def _described(annotation: Any) -> Any:
    """What describes the options of a mapping: a ``TypedDict``, or the target of a mark ``OptionsOf``."""
    if mark := expectations.options_of(annotation):
        return mark.target
    candidates = (annotation, *expectations.members(annotation))
    return next((c for c in candidates if typing.is_typeddict(c)), None)


def _fields(described: Any) -> Mapping[str, Any]:
    if not isinstance(described, str):
        return expectations.fields_of(described)
    made = _imported(described)
    if made is schema.sampling_options:
        return schema.sampling_options()
    return expectations.fields_of(made)


def _name(described: Any) -> str:
    return "this group" if not isinstance(described, str) else described.rpartition(".")[2].replace("_", " ")


def _imported(target: str) -> Callable[..., Any]:
    """What a dotted name stands for.

    Raises:
        ImportError, AttributeError, ValueError, TypeError: nothing that can be called.
    """
    module, _, name = str(target).rpartition(".")
    if not isinstance(target, str) or not module:
        raise ValueError("no dotted name")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        outer, _, inner = module.rpartition(".")  # a class's method, as in pkg.Class.make
        if not outer:
            raise
        found = getattr(getattr(importlib.import_module(outer), inner), name)
    if not callable(found):
        raise TypeError("nothing that can be called")
    return found


def _unknown(key: str, known: Mapping[str, Any], owner: str) -> str:
    usual = [k for k in known if k not in _GIVEN]
    near = difflib.get_close_matches(key, usual, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}" if near else f"it has: {', '.join(usual) or 'none'}"
    return f"is unknown: {owner} has no such option; {hint}"
