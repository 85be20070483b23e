"""The peer of the benchmarks: Hugging Face's ImageGPT in PyTorch, in the size of one of our networks."""

import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from igpt.model import ModelConfig


def transformers_model(config: ModelConfig) -> ImageGPTForCausalImageModeling:
    """The same widths and depth, no dropout. It has biases, which ours has not: under 1 % of the arithmetic."""
    torch.manual_seed(0)
    peer = ImageGPTConfig(
        vocab_size=config.vocab_size + 1,
        n_positions=config.seq_len,
        n_embd=config.width,
        n_layer=config.depth,
        n_head=config.num_heads,
        n_inner=config.mlp_width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return ImageGPTForCausalImageModeling(peer)
