"""What a training step costs, and what a device can do: the two halves of MFU."""

from igpt.model import ModelConfig

# Dense bfloat16 peak of one device in FLOP/s, from the vendors' datasheets. A device that is not here gets no MFU.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def train_flops_per_image(config: ModelConfig, convention: str = "causal") -> float:
    """Multiply-adds count 2; the backward pass costs two forwards.

    A token needs 2 (4 D^2 + 2 D F) L in the blocks' products and 2 D V in the head, attention comes on top.
    """
    D, F, L, T, V = config.width, config.mlp_width, config.depth, config.seq_len, config.vocab_size
    products = T * (2 * (4 * D * D + 2 * D * F) * L + 2 * D * V)
    return 3.0 * (products + attention_flops_per_image(config, convention))


def attention_flops_per_image(config: ModelConfig, convention: str = "causal") -> float:
    """Of one forward pass: scores and mixing each take 2 D of a query and a key.

    By the "causal" convention of the pairs that the network looks at, half of T^2 or, with BERT, all; by the
    "full" one, which many papers use, of all whatever is computed.
    """
    pairs = config.seq_len**2 * (0.5 if config.causal and convention == "causal" else 1.0)
    return 4.0 * config.width * pairs * config.depth
