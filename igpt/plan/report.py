"""What a run would cost on machines that are not here: the real train step, compiled by the TPU compiler on this CPU.

    pip install -e ".[tpu]"
    igpt plan --config=configs/imagenet.py:xl --config.train.batch_size=128 --topology=v5p:4x4x8
    igpt plan --config=configs/imagenet.py:l --topology=v5e:8x8 --search
    igpt plan --config=configs/imagenet.py:s --topology=gpu:8 --json=plan.json

Memory, collectives and kernels are those of the compiled program. Step time and MFU are estimates: the compiler's own
cycles, and what it has none for: the attention kernels, their FLOPs at an assumed share of the peak, and collectives,
their bytes over the links of one dimension of a closed torus, as if nothing were computed meanwhile. Small slices are
not closed, where collectives take up to twice as long, and what crosses from slice to slice is counted, but not
estimated. For GPUs there is no compiler here: parameters, FLOPs and bytes of the state only.
"""

import json
from pathlib import Path

import jax

from igpt.command import Parser
from igpt.errors import UserError
from igpt.files import write_text
from igpt.plan.compiled import GIB, MOST, plan
from igpt.plan.search import search_plans


def table(results: dict) -> str:
    """A plan for the terminal."""
    flops, size = results["flops_per_step"], results["bytes_per_chip"]
    slices = f" in {results['slices']} slices" if results["slices"] > 1 else ""
    rows = [
        ("topology", f"{results['topology']}, {results['chips']} chips{slices}"),
        ("mesh", " x ".join(f"{name} {size}" for name, size in results["mesh"].items())),
        ("batch", f"{results['batch_size']} images in {results['accumulate']} micro-batch(es)"),
        ("compute", f"{results['dtype']}, attention {results['attention']}, remat {results['remat']}"),
        ("parameters", f"{results['parameters']:,}"),
        ("FLOPs a step", f"{flops['causal']:.4g} (attention by the causal convention), {flops['full']:.4g} (full)"),
        *((f"bytes a chip: {name.replace('_', ' ')}", f"{value / GIB:.2f} GiB") for name, value in size.items()),
    ]
    if "fits" in results:
        verdict = "fits" if results["fits"] else f"DOES NOT FIT (at most {MOST:.0%} is wanted)"
        rows.append(("memory", f"{results['peak_share']:.0%} of a chip: {verdict}"))
        if "largest_buffer" in results:
            rows.append(("largest buffer", results["largest_buffer"]))
    for kind, entry in results.get("collectives", {}).items():
        rows.append((kind, f"{entry['count']} a step, {entry['bytes'] / 1e6:,.1f} MB a chip"))
    for kind, entry in results.get("between_slices", {}).items():
        text = f"{entry['count']} a step, {entry['bytes'] / 1e6:,.1f} MB a chip, NOT IN THE ESTIMATE"
        rows.append((f"between slices: {kind}", text))
    if "kernels" in results:
        rows.append(("flash kernel", "yes" if results["kernels"] else "NO: plain products take its place"))
        rows += [("kernel", f"{name}, {count} a step") for name, count in results["kernels"].items()]
    if results.get("uncounted_loops"):
        rows.append(("loops of unknown length", f"{results['uncounted_loops']}, counted as if they ran once"))
    if "libtpu_init_args" in results:
        rows.append(("compiled with LIBTPU_INIT_ARGS", results["libtpu_init_args"]))
    if "float32_products_in_blocks" in results:
        count = results["float32_products_in_blocks"]
        rows.append(("float32 products inside the blocks", "not counted: no loop" if count is None else f"{count}"))
    if estimate := results.get("estimate"):
        rows += [
            ("step, estimated", f"{estimate['step_seconds']:.3f} s, {estimate['images_per_second']:,.0f} images/s"),
            *((f"of which {name.replace('_', ' ')}", f"{part:.3f} s") for name, part in estimate["of_which"].items()),
            ("MFU, estimated", f"{estimate['mfu_causal']:.1%} of the bfloat16 peak (causal convention)"),
            ("run, estimated", f"{estimate['days']:.1f} days, {estimate['chip_hours']:,.0f} chip-hours"),
        ]
    return "\n".join(f"{name:<40}{value}" for name, value in rows)


def write(results: dict, path: str) -> None:
    """Writes the figures, whole or not at all."""
    try:
        write_text(Path(path), json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error.strerror}; name another file") from None


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--topology",
        required=True,
        help="v4, v5e, v5p or v6e with the chips of each dimension, such as v5e:8x8; or gpu:8",
    )
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument(
        "--search", action="store_true", help="try meshes, remat policies and micro-batches; print the best that fits"
    )


def run(args) -> None:
    """Plans, or searches, as the command line says."""
    jax.config.update("jax_platforms", "cpu")  # a TPU that happens to be here is not what is asked about
    if args.search:
        tried = search_plans(args.config, args.topology)
        results = tried.found[0] if tried.found else tried.nearest
        print("\nthe best of them:" if tried.found else "\nnone fits: take more chips, or a smaller train.batch_size")
    else:
        results = plan(args.config, args.topology)
    print(table(results))
    if args.json:
        write(results, args.json)
