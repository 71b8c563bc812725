#!/usr/bin/env bash
# What launch/tpu_vm.sh asks of each worker of a slice. It runs there, in ~/alignprop_jax:
#
#   setup              unpacks ~/alignprop_jax.tar.gz, the new checkout, and installs it
#   start COMMAND ...  runs the command in tmux; nothing to do when it runs already
#   execute            what runs in tmux
#   follow [LINES]     prints the log from LINES on, as tail counts them, until the command ends
#   result             prints running, "exited CODE", stopped, interrupted or none
#   status             the same, after the name of the worker
#   stop               ends the command
#
# What outlasts a call is in ~/.alignprop_jax: command (its arguments, each ended by NUL), log,
# result, files (what the last checkout brought) and, until the command starts, secrets.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kept=$HOME/.alignprop_jax
session=alignprop_jax

fail() {
    echo "error: $*" >&2
    exit 1
}

is_running() {
    tmux has-session -t "=$session" 2>/dev/null
}

# Prints the process that tmux started; its process group has it and all its children.
leader() {
    tmux list-panes -t "=$session:" -F '#{pane_pid}' 2>/dev/null
}

setup() {
    mkdir -p "$kept"
    chmod 700 "$kept"
    if is_running; then
        fail "a command is running on $(hostname); stop it before setting up"
    fi
    # What an earlier checkout brought goes, what runs left stays.
    if [[ -f $kept/files ]]; then
        xargs -d '\n' rm -f -- <"$kept/files"
    fi
    tar -xzf "$HOME/alignprop_jax.tar.gz"
    tar -tzf "$HOME/alignprop_jax.tar.gz" | grep -v '/$' >"$kept/files"
    command -v tmux >/dev/null || sudo apt-get install --yes --quiet tmux
    PYTHON=$(find_python_of_package)
    export PYTHON
    # shellcheck source=environment.sh
    source launch/environment.sh
    prepare_environment tpu
}

# Prints a Python for .venv. That of the TPU images is older than the package needs, so that uv
# brings one; --system, as otherwise uv finds .venv itself.
find_python_of_package() {
    if python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo python3
        return
    fi
    {
        python3 -m pip install --quiet --user uv
        python3 -m uv python install --quiet 3.12
    } >&2
    python3 -m uv python find --system --managed-python 3.12
}

start() {
    if is_running; then
        rm -f "$kept/secrets"
        printf '%s\0' "$@" | cmp --silent - "$kept/command" ||
            fail "another command is running on $(hostname); stop it first"
        return
    fi
    [[ -x .venv/bin/python ]] || fail "$(hostname) is not set up"
    printf '%s\0' "$@" >"$kept/command"
    : >"$kept/log"
    # What is true until the command ends: if it never does, the machine went down.
    echo interrupted >"$kept/result"
    tmux new-session -d -s "$session" bash launch/tpu_worker.sh execute
}

execute() {
    local command code=0
    # From a file, as tmux takes an argument that ends in a semicolon for the end of a command.
    mapfile -d '' -t command <"$kept/command"
    if [[ -f $kept/secrets ]]; then
        # shellcheck disable=SC1091
        source "$kept/secrets"
        rm "$kept/secrets"
    fi
    PATH=$PWD/.venv/bin:$PATH "${command[@]}" 2>&1 | tee -a "$kept/log" || code=$?
    echo "exited $code" >"$kept/result"
}

follow() {
    local process
    if process=$(leader); then
        tail --lines="${1:-+1}" --follow --pid="$process" "$kept/log"
    else
        tail --lines="${1:-+1}" "$kept/log"
    fi
}

result() {
    if is_running; then
        echo running
    elif [[ -f $kept/result ]]; then
        cat "$kept/result"
    else
        echo none
    fi
}

status() {
    echo "$(hostname): $(result)"
}

stop() {
    local process
    process=$(leader) || return 0
    tmux kill-session -t "=$session"
    # The chips are free only when every process of the command is gone.
    for _ in {1..100}; do
        kill -0 -- "-$process" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL -- "-$process" 2>/dev/null || true
    echo stopped >"$kept/result"
}

case ${1:-} in
setup | start | execute | follow | result | status | stop) "$@" ;;
*) fail "unknown subcommand ${1:-}" ;;
esac
