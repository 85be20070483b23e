"""Linear probe: how well the frozen features of each layer of a model separate classes.

    python eval_probe.py --config=configs/probe.py --model=runs/photos --workdir=runs/photos/probe
    python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/few \\
        --config.labels_per_class="(4,25)"
    python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/probes \\
        --config.steps=all

Prints accuracy by layer, and two baselines that are fitted in the same way: the raw pixels, and an untrained
network of the same shape. Writes probe.json, probe.png and metrics.jsonl to --workdir. configs/probe.py explains every
field. With several processes, start this command in each of them. While it runs, every process keeps the features of
all images in a folder of its own in --workdir.
"""

from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from igpt.command import Parser, add_shared
from igpt.compiler import keep_programs
from igpt.errors import reported
from igpt.files import check_holds_no_run, check_workdir
from igpt.interop.hub import resolve
from igpt.interop.load import load, outline
from igpt.plots import check_drawing
from igpt.probe.config import ProbeConfig
from igpt.probe.features import scratch_folder, untrained, write_features
from igpt.probe.fit import SPLITS, Probe, layers_around, solver_settings
from igpt.probe.report import (
    check_features_out,
    metrics_of_layers,
    record_results,
    table,
    validation_loss,
    write_results,
)
from igpt.probe.selection import chosen_layers, chosen_steps, probed_images
from igpt.run import cluster
from igpt.run.directory import locked
from igpt.run.flags import parse_with_config
from igpt.sharding import check_batch_size, shardings
from igpt.track.trackers import Trackers


def run(config: ConfigDict | ProbeConfig, ref: str | Path, workdir: str | Path) -> dict:
    """Probes layers of the model `ref`; returns the results, which it also writes to workdir/probe.json.

    Raises UserError for wrong settings before anything is computed, and later for unreadable images or a full disk.
    """
    # Check the settings, the files and the devices.
    config, workdir = ProbeConfig.of(config), check_workdir(workdir)
    check_holds_no_run(workdir)
    check_features_out(config.features_out, workdir)
    check_drawing()
    mesh = config.mesh.make()
    check_batch_size("batch_size", config.batch_size, 1, mesh)
    if config.solver == "sgd":
        check_batch_size("sgd.batch_size", config.sgd.batch_size, 1, mesh)
    if config.pool.startswith("attention"):
        check_batch_size("attention.batch_size", config.attention.batch_size, 1, mesh)

    # Find the model and open the images.
    directory = resolve(ref)
    shapes = outline(directory)
    shardings(nnx.to_pure_dict(nnx.state(shapes.model)), mesh)  # raises if the mesh cannot split the parameters
    steps, layers = chosen_steps(config.steps, directory), chosen_layers(config.layers, shapes.model.config.depth)
    source = probed_images(config, shapes, ref)

    trackers = Trackers(workdir, config.track, "probe", cluster.is_first_process())
    with locked(workdir), scratch_folder(workdir) as folder, trackers:
        # Compute features and fit them: first the baselines, then every checkpoint. The last gives the main results.
        probe, checkpoints = Probe(config, source, layers, mesh, Path(folder)), []
        results = {"model": str(ref), "step": None, "source": source.name, "class_names": source.class_names}
        if config.baselines:
            pixels = probe.pixels()
            if cluster.is_first_process():  # many classes and large images take minutes
                count = pixels[0].joined([0]).shape[-1]
                print(f"fits     raw pixels ({count:,} numbers an image), an untrained network, the model", flush=True)
            results["raw_pixels"] = probe.fit(pixels, [0]) | probe.vote(pixels, 0)
            results["random_init"] = probe.fit_layers(probe.features(untrained(shapes, config.seed, mesh)), "untrained")
        for step in steps:
            pretrained = load(directory, step, mesh)
            features = probe.features(pretrained)
            fitted = probe.fit_layers(features, f"step {pretrained.step}")
            checkpoints.append({"step": pretrained.step} | validation_loss(directory, pretrained.step) | fitted)
        results |= {"step": pretrained.step, "pretrained": fitted}
        results |= {"checkpoints": checkpoints} if len(steps) > 1 else {}
        results["images"] = {name: len(part.labels) for name, part in zip(SPLITS, features, strict=True)}
        results |= {"solver": solver_settings(config), "metrics": metrics_of_layers(fitted)}
        write_results(results, workdir)  # so that they are kept if a later fit fails

        # Fit the concatenated features of several layers, and subsets with few labels.
        best = fitted["best_layer"]
        if config.concatenate:
            around = layers_around(best, config.concatenate, layers)
            results["concatenated"] = {"layers": around} | probe.fit(features, around)
        if config.labels_per_class:
            results["few_labels"] = {"layer": best, "features": probe.fit_few(features, best)}
            if config.baselines:
                results["few_labels"]["raw_pixels"] = probe.fit_few(pixels, 0)

        # Write the files. Features are written last: if they fill the disk, the results are already there.
        write_results(results, workdir)
        if cluster.is_first_process():
            if source.unreadable:  # only images that this process read are listed
                print(f"passed over {len(source.unreadable)} unreadable images, such as: {source.unreadable[0]}")
            record_results(results, workdir, trackers, {"model": str(ref)} | config.flat())
            if config.features_out:
                write_features(dict(zip(SPLITS, features, strict=True)), Path(config.features_out))
    return results


def parser() -> Parser:
    """The flags of this script, except --config."""
    parser = Parser("eval_probe.py", __doc__)
    add_shared(parser, "model")
    parser.add_argument("--workdir", required=True, help="the folder for probe.json and probe.png")
    cluster.add_process_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    with reported():
        args = parse_with_config(parser(), argv)
        config = ProbeConfig.of(args.config)
        keep_programs(args.compilation_cache)
        cluster.join_from(args, config.mesh.cpu_devices)
        results = run(config, args.model, args.workdir)
        if cluster.is_first_process():
            print(f"{table(results)}\nwrote {args.workdir}/probe.json and {args.workdir}/probe.png")


if __name__ == "__main__":
    main()
