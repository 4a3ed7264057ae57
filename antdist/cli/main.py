"""Entry point of the command line: the verbs by stage, and errors as one line with an exit code."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

import click

from antdist.cli import config, data, jobs, registry, runs, use
from antdist.errors import Preempted, UserError
from antdist.io.logs import setup_logging
from antdist.version import __version__

EXIT_USER_ERROR = 2
# the user resolves these outside antdist: permissions, a full or read-only disk
ENVIRONMENT_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
STAGES: dict[str, list[click.Command]] = {
    "Data": [data.prepare, data.featurize, data.verify, data.synth],
    "Training": [config.config, runs.validate, runs.plan, runs.pretrain, runs.relearn],
    "Clusters": [jobs.submit, jobs.fanout, jobs.jobs, jobs.logs, jobs.stop, jobs.resume],
    "Models": [registry.models, registry.promote, use.evaluate, use.recommend, use.score, use.import_reference],
}


class StagedGroup(click.Group):
    """A group whose help lists the verbs by stage, each with its complete first sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for stage, commands in STAGES.items():
            with formatter.section(stage):
                formatter.write_dl(
                    [(command.name or "", command.get_short_help_str(limit=1000)) for command in commands]
                )


@click.group(cls=StagedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="antdist")
def cli() -> None:
    """Pre-train a multi-modal recommender on many domains, adapt it to each target, and measure whether that helped.

    \b
    The usual way:
      antdist prepare SRC --domain books --out data        (for each domain)
      antdist featurize data/books data/music ...
      antdist pretrain 'data.domains=[books, music]'
      antdist relearn target=food strategy=auto from=models:/pretrain@champion
      antdist recommend models:/relearn-food@champion data/food --user U42

    \b
    Completion of verbs and options in the shell, by a line in its start-up file:
      ~/.bashrc                   eval "$(_ANTDIST_COMPLETE=bash_source antdist)"
      ~/.zshrc                    eval "$(_ANTDIST_COMPLETE=zsh_source antdist)"
      ~/.config/fish/config.fish  _ANTDIST_COMPLETE=fish_source antdist | source
    """


for _command in (command for commands in STAGES.values() for command in commands):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run a verb; print a user-facing error as one line on standard error and exit with 2, never a traceback."""
    setup_logging()
    try:
        cli(prog_name="antdist", standalone_mode=False)
    except UserError as error:
        _exit_with_error(str(error))
    except OSError as error:
        if error.errno not in ENVIRONMENT_ERRORS:
            raise
        _exit_with_error(f"{error.filename or 'file system'}: {error.strerror}.")
    except Preempted as preempted:
        click.echo(preempted, err=True)
        sys.exit(Preempted.EXIT_CODE)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(0)


def _exit_with_error(message: str) -> NoReturn:
    click.secho("error: ", fg="red", err=True, nl=False)
    click.echo(message, err=True)
    sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
