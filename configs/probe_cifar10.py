"""Linear probes on CIFAR-10, CIFAR-100 or STL-10, as in the paper, for a model that was pretrained on other images.

    python eval_probe.py --config=configs/probe_cifar10.py --model=runs/imagenet-l --workdir=runs/imagenet-l/cifar10
    python eval_probe.py --config=configs/probe_cifar10.py:stl10 --model=runs/imagenet-l --workdir=runs/imagenet-l/stl10

L-BFGS fits the pooled features of each layer, or Newton's method where few labels are used. A tenth of the training
images is held out to choose layer and penalty (Chen et al. 2020, section 3.1, which does not state the penalties).
STL-10 is shrunk from 96 x 96 to the model's size. CIFAR is used unchanged, so the model must read 32 x 32.
"""

from ml_collections import ConfigDict

from configs import probe
from igpt.errors import UserError


def get_config(dataset: str = "cifar10") -> ConfigDict:
    if dataset not in ("cifar10", "cifar100", "stl10"):
        raise UserError(f"configs/probe_cifar10.py:{dataset}: choose cifar10, cifar100 or stl10")
    config = probe.get_config()
    config.source = f"tfds:{dataset}"
    config.preprocess = "shrink" if dataset == "stl10" else "none"
    config.validation_fraction = 0.1
    config.batch_size = 128
    config.baselines = False  # raw pixels and an untrained iGPT-L would take an hour each
    config.inverse_penalties = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    return config
