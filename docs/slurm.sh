#!/bin/bash
# Training under SLURM: one torchrun per machine, one process per GPU; stops before the time limit, saves and requeues.
#
#   sbatch docs/slurm.sh var --tokenizer runs/tokenizer --data datasets/nsynth --out runs/var --device cuda
#
# --out is needed, on a file system that all machines share: it is how the requeued job finds what to go on with.
#SBATCH --job-name=mars
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 150 \
    -m mars.cli.train "$@" &
training=$!

requeue=no
trap 'requeue=yes; kill -USR1 $training' USR1  # srun hands it to every torchrun, and those to the processes
wait $training
code=$?
while kill -0 $training 2>/dev/null; do  # the trap ended the wait
    wait $training
    code=$?
done

if [ $requeue = yes ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
