"""Fine-tunes a model of any published size on ImageNet, as the paper does, after next-pixel or BERT pretraining.

    python train.py --config=configs/finetune_imagenet.py:l --config.init_from=runs/imagenet-l --workdir=runs/classify-l
    python train.py --config=configs/finetune_imagenet.py:l:bert --config.init_from=runs/imagenet-l-bert ...

It changes configs/imagenet.py:SIZE[:bert] as follows: a thousand classes, the joint loss, a tenth of the learning rate,
constant, and an end at the best validation accuracy (Chen et al. 2020, section 3.4). The paper reports 66.3 % for l,
72.6 % for l48 and 66.5 % for l:bert.

Cost: with all 20 epochs, a fifth of configs/imagenet.py: 12 EFLOP for s, 206 for l. Not run here.
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config(argument: str = "s") -> ConfigDict:
    config = imagenet.get_config(argument)
    config.model.num_classes = 1000
    config.objective.classification = 1.0
    config.optim.learning_rate /= 10
    config.optim.schedule = "constant"
    config.optim.warmup_steps = 0

    config.train.steps = 20 * imagenet.TRAIN_IMAGES // config.train.batch_size  # at most 20 epochs
    config.train.eval_every = imagenet.TRAIN_IMAGES // config.train.batch_size  # once an epoch
    config.train.checkpoint_every = config.train.eval_every // 2
    config.train.patience = 2
    config.train.num_samples = 0
    return config
