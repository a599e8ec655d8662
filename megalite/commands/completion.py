"""Print a shell's completion script for commands, their subcommands, and files.

bash: add `eval "$(megalite completion bash)"` to ~/.bashrc.
zsh:  add `eval "$(megalite completion zsh)"` to ~/.zshrc, after compinit.
fish: megalite completion fish > ~/.config/fish/completions/megalite.fish
"""

from megalite.commands.table import COMMANDS
from megalite.ranks.arguments import ArgumentParser, RawHelpFormatter

SHELLS = ("bash", "zsh", "fish")
SUBCOMMANDS = {"config": "explain schema", "completion": " ".join(SHELLS)}

_BASH = """_megalite() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} words=""
    if ((COMP_CWORD == 1)); then
        words="{names} --help --version"
    elif ((COMP_CWORD == 2)); then
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _megalite megalite
"""
_BASH_CASE = '        {name}) words="{words}" ;;'
_ZSH = """_megalite() {{
    if ((CURRENT == 2)); then
        local -a commands=(
{rows}
        )
        _describe command commands
        return
    fi
    if ((CURRENT == 3)); then
        case $words[2] in
{cases}
        esac
    fi
    _files
}}
compdef _megalite megalite
"""
_FISH_COMMAND = "complete -c megalite -n __fish_use_subcommand -f -a {name} -d {phrase}\n"
_FISH_WORDS = "complete -c megalite -n '__fish_seen_subcommand_from {name}' -f -a '{words}'\n"


def bash() -> str:
    """The script for bash, which completes file names after the commands."""
    names = " ".join(command.name for command in COMMANDS)
    cases = [_BASH_CASE.format(name=name, words=words) for name, words in SUBCOMMANDS.items()]
    return _BASH.format(names=names, cases="\n".join(cases))


def zsh() -> str:
    """The script for zsh, with a description of each command."""
    rows = [f'            "{command.name}:{command.phrase}"' for command in COMMANDS]
    cases = [f"        {name}) compadd {words}; return ;;" for name, words in SUBCOMMANDS.items()]
    return _ZSH.format(rows="\n".join(rows), cases="\n".join(cases))


def fish() -> str:
    """The script for fish, with a description of each command."""
    rows = [_FISH_COMMAND.format(name=c.name, phrase=f'"{c.phrase}"') for c in COMMANDS]
    rows += [_FISH_WORDS.format(name=name, words=words) for name, words in SUBCOMMANDS.items()]
    return "".join(rows)


def main(arguments: list[str]) -> int:
    """Prints the script; returns the exit code."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawHelpFormatter)
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    shell = parser.parse_args(arguments).shell
    print({"bash": bash, "zsh": zsh, "fish": fish}[shell](), end="")
    return 0
