#!/usr/bin/env bash
# The one way in.
#   ./launch.sh                          set-up, then the quickstart: train, compare, print the table
#   ./launch.sh setup                    the set-up alone
#   ./launch.sh test [pytest arguments]  the set-up, then the tests that a change needs, in minutes
#   ./launch.sh test --all [...]         the set-up, then all tests
#   ./launch.sh train RECIPE [key=value ...]
#       DeepSpeed on every GPU of this machine, on the CPU where there is none; on the machines of ./hostfile (or
#       of $HOSTFILE) where there is one; inside `srun` with several tasks, one rank a task.
#   ./launch.sh train RECIPE [key=value ...] --restarts N [--nnodes MIN:MAX --rdzv-endpoint HOST:PORT]
#       the same on this machine, or on every machine that it is called on; starts again after a lost rank or machine
#   PYTHON=/path/to/python3.12 ./launch.sh ...   makes .venv with that interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
VENV=.venv
STAMP=$VENV/.setup-done
# Installed without its dependencies, of which requirements.lock has those that it needs: the others bring torchvision,
# whose CUDA build breaks transformers beside a CPU build of torch.
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

# Runs a launcher in a new session, so that Ctrl-C reaches this script alone. SIGTERM and the first Ctrl-C go to
# the ranks alone: they save and leave with 0, and the launcher follows them. The launcher itself would kill them half
# a minute after it got the signal. A second Ctrl-C ends everything at once.
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
  wait "$runner" 2>/dev/null || last=$? # where the signal came between its end and our wait for it
  [[ -z $stopped || $last -eq 127 ]] || status=$last
  trap - TERM INT
  [[ -z $stopped || $status -ne 0 ]] || exit 0 # stopped on request: nothing that follows is wanted
  return "$status"
}

# Sends SIGTERM to the ranks of a launcher, once there are any.
stop_ranks() {
  local tries=0 found
  while kill -0 "$1" 2>/dev/null; do
    found=$(ranks "$1")
    # shellcheck disable=SC2086  # one word a rank
    [[ -n $found ]] && { kill -TERM $found 2>/dev/null || true; return; }
    [[ $((tries += 1)) -lt 150 ]] || kill -TERM "$1" 2>/dev/null || true # half a minute: they run on other machines
    sleep 0.2
  done
}

# Prints the ranks below a launcher, and not the processes below those.
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
  [[ $# -ge 1 ]] || die "train: which recipe? e.g. ./launch.sh train recipes/quickstart.yaml"
  local argument
  for argument in "$@"; do
    case $argument in --restarts | --restarts=*)
      has_gpu || export DS_ACCELERATOR=cpu
      launch "$VENV/bin/python" -m train.elastic "$@"
      return
      ;;
    esac
  done
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

# Arguments: the port that its ranks meet at, then those of train/run.py.
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
  # one thread a worker, so that the numbers are those of every machine; a worker takes up to 3 GiB
  OMP_NUM_THREADS=1 exec "$VENV/bin/python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "${rest[@]}"
}

# Both models train at the same time, one thread each: so small a model gains nothing from a second one.
quickstart() {
  told=outputs/quickstart_dense.txt
  mkdir -p outputs
  echo "quickstart: two models train side by side; what the dense one says is in $told"
  train_small 29600 recipes/quickstart.yaml model.stages=null name=quickstart_dense \
    output=outputs/quickstart_dense >"$told" 2>&1 &
  twin=$!
  trap 'kill -TERM "$twin" 2>/dev/null || true; wait "$twin" || true' EXIT # stopped, or failed: the other one saves too
  train_small 29500 recipes/quickstart.yaml
  wait "$twin" || die "the dense model was not trained; see the end of $told"
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
