import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from igpt.activations import ACTIVATIONS
from igpt.interop.hf_config import LEARNED, SAME_ACTIVATION


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_every_activation_of_transformers_has_its_values_or_is_refused(name):
    if name in LEARNED:
        return
    x = np.linspace(-15, 15, 601, dtype=np.float32)
    ours = ACTIVATIONS[SAME_ACTIVATION.get(name, name)](x)
    np.testing.assert_allclose(ours, ACT2FN[name](torch.tensor(x)), rtol=1e-5, atol=1e-6)
