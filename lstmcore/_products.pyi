from typing import Any

class Packed:
    """Weights that `lstmcore.functional.pack` arranged for many calls."""

def __getattr__(name: str) -> Any: ...
