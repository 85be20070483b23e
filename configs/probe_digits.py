"""Linear probes of configs/digits.py: the defaults of configs/probe.py are made for a set of this size.

python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/probe
"""

from ml_collections import ConfigDict

from configs import probe


def get_config() -> ConfigDict:
    return probe.get_config()
