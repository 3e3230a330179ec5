"""Refuse the scorers of reasoning-gym that could run a model's answer as code. Torch-free.

Some of them evaluate the answer as Python, whatever a model wrote. Checking the text first does
not help: ``(exec)("…")`` and names in full-width letters are evaluated, too.
"""

from __future__ import annotations

import builtins
import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from lorasb_ds.data.sources import reasoning_gym_dataset
from lorasb_ds.errors import ConfigError

PACKAGE = "reasoning_gym"
EVALUATES = ("eval", "exec", "__import__")
# Modules that a scorer may use besides its own package: we have checked that none evaluates a text.
# sympy does, in more functions than its parsers.
HARMLESS = {"abc", "calendar", "collections", "copy", "dataclasses", "datetime", "decimal", "enum"}
HARMLESS |= {"fractions", "functools", "itertools", "json", "magiccube", "math", "numpy", "random"}
HARMLESS |= {"re", "string", "typing", "zss"}


def check_scorer(source: str, option: str, remedy: str) -> Any:
    """Load the task ``reasoning-gym:NAME?…``, if its scorer evaluates no answers.

    Args:
        option: that named it, for the message.
        remedy: what to do about a scorer that does, for the message.
    Raises:
        ConfigError: if its scorer may evaluate an answer, or there is no such task.
    """
    dataset = reasoning_gym_dataset(source, option)
    if found := what_evaluates(type(dataset)):
        raise ConfigError(
            f"{option} {source}: answers to this task are not scored. Its scorer uses {found}, by "
            f"which Python may run what the model wrote. {remedy}"
        )
    return dataset


def what_evaluates(task: type) -> str | None:
    """Find what a task's scorer uses, directly or in what it calls, that may evaluate a text.

    Every name in its code is followed, so that this works for the scorers of other versions, too.
    Whatever is not known to be harmless counts.

    Returns:
        A name for the message; None if nothing is found.
    """
    todo: list[Any] = _of_class(task, "score_answer")
    seen: set[int] = set()
    while todo:
        used = _unwrapped(todo.pop())
        if (
            id(used) in seen or used is task
        ):  # of the task's methods only those that are named count
            continue
        seen.add(id(used))
        if any(used is getattr(builtins, name) for name in EVALUATES):
            return str(used.__name__)
        if not isinstance(used, FunctionType | ModuleType | type):
            used = used if getattr(used, "__module__", None) else type(used)
        module = used.__name__ if isinstance(used, ModuleType) else used.__module__
        root = module.partition(".")[0]
        if root != PACKAGE:
            if root not in {"builtins", *HARMLESS} or used is builtins:
                return str(root)
        elif isinstance(used, FunctionType):
            imported, names = _names(used.__code__)
            if unknown := imported - HARMLESS:
                return f"an import of {min(unknown) or 'its own package'}"
            todo += [part for name in names for part in _meant(name, used, names, task)]
        elif not isinstance(used, ModuleType):
            owner = used if isinstance(used, type) else type(used)
            todo += [part for base in owner.__mro__ for part in vars(base).values()]
    return None


def _meant(name: str, function: FunctionType, names: set[str], task: type) -> Iterator[Any]:
    """Yield everything that a name in a function's code may refer to: a global or an attribute."""
    scope = {**vars(builtins), **function.__globals__}
    if name in scope:
        yield scope[name]
    if name in EVALUATES:  # of any object
        yield vars(builtins)[name]
    yield from _of_class(task, name)
    for module in (scope.get(other) for other in names):
        if isinstance(module, ModuleType) and module.__name__.startswith(PACKAGE):
            yield vars(module).get(name)


def _of_class(task: type, name: str) -> list[Any]:
    """Return an attribute and those that it overrides, which super() may call."""
    return [vars(base)[name] for base in task.__mro__ if name in vars(base)]


def _unwrapped(thing: Any) -> Any:
    """Return the function behind a method, a property or a decorator."""
    if isinstance(thing, ModuleType | type):
        return thing
    for attribute in ("__func__", "fget", "func"):
        thing = getattr(thing, attribute, thing)
    return inspect.unwrap(thing) if callable(thing) else thing


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """Return the packages that code imports, and all names in it and in the code within it."""
    imported = {
        str(step.argval).partition(".")[0]
        for step in dis.get_instructions(code)
        if step.opname == "IMPORT_NAME"
    }
    names = set(code.co_names)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            more = _names(inner)
            imported, names = imported | more[0], names | more[1]
    return imported, names
