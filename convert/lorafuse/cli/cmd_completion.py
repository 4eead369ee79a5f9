"""`lorafuse completion`: click's own completion of both commands."""

import click

from lorafuse.cli.cmd_convert import convert
from lorafuse.cli.options import CONTEXT
from lorafuse.cli.streams import tell

SHELLS = ("bash", "zsh", "fish")


@click.command(context_settings=CONTEXT)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, *, shell: str) -> None:
    """Print the completion of `lorafuse` and `lorafuse-convert` for a shell.

    \b
    Examples:
      lorafuse completion bash >> ~/.bashrc
      lorafuse completion zsh >> ~/.zshrc
      lorafuse completion fish > ~/.config/fish/completions/lorafuse.fish
    """
    from click.shell_completion import get_completion_class  # which a merge does without

    made_by = get_completion_class(shell)
    assert made_by is not None and ctx.parent is not None  # click has all SHELLS
    for command, name in ((ctx.parent.command, "lorafuse"), (convert, "lorafuse-convert")):
        variable = f"_{name}_COMPLETE".replace("-", "_").upper()
        tell(made_by(command, {}, name, variable).source())
