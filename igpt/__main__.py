"""Everything that needs no config file to train: a sub-command each.

    igpt sample --model=runs/digits --num=16 --out=samples.png
    igpt SUBCOMMAND --help

Training is `python train.py`, linear probes are `python eval_probe.py`.
"""

import difflib
import importlib
import sys

from igpt import __version__
from igpt.command import Parser
from igpt.errors import UserError, reported

COMMANDS = {  # name -> its module, and its line in the help
    "sample": ("igpt.sample", "sample images from a model, or complete given ones"),
    "evaluate": ("igpt.evaluate", "the loss and accuracy of a model on any data"),
    "palette": ("igpt.data.palette_fit", "fit a palette of colours to a source of images"),
    "prepare": ("igpt.data.prepare", "turn a source of images into tokens on disk, once and for all"),
    "export": ("igpt.interop.export", "write a model as a Hugging Face directory"),
    "import": ("igpt.interop.import_run", "make a run directory of a Hugging Face model or of OpenAI's checkpoint"),
    "plan": ("igpt.plan.report", "what a training run would need on TPUs that are not here"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs one sub-command. A user's mistake ends in one message and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else "--help"
    with reported():
        if name in ("-h", "--help"):
            lines = [f"  {command:<10}{text}" for command, (_, text) in COMMANDS.items()]
            print(__doc__.strip() + "\n\nsub-commands:\n" + "\n".join(lines))
        elif name == "--version":
            print(f"igpt {__version__}")
        elif name in COMMANDS:
            module = importlib.import_module(COMMANDS[name][0])  # the others' imports would take seconds
            parser = Parser(f"igpt {name}", module.__doc__)
            module.add_arguments(parser)
            if name == "plan":
                from igpt.run.flags import parse_with_config

                module.run(parse_with_config(parser, argv[1:]))
            else:
                module.run(parser.parse_args(argv[1:]))
        else:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
            raise UserError(f"igpt has no sub-command {name!r}; {hint}")


if __name__ == "__main__":
    main()
