"""The peer on GPUs: our network written in PyTorch, with scaled_dot_product_attention, bfloat16 and torch.compile.

transformers' ImageGPT has neither that attention nor our norm, so a comparison with it would say little about GPUs.
"""

import torch
from torch import nn
from torch.nn import functional as F

from igpt.model import ModelConfig


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.gain, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.gain, self.epsilon)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, hidden = config.width, config.mlp_width
        self.heads = config.num_heads
        self.attention_norm, self.mlp_norm = Norm(D, config.norm_epsilon), Norm(D, config.norm_epsilon)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, hidden, bias=False), nn.Linear(hidden, D, bias=False)
        stds = (self.qkv, D**-0.5), (self.out, (D * config.depth) ** -0.5), (self.up, 0.02), (self.down, 0.02)
        for layer, std in stds:
            nn.init.normal_(layer.weight, 0.0, std)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.qkv(self.attention_norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        hidden = self.up(self.mlp_norm(x))
        return x + self.down(hidden * torch.sigmoid(1.702 * hidden))


class Twin(nn.Module):
    """Logits [B, T, V] of inputs [B, T], SOS included, as igpt.model.ImageGPT computes them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, V = config.width, config.vocab_size
        self.tokens, self.positions = nn.Embedding(V + 1, D), nn.Embedding(config.seq_len, D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm, self.head = Norm(D, config.norm_epsilon), nn.Linear(D, V, bias=False)
        nn.init.normal_(self.tokens.weight, 0.0, 0.02)
        nn.init.normal_(self.positions.weight, 0.0, 0.01)
        nn.init.zeros_(self.head.weight)

    def forward(self, inputs):
        x = self.tokens(inputs) + self.positions.weight[None, : inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))
