"""Hugging Face's documented ImageGPT classes on JAX: change the import and keep the rest of your code."""

__all__ = [
    "AutoImageProcessor",
    "GenerationConfig",
    "ImageGPTConfig",
    "ImageGPTFeatureExtractor",
    "ImageGPTForCausalImageModeling",
    "ImageGPTForImageClassification",
    "ImageGPTImageProcessor",
    "ImageGPTImageProcessorFast",
    "ImageGPTImageProcessorPil",
    "ImageGPTModel",
    "ImageGPTPreTrainedModel",
    "ModelOutput",
]


def __getattr__(name):
    """Imports the classes at their first use, because the import takes seconds."""
    if name in __all__:
        from igpt.api import models

        return getattr(models, name)
    raise AttributeError(f"module 'igpt.api' has no attribute {name!r}")
