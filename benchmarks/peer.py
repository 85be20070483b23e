"""The peer that benchmarks compare with: Hugging Face's ImageGPT in PyTorch, as large as one of our networks."""

import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from igpt.model import ModelConfig


def transformers_model(config: ModelConfig) -> ImageGPTForCausalImageModeling:
    """A model of the same widths and depth, without dropout. It also has biases: less than 1 % of the arithmetic."""
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
