"""What a block stores for its backward pass, and what it computes again there."""

import jax

from igpt.chunked import ATTENTION_OUTPUT

_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_NAMED = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT)


def _attention(primitive, *inputs, **params):
    is_cudnn = primitive.name == "dot_product_attention_fwd_wrapper"  # cuDNN's kernel gives its outputs no name
    return is_cudnn or _NAMED(primitive, *inputs, **params)


def _products_and_attention(primitive, *inputs, **params):
    return _PRODUCTS(primitive, *inputs, **params) or _attention(primitive, *inputs, **params)


REMAT = {  # the results that each block stores for the backward pass, which computes all other results again
    "none": None,  # all results, except the mlp's activation
    "minimal": _products_and_attention,  # outputs of products with parameters and of attention; no elementwise results
    "dots": _PRODUCTS,  # outputs of products with parameters; nothing of attention
    "attention": _attention,  # the block's input and the outputs of attention
    "full": jax.checkpoint_policies.nothing_saveable,  # only the block's input
}
