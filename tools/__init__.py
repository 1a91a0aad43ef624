"""Commands for data, planning and looking, `python -m tools.NAME`. `command` turns a function's parameters into options.

data            annotation files, separated by commas: FILE, or FILE@IMAGES
images          folder or zip of the images of every FILE without @IMAGES
exclude         files that name COCO images to skip, separated by commas
kind            how coordinates are written
location        what a location is
side            side of the model's square image
geometry        how an image becomes that square
batch           images at a time
seed            of the draw
vision          folder of the CLIP tower, for an original LLaVA that lacks it
max_new_tokens  longest answer, in tokens
out             file or folder to write
"""

import argparse
import inspect
import re
import typing

from formats.files import run_command

HELP = re.compile(r"^(\w+)(?:, (\w+))? {2,}(\S.*)$", re.MULTILINE)  # a docstring's line about an option: name, alias, help


def positive(text):
    """Read an option that must be a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def command(module, *functions):
    """Return main(argv), which calls a function with its parameters from the command line; several are sub-commands.

    A parameter before / is positional, and so are *parameters. An option is required without a default, and a flag with the
    default False. Its type is the annotation (Literal: choices), else that of the default; its help a line "name  help" or
    "name, alias  help" in a docstring, of its module or above.
    """
    names, raw = functions[0].__globals__, {"formatter_class": argparse.RawDescriptionHelpFormatter}
    lines = {name: (alias, line) for name, alias, line in HELP.findall(f"{__doc__}\n{names['__doc__']}")}

    def main(argv=None):
        parser = argparse.ArgumentParser(description=HELP.sub("", names["__doc__"]), **raw)
        commands = parser.add_subparsers(dest="command", required=True) if len(functions) > 1 else None
        for function in functions:
            target = commands.add_parser(function.__name__, description=inspect.getdoc(function), **raw) if commands else parser
            target.set_defaults(function=function)
            for name, parameter in inspect.signature(function).parameters.items():
                add_option(target, name, parameter, *lines[name])
        options = vars(parser.parse_args(argv))
        bound = inspect.BoundArguments(inspect.signature(options["function"]), options)  # splits positional from named ones
        return options["function"](*bound.args, **bound.kwargs)

    if module == "__main__":
        run_command(names["__spec__"].name, main)
    return main


def add_option(parser, name, parameter, alias, line):
    is_required, kind = parameter.default is parameter.empty, parameter.annotation
    default = None if is_required else parameter.default
    if kind is parameter.empty:
        kind = str if default is None else type(default)
    how = {"choices": typing.get_args(kind)} if typing.get_origin(kind) is typing.Literal else {"type": kind}
    line, flags = line.replace("%", "%%"), ["--" + flag.replace("_", "-") for flag in (name, alias) if flag]
    if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
        parser.add_argument(name, help=line, nargs="+" if parameter.kind is parameter.VAR_POSITIONAL else None, **how)
    elif default is False:
        parser.add_argument(*flags, action="store_true", help=line)
    else:
        line += f" (default: {default})" if default else ""
        parser.add_argument(*flags, required=is_required, default=default, help=line, **how)
