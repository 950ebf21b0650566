#!/usr/bin/env bash
# Installs this repository and runs one of its commands on every worker of an existing Cloud TPU VM.
#
#   launch/tpu_vm.sh install --name=NAME --zone=ZONE [--project=PROJECT]
#   launch/tpu_vm.sh run     --name=NAME --zone=ZONE [--project=PROJECT] -- COMMAND ARGUMENT...
#   launch/tpu_vm.sh stop    --name=NAME --zone=ZONE [--project=PROJECT]
#
# A single TPU VM, a slice of many workers and several slices (multislice) take the same commands;
# their processes find each other. `install` copies the tracked files (git archive of HEAD) to --dir
# and makes a virtual environment there; `run` runs COMMAND in it, on all workers at once, and ends
# with the command;
# `stop` sends the command SIGTERM: training saves a checkpoint and exits, `run` again resumes it.
#
# Flags (or environment variables):
#   --name=NAME        TPU_NAME        the TPU VM or slice; with --slices the queued resource
#   --zone=ZONE        TPU_ZONE        its zone
#   --project=PROJECT  TPU_PROJECT     default: gcloud's
#   --dir=DIR          TPU_DIR         folder on the workers, below $HOME; default moe_embed_jax
#   --python=PYTHON    TPU_PYTHON      Python 3.11 to 3.13 on the workers; default python3
#   --slices           TPU_SLICES=1    NAME is a queued resource of several slices (multislice)
#   --dry_run                          print the commands, run nothing
#
# Example:
#   launch/tpu_vm.sh run --name=my-slice --zone=us-west4-a -- python launch/train.py \
#     --config=configs/quickstart.py --workdir=gs://BUCKET/run1 --config.data.dir=gs://BUCKET/data
set -euo pipefail

fail() {
  echo "error: $1 (see launch/tpu_vm.sh --help)" >&2
  exit 2
}

# Prints a command so that a shell would read it back; runs it unless --dry_run.
execute() {
  local word line=+
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      line+=" $word"
    else
      line+=" ${word@Q}"
    fi
  done
  echo "$line"
  if [[ $dry_run == 0 ]]; then
    "$@"
  fi
}

# Runs a shell line on every worker of the TPU, of all its slices.
on_workers() {
  execute gcloud compute tpus "$resource" ssh "$name" --zone="$zone" "${project_flag[@]}" \
    "${workers[@]}" --command="$1"
}

install() {
  git rev-parse HEAD > /dev/null 2>&1 || fail "install needs the git repository"
  execute git archive --format=tar.gz --output=source.tar.gz HEAD
  execute gcloud compute tpus "$resource" scp source.tar.gz "$name:moe_embed_jax.tar.gz" \
    --zone="$zone" "${project_flag[@]}" "${workers[@]}"
  execute rm source.tar.gz
  # The versions that were tested together, for the Python that the workers have.
  on_workers "set -e; mkdir -p $dir; tar -xzf moe_embed_jax.tar.gz -C $dir; cd $dir; \
constraints=constraints/\$($python -c 'import sys; print(\"python%d.%d.txt\" % sys.version_info[:2])'); \
ls \$constraints; $python -m venv .venv; \
.venv/bin/python -m pip install --quiet --constraint \$constraints --editable .[tpu,gcs]"
}

run() {
  local command
  printf -v command '%q ' "$@"
  # The number of the process lets \`stop\` end this run and nothing else.
  on_workers "cd $dir && source .venv/bin/activate && echo \$\$ > run.pid && exec ${command% }"
}

stop() {
  # A number left by a run that has ended may be another process's by now; ours works in --dir.
  on_workers "cd $dir && [[ /proc/\$(cat run.pid)/cwd -ef . ]] && kill -TERM \$(cat run.pid)"
}

name=${TPU_NAME:-}
zone=${TPU_ZONE:-}
project=${TPU_PROJECT:-}
dir=${TPU_DIR:-moe_embed_jax}
python=${TPU_PYTHON:-python3}
slices=${TPU_SLICES:-0}
dry_run=0
action=${1:-}
case $action in
  install | run | stop) shift ;;
  -h | --help)
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
    exit 0
    ;;
  "") fail "say what to do: install, run or stop" ;;
  *) fail "unknown action $action; choose install, run or stop" ;;
esac
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --dir=*) dir=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --slices) slices=1 ;;
    --dry_run) dry_run=1 ;;
    *) fail "unknown argument $1" ;;
  esac
  shift
done
if [[ ${1:-} == -- ]]; then
  shift
fi

[[ -n $name ]] || fail "--name (or TPU_NAME) is missing"
[[ -n $zone ]] || fail "--zone (or TPU_ZONE) is missing"
[[ $dir =~ ^[A-Za-z0-9._/-]+$ ]] || fail "--dir=$dir: use letters, digits and ._/- only"
[[ $python =~ ^[A-Za-z0-9._/-]+$ ]] || fail "--python=$python: use letters, digits and ._/- only"
if [[ $action == run ]]; then
  [[ $# -gt 0 ]] || fail "run needs a command: run ... -- python launch/train.py ..."
else
  [[ $# -eq 0 ]] || fail "$action takes no command, but there is: $*"
fi
if [[ $dry_run == 0 ]] && ! command -v gcloud > /dev/null; then
  fail "gcloud is not installed; --dry_run shows the commands"
fi
project_flag=()
if [[ -n $project ]]; then
  project_flag=(--project="$project")
fi
resource=tpu-vm
workers=(--worker=all)
if [[ $slices != 0 ]]; then
  resource=queued-resources
  workers=(--node=all --worker=all)
fi

cd "$(dirname "$0")/.."
"$action" "$@"
