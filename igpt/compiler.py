"""How XLA compiles: options for each platform, and compiled programs that are kept between starts."""

import ctypes
import functools
import hashlib
import os
import sys
from pathlib import Path

import jax

from igpt.errors import UserError
from igpt.files import cache_directory

OFF = "off"
MAX_BYTES = 1 << 30  # of all kept programs; the ones that were not used for the longest time are removed

# On CPUs, XLA gives sums and elementwise functions to a library, too, and writes arrays to memory for it. With products
# alone, a training step takes 20 % less processor time (docs/decisions.md).
_PRODUCTS_ALONE = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
# The order of operations that saves memory is as fast as the usual one; it takes a quarter off the peak of iGPT-S.
# On GPUs, XLA would join the products of keys and values, and copy each result out of the joined one.
FOR_STEPS = {
    "cpu": _PRODUCTS_ALONE | {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0},
}
FOR_TOKENS = {"cpu": _PRODUCTS_ALONE}
# For a function that runs once, LLVM's optimisation takes longer than it saves.
FOR_ONE_RUN = {"cpu": {"xla_backend_optimization_level": 0}}


def step_options(platform: str) -> dict | None:
    """The compiler's options for a function that runs thousands of times, without those that this XLA lacks."""
    return _known(FOR_STEPS.get(platform))


def token_options(platform: str) -> dict | None:
    """The compiler's options for a function that draws one token after the other."""
    return _known(FOR_TOKENS.get(platform))


def _known(options: dict | None) -> dict | None:
    return options if options and _are_known(tuple(options.items())) else None


@functools.cache
def _are_known(options: tuple[tuple[str, str | bool | int], ...]) -> bool:
    try:
        jax.jit(lambda: None, compiler_options=dict(options)).lower().compile()
    except jax.errors.JaxRuntimeError as error:  # they are experimental, and another XLA may lack them
        return "INVALID_ARGUMENT" not in str(error)  # a compilation that failed for memory says nothing of them
    return True


def one_run_options(platform: str) -> dict | None:
    """The compiler's options for a function that runs once."""
    return FOR_ONE_RUN.get(platform)


def give_back_memory() -> None:
    """Gives the memory that compiling took back to the system. glibc would keep it: 240 MiB for a step of width 512."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def keep_programs(folder: str | None = None) -> None:
    """Keeps compiled programs on disk, so that the next start need not compile them again.

    `folder` is a directory; None: a folder of this kind of processor in the user's cache directory; "off": nowhere. The
    variables of JAX, such as JAX_COMPILATION_CACHE_DIR, come first. Several processes may share the folder. Raises
    UserError if `folder` cannot be made.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    try:
        path = Path(folder) if folder else _usual_folder()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder:
            raise UserError(
                f"--compilation_cache={folder} cannot be made: {error.strerror}; name a writable folder, or off"
            ) from None
        return  # a home that is read-only, or missing, is no mistake; each start then compiles
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def share_programs(folder: Path) -> None:
    """Keeps programs in a folder that all hosts of a run see, unless another than the user's cache was named.

    Process 0 alone writes there.
    """
    try:
        usual = str(_usual_folder())
    except OSError:  # this user has none, and keeps no programs
        return
    if kept_programs() == usual:
        jax.config.update("jax_compilation_cache_dir", str(folder / _processor()))
        jax.config.update("jax_compilation_cache_max_size", -1)  # a limit needs file locks, which a network may lack


def kept_programs() -> str:
    """The folder that keeps compiled programs, or "not kept"."""
    config = jax.config
    return (config.jax_enable_compilation_cache and config.jax_compilation_cache_dir) or "not kept"


def _usual_folder() -> Path:
    return cache_directory() / "igpt" / _processor()


def _processor() -> str:
    """A name of this processor's instruction set: programs compiled for one may not run on another."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return os.uname().machine
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return f"{os.uname().machine}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
