"""Fine-tuning on ImageNet by the paper's protocol, of any published size, next pixels or BERT.

    python train.py --config=configs/finetune_imagenet.py:l --config.init_from=runs/imagenet-l --workdir=runs/classify-l
    python train.py --config=configs/finetune_imagenet.py:l:bert --config.init_from=runs/imagenet-l-bert ...

As configs/imagenet.py:SIZE[:bert], with a thousand classes, the joint loss, a tenth of the learning rate, no schedule,
an end at the best validation accuracy (Chen et al. 2020, section 3.4). The paper: l 66.3 %, l48 72.6 %, l:bert 66.5 %.

Cost: a fifth of configs/imagenet.py's, if all 20 epochs are taken: 12 EFLOP for s, 206 for l. Not run here.
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
