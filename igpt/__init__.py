"""Image GPT in JAX: pretrain a transformer on pixels, then probe, sample and complete images with it."""

__version__ = "0.1.0"
__all__ = ["Pretrained", "load"]


def __getattr__(name):
    """Imports `load` and `Pretrained` at their first use, so that `import igpt` alone does not import JAX."""
    if name in ("Pretrained", "load"):
        from igpt.interop import load as pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module 'igpt' has no attribute {name!r}")
