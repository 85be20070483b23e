import jax
import jax.numpy as jnp

import train
from igpt import loss
from igpt.config import Config
from tests.programs import remembered


def test_equal_functions_share_an_executable_and_others_do_not():
    def executable(factor):
        return jax.jit(lambda x: factor * jnp.sin(x)).lower(jnp.ones(3)).compile().runtime_executable()

    assert executable(2.0) is executable(2.0) is not executable(3.0)


def test_a_program_is_built_again_for_another_config_and_for_a_patch(tiny_config, monkeypatch):
    def built():
        config = Config.of(tiny_config, trains=True)
        return train.build_program(config, config.mesh.make())

    program = built()
    assert built() is program
    monkeypatch.setattr(loss, "next_pixel", lambda *_: 0.0)
    assert built() is not program
    monkeypatch.undo()
    assert built() is program
    tiny_config.optim.learning_rate = 0.5
    assert built() is not program


def test_only_what_was_used_last_is_kept():
    kept = {}
    found = [remembered(kept, 2, key, lambda key=key: key.upper()) for key in "abacab"]
    assert found == list("ABACAB") and list(kept) == ["a", "b"]
