"""Imports inside the package point one way only, and the computing layers read neither files nor the environment."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ds4jax"

# Layer -> layers that it may import besides its own. `name_part.py` beside `name.py` belongs to layer `name`.
COMPUTING = {
    "errors": set(),
    "config": {"errors"},
    "quants": {"errors", "config"},
    "activation": set(),
    "ops": {"errors", "config", "quants", "activation"},
    "pallas": {"errors", "config", "quants", "activation"},
    "model": {"errors", "config", "quants", "activation", "ops"},
    "decode": {"errors", "config", "quants", "ops", "model"},
}
LOADING = {
    "checkpoint": {"errors", "config", "quants"},
    "tokenizer": {"errors"},
    "chat": {"errors", "tokenizer"},
    "runconfig": {"errors", "config"},
}
ENGINE = {"engine": set(COMPUTING) - {"pallas"} | set(LOADING)}
PUBLIC = {"": {*COMPUTING, *LOADING, "engine"} - {"pallas"}}
SERVER = {"server": {*COMPUTING, *LOADING, "engine"} - {"pallas"}}
BENCH = {"bench": {*COMPUTING, *LOADING, "engine"} - {"pallas"}}
CLI = {"cli": {"", "demo", *COMPUTING, *LOADING, "engine", "server", "bench"} - {"pallas"}}
ALLOWED = {**COMPUTING, **LOADING, **ENGINE, **PUBLIC, **SERVER, **BENCH, **CLI, "demo": set()}

OUTSIDE = {
    *(
        "asyncio",
        "fileinput",
        "glob",
        "importlib",
        "io",
        "mmap",
        "multiprocessing",
        "os",
        "pathlib",
        "pickle",
        "pkgutil",
    ),
    *("shelve", "shutil", "socket", "sqlite3", "subprocess", "sys", "tempfile", "urllib", "zipfile"),
}
READERS = {"fromfile", "genfromtxt", "load", "loadtxt", "memmap", "save", "savez", "savetxt", "tofile"}


def layer(module: str) -> str:
    """`ds4jax.ops.rope` -> `ops`; the package itself is ``."""
    return module.partition(".")[2].partition(".")[0].partition("_")[0]


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Full names of all imported modules; `from ds4jax import ops` counts as `ds4jax.ops`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if base == "ds4jax" and layer(full) in ALLOWED else base


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a module does that its layer must not do, one line each."""
    own = layer(module)
    if own not in ALLOWED:
        return [f"{module}: no layer is listed for it"]
    allowed = ALLOWED[own] | {own}
    if module == "ds4jax.ops":
        allowed = allowed | {"pallas"}  # the switchboard is the only one that sees both
    tree = ast.parse(source)
    found = []
    for name in imports(tree, module, is_package):
        if name.partition(".")[0] == "ds4jax":
            if layer(name) not in allowed:
                found.append(f"{module} imports {name}")
        elif own in COMPUTING and name.partition(".")[0] in OUTSIDE:
            found.append(f"{module} imports {name}")
    if own in COMPUTING:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = node.func
                if isinstance(called, ast.Name) and called.id in ("open", "input", "__import__"):
                    found.append(f"{module} calls {called.id}")
                elif (
                    isinstance(called, ast.Attribute)
                    and called.attr in READERS
                    and isinstance(called.value, ast.Name)
                    and called.value.id in ("np", "numpy", "jnp")
                ):
                    found.append(f"{module} calls {called.value.id}.{called.attr}")
    return found


def test_package() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found += violations(module, path.read_text(), is_package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ds4jax.errors", "import ds4jax.config"),
        ("ds4jax.config", "from ds4jax.quants import QTensor"),
        ("ds4jax.quants", "import ds4jax.ops.linear"),
        ("ds4jax.ops.linear", "from ds4jax.pallas import linear"),
        ("ds4jax.ops.linear", "from ds4jax import pallas"),
        ("ds4jax.ops.linear", "def f():\n    from ..pallas import linear"),
        ("ds4jax.pallas.linear", "from ds4jax.ops.linear import act_q8"),
        ("ds4jax.pallas.linear", "from .. import ops"),
        ("ds4jax.model.layers", "from ds4jax.pallas import linear"),
        ("ds4jax.model.layers", "from ds4jax.decode import sampling"),
        ("ds4jax.decode.generate", "from ds4jax.engine import Engine"),
        ("ds4jax.decode.generate", "import ds4jax"),
        ("ds4jax.checkpoint", "from ds4jax.model import cache"),
        ("ds4jax.tokenizer", "from ds4jax.config import ModelConfig"),
        ("ds4jax.chat_parse", "from ds4jax.engine import Engine"),
        ("ds4jax.engine", "from ds4jax import cli"),
        ("ds4jax.engine", "import ds4jax.pallas.linear as fast"),
        ("ds4jax.engine", "from ds4jax.server import run"),
        ("ds4jax.server.run", "from ds4jax import cli"),
        ("ds4jax.engine", "from ds4jax.bench import decode"),
        ("ds4jax.bench.decode", "from ds4jax import cli_load"),
        ("ds4jax.novelty", ""),
        ("ds4jax.quants_layouts", "import ds4jax.ops.linear"),
        ("ds4jax.quants", "import os"),
        ("ds4jax.config", "from pathlib import Path"),
        ("ds4jax.ops.rope", "def f():\n    import importlib.resources"),
        ("ds4jax.model.cache", "from os import environ"),
        ("ds4jax.pallas.tiles", "table = open('tiles.json').read()"),
        ("ds4jax.decode.generate", "import numpy as np\nnp.load('x.npy')"),
    ],
)
def test_each_rule_can_fail(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("ds4jax.ops", "from ds4jax.pallas import linear\nfrom . import rope", True),
        ("ds4jax.ops.linear", "from ds4jax.ops import rows\nfrom ..quants import QTensor", False),
        ("ds4jax.quants", "from ds4jax import quants_layouts, errors\nimport numpy as np\nnp.loads", False),
        ("ds4jax.decode.generate", "from ds4jax.model.cache import Cache\nimport jax", False),
        ("ds4jax.engine", "from ds4jax import tokenizer, checkpoint\nimport os, pathlib", False),
        ("ds4jax.cli", "import ds4jax\nfrom ds4jax.runconfig import RunConfig", False),
    ],
)
def test_what_is_allowed(module: str, source: str, is_package: bool) -> None:
    assert violations(module, source, is_package) == []
