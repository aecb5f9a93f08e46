"""Every module of the package can be imported by itself in an environment with the declared dependencies."""

from __future__ import annotations

import importlib
import pkgutil

import cogview_pl


def test_every_module_imports() -> None:
    names = [module.name for module in pkgutil.walk_packages(cogview_pl.__path__, "cogview_pl.")]
    assert "cogview_pl.run" in names
    for name in names:
        importlib.import_module(name)
