#!/usr/bin/env bash
# Run a batch as eight Slurm jobs, one accelerator each, and merge their outputs when all have succeeded:
#
#   examples/slurm_shards.sh configs/batch/large_sharded.yaml
#
# A job that is preempted, or whose node fails, is requeued and resumes. After any other end (out of time, a fixed mistake)
# run this script again: shards resume, and complete ones exit at once. Exit status 1 means that some rows failed (they are
# error rows in the output) or that a run had to stop; `--merge` then reports that it is incomplete.
set -euo pipefail

config=$1
shards=${SHARDS:-8}

job=$(sbatch --parsable --requeue --array="0-$((shards - 1))" --gpus=1 --cpus-per-task=8 --time=24:00:00 --job-name=jfp8kv \
  --output='jfp8kv-%A-%a.log' --wrap="jfp8kv batch '$config' --set \"shard=[\$SLURM_ARRAY_TASK_ID,$shards]\" || [ \$? -eq 1 ]")
sbatch --dependency="afterok:$job" --job-name=jfp8kv-merge --output='jfp8kv-%A-merge.log' \
  --wrap="jfp8kv batch '$config' --merge"
