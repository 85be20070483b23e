"""Hugging Face's documented ImageGPT classes, on JAX: change the import, keep the rest."""

__all__ = [
    "AutoImageProcessor",
    "ImageGPTConfig",
    "ImageGPTFeatureExtractor",
    "ImageGPTForCausalImageModeling",
    "ImageGPTForImageClassification",
    "ImageGPTImageProcessor",
    "ImageGPTModel",
    "ModelOutput",
]


def __getattr__(name):
    """The classes, when they are first asked for: importing them takes seconds."""
    if name in __all__:
        from igpt.api import models

        return getattr(models, name)
    raise AttributeError(f"module 'igpt.api' has no attribute {name!r}")
