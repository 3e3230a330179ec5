#!/usr/bin/env bash
# Set up in .venv what users need: this project by the versions of constraints.txt, and the demo model.
# Idempotent: a second call takes a second. PYTHON names another interpreter (3.10 to 3.13).
#   --dev    also what the tests, lint and benchmarks need
#   --nodes  also, on Debian and as root, the system's packages for tests on several hosts (tests/nodes)
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# What tests/nodes starts. The package is not to start an sshd of its own, which a policy of 101 says.
install_nodes() (
  policy=/usr/sbin/policy-rc.d
  if ! [ -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update && apt-get -qq install -y --no-install-recommends iproute2 openssh-server pdsh
)

kind=user extras=demo,eval nodes=
for option; do
  case $option in
    --dev) kind=dev extras=demo,dev ;;
    --nodes) nodes=1 ;;
    *) fail "usage: $0 [--dev] [--nodes]" ;;
  esac
done

if [ "$nodes" ] && ! { command -v ip && command -v pdsh && [ -x /usr/sbin/sshd ]; } >/dev/null; then
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    fail "--nodes needs root on Debian; elsewhere install iproute2, openssh-server and pdsh, and leave it out"
  output=$(install_nodes 2>&1) || fail "apt-get cannot install iproute2, openssh-server, pdsh: $output"
fi

PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON. Install Python 3.10 to 3.13, or name one: PYTHON=python3.12 $0"
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
  fail "$("$PYTHON" --version) is not supported; Python 3.10 to 3.13 is. Name one: PYTHON=python3.12 $0"
command -v g++ >/dev/null ||
  fail "there is no C++ compiler, which DeepSpeed needs to build its operators. Debian: apt-get install g++; conda: conda install gxx"

if ! [ -x .venv/bin/python ]; then
  "$PYTHON" -m venv .venv || fail "python's venv module does not work. Debian: apt-get install python3-venv"
fi

# The stamp says what was installed, and for whom: what developers need holds what users need.
wanted=$(cat constraints.txt pyproject.toml scripts/setup.sh | sha256sum | cut -d ' ' -f 1)
stamp=$(cat .venv/setup.stamp 2>/dev/null || true)
if [ "$stamp" != "$wanted dev" ] && [ "$stamp" != "$wanted $kind" ]; then
  # Python compiles what it imports, a third of the files that pip would compile one by one.
  pip() { .venv/bin/python -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt "$@"; }
  # torch first: DeepSpeed's build imports it.
  pip torch numpy setuptools wheel ninja
  # DeepSpeed's build asks which of its operators could be built, and ends with MissingCUDAException
  # where there is a GPU but no CUDA toolkit. Operators are built when they are needed, not here.
  DS_IGNORE_CUDA_DETECTION=1 pip --no-build-isolation -e ".[$extras]"
  printf '%s' "$wanted $kind" >.venv/setup.stamp
fi
.venv/bin/ninja --version >/dev/null 2>&1 ||
  fail "ninja in .venv does not run, which DeepSpeed needs to build its operators: .venv/bin/python -m pip install --force-reinstall ninja"

.venv/bin/python scripts/fetch_demo.py
echo "setup: done. Activate the environment: source .venv/bin/activate"
