#!/usr/bin/env bash
# Makes the virtual environments of the tools that the benchmarks compare swift with.
#
#   bench/peers.sh [swift|all]      swift = ms-swift, which is also what `all` holds today
#
# They go to bench/peers/ (git-ignored), or to $SWIFT_PEERS; $PYTHON is the interpreter to build them with.
# A finished environment is left alone, so running this twice costs a second; an unfinished one is made anew.
# All share one torch version with swift's own environment, so that the benchmarks compare tools, not torch builds.
# Which build of it (CPU, CUDA) is decided by pip's own settings.
set -euo pipefail

TORCH=2.13.0
MS_SWIFT=4.6.0
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PEERS=${SWIFT_PEERS:-$HERE/peers}
PYTHON=${PYTHON:-python3}

make_peer() { # make_peer NAME REQUIREMENT...
    local name=$1 home=$PEERS/$1 wanted="torch==$TORCH ${*:2}"
    shift
    if [[ $(cat "$home/.finished" 2>/dev/null) != "$wanted" ]]; then
        echo "$name: making $home"
        rm -rf "$home"
        mkdir -p "$PEERS"
        echo "torch==$TORCH" >"$PEERS/constraint.txt"
        "$PYTHON" -m venv "$home"
        "$home/bin/pip" install --quiet "torch==$TORCH"
        "$home/bin/pip" install --quiet --constraint "$PEERS/constraint.txt" "$@"
        echo "$wanted" >"$home/.finished.part"
        mv "$home/.finished.part" "$home/.finished"
    fi
    print_versions "$name" "$home"
}

print_versions() {
    "$2/bin/python" - "$1" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, distributions, version

def known(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"

names = ("ms-swift", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "modelscope")
print(f"{sys.argv[1]}: python {sys.version.split()[0]}, {sum(1 for _ in distributions())} packages;",
      ", ".join(f"{name} {known(name)}" for name in names))
PY
}

case ${1:-all} in
    swift | ms-swift | all) make_peer ms-swift "ms-swift==$MS_SWIFT" ;;
    *)
        echo "usage: bench/peers.sh [swift|all]" >&2
        exit 2
        ;;
esac
