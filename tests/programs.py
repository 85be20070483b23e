"""Equal programs are built and compiled once in a process of tests. Whatever a test patches makes another program."""

import hashlib

PROGRAMS = 12  # of configurations, the last ones used
EXECUTABLES = 500


def share_compiled():
    """Makes XLA compile equal programs once. They are equal if their text, their options and their devices are.

    JAX's cache of files would write and load each program, which takes as long as to compile a tiny one. Without the
    function of JAX that is replaced here, the tests take longer.
    """
    from jax._src import compiler

    real, kept = getattr(compiler, "backend_compile_and_load", None), {}
    if real is None:
        return

    def compile_once(backend, module, executable_devices, options, host_callbacks):
        def make():
            return real(backend, module, executable_devices, options, host_callbacks)

        if host_callbacks:  # functions of Python, which the text does not tell apart
            return make()
        text = hashlib.sha256(module.operation.get_asm(enable_debug_info=False).encode()).digest()
        devices = tuple(device.id for device in executable_devices)
        return remembered(kept, EXECUTABLES, (id(backend), options.SerializeAsString(), devices, text), make)

    compiler.backend_compile_and_load = compile_once


def share_built():
    """Makes train.run build and trace equal configurations on equal meshes once."""
    import train
    from igpt import attention, chunked, fused, loss, model, optim, state

    modules = attention, chunked, fused, loss, model, optim, state
    real, kept = train.build_program, {}

    def build_once(config, mesh):
        parts = [value for module in modules for value in vars(module).values()]  # kept, so that no id is used again
        key = config, mesh, tuple(map(id, parts))
        return remembered(kept, PROGRAMS, key, lambda: (real(config, mesh), parts))[0]

    train.build_program = build_once


def remembered(kept, most, key, make):
    """kept[key], made unless it is there. Only the `most` entries that were used last stay."""
    value = kept.pop(key, None)
    if value is None:
        value = make()
    kept[key] = value
    while len(kept) > most:
        kept.pop(next(iter(kept)), None)
    return value
