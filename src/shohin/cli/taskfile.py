"""Task files: the user's own Python file that says which model and which data.

A task file defines ``model`` and ``data`` (``student``, ``teacher`` and ``data`` for distillation), or a function ``task()``,
with an optional argument ``seed``, that returns them in this order or as a dict. It is run once, as it is: it is the only code
that the command executes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from shohin.errors import ShohinError, closest

#: what a task file holds for most commands, and for distillation
MODEL, PAIR = ("model", "data"), ("student", "teacher", "data")
#: a task file of such a name would be imported in place of the library, for its folder comes first on sys.path
_TAKEN = frozenset(
    {"torch", "numpy", "scipy", "onnx", "onnxruntime", "onnxscript", "safetensors", "rich", "typer", "jinja2", "plotly", "shohin"}
)


class TaskError(ShohinError):
    """The task file is missing, cannot be read, or does not define what is needed."""


def load_task(path: Path, seed: int = 0, names: Sequence[str] = MODEL) -> dict[str, Any]:
    """Runs a task file once and returns what it defines.

    Random generators are seeded first, so that a model built without a seed is the same one when a run is resumed.

    Args:
        path: of the file; its folder is put on ``sys.path``, so that modules beside it can be imported.
        seed: handed to ``task(seed=...)`` if it takes one.
        names: what is needed, of `MODEL` or `PAIR`.

    Returns:
        name -> value: modules and a `shohin.data.Data`, checked.

    Raises:
        TaskError: what is wrong, where, and what was found instead. What the user's code raises comes through unchanged.
    """
    path = checked_path(path)
    # torch comes with these; it is imported only once it is known that there is a file
    from shohin.training.randomness import seed_everything

    seed_everything(seed, [])
    module = _run(path)
    if callable(getattr(module, "task", None)) and not all(hasattr(module, n) for n in names):
        values = _call(path, module, seed, names)
    else:
        for name in names:
            if not hasattr(module, name):
                raise TaskError(f"{path} does not define {name!r}{_found(module, name)}. A task file defines {_shape(names)}")
        values = {name: getattr(module, name) for name in names}
    for name, value in values.items():
        _check(path, name, value)
    return values


def checked_path(path: Path) -> Path:
    """The path of a file that can be a task file; needs no torch. Raises TaskError."""
    if path.is_dir():
        raise TaskError(f"{path} is a folder; name the task file in it{closest('task.py', (p.name for p in path.glob('*.py')))}")
    if not path.exists():
        beside = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise TaskError(f"the task file {path} does not exist{closest(str(path), (str(Path(p)) for p in beside))}")
    if path.suffix != ".py":
        raise TaskError(f"{path} is not a Python file (.py). A task file defines {_shape(MODEL)}")
    if path.stem in _TAKEN or path.stem in sys.stdlib_module_names:
        raise TaskError(f"the task file {path} has the name of a library that it would hide ({path.stem!r}); rename it")
    return path


def _run(path: Path) -> ModuleType:
    """The file as a module of a name that nothing else has."""
    real = path.resolve()
    name = f"shohin_task_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{hashlib.sha256(str(real).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, real)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    if str(real.parent) not in sys.path:
        sys.path.insert(0, str(real.parent))
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        text = (error.text or "").strip()
        raise TaskError(f"{error.filename or path}, line {error.lineno}: {error.msg}" + (f": {text}" if text else "")) from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not text in UTF-8: {error}") from error
    except ValueError as error:
        if "null bytes" not in str(error):  # what some versions of Python say of a binary file
            raise
        raise TaskError(f"{path} is not text in UTF-8: {error}") from error
    return module


def _call(path: Path, module: ModuleType, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """What ``task()`` returns, by name."""
    parameters = inspect.signature(module.task).parameters
    empty, variadic = inspect.Parameter.empty, (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [n for n, p in parameters.items() if p.default is empty and p.kind not in variadic and n != "seed"]
    if required:
        raise TaskError(f"task() in {path} needs {', '.join(required)}; it is called with nothing but seed=...: give them defaults")
    value = module.task(seed=seed) if "seed" in parameters else module.task()
    wanted = f"it must return {', '.join(names)}"
    if isinstance(value, Mapping):
        missing = [n for n in names if n not in value]
        if missing:
            raise TaskError(
                f"task() in {path} returned a dict without {missing[0]!r} (it has {', '.join(map(repr, value)) or 'nothing'}); {wanted}"
            )
        return {n: value[n] for n in names}
    if not isinstance(value, (tuple, list)) or len(value) != len(names):
        length = f" of {len(value)} values" if isinstance(value, (tuple, list)) else ""
        raise TaskError(f"task() in {path} returned {_kind(value)}{length}; {wanted}")
    return dict(zip(names, value, strict=True))


def _check(path: Path, name: str, value: Any) -> None:
    from torch import nn

    from shohin.data import Data

    if name == "data":
        if not isinstance(value, Data):
            hint = "data = shohin.Data(train=loader, validation=loader2)"
            raise TaskError(f"{name!r} in {path} is {_kind(value)}, not a shohin.Data; write {hint}")
    elif not isinstance(value, nn.Module):
        hint = f"; write {name} = {value.__name__}(...)" if isinstance(value, type) and issubclass(value, nn.Module) else ""
        raise TaskError(f"{name!r} in {path} is {_kind(value)}, not a torch.nn.Module{hint}")


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def _shape(names: Sequence[str]) -> str:
    return f"{', '.join(repr(n) for n in names[:-1])} and {names[-1]!r}, or a function task() that returns {'both' if len(names) == 2 else 'all'}"


def _found(module: ModuleType, name: str) -> str:
    """What the file does define, and what may have been meant: by type first, then by name."""
    from torch import nn

    from shohin.data import Data

    own = {
        n: v
        for n, v in vars(module).items()
        if (not n.startswith("_") and not isinstance(v, ModuleType) and getattr(v, "__module__", module.__name__) == module.__name__)
        or isinstance(v, (nn.Module, Data))
    }
    fits = [n for n, v in own.items() if isinstance(v, Data if name == "data" else nn.Module) and n not in (*MODEL, *PAIR)]
    if fits:
        hint = f"; did you mean {', '.join(repr(n) for n in fits[:3])}? Write {name} = {fits[0]}"
    else:
        hint = closest(name, own) or closest("task", [n for n, v in own.items() if inspect.isfunction(v)])
    shown = [f"{n} ({type(v).__name__})" for n, v in list(own.items())[:8]]
    more = f" and {len(own) - 8} more" if len(own) > 8 else ""
    return f" (found: {', '.join(shown) or 'nothing'}{more}{hint})"
