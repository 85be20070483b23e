"""CIFAR-100, 32 x 32: the same as configs/cifar10.py, with a hundred classes.

    python train.py --config=configs/cifar100.py --workdir=runs/cifar100

Cost: the same as configs/cifar10.py. Not run here. For comparison, the paper's iGPT-L, pretrained on ImageNet: linear
probe 82.8 %, fine-tuned 88.5 % (Chen et al. 2020, tables 1 and 3). The labels are the hundred fine classes.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    config = cifar10.get_config()
    config.data.source = "tfds:cifar100"
    return config
