#!/usr/bin/env bash
# Create .venv-peers with kvpress, for `kvplug eval --peers`. `make peers` calls this, after `make setup`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly KVPRESS=0.5.5
export PIP_DISABLE_PIP_VERSION_CHECK=1

die() { printf '[peers] error: %s\n' "$*" >&2; exit 1; }
pip() { .venv-peers/bin/python -m pip "$@"; }

.venv/bin/python -m venv --clear .venv-peers || die "could not create .venv-peers."
torch=$(.venv/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))')
pip install -qq "$torch" \
    || die "no $torch in pip's sources: name PyTorch's index for this build in PIP_EXTRA_INDEX_URL."
pip install -qq "kvpress==$KVPRESS" "$torch"
.venv-peers/bin/python -c 'import kvpress' || die "kvpress cannot be imported; the reason is above."
printf '[peers] done: kvpress %s beside %s\n' "$KVPRESS" "$torch"
