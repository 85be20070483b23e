"""Image GPT in JAX: pretrain a transformer on pixels, then probe, sample and complete images with it."""

__version__ = "0.1.0"
__all__ = ["Pictures", "Pretrained", "Run", "load"]

PLACES = {"Pictures": "igpt.pictures", "Pretrained": "igpt.interop.load", "Run": "igpt.trained", "load": "igpt.trained"}


def __getattr__(name):
    """Imports a name at its first use, so that `import igpt` alone does not import JAX."""
    if name in PLACES:
        import importlib

        return getattr(importlib.import_module(PLACES[name]), name)
    raise AttributeError(f"module 'igpt' has no attribute {name!r}")
