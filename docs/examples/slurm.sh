#!/bin/bash
# Train on two nodes with four GPUs each: sbatch docs/examples/slurm.sh
#SBATCH --job-name=folora-q
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300  # five minutes before the end: a checkpoint is saved, and --resume continues from it

# The recipe, the data, the run folder and the caches must be on a file system that both nodes share.
export HF_HOME=$PWD/.cache/huggingface FOLORA_Q_CACHE=$PWD/.cache/folora-q
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=$([ -e runs/my/run.json ] && echo --resume)

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 4 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m folora_q train recipe.yaml training.output_dir=runs/my $resume
