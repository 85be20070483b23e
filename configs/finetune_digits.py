"""Fine-tunes the network of configs/digits.py to classify scikit-learn's digits into ten classes.

    python train.py --config=configs/finetune_digits.py --config.init_from=runs/digits --workdir=runs/digits-ft

To learn classes only, add --config.objective.generative=0. To train from scratch, omit init_from. If init_from is a run
with the BERT objective, add --config.model.causal=False. For a classifier that the pipelines of transformers serve as
it is, add --config.model.sos=False (docs/huggingface.md).

Cost: five to seven minutes on one CPU core in the study (docs/results/study_digits.json), whose code was slower. Not
measured since.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.model.num_classes = 10
    config.objective.classification = 1.0  # both losses have equal weight (section 2.3)

    config.data.augment_probability = 0.8

    # A constant learning rate, below pretraining's, and an end at the best validation accuracy (section 3.4).
    config.optim.name = "adam"
    config.optim.schedule = "constant"
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 0

    config.train.steps = 1000
    config.train.batch_size = 32
    config.train.eval_every = 50
    config.train.checkpoint_every = 200
    config.train.patience = 10
    config.train.num_samples = 0
    return config
