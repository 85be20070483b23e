"""Eight CPU devices for every test, and runs small enough for seconds."""

import os
import shutil
import sys
import threading
import urllib.request
from importlib.metadata import version

if "gpu" not in sys.argv:  # python -m pytest -m gpu
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests compile much and compute little. Without LLVM's optimisation they take less than half the time. Without MLIR's
# emitters of fused code and in one piece, a training step then compiles in a fifth of the time (docs/decisions.md).
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if "tpu_compile" not in sys.argv:  # libtpu, like XLA, aborts at a flag that it does not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # tests leave the user's cache alone

import jax
import numpy as np
import pytest

from igpt.files import as_path
from tests import gcs_server, programs

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")  # every broadcast between ranks is written out


@pytest.fixture(scope="session", autouse=True)
def equal_programs_are_shared():
    programs.share_compiled()
    programs.share_built()


@pytest.fixture
def tiny_config():
    """The digits config, small enough for seconds. Sizes are prime where nothing has to divide them."""
    from configs import digits

    config = digits.get_config()
    config.model.update(width=20, depth=3, num_heads=2, mlp_width=28, remat="none", scan_layers="yes")
    config.optim.update(name="adam", learning_rate=3e-3, warmup_steps=2)
    config.train.update(
        steps=6, batch_size=8, log_every=1, eval_every=3, eval_batch_size=40, sample_every=6, num_samples=3
    )
    config.train.checkpoint_every = 3
    config.mesh.cpu_devices = 0
    return config


@pytest.fixture(scope="session")
def run_of_six_steps(tmp_path_factory):
    """A run that tests copy: see finished_run."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def finished_run(run_of_six_steps, tiny_config, tmp_path):
    """A run of tiny_config, without samples and with the checkpoints 3 and 6, that the test may change."""
    import train

    tiny_config.train.num_samples = 0
    if not run_of_six_steps.exists():
        train.run(tiny_config, run_of_six_steps)
    return shutil.copytree(run_of_six_steps, tmp_path / "run")


@pytest.fixture
def write_npz(tmp_path):
    """write_npz(images=..., labels=...) writes a .npz with those arrays and returns its path."""

    def write(**arrays):
        path = tmp_path / "images.npz"
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture(scope="session")
def named_run(tmp_path_factory):
    """(a run with a random classifier of three named classes, its images [N, 4, 5], their labels)."""
    from igpt.data.classes import save_names
    from igpt.run import checkpoint
    from igpt.run.directory import load_config
    from tests.helpers import grey_pictures, random_params, write_run

    images, labels = grey_pictures()
    folder, names = tmp_path_factory.mktemp("named"), ("dark", "medium", "light")
    np.savez(folder / "images.npz", images=images, labels=labels, names=names)
    run = write_run(folder / "run", f"npz:{folder}/images.npz", steps=(), num_classes=3)
    checkpoint.save_params(run, random_params(load_config(run).network()), step=2)
    save_names(names, run)
    return run, images, labels


@pytest.fixture
def write_openai(tmp_path):
    """write_openai(trX=...) writes a small data set in OpenAI's files; returns its PREFIX. None leaves a file out."""

    def write(clusters=None, **arrays):
        rng = np.random.default_rng(0)
        if clusters is None:
            clusters = rng.uniform(-1, 1, (17, 3)).astype(np.float32)
        for split, count in (("tr", 43), ("va", 11), ("te", 7)):
            arrays.setdefault(f"{split}X", rng.integers(0, len(clusters), (count, 25), np.uint16))
            arrays.setdefault(f"{split}Y", np.eye(3, dtype=np.float32)[rng.integers(0, 3, count)])
        np.save(tmp_path / "kmeans_centers.npy", clusters)
        for suffix, array in arrays.items():
            if array is not None:
                np.save(tmp_path / f"small_{suffix}.npy", array)
        return f"{tmp_path}/small"

    return write


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub with its own cache and a token that may write: (its state, variables for a process)."""
    from huggingface_hub import constants

    from tests.hub_server import TOKEN, served

    with served() as (state, address):
        variables = {
            "HF_ENDPOINT": address,
            "HF_TOKEN": TOKEN,
            "HF_HOME": f"{tmp_path}/home",
            "HF_HUB_DISABLE_XET": "1",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = "{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{template}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{tmp_path}/home/hub")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield state, variables


@pytest.fixture(scope="session")
def gs():
    """The address of an empty bucket on loopback, on our stand-in for Google's server."""
    server = gcs_server.Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        yield "gs://bucket"
    server.shutdown()


@pytest.fixture(scope="session")
def s3():
    """The address of an empty bucket on loopback, on moto's server in place of Amazon's."""
    from moto.server import ThreadedMotoServer  # slow to import, and needed only here

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["gs", "s3"])
def bucket_url(request):
    """The address of a bucket of each kind."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def bucket(bucket_url, request):
    """A new, empty folder in a bucket."""
    return as_path(f"{bucket_url}/{request.node.name}-{os.getpid()}")
