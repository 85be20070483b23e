"""Linear probes of a model's layers on the data it was trained on.

python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/probe
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 1  # of the untrained baseline; not the training seed, so that its start is another
    config.step = 0  # checkpoint to probe; 0: the newest
    config.source = ""  # of the images, as data.source in configs/base.py; empty: what the model was trained on
    config.batch_size = 60  # images a forward pass
    config.inverse_penalties = (
        0.01,
        0.03,
        0.1,
        0.3,
        1.0,
        3.0,
        10.0,
        30.0,
        100.0,
        300.0,
    )  # C = 1 / L2 penalty; chosen on validation
    config.max_iter = 1000  # of L-BFGS
    return config
