# shellcheck shell=bash
# Shared by the run_*.sh launchers; source it. It changes to the project folder. Relative paths in key=value start
# there; CONFIG_PATH is relative to the caller's folder or, if there is no such file, to the project folder.
#
# A run stays in the foreground and ends with the run's exit code (2: an error that the user can fix). Its processes run
# in separate sessions (msrun's workers always do). The variable LAUNCH_STATE in their environment identifies them; all
# of them end on SIGTERM, SIGINT, SIGHUP, and as soon as one of them fails.
#
# Environment variables:
#   PYTHON         interpreter with MindSpore (default: python)
#   DEVICE_TARGET  Ascend, GPU or CPU, instead of the one in the script's name
#   LOG_DIR        folder of the logs (default: OUTPUT/log; log_1, log_2 ... if it exists)
#   NODE_NUM, NODE_RANK, MASTER_ADDR, MASTER_PORT  for several nodes: number of nodes, number of this node (from 0),
#                  address of node 0, and a free port there (default: 8118). A single node uses any free port unless
#                  MASTER_PORT is set.

caller=$PWD
launcher=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python}
case $python in */*) python=$(cd "$caller" && realpath -s "$python") ;; esac
export PYTHONUNBUFFERED=1
state=''

# --- checks before the start --------------------------------------------------------------------------------------

fail() {
    echo "error: $*" >&2
    exit 2
}

usage() {
    { [ $# -eq 0 ] || echo "error: $*"; echo "usage:"; sed -n 's/^#   bash /    bash /p' "$launcher"; } >&2
    exit 2
}

is_number() {
    [[ ${1:-} =~ ^[0-9]+$ ]]
}

# set_target NAME: sets `target` to the kind of device, DEVICE_TARGET or by default NAME.
set_target() {
    target=${DEVICE_TARGET:-$1}
    case $target in
        Ascend | GPU | CPU) ;;
        *) fail "DEVICE_TARGET: $target is not one of Ascend, GPU, CPU" ;;
    esac
}

# existing KIND PATH: prints the path of an existing file, relative to the caller's or else to the project folder.
existing() {
    if [ -f "$caller/$2" ]; then
        realpath -s --relative-base="$PWD" "$caller/$2"
    elif [ -f "$2" ]; then
        echo "$2"
    else
        fail "$1: no such file $2"
    fi
}

check_python() {
    local resolved
    resolved=$(command -v "$python") || fail "PYTHON: there is no $python; set PYTHON=/path/to/python"
    python=$resolved
    "$python" -c 'import importlib.util as i, sys; sys.exit(i.find_spec("mindspore") is None)' ||
        fail "PYTHON: $python has no MindSpore; pip install -r requirements.txt, or set PYTHON=/path/to/python"
}

# check_devices ID...: fails unless this machine has each of these devices.
check_devices() {
    local id count
    case $target in
        Ascend)
            for id in "$@"; do
                [ -e "/dev/davinci$id" ] || fail "device: no Ascend $id here (/dev/davinci$id); DEVICE_TARGET=CPU runs on CPU"
            done
            ;;
        GPU)
            count=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
            for id in "$@"; do
                [ "$id" -lt "$count" ] || fail "device: no GPU $id here (nvidia-smi lists $count); DEVICE_TARGET=CPU runs on CPU"
            done
            ;;
    esac
}

# use_devices ID...: checks the devices and hides all others from the run.
use_devices() {
    local ids
    check_devices "$@"
    ids=$(IFS=,; echo "$*")
    case $target in
        Ascend) export ASCEND_RT_VISIBLE_DEVICES=$ids ;;
        GPU) export CUDA_VISIBLE_DEVICES=$ids ;;
    esac
}

# read_recipe CONFIG ARGUMENT...: fails with one error line if the recipe is wrong; sets `output`.
read_recipe() {
    local config=$1 word skip='' keys=() text
    shift
    for word in "$@"; do
        if [ -n "$skip" ]; then
            skip=''
        else
            case $word in
                --resume | --init-from) skip=yes ;;
                -*) ;;
                *) keys+=("$word") ;;
            esac
        fi
    done
    text=$("$python" -m src.config "$config" "${keys[@]}") || exit 2
    output=$(sed -n 's/^output: //p' <<< "$text")
    output=${output#\'}
    output=${output%\'}
}

# make_log_folder FOLDER: creates FOLDER/log, or the first of log_1, log_2 ... that does not exist; sets `log`.
make_log_folder() {
    local base=${LOG_DIR:-$1/log} number=0
    log=$base
    mkdir -p "$(dirname "$base")" || exit 2
    until mkdir "$log" 2> /dev/null; do
        [ -e "$log" ] || fail "LOG_DIR: cannot create $log"
        number=$((number + 1))
        log=${base}_$number
    done
}

# --- a run --------------------------------------------------------------------------------------------------------

# processes: prints the ids of the run's processes.
processes() {
    # grep fails if a process has just ended
    { grep -lFzx -- "LAUNCH_STATE=$state" /proc/[0-9]*/environ 2> /dev/null || true; } | cut -d/ -f3
}

# end_run: ends all processes of the run: SIGTERM for five seconds, then SIGKILL.
end_run() {
    local tries=0 signal=TERM pids
    while pids=$(processes) && [ -n "$pids" ]; do
        [ $tries -lt 25 ] || signal=KILL
        # shellcheck disable=SC2086 # one word for each process
        kill -$signal $pids 2> /dev/null || true
        tries=$((tries + 1))
        sleep 0.2
    done
}

# stop NAME CODE: ends the run after a signal.
stop() {
    trap '' INT TERM HUP
    echo "$1: ending the run; logs in $log" >&2
    end_run
    exit "$2"
}

clean_up() {
    if [ -n "$state" ]; then
        end_run
        rm -rf "$state"
    fi
}

# run FIRST FILE COMMAND...: runs COMMAND with its output in FILE, shows worker_FIRST.log, exits with COMMAND's code.
run() {
    local first=$1 file=$2 pid follow code=0 rank
    shift 2
    state=$(mktemp -d)
    trap clean_up EXIT
    trap 'stop interrupted 130' INT
    trap 'stop terminated 143' TERM
    trap 'stop "terminal closed" 129' HUP
    ln -s "$PWD/scripts/worker.sh" "$state/python"
    : > "$log/worker_$first.log"
    env LAUNCH_STATE="$state" LAUNCH_PYTHON="$python" PATH="$state:$PATH" setsid "$@" > "$file" 2>&1 &
    pid=$!
    # without error lines, which `report` prints, and without lines that MindSpore prints for every GLOG_v
    tail -n +1 -s 0.2 -F --pid="$pid" "$log/worker_$first.log" 2> /dev/null |
        grep --line-buffered -v -e '^error: ' -e '^\[INFO\] DISTRIBUTED' &
    follow=$!
    while kill -0 "$pid" 2> /dev/null && [ ! -e "$state/failed" ]; do
        sleep 0.3 &
        wait $! # a trap can interrupt this
    done
    if [ -e "$state/failed" ]; then
        sleep 2 # time for the errors of the other ranks; msrun itself would wait half a minute for its scheduler
        end_run
    fi
    wait "$pid" || code=$?
    wait "$follow" || true
    [ "$code" -ne 0 ] || exit 0
    rank=$first
    if [ -e "$state/failed" ]; then
        read -r rank code < <(grep -v scheduler "$state/failed" || cat "$state/failed")
    fi
    report "$first" "$rank" "$code"
    exit "$code"
}

# report FIRST RANK CODE: prints the error line of a failed rank, or the end of its log unless the terminal shows it.
report() {
    local file=$log/worker_$2.log
    [ "$2" != scheduler ] || file=$log/scheduler.log
    if ! grep '^error: ' "$file" && [ "$2" != "$1" ]; then
        echo "the end of $file:"
        tail -n 20 "$file" || true
    fi >&2
    echo "rank $2 failed with code $3; logs in $log" >&2
}

# --- single runs and ranks ----------------------------------------------------------------------------------------

# run_single SCRIPT ARGUMENT...: runs one process without msrun.
run_single() {
    echo "$1 on $target, log $log/worker_0.log"
    run 0 "$log/worker_0.log" env RANK_ID=0 bash scripts/worker.sh "$@"
}

# free_port: prints a free port.
free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# run_ranks CONFIG DEVICES [ARGUMENT...]: runs DEVICES ranks on each node through msrun.
run_ranks() {
    local config=$1 devices=$2 nodes=${NODE_NUM:-1} node=0 port=${MASTER_PORT:-} arguments=()
    shift 2
    if ! is_number "$nodes" || [ "$nodes" -eq 0 ]; then
        fail "NODE_NUM: $nodes is not a number above 0"
    fi
    if [ "$nodes" -gt 1 ]; then
        if ! is_number "${NODE_RANK:-}" || [ "$NODE_RANK" -ge "$nodes" ]; then
            fail "NODE_RANK: set it to the number of this node, 0 to $((nodes - 1))"
        fi
        [ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR: set it to the address of node 0"
        node=$NODE_RANK port=${port:-8118}
        arguments=(--node_rank="$node" --master_addr="$MASTER_ADDR")
    fi
    read_recipe "$config" "device=$target" "$@"
    make_log_folder "$output"
    port=${port:-$(free_port)}
    [ -z "${RANK_TABLE_FILE:-}" ] || arguments+=(--rank_table_file="$RANK_TABLE_FILE") # msrun exports it to the ranks
    echo "$((devices * nodes)) ranks on $target, logs $log/worker_N.log, port $port"
    run $((node * devices)) "$log/msrun.log" "$python" -m mindspore.parallel.cluster.run \
        --worker_num=$((devices * nodes)) --local_worker_num="$devices" --master_port="$port" "${arguments[@]}" \
        --join=True --log_dir="$log" --tail_worker_log=$((devices * nodes)) \
        train.py --config "$config" "device=$target" "$@"
}

# --- the command lines of the scripts -------------------------------------------------------------------------------

# standalone_train NAME DEVICE_ID CONFIG_PATH [key=value ...]
standalone_train() {
    set_target "$1"
    shift
    [ $# -ge 2 ] || usage
    is_number "$1" || usage "DEVICE_ID: $1 is not a number"
    local id=$1 config
    config=$(existing CONFIG_PATH "$2") || exit 2
    shift 2
    check_python
    use_devices "$id"
    read_recipe "$config" "device=$target" "$@"
    make_log_folder "$output"
    run_single train.py --config "$config" "device=$target" "$@"
}

# evaluate NAME DEVICE_ID CONFIG_PATH CHECKPOINT_PATH [key=value ...]
evaluate() {
    set_target "$1"
    shift
    [ $# -ge 3 ] || usage
    is_number "$1" || usage "DEVICE_ID: $1 is not a number"
    local id=$1 config checkpoint
    config=$(existing CONFIG_PATH "$2") || exit 2
    checkpoint=$(existing CHECKPOINT_PATH "$3") || exit 2
    shift 3
    check_python
    use_devices "$id"
    read_recipe "$config" "device=$target" "$@"
    make_log_folder "$(dirname "$checkpoint")"
    run_single eval.py --ckpt "$checkpoint" --config "$config" "device=$target" "$@"
}
