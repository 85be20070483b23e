"""A VQ-VAE of Fashion-MNIST: 28 x 28 grey pixels become 7 x 7 codes of 512.

    python train.py --config=configs/vqvae_fashion_mnist.py --workdir=runs/fashion-vqvae
    igpt prepare --source=npz:fashion_mnist.npz --size=28 --channels=1 --preprocess=none \\
        --validation_fraction=0.07142857142857142 --test_fraction=0.14285714285714285 \\
        --tokenizer=runs/fashion-vqvae --out=fashion-codes
    python train.py --config=configs/fashion_mnist_codes.py --workdir=runs/fashion-codes

configs/fashion_mnist.py says how to make fashion_mnist.npz. docs/vqvae.md has the results.

Cost: five minutes on one CPU core, evaluations and pictures included, and as much for the model of its codes.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.program = "vqvae"
    config.data.source = "npz:fashion_mnist.npz"
    config.data.image_size = (28, 28)
    config.data.validation_fraction = 1 / 14  # 5,000 images
    config.data.test_fraction = 1 / 7  # 10,000 images
    config.data.flip = True

    config.vqvae.codes = 512
    config.vqvae.stride = 4  # 7 x 7 codes

    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 100
    config.optim.b2 = 0.99

    config.train.steps = 2000
    config.train.batch_size = 64
    config.train.eval_every = 500
    config.train.eval_batch_size = 200
    config.train.sample_every = 500
    config.train.num_samples = 16
    config.train.checkpoint_every = 250
    return config
