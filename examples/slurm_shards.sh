#!/usr/bin/env bash
# A batch run as eight Slurm jobs, one accelerator each, and one more that joins their outputs when all have succeeded:
#
#   examples/slurm_shards.sh configs/batch/large_sharded.yaml
#
# A job that is killed, preempted or out of time is queued anew and goes on where it was. Exit status 1 says that single rows
# failed: they are error rows in the output, and no reason to run the job again.
set -euo pipefail

config=$1
shards=${SHARDS:-8}

job=$(sbatch --parsable --requeue --array="0-$((shards - 1))" --gpus=1 --cpus-per-task=8 --time=24:00:00 --job-name=jfp8kv \
  --output='jfp8kv-%A-%a.log' --wrap="jfp8kv batch '$config' --set shard=[\$SLURM_ARRAY_TASK_ID,$shards] || [ \$? -eq 1 ]")
sbatch --dependency="afterok:$job" --job-name=jfp8kv-merge --output='jfp8kv-%A-merge.log' \
  --wrap="jfp8kv batch '$config' --merge"
