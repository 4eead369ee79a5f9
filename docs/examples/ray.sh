#!/bin/bash
# One large model, and then many adapters, by the workers of a Ray cluster. lorafuse finds the cluster by RAY_ADDRESS, which
# Ray sets for a job; elsewhere give --address.
#
#   ray job submit --address http://HEAD:8265 -- bash docs/examples/ray.sh /data/base /data/adapter /data/adapters.jsonl /data/out
set -euo pipefail

lorafuse convert "$1" "$2" "$4/merged" --engine ray --memory-limit 2GB --quiet
exec lorafuse batch "$1" "$3" "$4/batch" --engine ray --memory-limit 2GB --quiet
