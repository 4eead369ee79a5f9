"""The engines by name. Each is imported when it is asked for."""

from importlib import import_module
from typing import Any

from lorafuse.engines.engine import Engine
from lorafuse.events import OnEvent

ENGINES: dict[str, str] = {"ray": "lorafuse.engines.ray_engine"}


def engine_named(name: str, address: str | None, on_event: OnEvent) -> Engine:
    """An engine, to be entered; `address`: of a cluster, None for an engine on this machine."""
    module: Any = import_module(ENGINES[name])
    engine: Engine = module.open_engine(address, on_event)
    return engine
