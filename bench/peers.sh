#!/usr/bin/env bash
# Makes the virtual environments of the tools that the benchmarks compare swift with.
#
#   bench/peers.sh [ms-swift] [llama-factory] [trl]      (default: all three)
#
# `trl` serves two peers: TRL, and the plain loop of transformers (Trainer with peft).
# They go to bench/peers/ (git-ignored), or to $SWIFT_PEERS; $PYTHON is the interpreter to build them with.
# A finished environment is left alone, so running this twice costs a second; an unfinished one is made anew.
# All share one torch version with swift's own environment, so that the benchmarks compare tools, not torch builds.
# Which build of it (CPU, CUDA) is decided by pip's own settings.
set -euo pipefail

TORCH=2.13.0
MS_SWIFT=4.6.0
LLAMA_FACTORY=0.9.5
TRL=1.16.0
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
        [[ $name != llama-factory ]] || without_torch_companions "$home"
        echo "$wanted" >"$home/.finished.part"
        mv "$home/.finished.part" "$home/.finished"
    fi
    print_versions "$name" "$home"
}

# LLaMA-Factory requires torchvision and torchaudio, of which the package index has CUDA builds alone: their compiled
# parts do not load beside a CPU build of torch. Text training does without torchvision if it is absent altogether;
# torchaudio is imported always, and can be if its compiled parts are absent.
without_torch_companions() { # without_torch_companions HOME
    if [[ $("$1/bin/python" -c 'import torch; print(torch.version.cuda)') == None ]]; then
        "$1/bin/pip" uninstall --quiet --yes torchvision
        rm -f "$1"/lib/python3*/site-packages/torchaudio/lib/*.so
    fi
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

names = ("ms-swift", "llamafactory", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
print(f"{sys.argv[1]}: python {sys.version.split()[0]}, {sum(1 for _ in distributions())} packages;",
      ", ".join(f"{name} {known(name)}" for name in names))
PY
}

[[ $# -gt 0 ]] || set -- ms-swift llama-factory trl
for peer in "$@"; do
    case $peer in
        ms-swift | llama-factory | trl) ;;
        *)
            echo "usage: bench/peers.sh [ms-swift] [llama-factory] [trl]" >&2
            exit 2
            ;;
    esac
done
for peer in "$@"; do
    case $peer in
        ms-swift) make_peer ms-swift "ms-swift==$MS_SWIFT" ;;
        llama-factory) make_peer llama-factory "llamafactory==$LLAMA_FACTORY" ;;
        trl) make_peer trl "trl==$TRL" peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 transformers==5.23.0 ;;
    esac
done
