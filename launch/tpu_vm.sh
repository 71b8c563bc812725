#!/usr/bin/env bash
# Runs a command on a Cloud TPU slice, one host or a pod, from a checkout on this machine:
#
#   bash launch/tpu_vm.sh up --name=NAME --zone=ZONE --type=v5litepod-16 -- \
#       python -m alignprop_jax.train --config=configs/emoji.py:aesthetic --workdir=gs://BUCKET/RUN
#   bash launch/tpu_vm.sh delete --name=NAME --zone=ZONE
#
# Subcommands:
#   up -- COMMAND    all of: create, setup, run, logs; when the slice is preempted, does them again
#   create           creates the slice, or takes the one of that name, and waits until it is ready
#   setup            copies the checkout to all workers, without .git, .venv and runs; installs it
#   run -- COMMAND   starts the command in tmux on all workers, at the top of the checkout
#   logs             prints what worker 0 prints, until the command ends
#   status           prints the state of the slice, and what the command does on each worker
#   stop             ends the command on all workers
#   delete           deletes the slice
#
# Options; the default of --name is $TPU_NAME, and so on for all but --dry_run:
#   --name=NAME         of the slice
#   --zone=ZONE         such as us-west4-a
#   --type=TYPE         accelerator type: v4-8, v5litepod-16 (or v5e-16), v5p-8, v6e-8, ...
#   --project=PROJECT   otherwise the one gcloud is configured with
#   --version=VERSION   runtime of the VM, otherwise the one for JAX on that type
#   --spot              cheaper, and may be preempted at any time
#   --queued            asks by a queued resource, which waits until there is capacity
#   --worker=WORKER     whose log: 0 (default), 1, ... or all
#   --max_restarts=N    how often `up` replaces or restarts a slice, 10 by default
#   --poll_seconds=N    time between two looks at the slice, 30 by default
#   --dry_run           prints the commands, for bash, and runs none
#
# HF_TOKEN and WANDB_API_KEY of this machine's environment are there for the command, too. They
# travel in a file that only the user can read, and are in no argument and no output.

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
secrets="HF_TOKEN WANDB_API_KEY"
worker_script=alignprop_jax/launch/tpu_worker.sh

# This much of bash is understood by version 3.2, which macOS has.

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

fail() {
    echo "error: $*" >&2
    exit 1
}

misuse() {
    echo "error: $*; see bash launch/tpu_vm.sh --help" >&2
    exit 2
}

# As comments, so that what --dry_run prints is a script.
note() {
    echo "# $*"
}

# Prints the arguments as words of a shell, any POSIX one.
quote() {
    local word line="" plain='^[a-zA-Z0-9_./:=@%+,-]+$' single="'" escaped="'\\''"
    for word in "$@"; do
        if ! [[ $word =~ $plain ]]; then
            word="'${word//$single/$escaped}'"
        fi
        line="$line $word"
    done
    printf '%s\n' "${line# }"
}

# Runs a command, or prints it.
run() {
    if [[ $dry_run ]]; then
        quote "$@"
    else
        "$@"
    fi
}

# Between two looks at the cloud.
pause() {
    sleep "$poll_seconds"
}

# tpus GROUP VERB ARGUMENT ...: gcloud, which must not read what is typed here.
tpus() {
    set -- gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"} --quiet
    if [[ $dry_run ]]; then
        echo "$(quote "$@") </dev/null"
    else
        "$@" </dev/null
    fi
}

# on_workers WORKERS COMMAND: a line of shell on a worker, or on all.
on_workers() {
    # So that a connection to a machine that is gone ends, too.
    tpus tpu-vm ssh "$name" --worker="$1" --command="$2" \
        --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4
}

# ask WORKERS ARGUMENT ...: launch/tpu_worker.sh on a worker, or on all.
ask() {
    local workers=$1
    shift
    on_workers "$workers" "bash $worker_script $(quote "$@")"
}

# describe GROUP FIELD: sets state to what gcloud calls it, or ABSENT.
describe() {
    if [[ $dry_run ]]; then
        tpus "$1" describe "$name" --format="value($2)"
        state=ABSENT
        return
    fi
    for _ in 1 2 3 4 5; do
        if state=$(tpus "$1" describe "$name" --format="value($2)" 2>errors); then
            state=${state:-UNKNOWN}
            connected=1
            return
        fi
        if grep -q NOT_FOUND errors; then
            state=ABSENT
            connected=1
            return
        fi
        cat errors >&2
        # At first it is a mistake; later, a network that is away for a moment.
        [[ $connected ]] || break
        pause
    done
    fail "gcloud cannot tell the state of $name in $zone"
}

# Sets state to that of the TPU VM or, while there is none, of the queued resource for it.
find_state() {
    describe tpu-vm state
    if [[ $state == ABSENT && $queued ]]; then
        describe queued-resources state.state
    fi
}

# Sets result to what became of the command; to interrupted when its slice is gone, to unreachable
# when worker 0 does not answer.
find_result() {
    find_state
    if [[ $state != READY ]]; then
        result=interrupted
        return
    fi
    result=$(on_workers 0 "test ! -f $worker_script || bash $worker_script result") ||
        result=unreachable
    result=${result:-none}
}

request_slice() {
    note "creating $name, $type in $zone${spot:+, spot}${queued:+, queued}"
    if [[ $queued ]]; then
        tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
            --runtime-version="$version" ${spot:+--spot}
    else
        tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
    fi
}

count_restart() {
    ((restarts < max_restarts)) ||
        fail "$name was interrupted more than --max_restarts=$max_restarts times"
    restarts=$((restarts + 1))
    note "restart $restarts of at most $max_restarts"
}

# Returns when the slice is ready, whatever it was before.
create() {
    local requested="" deleted="" shown=""
    while :; do
        find_state
        case $state in
        READY)
            return
            ;;
        ABSENT)
            if [[ $dry_run ]]; then
                request_slice
                note "here the state is asked for until it is READY"
                return
            fi
            # It was there, or was said to come.
            if [[ $requested ]]; then
                count_restart
                pause
            fi
            deleted=""
            if request_slice; then
                requested=1
            else
                [[ $replacing ]] ||
                    fail "$name was not created; when there is no capacity, --queued waits for it"
                count_restart
                pause
            fi
            ;;
        PREEMPTED | TERMINATED | SUSPENDED)
            note "$name is $state"
            # The first replacement of a run is counted by `up`.
            if [[ $requested || $deleted ]]; then
                count_restart
            fi
            # It was deleted already, and is slow to go.
            if [[ $deleted ]]; then
                pause
            fi
            replacing=1 requested=""
            if delete; then
                deleted=1
            else
                deleted=""
                count_restart
                pause
            fi
            ;;
        FAILED | STOPPED | HIDDEN)
            fail "$name is $state; delete it, or look at it with gcloud compute tpus"
            ;;
        *)
            if [[ $state != "$shown" ]]; then
                note "$name is $state"
            fi
            shown=$state
            pause
            ;;
        esac
    done
}

delete() {
    # It may have been asked for with --queued or without, whatever is said now.
    describe queued-resources state.state
    if [[ $dry_run || $state != ABSENT ]]; then
        note "deleting the queued resource $name and its slice"
        tpus queued-resources delete "$name" --force || return
        [[ $dry_run ]] || return 0
    fi
    describe tpu-vm state
    if [[ $dry_run || $state != ABSENT ]]; then
        note "deleting the slice $name"
        tpus tpu-vm delete "$name" || return
    else
        note "there is no $name in $zone"
    fi
}

setup() {
    note "copying $checkout to all workers"
    # The variable keeps macOS from adding files of its own.
    run env COPYFILE_DISABLE=1 tar -czf code.tar.gz --exclude=./.git --exclude=./.venv \
        --exclude=./runs --exclude=./build --exclude=./dist --exclude=__pycache__ \
        --exclude='*.egg-info' --exclude=.pytest_cache --exclude=.ruff_cache -C "$checkout" .
    tpus tpu-vm scp code.tar.gz "$name:alignprop_jax.tar.gz" --worker=all
    on_workers all "mkdir -p alignprop_jax && \
tar -xzf alignprop_jax.tar.gz -C alignprop_jax ./launch/tpu_worker.sh && bash $worker_script setup"
}

send_secrets() {
    local variable found=""
    for variable in $secrets; do
        if [[ -z ${!variable:-} ]]; then
            continue
        fi
        found=1
        if [[ $dry_run ]]; then
            # shellcheck disable=SC2028
            echo "printf 'export $variable=%q\\n' \"\$$variable\" >>secrets"
        else
            printf 'export %s=%q\n' "$variable" "${!variable}" >>secrets
        fi
    done
    if [[ $found ]]; then
        tpus tpu-vm scp secrets "$name:.alignprop_jax/secrets" --worker=all
        run rm secrets
    fi
}

warn_of_local_workdir() {
    local argument previous="" workdir=""
    for argument in "$@"; do
        if [[ $previous == --workdir ]]; then
            workdir=$argument
        elif [[ $argument == --workdir=* ]]; then
            workdir=${argument#--workdir=}
        fi
        previous=$argument
    done
    if [[ $workdir && $workdir != gs://* && $workdir != /* ]]; then
        note "$(quote "$workdir") is on the slice and goes with it; --workdir=gs://BUCKET/RUN stays"
    fi
}

start() {
    warn_of_local_workdir "$@"
    send_secrets
    ask all start "$@"
    note "the command runs in tmux on all workers, whether or not this machine is on"
}

up() {
    local lines=+1 unreachable=0
    create
    result=none
    if [[ -z $dry_run ]]; then
        find_result
    fi
    if [[ $result != running ]]; then
        setup
    fi
    start "$@"
    while :; do
        # Ends when the command does, or when the connection is lost.
        ask 0 follow "$lines" || true
        if [[ $dry_run ]]; then
            return
        fi
        find_result
        if [[ $result == exited* && $result != "exited 0" ]]; then
            # A slice that goes down takes the command along first: wait for what it says itself.
            pause
            find_result
        fi
        case $result in
        "exited 0")
            note "the command is done; $name is there until you delete it"
            return
            ;;
        running | unreachable)
            if [[ $result == running ]]; then
                unreachable=0
            else
                unreachable=$((unreachable + 1))
            fi
            ((unreachable < 5)) || fail "worker 0 of $name does not answer"
            note "the connection was lost; connecting again"
            lines=20
            pause
            ;;
        interrupted)
            note "the command was interrupted; $name is $state"
            count_restart
            replacing=1
            create
            setup
            start "$@"
            lines=+1
            ;;
        *)
            fail "the command $result on worker 0 of $name, which is there until you delete it"
            ;;
        esac
    done
}

status() {
    find_state
    note "$name is $state"
    if [[ $dry_run || $state == READY ]]; then
        on_workers all "test ! -f $worker_script || bash $worker_script status"
    fi
}

# switch NAME VALUE: sets the variable to 1 or nothing.
switch() {
    case $2 in
    1 | true) printf -v "$1" %s 1 ;;
    "" | 0 | false) printf -v "$1" %s "" ;;
    *) misuse "--$1 is 1 or 0, not $2" ;;
    esac
}

check_type() {
    [[ $type ]] || misuse "--type is missing, such as --type=v5litepod-8"
    if [[ $type == v5e-* ]]; then
        type=v5litepod-${type#v5e-}
    fi
    if [[ $version ]]; then
        return
    fi
    case $type in
    v[234]-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) misuse "the runtime for --type=$type is not known here; give it by --version" ;;
    esac
}

# check_number NAME: the variable is a decimal number; bash takes 08 for an octal one.
check_number() {
    [[ ${!1} =~ ^[0-9]{1,9}$ ]] || misuse "--$1=${!1} is not a number below a billion"
    printf -v "$1" %d "$((10#${!1}))"
}

check_options() {
    [[ $name ]] || misuse "--name is missing"
    [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
        misuse "--name=$name must be of lower-case letters, digits and hyphens"
    [[ $zone ]] || misuse "--zone is missing, such as --zone=us-west4-a"
    check_number max_restarts
    check_number poll_seconds
    [[ $worker =~ ^([0-9]+|all)$ ]] || misuse "--worker=$worker is neither a number nor all"
}

main() {
    local subcommand=${1:-} option value
    case $subcommand in
    up | create | setup | run | logs | status | stop | delete) shift ;;
    -h | --help | help)
        usage
        return
        ;;
    "") misuse "a subcommand is missing" ;;
    *) misuse "unknown subcommand $subcommand" ;;
    esac
    name=${TPU_NAME:-} zone=${TPU_ZONE:-} type=${TPU_TYPE:-} project=${TPU_PROJECT:-}
    version=${TPU_VERSION:-} worker=${TPU_WORKER:-0} dry_run=""
    max_restarts=${TPU_MAX_RESTARTS:-10} poll_seconds=${TPU_POLL_SECONDS:-30}
    switch spot "${TPU_SPOT:-}"
    switch queued "${TPU_QUEUED:-}"
    while (($# > 0)) && [[ $1 != -- ]]; do
        option=$1
        shift
        case $option in
        --spot | --queued | --dry_run) printf -v "${option#--}" 1 ;;
        --help)
            usage
            return
            ;;
        --name=* | --zone=* | --type=* | --project=* | --version=* | --worker=* | \
            --max_restarts=* | --poll_seconds=*)
            value=${option#*=}
            option=${option%%=*}
            printf -v "${option#--}" %s "$value"
            ;;
        --name | --zone | --type | --project | --version | --worker | --max_restarts | \
            --poll_seconds)
            (($# > 0)) || misuse "$option needs a value"
            printf -v "${option#--}" %s "$1"
            shift
            ;;
        *) misuse "unknown option $option" ;;
        esac
    done
    check_options
    case $subcommand in
    up | create) check_type ;;
    esac
    case $subcommand in
    up | run) (($# > 1)) || misuse "the command to run is missing; it comes after --" ;;
    *) (($# == 0)) || misuse "$subcommand takes no command" ;;
    esac
    if (($# > 0)); then
        shift
    fi
    if [[ $dry_run ]]; then
        # shellcheck disable=SC2016
        echo 'umask 077 && cd "$(mktemp -d)"'
    else
        command -v gcloud >/dev/null ||
            fail "gcloud is needed: https://cloud.google.com/sdk/docs/install"
        umask 077
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        cd "$scratch"
    fi
    connected="" replacing="" restarts=0
    case $subcommand in
    up) up "$@" ;;
    run) start "$@" ;;
    logs) ask "$worker" follow ;;
    stop) ask all stop ;;
    create)
        create
        note "$name is ready"
        ;;
    *) "$subcommand" ;;
    esac
}

main "$@"
