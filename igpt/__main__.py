"""Image GPT: sample, complete, classify, evaluate and convert models, and prepare images for them.

    igpt sample --model=runs/digits --num=16 --out=samples.png
    igpt SUB-COMMAND --help

To train a model, run `python train.py --help`; to probe its features, `python eval_probe.py --help`.
"""

import difflib
import importlib
import sys

from igpt import __version__
from igpt.command import Parser
from igpt.errors import UserError, reported

COMMANDS = {  # sub-command -> (module, one line of help)
    "sample": ("igpt.sample", "sample images from a model, or complete given images"),
    "evaluate": ("igpt.evaluate", "measure the loss and the accuracy of a model on a data set"),
    "predict": ("igpt.predict", "name the classes of image files"),
    "demo": ("igpt.page.demo", "serve a page in the browser to play with a model"),
    "palette": ("igpt.data.palette_fit", "fit a palette of colours to a source of images"),
    "prepare": ("igpt.data.prepare", "encode a source of images as tokens on disk, for fast training"),
    "export": ("igpt.interop.export", "write a model as a Hugging Face directory"),
    "import": ("igpt.interop.import_run", "make a run directory from a Hugging Face model or OpenAI's checkpoint"),
    "plan": ("igpt.plan.report", "predict memory, communication and time of a training run on TPUs"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs one sub-command. For a user's mistake, it prints one message and exits with code 2."""
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    with reported():
        if name in ("-h", "--help"):
            lines = [f"  {command:<10}{text}" for command, (_, text) in COMMANDS.items()]
            print(__doc__.strip() + "\n\nsub-commands:\n" + "\n".join(lines))
        elif name == "--version":
            print(f"igpt {__version__}")
        elif name in COMMANDS:
            module = importlib.import_module(COMMANDS[name][0])  # imports only one sub-command: imports take seconds
            parser = Parser(f"igpt {name}", module.__doc__)
            module.add_arguments(parser)
            if name == "plan":
                from igpt.run.flags import parse_with_config

                args = parse_with_config(parser, flags)
            else:
                args = parser.parse_args(flags)
            from igpt.compiler import keep_programs  # imports JAX, which a page of help does not need

            keep_programs(args.compilation_cache)
            module.run(args)
        else:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
            raise UserError(f"igpt has no sub-command {name!r}; {hint}")


if __name__ == "__main__":
    main()
