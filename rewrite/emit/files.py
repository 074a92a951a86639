"""The one generated modelling file: the runtime's own text and a subclass of each class that a folder can name."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import PreTrainedModel, conversion_mapping
from transformers.models.auto import modeling_auto

from rewrite.emit import runtime
from rewrite.emit.stock import built

HEAD = '''"""Attention as `reattn` in the config describes it, for the class that the model was written in."""
'''
OWN = ("__future__", "rewrite.")
"""Imports that the generated file has no use for."""
CLASS = '''

class Reattn{name}({name}):
    """{name} with the attention of `config.reattn`."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        install(self, config.reattn, {prefix!r})
'''
RENAMED = """

# files name tensors otherwise than the class does, and of a class that is not its own the library does not know how
conversion_mapping.register_checkpoint_conversion_mapping(
    "Reattn{name}", conversion_mapping.get_checkpoint_conversion_mapping({renamed!r}), overwrite=True
)
"""


@dataclass(frozen=True)
class Named:
    """A class that a folder can name, the prefix that the recipe's paths have in the full model, and under which name
    transformers keeps how files name its tensors, where that has to be said anew."""

    kind: type[PreTrainedModel]
    prefix: str = ""
    renamed: str | None = None


def text_for(classes: Sequence[Named]) -> str:
    """The file's text: it imports torch, transformers and what the model's own class was imported from."""
    imports = {_import(named.kind) for named in classes}
    renamed = [named for named in classes if named.renamed is not None]
    if renamed:
        imports.add("from transformers import conversion_mapping")
    bodies: list[str] = []
    for part in runtime.PARTS:
        outside, body = _taken_apart(inspect.getsource(part))
        imports |= outside
        bodies.append(body)
    head = [HEAD, "from __future__ import annotations\n", "\n".join(sorted(imports, key=_order))]
    text = "\n".join(head) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"
    text += "".join(CLASS.format(name=named.kind.__name__, prefix=named.prefix) for named in classes)
    return text + "".join(RENAMED.format(name=named.kind.__name__, renamed=named.renamed) for named in renamed)


def _taken_apart(source: str) -> tuple[set[str], str]:
    """(imports of other projects' modules, all that follows the imports) of one file."""
    nodes = ast.parse(source).body
    found = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
    last = max(n.end_lineno or n.lineno for n in found)
    outside = [n for n in found if not (isinstance(n, ast.ImportFrom) and (n.module or "").startswith(OWN))]
    return {ast.unparse(n) for n in outside}, "\n".join(source.split("\n")[last:]).strip()


def _order(line: str) -> tuple[bool, str]:
    """Python's own modules first."""
    return line.split()[1].split(".")[0] not in sys.stdlib_module_names, line


def _classes(model: PreTrainedModel, recipe: dict[str, Any]) -> list[Named]:
    """The model's class and its base model's; or the class that `AutoModel` builds, where it has all that changed."""
    found = [Named(type(model))]
    base: Any = model.base_model
    if base is not model and isinstance(base, PreTrainedModel):
        path = next(n for n, m in model.named_modules() if m is base)
        return [*found, Named(type(base), f"{path}.", _renamed(base))]
    kind: Any = modeling_auto.MODEL_MAPPING.get(type(model.config), None)
    if (
        isinstance(kind, type)
        and issubclass(kind, PreTrainedModel)
        and kind is not type(model)
        and _has_all(kind, model, recipe)
    ):
        found.append(Named(kind))
    return found


def _renamed(base: PreTrainedModel) -> str | None:
    """Under which name transformers keeps how files name the tensors of a base model, where it keeps that at all and
    does not find it at a model of the same type inside."""
    kind = base.config.model_type
    inside = (m for m in base.modules() if isinstance(m, PreTrainedModel) and m is not base)
    if any(m.config.model_type == kind for m in inside):
        return None
    names = (type(base).__name__, kind)
    return next((n for n in names if conversion_mapping.get_checkpoint_conversion_mapping(n)), None)


def _has_all(kind: type[PreTrainedModel], model: PreTrainedModel, recipe: dict[str, Any]) -> bool:
    """Whether another class of the same config has all modules of the recipe."""
    names = dict(built(kind, model.config).named_modules())
    parts = [p for site in recipe["sites"] for p in (site, *site.get("projections", ())) if "module" in p]
    return all(p["module"] in names for p in parts)


def _import(kind: type) -> str:
    public = getattr(transformers, kind.__name__, None) is kind
    return f"from {'transformers' if public else kind.__module__} import {kind.__name__}"


def loaded(text: str) -> ModuleType:
    """The text as a module of this process, from a file: `save_pretrained` copies that file into the folder."""
    package = f"reattn_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    name = f"{package}.modeling_reattn"
    if name in sys.modules:
        return sys.modules[name]
    path = Path(tempfile.mkdtemp(prefix="reattn-")) / "modeling_reattn.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    # copies and pickles of a model name its module, and ask for the package before it
    parent = ModuleType(package)
    parent.__path__ = [str(path.parent)]
    sys.modules[package] = parent
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def auto_classes(kind: type[PreTrainedModel], config: Any) -> list[str]:
    """Names of transformers' Auto classes that would build this class for this config."""
    names: list[str] = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or type(config) not in mapping:
            continue
        built = mapping[type(config)]
        if kind in (built if isinstance(built, tuple) else (built,)):
            names.append(name)
    return names


def dress(model: PreTrainedModel, recipe: dict[str, Any]) -> None:
    """Make a model of a stock class one of the generated class, with the recipe in its config and installed."""
    classes = _classes(model, recipe)
    module = loaded(text_for(classes))
    auto_map: dict[str, str] = {}
    for named in reversed(classes):
        made = getattr(module, f"Reattn{named.kind.__name__}")
        names = auto_classes(named.kind, model.config) or (["AutoModel"] if named.prefix else [])
        auto_map |= dict.fromkeys(names, f"modeling_reattn.{made.__name__}")
    kind: Any = getattr(module, f"Reattn{type(model).__name__}")
    main = auto_classes(type(model), model.config)
    kind.register_for_auto_class(main[0] if main else "AutoModel")
    model.config.auto_map = auto_map
    model.config.reattn = recipe
    model.__class__ = kind
    module.install(model, recipe)
