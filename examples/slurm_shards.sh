#!/usr/bin/env bash
# Run a batch as eight Slurm jobs with one accelerator each, and merge their outputs:
#
#   examples/slurm_shards.sh configs/batch/large_sharded.yaml
#
# Slurm requeues a job that is preempted or whose node fails, and it resumes. After any other end (out
# of time, a mistake that was fixed) run this again: shards resume, and complete ones end at once. Exit
# status 1 means that rows failed, which are error rows in the output, or that a run stopped. In the
# second case `--merge` reports that the shard is not complete.
set -euo pipefail

config=$1
shards=${SHARDS:-8}

run="jfp8kv batch '$config' --set \"shard=[\$SLURM_ARRAY_TASK_ID,$shards]\" || [ \$? -eq 1 ]"
job=$(sbatch --parsable --requeue --array="0-$((shards - 1))" --gpus=1 --cpus-per-task=8 \
  --time=24:00:00 --job-name=jfp8kv --output='jfp8kv-%A-%a.log' --wrap="$run")
sbatch --dependency="afterok:$job" --job-name=jfp8kv-merge --output='jfp8kv-%A-merge.log' \
  --wrap="jfp8kv batch '$config' --merge"
