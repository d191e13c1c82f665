"""What mkdocs.yml needs beside the pages: the reference, from the code."""

import contextlib
import io
import re

import griffe
from mkdocs.structure.files import File

from speechbrain_ram.cli.main import main
from speechbrain_ram.cli.verify_options import parse


def on_files(files, config):
    """A page for each module that the navigation names, and the commands."""
    for path in re.findall(r"reference/[\w.]+\.md", str(config.nav)):
        module = path[len("reference/") : -len(".md")]
        text = f"# {module}\n\n::: speechbrain_ram.{module}\n"
        if module == "commands":
            text = "# The commands\n" + "".join(_commands())
        files.append(File.generated(config, path, content=text))
    return files


def _commands():
    """What --help prints, of the program and of each of its commands."""
    program = main.make_context("speechbrain-ram", [], resilient_parsing=True)
    helps = {"speechbrain-ram": main.get_help(program)}
    for name, command in sorted(main.commands.items()):
        context = command.make_context(
            name, [], parent=program, resilient_parsing=True
        )
        helps[context.command_path] = command.get_help(context)
    name = "speechbrain-ram verify"  # has a parser of its own
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse(["--help"], name)
    helps[name] = printed.getvalue()
    for name, text in helps.items():
        yield f"\n## {name}\n\n```text\n{text.strip()}\n```\n"


class Docstrings(griffe.Extension):
    """SpeechBrain's heads of sections, Sphinx's roles and tables, as griffe
    and Markdown know them.
    """

    REPLACED = {
        r"^Arguments\n-+$": "Parameters\n----------",
        r"^Example\n-+$": "Examples\n--------",
        r":(?:class|data|func|meth|mod):`~?([^`]*)`": r"`\1`",
        r"^=+ [ =]+\n(?:.*\n)*?=+ [ =]+$": lambda table: re.sub(
            "^", "    ", table[0], flags=re.M
        ),
    }

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = obj.docstring.value
            for ours, known in self.REPLACED.items():
                text = re.sub(ours, known, text, flags=re.M)
            obj.docstring.value = text
