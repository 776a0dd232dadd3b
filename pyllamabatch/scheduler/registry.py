"""Things by name: those that ship, those of other packages (entry points), and one's own."""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

from ..errors import ArgumentError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Registry(Generic[T]):
    """Factories by name.

    - argument: what takes such a name, in errors. group: of the entry points.
    - shipped: the factories of this package. check: returns what was made, or raises for something
      else; it is told what was asked for."""

    argument: str
    group: str
    shipped: Mapping[str, Callable[..., T]]
    check: Callable[[Any, object], T]

    def names(self) -> tuple[str, ...]:
        points = entry_points(group=self.group)
        return tuple(sorted({*self.shipped, *(point.name for point in points)}))

    def make(self, spec: str, **options: Any) -> T:
        """What `spec` names: "NAME" or "NAME:option=value,option=value", values as Python writes
        them, text without quotes; more `options` as keywords. A shipped name may have _ for -. One
        of your own is "FILE.py:NAME" or "MODULE:NAME", with options behind another colon.

        ArgumentError lists the names, or the options of this one, or tells what is wrong with a
        value, or says that one of your own or of another package can't be loaded, or makes
        something else."""
        name, _, rest = spec.partition(":")
        load = self._load(name)
        if load is None and rest and "=" not in rest.partition(":")[0]:
            attribute, _, rest = rest.partition(":")
            name = f"{name}:{attribute}"
            load = partial(_own, *name.rsplit(":", 1))
        if load is None:
            limit = f"one of {', '.join(self.names())}, or your own: FILE.py:NAME, MODULE:NAME"
            raise ArgumentError(self.argument, name, limit)
        make = self._loaded(name, load)
        parameters = inspect.signature(make, eval_str=True).parameters
        for item in rest.split(",") if rest else ():
            option, equals, text = (part.strip() for part in item.partition("="))
            if not equals:
                raise ArgumentError(self.argument, spec, "NAME or NAME:option=value,option=value")
            if option not in parameters:
                known = ", ".join(parameters) or "none"
                limit = f"no option {option!r}; options of {name}: {known}"
                raise ArgumentError(self.argument, spec, limit)
            options[option] = _value(option, text, parameters[option].annotation)
        return self.check(make(**options), spec)

    def _load(self, name: str) -> Callable[[], Any] | None:
        """What loads the factory of this name; None when there is none."""
        shipped = self.shipped.get(name.replace("_", "-"))
        if shipped is not None:
            return lambda: shipped
        points = entry_points(group=self.group)
        return next((point.load for point in points if point.name == name), None)

    def _loaded(self, name: str, load: Callable[[], Any]) -> Callable[..., T]:
        try:
            make = load()
        except (ImportError, AttributeError, OSError, SyntaxError) as problem:
            raise ArgumentError(self.argument, name, f"it can't be loaded: {problem}") from problem
        if not callable(make):
            limit = f"it must be callable, and is {make!r}"
            raise ArgumentError(self.argument, name, limit)
        loaded: Callable[..., T] = make
        return loaded


def _own(source: str, attribute: str) -> Any:
    """From a file, which may import others of its folder, or a module, also of the current folder.
    Classes of a file find it among the loaded modules by its path."""
    path = Path(source).resolve()
    is_file = source.endswith(".py")
    folder = str(path.parent if is_file else Path.cwd())
    if folder not in sys.path:  # behind what is installed
        sys.path.append(folder)
    if not is_file:
        return getattr(importlib.import_module(source), attribute)
    spec = importlib.util.spec_from_file_location(str(path), path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, attribute)


def _value(option: str, text: str, kind: Any) -> Any:
    """`text` as one of the types that the factory's annotation names, if it has one."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if kind is inspect.Parameter.empty or type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    names = " or ".join(
        "None" if k is type(None) else str(getattr(k, "__name__", k)) for k in kinds
    )
    raise ArgumentError(option, value, f"must be {names}")
