"""Fine-tunes a model pretrained on ImageNet at 32 x 32 on CIFAR-10, CIFAR-100 or STL-10, as the paper does.

    python train.py --config=configs/finetune_cifar10.py:l --config.init_from=runs/imagenet-l --workdir=runs/cifar10-l
    python train.py --config=configs/finetune_cifar10.py:s:cifar100 --config.init_from=runs/igpt-s ...

The protocol (Chen et al. 2020, sections 3.1 and 3.4): the joint loss, batch size and Adam as in pretraining, a constant
learning rate, an end at the best validation accuracy, 4 pixels of reflection padding, and flips. The learning rate is a
tenth of pretraining's, as it "usually" was in the paper. The limit of steps is our choice. The paper reports for L:
CIFAR-10 99.0 %, CIFAR-100 88.5 %.

Cost: with all steps, 1.2 EFLOP for s and 21 for l (6 x parameters x tokens, without attention). That is 50 minutes and
15 hours of one H100 at 40 % of its bfloat16 peak. Not run here.
"""

from ml_collections import ConfigDict

from configs import cifar10, imagenet
from igpt.errors import UserError

CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10}


def get_config(argument: str = "s") -> ConfigDict:
    size, _, dataset = argument.partition(":")
    dataset = dataset or "cifar10"
    if size not in ("s", "m", "l") or dataset not in CLASSES:
        raise UserError(
            f"configs/finetune_cifar10.py:{argument}: choose s, m or l, which read 32 x 32, alone or with one of "
            + ", ".join(f":{name}" for name in CLASSES)
        )
    config = imagenet.get_config(size)
    config.data = cifar10.get_config().data
    config.data.source = f"tfds:{dataset}"
    config.data.preprocess = "shrink" if dataset == "stl10" else "none"
    config.data.augment_probability = 1.0

    config.model.num_classes = CLASSES[dataset]
    config.objective.classification = 1.0
    config.optim.learning_rate = imagenet.LEARNING_RATE[size] / 10
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 0

    config.train.steps = 20_000  # 57 epochs of 45,000
    config.train.eval_every = 352  # once an epoch
    config.train.checkpoint_every = 704
    config.train.patience = 10
    config.train.num_samples = 0
    return config
