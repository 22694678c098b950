#!/usr/bin/env bash
# A batch run as eight Slurm jobs, one accelerator each, and one more that joins their outputs when all have succeeded:
#
#   examples/slurm_shards.sh configs/batch/large_sharded.yaml
#
# A job that is preempted, or whose node fails, is queued anew and goes on where it was. After any other end (out of time, a
# mistake that was put right) start this again: shards go on, and complete ones say so at once. Exit status 1 says that single
# rows failed, which are error rows in the output, or that a run had to stop: then `--merge` says that it is not complete.
set -euo pipefail

config=$1
shards=${SHARDS:-8}

job=$(sbatch --parsable --requeue --array="0-$((shards - 1))" --gpus=1 --cpus-per-task=8 --time=24:00:00 --job-name=jfp8kv \
  --output='jfp8kv-%A-%a.log' --wrap="jfp8kv batch '$config' --set \"shard=[\$SLURM_ARRAY_TASK_ID,$shards]\" || [ \$? -eq 1 ]")
sbatch --dependency="afterok:$job" --job-name=jfp8kv-merge --output='jfp8kv-%A-merge.log' \
  --wrap="jfp8kv batch '$config' --merge"
