"""Makes docs/speed.md from the figures in benchmarks/results/. A test compares the committed page with what this makes.

python benchmarks/speed_page.py
"""

import argparse
import json
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GIB, MIB = 1 << 30, 1 << 20
UNBROKEN = dict(break_long_words=False, break_on_hyphens=False)

PAGE = """\
# Speed

Everything here was measured on 2 CPU cores in float32, ours and the peer in one run, unless it says
otherwise. {unmeasured} Each file in `benchmarks/results/` holds its figures, its command, the machine and
the versions. The older files name modules that are now sub-commands of `igpt`. `benchmarks/speed_page.py`
makes this page from those files.

## Sampling

{sampling}

## Features

The middle layer of {features_depth} layers, width {features_width}, {features_images} images of 1,024 tokens
(`benchmarks/features.py`, `benchmarks/results/features_cpu.json`): {features_ours:.1f} s, with transformers
{features_peer:.1f} s (medians), {features_ratio:.1f} times as long in the median of alternating runs. The call needs
{features_mib:,.0f} MiB of memory, transformers' {features_peer_mib:,.0f}: it computes the layers above, too, and keeps
all hidden states.

## Start

From Enter to the first step of the quickstart {cold_step:.1f} s, and {warm_step:.1f} s when its programs
were compiled before; to one sample {cold_sample:.1f} and {warm_sample:.1f} s. The whole command takes
{now_seconds:.0f} s from a cold start. An earlier version, without kept programs, huge pages, joined batches and Muon,
took {before_seconds:.0f} s. The validation losses are {now_loss:.3f} and {before_loss:.3f}
(`benchmarks/start.py`, `benchmarks/results/start_cpu.json`; one run each).

## Training

Beside transformers' ImageGPT in PyTorch, with Adam on both sides (`benchmarks/training.py`,
`benchmarks/results/training_cpu.json`). Above 1, ours is faster. All contestants of a case are in memory at once
and take turns:

{training}

Causal attention, forward and backward, with the `chunked` back end takes {attention_time} of the
reference's time. It takes {attention_memory} of its memory. The shapes are those of iGPT-S, M, L and L at
48 x 48 (`benchmarks/attention.py`, `benchmarks/results/attention_cpu.json`).

{cost}

## GPUs

{gpu}

## Data

Measured by `benchmarks/data.py` (`benchmarks/results/data_cpu.json`):

{data}

{loader} Scattering images over canvases takes
{scatter:.2f} % of a step of `configs/scattered_digits.py`, and {scatter_color:.2f} % where clothes are shrunk,
coloured and put on pictures (`configs/scattered_fashion.py`).

## The image processor

1,024 images of 32 x 32 become tokens of 512 colours (`benchmarks/processor.py`,
`benchmarks/results/processor_cpu.json`), in images/s. The peer is transformers' PIL processor.

{processor}

The first call fills the table of colours. Tokens that differ from transformers', where two clusters are almost
equally near: {differing} of {tokens:,}.

## Probes

Fitting five layers of the digits network (1,258 x 128 features) with ten penalties each, choosing and
testing (`benchmarks/probe.py`, `benchmarks/results/probe_cpu.json`), in processor seconds:

{probe}

The README's probe fits eleven such sets. scikit-learn has one thread. With two, which wait for each other, it
took many times as long.

## Import

An L-sized Hugging Face directory ({weights:.2f} GB) is imported in {import_seconds:.0f} s with at most
{import_peak:.1f} GB of memory (`benchmarks/import_memory.py`, `benchmarks/results/import_memory.json`).
"""

SAMPLING = """\
With the KV cache, top-k {top_k} (`benchmarks/sampling.py`, `benchmarks/results/sampling_cpu.json`). The
bound is the time to read all parameters and the filled part of the cache at the bandwidth that the same run
measured:
"""
COST = """\
How a step's processor time and peak memory grow: exponents, fitted to three sizes each around a middle
network of depth 4 and width 256 with 256 tokens and 4 images (`benchmarks/cost.py`,
`benchmarks/results/cost_cpu.json`). The expected ones are fitted to the FLOPs of `igpt/flops.py`, and to the
bytes that XLA plans for the step.

{table}
"""
TRAINING_GPU = """\
Training steps in bfloat16 on one {device}, beside the same network in PyTorch with SDPA under torch.compile, which
takes turns in the same run (`benchmarks/training.py --device=gpu`, `benchmarks/twin.py`). MFU counts the half of
attention that is not masked; GiB are the peak of the device's memory:

{table}
"""
SAMPLERS = ("ours", "transformers")
COMPILED = """\
`bash benchmarks/gpu.sh` runs all of this on an NVIDIA GPU: the tests (`-m gpu`), training, sampling and the loader.
Without a GPU, tests prove this much (`tests/test_cuda.py`):

- The training step of every size lowers for CUDA with cuDNN's attention, forward and backward, and without
  T x T scores, on one device and on `data`, `fsdp` and `tensor` meshes. When XLA splits the step, each
  device gets its own examples and heads.
- XLA compiles the steps for H100s that are not there (`-m gpu_compile`).
"""


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def table(head: list, rows: list) -> str:
    first, *others = ("| " + " | ".join(cells) + " |" for cells in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *others]).replace("|  |", "| |")


def wrapped(text: str) -> str:
    """Breaks the lines of paragraphs and of lists anew, since figures differ in length."""
    blocks = []
    for block in re.split(r"\n\n+", text.strip()):
        items = re.split(r"\n(?=- )", block) if block.startswith("- ") else [block]
        if not block.startswith(("|", "#")):
            items = [" ".join(item.split()) for item in items]
            indent = "  " if block.startswith("- ") else ""
            items = [textwrap.fill(item, 120, subsequent_indent=indent, **UNBROKEN) for item in items]
        blocks.append("\n".join(items))
    return "\n\n".join(blocks) + "\n"


def speed(value: float) -> str:
    """Whole numbers from 100 on, else two digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.2g}".rstrip(".")


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def sampling() -> str:
    results = read("sampling_cpu.json")
    rows = results["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["tokens_per_s"]))
    head = ["model", "images", *(f"{name}, tokens/s" for name in names), "share of the bound"]
    cells = [
        [row["model"], str(row["batch_size"])]
        + [speed(row["tokens_per_s"][name]) if name in row["tokens_per_s"] else "-" for name in names]
        + [share(row["share_of_bound"])]
        for row in rows
    ]
    return f"{SAMPLING.format(**results)}\n{table(head, cells)}"


def training(name: str) -> str:
    peers = ("eager", "torch.compile")
    head = ["case", "seconds a step", "times as fast as eager", "as torch.compile"]
    head += ["peak GiB, ours", "eager", "torch.compile"]
    rows = []
    for row in read(name)["rows"]:
        memory = [f"{row['peak_bytes'][kind] / GIB:.1f}" for kind in ("ours", *peers)]
        ratios = [f"{row['times_as_fast_as'][kind]:.2f}" for kind in peers]
        rows.append([row["case"], f"{row['seconds']['ours']:.2f}", *ratios, *memory])
    return table(head, rows)


def loader(results: dict) -> str:
    """What the loader costs, from the figures of benchmarks/data.py."""
    slower, on = results["training_step"]["slower_by"], results["device"]
    change = f"{100 * abs(slower):.1f} % {'more' if slower > 0 else 'less'} time"
    step = "A training step of the digits network" + ("" if on == "cpu" else f" on {on}")
    return f"{step} takes {change} with the loader than with one batch that stays on the device."


def gpu() -> str:
    """What a GPU measured, if one has, and what was proven without one."""
    parts = []
    if (RESULTS / "training_gpu.json").exists():
        results, rows = read("training_gpu.json"), []
        for row in results["rows"]:
            kinds = list(row["seconds"])
            rows.append([row["case"], str(row["batch_size"]), *(f"{row['seconds'][kind]:.3f}" for kind in kinds)])
            rows[-1] += [f"{ratio:.2f}" for ratio in row["times_as_fast_as"].values()]
            rows[-1] += [share(mfu) if mfu else "-" for mfu in row["mfu_causal"].values()]
            rows[-1].append(share(row["goal_mfu_causal"]))
            rows[-1] += [f"{row['peak_bytes'][kind] / 2**30:.1f}" for kind in kinds]
        head = ["network", "batch", *(f"{kind}, s" for kind in kinds), "times as fast", *(f"MFU, {x}" for x in kinds)]
        head += ["goal", *(f"GiB, {kind}" for kind in kinds)]
        parts.append(TRAINING_GPU.format(device=results["device"], table=table(head, rows)))
    if (RESULTS / "sampling_gpu.json").exists():
        results = read("sampling_gpu.json")
        head = ["size", "images at a time", "ours, images/s", "transformers", "share of the bound", "goal, images/s"]
        rows = []
        for row in results["rows"]:
            speeds = [speed(row["images_per_s"][kind]) if kind in row["images_per_s"] else "-" for kind in SAMPLERS]
            rows.append([row["size"].upper(), str(row["batch_size"]), *speeds, share(row["share_of_bound"])])
            rows[-1].append(str(row["goal_images_per_s"]))
        parts.append(
            f"Sampling in bfloat16 on {results['device']} (`benchmarks/sampling_gpu.py`):\n\n{table(head, rows)}\n"
        )
        if missing := results.get("not_measured"):
            reasons = "; ".join(f"{size.upper()}: {reason}" for size, reason in missing.items())
            parts.append(f"The same run was to measure other sizes ({reasons}).\n")
    if (RESULTS / "data_gpu.json").exists():
        parts.append(f"{loader(read('data_gpu.json'))}\n")
    return "\n".join([*parts, COMPILED]).strip()


def cost() -> str:
    if not (RESULTS / "cost_cpu.json").exists():
        return ""
    pairs = (("processor_seconds", "flops"), ("bytes", "planned_bytes"))
    head = ["with", "time", "expected", "memory", "expected"]
    rows = [
        [name, *(f"{found[key]:.2f}" for pair in pairs for key in pair)]
        for name, found in read("cost_cpu.json")["exponents"].items()
    ]
    return COST.format(table=table(head, rows))


def data(results: dict) -> str:
    jpegs = results["jpegs_500_x_375_per_s_on_one_thread"]
    rates = {
        "prepared tokens into batches of 32 x 32": round(results["prepared_images_per_s_into_batches"], -3),
        "uint8 images into tokens of 512 colours": round(results["images_per_s_quantised"], -3),
        "JPEG files of 500 x 375 on one thread, shrunk": jpegs["shrink"],
        "the same files, cropped as the paper crops ImageNet": jpegs["crop"],
        "the same files, Pillow's decoding alone": jpegs["pillow_decoding_alone"],
    }
    return table(["step", "images/s"], [[name, f"{rate:,.0f}"] for name, rate in rates.items()])


def processor(rows: list) -> str:
    photo, noise = (next(row for row in rows if row["images"] == kind) for kind in ("photo", "noise"))  # one array each
    head = ["images", "ours", "transformers, all in one call", "transformers, 64 at a time"]
    cells = [
        [name, f"{round(row['ours'], -3):,.0f}", f"{row['transformers']:.0f}", f"{row['transformers_in_batches']:.0f}"]
        for name, row in (
            ("pieces of photographs", photo["images_per_s"]),
            ("noise, the worst case", noise["images_per_s"]),
        )
    ]
    first = photo["first_call_images_per_s"]
    cells.append(["pieces of photographs, the first call", f"{first['ours']:,.0f}", f"{first['transformers']:.0f}", ""])
    return table(head, cells)


def page() -> str:
    starts, quickstart = (read("start_cpu.json")[name] for name in ("starts", "quickstart"))
    chunked = [row for row in read("attention_cpu.json")["rows"] if row["backend"] == "chunked" and row["chunk"] == 256]
    rows, imported = read("processor_cpu.json")["rows"], read("import_memory.json")
    results, solvers = read("data_cpu.json"), read("probe_cpu.json")["quickstart"]["processor_seconds"]
    compared, features = [row for row in rows if "tokens" in row], read("features_cpu.json")
    scattering = list(results["scattering"].values())
    unmeasured = "a GPU or a TPU" if not (RESULTS / "training_gpu.json").exists() else "a TPU"

    def span(name: str) -> str:
        values = [row[name] for row in chunked]
        return f"{min(values):.2f} to {max(values):.2f}"

    filled = PAGE.format(
        unmeasured=f"**Nothing has been measured on {unmeasured} yet.**",
        sampling=sampling(),
        features_depth=features["shape"]["depth"],
        features_width=features["shape"]["width"],
        features_images=features["shape"]["batch_size"],
        features_ours=features["median_s"]["ours"],
        features_peer=features["median_s"]["transformers"],
        features_ratio=features["times_ours"]["transformers"],
        features_mib=features["memory_bytes"]["ours"]["of_the_call"] / MIB,
        features_peer_mib=features["memory_bytes"]["transformers"]["of_the_call"] / MIB,
        cold_step=starts["cold"]["first_step"],
        warm_step=starts["warm"]["first_step"],
        cold_sample=starts["cold"]["sample"],
        warm_sample=starts["warm"]["sample"],
        now_seconds=quickstart["now"][0]["seconds"],
        now_loss=quickstart["now"][0]["validation_loss"],
        before_seconds=quickstart["before"][0]["seconds"],
        before_loss=quickstart["before"][0]["validation_loss"],
        training=training("training_cpu.json"),
        attention_time=span("time_ratio"),
        attention_memory=span("memory_ratio"),
        cost=cost(),
        gpu=gpu(),
        data=data(results),
        loader=loader(results),
        scatter=100 * scattering[0]["share_of_a_step"],
        scatter_color=100 * scattering[1]["share_of_a_step"],
        processor=processor(rows),
        tokens=sum(row["tokens"] for row in compared),
        differing=sum(row["tokens_that_differ"] for row in compared),
        probe=table(
            ['ours (`solver="auto"`)', "scikit-learn", "scikit-learn, newton-cg with warm starts"],
            [[f"{solvers[name]:.2f}" for name in ("ours", "scikit_learn", "scikit_learn_newton_cg")]],
        ),
        weights=imported["weights_bytes"] / 1e9,
        import_seconds=imported["seconds"],
        import_peak=imported["peak_bytes"] / 1e9,
    )
    return wrapped(filled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=ROOT / "docs" / "speed.md", type=Path, help="default: docs/speed.md")
    parser.parse_args().out.write_text(page())


if __name__ == "__main__":
    main()
