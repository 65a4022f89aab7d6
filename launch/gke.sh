#!/usr/bin/env bash
# Prints the Kubernetes manifest of a run on a TPU slice of GKE: a pod a host, started again where it was preempted.
#
#   GKE_IMAGE=REGION-docker.pkg.dev/PROJECT/luthier:TAG GKE_ACCELERATOR=tpu-v5-lite-podslice GKE_TOPOLOGY=4x4 \
#     bash launch/gke.sh NAME HOSTS -- luthier train --config=… --workdir=gs://bucket/run | kubectl apply -f -
#
# GKE_CHIPS is the number of chips a host (default 4). The same image and command go to xpk:
#   xpk workload create --workload=NAME --tpu-type=v5litepod-16 --docker-image=$GKE_IMAGE --command='luthier train …'
set -euo pipefail

fail() { echo "launch/gke.sh: error: $1" >&2; exit 2; }

name="${1:-}" hosts="${2:-}"
[[ "$name" =~ ^[a-z][a-z0-9-]*$ ]] || fail "NAME must be lower-case letters, digits and dashes, got '$name'"
[[ "$hosts" =~ ^[1-9][0-9]*$ ]] || fail "HOSTS must be a number, got '$hosts'"
[[ "${3:-}" == "--" && $# -gt 3 ]] || fail "write the command after NAME HOSTS --"
shift 3
[[ -n "${GKE_IMAGE:-}" ]] || fail "no image: set GKE_IMAGE to one with Luthier in it"
[[ -n "${GKE_ACCELERATOR:-}" ]] || fail "no accelerator: set GKE_ACCELERATOR, such as tpu-v5-lite-podslice"
[[ -n "${GKE_TOPOLOGY:-}" ]] || fail "no topology: set GKE_TOPOLOGY, such as 4x4"

# A YAML string in single quotes, in which only the quote itself is special.
quoted() { printf "'%s'" "${1//\'/\'\'}"; }

words=""
for word in "$@"; do words+="
            - $(quoted "$word")"; done
addresses=""
for ((host = 0; host < hosts; host++)); do addresses+="${addresses:+,}$name-$host.$name"; done

cat << YAML
apiVersion: v1
kind: Service
metadata:
  name: $name
spec:
  clusterIP: None
  selector:
    job-name: $name
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $name
spec:
  completionMode: Indexed
  completions: $hosts
  parallelism: $hosts
  backoffLimit: 1000
  podFailurePolicy:
    rules:
      - action: Ignore
        onPodConditions:
          - type: DisruptionTarget
            status: "True"
      - action: Count
        onExitCodes:
          operator: In
          values: [75]
      - action: FailJob
        onExitCodes:
          operator: In
          values: [1, 2]
  template:
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: 120
      nodeSelector:
        cloud.google.com/gke-tpu-accelerator: $(quoted "$GKE_ACCELERATOR")
        cloud.google.com/gke-tpu-topology: $(quoted "$GKE_TOPOLOGY")
      containers:
        - name: luthier
          image: $(quoted "$GKE_IMAGE")
          command:$words
          env:
            - name: TPU_WORKER_HOSTNAMES
              value: $(quoted "$addresses")
            - name: TPU_WORKER_ID
              valueFrom:
                fieldRef:
                  fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
          resources:
            requests:
              google.com/tpu: ${GKE_CHIPS:-4}
            limits:
              google.com/tpu: ${GKE_CHIPS:-4}
YAML
