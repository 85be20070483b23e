"""Compiled programs are kept between starts, and XLA's options fit the platform."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt import compiler
from igpt.config import Config
from igpt.errors import UserError
from igpt.sharding import make_mesh, to_devices
from igpt.state import build_program

START = """
import jax
from igpt.compiler import keep_programs, kept_programs
keep_programs({folder!r})
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
jax.jit(lambda x: x * 3 + 1)(1.0)
print(kept_programs(), found.count("/jax/compilation_cache/cache_hits"))
"""


def start(tmp_path, folder=None, **variables):
    """Starts a process that compiles one function. Returns where it keeps programs, and how many it found there."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_ENABLE", "XLA"))}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)} | variables
    command = [sys.executable, "-c", START.format(folder=folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, hits = done.stdout.strip().rsplit(" ", 1)
    return where, int(hits)


def test_the_next_start_finds_the_compiled_programs(tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    assert first[0] == second[0] and first[0].startswith(f"{tmp_path}/cache/igpt/")
    assert first[1] == 0 and second[1] > 0


def test_programs_can_be_kept_elsewhere_or_nowhere(tmp_path):
    assert start(tmp_path, str(tmp_path / "mine"))[0] == str(tmp_path / "mine")
    assert start(tmp_path, "off")[0] == "not kept"
    assert not (tmp_path / "cache").exists()


SHARE = """
from pathlib import Path
from igpt.compiler import keep_programs, kept_programs, share_programs
keep_programs({folder!r})
share_programs(Path({shared!r}))
print(kept_programs())
"""


def test_hosts_of_a_run_share_a_folder_unless_one_was_named(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_ENABLE")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    kept = []
    for folder in (None, str(tmp_path / "mine"), "off"):
        code = SHARE.format(folder=folder, shared=str(tmp_path / "shared"))
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        kept.append(done.stdout.strip())
    assert kept[0].startswith(f"{tmp_path}/shared/") and kept[1:] == [str(tmp_path / "mine"), "not kept"]


def test_the_variable_of_jax_comes_first(tmp_path):
    assert start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"))[0] == str(tmp_path / "jax")


def test_without_a_place_for_them_programs_are_not_kept(tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder is needed")
    assert start(tmp_path)[0] == "not kept"


def test_a_user_without_a_home_keeps_no_programs(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compiler.Path, "home", homeless)
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("nothing is to be kept"))
    monkeypatch.setattr(type(jax.config), "jax_enable_compilation_cache", True, raising=False)
    compiler.keep_programs()
    compiler.share_programs(compiler.Path("shared"))


def test_a_named_place_that_cannot_be_made_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        with pytest.raises(UserError, match="cannot be made"):
            compiler.keep_programs(str(tmp_path / "file" / "below"))
    finally:
        jax.config.update("jax_enable_compilation_cache", False)


def test_a_program_whose_file_was_cut_off_is_compiled_again(tmp_path):
    start(tmp_path)
    for file in (tmp_path / "cache").rglob("*-cache"):
        file.write_bytes(file.read_bytes()[:50])
    assert start(tmp_path)[1] == 0


def test_options_that_this_xla_lacks_are_left_out(monkeypatch):
    assert compiler.step_options("cpu") == compiler.FOR_STEPS["cpu"]
    assert compiler.token_options("cpu") == compiler.FOR_TOKENS["cpu"]
    monkeypatch.setitem(compiler.FOR_STEPS, "cpu", {"xla_cpu_no_such_option": True})
    assert compiler.step_options("cpu") is None
    assert compiler.step_options("tpu") is None


def test_a_compilation_that_runs_out_of_memory_drops_no_options(monkeypatch):
    def refuse(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.setitem(compiler.FOR_STEPS, "cpu", {"xla_cpu_use_onednn": False})  # nobody has asked for it before
    assert compiler.step_options("cpu") == {"xla_cpu_use_onednn": False}


FREED = """
import ctypes
from igpt.compiler import give_back_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
parts = [libc.malloc(100_000) for _ in range(2_000)]
for part in parts:
    ctypes.memset(part, 1, 100_000)
for part in parts[:-1]:  # the last part is in the way of what glibc gives back by itself
    libc.free(part)
def mebibytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20
before = mebibytes()
give_back_memory()
print(before - mebibytes())
"""


def test_memory_that_was_freed_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=60)
    assert int(done.stdout) > 150, done.stderr


@pytest.mark.parametrize("data", [1, 8])
def test_a_step_that_was_compiled_ahead_is_not_compiled_at_its_first_call(tiny_config, data):
    mesh = make_mesh(data=data, devices=jax.devices()[:data])
    program = build_program(Config.of(tiny_config, trains=True), mesh)
    tokens = np.random.default_rng(0).integers(0, 17, (8, 64)).astype(np.int32)
    batch = to_devices({"tokens": tokens}, 8, mesh)
    examples = to_devices({"tokens": tokens, "mask": np.ones(8, np.float32)}, 8, mesh)
    program.compile_ahead(batch, examples)()
    state = jax.block_until_ready(program.create_state(0))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    with jax.set_mesh(mesh):
        program.eval_step(state.params, examples)
        program.train_step(state, batch)
        assert "/jax/core/compile/backend_compile_duration" not in compiled
        jax.jit(lambda x: x - 0.125)(jnp.ones(3))
    assert "/jax/core/compile/backend_compile_duration" in compiled  # the event's name is still this one


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_step_on_a_cpu_writes_new_moments_in_place_of_the_old(tiny_config, optimizer):
    tiny_config.optim.name = optimizer
    mesh = make_mesh(devices=jax.devices()[:1])
    program = build_program(Config.of(tiny_config, trains=True), mesh)
    batch = to_devices({"tokens": np.zeros((8, 64), np.int32)}, 8, mesh)
    with jax.set_mesh(mesh):
        text = program.train_step.lower(program.abstract, batch).compile().as_text()
    model = program.model
    kernel = rf"f32\[{model.depth},{model.width},{model.mlp_width}\]"
    assert re.search(rf"{kernel}\S* parameter\(", text)
    assert not re.search(rf"{kernel}\S* copy\(%state", text)  # Muon copies what it makes of them
