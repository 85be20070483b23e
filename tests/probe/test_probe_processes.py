"""Two real processes that share a mesh probe, sample and evaluate with the same results as one process."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np

import eval_probe
from igpt import sample
from igpt.__main__ import main as run_igpt
from igpt.sharding import MeshConfig, make_mesh
from tests.helpers import ROOT, grey_pictures, probe_config, write_run

WORKER = """
import runpy, sys
from igpt.__main__ import main as run_igpt
from igpt.data.examples import Split
images, read = [], Split.read
Split.read = lambda split, indices, *draws: images.extend(indices) or read(split, indices, *draws)
model, out, *sys.argv[1:] = sys.argv[1:]
runpy.run_path("eval_probe.py", run_name="__main__")
joined = [flag for flag in sys.argv if not flag.startswith(("--coordinator", "--process", "--config.features_out"))]
sys.argv = [*joined, "--config.solver=newton", f"--workdir={out}/newton"]
runpy.run_path("eval_probe.py", run_name="__main__")
shared = ["--fsdp=2", "--tensor=2", f"--model={model}"]
run_igpt(["sample", *shared, "--num=3", f"--out={out}/samples.png"])
run_igpt(["evaluate", *shared, "--batch_size=13", f"--json={out}/figures.json"])
print(f"{len(images)} images read", flush=True)
"""
SETTINGS = dict(baselines=False, layers=(1,), labels_per_class=(2,), subsets=1)
OPTIONS = [
    *("--config.layers=(1,)", "--config.labels_per_class=(2,)", "--config.subsets=1", "--config.baselines=False"),
    *("--config.batch_size=40", "--config.solver=sgd", "--config.sgd.steps=64", "--config.sgd.batch_size=32"),
    *(
        "--config.sgd.learning_rates=(0.1,0.03)",
        "--config.sgd.weight_decay=0.1",
        "--config.inverse_penalties=(0.01,0.1)",
    ),
    *("--config.mesh.cpu_devices=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
]


def test_two_processes_agree_with_one_and_only_the_first_writes(monkeypatch, tmp_path):
    images, labels = grey_pictures()
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    run = write_run(tmp_path / "run", f"npz:{tmp_path}/images.npz", steps=(2,), depth=1)
    together, alone = tmp_path / "together", tmp_path / "alone"
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--config=configs/probe_digits.py", f"--model={run}", f"--workdir={together}", *OPTIONS]
    flags += [f"--config.features_out={together}/features.npz", f"--coordinator=localhost:{port}", "--processes=2"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(run), str(together), *flags, f"--process={i}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for i in range(2)
    ]

    # Meanwhile, this process probes on four devices of its own, and samples on one.
    devices, make = jax.devices()[:4], MeshConfig.make
    monkeypatch.setattr(MeshConfig, "make", lambda mesh: make(mesh, devices))
    config = probe_config(**SETTINGS, features_out=str(alone / "features.npz"))
    config.mesh.update(fsdp=2, tensor=2)
    eval_probe.run(config, run, alone)
    by_newton = probe_config(**SETTINGS, solver="newton")
    by_newton.mesh.update(fsdp=2, tensor=2)
    eval_probe.run(by_newton, run, alone / "newton")
    monkeypatch.setattr(sample, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    run_igpt(["sample", f"--model={run}", "--num=3", f"--out={alone}/samples.png"])
    run_igpt(["evaluate", f"--model={run}", f"--json={alone}/figures.json"])

    printed = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    for text in ("labels a class", "samples.png", "bits_per_dim"):
        assert text in printed[0] and text not in printed[1]
    # Each process reads half of every batch, padding included. Each of two probes has 105, 15 and 30 images in
    # batches of 40, the evaluation has 30 in batches of 14.
    assert all(f"{2 * 5 * 20 + 3 * 7} images read" in text for text in printed)
    # An event file of TensorBoard is named after its second.
    one, two = ({path.name.split(".tfevents")[0] for path in folder.iterdir()} for folder in (together, alone))
    assert one == two
    results, expected = (json.loads((folder / "probe.json").read_text()) for folder in (together, alone))
    assert results == expected
    results, expected = (json.loads((folder / "newton" / "probe.json").read_text()) for folder in (together, alone))
    assert results == expected and results["pretrained"]["layers"][0]["solver"] == "newton"
    with np.load(together / "features.npz") as ours, np.load(alone / "features.npz") as theirs:
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)
    assert (together / "samples.png").read_bytes() == (alone / "samples.png").read_bytes()
    figures, expected = (json.loads((folder / "figures.json").read_text()) for folder in (together, alone))
    assert figures["images"] == expected["images"] == 30
    np.testing.assert_allclose(figures["loss"], expected["loss"], rtol=1e-6)
