"""scikit-learn's digits at random places of a 12 x 12 canvas: what features are worth where pixels have no fixed place.

    python train.py --config=configs/scattered_digits.py --workdir=runs/scattered
    python eval_probe.py --config=configs/probe.py --model=runs/scattered --workdir=runs/scattered/probe \\
        --config.train_images=4000

Cost: 2:52 minutes on 2 idle CPU cores, and 54 s for the probe (benchmarks/results/scattered_digits_cpu.json). Expect
about 80 % for the best layer's linear probe, and 32 % for raw pixels (docs/results/study_scattered_digits.json).
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.data.source = "scattered:digits"
    config.data.image_size = (12, 12)
    config.data.scatter_copies = 20
    config.data.pad = 0  # the places are augmentation enough
    config.data.augment_probability = 1.0

    config.optim.name = "adam"
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 150

    config.train.steps = 1000
    config.train.eval_every = 250
    config.train.sample_every = 500
    config.train.checkpoint_every = 250
    return config
