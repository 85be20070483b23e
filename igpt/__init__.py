"""Image GPT in JAX: pretrain a transformer on pixels, then probe, sample and complete images with it."""

from igpt.pretrained import Pretrained, load

__version__ = "0.1.0"
__all__ = ["Pretrained", "load"]
