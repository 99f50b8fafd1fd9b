# shellcheck shell=bash
# Shared by the scripts: a virtual environment with pinned packages, installed once. Source it, then call
#   use_environment FOLDER REQUIREMENTS...
# PYTHON selects the interpreter (the pinned MindSpore is tested with 3.11).

use_environment() {
    local folder=$1 stamp
    shift
    stamp=$(cat requirements*.txt | cksum)
    if [ "$(cat "$folder/.complete" 2>/dev/null)" != "$stamp" ]; then
        local python=${PYTHON:-python3}
        if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "error: $python is not Python 3.10 to 3.12, which MindSpore 2.10 needs; set PYTHON=/path/to/python3.11" >&2
            return 2
        fi
        echo "installing into $folder"
        "$python" -m venv "$folder"
        local file
        for file in "$@"; do
            "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r "$file"
        done
        echo "$stamp" > "$folder/.complete"
    fi
    # shellcheck disable=SC1091 # created above
    source "$folder/bin/activate"
}
