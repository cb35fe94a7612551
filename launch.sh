#!/usr/bin/env bash
# Entry point for set-up, training and tests. Every command runs the set-up first, which is skipped once done.
#   ./launch.sh                          quickstart: train two models, compare them, print the table
#   ./launch.sh setup                    set-up only
#   ./launch.sh test [pytest arguments]  fast tests, minutes
#   ./launch.sh test --all [...]         all tests
#   ./launch.sh train RECIPE [key=value ...]
#       Trains with DeepSpeed on every GPU of this machine, or on the CPU if it has none; on the machines of ./hostfile
#       (or $HOSTFILE) if that file exists; inside `srun` with several tasks, one rank per task.
#   ./launch.sh train RECIPE [key=value ...] --restarts N [--nnodes MIN:MAX --rdzv-endpoint HOST:PORT]
#       Trains on this machine, or on every machine that runs this command; restarts after a lost rank or machine.
#   PYTHON=/path/to/python3.12 ./launch.sh ...   creates .venv with that interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
VENV=.venv
STAMP=$VENV/.setup-done
# Installed without dependencies: requirements.lock has the ones needed here, and the others pull in torchvision, whose
# CUDA build breaks transformers with a CPU build of torch.
LMMS_EVAL=lmms-eval==0.7.3
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000} # why: train/run.py

die() {
  echo "launch.sh: $*" >&2
  exit 2
}

find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  die "no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python3 ./launch.sh"
}

check_compiler() {
  command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    die "no C++ compiler found (g++); DeepSpeed compiles its communication for the CPU: install build-essential"
}

fingerprint() {
  echo "$(cksum <requirements.lock | tr ' ' '-') $LMMS_EVAL"
}

setup() {
  [[ -f $STAMP && "$(cat "$STAMP")" == "$(fingerprint)" ]] && return
  local python
  check_compiler
  if [[ ! -x $VENV/bin/python ]]; then
    python=$(find_python)
    echo "set-up: making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" || die "$python cannot make a virtual environment; install its venv package"
  fi
  echo "set-up: installing the versions of requirements.lock (minutes on a first call)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.lock ||
    die "the versions of requirements.lock could not be installed; see above"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$LMMS_EVAL" ||
    die "$LMMS_EVAL could not be installed; see above"
  echo "set-up: compiling what DeepSpeed needs (half a minute)"
  "$VENV/bin/python" -m train.extensions || die "DeepSpeed's operator could not be compiled; see above"
  fingerprint >"$STAMP"
}

has_gpu() {
  nvidia-smi -L >/dev/null 2>&1 || [[ -e /dev/kfd ]]
}

# Runs a launcher in a new session, so that Ctrl-C reaches only this script. SIGTERM and the first Ctrl-C are forwarded
# to the ranks only: they save and exit with 0, and the launcher exits after them. If it got the signal itself, it would
# kill them half a minute later. A second Ctrl-C kills everything at once.
launch() {
  local runner status=0 last=0 stopped= interrupted=
  env -u RANK -u LOCAL_RANK setsid "$@" &
  runner=$!
  trap 'stop_ranks "$runner" & stopped=yes' TERM
  trap '[[ -z $interrupted ]] || kill_all "$runner"; stop_ranks "$runner" & stopped=yes interrupted=yes' INT
  while kill -0 "$runner" 2>/dev/null; do
    status=0
    wait "$runner" || status=$?
  done
  wait "$runner" 2>/dev/null || last=$? # if the signal arrived between its exit and our wait
  [[ -z $stopped || $last -eq 127 ]] || status=$last
  trap - TERM INT
  [[ -z $stopped || $status -ne 0 ]] || exit 0 # stopped on request: skip all further steps
  return "$status"
}

# Sends SIGTERM to the ranks of a launcher, once there are any.
stop_ranks() {
  local tries=0 found
  while kill -0 "$1" 2>/dev/null; do
    found=$(ranks "$1")
    # shellcheck disable=SC2086  # one word a rank
    [[ -n $found ]] && { kill -TERM $found 2>/dev/null || true; return; }
    [[ $((tries += 1)) -lt 150 ]] || kill -TERM "$1" 2>/dev/null || true # after 30 s: ranks on other machines
    sleep 0.2
  done
}

# Prints the pids of the ranks among the descendants of a process.
ranks() {
  local child
  for child in $(children "$1"); do
    if is_rank "$child"; then
      echo "$child"
    else
      ranks "$child"
    fi
  done
}

is_rank() {
  tr '\0' '\n' <"/proc/$1/environ" 2>/dev/null | grep -q '^LOCAL_RANK='
}

kill_all() {
  echo "launch.sh: stopped at once; the same command goes on from the last checkpoint" >&2
  kill -KILL -- "-$1" 2>/dev/null || true
  exit 130
}

children() {
  cat "/proc/$1/task/$1/children" 2>/dev/null || true
}

train() {
  [[ $# -ge 1 ]] || die "train: got no recipe, expected one, such as ./launch.sh train recipes/quickstart.yaml"
  local argument
  for argument in "$@"; do
    case $argument in --restarts | --restarts=*)
      has_gpu || export DS_ACCELERATOR=cpu
      launch "$VENV/bin/python" -m train.elastic "$@"
      return
      ;;
    esac
  done
  [[ -z ${HOSTFILE:-} || -f $HOSTFILE ]] || die "HOSTFILE: got '$HOSTFILE', expected a file that names machines"
  local hostfile=${HOSTFILE:-hostfile}
  if [[ ${SLURM_NTASKS:-1} -gt 1 && -n ${SLURM_PROCID:-} ]]; then
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 50000))}
    exec "$VENV/bin/python" train/run.py "$@"
  elif [[ -f $hostfile ]]; then
    launch "$VENV/bin/deepspeed" --log_level warning --hostfile "$hostfile" train/run.py "$@"
  elif has_gpu; then
    launch "$VENV/bin/deepspeed" --log_level warning train/run.py "$@"
  else
    DS_ACCELERATOR=cpu launch "$VENV/bin/deepspeed" --log_level warning --num_accelerators 1 train/run.py "$@"
  fi
}

# Arguments: the master port, then the arguments of train/run.py.
train_small() {
  has_gpu || export DS_ACCELERATOR=cpu
  OMP_NUM_THREADS=1 launch "$VENV/bin/deepspeed" --log_level warning --num_accelerators 1 --master_port "$1" \
    train/run.py "${@:2}"
}

run_tests() {
  local argument all= rest=()
  for argument in "$@"; do
    if [[ $argument == --all ]]; then all=yes; else rest+=("$argument"); fi
  done
  [[ -n $all ]] || rest=(-m "not slow" "${rest[@]}")
  # one thread per worker, so that results do not depend on the machine; a worker takes up to 3 GiB
  OMP_NUM_THREADS=1 exec "$VENV/bin/python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "${rest[@]}"
}

# Trains both models at the same time, one thread each: models this small gain nothing from a second thread.
quickstart() {
  log=outputs/quickstart_dense.txt
  mkdir -p outputs
  echo "quickstart: training two models side by side; the output of the dense one goes to $log"
  train_small 29600 recipes/quickstart.yaml model.stages=null name=quickstart_dense \
    output=outputs/quickstart_dense >"$log" 2>&1 &
  dense_pid=$!
  trap 'kill -TERM "$dense_pid" 2>/dev/null || true; wait "$dense_pid" || true' EXIT # the dense one saves too
  train_small 29500 recipes/quickstart.yaml
  wait "$dense_pid" || die "the dense model was not trained; see the end of $log"
  trap - EXIT
  "$VENV/bin/python" -m eval.compare outputs/quickstart_fused outputs/quickstart_dense \
    --schedules trained --tasks easy_vqa --out outputs/quickstart
}

main() {
  local command=${1:-quickstart}
  [[ $# -gt 0 ]] && shift
  case $command in
    setup | test | train | quickstart) ;;
    *) die "got command '$command', expected setup, test, train, or nothing for the quickstart" ;;
  esac
  setup
  case $command in
    test) run_tests "$@" ;;
    train) train "$@" ;;
    quickstart) quickstart ;;
  esac
}

main "$@"
