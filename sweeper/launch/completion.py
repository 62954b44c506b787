"""Shell completion: our verbs, and Hydra's own completion for what follows `launch`."""

from __future__ import annotations

SCRIPT = """\
# sweeper: completion of verbs, and of Hydra overrides after `launch`
_sweeper() {
    local word="${COMP_WORDS[COMP_CWORD]}" line="${COMP_LINE:0:COMP_POINT}" index=1
    if [[ "$line" =~ ^[[:space:]]*[^[:space:]]*python[0-9.]*[[:space:]]+-m[[:space:]]+sweeper ]]; then index=3
    elif [[ "${COMP_WORDS[0]##*/}" == python* ]]; then return; fi
    if (( COMP_CWORD == index )); then
        COMPREPLY=( $(compgen -W "@VERBS@" -- "$word") )
    elif [[ "${COMP_WORDS[index]}" == launch ]]; then
        # Hydra completes the line without the verb; words before `=` and `:` are bash's own business.
        local rest="sweeper ${line#*launch }"
        COMPREPLY=( $(COMP_LINE="$rest" COMP_POINT=${#rest} COMP_CWORD=1 "${COMP_WORDS[@]:0:index}" launch -sc query=bash 2>/dev/null) )
        if [[ "$COMP_WORDBREAKS" == *=* && "${line##* }" == *=* ]]; then COMPREPLY=( "${COMPREPLY[@]#*=}" ); fi
        compopt -o nospace 2>/dev/null
    fi
}
complete -F _sweeper sweeper
complete -o default -F _sweeper python python3
"""


def script(shell: str, verbs: list[str]) -> str:
    """The text to `eval` in a shell; zsh runs the same through bashcompinit.

    Raises:
        ConfigError: There is none for this shell.
    """
    from sweeper.errors import ConfigError

    text = SCRIPT.replace("@VERBS@", " ".join(verbs))
    if shell == "bash":
        return text
    if shell == "zsh":
        return "autoload -U +X bashcompinit && bashcompinit\n" + text
    raise ConfigError(f"there is no completion for {shell!r}", do="Use -sc install=bash or -sc install=zsh.")
