"""Shows what a run would need on machines that are not attached: compiles its training step for TPUs on this CPU.

    pip install -e ".[tpu]"
    igpt plan --config=configs/imagenet.py:xl --config.train.batch_size=128 --topology=v5p:4x4x8
    igpt plan --config=configs/imagenet.py:l --topology=v5e:8x8 --search
    igpt plan --config=configs/imagenet.py:s --topology=gpu:8 --json=plan.json

Memory, collectives and kernels are read from the compiled program. Step time and MFU are estimated twice: from the
compiler's own cycles, and for each operation from its slowest limit, which is its instructions, its matrix products or
its memory traffic. Attention kernels and collectives are added to both, without overlap. Collectives pass the links of
one dimension of a closed torus. Small slices are no closed torus: there, collectives may take twice as long. Transfers
between slices are counted, but not estimated. Plans for GPUs contain only parameters, FLOPs and bytes of the state,
because there is no compiler for GPUs here.
"""

import jax

from igpt.command import Parser, add_shared
from igpt.files import check_writable, write_json, written
from igpt.plan.compiled import GIB, USABLE_SHARE, compile_plan
from igpt.plan.search import search_plans


def format_table(plan: dict) -> str:
    """A plan as a table for the terminal."""
    flops, slices = plan["flops_per_step"], f" in {plan['slices']} slices" if plan["slices"] > 1 else ""
    rows = [
        ("topology", f"{plan['topology']}, {plan['chips']} chips{slices}"),
        ("mesh", " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())),
        ("batch", f"{plan['batch_size']} images in {plan['accumulate']} micro-batch(es)"),
        ("compute", f"{plan['dtype']}, attention {plan['attention']}, remat {plan['remat']}"),
        ("parameters", f"{plan['parameters']:,}"),
        ("FLOPs a step", f"{flops['causal']:.4g} (attention by the causal convention), {flops['full']:.4g} (full)"),
    ]
    for name, size in plan["bytes_per_chip"].items():
        rows.append((f"bytes a chip: {name.replace('_', ' ')}", f"{size / GIB:.2f} GiB"))
    if "fits" in plan:
        verdict = "fits" if plan["fits"] else f"DOES NOT FIT (a plan may use at most {USABLE_SHARE:.0%})"
        rows.append(("memory", f"{plan['peak_share']:.0%} of a chip: {verdict}"))
    if "largest_buffer" in plan:
        rows.append(("largest buffer", plan["largest_buffer"]))
    for kind, moved in plan.get("collectives", {}).items():
        rows.append((kind, f"{moved['count']} a step, {moved['bytes'] / 1e6:,.1f} MB a chip"))
    for kind, moved in plan.get("between_slices", {}).items():
        text = f"{moved['count']} a step, {moved['bytes'] / 1e6:,.1f} MB a chip, NOT IN THE ESTIMATE"
        rows.append((f"between slices: {kind}", text))
    if "kernels" in plan:
        rows.append(("attention kernel", "yes" if plan["kernels"] else "NO: attention uses plain products instead"))
        rows += [("kernel", f"{name}, {count} a step") for name, count in plan["kernels"].items()]
    if plan.get("uncounted_loops"):
        rows.append(("loops of unknown length", f"{plan['uncounted_loops']}, counted as if each ran once"))
    if "fits" in plan:
        wide = plan["float32_products_in_blocks"]
        rows.append(("compiled with LIBTPU_INIT_ARGS", plan["libtpu_init_args"]))
        rows.append(("float32 products inside the blocks", "not counted: no loop" if wide is None else f"{wide}"))
    for name, basis in (("estimate", "by the compiler's cycles"), ("second_estimate", "by each operation's limit")):
        if estimate := plan.get(name):
            rows += _estimate_rows(estimate, basis)
    return "\n".join(f"{name:<40}{text}" for name, text in rows)


def _estimate_rows(estimate: dict, basis: str) -> list[tuple[str, str]]:
    speed = f"{estimate['step_seconds']:.3f} s, {estimate['images_per_second']:,.0f} images/s"
    return [
        (f"step, {basis}", speed),
        *((f"    {name.replace('_', ' ')}", f"{part:.3f} s") for name, part in estimate["of_which"].items()),
        ("    MFU", f"{estimate['mfu_causal']:.1%} of the bfloat16 peak (causal convention)"),
        ("    run", f"{estimate['days']:.1f} days, {estimate['chip_hours']:,.0f} chip-hours"),
    ]


def add_arguments(parser: Parser) -> None:
    topology = "one slice of v4, v5e, v5p or v6e, such as v5e:8x8; or the number of all GPUs, such as gpu:8"
    parser.add_argument("--topology", required=True, help=topology)
    add_shared(parser, "json")
    parser.add_argument("--search", action="store_true", help="try meshes, remat and micro-batches; print the best")


def run(args) -> None:
    """Prints one plan, or with --search the best plan, and writes it to --json, complete or not at all."""
    jax.config.update("jax_platforms", "cpu")  # a TPU attached to this machine must not be used
    if args.json:
        check_writable(args.json, "--json")
    if args.search:
        result = search_plans(args.config, args.topology)
        plan = result.found[0] if result.found else result.nearest
        print("\nthe best of them:" if result.found else "\nnone fits: take more chips, or a smaller train.batch_size")
    else:
        plan = compile_plan(args.config, args.topology)
    print(format_table(plan))
    if args.json:
        with written(f"--json={args.json}"):
            write_json(args.json, plan)
