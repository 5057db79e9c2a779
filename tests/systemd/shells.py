"""Do the shells load the completions that the package brings, each by its own means?

A shell that the tree does not have is said, and not tried there.
"""

import shutil

from box import run

BASH = "/usr/share/bash-completion/completions/sparsectl"


def has(shell):
    if shutil.which(shell):
        return True
    print(f"#  not tried: no {shell} here")
    return False


def bash_completes_the_tools_words():
    if not has("bash"):
        return
    script = f"""
source {BASH}
complete -p sparsectl
COMP_WORDS=(sparsectl config sh) COMP_CWORD=2
completes=$(complete -p sparsectl | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$completes sparsectl sh config
echo "words: ${{COMPREPLY[*]}}"
"""
    said = run("bash", "--norc", "-euc", script)
    assert "-F " in said and said.endswith("words: show"), said


def zsh_completes_the_tools_words():
    if not has("zsh"):
        return
    # As an interactive shell would, from the folders that the system's zsh looks into.
    script = "autoload -Uz compinit && compinit -u -D && print -r -- $_comps[sparsectl] && autoload +X -Uz $_comps[sparsectl]"
    said = run("zsh", "-f", "-c", script)
    assert said == "_sparsectl", said


def fish_completes_the_tools_words():
    if not has("fish"):
        return
    said = run("env", "HOME=/root", "fish", "-c", "complete -C 'sparsectl config sh'")
    words = [line.split("\t")[0] for line in said.splitlines()]
    assert words == ["show"], said


CHECKS = [bash_completes_the_tools_words, zsh_completes_the_tools_words, fish_completes_the_tools_words]
