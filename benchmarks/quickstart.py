"""Runs the README's quickstart and records training time, losses, probe accuracies and pictures.

python benchmarks/quickstart.py --workdir=runs/quickstart --out=docs/results
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from report import write

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/

from configs import digits
from igpt.data.sources import open_source
from igpt.interop.load import load
from igpt.loss import marginal_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a new run directory")
    parser.add_argument("--out", required=True, help="the folder for digits.json and its pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    commands = (
        f"train.py --config=configs/digits.py --workdir={args.workdir} --config.seed={args.seed}",
        f"eval_probe.py --config=configs/probe_digits.py --model={args.workdir} --workdir={args.workdir}/probe",
        f"-m igpt sample --model={args.workdir} --num=36 --out={out}/digits_samples.png",
        f"-m igpt sample --model={args.workdir} --complete=test --keep=0.5 --num=7 --out={out}/digits_completions.png",
    )
    seconds = {}
    for command in commands:
        start = time.perf_counter()
        subprocess.run([sys.executable, *shlex.split(command)], check=True)
        seconds[f"python {command}"] = time.perf_counter() - start

    workdir = Path(args.workdir)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    probe = json.loads((workdir / "probe" / "probe.json").read_text())
    (out / "digits_probe.png").write_bytes((workdir / "probe" / "probe.png").read_bytes())
    palette, source = load(workdir).tokenizer, open_source(digits.get_config().data)
    training = palette.encode(source.train.images).reshape(len(source.train), -1)
    write(
        str(out / "digits.json"),
        {
            "seconds_with_start": seconds,
            "first_loss": records[0]["train/loss"],
            "marginal_entropy": marginal_entropy(training, palette.vocab_size),
            "evaluations": [record for record in records if "eval/loss" in record],
            "probe": probe,
        },
    )


if __name__ == "__main__":
    main()
