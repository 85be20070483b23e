"""FLOPs of a training step, and the peak FLOP/s of devices. Model FLOPs utilisation (MFU) needs both."""

from igpt.model import ModelConfig

# Peak FLOP/s of one device for dense bfloat16 products, from the vendors' datasheets. Other devices report no MFU.
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
    """FLOPs of forward and backward pass: a multiply-add counts 2, and the backward pass costs two forward passes.

    For each token, the matrix products of the blocks cost 2 (4 D^2 + 2 D F) L and the head 2 D V. Attention is added.
    """
    D, F, L, T, V = config.width, config.mlp_width, config.depth, config.seq_len, config.vocab_size
    products = T * (2 * (4 * D * D + 2 * D * F) * L + 2 * D * V)
    return 3.0 * (products + attention_flops_per_image(config, convention))


def attention_flops_per_image(config: ModelConfig, convention: str = "causal") -> float:
    """FLOPs of attention in one forward pass: in each layer, 4 D for each pair of a query and a key.

    Of these, 2 D compute the score and 2 D multiply it with the value. The "causal" convention counts the pairs that
    the model uses: T^2 / 2 if causal, T^2 for BERT. The "full" convention of many papers always counts T^2.
    """
    pairs = config.seq_len**2 * (0.5 if config.causal and convention == "causal" else 1.0)
    return 4.0 * config.width * pairs * config.depth
