#!/bin/bash
# A run of nanorun that is queued again until it is finished: {{ training.name }}
# Made by `nanorun launch --slurm`. Submit it with sbatch, on a disk that all nodes share.
{% if training.prepare %}
# Compute nodes may have no network. Where there is one, first: {{ training.prepare }}
{% endif %}
{% for directive in directives %}
#SBATCH {{ directive }}
{% endfor %}

cd -- {{ folder }} || exit 2
{% for line in before %}
{{ line }}
{% endfor %}
python={{ python }}
train=(nanorun train {{ words }})
export OMP_NUM_THREADS={{ shape.cpus_per_rank }}

# How far the run has come. A job that comes no further is not queued again.
run={{ run }}
reached() { printf '%s\n' "$run"{{ "-s*" if training.n_seeds > 1 }}/checkpoints/step-*; }
before=$(reached)

# The ranks write their exit code here: torchrun ends with 1 whatever they end with.
NANORUN_EXIT_CODE=$(mktemp)
export NANORUN_EXIT_CODE

# What each node runs. A signal that comes before nanorun listens is left alone, and comes again.
{% if shape.many %}
# torchrun would end of SIGUSR1, so the ranks alone are sent it. SIGTERM goes to all, and it passes that on.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
on_node='
trap "" USR1 TERM
"$@" &
agent=$!
trap "pkill -USR1 -P $agent" USR1
trap : TERM
while kill -0 $agent 2>/dev/null; do wait $agent; done
wait $agent'
torchrun=("$python" -m torch.distributed.run --nproc-per-node={{ shape.ranks_per_node }} --max-restarts={{ shape.max_restarts }})
{% if shape.nodes > 1 %}
torchrun+=(--nnodes={{ shape.nodes }} --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}")
# This script runs on the first node, and the rendezvous there too: its torchrun is told so, instead of guessing.
torchrun+=(--rdzv-endpoint="$(hostname):$((10000 + SLURM_JOB_ID % 20000))")
on_node='export PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0))'$on_node
{% else %}
torchrun+=(--standalone)
{% endif %}
command=("${torchrun[@]}" -m -- "${train[@]}") # behind --, torchrun takes no option for its own
{% else %}
on_node='trap "" USR1 TERM; exec "$@"'
command=("$python" -m "${train[@]}")
{% endif %}

warned=
trap 'warned=yes' USR1 TERM
srun --kill-on-bad-exit=1 --cpus-per-task={{ shape.ranks_per_node * shape.cpus_per_rank }} bash -c "$on_node" bash "${command[@]}" &
step=$!
while kill -0 $step 2>/dev/null; do
    if [ "$warned" ]; then
        sleep 1
        kill -USR1 $step 2>/dev/null
        sleep 1
    else
        wait $step
    fi
done
wait $step
status=$?
told=$(cat "$NANORUN_EXIT_CODE")
rm -f "$NANORUN_EXIT_CODE"

if [ $status = 0 ]; then
    exit 0
elif [ "$told" = 1 ] || [ "$told" = 2 ]; then
    exit "$told" # it failed, or the command was wrong: once more would end alike
{% if training.n_seeds == 1 %}
elif [ -e "$run/result.json" ]; then
    exit 0 # finished, whatever ended badly after it
{% endif %}
elif [ "$(reached)" = "$before" ]; then
    echo "the run came no further in this job, so it is not queued again" >&2
elif [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
    echo "the job was cancelled; submitted again, it goes on with the run" >&2
else
    echo "stopped with a checkpoint; queued again" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "${told:-$status}"
