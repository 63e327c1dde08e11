"""This host's Python in an image: for what a guest's root does that no shell can."""

from __future__ import annotations

import json
import marshal
import os
import subprocess
import sys
from importlib.util import MAGIC_NUMBER
from pathlib import Path

from devstack.registry import Layer

from activities.disk.taken_along import LOADER, with_libraries

HOME = "python"
COMMAND = f"PYTHONHOME=/{HOME} /{HOME}/{LOADER} --library-path /{HOME} /{HOME}/python -S -u"
LIBRARY = f"{HOME}/lib/python{sys.version_info.major}.{sys.version_info.minor}"
# Prints what an interpreter has loaded for these modules, and what each start of one takes.
# Without OpenSSL's hashes, whose libraries do not come along: with them it would load no others.
LIST = (
    "import importlib, json, sys\n"
    "sys.modules['_hashlib'] = None\n"
    "for name in sys.argv[1:]: importlib.import_module(name)\n"
    "found = {n: getattr(m, '__file__', None) for n, m in [*sys.modules.items()]}\n"
    "packages = [n for n, m in sys.modules.items() if hasattr(m, '__path__')]\n"
    "print(json.dumps([found, packages]))\n"
)


def add_python(layer: Layer, modules: tuple[str, ...]) -> Layer:
    """Add Python, and of its library what these modules take, compiled: a guest may be slow.

    `COMMAND` runs a file by it, in a shell.
    """
    program = os.path.realpath(sys.executable)
    for directory in (HOME, f"{HOME}/lib", LIBRARY, f"{LIBRARY}/lib-dynload"):
        layer.directory(directory)
    for name, path in with_libraries(program, "python3").items():
        own = "python" if name == program else name
        layer.add(f"{HOME}/{own}", path.read_bytes(), mode=0o755)
    listed = subprocess.run(
        [program, "-I", "-S", "-c", LIST, *modules, "__future__", "encodings.idna"],
        capture_output=True,
        check=True,
    )
    found, packages = json.loads(listed.stdout)
    for package in sorted(packages):
        layer.directory(f"{LIBRARY}/{package.replace('.', '/')}")
    for module, file in sorted(found.items()):
        if file:
            _add_module(layer, module, Path(file), is_package=module in packages)
    return layer


def _add_module(layer: Layer, module: str, file: Path, *, is_package: bool) -> None:
    if file.suffix == ".so":
        layer.add(f"{LIBRARY}/lib-dynload/{file.name}", file.read_bytes())
    elif file.suffix == ".py":
        place = module.replace(".", "/") + ("/__init__" if is_package else "")
        code = compile(file.read_bytes(), str(file), "exec", dont_inherit=True)
        layer.add(f"{LIBRARY}/{place}.pyc", MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
